"""A plan's promise beside a run: which requests are sent, what is promised for them, and how steady the machine was."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning import EPYC, SMALL

from lamina.errors import EngineError, InvalidRequest
from lamina.measure.bench.measures import Outcome, summary
from lamina.measure.bench.plan_check import LEAST, Noise, Served, compare, excerpt, sent
from lamina.measure.bench.running import Run
from lamina.measure.bench.serve import Result
from lamina.measure.bench.workloads import Settings
from lamina.simulator.costs.hardware import Efficiency
from lamina.simulator.costs.systems import Colocated
from lamina.simulator.event_loop.simulate import Slo, simulate
from lamina.simulator.planning import plan_file
from lamina.simulator.planning.plan_file import Plan, Prediction, TraceSummary
from lamina.simulator.traces.arrivals import Arrival, Trace

SYSTEM = Colocated(model=SMALL, device=replace(EPYC, efficiency=Efficiency(layer_overhead=1e-5)))
PREDICTED = Prediction("event loop", 4.0, 100.0, 0.05, 1.0, 1.0, 4.0, 1.0, 1.0)
PLAN = Plan("tiny", SYSTEM, PREDICTED, TraceSummary("some", 10, 4.0, 500.0, 100.0, 900.0), Slo(1.0, 0.1), replicas=2)
TRACE = Trace("some", tuple(Arrival(0.25 * n, 100 + n % 7 * 50, 10 + n % 5 * 3) for n in range(600)))
STEADY = Noise(0.0, 40e9, 40e9, 40e9)


def perfect(trace: Trace) -> list[Outcome]:
    """What a machine would measure that is as the simulator says, to the mean: every request alike."""
    run = simulate(SYSTEM, trace)
    ttft, tpot = run.ttft.mean, run.tpot.mean
    return [
        Outcome(
            each.at, each.at, each.at + ttft + tpot * (each.output - 1), (each.at + ttft,), prompt=each.prompt,
            output=each.output,
        )
        for each in trace.arrivals
    ]  # fmt: skip


def result(outcomes: list[Outcome]) -> Result:
    seconds = max(each.ended for each in outcomes)
    run = Run(tuple(outcomes), seconds, 0.0)
    words: Any = None
    return Result(Settings(), "tiny", None, words, 0, run, summary(outcomes, seconds), ("a note",), {"timeout": "late"})


def test_a_check_sends_what_one_replica_would_get() -> None:
    found = excerpt(TRACE, PLAN, 2.0)
    assert len(found.arrivals) == 2 * 60 * 2
    assert found.seconds == pytest.approx((len(found.arrivals) - 1) / 2.0)
    late = replace(PLAN, predicted=replace(PREDICTED, requests_per_second=1.0, slo_share=0.5))
    assert len(excerpt(TRACE, late, 2.0).arrivals) == 119  # what it takes, half of it in time, in windows of 7
    unbounded = replace(PLAN, trace=replace(PLAN.trace, rate=0.0))
    assert len(excerpt(TRACE, unbounded, 2.0).arrivals) == 240
    idle = replace(PLAN, predicted=replace(PREDICTED, requests_per_second=0.0))
    with pytest.raises(InvalidRequest, match="the plan promises 0 requests a second"):
        excerpt(TRACE, idle)
    for minutes in (0.01, float("nan"), 1e9):
        with pytest.raises(InvalidRequest, match="minutes is"):
            excerpt(TRACE, PLAN, minutes)
    with pytest.raises(InvalidRequest, match=f"are 12 requests; allowed are {LEAST} to 600, as some has: --minutes"):
        excerpt(TRACE, PLAN, 0.1)
    with pytest.raises(InvalidRequest, match=r"--minutes from 0\.17 to 5"):
        excerpt(TRACE, PLAN, 100.0)


def test_a_promise_is_for_the_tokens_that_the_server_counted() -> None:
    outcomes = [Outcome(2.0, 2.1, 4.0, (3.0,), planned=9, prompt=11, output=0), Outcome(1.0, 1.0, 2.0, prompt=5)]
    assert sent("a", outcomes).arrivals == (Arrival(1.0, 5, 1), Arrival(2.0, 11, 1))


def test_answers_of_one_token_have_no_time_a_token() -> None:
    trace = Trace("short", tuple(Arrival(0.25 * n, 100, 1) for n in range(30)))
    found = compare(PLAN, "short", result(perfect(trace)), STEADY)
    assert [each.name for each in found.figures if each.unit == "ms"] == ["TTFT mean", "TTFT p50", "TTFT p99"]
    assert all(math.isfinite(each.difference) for each in found.figures)


def test_a_machine_as_simulated_measures_what_was_promised() -> None:
    load = excerpt(TRACE, PLAN, 1.0)
    found = compare(PLAN, load.name, result(perfect(load)), STEADY)
    figures = {each.name: each for each in found.figures}
    assert [*figures] == [
        "TTFT mean", "TTFT p50", "TTFT p99", "TPOT mean", "TPOT p50", "TPOT p99", "in time", "output", "$/M tokens",
    ]  # fmt: skip
    for name in ("TTFT mean", "TPOT mean", "in time", "output", "$/M tokens"):
        assert figures[name].difference == pytest.approx(0.0, abs=0.02), name
        assert figures[name].holds
    assert found.requests == len(load.arrivals)
    slow = [replace(each, ended=each.ended + each.ended - each.chunks[0]) for each in perfect(load)]
    figure = {each.name: each for each in compare(PLAN, load.name, result(slow), STEADY).figures}["TPOT mean"]
    assert figure.difference == pytest.approx(-0.5, abs=0.02)
    assert not figure.holds


def test_a_server_that_answers_nothing_is_an_error() -> None:
    failed = [Outcome(0.0, 0.0, 1.0, error="timeout")]
    with pytest.raises(EngineError, match="answered none of 1 requests: timeout: late"):
        compare(PLAN, "some", result(failed), STEADY)


def test_a_machine_that_is_not_steady_is_said() -> None:
    assert STEADY.remarks == []
    assert Noise(0.04, 40e9, 36e9, 0.0).remarks == []
    busy, unsteady, other = Noise(0.3, 40e9, 20e9, 60e9).remarks
    assert busy == "busy: other processes used 30% of the cores during the run"
    assert unsteady == "unsteady: memory was read at 40.0 GB/s before and 20.0 after"
    assert other == "other than planned: memory is read at 30.0 GB/s, the plan has 60.0"


@pytest.mark.real
def test_a_server_that_does_not_come_up_is_an_error_with_its_words(tmp_path: Path) -> None:
    plan_file.write(tmp_path / "plan.toml", replace(PLAN, model="no-such-model"))
    with pytest.raises(EngineError, match="no model 'no-such-model'"):
        Served(tmp_path / "plan.toml")
