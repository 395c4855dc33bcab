"""The control plane over real scheduling and placement: what is believed of holders is what they have answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pools import LAYERS, LOCAL, Pool, World

from lamina.errors import EngineError
from lamina.kv import kv_rebuild, relocation
from lamina.kv.kv_shares import SHARDS
from lamina.kv.placement import Holder
from lamina.kv.prefix_nodes import common_length
from lamina.scheduling.control_plane import Step
from lamina_protocols.messages.messages import Announced


def prompt(length: int, salt: int = 0) -> list[int]:
    return [100 * salt + at for at in range(length)]


def planned(world: World) -> Step:
    step = world.control.plan()
    assert step is not None
    return step


def accepted(world: World, step: Step, floors: dict[int, tuple[int, ...]]) -> None:
    """Every pool accepts, with these floors."""
    answers = {
        number: Announced(0, 0, True, answer.free_pages, floors.get(number, answer.floors))
        for number, answer in world.announce(step).items()
    }
    step.accepted(answers)


def test_recorded_step_gives_the_outcomes_of_its_samples() -> None:
    world = World()
    (sequence,) = world.add(prompt(6), max_tokens=1)
    step = planned(world)
    assert [(row.start, row.count) for row in step.rows] == [(0, 6)]
    assert world.control.plan(alone=False) is None
    step.accepted(world.announce(step))
    world.in_flight.append(step)
    (outcome,) = world.finish()
    assert (outcome.sequence, outcome.finish_reason) == (sequence, "length")


def test_operations_alone_are_a_step_that_is_over_once_accepted() -> None:
    world = World()
    world.add(prompt(6), max_tokens=1)
    world.begin()
    world.finish()
    step = planned(world)
    assert not step.rows
    step.accepted(world.announce(step))
    assert not world.control.has_work
    assert not world.pools[1].parts


def test_holder_of_an_accepted_part_gets_its_operations_once_when_another_refuses() -> None:
    world = World((400, 400))
    world.add(prompt(6))
    world.pools[2].refuses = True
    assert world.begin()
    assert not world.plans
    assert (world.pools[1].applied, world.pools[2].applied) == (1, 0)
    step = planned(world)
    assert {number: len(batch.operations) for number, batch in step.batches.items()} == {1: 0, 2: 1}
    step.dropped()
    world.run()
    world.check_end()


def test_rows_are_planned_again_after_their_step_is_dropped() -> None:
    world = World()
    world.add(prompt(6))
    step = planned(world)
    step.dropped()  # its answers never came
    again = planned(world)
    assert [(row.start, row.count) for row in again.rows] == [(row.start, row.count) for row in step.rows]
    again.accepted(world.announce(again))
    again.dropped()  # its batch failed
    world.run()
    world.check_end()


def test_sequence_that_can_never_go_on_is_returned_by_the_refusal_that_ends_it() -> None:
    world = World()
    (sequence,) = world.add(prompt(6), max_tokens=1)
    ended: tuple[object, ...] = ()
    while not ended:
        world.pools[1].refuses = True
        step = planned(world)
        ended = step.refused(world.announce(step))
    assert ended == (sequence,)
    assert sequence.finish_reason == "abort"


def test_pages_of_local_copies_are_counted() -> None:
    world = World((400,), local=80)
    world.add(prompt(7))
    world.begin()
    assert world.control.scheduler.ledger.free == {(1, 0): 400 - 2 * LAYERS * 4, (LOCAL, 0): 80 - 2 * LAYERS * 4}
    world.run()
    assert world.control.scheduler.ledger.free == {(1, 0): 400, (LOCAL, 0): 80}


def test_local_copy_is_closed_once_its_prompt_is_computed() -> None:
    world = World((400,), local=80)
    (sequence,) = world.add(prompt(7))
    world.begin()
    world.finish()
    assert world.begin()
    assert sequence.finish_reason is None
    assert not world.pools[LOCAL].parts
    assert world.said[LOCAL] == 80


@pytest.mark.parametrize("floors", [(3, 5), (5, 3)])
def test_floor_of_a_row_is_the_highest_of_its_parts(floors: tuple[int, int]) -> None:
    world = World((400, 400))
    (sequence,) = world.add(prompt(6))
    accepted(world, planned(world), {number: (floor,) for number, floor in enumerate(floors, 1)})
    assert sequence.floor == 5


def test_floors_of_local_copies_do_not_count() -> None:
    world = World((400,), local=80)
    (sequence,) = world.add(prompt(6))
    accepted(world, planned(world), {1: (2,), LOCAL: (6,)})
    assert sequence.floor == 2


def test_floor_stays_while_a_part_is_not_asked() -> None:
    world = World((400, 400), local=400, shard="sequence", batch=16)
    (sequence,) = world.add(prompt(40), max_tokens=2)
    while sequence.computed < 32:
        world.begin()
        world.finish()
    sequence.floor = 7
    step = planned(world)
    assert sum(number != LOCAL for number in step.batches) == 1 < len(sequence.layout)
    accepted(world, step, {})
    assert sequence.floor == 7


@pytest.mark.parametrize(("local", "expected"), [(400, (7, 0)), (0, (0, 7))])
def test_tokens_read_are_counted_for_each_tier(local: int, expected: tuple[int, int]) -> None:
    world = World((400,), local=local, tier=local > 0)
    world.add(prompt(6))
    world.begin()
    world.finish()
    step = planned(world)
    assert step.plan is not None
    assert world.control.tokens_read(step.plan) == expected


def test_holder_that_joins_takes_new_sequences_and_one_that_left_takes_none() -> None:
    world = World((400,))
    world.pools[2], world.said[2] = Pool(400), 400
    world.control.joined(2, Holder((400,)))
    world.check()
    (sequence,) = world.add(prompt(6))
    world.begin()
    assert {share.holder for share in sequence.layout} == {1, 2}
    world.finish()
    world.run()
    world.check_end()
    del world.pools[2], world.said[2]
    world.control.left(2)
    world.check()
    (sequence,) = world.add(prompt(6))
    world.begin()
    assert {share.holder for share in sequence.layout} == {1}


def test_number_of_a_holder_is_refused_twice() -> None:
    with pytest.raises(EngineError, match="holder 1 joined twice"):
        World().control.joined(1, Holder((5,)))


def test_lost_part_is_computed_again_and_the_rest_is_kept() -> None:
    world = World((400, 400))
    (sequence,) = world.add(prompt(10))
    world.begin()
    world.finish()
    assert world.lose(2) == (10, 0, 0)
    assert sequence.computed == 10
    world.run()
    assert world.control.scheduler.counters.rebuilt_tokens == 10
    world.check_end()


def test_sequence_begins_anew_when_every_part_of_it_is_lost() -> None:
    world = World((400, 400))
    world.control.placement.holders[2].draining = True
    (sequence,) = world.add(prompt(10))
    world.begin()
    world.finish()
    world.control.placement.holders[2].draining = False
    assert world.lose(1) == (0, 10, 0)
    assert sequence.computed == 0
    world.run()
    world.check_end()


def test_nothing_is_lost_while_a_step_is_in_flight() -> None:
    world = World((400, 400))
    world.add(prompt(10))
    world.begin()
    with pytest.raises(EngineError, match="in flight"):
        world.lose(2)


def test_emptied_local_pool_has_its_sequences_computed_again() -> None:
    world = World((400,), local=400, tier=True)
    (sequence,) = world.add(prompt(10))
    world.begin()
    world.finish()
    assert {share.holder for share in sequence.layout} == {LOCAL}
    assert world.empty(LOCAL) == 10
    world.check()
    world.run()
    world.check_end()


def test_local_copy_in_an_emptied_pool_costs_no_tokens() -> None:
    world = World((400,), local=400, batch=4)
    world.add(prompt(10))
    world.begin()
    world.finish()
    assert world.empty(LOCAL) == 0
    world.run()
    world.check_end()


@pytest.mark.fault("F29")
def test_pages_that_only_two_prefixes_share_are_counted_once() -> None:
    """Pages that prefixes shared with each other, and not with the one above them, were counted as nobody's."""
    world = World((400,), local=64, prefix_cache=True)
    world.add(prompt(9), max_tokens=4)
    world.run()
    (filler,) = world.add(prompt(13, 5), max_tokens=8)  # now the prefix has no room to be used where it is
    world.begin()
    world.finish()
    twins = world.add(prompt(9), max_tokens=8, n=2)
    world.begin()
    assert filler.handle is not None
    assert {share.holder for share in twins[0].layout} == {1}
    world.finish()
    assert twins[1].computed == 8
    world.run()
    world.check_end()


