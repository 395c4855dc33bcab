"""How sure a plan's numbers are: each with the interval in which it is with a chance of 90 %.

The cost model's error of a pace (`costs.uncertainty`) goes through the whole system: with devices so much slower and so
much faster the closed form, or the event loop, says what becomes of batches, waiting and what is in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from lamina.simulator.costs.systems import System
from lamina.simulator.costs.uncertainty import Interval, spread
from lamina.simulator.event_loop.results import RunResult
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.plan_file import Prediction
from lamina.simulator.planning.planner import Ranked, limited
from lamina.simulator.planning.quantities import faster
from lamina.simulator.steady_state.closed_form import cost_of_a_million, estimate
from lamina.simulator.traces.demand import Demand

Run = Callable[[System], RunResult]
"""The event loop with a system of the candidate's kind, under the candidate's load."""


def intervals(
    ranked: Ranked, demand: Demand, slo: Slo, prefill: bool = True, run: Run | None = None
) -> dict[str, Interval]:
    """An interval for each number of a plan: "tpot" and "ttft" in seconds, "share" in time, "requests_per_second"
    within the SLO, "tokens_per_second", "batch" (sequences in decode of one replica) and
    "dollars_per_million". With `run` by the event loop, where it checked the candidate; else by the closed form."""
    wide = spread(ranked.candidate.system)
    system, again = limited(ranked), run if ranked.result is not None else None
    alone = replace(ranked, result=None)
    slow, fast = (
        _figures(alone, faster(system, 1 / factor), demand, slo, prefill, again)
        for factor in (wide.tpot[1], wide.tpot[0])
    )
    now = _figures(ranked, system, demand, slo, prefill, None)
    numbers = {
        "tpot": _around(now.tpot, fast.tpot, slow.tpot),
        "ttft": _around(now.ttft, min(fast.ttft, now.ttft * wide.ttft[0]), max(slow.ttft, now.ttft * wide.ttft[1])),
        "share": _around(now.slo_share, slow.slo_share, fast.slo_share),
        "requests_per_second": _around(ranked.goodput, slow.requests_per_second, fast.requests_per_second),
        "tokens_per_second": _around(now.tokens_per_second, slow.tokens_per_second, fast.tokens_per_second),
        "batch": _around(now.batch, fast.batch, slow.batch),
    }
    price, tokens = ranked.estimate.price, numbers["tokens_per_second"]
    numbers["dollars_per_million"] = Interval(
        *(cost_of_a_million(price, rate) for rate in (tokens.high, tokens.value, tokens.low))
    )
    return numbers


def _figures(ranked: Ranked, system: System, demand: Demand, slo: Slo, prefill: bool, run: Run | None) -> Prediction:
    """The numbers of the system in the candidate's place: by the event loop where it ran, or can run. Requests are
    those within the SLO."""
    if run is not None:
        ranked = replace(ranked, result=run(system))
    if ranked.result is not None:
        return ranked.predicted
    ranked = replace(ranked, estimate=estimate(system, ranked.estimate.replicas, demand, slo, prefill))
    figures = ranked.predicted
    taken_share = 1.0 if math.isinf(demand.rate) else min(1.0, figures.requests_per_second / demand.rate)
    return replace(figures, requests_per_second=ranked.goodput, slo_share=figures.slo_share * taken_share)


def _around(value: float, one: float, other: float) -> Interval:
    """The interval between two ends, which holds the value."""
    return Interval(min(value, one, other), value, max(value, one, other))
