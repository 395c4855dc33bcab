"""Scenarios are drawn alike from a seed, unlike from others, and replay from what is printed."""

from __future__ import annotations

from collections import Counter
from statistics import median

import scenario as vocabulary
from generator import FAULTS, Shape, drawn
from run_seeds import shown
from scenario import STEP_S, Event, Leave, Scenario, Setup, Submit

SHAPE = Shape(2, 4)


def test_a_seed_is_a_scenario() -> None:
    assert drawn(17, SHAPE) == drawn(17, SHAPE)
    assert drawn(17, SHAPE) != drawn(18, SHAPE)
    assert drawn(17, SHAPE, "safety").mode == "safety"


def test_seeds_turn_on_each_fault_and_each_setting_and_leave_it_out() -> None:
    scenarios = [drawn(seed, SHAPE) for seed in range(300)]
    for kind in FAULTS:
        there = sum(any(isinstance(event, kind) for event in each.events) for each in scenarios)
        assert there < 290, kind
        if kind.__name__ != "KillModelWorker":  # not before a setup has several model workers
            assert there > 10, kind
    for name in (
        "shard",
        "lanes",
        "prefix_cache",
        "drafts",
        "journal",
        "link",
        "local_tier",
        "query_first",
        "policy",
        "window",
        "states",
        "eager",
        "old_workers",
        "workers",
        "wait",
    ):
        assert len(Counter(getattr(each.setup, name) for each in scenarios)) > 1, name
    assert Counter(each.mode for each in scenarios).keys() == {"safety", "liveness"}


def test_some_seeds_are_storms_with_a_fault_every_few_steps() -> None:
    gaps, calm = list[float](), 0
    for seed in range(100):
        scenario = drawn(seed, SHAPE)
        faults = [event.at for event in scenario.events if not isinstance(event, Submit)]
        calm += len(faults) < 80
        if len(faults) >= 80:
            gaps.append((faults[-1] - faults[0]) / len(faults) / (STEP_S + 6 * scenario.setup.latency))
    assert calm > 20
    assert len(gaps) > 20
    assert median(gaps) < 4, gaps  # some have few faults beside those of which there are never many


def test_events_are_in_order_and_end_before_all_is_healed() -> None:
    for seed in range(100):
        scenario = drawn(seed, SHAPE)
        times = [event.at for event in scenario.events]
        assert times == sorted(times)
        assert times[-1] < scenario.heals <= scenario.ends
        asked = [event for event in scenario.events if isinstance(event, Submit)]
        assert [*range(len(asked))] == sorted(event.request for event in asked)
        assert all(event.request < len(asked) for event in scenario.events if isinstance(event, Leave))
        least = SHAPE.pages(max(event.prompt + event.tokens for event in asked))
        assert min(scenario.setup.workers, default=scenario.setup.local_pages) >= least


def test_what_is_printed_is_the_scenario() -> None:
    for seed in range(20):
        scenario = drawn(seed, SHAPE)
        assert eval(shown(scenario), vars(vocabulary)) == scenario  # noqa: S307  # it was printed just now
    assert shown(Scenario(setup=Setup(lanes=2), events=(Event(0.5),))) == (
        "Scenario(setup=Setup(lanes=2), events=(\n    Event(at=0.5),\n))"
    )