@pytest.fixture(autouse=True, scope="module")
def growth_always_pays() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relocation, "MIN_GROWTH", 1)
        yield


class Machine(RuleBasedStateMachine):
    """Requests, steps, refusals, failures, losses, joins and drains in any order."""

    @initialize(
        shard=st.sampled_from(SHARDS),
        pools=st.integers(1, 4),
        pages=st.sampled_from([160, 300]),
        local=st.sampled_from([0, 40, 200, 256]),
        tier=st.booleans(),
        lanes=st.integers(1, 2),
        batch=st.sampled_from([1, 5, 16]),
        prefix_cache=st.booleans(),
    )
    def start(
        self, shard: str, pools: int, pages: int, local: int, tier: bool, lanes: int, batch: int, prefix_cache: bool
    ) -> None:
        self.world = World(
            (pages,) * pools, local=local, tier=tier and local > 0, shard=shard, lanes=lanes, batch=batch,
            prefix_cache=prefix_cache,
        )  # fmt: skip
        self.last = pools
        self.liars: set[int] = set()

    @rule(shared=st.integers(0, 14), tail=st.integers(1, 6), salt=st.integers(1, 3), max_tokens=st.integers(1, 8),
          n=st.integers(1, 2))  # fmt: skip
    def add(self, shared: int, tail: int, salt: int, max_tokens: int, n: int) -> None:
        self.world.add(prompt(shared) + prompt(tail, salt), max_tokens, n)

    @rule()
    def begin(self) -> None:
        self.world.begin()

    @precondition(lambda self: self.world.in_flight)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.world.finish(data.draw(st.integers(0, len(self.world.in_flight) - 1)))

    @precondition(lambda self: self.world.in_flight)
    @rule()
    def fail(self) -> None:
        self.world.in_flight.pop().dropped()

    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.world.pools)))
        self.liars.add(number)
        self.world.pools[number].refuses = not self.last_one(number)
        self.world.begin()

    def last_one(self, number: int) -> bool:
        """Whether nobody could take over from this pool."""
        return not self.world.pools.keys() - {LOCAL, number} - self.world.control.placement.draining

    @precondition(lambda self: not self.world.in_flight)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        numbers = [number for number in self.world.pools if number != LOCAL]
        if len(numbers) > 1:
            self.world.lose(data.draw(st.sampled_from(numbers)))

    @precondition(lambda self: not self.world.in_flight)
    @rule()
    def empty(self) -> None:
        if LOCAL in self.world.pools:
            self.world.empty(LOCAL)

    @rule()
    def join(self) -> None:
        self.last += 1
        self.last += self.last == LOCAL
        self.world.pools[self.last], self.world.said[self.last] = Pool(300), 300
        self.world.control.joined(self.last, Holder((300,)))
        self.world.control.scheduler.growth.joined([self.last])

    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        """Nothing new goes to a pool for a while."""
        draining = self.world.control.placement.draining
        numbers = [number for number in self.world.pools if number != LOCAL and number not in draining]
        if draining:
            self.world.control.stay(draining)
        elif len(numbers) > 1:
            self.world.control.drain([data.draw(st.sampled_from(numbers))])

    @precondition(lambda self: self.world.samples)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.world.control.scheduler.abort(data.draw(st.sampled_from(self.world.samples)).request.id)

    @invariant()
    def believes_what_was_said(self) -> None:
        if hasattr(self, "world"):
            self.world.check()
            assert self.liars.issuperset(self.world.given_up), "an honest pool is given up"

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.control.stay(self.world.control.placement.draining)
            while self.world.in_flight:
                self.world.finish()
            self.world.run()
            self.world.check_end()


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = Machine.TestCase


