"""Why one candidate wins, in sentences (`why`): what it does and how sure that is, what limits it, what comes close,
and how it compares with the best of the other kind.

`overloads` says which systems do not keep the SLO under a load, and `would_do` how many of a system would keep it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lamina.simulator.costs.systems import Offloaded, System
from lamina.simulator.event_loop.results import ATTAINMENT, RunResult
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.planner import Ranked, advantage, best, lossless, ratio_error
from lamina.simulator.planning.quantities import links, scaled
from lamina.simulator.steady_state.closed_form import Estimate, estimate, slow_link
from lamina.simulator.traces.demand import Demand

_MATTERS = 1.03
"""A gain that is worth a word, of twice as much of something."""
_NAMED = 3
"""Ties that are named."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What twice as much of something would give: `gain` times the requests within the SLO."""

    what: str
    gain: float


def why(
    ranked: Sequence[Ranked],
    demand: Demand,
    slo: Slo,
    prefill: bool = True,
    ties: Sequence[Ranked] = (),
) -> list[str]:
    """Plain sentences. `ties`: what is as good as it."""
    winner = ranked[0]
    forecast = winner.estimate
    sentences = [
        f"{winner.name}: {winner.goodput:.3g} requests/s within the SLO for ${forecast.price:.2f} an hour"
        f"{f', {winner.goodput_per_dollar:.0f} requests for a dollar' if forecast.price else ''}{_by(winner)}."
    ]
    if winner.result is not None and winner.result.requests < demand.requests:
        sentences.append(
            f"It was run with {winner.result.requests} of {demand.requests} requests: of shared prefixes and states "
            "the replay has nothing, and the engine's own scheduler takes minutes for more."
        )
    if ties:
        sentences.append(_ties_said(winner, ties))
    if not winner.serves and math.isinf(forecast.demanded):
        sentences.append(f"No system serves {ATTAINMENT:.0%} of the requests within the SLO.")
    elif not winner.serves:
        sentences.append(
            f"No system here serves all {forecast.demanded:.3g} requests/s within the SLO; the rest would have to go "
            f"elsewhere. {would_do(winner.candidate.system, demand, slo, prefill, forecast.replicas + 1)}."
        )
    sentences.append(_limits_said("the winner", limits(winner, demand, slo, prefill)))
    other = best(ranked, not winner.candidate.offloaded)
    if other is None:
        sentences.append(_nothing_else(ranked, demand, slo, prefill))
        return sentences
    gain, unit = _gain(winner, other)
    theirs = f"{other.name} (${other.estimate.price:.2f} an hour, {other.goodput:.3g} requests/s{_by(other)})"
    if winner.candidate.offloaded:
        sentences.append(f"It serves {gain:.2f}x the requests{unit} of the best without offloading, {theirs}.")
        if gain < 1:
            sentences.append(f"The latter gives more{unit}, but does not serve all that is asked for.")
    else:
        if gain >= 1:
            compared = f"serves {1 - 1 / gain:.0%} fewer requests{unit}"
        elif gain > 0:
            compared = f"serves {1 / gain - 1:.0%} more requests{unit}, but not all that is asked for"
        else:
            compared = "serves some requests within the SLO, where this one serves none"
        sentences.append(
            f"Offloading attention does not pay here: the best system that offloads it, {theirs}, {compared}."
        )
        sentences.append(_limits_said("that system", limits(other, demand, slo, prefill)))
    return sentences


def limits(ranked: Ranked, demand: Demand, slo: Slo, prefill: bool = True) -> list[Limit]:
    """What twice as much of each thing would give, at the most that one replica serves, by a coarse look; the largest
    gain first."""
    unlimited = demand.at_rate(math.inf)
    system = ranked.candidate.system
    now = estimate(system, 1, unlimited, slo, prefill, fine=False).goodput
    gains = []
    for what, improved in _improvements(system):
        better = estimate(improved, 1, unlimited, slo, prefill, fine=False).goodput
        gains.append(Limit(what, better / now if now else math.inf))
    return sorted(gains, key=lambda limit: -limit.gain)


def _improvements(system: System) -> list[tuple[str, System]]:
    """What is improved, in words, and the system with it: twice as much of each thing of its devices and links."""
    improved: list[tuple[str, System]] = []
    roles = {device.name: "" for device, _ in system.devices}
    if isinstance(system, Offloaded) and len(roles) == 2:
        roles = {system.model_device.name: " (dense layers)", system.attention_device.name: " (attention)"}
    joined = {device.name for device, count in system.devices if count > 1 and device.interconnect}
    for name, role in roles.items():
        improved += [
            (f"memory bandwidth of {name}{role}", scaled(system, 2, name, "bandwidth")),
            (f"memory of {name}{role}", scaled(system, 2, name, "memory")),
            (f"compute of {name}{role}", scaled(system, 2, name, "flops", "flops_8bit")),
        ]
        if name in joined:
            improved.append((f"interconnect of {name}", scaled(system, 2, name, "interconnect")))
    for link in links([system]).values():
        improved.append((f"bandwidth of {link.name}", scaled(system, 2, link.name, "bandwidth")))
        improved.append((f"messages a second of {link.name}", scaled(system, 0.5, link.name, "round_trip")))
    return improved


def _gain(winner: Ranked, other: Ranked) -> tuple[float, str]:
    """How many times what the other gives, and for what: a dollar, or nothing where something is free."""
    if winner.estimate.price and other.estimate.price:
        mine, theirs, unit = winner.goodput_per_dollar, other.goodput_per_dollar, " for a dollar"
    else:
        mine, theirs, unit = winner.goodput, other.goodput, ""
    return (mine / theirs if theirs else math.inf), unit


def _by(ranked: Ranked) -> str:
    """The other figures of a candidate, and their source."""
    figures = ranked.predicted
    return (
        f", TPOT {figures.tpot * 1000:.0f} ms, TTFT {figures.ttft:.2f} s, {figures.batch:.0f} sequences in decode per "
        f"replica, {figures.slo_share:.0%} within the SLO, by the {figures.source}"
    )


def _ties_said(winner: Ranked, ties: Sequence[Ranked]) -> str:
    first = winner.candidate.system.policy.name
    names = "; ".join(
        f"{tie.name} (${tie.estimate.price:.2f} an hour, {advantage(tie, winner):.2f}x"
        f"{'' if lossless(tie) else ', lossy policy'})"
        for tie in ties[:_NAMED]
    )
    more = f", and {len(ties) - _NAMED} more" if len(ties) > _NAMED else ""
    chosen = "the cheapest of them that reads all KV" if lossless(winner) else f"the cheapest, with the policy {first}"
    return (
        f"Ties, as a comparison of two systems may be off by {ratio_error(winner):.0%}: {names}{more}. "
        f"The plan takes {chosen}."
    )


def _limits_said(what: str, found: Sequence[Limit]) -> str:
    matter = [limit for limit in found if limit.gain >= _MATTERS]
    if not matter:
        return f"No single thing limits {what}: twice the {found[0].what} would serve {found[0].gain - 1:.0%} more."
    words = [f"twice the {limit.what} would serve {limit.gain - 1:.0%} more" for limit in matter[:3]]
    return f"What limits {what}: {', '.join(words)}."


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
