#!/usr/bin/env python3
"""Whether what a plan says would change it does: each statement is planned again, from all candidates to the event loop
on all of the trace.

A statement with a factor is tried 2 % on either side of it: before it the winner must be first, beyond it another. One
that says that nothing changes is tried at the third root of the farthest factor, and at that.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lamina.errors import InvalidRequest
from lamina.simulator.costs import hardware
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import without_prices
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.candidates import Candidate, fits
from lamina.simulator.planning.event_runs import EventRuns, settled
from lamina.simulator.planning.inventory import Have, Inventory, with_efficiency
from lamina.simulator.planning.plan import PlanRequest, choice, make_plan
from lamina.simulator.planning.planner import Ranked, mix, rank
from lamina.simulator.planning.quantities import Quantity, Situation, market
from lamina.simulator.planning.sensitivity import FAR, NOTHING
from lamina.simulator.traces.catalogue import trace, windows

NEAR = 1.02
"""How near to a factor that is said it is tried."""
ASKED = (
    ("llama-3-70b", (("h100", 4), ("h20", 4)), "azure-conv", Slo(2.0, 0.1), 4.0, 60.0),
    ("llama-3-70b", (("h200", 4), ("h20", 4), ("l40s", 8)), "azure-code", Slo(2.0, 0.1), 1.0, None),
    ("qwen3-32b", (("h100", 2), ("a100-80g", 4), ("h20", 2)), "azure-conv", Slo(2.0, 0.05), 3.0, None),
    ("qwen3-8b", (("l4", 8), ("l40s", 4), ("epyc-genoa", 2)), "azure-conv", Slo(3.0, 0.1), 4.0, None),
    ("qwen3-32b", (("h100", 4), ("h20", 4)), "azure-code", Slo(2.0, 0.05), 2.0, 50.0),
    ("llama-3.1-8b", (("h100", 1), ("a10g", 8), ("l4", 8)), "azure-code", Slo(1.0, 0.05), 3.0, 20.0),
    ("qwen3-235b-a22b", (("h200", 8), ("h20", 8)), "azure-conv", Slo(3.0, 0.1), 6.0, None),
    ("qwen2.5-7b", (("a10g", 4), ("l4", 4), ("h100", 1)), "azure-conv", Slo(2.0, 0.1), 2.0, None),
    ("llama-3-8b", (("l40s", 4), ("a10g", 8)), "azure-code", Slo(2.0, 0.1), 2.0, 15.0),
    ("qwen3-30b-a3b", (("h100", 2), ("l40s", 4), ("a100-80g", 2)), "azure-conv", Slo(2.0, 0.05), 5.0, None),
)  # fmt: skip
"""Model, devices, trace, SLO, requests a second, dollars an hour at most."""


@dataclass(frozen=True, slots=True)
class Try:
    """One statement, and what planning again made of it. `named`: whether that has the winner that was named."""

    said: str
    holds: bool
    named: bool
    answer: str


def requests(count: int | None) -> list[PlanRequest]:
    """What is planned."""
    known = hardware.load()
    made = []
    for name, devices, traced, slo, rate, budget in ASKED:
        have = tuple(Have(known.device(device), n) for device, n in devices)
        inventory = Inventory(have, (known.link("fhbn-400g"),))
        part = trace(traced) if count is None else windows(trace(traced), count)
        shape = model(name)
        inventory = with_efficiency(inventory, known.efficiency("typical", shape))
        made.append(PlanRequest(name, shape, inventory, part, slo, budget, rate))
    return made


class Plans:
    """One plan, and what it is in other situations."""

    def __init__(self, asked: PlanRequest) -> None:
        self.asked = asked
        planned = make_plan(asked, why=True)
        self.ranked, self.demand, self.said = planned.ranked, planned.demand, planned.sensitivity
        self.winner = planned.winner
        systems = [entry.candidate.system for entry in self.ranked]
        self.quantities = {each.what: each for each in market(systems, self.demand, asked.slo)}

    def at_price(self, device: str, factor: float) -> tuple[bool, str]:
        """Whether the winner is first where that device costs so many times what it does, and what is."""
        question = self.asked
        have = tuple(
            replace(entry, device=replace(entry.device, price=entry.device.price * factor))
            if entry.device.name == device
            else entry
            for entry in question.inventory.have
        )
        changed = replace(question, inventory=replace(question.inventory, have=have))
        loop = EventRuns(question.trace, self.demand, question.slo, question.prefill, 0)
        try:
            every = choice(changed, self.demand, question.budget)
            first = settled(rank(every, self.demand, question.slo, prefill=question.prefill), loop)[0]
        except InvalidRequest:
            return False, NOTHING
        return self._same(first, first.candidate), first.name

    def changed(self, quantity: Quantity, factor: float) -> tuple[bool, str]:
        """The same where that is so many times as large."""
        originals: dict[Candidate, Candidate] = {}
        question = self.asked
        for entry in self.ranked:
            situation = quantity.change(Situation(entry.candidate.system, self.demand, question.slo), factor)
            if fits(situation.system):
                originals[replace(entry.candidate, system=situation.system)] = entry.candidate
        demand, slo = situation.demand, situation.slo
        loop = EventRuns(question.trace, self.demand, question.slo, question.prefill, 0).situated(demand, slo)
        try:
            first = settled(rank(list(originals), demand, slo, prefill=question.prefill), loop)[0]
        except InvalidRequest:
            return False, NOTHING
        return self._same(first, originals[first.candidate]), first.name

    def _same(self, first: Ranked, candidate: Candidate) -> bool:
        winner = self.winner
        same = mix(without_prices(candidate.system)) == mix(without_prices(winner.candidate.system))
        return same and (first.estimate.replicas, first.serves) == (winner.estimate.replicas, winner.serves)

    def tries(self) -> Iterator[Try]:
        """Every statement."""
        for statement in self.said:
            name = statement.what

            def first(factor: float, name: str = name) -> tuple[bool, str]:
                if (quantity := self.quantities.get(name)) is not None:
                    return self.changed(quantity, factor)
                return self.at_price(name.removeprefix("price of "), factor)

            for change, farthest in ((statement.rise, FAR), (statement.fall, 1 / FAR)):
                if change is None:
                    seen = [first(factor) for factor in (farthest ** (1 / 3), farthest)]
                    holds = all(same for same, _ in seen)
                    yield Try(f"{name}: no change to {farthest:.2f}x", holds, holds, str([name for _, name in seen]))
                    continue
                step = NEAR if farthest > 1 else 1 / NEAR
                (before, one), (after, other) = first(change.factor / step), first(change.factor * step)
                statement_text = f"{name}: at {change.factor:.3f}x {change.winner}"
                yield Try(
                    statement_text,
                    before and not after,
                    other == change.winner.split(", which serves")[0],
                    f"before {one}; beyond {other}",
                )


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--plans", type=int, nargs="*", default=range(len(ASKED)), help="their numbers; default: all")
    asked.add_argument("--requests", type=int, help="of each trace; default: all")
    given = asked.parse_args()
    print(f"Statements planned again within {NEAR - 1:.0%}; efficiency typical", flush=True)
    tried = []
    for number, request in enumerate(requests(given.requests)):
        if number not in given.plans:
            continue
        plans = Plans(request)
        print(f"{number}: {request.name} on {request.trace.name} at {request.rate:g}/s, {request.slo}")
        print(f"  {plans.winner.name}: {plans.winner.share:.1%} in time", flush=True)
        for each in plans.tries():
            tried.append(each)
            print(f"  {'holds' if each.holds else 'FAILS'}  {each.said} ({each.answer})", flush=True)
    held, named = (sum(getattr(each, name) for each in tried) for name in ("holds", "named"))
    print(f"{held} of {len(tried)} hold; {named} with the winner that was named")


if __name__ == "__main__":
    main()
