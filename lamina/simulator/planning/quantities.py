"""What a plan depends on, one thing at a time: links, load, limits, and what is assumed of devices. Each of them can be
made so many times what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from lamina.simulator.costs.hardware import Device, Link
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System, changed, instances
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.traces.demand import Demand


@dataclass(frozen=True, slots=True)
class Situation:
    """What one system is asked to do."""

    system: System
    demand: Demand
    slo: Slo
    prompts: float = 1.0
    """How many times as long as the trace's its prompts are."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something with the value `now`. `likely`: the factors of a 90 % interval around it, where it is assumed, and
    `source` why."""

    what: str
    now: float
    unit: str
    change: Callable[[Situation, float], Situation]
    likely: tuple[float, float] | None = None
    source: str = ""


def market(systems: Iterable[System], demand: Demand, slo: Slo) -> list[Quantity]:
    """What others decide: links that can be bought, what users send and accept."""
    quantities = []
    for link in links(systems).values():
        quantities.append(_link(link, "bandwidth", link.bandwidth / 1e9, "GB/s"))
        if link.round_trip:
            quantities.append(_link(link, "round trip", link.round_trip * 1e6, "us"))
    quantities.append(Quantity("mean prompt", demand.prompt, "tokens", _longer_prompts))
    if math.isfinite(demand.rate):
        quantities.append(Quantity("load", demand.rate, "requests/s", _more_requests))
    for name, seconds in (("tpot", slo.tpot), ("ttft", slo.ttft)):
        if seconds is not None:
            quantities.append(Quantity(f"{name} of the SLO", seconds * 1000, "ms", _slower_slo(name)))
    return quantities


def assumed(systems: Iterable[System], likely: Callable[[System], tuple[float, float]]) -> list[Quantity]:
    """What the cost model assumes. `likely(system)`: the factors of a 90 % interval around a predicted pace."""
    every = list(systems)
    quantities = []
    devices = {device.name: device for system in every for device, _ in system.devices}
    for device in devices.values():
        spreads = [likely(system) for system in every if device in dict(system.devices)]
        slowest, fastest = max(spread[1] for spread in spreads), min(spread[0] for spread in spreads)
        speed = (1 / slowest, 1 / fastest)
        source = "residuals of the cost model against measured systems"
        quantities.append(
            Quantity(f"speed of {device.name}", 1.0, "of what is assumed", _faster(device.name), speed, source)
        )
    shares = {part.memory_share for system in every for part in instances(system)}
    if len(shares) == 1:
        (share,) = shares
        likely_share = (0.85 / share, min(1.0, 0.98) / share)
        source = "vLLM's default is 0.9; 0.98 is reached where nothing else is on a device"
        quantities.append(Quantity("memory for weights and KV", share * 100, "%", _memory, likely_share, source))
    return quantities


def links(systems: Iterable[System]) -> dict[str, Link]:
    """The links of these systems, by name."""
    by_name = {}
    for system in systems:
        if not isinstance(system, Colocated):
            by_name[system.link.name] = system.link
        for part in instances(system):
            if not isinstance(part, Colocated):
                by_name[part.link.name] = part.link
    return by_name


def scaled(system: System, factor: float, name: str | None, *what: str) -> System:
    """The system with these numbers of the devices or links of that name (None: all) so many times as large. What a
    part does not have stays away."""

    def scale(part: Any) -> Any:
        return replace(part, **{number: getattr(part, number) * factor for number in what if hasattr(part, number)})

    return changed(system, scale, name)  # type: ignore[no-any-return]


def faster(system: System, factor: float, name: str | None = None) -> System:
    """The system with all devices, or those of one name, so many times as fast, in all that takes time."""
    quick = scaled(system, factor, name, "flops", "flops_8bit", "bandwidth", "interconnect", "unpack")

    def overheads(part: Any) -> Any:
        if not isinstance(part, Device):
            return part
        efficiency = part.efficiency
        times = [item.name for item in fields(efficiency) if item.name.endswith(("_overhead", "_latency"))]
        return replace(
            part, efficiency=replace(efficiency, **{time: getattr(efficiency, time) / factor for time in times})
        )

    return changed(quick, overheads, name)  # type: ignore[no-any-return]


def _link(link: Link, what: str, now: float, unit: str) -> Quantity:
    field = what.replace(" ", "_")

    def change(given: Situation, factor: float) -> Situation:
        return replace(given, system=scaled(given.system, factor, link.name, field))

    return Quantity(f"{what} of {link.name}", now, unit, change)


def _longer_prompts(given: Situation, factor: float) -> Situation:
    return replace(given, demand=given.demand.with_prompts(factor), prompts=given.prompts * factor)


def _more_requests(given: Situation, factor: float) -> Situation:
    return replace(given, demand=given.demand.at_rate(given.demand.rate * factor))


def _slower_slo(name: str) -> Callable[[Situation, float], Situation]:
    def change(given: Situation, factor: float) -> Situation:
        return replace(given, slo=replace(given.slo, **{name: getattr(given.slo, name) * factor}))

    return change


def _faster(name: str) -> Callable[[Situation, float], Situation]:
    def change(given: Situation, factor: float) -> Situation:
        return replace(given, system=faster(given.system, factor, name))

    return change


def _memory(given: Situation, factor: float) -> Situation:
    def more(part: Colocated | Offloaded) -> Any:
        names = ("memory_share", "attention_memory_share") if isinstance(part, Offloaded) else ("memory_share",)
        return replace(part, **{name: min(1.0, getattr(part, name) * factor) for name in names})

    system = given.system
    if isinstance(system, Disaggregated):
        return replace(given, system=replace(system, prefill=more(system.prefill), decode=more(system.decode)))
    return replace(given, system=more(system))
