"""What the scheduler does after a batch failed, KV was lost or a sequence ended in flight."""

from __future__ import annotations

import pytest
from scheduler_world import World, batches, config, prompt

from lamina.errors import EngineError
from lamina.scheduling.request import CloseSequence


def test_batch_is_planned_again_after_it_failed() -> None:
    world = World(config(max_batch_tokens=8))
    world.add(prompt(20), max_tokens=3)
    world.step()
    world.plan()
    world.answer()
    world.drop()
    world.finish()
    assert batches(world)[1] == batches(world)[2] == [("0", 8, 8)]
    world.check_end()


def test_kv_is_computed_again_after_a_holder_lost_it() -> None:
    world = World(config())
    for salt in range(3):
        world.add(prompt(14, salt), max_tokens=4)
    world.step()
    world.plan()
    with pytest.raises(EngineError, match="1 plans in flight"):
        world.scheduler.recompute()
    world.answer()
    world.record()
    world.forget()
    world.finish()
    assert world.computed_tokens == 2 * 16 + 3 * 17
    world.check_end()


def test_abort_in_flight_drops_the_token_and_frees_the_kv() -> None:
    world = World(config(prefix_cache=False))
    (sequence,) = world.add(prompt(6), max_tokens=3)
    world.plan()
    world.answer()
    assert world.scheduler.abort("0") == (sequence,)
    assert world.scheduler.abort("0") == ()
    world.record()
    assert sequence.tokens == prompt(6)
    plan = world.scheduler.plan()
    assert plan is not None
    assert plan.rows == ()
    assert plan.operations == (CloseSequence(1),)
    world.sent.append(plan)
    world.finish()
    world.check_end()
