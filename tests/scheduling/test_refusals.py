"""Pools whose answers the books contradict are given up, and nobody else is: over the control plane."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import LOCAL, Pool, World

from lamina.kv.request import PlannedRow, Request, ScheduledSequence
from lamina.scheduling.blame import REFUSALS, Refusals
from lamina_protocols.messages.messages import Announced
from lamina_protocols.messages.routes import HolderBatch


class Liar(Pool):
    """A pool that says it is full. `says`: the pages that it has left, as it says (None: as they are); `accepts`: it
    only says so, and accepts; `turns`: of so many announcements it is honest in one."""

    def __init__(self, pages: int, says: int | None, accepts: bool, turns: int) -> None:
        super().__init__(pages)
        self.says, self.accepts, self.turns = says, accepts, turns
        self.asked = 0

    def announce(self, batch: HolderBatch) -> Announced:
        self.asked += 1
        lies = self.asked % self.turns > 0
        self.refuses = lies and not self.accepts
        answer = super().announce(batch)
        return dataclasses.replace(answer, free_pages=(self.says,)) if lies and self.says is not None else answer


def samples(world: World, asked: list[tuple[int, int]]) -> None:
    for salt, (length, tokens) in enumerate(asked):
        world.add([100 * (salt // 2) + at for at in range(length)], tokens)


ASKED = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12)


@pytest.mark.fault("F07")
@given(
    asked=ASKED, says=st.sampled_from([None, 0, 1, 10**12]), lanes=st.integers(1, 2), local=st.sampled_from([0, 256]),
    prefix_cache=st.booleans(), pages=st.sampled_from([200, 4000]), late=st.integers(0, 12),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_pool_that_is_always_full_is_given_up_and_nobody_else_loses_anything(
    asked: list[tuple[int, int]], says: int | None, lanes: int, local: int, prefix_cache: bool, pages: int, late: int
) -> None:
    """A pool was believed whatever it said: what was kept there was preempted, and ended, for ever."""
    world = World((pages, pages, pages), lanes=lanes, local=local, prefix_cache=prefix_cache)
    world.control.placement.local_share = 0.5
    samples(world, asked)
    for _ in range(late):
        if not world.begin() and world.in_flight:
            world.finish()
    liar = Liar(pages, says, False, 1 << 30)
    vars(liar).update(vars(world.pools[2]))  # it was honest so far
    world.pools[2] = liar
    samples(world, asked)
    world.run(4000)
    assert world.given_up in ([], [2])
    assert all(sample.finish_reason == "length" for sample in world.samples)
    if world.given_up:
        world.check_end()


@given(asked=ASKED, says=st.sampled_from([0, 3]), lanes=st.integers(1, 2), turns=st.sampled_from([2, 3, 1 << 30]))
@settings(max_examples=60, deadline=None)
def test_pool_that_says_too_little_costs_nobody_anything(
    asked: list[tuple[int, int]], says: int, lanes: int, turns: int
) -> None:
    """A pool that accepted and had nothing left, as it said, was given one token at a time."""
    world = World((4000, 4000), lanes=lanes)
    world.pools[2] = Liar(4000, says, True, turns)
    samples(world, asked)
    world.run()
    assert not world.given_up
    assert world.control.scheduler.counters.preempted == 0
    world.check_end()


def test_pool_is_given_up_after_so_many_answers() -> None:
    world = World((4000, 4000))
    world.pools[2] = Liar(4000, None, False, 1 << 30)
    samples(world, [(9, 4)] * 4)
    for tries in range(REFUSALS):
        assert not world.given_up, tries
        world.begin()
    assert world.given_up == [2]
    assert world.control.scheduler.counters.preempted == 0
    world.run()
    world.check_end()


def test_pool_in_this_process_is_found_too() -> None:
    world = World((400,), local=400)
    world.pools[LOCAL] = Liar(400, 0, False, 1 << 30)
    samples(world, [(9, 4)])
    for _ in range(REFUSALS):
        world.begin()
    assert world.given_up == [LOCAL]


def row(sequence: ScheduledSequence, start: int) -> PlannedRow:
    return PlannedRow(sequence, 1, start, 4, sample=False)


def test_lost_kv_is_counted_until_as_much_is_computed_as_was_lost() -> None:
    refusals, one = Refusals(), ScheduledSequence(Request("0", (1,) * 90, 1), 0, 0, [1] * 90)
    for _ in range(REFUSALS - 1):
        assert not refusals.lacks(1, row(one, 20), 10)
    refusals.passed(row(one, 24))
    assert refusals.lacks(1, row(one, 28), 24)
    assert not refusals.lacks(2, row(one, 28), 24)  # each holder has a count of its own
    refusals.passed(row(one, 32))
    assert not refusals.lacks(1, row(one, 36), 32)
    refusals.forget(one)
    assert not refusals.lacks(1, row(one, 36), 32)
