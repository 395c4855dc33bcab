"""Devices, systems and a demand that the planner's tests share."""

from __future__ import annotations

from lamina.simulator.costs import hardware
from lamina.simulator.costs.hardware import Device, Link
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Offloaded
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.inventory import Have, Inventory
from lamina.simulator.traces.arrivals import Arrival, Trace
from lamina.simulator.traces.demand import Demand, demand

KNOWN = hardware.load()
H100, H20, EPYC, FHBN = KNOWN.device("h100"), KNOWN.device("h20"), KNOWN.device("epyc-genoa"), KNOWN.link("fhbn-400g")
BIG, SMALL = model("llama-3-70b"), model("smollm2-135m")
SLO = Slo(ttft=2.0, tpot=0.1)
STEADY = Demand(
    name="steady", requests=1000, rate=4.0, prompt=1000.0, output=200.0, context=1100.0, longest=4000,
    sample=demand(Trace("steady", tuple(
        Arrival(0.0, 125 * (1 + number * 7 % 16) - 62, max(1, 200 + 66 * (number * 3 % 7 - 3))) for number in range(700)
    ))).sample,
)  # fmt: skip
"""Prompts of 63 to 1938 tokens, outputs of 2 to 398, that come by chance."""


def dop(a: int, b: int, link: Link = FHBN, attention: Device = H20, **more: object) -> Offloaded:
    return Offloaded(
        model=BIG, model_device=H100, attention_device=attention, link=link, model_count=a, attention_count=b, **more
    )  # type: ignore[arg-type]


def together(count: int, device: Device = H100) -> Colocated:
    return Colocated(model=BIG, device=device, tensor_parallel=count)


def there_are(*have: tuple[Device, int], links: tuple[Link, ...] = (FHBN,), **more: object) -> Inventory:
    return Inventory(tuple(Have(device, count) for device, count in have), links, **more)  # type: ignore[arg-type]
