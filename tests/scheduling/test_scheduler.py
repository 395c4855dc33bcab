"""The scheduler against a plain model of a holder: the right KV in the right place, and every request ends."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import settings
from scheduler_world import MIXED, Groups, Machine, OneHolder, World, batches, config, most, prompt

from lamina.errors import EngineError, InvalidRequest
from lamina.scheduling.kv_shares import Pages
from lamina.scheduling.request import (
    CloseSequence,
    Request,
    ScheduledSequence,
)
from lamina.scheduling.scheduler import Scheduler

Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, lamina.scheduling.scheduler; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_prefill_fills_what_decoding_leaves() -> None:
    world = World(config(max_batch_tokens=8, prefix_cache=False))
    world.add(prompt(3), max_tokens=6)
    world.step()
    world.add(prompt(20, 1), max_tokens=2)
    world.finish()
    assert batches(world)[:5] == [
        [("0", 0, 3)],
        [("0", 3, 1), ("1", 0, 7)],
        [("0", 4, 1), ("1", 7, 7)],
        [("0", 5, 1), ("1", 14, 6)],
        [("0", 6, 1), ("1", 20, 1)],
    ]
    world.check_end()


def test_first_come_first_served_within_a_priority() -> None:
    world = World(config(max_sequences=1, prefix_cache=False))
    for salt, priority in enumerate([1, 1, 0, 1, 0]):
        world.add(prompt(5, salt), max_tokens=2, priority=priority)
    world.finish()
    order = list(dict.fromkeys(name for batch in batches(world) for name, _, _ in batch))
    assert order == ["2", "4", "0", "1", "3"]


@pytest.mark.parametrize("groups", [((2, None),), ((1, None), (1, 6)), MIXED])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_under_pressure_the_oldest_always_advances(groups: Groups, prefix_cache: bool) -> None:
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


def test_the_youngest_is_preempted() -> None:
    world = World(config(max_batch_tokens=32, prefix_cache=False), 24)
    samples = [world.add(prompt(length, length), max_tokens=30)[0] for length in (8, 6, 5)]  # the first runs short
    while world.scheduler.counters.preempted == 0:
        assert world.step()
    assert [sequence.preemptions for sequence in samples] == [0, 0, 1]
    world.finish()
    world.check_end()


def test_admission_leaves_what_those_running_still_need() -> None:
    world = World(config(max_batch_tokens=8), 28)  # 14 page sets
    world.add(prompt(40), max_tokens=1)
    world.plan()
    world.add(prompt(20, 1), max_tokens=1)
    assert not world.plan()
    world.finish()
    world.check_end()


def test_admission_counts_no_prefix_as_room_that_it_shares() -> None:
    world = World(config(max_batch_tokens=64), 28)
    world.add(prompt(33), max_tokens=1)  # leaves 8 page sets in the cache
    world.finish()
    world.add(prompt(14, 1), max_tokens=30)  # takes 4, and leaves 2
    world.step()
    world.add(prompt(44), max_tokens=1)  # needs 3 beside the 8, and one to grow
    world.step()
    assert batches(world)[-1] == [("1", 14, 1)]
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


def test_a_shared_prefix_is_computed_once() -> None:
    world = World(config(max_batch_tokens=64, max_model_len=100), 1000)
    for tail in range(6):
        world.add(prompt(40) + prompt(3, tail + 1), max_tokens=1)
    world.finish()
    assert world.computed_tokens == 40 + 6 * 3
    assert world.scheduler.counters.reused_tokens == 5 * 40
    assert [sequence.reused for sequence in world.samples] == [0] + 5 * [40]
    world.check_end()


def test_who_waits_for_a_prefix_is_overtaken() -> None:
    world = World(config(max_batch_tokens=64, max_model_len=100), 1000)
    world.add(prompt(40), max_tokens=1)
    world.add(prompt(16) + prompt(4, 1), max_tokens=1)
    world.add(prompt(2, 2), max_tokens=1)
    world.finish()
    assert batches(world)[:2] == [[("0", 0, 40), ("2", 0, 2)], [("1", 16, 4)]]
    world.check_end()


def test_nobody_waits_for_a_less_urgent_writer() -> None:
    world = World(config(max_batch_tokens=64, max_model_len=100), 1000)
    world.add(prompt(40), max_tokens=1, priority=1)
    world.plan()
    world.add(prompt(32) + prompt(4, 1), max_tokens=1, priority=0)
    world.add(prompt(32) + prompt(4, 2), max_tokens=1, priority=1)
    world.plan()
    world.finish()
    assert batches(world)[:3] == [[("0", 0, 40)], [("1", 0, 36)], [("2", 32, 4)]]
    world.check_end()


def test_waiters_compute_for_themselves_when_the_writer_goes() -> None:
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


def test_after_a_lost_answer_nothing_is_forked_that_a_window_may_have_left() -> None:
    world = World(config(page_groups=((1, 4),), max_batch_tokens=11))
    world.add(prompt(30), max_tokens=1)
    world.step()
    world.plan()
    world.lose()  # at 11 the window has left all but the page from 8 on, which cannot be cut back to 8
    world.scheduler.abort("0")
    world.finish()
    world.check_end()


def test_after_a_refusal_nothing_is_forked_that_a_window_may_have_left() -> None:
    world = World(config(page_groups=((1, 4),), max_batch_tokens=11))
    world.add(prompt(30), max_tokens=1)
    world.step()
    world.plan()
    world.disagree()  # this holder has cut up to 11, as if the batch were to run
    world.scheduler.abort("0")
    world.finish()
    world.check_end()


@pytest.mark.parametrize("aborted", [False, True])
def test_kv_that_is_not_to_be_kept_never_enters_the_tree(aborted: bool) -> None:
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
def test_what_a_first_batch_spoils_is_computed_again(waiting: int) -> None:
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


def test_an_ended_writer_leaves_what_earlier_batches_brought() -> None:
    world = World(config(max_batch_tokens=8))
    (spoilt,) = world.add(prompt(20), max_tokens=4)
    world.plan()
    (other,) = world.add([*prompt(8), 5], max_tokens=1)  # has the tree split off 8 tokens
    world.plan()
    world.answer()
    world.record()
    assert world.scheduler.tree is not None
    assert world.scheduler.tree.match(tuple(prompt(20))).length == 8
    while not spoilt.in_flight:
        world.step()
        world.plan()
    world.scheduler.end(spoilt, "abort", keep=False)
    world.finish()
    match = world.scheduler.tree.match(tuple(prompt(20)))
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


@pytest.mark.parametrize("total_pages", range(20, 40, 2))
@pytest.mark.parametrize("max_batch_tokens", [1, 16])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_shared_and_copied_pages_are_counted(total_pages: int, max_batch_tokens: int, prefix_cache: bool) -> None:
    tight = config(max_batch_tokens=max_batch_tokens, prefix_cache=prefix_cache)
    world = World(dataclasses.replace(tight, max_model_len=20), total_pages)
    for salt in range(6):
        world.add(prompt(10, salt), max_tokens=10, n=3, stop_token_ids=frozenset({1}))
    world.finish()
    assert world.refusals == 0
    world.check_end()


def test_samples_go_on_when_the_first_is_ended() -> None:
    world = World(config())
    first, second = world.add(prompt(6), max_tokens=3, n=2)
    world.scheduler.end(first, "abort")
    world.finish()
    assert second.finish_reason == "length"
    world.check_end()


def test_samples_without_room_wait_like_anyone() -> None:
    world = World(config(max_sequences=2, prefix_cache=False))
    world.add(prompt(9), max_tokens=5, n=3)
    world.finish()
    assert world.computed_tokens == 9 + 1 + 9 + 3 * 4
    world.check_end()


def test_the_next_turn_of_a_chat_starts_from_the_last() -> None:
    world = World(config())
    (first,) = world.add(prompt(6), max_tokens=7)
    world.finish()
    (second,) = world.add([*first.tokens, 7, 7, 7], max_tokens=3)
    world.finish()
    assert second.reused == 12  # of 13 tokens the last was never fed back
    world.check_end()


def test_salts_keep_tenants_apart() -> None:
    world = World(config())
    for salt in ("a", "b", None):
        (sequence,) = world.add(prompt(12), max_tokens=2, salt=salt)
        world.finish()
        assert sequence.reused == 0
    (sequence,) = world.add(prompt(12), max_tokens=2, salt="a")
    world.finish()
    assert sequence.reused == 11
    world.check_end()


def test_a_full_cache_makes_room_for_requests() -> None:
    world = World(config(), 40)
    for salt in range(10):
        world.add(prompt(30, salt), max_tokens=8)
        world.finish()
    assert world.scheduler.counters.evicted > 0
    assert world.scheduler.counters.preempted == world.refusals == 0
    world.check_end()


def test_a_failed_batch_is_planned_again() -> None:
    world = World(config(max_batch_tokens=8))
    world.add(prompt(20), max_tokens=3)
    world.step()
    world.plan()
    world.answer()
    world.drop()
    world.finish()
    assert batches(world)[1] == batches(world)[2] == [("0", 8, 8)]
    world.check_end()


def test_lost_kv_is_computed_again() -> None:
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


def test_ending_in_flight_loses_the_token_and_frees_the_kv() -> None:
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


def test_a_stop_token_counts_after_min_tokens_only() -> None:
    scheduler = Scheduler(config(), OneHolder(64))
    (sequence,) = scheduler.add(Request("0", (1, 2), 9, min_tokens=2, stop_token_ids=frozenset({7})))
    reasons = []
    for token in (7, 7, 7):
        plan = scheduler.plan()
        assert plan is not None
        scheduler.accepted(plan, Pages({0: 60}), [0])
        reasons += [outcome.finish_reason for outcome in scheduler.record(plan, [token])]
    assert reasons == [None, None, "stop"]
    assert sequence.tokens == [1, 2, 7, 7, 7]


@pytest.mark.parametrize("groups", [((3, None),), ((1, None), (2, 7)), ((2, 1),), ((1, 5), (1, 11)), MIXED])
@pytest.mark.parametrize("page_size", [1, 4, 5])
@pytest.mark.parametrize("total_pages", [17, 18, 40])
def test_the_longest_request_fits_alone(groups: Groups, page_size: int, total_pages: int) -> None:
    small = config(page_groups=groups, page_size=page_size, max_batch_tokens=9)
    world = World(small, total_pages)
    longest = world.scheduler.longest_possible()
    assert longest == 64 or most(small, longest) <= total_pages < most(small, longest + 1)
    for length in (longest - 3, 1):
        world.add(prompt(length, length), max_tokens=min(64, longest + 1) - length)
    world.finish()
    world.check_end()
    with pytest.raises(InvalidRequest, match=f"length is {min(64, longest + 1)} tokens"):
        world.add(prompt(longest), max_tokens=2)


def test_bad_requests_are_named() -> None:
    scheduler = Scheduler(config(), OneHolder(64))
    scheduler.add(Request("a", (1,), 1))
    for request, message in [
        (Request("b", (), 1), "empty"),
        (Request("b", (1,), 0), "max_tokens is 0"),
        (Request("b", (1,), 1, n=0), "n is 0"),
        (Request("b", (1,) * 60, 5), "length is 64 tokens"),
        (Request("a", (1,), 1), "'a' is in use"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            scheduler.add(request)
    small = Scheduler(config(page_groups=((3, None),)), OneHolder(2))
    with pytest.raises(InvalidRequest, match="length is 1 tokens"):
        small.add(Request("c", (1,), 1))


@pytest.mark.parametrize("lanes", [2, 3])
@pytest.mark.parametrize("running", range(1, 8))
def test_newcomers_are_admitted_while_all_lanes_are_full(lanes: int, running: int) -> None:
    world = World(config(), 400)
    for at in range(running):
        world.add(prompt(4, at), max_tokens=58)
    for turn in range(40):
        if turn == 12:
            newcomer = world.add(prompt(4, 60), max_tokens=4)[0]
        while len(world.running) < lanes and world.plan(lanes):
            assert world.answer()
        world.record()
    assert newcomer.finish_reason == "length"
    assert max(len(plan.rows) for plan in world.batches[-lanes:]) <= -(-running // lanes), "no lane has all"
    world.finish()
    world.check_end()


def test_who_is_refused_alone_ends_and_the_next_has_its_turn() -> None:
    scheduler = Scheduler(config(), OneHolder(64))
    samples = [scheduler.add(Request(str(at), (at,) * 9, 3))[0] for at in range(3)]
    hopeless: list[ScheduledSequence] = []
    for _ in range(20):
        plan = scheduler.plan()
        assert plan is not None
        if hopeless == samples[:2]:
            scheduler.accepted(plan, Pages({0: 64}), [0] * len(plan.rows))
            break
        hopeless += scheduler.refused(plan, Pages({0: 64}))
        scheduler.check_integrity()
    assert [sequence.finish_reason for sequence in samples] == ["abort", "abort", None]
    assert [row.sequence for row in plan.rows] == samples[2:]


def test_answers_out_of_place_are_errors() -> None:
    scheduler = Scheduler(config(), OneHolder(64))
    scheduler.add(Request("0", (1, 2), 3))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(EngineError, match="before it was accepted"):
        scheduler.record(plan, [1])
    with pytest.raises(EngineError, match="0 floors for 1 rows"):
        scheduler.accepted(plan, Pages({0: 60}), [])
    scheduler.accepted(plan, Pages({0: 60}), [0])
    with pytest.raises(EngineError, match="not waiting for an answer"):
        scheduler.accepted(plan, Pages({0: 60}), [0])
    with pytest.raises(EngineError, match="2 tokens for 1 rows"):
        scheduler.record(plan, [1, 2])
    scheduler.record(plan, [1])
    with pytest.raises(EngineError, match="not in flight"):
        scheduler.record(plan, [1])


TestAnyOrder = Machine.TestCase
