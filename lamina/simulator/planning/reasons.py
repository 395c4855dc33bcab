"""Why one candidate wins, in sentences: what it does and how sure that is, what limits it, what comes close, and how it
compares with the best of the other kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.offloading import compute_bound_devices, step_compared
from lamina.simulator.planning.overload import would_do
from lamina.simulator.planning.planner import Ranked, best
from lamina.simulator.planning.quantities import links, scaled
from lamina.simulator.planning.ties import RATIO_ERROR, advantage, lossless
from lamina.simulator.steady_state.closed_form import ATTAINMENT, estimate
from lamina.simulator.steady_state.misfits import slow_link
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
    found = winner.estimate
    said = [
        f"{winner.name}: {winner.goodput:.3g} requests/s within the SLO for ${found.price:.2f} an hour"
        f"{f', {winner.goodput_per_dollar:.0f} requests for a dollar' if found.price else ''}{_by(winner)}."
    ]
    if ties:
        said.append(_ties_said(winner, ties))
    if not winner.serves and math.isinf(found.demanded):
        said.append(f"No system serves {ATTAINMENT:.0%} of the requests within the SLO.")
    elif not winner.serves:
        said.append(
            f"No system here serves all {found.demanded:.3g} requests/s within the SLO; the rest would have to go "
            f"elsewhere. {would_do(winner.candidate.system, demand, slo, prefill, found.replicas + 1)}."
        )
    said.append(_limits_said("the winner", limits(winner, demand, slo, prefill)))
    winner_device = winner.candidate.system.devices[-1][0].name if winner.candidate.offloaded else ""
    others = (each.candidate.system for each in ranked if each.candidate.system.devices[-1][0].name != winner_device)
    other = best(ranked, not winner.candidate.offloaded)
    bound = [f"{sentence}." for sentence in compute_bound_devices(others, demand.context)]
    if other is None:
        said += bound
        said.append(_nothing_else(ranked, demand, slo, prefill))
        return said
    gain, unit = _gain(winner, other)
    theirs = f"{other.name} (${other.estimate.price:.2f} an hour, {other.goodput:.3g} requests/s{_by(other)})"
    if winner.candidate.offloaded:
        said.append(f"It serves {gain:.2f}x the requests{unit} of the best without offloading, {theirs}.")
        if gain < 1:
            said.append(f"The latter gives more{unit}, but does not serve all that is asked for.")
    else:
        if gain >= 1:
            compared = f"serves {1 - 1 / gain:.0%} fewer requests{unit}"
        elif gain > 0:
            compared = f"serves {1 / gain - 1:.0%} more requests{unit}, but not all that is asked for"
        else:
            compared = "serves some requests within the SLO, where this one serves none"
        said.append(f"Offloading attention does not pay here: the best system that offloads it, {theirs}, {compared}.")
        said.append(_limits_said("that system", limits(other, demand, slo, prefill)))
        here, there = winner.candidate.system, other.candidate.system
        whole = here.decode if isinstance(here, Disaggregated) else here
        if isinstance(whole, Colocated) and isinstance(there, Offloaded):
            said.append(f"{step_compared(there, whole, other.estimate.batch, demand.context)}.")
    return said + bound


def limits(ranked: Ranked, demand: Demand, slo: Slo, prefill: bool = True) -> list[Limit]:
    """What twice as much of each thing would give, at the most that one replica serves; the largest gain first."""
    most = demand.at_rate(math.inf)
    system = ranked.candidate.system
    now = estimate(system, 1, most, slo, prefill).goodput
    found = []
    for what, improved in _improvements(system):
        better = estimate(improved, 1, most, slo, prefill).goodput
        found.append(Limit(what, better / now if now else math.inf))
    return sorted(found, key=lambda limit: -limit.gain)


def _improvements(system: System) -> list[tuple[str, System]]:
    """What is improved, in words, and the system with it: twice as much of each thing of its devices and links."""
    made: list[tuple[str, System]] = []
    roles = {device.name: "" for device, _ in system.devices}
    if isinstance(system, Offloaded) and len(roles) == 2:
        roles = {system.model_device.name: " (dense layers)", system.attention_device.name: " (attention)"}
    joined = {device.name for device, count in system.devices if count > 1 and device.interconnect}
    for name, role in roles.items():
        made += [
            (f"memory bandwidth of {name}{role}", scaled(system, 2, name, "bandwidth")),
            (f"memory of {name}{role}", scaled(system, 2, name, "memory")),
            (f"compute of {name}{role}", scaled(system, 2, name, "flops", "flops_8bit")),
        ]
        if name in joined:
            made.append((f"interconnect of {name}", scaled(system, 2, name, "interconnect")))
    for link in links([system]).values():
        made.append((f"bandwidth of {link.name}", scaled(system, 2, link.name, "bandwidth")))
        made.append((f"messages a second of {link.name}", scaled(system, 0.5, link.name, "round_trip")))
    return made


def _gain(winner: Ranked, other: Ranked) -> tuple[float, str]:
    """How many times what the other gives, and for what: a dollar, or nothing where something is free."""
    if winner.estimate.price and other.estimate.price:
        mine, theirs, unit = winner.goodput_per_dollar, other.goodput_per_dollar, " for a dollar"
    else:
        mine, theirs, unit = winner.goodput, other.goodput, ""
    return (mine / theirs if theirs else math.inf), unit


def _by(ranked: Ranked) -> str:
    """The other figures of a candidate, and their source."""
    found, result = ranked.estimate, ranked.result
    tpot, ttft, batch, share = found.tpot, found.ttft, found.batch, found.share
    if result is not None:
        tpot, ttft, batch, share = result.tpot.mean, result.ttft.mean, result.mean_batch, result.slo_share
    return (
        f", TPOT {tpot * 1000:.0f} ms, TTFT {ttft:.2f} s, {batch:.0f} sequences in decode per replica, "
        f"{share:.0%} within the SLO, by the {'closed form' if result is None else 'event loop'}"
    )


def _ties_said(winner: Ranked, ties: Sequence[Ranked]) -> str:
    first = winner.candidate.system.policy.name
    names = "; ".join(
        f"{each.name} (${each.estimate.price:.2f} an hour, {advantage(each, winner):.2f}x"
        f"{'' if lossless(each) else ', lossy policy'})"
        for each in ties[:_NAMED]
    )
    more = f", and {len(ties) - _NAMED} more" if len(ties) > _NAMED else ""
    chosen = "the cheapest of them that reads all KV" if lossless(winner) else f"the cheapest, with the policy {first}"
    return (
        f"Ties, as a comparison of two systems is off by up to {RATIO_ERROR:.0%}: {names}{more}. "
        f"The plan takes {chosen}."
    )


def _limits_said(what: str, found: Sequence[Limit]) -> str:
    matter = [limit for limit in found if limit.gain >= _MATTERS]
    if not matter:
        return f"No single thing limits {what}: twice the {found[0].what} would serve {found[0].gain - 1:.0%} more."
    said = [f"twice the {limit.what} would serve {limit.gain - 1:.0%} more" for limit in matter[:3]]
    return f"What limits {what}: {', '.join(said)}."


def _nothing_else(ranked: Sequence[Ranked], demand: Demand, slo: Slo, prefill: bool) -> str:
    """Why there is none of the other kind."""
    winner = ranked[0]
    if winner.candidate.offloaded:
        return "No system without offloading fits the devices, the budget and the SLO."
    for each in ranked:
        system = each.candidate.system
        if isinstance(system, Offloaded) and (said := slow_link(system, demand, slo, prefill)):
            return f"Offloading attention does not pay here: {said}."
    return "Offloading attention does not pay here: no system with it fits the devices, the budget and the SLO."
