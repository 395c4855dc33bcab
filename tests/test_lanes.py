"""Lanes: the number that was measured to yield most, looked at again when the load has changed."""

from __future__ import annotations

from lamina.lanes import HOLD, WINDOW, Lanes


def run(lanes: Lanes, rates: dict[int, float], batches: int, sequences: int = 8, start: float = 0.0) -> float:
    """Complete batches that yield so many tokens a second at each number of lanes. Returns the time."""
    now = start
    for _ in range(batches):
        tokens = max(1, sequences // lanes.count)
        now += tokens / rates[lanes.count]
        lanes.completed(tokens, sequences, False, now)
    return now


def test_the_best_is_kept() -> None:
    for rates, best in (
        ({1: 100, 2: 140, 3: 120}, 2),
        ({1: 100, 2: 90, 3: 80}, 1),
        ({1: 100, 2: 110, 3: 150}, 3),
        ({1: 100, 2: 102, 3: 102.5}, 1),  # no more than noise
    ):
        lanes = Lanes.auto(3)
        assert lanes.count == 1
        run(lanes, rates, 4 * (WINDOW + 1))
        assert lanes.count == best


def test_no_more_lanes_than_sequences() -> None:
    lanes = Lanes.auto(3)
    run(lanes, {1: 1, 2: 2}, 4 * (WINDOW + 1), sequences=2)
    assert lanes.count == 2
    alone = Lanes.auto(3)
    run(alone, {1: 1}, 4 * WINDOW, sequences=1)
    assert alone.count == 1


def test_another_load_is_measured_again() -> None:
    lanes = Lanes.auto(2)
    now = run(lanes, {1: 100, 2: 150}, 3 * (WINDOW + 1))
    assert lanes.count == 2
    now = run(lanes, {1: 100, 2: 50}, HOLD // 2, start=now)
    assert lanes.count == 2  # nothing has changed that it could see
    run(lanes, {1: 100, 2: 50}, 3 * (WINDOW + 1), sequences=20, start=now)
    assert lanes.count == 1


def test_prefills_teach_nothing() -> None:
    lanes = Lanes.auto(2)
    for at in range(5 * WINDOW):
        lanes.completed(1, 8, at % 2 == 0, float(at))
    assert lanes.count == 1


def test_a_number_that_was_given_stays() -> None:
    lanes = Lanes(2)
    run(lanes, {2: 1}, 5 * WINDOW)
    assert lanes.count == 2
