"""Why one candidate wins and what would have to change: asked of the closed form, by changing one thing at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from lamina.simulator.costs.hardware import Device, Link
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.offloading import compute_bound_devices, step_compared
from lamina.simulator.planning.planner import Ranked, best
from lamina.simulator.steady_state.closed_form import ATTAINMENT, estimate
from lamina.simulator.steady_state.misfits import slow_link
from lamina.simulator.traces.demand import Demand

FARTHEST = 10.0
"""By what factor things are changed at most."""
_MATTERS = 1.03
"""A gain that is worth a word, of twice as much of something."""
_STEPS, _HALVINGS = 12, 8
_EVERYTHING = math.inf


@dataclass(frozen=True, slots=True)
class Limit:
    """What twice as much of something would give: `gain` times the requests within the SLO."""

    what: str
    gain: float


@dataclass(frozen=True, slots=True)
class Change:
    """At `factor` times what it is, `winner` takes the first place."""

    factor: float
    winner: str


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How far something has to rise or fall until another candidate wins; None where `FARTHEST` isn't enough."""

    what: str
    now: float
    unit: str
    rise: Change | None
    fall: Change | None

    def __str__(self) -> str:
        changes = [
            f"at {change.factor:.2f}x and {word} ({_plain(self.now * change.factor)} {self.unit}) "
            f"{change.winner} is better"
            for word, change in (("more", self.rise), ("less", self.fall))
            if change is not None
        ]
        said = "; ".join(changes) if changes else f"the winner does not change up to {FARTHEST:g}x either way"
        return f"{self.what}, now {_plain(self.now)} {self.unit}: {said}"


def why(ranked: Sequence[Ranked], demand: Demand, slo: Slo, prefill: bool = True) -> list[str]:
    """Plain sentences: what the first does, what limits it, and how it compares with the best of the other kind."""
    winner = ranked[0]
    found = winner.estimate
    said = [
        f"{winner.name}: {winner.goodput:.3g} requests/s within the SLO for ${found.price:.2f} an hour"
        f"{f', {winner.goodput_per_dollar:.0f} for a dollar' if found.price else ''}{_by(winner)}."
    ]
    if not winner.serves and math.isinf(found.demanded):
        said.append(f"No system gets {ATTAINMENT:.0%} of the requests through within the SLO.")
    elif not winner.serves:
        said.append(
            f"No system here serves all {found.demanded:.3g} requests/s within the SLO; the rest would have to go "
            "elsewhere."
        )
    said.append(_limits_said(limits(winner, demand, slo, prefill)))
    winner_device = winner.candidate.system.devices[-1][0].name if winner.candidate.offloaded else ""
    others = (each.candidate.system for each in ranked if each.candidate.system.devices[-1][0].name != winner_device)
    other = best(ranked, not winner.candidate.offloaded)
    bound = [f"{said}." for said in compute_bound_devices(others, demand.context)]
    if other is None:
        said += bound
        said.append(_nothing_else(ranked, demand, slo, prefill))
        return said
    gain, unit = _gain(winner, other)
    theirs = f"{other.name} (${other.estimate.price:.2f} an hour, {other.goodput:.3g} requests/s{_by(other)})"
    if winner.candidate.offloaded:
        said.append(f"It serves {gain:.2f}x the requests{unit} of the best without offloading, {theirs}.")
        if gain < 1:
            said.append(f"That one gives more{unit}, but doesn't serve all that is asked for.")
    else:
        compared = f"serves {1 - 1 / gain:.0%} fewer requests{unit}"
        if gain < 1:
            compared = f"serves {1 / gain - 1:.0%} more requests{unit}, but not all that is asked for"
        said.append(f"Offloading attention does not pay here: the best that does, {theirs}, {compared}.")
        said.append("There: " + _limits_said(limits(other, demand, slo, prefill)))
        here, there = winner.candidate.system, other.candidate.system
        whole = here.decode if isinstance(here, Disaggregated) else here
        if isinstance(whole, Colocated) and isinstance(there, Offloaded):
            said.append(f"{step_compared(there, whole, other.estimate.batch, demand.context)}.")
    return said + bound


def limits(ranked: Ranked, demand: Demand, slo: Slo, prefill: bool = True) -> list[Limit]:
    """What twice as much of each thing would give, at the most that one replica serves; the largest gain first."""
    most = demand.at_rate(_EVERYTHING)
    system = ranked.candidate.system
    now = estimate(system, 1, most, slo, prefill).goodput
    found = []
    for what, improved in _improvements(system):
        better = estimate(improved, 1, most, slo, prefill).goodput
        found.append(Limit(what, better / now if now else math.inf))
    return sorted(found, key=lambda limit: -limit.gain)


def sensitivity(
    winner: Ranked, rivals: Sequence[Ranked], demand: Demand, slo: Slo, prefill: bool = True
) -> list[Sensitivity]:
    """How far each price, each link and the prompts' length must change until one of the rivals gives more for a
    dollar: one thing at a time, by the closed form, corrected by the ratio of the event loop's goodput to the closed
    form's. A rival that serves all by the closed form but not by the event loop counts as one that does not."""
    every = [winner, *rivals]
    devices = {device.name: device for each in every for device, _ in each.candidate.system.devices}
    links = {link.name: link for each in every for link in _links(each.candidate.system)}
    asked = [
        (f"price of {device.name}", device.price, "$/h", device.name, "price")
        for device in devices.values()
        if device.price
    ]
    for link in links.values():
        asked.append((f"bandwidth of {link.name}", link.bandwidth / 1e9, "GB/s", link.name, "bandwidth"))
        if link.round_trip:
            asked.append((f"round trip of {link.name}", link.round_trip * 1e6, "us", link.name, "round_trip"))
    asked.append(("mean prompt", demand.prompt, "tokens", "", ""))
    found = []
    for what, now, unit, name, number in asked:

        def better(factor: float, name: str = name, number: str = number) -> str | None:
            """The system that is first then; None: the winner still is. Ratios that the event loop found are kept."""
            wanted = demand if name else demand.with_context(factor)
            scores = []
            for each in every:
                system = _scaled(each.candidate.system, factor, name, number) if name else each.candidate.system
                then = estimate(system, each.candidate.replicas, wanted, slo, prefill)
                found = each.goodput / each.estimate.goodput
                trusted = then.serves and (each.serves or not each.estimate.serves)
                scores.append((trusted, then.goodput_per_dollar * found))
            first = max(range(len(scores)), key=lambda place: (scores[place], -place))
            return every[first].name if first else None

        found.append(Sensitivity(what, now, unit, _nearest(better, FARTHEST), _nearest(better, 1 / FARTHEST)))
    return found


