#!/usr/bin/env python3
"""How much better the best plan is than the one that the planner chooses, by the event loop over all candidates.

usage: scripts/simulate/regret.py [CASE ...] [--requests 20000]

Each case is an inventory, a model, a trace at a rate, and an SLO; none was used to tune the planner. For each, every
candidate with every number of replicas is simulated on all of the trace, or the same excerpt of it: at the rate that is
asked for or, where it does not serve that, at the highest that keeps the SLO. Left out are those whose price alone says
that they cannot be better, and those that by the closed form can take no `HOPELESS` part of what the best takes. Regret
is what is lost of the requests within the SLO for a dollar. It is all of them where the best serves what is asked for
and the chosen one does not, by more than a point.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace

from lamina.simulator.costs import hardware
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import price
from lamina.simulator.event_loop.results import ATTAINMENT
from lamina.simulator.event_loop.simulate import Slo, simulate
from lamina.simulator.planning.event_runs import EventRuns, settled
from lamina.simulator.planning.inventory import Have, Inventory, with_efficiency
from lamina.simulator.planning.plan import PlanRequest, choice
from lamina.simulator.planning.planner import Ranked, limited, rank
from lamina.simulator.steady_state.closed_form import estimate
from lamina.simulator.traces.arrivals import Trace
from lamina.simulator.traces.catalogue import at_rate, windows
from lamina.simulator.traces.catalogue import trace as trace_of
from lamina.simulator.traces.demand import Demand


@dataclass(frozen=True, slots=True)
class Case:
    """What is planned. `rate`: requests a second; infinite: as many as are served."""

    model: str
    have: tuple[tuple[str, int], ...]
    trace: str
    rate: float
    tpot: float
    ttft: float
    links: tuple[str, ...] = ("fhbn-400g",)
    budget: float | None = None
    count: int | None = None
    """Of the trace's requests, the first; None: all."""


CASES = {
    "h100-h20": Case("llama-3-70b", (("h100", 4), ("h20", 4)), "azure-conv", 3.0, 0.1, 2.0),
    "h100-h20-tight": Case("llama-3-70b", (("h100", 8), ("h20", 2)), "azure-conv", 2.0, 0.03, 1.0),
    "h20": Case("qwen3-32b", (("h20", 8),), "azure-conv", 6.0, 0.05, 1.0),
    "a100-l40s": Case("qwen3-32b", (("a100-80g", 4), ("l40s", 4)), "azure-conv", 4.0, 0.08, 3.0, ("ethernet-100g",)),
    "bursts": Case("llama-3-70b", (("h100", 8), ("h20", 1)), "azure-code", 1.0, 0.06, 3.0),
    "bursts-small": Case("llama-3-8b", (("l4", 8), ("a10g", 4)), "azure-code", 1.0, 0.08, 4.0, ("ethernet-25g",)),
    "home": Case("qwen3-8b", (("rtx-4090", 4), ("epyc-rome", 1)), "azure-conv", 2.0, 0.06, 2.0, ("ethernet-10g",)),
    "latent": Case("deepseek-v3", (("h200", 16), ("h20", 2)), "azure-code", 2.0, 0.05, 2.0),
    "windows": Case("gemma-2-27b", (("h100", 4), ("h20", 2)), "azure-code", 2.0, 0.05, 2.0),
    "experts": Case("qwen3-235b-a22b", (("mi300x", 8), ("h200", 4)), "azure-conv", 6.0, 0.06, 2.0),
    "hosts": Case("llama-3-70b", (("h100", 4), ("epyc-genoa", 2)), "azure-conv", 3.0, 0.15, 4.0),
    "most": Case("llama-3-70b", (("h100", 4), ("h20", 2)), "azure-conv", math.inf, 0.1, 2.0, budget=50.0),
}
REQUESTS = 20_000
POINT = 0.01
"""How much less of the requests in time is no difference: excerpts of a trace differ by that."""
HOPELESS = 0.6
"""Of what the best takes, what a candidate must be able to take by the closed form, which was never that wrong."""
_HALVINGS, _MOST = 6, 1e4
"""To find the highest rate, and requests a second that none has."""


