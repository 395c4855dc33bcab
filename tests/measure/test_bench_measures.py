"""Latencies, rates and goodput from times that are given: exact, and by their definitions."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import InvalidRequest
from lamina.measure.bench.measures import (
    Outcome,
    meets,
    over_time,
    parse_percentiles,
    parse_slo,
    peak_concurrency,
    percentile,
    spread,
    summary,
)

FINE = Outcome(0.0, 1.0, 2.0, (1.5, 1.75, 2.0), planned=9, asked=3, prompt=10, output=3, cached=4)
COUNTED = Outcome(0.0, 2.0, 2.5, (2.25,), planned=9, asked=8)
BROKEN = Outcome(0.0, 1.0, 1.25, (1.1,), planned=9, asked=8, error="timeout", detail="x")


def test_a_requests_own_times():
    assert (FINE.ttft, FINE.e2el, FINE.tpot, FINE.output_tokens, FINE.prompt_tokens) == (0.5, 1.0, 0.25, 3, 10)
    assert (COUNTED.ttft, COUNTED.tpot, COUNTED.output_tokens, COUNTED.prompt_tokens) == (0.25, None, 1, 9)


def test_tpot_counts_tokens_and_itl_chunks():
    two_a_chunk = replace(FINE, output=6)
    found = summary([two_a_chunk], 2.0)
    assert two_a_chunk.tpot == pytest.approx(0.1)
    assert found.spreads["itl"].count == 2
    assert found.spreads["itl"].mean == pytest.approx(250.0)


def test_a_runs_numbers():
    found = summary([FINE, COUNTED, BROKEN], 2.5, (50, 99), {"ttft": 300})
    assert (found.completed, dict(found.failures)) == (2, {"timeout": 1})
    assert (found.total_input_tokens, found.total_output_tokens) == (19, 4)
    assert found.request_throughput == pytest.approx(0.8)
    assert found.output_throughput == pytest.approx(1.6)
    assert found.total_token_throughput == pytest.approx(23 / 2.5)
    assert found.request_goodput == pytest.approx(0.4)
    assert found.mean_concurrent_requests == pytest.approx((1.0 + 0.5 + 0.25) / 2.5)
    assert (found.max_concurrent_requests, found.answers_without_usage) == (2, 1)
    assert (found.answers_with_cached_tokens, found.cached_tokens, found.answers_shorter_than_asked) == (1, 4, 1)
    assert {name: each.count for name, each in found.spreads.items()} == {"ttft": 2, "tpot": 1, "itl": 2, "e2el": 2}
    assert found.spreads["ttft"].median == pytest.approx(375.0)
    assert found.spreads["ttft"].percentiles[50] == pytest.approx(375.0)
    assert summary([FINE], 2.0).request_goodput is None


def test_a_run_in_which_nothing_succeeded():
    found = summary([BROKEN], 1.25, slo={"ttft": 1})
    assert (found.completed, found.total_output_tokens, found.request_goodput, found.max_output_tokens_per_s) == (
        0,
        0,
        0.0,
        0.0,
    )
    assert found.spreads["ttft"].mean == 0.0
    assert summary([], 0.0).completed == 0


@pytest.mark.parametrize(
    ("slo", "holds"),
    [
        ({}, True),
        ({"ttft": 500}, True),
        ({"ttft": 499}, False),
        ({"tpot": 250}, True),
        ({"tpot": 249}, False),
        ({"e2el": 1000, "ttft": 500}, True),
        ({"e2el": 999, "ttft": 500}, False),
    ],
)
def test_limits_hold_together(slo, holds):
    assert meets(FINE, slo) is holds
    assert meets(replace(COUNTED, ended=9.0, chunks=(2.25,)), {"tpot": 1})  # of one token, as in vLLM
    assert not meets(BROKEN, slo)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50), st.floats(0.1, 99.9))
def test_percentiles_are_numpys(values, number):
    assert percentile(sorted(values), number) == pytest.approx(float(np.percentile(values, number)), abs=1e-9)
    found = spread(values, (number,))
    assert found.mean == pytest.approx(statistics.fmean(values) * 1e3)
    assert found.std == pytest.approx(float(np.std(values)) * 1e3, abs=1e-6)
    assert found.median == pytest.approx(statistics.median(values) * 1e3)


SPANS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=12)


@given(SPANS)
def test_the_peak_is_the_most_at_any_moment(spans):
    outcomes = [Outcome(0, start, start + length) for start, length in spans]
    at_each = [sum(each.sent <= moment < each.ended for each in outcomes) for moment in range(40)]
    assert peak_concurrency(outcomes) == max(at_each)


@given(SPANS, st.integers(1, 4), st.sampled_from([0.5, 1.0, 4.0]))
def test_tokens_over_time_are_all_tokens(spans, each, width):
    outcomes = [
        Outcome(0, start, start + length, [start + n / 2 for n in range(length)], output=each * length)
        for start, length in spans
    ]
    total = sum(outcome.output_tokens for outcome in outcomes)
    assert sum(over_time(outcomes, width)) * width == pytest.approx(total)


def test_limits_and_percentiles_in_words():
    assert parse_slo(["ttft:500", "tpot:5e1,e2el:9"]) == {"ttft": 500.0, "tpot": 50.0, "e2el": 9.0}
    assert parse_slo([]) == {}
    assert parse_percentiles("99,50,99.9") == (50.0, 99.0, 99.9)


@pytest.mark.parametrize(
    "word", ["ttft", "ttft:", "ttft:0", "ttft:-1", "ttft:nan", "ttft:inf", "itl:5", "ttft:1 ttft:2", ":"]
)
def test_limits_that_are_none(word):
    with pytest.raises(InvalidRequest, match="goodput"):
        parse_slo([word])


@pytest.mark.parametrize("words", ["", "0", "100", "nan", "x", ",", "-1"])
def test_percentiles_that_are_none(words):
    with pytest.raises(InvalidRequest, match="percentile"):
        parse_percentiles(words)
