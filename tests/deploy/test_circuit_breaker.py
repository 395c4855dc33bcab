"""Circuit breakers: one alone, and those of an engine's attention workers with their timers."""

from __future__ import annotations

import queue
import time
from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from lamina.deploy.breakers import FLAPPING, QUARANTINE, BreakerLimits, CircuitBreaker, WorkerBreakers
from lamina.deploy.worker_events import WorkerAddress

SOON = BreakerLimits(threshold=2, window=100.0, timeout=0.05, most=0.1)
LATE = BreakerLimits(threshold=2, window=100.0, timeout=3600.0, most=3600.0)


def test_breaker_opens_at_the_third_failure_and_is_open_longer_each_time() -> None:
    breaker = CircuitBreaker()
    assert [breaker.failed(now) for now in (0.0, 100.0, 200.0)] == [False, False, True]
    assert (breaker.state(229.9), breaker.left(210.0)) == ("open", 20.0)
    assert breaker.state(230.0) == "half-open"
    assert breaker.failed(231.0)  # one is enough now
    assert (breaker.left(231.0), breaker.state(290.0), breaker.state(291.0)) == (60.0, "open", "half-open")
    now, openings = 291.0, []
    for _ in range(6):
        assert breaker.failed(now)
        openings.append(breaker.left(now))
        now += openings[-1]
    assert openings == [120, 240, 480, 600, 600, 600]


def test_breaker_is_closed_again_after_a_window_without_failures() -> None:
    breaker = CircuitBreaker()
    assert any(breaker.failed(0.0) for _ in range(3))
    assert breaker.state(30.0 + FLAPPING.window) == "closed"
    assert [breaker.failed(331.0) for _ in range(3)] == [False, False, True]
    assert breaker.left(331.0) == 30.0  # from the beginning


def test_failures_that_are_far_apart_open_nothing() -> None:
    breaker = CircuitBreaker()
    assert not any(breaker.failed(second * 151.0) for second in range(50))


def test_second_corrupt_frame_within_a_day_quarantines() -> None:
    breaker = CircuitBreaker(QUARANTINE)
    assert [breaker.failed(now) for now in (0.0, 80_000.0)] == [False, True]
    assert breaker.left(80_000.0) == 3600.0


@given(st.lists(st.floats(0, 400, allow_nan=False), max_size=60))
def test_breaker_is_never_open_for_longer_than_its_most_and_opens_only_after_enough(gaps: list[float]) -> None:
    breaker, counted = CircuitBreaker(), list[float]()
    for now in accumulate(gaps):
        before = breaker.state(now)
        opens = breaker.failed(now)
        if before != "open":
            counted.append(now)
        assert 0.0 <= breaker.left(now) <= FLAPPING.most
        assert opens == (before != "open" and breaker.state(now) == "open")
        recent = sum(now - FLAPPING.window < each for each in counted)
        assert not opens or before == "half-open" or recent >= FLAPPING.threshold


class Engine:
    """Uses workers when it may; `others`: whether it has another one."""

    def __init__(self, flapping: BreakerLimits = LATE, quarantine: BreakerLimits = LATE) -> None:
        self.others = True
        self.used: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.breakers = WorkerBreakers(lambda: not self.others, time.monotonic, flapping, quarantine)

    def joins(self, name: str, place: str = "") -> None:
        self.breakers.admit(WorkerAddress(name, "h:1", place=place), lambda: self.used.put(name))

    def loses(self, name: str, place: str = "") -> None:
        self.joins(name, place)
        assert self.used.get(timeout=5) == name
        self.breakers.failed(name)


def test_worker_that_flaps_is_held_back_by_its_place_until_the_time_is_over() -> None:
    engine = Engine(SOON)
    engine.loses("w", "slot")
    engine.loses("w.1", "slot")
    engine.joins("w.2", "slot")
    assert engine.breakers.held() == {"w.2": "open"}
    engine.joins("v")
    assert engine.used.get(timeout=5) == "v"  # nobody else waits
    assert engine.used.get(timeout=5) == "w.2"
    assert engine.breakers.on_trial(WorkerAddress("w.2", "h:1", place="slot"))
    assert engine.breakers.held() == {}
    engine.breakers.failed("w.2")
    engine.joins("w.3", "slot")
    assert engine.breakers.held() == {"w.3": "open"}
    engine.breakers.close()


def test_worker_that_leaves_while_it_is_held_back_is_not_used() -> None:
    engine = Engine(SOON)
    engine.loses("w", "slot")
    engine.loses("w.1", "slot")
    engine.joins("w.2", "slot")
    engine.breakers.left("w.2")
    assert engine.breakers.held() == {}
    time.sleep(0.1)
    assert engine.used.empty()


def test_last_worker_is_used_though_its_breaker_is_open() -> None:
    engine = Engine()
    engine.loses("w", "slot")
    engine.loses("w.1", "slot")
    engine.joins("w.2", "slot")
    assert engine.used.empty()
    engine.loses("v")
    engine.others = False
    engine.breakers.failed("v")  # it was the only other one
    assert engine.used.get(timeout=5) == "w.2"
    engine.breakers.failed("w.2")
    engine.joins("w.3", "slot")
    assert engine.used.get(timeout=5) == "w.3"
    assert not engine.breakers.on_trial(WorkerAddress("w.3", "h:1", place="slot"))


def test_quarantined_worker_is_not_used_even_where_it_is_the_last() -> None:
    engine = Engine()
    engine.others = False
    for name in ("w", "w.1"):
        engine.joins(name, "slot")
        assert engine.used.get(timeout=5) == name
        engine.breakers.corrupt(name)
        engine.breakers.failed(name)
    engine.joins("w.2", "slot")
    engine.breakers.failed("v")
    assert engine.breakers.held() == {"w.2": "quarantined"}
    engine.breakers.close()
    assert engine.used.empty()


def test_worker_that_failed_and_has_joined_again_is_held_back_all_the_same() -> None:
    """Its connection was still being made when it left and came back: its place was forgotten, and the snapshot, which
    asks who is held back, ended the engine."""
    engine = Engine()
    engine.loses("w", "slot")
    engine.joins("w", "slot")
    assert engine.used.get(timeout=5) == "w"  # it connects
    engine.breakers.failed("w")
    engine.joins("w", "slot")
    engine.breakers.failed("w")
    assert engine.breakers.held() == {"w": "open"}
    engine.breakers.close()


def test_failures_of_unknown_workers_count_for_nobody() -> None:
    engine = Engine()
    for _ in range(5):
        engine.breakers.failed("w")
        engine.breakers.corrupt("w")
    engine.joins("w")
    assert engine.used.get(timeout=5) == "w"
