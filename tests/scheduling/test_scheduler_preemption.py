"""Which sequences give up their KV when pages run short."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import LAYERS, LOCAL, Pool
from pools import World as Tiers
from scheduler_world import MIXED, Groups, World, config, prompt

from lamina.kv.request import ScheduledSequence
from lamina_protocols.messages.messages import Announced
from lamina_protocols.messages.routes import HolderBatch


@pytest.mark.fault("F11")
@pytest.mark.parametrize("groups", [((2, None),), ((1, None), (1, 6)), MIXED])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_oldest_sequence_always_advances_under_memory_pressure(groups: Groups, prefix_cache: bool) -> None:
    tight = config(page_groups=groups, prefix_cache=prefix_cache, max_sequences=16)
    world = World(tight, 40, hidden=6)
    samples = [world.add(prompt(6, salt), max_tokens=40)[0] for salt in range(16)]
    while world.scheduler.has_work:
        oldest = next((sequence for sequence in samples if sequence.finish_reason is None), None)
        before = len(world.batches)
        world.step()
        if oldest is not None and len(world.batches) > before:
            assert oldest in {row.sequence for row in world.batches[-1].rows}
    world.check_end()
    assert world.scheduler.counters.preempted > 0


def test_youngest_sequence_is_preempted_first() -> None:
    world = World(config(max_batch_tokens=32, prefix_cache=False), 24)
    samples = [world.add(prompt(length, length), max_tokens=30)[0] for length in (8, 6, 5)]  # the first runs short
    while world.scheduler.counters.preempted == 0:
        assert world.step()
    assert [sequence.preemptions for sequence in samples] == [0, 0, 1]
    world.finish()
    world.check_end()


def test_preemption_does_not_thrash() -> None:
    """Each sequence grows to eight times its prompt, and all of them to thirteen times the memory."""
    world = World(config(max_sequences=64, max_batch_tokens=64), 80)
    for salt in range(40):
        world.add(prompt(6, salt), max_tokens=46)
    world.finish()
    assert 0 < world.scheduler.counters.preempted <= 2 * 40
    assert world.computed_tokens < 2 * 40 * 51
    world.check_end()


class RowsRefused(Pool):
    """Refuses no announcement without rows: that needs no pages."""

    def announce(self, batch: HolderBatch) -> Announced:
        self.refuses = self.refuses and bool(batch.rows)
        return super().announce(batch)


@given(
    local=st.integers(4, 20),
    share=st.sampled_from([0.3, 0.6]),
    asked=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=4, max_size=16),
    refusals=st.sets(st.integers(0, 80), max_size=6),
    lanes=st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_only_what_is_kept_where_pages_are_short_makes_room(
    local: int, share: float, asked: list[tuple[int, int]], refusals: set[int], lanes: int
) -> None:
    """A page that was short beside the model took the KV of sequences and prefixes at attention workers with room."""
    world = Tiers((5000, 5000), local=local * LAYERS * 4, tier=True, lanes=lanes, prefix_cache=True)
    world.pools[LOCAL] = RowsRefused(world.pools[LOCAL].total)
    scheduler, placement = world.control.scheduler, world.control.placement
    placement.local_share = share
    victims: list[bool] = []
    preempt = scheduler.admission.preempt

    def noted(sequence: ScheduledSequence) -> None:
        victims.append(placement.is_local(sequence.layout))
        preempt(sequence)

    scheduler.admission.preempt = noted  # type: ignore[method-assign]
    far: list[ScheduledSequence] = []
    for salt, (length, tokens) in enumerate(asked):
        (sample,) = world.add(prompt(length, salt), tokens)
        for step in range(3):
            world.pools[LOCAL].refuses = 3 * salt + step in refusals
            world.begin()
            if len(world.in_flight) >= lanes:
                world.finish()
        if sample.layout and not placement.is_local(sample.layout):
            far.append(sample)
    world.run()
    assert all(victims)
    for sample in far:
        length = len(sample.tokens) - 1
        assert scheduler.running.prefix_cache.match(tuple(sample.tokens)).length >= length - length % 4
    world.check_end()
