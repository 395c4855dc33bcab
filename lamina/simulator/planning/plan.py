"""From a model, a trace and an inventory to a plan: every step of `lamina plan`, without words for people or files."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.speculation import Speculation
from lamina.simulator.event_loop.simulate import Progress, Slo
from lamina.simulator.planning import reasons
from lamina.simulator.planning.candidates import candidates
from lamina.simulator.planning.inventory import Inventory
from lamina.simulator.planning.plan_file import Plan, Prediction, TraceSummary, engine_keywords
from lamina.simulator.planning.planner import TOP, Ranked, limited, mixes, rank, rivals, search
from lamina.simulator.planning.reasons import Sensitivity
from lamina.simulator.reports.data import Point
from lamina.simulator.traces.arrivals import Trace
from lamina.simulator.traces.demand import Demand, demand


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is for, and the devices it may use.

    `name` is the model as an engine loads it. `budget`: dollars an hour at most. `rate`: requests a second in place of
    the trace's own; infinite: as many as the budget's devices serve. Without `prefill`, prompts are computed elsewhere.
    """

    name: str
    model: ModelShape
    inventory: Inventory
    trace: Trace
    slo: Slo
    budget: float | None = None
    rate: float | None = None
    prefill: bool = True
    speculation: Speculation | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """What was found. `ranked` has all candidates. The ones checked by the event loop come first, in its order."""

    demand: Demand
    ranked: tuple[Ranked, ...]
    why: tuple[str, ...]
    sensitivity: tuple[Sensitivity, ...]
    plan: Plan

    @property
    def winner(self) -> Ranked:
        return self.ranked[0]

    def mixes(self, count: int) -> list[Ranked]:
        """The best `count` that differ in more than lanes, shards or the batch limit."""
        return mixes(self.ranked)[:count]

    def points(self) -> list[Point]:
        """For a Pareto plot, by the closed form: name, output tokens a dollar, tokens a second of each user, and
        whether it serves all."""
        return [
            (
                each.name,
                each.estimate.goodput_per_dollar * self.demand.output,
                1 / each.estimate.tpot,
                each.estimate.serves,
            )
            for each in self.ranked
            if each.estimate.goodput and each.estimate.price
        ]


def make_plan(asked: PlanRequest, *, check: int = TOP, seed: int = 0, progress: Progress | None = None) -> Planned:
    """Rank all candidates, have the event loop check the best `check` of them, and explain the first.

    Raises InvalidRequest where nothing fits, or nothing meets the SLO.
    """
    slo, prefill, wanted = asked.slo, asked.prefill, demand(asked.trace)
    if asked.rate is not None:
        wanted = wanted.at_rate(asked.rate)
    every = candidates(
        asked.model, asked.inventory, asked.budget, prefill, max(1, round(wanted.context)), asked.speculation
    )
    ranked = rank(every, wanted, slo, prefill=prefill, progress=progress)
    if check:
        ranked = search(ranked, asked.trace, slo, count=check, prefill=prefill, seed=seed, progress=progress)
    return Planned(
        demand=wanted,
        ranked=tuple(ranked),
        why=tuple(reasons.why(ranked, wanted, slo, prefill)),
        sensitivity=tuple(reasons.sensitivity(ranked[0], rivals(ranked), wanted, slo, prefill)),
        plan=_plan(asked.name, ranked[0], wanted, slo),
    )


def _plan(name: str, winner: Ranked, asked: Demand, slo: Slo) -> Plan:
    system, found = limited(winner), winner.estimate
    predicted = Prediction(
        source="closed form",
        requests_per_second=found.taken,
        tokens_per_second=found.tokens_per_second,
        tpot=found.tpot,
        ttft=found.ttft if math.isfinite(found.ttft) else 0.0,
        slo_share=found.share,
        batch=found.batch,
        dollars_per_hour=found.price,
        dollars_per_million=found.dollars_per_million,
    )
    if (result := winner.result) is not None:
        predicted = Prediction(
            source="event loop",
            requests_per_second=winner.goodput,
            tokens_per_second=result.tokens_per_second,
            tpot=result.tpot.mean,
            ttft=result.ttft.mean,
            slo_share=result.slo_share,
            batch=result.mean_batch,
            dollars_per_hour=result.price,
            dollars_per_million=result.dollars_per_million,
        )
    rate = asked.rate if math.isfinite(asked.rate) else 0.0
    summary = TraceSummary(asked.name, asked.requests, rate, asked.prompt, asked.output, asked.context)
    engine = engine_keywords(system, asked.longest)
    return Plan(name, system, predicted, summary, slo, replicas=found.replicas, engine=engine)
