"""Why systems cannot serve a demand: messages with what they have and what they need. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lamina.simulator.costs.cost_model import ALPHA, Load, minimum_bandwidth
from lamina.simulator.costs.systems import Offloaded, System
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.steady_state.closed_form import Estimate, estimate
from lamina.simulator.traces.demand import Demand


def none_meets(tried: Sequence[tuple[str, System, Estimate]], demand: Demand, slo: Slo, prefill: bool = True) -> str:
    """The reason why none of these, by name, gets a request through within the SLO."""
    asked = ", ".join(
        f"{name} {seconds * 1000:g} ms" for name, seconds in (("ttft", slo.ttft), ("tpot", slo.tpot)) if seconds
    )
    by_pace = sorted(tried, key=lambda each: (each[2].tpot, each[0]))
    for _, system, _ in by_pace:
        if isinstance(system, Offloaded) and (said := slow_link(system, demand, slo, prefill)):
            return f"no system meets the SLO ({asked}): {said}"
    fastest, _, found = by_pace[0]
    if math.isinf(found.tpot):
        return (
            f"no system can serve {demand.name}: its longest request has {demand.longest} tokens, whose KV fits "
            "nowhere; allowed are devices with more memory, or a policy that holds less"
        )
    return (
        f"no system meets the SLO ({asked}): the fastest, {fastest}, takes {found.tpot * 1000:.1f} ms "
        f"a token and {found.ttft:.2f} s to the first with one sequence at a time; allowed are a longer "
        "time, faster devices, or shorter prompts"
    )


def slow_link(system: Offloaded, demand: Demand, slo: Slo, prefill: bool = True) -> str:
    """The reason why a system's link is too slow; "" where a faster one would not help."""
    ideal = replace(system, link=replace(system.link, bandwidth=1e16, round_trip=0.0))
    if (
        estimate(system, 1, demand, slo, prefill).goodput
        or not (found := estimate(ideal, 1, demand, slo, prefill)).goodput
    ):
        return ""
    batch = max(1, found.most)
    cost = ideal.step(Load(batch, demand.context))
    needed = minimum_bandwidth(system.model, batch, cost.model, cost.attention)
    link, layers = system.link, system.model.attentions + system.model.states
    return (
        f"link {link.name!r} is too slow for {system.name}: it has {system.wire / 1e9:.3g} GB/s and a round trip of "
        f"{link.round_trip * 1e6:.3g} us, {layers} of which take {layers * link.round_trip * 1000:.3g} ms a token; "
        f"with {batch} sequences in decode it needs {needed / 1e9:.3g} GB/s (Lamina's minimum, slowdown {ALPHA:g})"
    )
