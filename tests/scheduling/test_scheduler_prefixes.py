"""KV that requests and samples share: what is computed once, and what never enters the prefix cache."""

from __future__ import annotations

import pytest
from scheduler_world import World, batches, config, prompt


def test_shared_prefix_is_computed_once() -> None:
    world = World(config(max_batch_tokens=64, max_model_len=100), 1000)
    for tail in range(6):
        world.add(prompt(40) + prompt(3, tail + 1), max_tokens=1)
    world.finish()
    assert world.computed_tokens == 40 + 6 * 3
    assert world.scheduler.counters.reused_tokens == 5 * 40
    assert [sequence.reused for sequence in world.samples] == [0] + 5 * [40]
    world.check_end()


def test_plan_overtakes_a_request_that_waits_for_a_prefix() -> None:
    world = World(config(max_batch_tokens=64, max_model_len=100), 1000)
    world.add(prompt(40), max_tokens=1)
    world.add(prompt(16) + prompt(4, 1), max_tokens=1)
    world.add(prompt(2, 2), max_tokens=1)
    world.finish()
    assert batches(world)[:2] == [[("0", 0, 40), ("2", 0, 2)], [("1", 16, 4)]]
    world.check_end()


def test_request_does_not_wait_for_a_prefix_of_lower_priority() -> None:
    world = World(config(max_batch_tokens=64, max_model_len=100), 1000)
    world.add(prompt(40), max_tokens=1, priority=1)
    world.plan()
    world.add(prompt(32) + prompt(4, 1), max_tokens=1, priority=0)
    world.add(prompt(32) + prompt(4, 2), max_tokens=1, priority=1)
    world.plan()
    world.finish()
    assert batches(world)[:3] == [[("0", 0, 40)], [("1", 0, 36)], [("2", 32, 4)]]
    world.check_end()


def test_waiting_requests_compute_the_prefix_when_its_writer_is_aborted() -> None:
    world = World(config(max_batch_tokens=64, max_model_len=100), 1000)
    world.add(prompt(40), max_tokens=1)
    for tail in (1, 2):
        world.add(prompt(32) + prompt(3, tail), max_tokens=1)
    world.plan()
    world.answer()
    world.scheduler.abort("0")
    world.drop()
    world.finish()
    assert world.computed_tokens == 32 + 3 + 3  # the first that waited becomes the writer
    world.check_end()


def test_prefix_is_not_forked_below_the_window_after_a_lost_answer() -> None:
    world = World(config(page_groups=((1, 4),), max_batch_tokens=11))
    world.add(prompt(30), max_tokens=1)
    world.step()
    world.plan()
    world.lose()  # at 11 the window has left all but the page from 8 on, which cannot be cut back to 8
    world.scheduler.abort("0")
    world.finish()
    world.check_end()


def test_prefix_is_not_forked_below_the_window_after_a_refusal() -> None:
    world = World(config(page_groups=((1, 4),), max_batch_tokens=11))
    world.add(prompt(30), max_tokens=1)
    world.step()
    world.plan()
    world.disagree()  # this holder has cut up to 11, as if the batch were to run
    world.scheduler.abort("0")
    world.finish()
    world.check_end()


@pytest.mark.fault("F25")
@pytest.mark.parametrize("aborted", [False, True])
def test_prefix_cache_never_takes_kv_that_is_not_to_be_kept(aborted: bool) -> None:
    world = World(config())
    (spoilt,) = world.add(prompt(14), max_tokens=4)
    world.step()
    world.plan()
    world.answer()
    if aborted:
        world.scheduler.abort("0")
    world.scheduler.end(spoilt, "abort", keep=False)
    world.record()
    world.check_integrity()
    (second,) = world.add([*spoilt.tokens, 5], max_tokens=2)
    world.finish()
    assert second.reused == 12  # the prompt's whole pages, from the batch before
    world.check_end()


@pytest.mark.parametrize("waiting", [0, 1])
def test_prefix_is_computed_again_when_its_first_batch_was_spoilt(waiting: int) -> None:
    world = World(config())
    (spoilt,) = world.add(prompt(14), max_tokens=4, n=2)[:1]
    world.plan()
    others = [world.add([*prompt(12), 5], max_tokens=2)[0] for _ in range(waiting)]
    world.plan()
    while world.sent:
        world.answer()
    world.scheduler.end(spoilt, "abort", keep=False)
    world.record()
    world.finish()
    assert [other.reused for other in others] == [12] * waiting  # from the second sample
    assert world.computed_tokens == 14 + 14 + 3 + 2 * waiting
    world.check_end()


def test_prefix_cache_keeps_earlier_batches_when_the_writer_ends() -> None:
    world = World(config(max_batch_tokens=8))
    (spoilt,) = world.add(prompt(20), max_tokens=4)
    world.plan()
    (other,) = world.add([*prompt(8), 5], max_tokens=1)  # has the tree split off 8 tokens
    world.plan()
    world.answer()
    world.record()
    assert world.scheduler.running.prefix_cache.match(tuple(prompt(20))).length == 8
    while not spoilt.in_flight:
        world.step()
        world.plan()
    world.scheduler.end(spoilt, "abort", keep=False)
    world.finish()
    match = world.scheduler.running.prefix_cache.match(tuple(prompt(20)))
    assert (match.length, match.promised, other.reused) == (8, 0, 8)
    world.check_end()


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("length", [1, 2, 8, 9, 11])
def test_samples_share_their_prompt(prefix_cache: bool, length: int) -> None:
    world = World(config(max_sequences=4, prefix_cache=prefix_cache))
    samples = world.add(prompt(length), max_tokens=5, n=4)
    world.finish()
    assert world.computed_tokens == length + 3 + 4 * 4
    assert len({tuple(sample.tokens) for sample in samples}) > 1
    world.check_end()


def test_next_turn_of_a_chat_reuses_the_kv_of_the_last() -> None:
    world = World(config())
    (first,) = world.add(prompt(6), max_tokens=7)
    world.finish()
    (second,) = world.add([*first.tokens, 7, 7, 7], max_tokens=3)
    world.finish()
    assert second.reused == 12  # of 13 tokens the last was never fed back
    world.check_end()


@pytest.mark.fault("F30")
def test_prefix_cache_shares_nothing_between_salts() -> None:
    world = World(config())
    for salt in ("a", "b", None):
        (sequence,) = world.add(prompt(12), max_tokens=2, salt=salt)
        world.finish()
        assert sequence.reused == 0
    (sequence,) = world.add(prompt(12), max_tokens=2, salt="a")
    world.finish()
    assert sequence.reused == 11
    world.check_end()


def test_full_prefix_cache_is_evicted_before_a_request_is_preempted() -> None:
    world = World(config(), 40)
    for salt in range(10):
        world.add(prompt(30, salt), max_tokens=8)
        world.finish()
    assert world.scheduler.counters.evicted > 0
    assert world.scheduler.counters.preempted == world.refusals == 0
    world.check_end()
