#!/usr/bin/env python3
"""Whether what a plan says of prices holds: each price at which it says that another candidate wins, and each that it
says does not matter, is planned again at other prices.

A statement with a price is tried 2 % on either side of it: before it the winner must be first, beyond it another. One
that says that nothing changes is tried at 2 and at 10 times the price, or a half and a tenth.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lamina.simulator.costs import hardware
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import without_prices
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.event_runs import EventRuns
from lamina.simulator.planning.inventory import Have, Inventory, with_efficiency
from lamina.simulator.planning.plan import PlanRequest, find
from lamina.simulator.planning.planner import Ranked
from lamina.simulator.planning.sensitivity import FARTHEST, Prices, at_price
from lamina.simulator.traces.catalogue import trace, windows
from lamina.simulator.traces.demand import Demand

NEAR = 1.02
"""How near to a price that is said it is tried."""
ASKED = (
    ("llama-3-70b", (("h100", 4), ("h20", 4)), "azure-conv", Slo(2.0, 0.1), 4.0, 60.0),
    ("llama-3-70b", (("h200", 4), ("h20", 4), ("l40s", 8)), "azure-code", Slo(2.0, 0.1), 1.0, None),
    ("qwen3-32b", (("h100", 2), ("a100-80g", 4), ("h20", 2)), "azure-conv", Slo(2.0, 0.05), 3.0, None),
    ("qwen3-8b", (("l4", 8), ("l40s", 4), ("epyc-genoa", 2)), "azure-conv", Slo(3.0, 0.1), 4.0, None),
    ("qwen3-32b", (("h100", 4), ("h20", 4)), "mooncake-conversation", Slo(30.0, 0.1), 0.3, 50.0),
    ("llama-3.1-8b", (("h100", 1), ("a10g", 8), ("l4", 8)), "azure-code", Slo(1.0, 0.05), 3.0, 20.0),
    ("qwen3-235b-a22b", (("h200", 8), ("h20", 8)), "azure-conv", Slo(3.0, 0.1), 6.0, None),
    ("qwen2.5-7b", (("a10g", 4), ("l4", 4), ("h100", 1)), "azure-conv", Slo(2.0, 0.1), 2.0, None),
    ("llama-3-8b", (("l40s", 4), ("a10g", 8)), "azure-code", Slo(2.0, 0.1), 2.0, 15.0),
    ("qwen3-30b-a3b", (("h100", 2), ("l40s", 4), ("a100-80g", 2)), "azure-conv", Slo(2.0, 0.05), 5.0, None),
)  # fmt: skip
"""Model, devices, trace, SLO, requests a second, dollars an hour at most."""


@dataclass(frozen=True, slots=True)
class Try:
    """One statement, and what planning again made of it."""

    plan: int
    device: str
    said: str
    holds: bool
    found: str


def requests(count: int) -> list[PlanRequest]:
    """What is planned."""
    known = hardware.load()
    made = []
    for name, devices, traced, slo, rate, budget in ASKED:
        have = tuple(Have(known.device(device), n) for device, n in devices)
        inventory = Inventory(have, (known.link("fhbn-400g"),))
        part = windows(trace(traced), count)
        shape = model(name)
        inventory = with_efficiency(inventory, known.efficiency("typical", shape))
        made.append(PlanRequest(name, shape, inventory, part, slo, budget, rate))
    return made


def again(asked: PlanRequest, wanted: Demand, device: str, factor: float) -> Ranked:
    """What is first where that device costs so many times what it does."""
    have = tuple(replace(each, device=at_price(each.device, device, factor)) for each in asked.inventory.have)
    there = replace(asked, inventory=replace(asked.inventory, have=have))
    return find(there, wanted, loop=EventRuns(asked.trace, wanted, asked.slo, asked.prefill, 0)).ranked[0]


def tries(number: int, asked: PlanRequest) -> Iterator[Try]:
    """Every statement about prices of one plan."""
    wanted = asked.demand
    prices: Prices = find(asked, wanted, loop=EventRuns(asked.trace, wanted, asked.slo, asked.prefill, 0))
    winner = prices.ranked[0]

    def first(device: str, factor: float) -> tuple[bool, str]:
        there = again(asked, wanted, device, factor)
        same = without_prices(there.candidate.system) == without_prices(winner.candidate.system)
        affordable = min(winner.estimate.replicas, there.candidate.replicas)  # a budget may leave fewer of the winner
        return same and there.estimate.replicas == affordable, there.name

    for device in prices.devices():
        for farthest in (FARTHEST, 1 / FARTHEST):
            change = prices.change(device, farthest)
            if change is None:
                for factor in (farthest ** (1 / 3), farthest):
                    same, name = first(device, factor)
                    yield Try(number, device, f"no change at {factor:.2f}x", same, name)
                continue
            step = NEAR if farthest > 1 else 1 / NEAR
            before, one = first(device, change.factor / step)
            after, other = first(device, change.factor * step)
            said = f"at {change.factor:.3f}x {change.winner}"
            yield Try(number, device, said, before and not after, f"before {one}; beyond {other}")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--tries", type=int, default=50, help="statements that are tried")
    asked.add_argument("--requests", type=int, default=600, help="of each trace")
    given = asked.parse_args()
    print(
        f"Statements about prices, planned again within {NEAR - 1:.0%}; efficiency typical, {given.requests} requests"
    )
    held = done = 0
    for number, request in enumerate(requests(given.requests)):
        print(f"{number}: {request.name} on {request.trace.name} at {request.rate:g}/s, {request.slo}")
        for each in tries(number, request):
            done += 1
            held += each.holds
            print(f"  {'holds' if each.holds else 'FAILS'}  {each.device}: {each.said} ({each.found})", flush=True)
            if done >= given.tries:
                break
        if done >= given.tries:
            break
    print(f"{held} of {done} hold")


if __name__ == "__main__":
    main()
