"""Which requests the scheduler admits, in which order, and how a batch is filled."""

from __future__ import annotations

import pytest
from scheduler_world import MIXED, Groups, OneHolder, World, batches, config, most, prompt

from lamina.errors import InvalidRequest
from lamina.kv.kv_shares import Pages
from lamina.kv.request import Request, ScheduledSequence
from lamina.scheduling.scheduler import Scheduler


def test_batch_is_filled_with_prefill_after_decode_rows() -> None:
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


def test_requests_are_served_in_order_of_arrival_within_a_priority() -> None:
    world = World(config(max_sequences=1, prefix_cache=False))
    for salt, priority in enumerate([1, 1, 0, 1, 0]):
        world.add(prompt(5, salt), max_tokens=2, priority=priority)
    world.finish()
    order = list(dict.fromkeys(name for batch in batches(world) for name, _, _ in batch))
    assert order == ["2", "4", "0", "1", "3"]


def test_admission_leaves_the_pages_that_running_sequences_still_need() -> None:
    world = World(config(max_batch_tokens=8), 28)  # 14 page sets
    world.add(prompt(40), max_tokens=1)
    world.plan()
    world.add(prompt(20, 1), max_tokens=1)
    assert not world.plan()
    world.finish()
    world.check_end()


def test_sequence_that_is_short_is_admitted_once_a_prefix_of_it_is_there() -> None:
    """The need that was once found to be too much was kept: a prefix that was computed later was not seen, and the
    sequence waited until its writer had ended."""
    world = World(config(max_batch_tokens=16), 28)  # 14 page sets
    (writer,) = world.add(prompt(32), max_tokens=12, priority=1)
    world.step()
    (urgent,) = world.add(prompt(32), max_tokens=2)
    world.step()
    assert urgent.handle is None
    world.step()
    assert (urgent.reused, writer.finish_reason, writer.preemptions) == (31, None, 0)
    world.finish()
    world.check_end()


def test_admission_does_not_count_a_shared_prefix_as_free_pages() -> None:
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


def test_samples_wait_when_the_batch_has_no_room() -> None:
    world = World(config(max_sequences=2, prefix_cache=False))
    world.add(prompt(9), max_tokens=5, n=3)
    world.finish()
    assert world.computed_tokens == 9 + 1 + 9 + 3 * 4
    world.check_end()


def test_stop_token_ends_a_sample_only_after_min_tokens() -> None:
    scheduler = Scheduler(config(), OneHolder(64))
    (sequence,) = scheduler.add(Request("0", (1, 2), 9, min_tokens=2, stop_token_ids=frozenset({7})))
    reasons = []
    for token in (7, 7, 7):
        plan = scheduler.plan()
        assert plan is not None
        scheduler.accepted(plan, Pages({(0, 0): 60}), [0])
        reasons += [outcome.finish_reason for outcome in scheduler.record(plan, [token])]
    assert reasons == [None, None, "stop"]
    assert sequence.tokens == [1, 2, 7, 7, 7]


@pytest.mark.fault("F11")
@pytest.mark.parametrize("groups", [((3, None),), ((1, None), (2, 7)), ((2, 1),), ((1, 5), (1, 11)), MIXED])
@pytest.mark.parametrize("page_size", [1, 4, 5])
@pytest.mark.parametrize("total_pages", [17, 18, 40])
def test_longest_possible_request_fits_when_it_runs_alone(groups: Groups, page_size: int, total_pages: int) -> None:
    small = config(page_groups=groups, page_size=page_size, max_batch_tokens=9)
    world = World(small, total_pages)
    longest = world.scheduler.admission.longest_possible()
    assert longest == 64 or most(small, longest) <= total_pages < most(small, longest + 1)
    for length in (longest - 3, 1):
        world.add(prompt(length, length), max_tokens=min(64, longest + 1) - length)
    world.finish()
    world.check_end()
    with pytest.raises(InvalidRequest, match=f"length is {min(64, longest + 1)} tokens"):
        world.add(prompt(longest), max_tokens=2)


