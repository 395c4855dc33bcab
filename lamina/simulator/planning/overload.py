"""What is said of a system that does not keep the SLO under a load, and how many of it would."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lamina.simulator.costs.systems import System
from lamina.simulator.event_loop.results import RunResult
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.steady_state.closed_form import ATTAINMENT, Estimate, estimate
from lamina.simulator.traces.demand import Demand

MOST = 256
"""Replicas that are thought of."""


def overloads(
    systems: Sequence[System], results: Sequence[RunResult], demand: Demand, slo: Slo, prefill: bool = True
) -> list[str]:
    """A sentence for each system whose run did not keep the SLO. None where all requests are there from the start, or
    any time is accepted: more replicas are no answer then."""
    if math.isinf(demand.rate) or slo == Slo():
        return []
    return [
        f"{result.system}: {result.slo_share:.1%} within the SLO at {demand.rate:.3g} requests/s"
        f"{_waiting(result)}. {would_do(system, demand, slo, prefill)}."
        for system, result in zip(systems, results, strict=True)
        if result.slo_share < ATTAINMENT
    ]


def would_do(system: System, demand: Demand, slo: Slo, prefill: bool = True, least: int = 2) -> str:
    """How many of a system, `least` or more, keep the SLO by the closed form, with their price; or that no number
    does."""
    found = estimate(system, MOST, demand, slo, prefill)
    if not found.serves:
        return f"By formula {_none_does(found)}"
    count = max(least, found.replicas)
    cost = found.price / found.replicas * count
    return f"By formula {count} replicas would keep the SLO{f', for ${cost:,.2f} an hour' if cost else ''}"


def _none_does(found: Estimate) -> str:
    if found.share >= ATTAINMENT:
        return f"not even {MOST} replicas keep the SLO: they take {found.taken:.3g} requests/s"
    if not math.isfinite(found.tpot):
        return "no number of replicas keeps the SLO: the trace's longest request does not fit"
    alone = f"TPOT is {found.tpot * 1000:.3g} ms and TTFT {found.ttft:.3g} s"
    return f"no number of replicas keeps the SLO: with few requests at a time {alone}"


def _waiting(result: RunResult) -> str:
    """The words for a system whose requests waited for room most of the time; "" for others."""
    return ", overloaded: requests waited most of the time" if result.saturated_seconds > result.seconds / 2 else ""