@pytest.mark.parametrize("pools", [3, 5])
@pytest.mark.parametrize("questions", range(5))
def test_heads_are_dealt_evenly_however_many_questions_are_asked(pools: int, questions: int) -> None:
    """The first holder changed with each question, so that with an even number of questions one got every odd head."""
    world = World((4000,) * pools)
    for salt in range(8):
        for _ in range(questions):
            world.control.placement.layouts(20)
        world.add(prompt(6, salt), max_tokens=50)
        world.begin()
        world.finish()
    heads = [sum(len(part.heads) for part in pool.parts.values()) for pool in world.pools.values()]
    assert sum(heads) == 8 * 4
    assert max(heads) - min(heads) <= 1


def test_a_loss_compares_only_sequences_that_begin_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sequence of a lost holder was compared with every other, its tokens copied each time."""
    compared: list[int] = []

    def counted(a: Sequence[int], b: Sequence[int]) -> int:
        compared.append(min(len(a), len(b)))
        return common_length(a, b)

    monkeypatch.setattr(kv_rebuild, "common_length", counted)
    world = World((4000, 4000), batch=200)
    for salt in range(5):
        world.add([7, *prompt(9, salt)], max_tokens=8)
    for _ in range(3):  # two of these have the same heads there
        world.add(prompt(16, 9), max_tokens=8)
    world.begin()
    world.finish()
    world.lose(1)
    assert len(compared) == 1
    world.run()
    world.check_end()
