"""What the scheduler does after a batch failed, KV was lost or a sequence ended in flight."""

from __future__ import annotations

from scheduler_world import Close, World, config, prompt


def test_kv_that_did_not_reach_a_holder_is_computed_again_and_no_other() -> None:
    """All KV of all sequences was computed again, and only where somebody had noted that a message was lost."""
    world = World(config(max_batch_tokens=64))
    for salt in range(3):
        world.add(prompt(14, salt), max_tokens=4)
    world.step()
    assert world.plan()
    assert world.answer()
    world.record(lost=1)
    assert world.plan()
    assert not world.answer()
    world.finish()
    assert world.computed_tokens == 3 * 17 + 1
    assert not world.refusals
    world.check_end()


def test_fork_of_kv_that_did_not_reach_a_holder_is_computed_again() -> None:
    world = World(config(max_batch_tokens=64))
    world.add(prompt(14), max_tokens=4)
    assert world.plan()
    assert world.answer()
    world.record(lost=1)
    world.add(prompt(14), max_tokens=4)
    assert world.plan()
    assert not world.answer()
    world.finish()
    assert world.computed_tokens == 14 + 17 + 5  # both begin anew, the second with the whole pages of the first
    world.check_end()


def test_sequence_begins_anew_when_its_windows_have_left_what_did_not_reach_a_holder() -> None:
    world = World(config(max_batch_tokens=64, page_groups=((1, 5),), prefix_cache=False))
    (sequence,) = world.add(prompt(30), max_tokens=4)
    world.step()
    world.step()
    (part,) = world.holder.parts.values()
    part.stored = sequence.floor - 1
    assert world.plan()
    assert not world.answer()
    assert sequence.handle is None
    world.finish()
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
    assert world.plan()
    assert (world.sent[-1].plan.rows, world.sent[-1].operations) == ((), (Close(1),))
    world.finish()
    world.check_end()
