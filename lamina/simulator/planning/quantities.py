"""What a plan depends on, one thing at a time: links, load, limits, and what is assumed of devices. Each of them can be
made so many times what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from lamina.simulator.costs.hardware import Device, Link
from lamina.simulator.costs.systems import Colocated, System, changed, instances
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.traces.demand import Demand


@dataclass(frozen=True, slots=True)
class Situation:
    """What one system is asked to do."""

    system: System
    demand: Demand
    slo: Slo


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something with the value `now`; `device`: whose price it is."""

    what: str
    now: float
    unit: str
    change: Callable[[Situation, float], Situation]
    device: str = ""


def market(systems: Iterable[System], demand: Demand, slo: Slo) -> list[Quantity]:
    """What users send and accept, links that can be bought, and how fast all devices are beside what is assumed."""
    quantities = [_link(link) for link in links(systems).values()]
    quantities.append(Quantity("mean prompt", demand.prompt, "tokens", _longer_prompts))
    if math.isfinite(demand.rate):
        quantities.append(Quantity("load", demand.rate, "requests/s", _more_requests))
    for name, seconds in (("tpot", slo.tpot), ("ttft", slo.ttft)):
        if seconds is not None:
            quantities.append(Quantity(f"{name} of the SLO", seconds * 1000, "ms", _slower_slo(name)))
    return [*quantities, Quantity("speed of devices", 1.0, "of what is assumed", _faster)]


def prices(systems: Iterable[System]) -> list[Quantity]:
    """Dollars an hour of each device that has a price."""
    devices = {device.name: device.price for system in systems for device, _ in system.devices if device.price}
    return [
        Quantity(f"price of {name}", dollars, "$/h", _more_of("price", name), device=name)
        for name, dollars in devices.items()
    ]


def _more_of(what: str, name: str) -> Callable[[Situation, float], Situation]:
    """The change of that number of the device or link of that name."""
    return lambda given, factor: replace(given, system=scaled(given.system, factor, name, what))


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


def _link(link: Link) -> Quantity:
    change = _more_of("bandwidth", link.name)
    return Quantity(f"bandwidth of {link.name}", link.bandwidth / 1e9, "GB/s", change)


def _longer_prompts(given: Situation, factor: float) -> Situation:
    return replace(given, demand=given.demand.with_prompts(factor))


def _more_requests(given: Situation, factor: float) -> Situation:
    return replace(given, demand=given.demand.at_rate(given.demand.rate * factor))


def _slower_slo(name: str) -> Callable[[Situation, float], Situation]:
    return lambda given, factor: replace(given, slo=replace(given.slo, **{name: getattr(given.slo, name) * factor}))


def _faster(given: Situation, factor: float) -> Situation:
    return replace(given, system=faster(given.system, factor))
