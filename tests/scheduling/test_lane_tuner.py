"""The lane tuner keeps the count with the highest measured rate, and measures again when the load changes."""

from __future__ import annotations

import pytest

from lamina.scheduling.lane_tuner import HOLD, LaneTuner
from lamina.scheduling.trials import WINDOW


def run(lanes: LaneTuner, rates: dict[int, float], batches: int, sequences: int = 8, start: float = 0.0) -> float:
    """Complete batches that yield so many tokens a second at each number of lanes. Returns the time."""
    now = start
    for _ in range(batches):
        tokens = max(1, sequences // lanes.count)
        now += tokens / rates[lanes.count]
        lanes.completed(tokens, sequences, False, now)
    return now


def test_lane_tuner_keeps_the_best_count() -> None:
    for rates, best in (
        ({1: 100, 2: 140, 3: 120}, 2),
        ({1: 100, 2: 90, 3: 80}, 1),
        ({1: 100, 2: 110, 3: 150}, 3),
        ({1: 100, 2: 102, 3: 102.5}, 1),  # no more than noise
    ):
        lanes = LaneTuner(1, 3)
        assert lanes.count == 1
        run(lanes, rates, 4 * (WINDOW + 1))
        assert lanes.count == best


def test_lane_tuner_takes_no_more_lanes_than_sequences() -> None:
    lanes = LaneTuner(1, 3)
    run(lanes, {1: 1, 2: 2}, 4 * (WINDOW + 1), sequences=2)
    assert lanes.count == 2
    alone = LaneTuner(1, 3)
    run(alone, {1: 1}, 4 * WINDOW, sequences=1)
    assert alone.count == 1


def test_lane_tuner_measures_again_when_the_load_changes() -> None:
    lanes = LaneTuner(1, 2)
    now = run(lanes, {1: 100, 2: 150}, 3 * (WINDOW + 1))
    assert lanes.count == 2
    now = run(lanes, {1: 100, 2: 50}, HOLD // 2, start=now)
    assert lanes.count == 2  # the load has not changed
    run(lanes, {1: 100, 2: 50}, 3 * (WINDOW + 1), sequences=20, start=now)
    assert lanes.count == 1


def test_lane_tuner_ignores_batches_with_prefill() -> None:
    lanes = LaneTuner(1, 2)
    for at in range(5 * WINDOW):
        lanes.completed(1, 8, at % 2 == 0, float(at))
    assert lanes.count == 1


def test_lane_count_stays_when_it_was_given() -> None:
    lanes = LaneTuner(2)
    run(lanes, {2: 1}, 5 * WINDOW)
    assert lanes.count == 2


def test_lane_tuner_measures_both_tiers_with_one_lane_and_logs_them(caplog) -> None:
    lanes, now, attended = LaneTuner(1, 3, replicas=2), 0.0, 5.0
    assert (lanes.tiers, lanes.suggested) == (None, None)
    with caplog.at_level("INFO", logger="lamina"):
        for _ in range(4 * (WINDOW + 1)):
            now += 0.030
            attended += 0.010 * lanes.count
            lanes.completed(8 // lanes.count, 8, False, now, attended)
    assert lanes.tiers == pytest.approx((0.020, 0.010))
    assert lanes.suggested == pytest.approx(2 * 1.5)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "over 2 replicas" in said
    assert "in the model for 20.0 ms and in attention for 10.0 ms, which suggests 3.0 lanes, of at most 3" in said


def test_lane_tuner_tries_one_lane_more_than_replicas() -> None:
    lanes = LaneTuner(1, 4, replicas=3)
    run(lanes, {1: 100, 2: 190, 3: 270, 4: 330}, 6 * (WINDOW + 1), sequences=16)
    assert lanes.count == 4
