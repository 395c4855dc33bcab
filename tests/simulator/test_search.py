"""The search for a plan: successive halving, replicas and rates that the event loop decides, and better devices."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from drawn_traces import poisson
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import BIG, H20, H100, SLO, dop, there_are, together

from lamina.simulator.costs.hardware import Device
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded
from lamina.simulator.event_loop.results import RunResult
from lamina.simulator.planning import planner
from lamina.simulator.planning.candidates import Candidate, candidates
from lamina.simulator.planning.planner import FINALISTS, Ranked, rank, search, verify
from lamina.simulator.steady_state.closed_form import ATTAINMENT
from lamina.simulator.traces.arrivals import Trace, head
from lamina.simulator.traces.catalogue import trace as trace_of
from lamina.simulator.traces.demand import demand

TRACE = poisson(4.0, 300, 500, 60, seed=1)
TIE = 0.03
"""What excerpts, and times of arrival within a step, may make of equal plans."""


def ranked(*systems: Colocated | Offloaded | Disaggregated, rate: float = 4.0, most: int = 4) -> list[Ranked]:
    return rank([Candidate(system, most) for system in systems], demand(TRACE).at_rate(rate), SLO)


# Successive halving


def test_all_are_simulated_and_few_of_them_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: dict[str, list[int]] = {}
    real = planner.simulate

    def counted(system: Colocated, trace: Trace, **more: object) -> RunResult:
        lengths.setdefault(system.name + str(system.max_batch_tokens), []).append(len(trace.arrivals))
        return real(system, trace, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(planner, "simulate", counted)
    systems = [replace(together(4), batch_tokens=512 + 64 * n) for n in range(20)]
    short = head(TRACE, 120)
    found = verify(ranked(*systems), short, SLO, requests=120)
    assert len(lengths) == len(found) == 20
    assert {runs[0] for runs in lengths.values()} == {20}
    assert sum(max(runs) == 120 for runs in lengths.values()) == FINALISTS
    assert [each.result.requests for each in found[:FINALISTS]] == [120] * FINALISTS  # type: ignore[union-attr]


def test_what_the_event_loop_serves_is_found_behind_what_it_does_not() -> None:
    """The closed form is wrong about the first: a batch takes ten times as long as it says."""
    slow = replace(H100, bandwidth=H100.bandwidth / 10)
    wrong = [
        replace(each, candidate=replace(each.candidate, system=replace(each.candidate.system, device=slow)))  # type: ignore[arg-type]
        for each in ranked(*(replace(together(4), batch_tokens=512 + n) for n in range(planner.TOP)), most=1)
    ]
    right = ranked(replace(together(8), device=replace(H100, price=20.0)))
    found = search([*wrong, *right], TRACE, SLO)
    assert found[0].serves
    assert found[0].candidate == right[0].candidate
    assert len(found) == len(wrong) + 1


def test_replicas_are_those_that_the_event_loop_needs() -> None:
    (one,) = ranked(together(4), rate=30.0)
    assert one.estimate.replicas == 1
    slow = replace(H100, bandwidth=H100.bandwidth / 3, flops=H100.flops / 3)
    wrong = replace(one, candidate=Candidate(together(4, slow), 4))
    (grown,) = verify([wrong], TRACE, SLO)
    assert 1 < grown.estimate.replicas <= 3
    assert grown.result is not None
    assert grown.result.price == pytest.approx(grown.estimate.price)


def test_replicas_that_a_short_excerpt_asks_for_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """On azure-code four were planned where three are enough: 400 requests cut its bursts badly."""

    def run(check: Any, ranked: Ranked, rate: float) -> Ranked:
        short = check.length < check.requests and ranked.estimate.replicas < 2
        result: Any = SimpleNamespace(
            slo_share=0.5 if short else 1.0, finished=100, seconds=100 / rate, saturated_seconds=0.0,
            requests=check.length,
        )  # fmt: skip
        return replace(ranked, result=result, rate=rate)

    monkeypatch.setattr(planner._Check, "run", run)
    every = ranked(*(replace(together(4), batch_tokens=512 + n) for n in range(2 * FINALISTS)), most=4)
    assert {each.estimate.replicas for each in every} == {1}
    found = verify(every, TRACE, SLO)
    assert {each.estimate.replicas for each in found[:FINALISTS]} == {1}


def test_as_much_as_can_be_is_the_highest_rate_that_keeps_the_slo() -> None:
    (found,) = ranked(together(4), rate=math.inf)
    for wrong in (0.6, 1.0, 1.3):
        start = replace(found, estimate=replace(found.estimate, taken=found.estimate.taken * wrong))
        (checked,) = verify([start], TRACE, SLO)
        assert checked.share >= ATTAINMENT
        assert checked.rate > 0.6 * found.estimate.taken


# Candidates


def test_hybrids_are_candidates() -> None:
    found = [each.system for each in candidates(BIG, there_are((H100, 4), (H20, 2)))]
    offloaded = [each for each in found if isinstance(each, Offloaded)]
    assert any(each.local_share for each in offloaded)
    assert {(each.lanes, each.model_replicas) for each in offloaded} == {(1, 1), (2, 1), (3, 1), (3, 2)}
    both = [each for each in found if isinstance(each, Disaggregated) and isinstance(each.decode, Offloaded)]
    assert both
    assert all(sum(count for device, count in each.devices if device == H100) <= 4 for each in both)


# Better devices


@settings(max_examples=3)
@given(
    better=st.sampled_from(["price", "bandwidth", "memory", "flops"]),
    which=st.sampled_from(["h100", "h20"]),
    factor=st.floats(1.1, 3.0),
    rate=st.sampled_from([2.0, 5.0]),
)
def test_a_better_device_never_makes_the_best_plan_worse(better: str, which: str, factor: float, rate: float) -> None:
    """Within a tie: requests in time for a dollar, of the best plan."""
    trace = head(trace_of("azure-conv"), 150)
    asked = demand(trace).at_rate(rate)

    def best(h100: Device, h20: Device) -> tuple[bool, float]:
        split = replace(dop(4, 1), model_device=h100, attention_device=h20)
        systems = (together(4, h100), together(8, h20), split, replace(split, local_share=0.8))
        found = search(rank([Candidate(each, 1) for each in systems], asked, SLO), trace, SLO)[0]
        return found.serves, found.goodput_per_dollar

    def improved(device: Device) -> Device:
        if device.name != which:
            return device
        return replace(device, **{better: getattr(device, better) * (1 / factor if better == "price" else factor)})

    before, after = best(H100, H20), best(improved(H100), improved(H20))
    assert after[0] >= before[0]
    assert after[1] >= before[1] * (1 - TIE)