def main() -> None:
    """Print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="CASE", help="default: all")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    asked = parser.parse_args()
    print(f"{'case':15} {'cand.':>5} {'simulated':>9} {'plan s':>6} {'regret':>7}  chosen / best")
    for name in asked.cases or CASES:
        found = regret(CASES[name], asked.requests)
        print(f"{name:15} {found}", flush=True)


@dataclass(frozen=True, slots=True)
class Regret:
    """What the planner chose, and the best, on the same excerpt."""

    candidates: int
    simulated: int
    seconds: float
    chosen: Ranked
    best: Ranked

    @property
    def lost(self) -> float:
        """The share of the best one's requests within the SLO for a dollar; all where only the best serves."""
        if self.best.serves and (self.chosen.rate < self.best.rate or self.chosen.share < ATTAINMENT - POINT):
            return 1.0
        return max(0.0, 1 - self.chosen.goodput_per_dollar / self.best.goodput_per_dollar)

    def __str__(self) -> str:
        said = " / ".join(
            f"{each.name}: ${each.estimate.price:.2f}, {each.share:.1%} of {each.rate:.2f}/s in time"
            for each in ((self.chosen,) if self.chosen.name == self.best.name else (self.chosen, self.best))
        )
        return f"{self.candidates:5} {self.simulated:9} {self.seconds:6.1f} {self.lost:7.1%}  {said}"


def regret(case: Case, requests: int) -> Regret:
    """Plan, then simulate all that could be better."""
    known = hardware.load()
    have = tuple(Have(known.device(name), count) for name, count in case.have)
    shape = model(case.model)
    inventory = Inventory(have, tuple(known.link(link) for link in case.links))
    inventory = with_efficiency(inventory, known.efficiency("typical", shape))
    trace, slo = trace_of(case.trace, case.count), Slo(case.ttft, case.tpot)
    request = PlanRequest(case.model, shape, inventory, trace, slo, case.budget, case.rate)
    asked = request.demand
    began = time.process_time()
    every = choice(request, asked, case.budget)
    ranked = settled(rank(every, asked, slo), EventRuns(trace, asked, slo, True, 0))
    seconds = time.process_time() - began
    part = windows(trace, requests)
    chosen = best = _measured(ranked[0], part, slo, asked)
    simulated = 1
    endless = asked.at_rate(math.inf)
    for each in sorted(ranked, key=lambda each: price(each.candidate.system)):
        most = estimate(each.candidate.system, 1, endless, slo, fine=False).capacity
        for count in range(1, each.candidate.replicas + 1):
            if math.isinf(asked.rate) and count > 1:
                break  # the same for a dollar
            tried = _with_replicas(each, count)
            bound = asked.rate * 3600 / tried.estimate.price if tried.estimate.price else math.inf
            if best.serves and bound <= best.goodput_per_dollar:
                break  # even with all in time
            able = count * most
            full = best.serves and not math.isinf(asked.rate)
            least = asked.rate if full else best.goodput_per_dollar * tried.estimate.price / 3600
            if able < HOPELESS * least:
                continue
            measured = _measured(tried, part, slo, asked)
            simulated += 1
            if (measured.serves, measured.goodput_per_dollar) > (best.serves, best.goodput_per_dollar):
                best = measured
            if measured.serves:
                break
    return Regret(len(ranked), simulated, seconds, chosen, best)


def _with_replicas(each: Ranked, count: int) -> Ranked:
    cost = price(each.candidate.system) * count
    able = each.estimate.taken / each.estimate.replicas * count
    taken = able if math.isinf(each.estimate.demanded) else each.estimate.demanded
    return replace(each, estimate=replace(each.estimate, replicas=count, price=cost, taken=taken))


def _measured(each: Ranked, part: Trace, slo: Slo, asked: Demand) -> Ranked:
    """At the rate that is asked for if it serves that, else at the highest that keeps the SLO."""

    def at(rate: float) -> Ranked:
        result = simulate(
            limited(each), at_rate(part, rate), slo=slo, replicas=min(each.estimate.replicas, len(part.arrivals))
        )
        return replace(each, result=result, rate=rate)

    endless = math.isinf(asked.rate)
    low, high = 0.0, (each.rate or each.estimate.taken or 1.0) if endless else asked.rate
    best = tried = at(high)
    if best.serves and not endless:
        return best
    while endless and tried.share >= ATTAINMENT and high < _MOST:
        low, high = high, 1.4 * high
        tried = at(high)
        best = max(best, tried, key=_worth)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = at(middle)
        best = max(best, tried, key=_worth)
        low, high = (middle, high) if tried.share >= ATTAINMENT else (low, middle)
    return best


def _worth(each: Ranked) -> tuple[bool, float]:
    return each.share >= ATTAINMENT, each.goodput


if __name__ == "__main__":
    main()
