"""Batches and outboxes are cut to what frames carry."""

from __future__ import annotations

from typing import Any

import pytest
from pools import END, World
from scheduler_world import World as OneHolder
from scheduler_world import config

from lamina.kv.kv_shares import NO_PAGES, Share
from lamina.kv.request import FrameRoom
from lamina_protocols.frames import bounds
from lamina_protocols.frames.codec import encode
from lamina_protocols.messages.messages import Announcement


def shares(*holders: int) -> tuple[Share, ...]:
    return tuple(Share(holder, (0, 1), 16 * at, 16 * at + 16) for at, holder in enumerate(holders))


def test_a_token_counts_once_for_each_part_at_one_holder() -> None:
    room = FrameRoom(config(max_batch_tokens=16, frame_tokens=20, max_parts=100))
    assert room.limit(shares(1), 50) == 20
    assert room.limit(shares(1, 2, 3), 50) == 20
    assert room.limit(shares(1, 2, 1, 1), 50) == 6
    room.take(shares(1, 2, 1, 1), 5)
    assert room.limit(shares(1), 50) == 5
    assert room.limit(shares(1, 1), 50) == 2


def test_parts_of_all_holders_together_are_counted() -> None:
    room = FrameRoom(config(max_parts=5))
    room.take(shares(1, 2, 3), 1)
    assert room.limit(shares(1, 2), 1) == 1
    assert room.limit(shares(1, 2, 3), 1) == 0


def test_further_tokens_of_a_row_take_no_further_parts() -> None:
    room = FrameRoom(config(max_batch_tokens=16, frame_tokens=16, max_parts=3))
    room.take(shares(1, 2, 3), 4)
    assert room.limit(shares(1, 2, 3), 1) == 0
    assert room.further(shares(1, 2, 3), 20) == 12
    room.extend(shares(1, 2, 3), 5)
    assert room.further(shares(1, 2, 3), 20) == 7


@pytest.mark.parametrize("limits", [{"max_parts": 3}, {"frame_tokens": 16}])
def test_a_batch_has_no_more_rows_and_tokens_than_frames_carry_and_all_is_computed(limits: dict[str, Any]) -> None:
    world = OneHolder(config(max_batch_tokens=16, max_sequences=8, **limits), 200)
    for number in range(6):
        world.add([number % 4] * 30, max_tokens=5)
    world.finish()
    world.check_end()
    assert max(len(plan.rows) for plan in world.batches) <= limits.get("max_parts", 8)


@pytest.mark.fault("F09")
def test_more_operations_than_an_announcement_carries_go_in_slices_before_any_rows() -> None:
    """They went together, could not be sent, and every batch failed from then on."""
    world = World((4000, 4000), batch=64)
    control, placement = world.control, world.control.placement
    handles = [placement.open(placement.layout(END)) for _ in range(3 * bounds.MAX_OPERATIONS)]
    world.add([1, 2, 3])
    slices = []
    while placement.overfull:
        assert control.plan(alone=False) is None
        step = control.plan()
        assert step is not None
        assert not step.rows
        slices.append(max(len(batch.operations) for batch in step.batches.values()))
        step.accepted(world.announce(step))
    assert slices == [bounds.MAX_OPERATIONS] * 2
    for handle in handles:
        placement.close(handle, NO_PAGES)
    world.run()
    world.check_end()


def test_all_operations_that_wait_with_rows_fit_one_announcement() -> None:
    world = World((4000,), batch=64)
    placement = world.control.placement
    for _ in range(bounds.MAX_OPERATIONS):
        placement.open(placement.layout(END))
    for _ in range(8):
        world.add([1, 2, 3, 4, 5])
    step = world.control.plan()
    assert step is not None
    (batch,) = step.batches.values()
    assert len(batch.operations) > bounds.MAX_OPERATIONS
    assert len(batch.rows) == 8
    encode(Announcement(1, 1, batch.first, batch.operations, batch.rows))