def _scaled(system: System, factor: float, name: str, *what: str) -> System:
    """The system with these numbers of the device or link of that name so many times as large."""

    def scale(part: Any) -> Any:
        return replace(part, **{each: getattr(part, each) * factor for each in what})

    return changed(system, scale, name)  # type: ignore[no-any-return]


def changed(part: Any, change: Callable[[Any], Any], only: str | None = None) -> Any:
    """A system with its devices and links changed, all or those of one name."""
    new: dict[str, Any] = {}
    for item in fields(part):
        value = getattr(part, item.name)
        if isinstance(value, (Device, Link)):
            new[item.name] = change(value) if only in (None, value.name) else value
        elif is_dataclass(value) and hasattr(value, "step"):
            new[item.name] = changed(value, change, only)
    return replace(part, **new)


def _improvements(system: System) -> list[tuple[str, System]]:
    """In words, and with it: twice as much of each thing that its devices and links have."""
    made: list[tuple[str, System]] = []
    roles = {device.name: "" for device, _ in system.devices}
    if isinstance(system, Offloaded) and len(roles) == 2:
        roles = {system.model_device.name: " (dense layers)", system.attention_device.name: " (attention)"}
    joined = {device.name for device, count in system.devices if count > 1 and device.interconnect}
    for name, role in roles.items():
        made += [
            (f"memory bandwidth of {name}{role}", _scaled(system, 2, name, "bandwidth")),
            (f"memory of {name}{role}", _scaled(system, 2, name, "memory")),
            (f"compute of {name}{role}", _scaled(system, 2, name, "flops", "flops_8bit")),
        ]
        if name in joined:
            made.append((f"interconnect of {name}", _scaled(system, 2, name, "interconnect")))
    for link in _links(system):
        made.append((f"bandwidth of {link.name}", _scaled(system, 2, link.name, "bandwidth")))
        made.append((f"messages a second of {link.name}", _scaled(system, 0.5, link.name, "round_trip")))
    return made


def _links(system: System) -> list[Link]:
    return [] if isinstance(system, Colocated) else [system.link]


def _nearest(better: Callable[[float], str | None], farthest: float) -> Change | None:
    """The factor between 1 and `farthest`, nearest to 1, from which on another is better: steps first, then halving."""
    before = 1.0
    for step in range(1, _STEPS + 1):
        factor = farthest ** (step / _STEPS)
        name = better(factor)
        if name is not None:
            for _ in range(_HALVINGS):
                middle = math.sqrt(before * factor)
                if (other := better(middle)) is not None:
                    factor, name = middle, other
                else:
                    before = middle
            return Change(factor, name)
        before = factor
    return None


def _gain(winner: Ranked, other: Ranked) -> tuple[float, str]:
    """How many times what the other gives, and for what: a dollar, or nothing where something is free."""
    if winner.estimate.price and other.estimate.price:
        mine, theirs, unit = winner.goodput_per_dollar, other.goodput_per_dollar, " for a dollar"
    else:
        mine, theirs, unit = winner.goodput, other.goodput, ""
    return (mine / theirs if theirs else math.inf), unit


def _by(ranked: Ranked) -> str:
    """Its other figures, and their source."""
    found, result = ranked.estimate, ranked.result
    if result is None:
        return (
            f", {found.tpot * 1000:.0f} ms a token, {found.ttft:.2f} s to the first, {found.batch:.0f} sequences in "
            "decode in each, by the closed form"
        )
    return (
        f", {result.tpot.mean * 1000:.0f} ms a token, {result.ttft.mean:.2f} s to the first, {result.mean_batch:.0f} "
        f"sequences in decode, {result.slo_share:.0%} in time, by the event loop"
    )


def _limits_said(found: Sequence[Limit]) -> str:
    matter = [limit for limit in found if limit.gain >= _MATTERS]
    if not matter:
        return f"Nothing alone limits it: twice the {found[0].what} would serve {found[0].gain - 1:.0%} more."
    said = [f"twice the {limit.what} would serve {limit.gain - 1:.0%} more" for limit in matter[:3]]
    return f"What limits it: {', '.join(said)}."


def _nothing_else(ranked: Sequence[Ranked], demand: Demand, slo: Slo, prefill: bool) -> str:
    """Why there is none of the other kind."""
    winner = ranked[0]
    if winner.candidate.offloaded:
        return "No system without offloading fits the devices, the budget and the SLO."
    for each in ranked:
        system = each.candidate.system
        if isinstance(system, Offloaded) and (said := slow_link(system, demand, slo, prefill)):
            return f"Offloading attention does not pay here: {said}."
    return "Offloading attention does not pay here: nothing that does fits the devices, the budget and the SLO."


def _plain(value: float) -> str:
    """Three digits, and no powers of ten where people count."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
