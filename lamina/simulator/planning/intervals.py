"""How sure a plan's numbers are: each with the interval in which it is with a chance of 90 %.

The cost model's error of a pace (`costs.uncertainty`) goes through the whole system: with devices so much slower and so
much faster the closed form, or the event loop, says what becomes of batches, waiting and what is in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from lamina.simulator.costs.systems import System
from lamina.simulator.costs.uncertainty import Interval, spread
from lamina.simulator.event_loop.results import RunResult
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.planner import Ranked, limited
from lamina.simulator.planning.quantities import faster
from lamina.simulator.steady_state.closed_form import cost_of_a_million, estimate
from lamina.simulator.traces.demand import Demand

Run = Callable[[System], RunResult]
"""The event loop with a system of the candidate's kind, under the candidate's load."""


@dataclass(frozen=True, slots=True)
class _Figures:
    """One candidate's numbers."""

    tpot: float
    ttft: float
    share: float
    rate: float
    tokens: float
    batch: float


def intervals(
    ranked: Ranked, demand: Demand, slo: Slo, prefill: bool = True, run: Run | None = None
) -> dict[str, Interval]:
    """An interval for each number of a plan: "tpot" and "ttft" in seconds, "share" in time, "requests_per_second"
    within the SLO, "tokens_per_second", "batch" (sequences in decode of one replica), "dollars_per_hour" and
    "dollars_per_million". With `run` by the event loop, where it checked the candidate; else by the closed form.
    """
    wide = spread(ranked.candidate.system)
    system, again = limited(ranked), run if ranked.result is not None else None
    alone = replace(ranked, result=None)
    slow, fast = (
        _figures(alone, faster(system, 1 / factor), demand, slo, prefill, again)
        for factor in (wide.tpot[1], wide.tpot[0])
    )
    now = _figures(ranked, system, demand, slo, prefill, None)
    made = {
        "tpot": _around(now.tpot, fast.tpot, slow.tpot),
        "ttft": _around(now.ttft, min(fast.ttft, now.ttft * wide.ttft[0]), max(slow.ttft, now.ttft * wide.ttft[1])),
        "share": _around(now.share, slow.share, fast.share),
        "requests_per_second": _around(ranked.goodput, slow.rate, fast.rate),
        "tokens_per_second": _around(now.tokens, slow.tokens, fast.tokens),
        "batch": _around(now.batch, fast.batch, slow.batch),
    }
    price, tokens = ranked.estimate.price, made["tokens_per_second"]
    made["dollars_per_hour"] = Interval(price, price, price)
    made["dollars_per_million"] = Interval(
        *(cost_of_a_million(price, each) for each in (tokens.high, tokens.value, tokens.low))
    )
    return made


def _figures(ranked: Ranked, system: System, demand: Demand, slo: Slo, prefill: bool, run: Run | None) -> _Figures:
    """The numbers of the system in the candidate's place: by the event loop where it ran, or can run."""
    if run is not None:
        ranked = replace(ranked, result=run(system))
    if (found := ranked.result) is not None:
        tokens = found.tokens_per_second
        return _Figures(found.tpot.mean, found.ttft.mean, found.slo_share, ranked.goodput, tokens, found.mean_batch)
    now = estimate(system, ranked.estimate.replicas, demand, slo, prefill)
    share = now.share if math.isinf(demand.rate) else now.share * min(1.0, now.taken / demand.rate)
    return _Figures(now.tpot, now.ttft, share, now.goodput, now.tokens_per_second, now.batch)


def _around(value: float, one: float, other: float) -> Interval:
    """The interval between two ends, which holds the value."""
    return Interval(min(value, one, other), value, max(value, one, other))
