"""What a model's layers make of moving attention and states to other devices: what bounds them there, and what a step
spends on them in either place."""

from __future__ import annotations

from collections.abc import Iterable

from lamina.simulator.costs.cost_model import Load, attention_time, busiest_share, rate, state_share, state_time
from lamina.simulator.costs.hardware import Device
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.systems import Colocated, Offloaded, System

_FAR = 2.0
"""How many times a device's FLOPs a byte attention must ask for, to be worth a word."""


def bound_by_compute(model: ModelShape, device: Device, context: float, element: float = 2.0) -> str:
    """The sentence that attention on a device is bound by its compute, by far; "" where it is not."""
    work = model.attention_work(context, element)
    nbytes, flops = (sum(part[at] for part in work) for at in (0, 1))
    has = rate(device, element) / device.bandwidth
    if not nbytes or flops < _FAR * has * nbytes:
        return ""
    return (
        f"Attention of {model.name} on {device.name} is bound by compute: it takes {flops / nbytes:.0f} FLOPs a byte "
        f"of KV, the device has {has:.0f} a byte of bandwidth, of which it uses {has * nbytes / flops:.0%} at best"
    )


def compute_bound_devices(systems: Iterable[System], context: float) -> list[str]:
    """A sentence for each device on which these systems would attend, and whose compute bounds it."""
    found: dict[str, str] = {}
    for system in systems:
        if isinstance(system, Offloaded) and system.attention_device.name not in found:
            device = system.attention_device
            found[device.name] = bound_by_compute(system.model, device, context, system.kv_element)
    return [said for said in found.values() if said]


def step_compared(offloaded: Offloaded, whole: Colocated, batch: float, context: float) -> str:
    """The sentence of what a step of so many sequences spends on attention, states and the wire, and on the first two
    where the dense layers are."""
    load = Load(max(1, round(batch)), context)
    lane = offloaded.lane(load)
    states = state_time(
        offloaded.model, offloaded.attention_device, load,
        state_share(offloaded.model, offloaded.attention_count, load.decode),
    )  # fmt: skip
    count = whole.tensor_parallel
    here = attention_time(
        whole.model, whole.device, load, whole.policy, whole.kv_element,
        busiest=busiest_share(whole.model, count), queries=1 / count,
    )  # fmt: skip
    here_states = state_time(whole.model, whole.device, load, state_share(whole.model, count))
    there = _spent(lane.attention - states, states, bool(whole.model.states))
    return (
        f"For {load.decode:.0f} sequences of {context:.0f} tokens {there} a step on {offloaded.attention_count}x "
        f"{offloaded.attention_device.name} and the wire {lane.exchange.seconds * 1000:.2g} ms; on {count}x "
        f"{whole.device.name}, without a wire, {_spent(here, here_states, bool(whole.model.states))}"
    )


def _spent(attention: float, states: float, both: bool) -> str:
    said = f"attention takes {attention * 1000:.2g} ms"
    return f"{said} and states {states * 1000:.2g} ms" if both else said
