"""Which sequences give up their KV when pages run short."""

from __future__ import annotations

import pytest
from scheduler_world import MIXED, Groups, World, config, prompt


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
