"""Circuit breakers. Those of the places of an engine's workers are tested with their pool."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from lamina.deploy.breakers import FLAPPING, QUARANTINE, CircuitBreaker


def test_breaker_opens_at_the_third_failure_and_is_open_longer_each_time() -> None:
    breaker = CircuitBreaker()
    assert [breaker.failed(now) for now in (0.0, 100.0, 200.0)] == [False, False, True]
    assert (breaker.state(229.9), breaker.seconds(210.0)) == ("open", 20.0)
    assert breaker.state(230.0) == "half-open"
    assert breaker.failed(231.0)  # one is enough now
    assert (breaker.seconds(231.0), breaker.state(290.0), breaker.state(291.0)) == (60.0, "open", "half-open")
    now, openings = 291.0, []
    for _ in range(6):
        assert breaker.failed(now)
        openings.append(breaker.seconds(now))
        now += openings[-1]
    assert openings == [120, 240, 480, 600, 600, 600]


def test_breaker_is_closed_again_after_a_window_without_failures() -> None:
    breaker = CircuitBreaker()
    assert any(breaker.failed(0.0) for _ in range(3))
    assert breaker.state(30.0 + FLAPPING.window) == "closed"
    assert [breaker.failed(331.0) for _ in range(3)] == [False, False, True]
    assert breaker.seconds(331.0) == 30.0  # from the beginning


def test_failures_that_are_far_apart_open_nothing() -> None:
    breaker = CircuitBreaker()
    assert not any(breaker.failed(second * 151.0) for second in range(50))


def test_second_corrupt_frame_within_a_day_quarantines() -> None:
    breaker = CircuitBreaker(QUARANTINE)
    assert [breaker.failed(now) for now in (0.0, 80_000.0)] == [False, True]
    assert breaker.seconds(80_000.0) == 3600.0


@given(st.lists(st.floats(0, 400, allow_nan=False), max_size=60))
def test_breaker_is_never_open_for_longer_than_its_longest_and_opens_only_after_enough(gaps: list[float]) -> None:
    breaker, counted = CircuitBreaker(), list[float]()
    for now in accumulate(gaps):
        before = breaker.state(now)
        opens = breaker.failed(now)
        if before != "open":
            counted.append(now)
        assert 0.0 <= breaker.seconds(now) <= FLAPPING.longest
        assert opens == (before != "open" and breaker.state(now) == "open")
        recent = sum(now - FLAPPING.window < each for each in counted)
        assert not opens or before == "half-open" or recent >= FLAPPING.threshold
