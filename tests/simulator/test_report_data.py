"""What reports show: names that tell results apart, numbers in words, axes, means over time, the frontier."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_runs import SECONDS, five, run

from lamina.simulator.reports.data import (
    COLUMNS,
    best_of,
    columns,
    frontier,
    keeps_slo,
    labels,
    log_ticks,
    over_time,
    printable,
    ticks,
    words,
)

POINTS = st.lists(st.tuples(st.text(max_size=2), st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=30)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"), (0.1, "0.100"), (0.99999, "1.00"), (9.999, "10.0"), (99.97, "100"), (1234.5, "1,234"),
        (-3.14159, "-3.14"), (2e6, "2,000,000"), (3e9, "3e+09"), (1e-7, "1e-07"), (math.nan, "–"), (None, "–"),
    ],
)  # fmt: skip
def test_words(value: float | None, said: str) -> None:
    assert words(value) == said


@given(st.text(max_size=80), st.integers(8, 50))
def test_printable(text: str, most: int) -> None:
    made = printable(text, most)
    assert 0 < len(made) <= most
    assert made.isprintable()
    assert made == printable(made, most)


def test_a_long_name_keeps_its_end() -> None:
    assert printable("x" * 100 + " number 7", 20) == "x" * 11 + "…number 7"


def test_labels() -> None:
    assert labels(five()) == tuple(result.system for result in five())
    assert labels([run(0), run(0, policy="streaming"), run(3)])[:2] == ("vLLM 4x H100, full", "vLLM 4x H100, streaming")
    assert labels([run(0, seed=1), run(0, seed=2)]) == ("vLLM 4x H100, seed 1", "vLLM 4x H100, seed 2")
    assert labels([run(0), run(0)]) == ("vLLM 4x H100 #1", "vLLM 4x H100 #2")


@given(st.floats(1e-12, 1e12), st.integers(2, 6))
def test_ticks(high: float, intervals: int) -> None:
    marks = ticks(high, intervals)
    assert marks[0] == 0.0
    assert marks[-1] >= high * (1 - 1e-6)
    assert 2 <= len(marks) <= intervals + 1
    assert marks[-2] < high


@given(st.floats(1e-9, 1e9), st.floats(1, 1e9))
def test_log_ticks(low: float, ratio: float) -> None:
    start, end, marks = log_ticks(low, low * ratio)
    assert start <= low * (1 + 1e-6)
    assert end >= low * ratio * (1 - 1e-6)
    assert start < end
    assert len(marks) <= 6
    assert list(marks) == sorted(set(marks))
    assert all(start <= mark <= end for mark in marks)


def test_over_time_keeps_the_mean() -> None:
    samples = run(3, samples=1500).samples
    line = over_time(samples, lambda sample: sample.decode, 100)
    assert len(line) == 100
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert all(0 <= x <= SECONDS for x, _ in line)
    assert min(s.decode for s in samples) <= min(y for _, y in line)
    assert max(y for _, y in line) <= max(s.decode for s in samples)
    mean = sum(s.decode for s in samples) / len(samples)
    assert sum(y for _, y in line) / 100 == pytest.approx(mean, rel=0.01)


def test_over_time_weighs_by_seconds() -> None:
    one, two = run(3, samples=2).samples
    many = [
        dataclasses.replace(one, at=0.0, seconds=3.0, decode=10),
        dataclasses.replace(two, at=0.1, seconds=1.0, decode=2),
    ]
    last = dataclasses.replace(two, at=10.0, decode=7)
    assert over_time([*many, last], lambda sample: sample.decode, 2) == ((pytest.approx(0.025), 8.0), (10.0, 7.0))
    assert over_time(many, lambda sample: sample.decode, 2) == ((0.0, 10), (0.1, 2))
    assert over_time([], lambda sample: sample.decode) == ()


@given(POINTS)
def test_frontier(points: list[tuple[str, float, float, bool]]) -> None:
    best = frontier(points)
    good = [point for point in points if point[3]]
    assert bool(best) is bool(good)
    assert all(not (a[1] >= b[1] and a[2] >= b[2] and a[1:3] != b[1:3]) for b in best for a in good)
    assert all(any(b[1] >= point[1] and b[2] >= point[2] for b in best) for point in good)
    assert [point[1] for point in best] == sorted({point[1] for point in best})


def test_columns_and_the_best() -> None:
    runs = five()
    shown = columns(runs)
    assert len(shown) == len(COLUMNS) - 1  # nobody waited, so there is no rate while full
    for column, best in zip(shown, best_of(runs), strict=True):
        values = [column.known(result) for result in runs]
        kept = [value for value, result in zip(values, runs, strict=True) if keeps_slo(result)]
        assert all(column.text(runs[place]) == column.text(runs[min(best)]) for place in best)
        for place in best:
            assert all(
                value is None or (value - (values[place] or 0)) * column.best <= 0.005 * abs(value) for value in kept
            )
        assert column.best or not best
    assert run(saturated_seconds=2.0, saturated_tokens=10).saturated_tokens_per_second == 5.0