def test_request_waits_for_room_that_workers_to_come_have() -> None:
    """Where the number of workers follows the load, a request was refused for the room of those that are there."""
    layouts = OneHolder(17)
    admission = Scheduler(config(), layouts).admission
    here = admission.longest_possible()
    assert 1 < here == admission.most_hoped() < 64
    admission.expect(OneHolder(34))
    assert (admission.longest_possible(), admission.most_hoped()) == (here, 64)
    scheduler = Scheduler(config(), layouts)
    scheduler.admission.expect(OneHolder(34))
    (sequence,) = scheduler.add(Request("0", tuple(range(here)), 9))
    assert scheduler.plan() is None
    assert scheduler.admission.stranded == (sequence,)
    layouts.capacity = layouts.pages = Pages({(0, 0): 64})
    scheduler.admission.joined()
    assert scheduler.plan() is not None
    with pytest.raises(InvalidRequest):
        scheduler.validate(Request("1", tuple(range(60)), 9))


def test_stranded_request_is_forgotten_once_it_ends() -> None:
    """Those that no holder could keep any more stayed in the engine's memory, with all their tokens."""
    layouts = OneHolder(64)
    scheduler = Scheduler(config(), layouts)
    scheduler.admission.losing()
    (sequence,) = scheduler.add(Request("0", tuple(range(40)), 9))
    layouts.capacity = layouts.pages = Pages({(0, 0): 8})
    assert scheduler.plan() is None
    assert scheduler.admission.stranded == (sequence,)
    assert scheduler.admission.queued_tokens == 40
    scheduler.abort("0")
    assert scheduler.admission.stranded == ()
    assert not scheduler.admission._stranded


def test_waiting_request_is_forgotten_once_it_ends() -> None:
    """Behind one without room, those whose clients had left stayed in the engine's memory until it got room."""
    world = World(config(prefix_cache=False), 8)
    world.add(prompt(10), max_tokens=6)
    world.step()
    world.add(prompt(10, 1), max_tokens=6)
    world.step()
    for salt in range(2, 12):
        world.scheduler.add(Request("left", tuple(prompt(10, salt)), 6, n=2))
        world.scheduler.abort("left")
    assert len(world.scheduler.running) == 1
    assert sum(map(len, world.scheduler.admission._waiting.values())) == 1
    world.finish()
    world.check_end()


def test_request_is_refused_for_room_only_where_none_may_come_back() -> None:
    """While a holder was away, new requests were told that the memory could never hold them, and those of the previous
    engine were dropped."""
    layouts = OneHolder(64)
    scheduler = Scheduler(config(), layouts)
    assert scheduler.admission.longest_possible() == 64
    scheduler.admission.losing()
    layouts.capacity = Pages({(0, 0): 4})
    scheduler.add(Request("a", (1,) * 40, 1))
    scheduler.admission.left()
    with pytest.raises(InvalidRequest, match="the KV memory holds no more"):
        scheduler.add(Request("b", (1,) * 40, 1))
    scheduler.add(Request("c", (1,) * 40, 2), known={0: (7,)})


def test_scheduler_refuses_a_bad_request_and_names_the_value() -> None:
    scheduler = Scheduler(config(), OneHolder(64))
    scheduler.add(Request("a", (1,), 1))
    for request, message in [
        (Request("b", (), 1), "empty"),
        (Request("b", (1,), -1), "max_tokens is -1"),
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
def test_new_request_is_admitted_while_all_lanes_are_full(lanes: int, running: int) -> None:
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


def test_request_ends_when_it_is_refused_alone_and_the_next_runs() -> None:
    scheduler = Scheduler(config(), OneHolder(64))
    samples = [scheduler.add(Request(str(at), (at,) * 9, 3))[0] for at in range(3)]
    hopeless: list[ScheduledSequence] = []
    for _ in range(20):
        plan = scheduler.plan()
        assert plan is not None
        if hopeless == samples[:2]:
            scheduler.accepted(plan, Pages({(0, 0): 64}), [0] * len(plan.rows))
            break
        hopeless += scheduler.refused(plan, Pages({(0, 0): 64}), {(0, 0)})
        scheduler.check_integrity()
    assert [sequence.finish_reason for sequence in samples] == ["abort", "abort", None]
    assert [row.sequence for row in plan.rows] == samples[2:]
