"""What to take, in sentences (`answer`): what it does, what less and more money buy, and whether offloading pays.

`overloads` says which systems do not keep the SLO under a load, and `would_do` how many of a system would keep it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lamina.simulator.costs.systems import Offloaded, System
from lamina.simulator.event_loop.results import ATTAINMENT, RunResult
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.planner import NAMED_FROM, Ranked, lossless, ratio_error
from lamina.simulator.steady_state.closed_form import Estimate, estimate, slow_link
from lamina.simulator.traces.demand import Demand

_NAMED = 2
"""Cheaper systems that are named."""


def answer(
    ranked: Sequence[Ranked],
    demand: Demand,
    slo: Slo,
    prefill: bool = True,
    ties: Sequence[Ranked] = (),
    below: Sequence[Ranked] = (),
    above: Ranked | None = None,
) -> list[str]:
    """Plain sentences. `ties`: what is as good as the first; `below`: what is cheaper, and has too few in time;
    `above`: what has nearly all in time."""
    winner = ranked[0]
    forecast, figures = winner.estimate, winner.predicted
    sentences = [
        f"Take {winner.name}: {_cost(winner)}{winner.goodput:.3g} requests/s within the SLO, {figures.slo_share:.0%} "
        f"in time, TPOT {figures.tpot * 1000:.0f} ms, TTFT {figures.ttft:.2f} s, by the {figures.source}."
    ]
    sentences += [_instead(entry, winner) for entry in (*below[:_NAMED], above) if entry is not None]
    if winner.serves and winner.estimate.price and not below and len(ranked) > 1:
        sentences.append(f"Nothing cheaper has {NAMED_FROM:.0%} of the requests in time.")
    if winner.result is not None and winner.result.requests < demand.requests:
        sentences.append(
            f"It was run with {winner.result.requests} of {demand.requests} requests: of shared prefixes and states "
            "the replay has nothing, and the engine's own scheduler takes minutes for more."
        )
    if ties:
        choice = "the cheapest that reads all KV" if lossless(winner) else "the cheapest, whose policy is lossy"
        sentences.append(
            f"As good, as a comparison of two systems may be off by {ratio_error(winner):.0%}: {len(ties)} other "
            f"mixes, such as {ties[0].name}, {_cost(ties[0])}marked ~ below. Taken is {choice}."
        )
    if not winner.serves and math.isinf(forecast.demanded):
        sentences.append(f"No system serves {ATTAINMENT:.0%} of the requests within the SLO.")
    elif not winner.serves:
        sentences.append(
            f"No system here serves all {forecast.demanded:.3g} requests/s within the SLO; the rest would have to go "
            f"elsewhere. {would_do(winner.candidate.system, demand, slo, prefill, forecast.replicas + 1)}."
        )
    if len(ranked) == 1:
        return sentences
    kind = winner.candidate.offloaded
    others = (entry for entry in ranked if entry.candidate.offloaded is not kind and entry.estimate.goodput)
    other = next(others, None)
    return [*sentences, _nothing_else(ranked, demand, slo, prefill) if other is None else _offloading(winner, other)]


def _cost(ranked: Ranked) -> str:
    return f"${ranked.estimate.price:.2f} an hour, " if ranked.estimate.price else ""


def _instead(other: Ranked, winner: Ranked) -> str:
    """What less money, or more, buys."""
    change = other.estimate.price / winner.estimate.price - 1
    than = f"{abs(change):.0%} {'more' if change > 0 else 'less'}"
    return f"With {other.share:.0%} in time: {other.name}, ${other.estimate.price:.2f} an hour, {than}."


def _offloading(winner: Ranked, other: Ranked) -> str:
    """Whether offloading attention pays; `other` is the best that does what the winner does not."""
    gain, unit = _gain(winner, other)
    theirs = f"{other.name} ({_cost(other)}{other.goodput:.3g} requests/s)"
    if winner.candidate.offloaded:
        but = f", which gives more{unit}, but does not serve all that is asked for" if gain < 1 else ""
        return f"It serves {gain:.2f}x the requests{unit} of the best without offloading, {theirs}{but}."
    if gain >= 1:
        compared = f"serves {1 - 1 / gain:.0%} fewer requests{unit}"
    elif gain > 0:
        compared = f"serves {1 / gain - 1:.0%} more requests{unit}, but not all that is asked for"
    else:
        compared = "serves some requests within the SLO, where this one serves none"
    return f"Offloading attention does not pay here: the best system that offloads it, {theirs}, {compared}."


def _gain(winner: Ranked, other: Ranked) -> tuple[float, str]:
    """How many times what the other gives, and for what: a dollar, or nothing where something is free."""
    if winner.estimate.price and other.estimate.price:
        mine, theirs, unit = winner.goodput_per_dollar, other.goodput_per_dollar, " for a dollar"
    else:
        mine, theirs, unit = winner.goodput, other.goodput, ""
    return (mine / theirs if theirs else math.inf), unit


def _nothing_else(ranked: Sequence[Ranked], demand: Demand, slo: Slo, prefill: bool) -> str:
    """Why there is none of the other kind."""
    winner = ranked[0]
    if winner.candidate.offloaded:
        return "No system without offloading fits the devices, the budget and the SLO."
    for entry in ranked:
        system = entry.candidate.system
        if isinstance(system, Offloaded) and (reason := slow_link(system, demand, slo, prefill)):
            return f"Offloading attention does not pay here: {reason}."
    return "Offloading attention does not pay here: no system with it fits the devices, the budget and the SLO."


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
        f"{', overloaded: requests waited most of the time' if result.mostly_full else ''}. "
        f"{would_do(system, demand, slo, prefill)}."
        for system, result in zip(systems, results, strict=True)
        if not result.keeps_slo
    ]


def would_do(system: System, demand: Demand, slo: Slo, prefill: bool = True, least: int = 2) -> str:
    """How many of a system, `least` or more, keep the SLO by the closed form, with their price; or that no number
    does."""
    forecast = estimate(system, MOST, demand, slo, prefill)
    if not forecast.serves:
        return f"By formula {_none_does(forecast)}"
    count = max(least, forecast.replicas)
    cost = forecast.price / forecast.replicas * count
    return f"By formula {count} replicas would keep the SLO{f', for ${cost:,.2f} an hour' if cost else ''}"


def _none_does(found: Estimate) -> str:
    if found.share >= ATTAINMENT:
        return f"not even {MOST} replicas keep the SLO: they take {found.taken:.3g} requests/s"
    if not math.isfinite(found.tpot):
        return "no number of replicas keeps the SLO: the trace's longest request does not fit"
    alone = f"TPOT is {found.tpot * 1000:.3g} ms and TTFT {found.ttft:.3g} s"
    return f"no number of replicas keeps the SLO: with few requests at a time {alone}"
