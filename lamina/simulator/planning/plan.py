"""From a model, a trace and an inventory to a plan (`make_plan`): every step of `lamina plan`, without words for people
or files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lamina.simulator.costs.cost_model import Speculation
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.uncertainty import Interval
from lamina.simulator.event_loop.simulate import Progress, Slo
from lamina.simulator.planning import reasons
from lamina.simulator.planning.candidates import Candidate, candidates
from lamina.simulator.planning.deployment import engine_keywords
from lamina.simulator.planning.event_runs import EventRuns, settled
from lamina.simulator.planning.intervals import intervals
from lamina.simulator.planning.inventory import Inventory
from lamina.simulator.planning.plan_file import Plan, TraceSummary
from lamina.simulator.planning.planner import Ranked, cheaper, limited, looked_at, mixes, near_ties, rank, surer
from lamina.simulator.planning.quantities import market, prices
from lamina.simulator.planning.run_progress import Mapped, one_by_one
from lamina.simulator.planning.sensitivity import Changes, Sensitivity
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

    @property
    def demand(self) -> Demand:
        """What is to be served."""
        load = demand(self.trace)
        return load if self.rate is None else load.at_rate(self.rate)


@dataclass(frozen=True, slots=True)
class Planned:
    """What was found. `ranked` has all candidates, the winner first."""

    demand: Demand
    ranked: tuple[Ranked, ...]
    ties: tuple[Ranked, ...]
    """Near ties with the winner: those that lose nothing before lossy ones, each the cheapest first."""
    intervals: Mapping[str, Interval]
    """The winner's numbers, each with its 90 % interval: see `intervals.intervals` for their names."""
    below: tuple[Ranked, ...]
    """What costs less, and has too few in time: what comes closest first."""
    above: Ranked | None
    """The cheapest that has nearly all in time, where the winner has not."""
    answer: tuple[str, ...]
    plan: Plan
    sensitivity: tuple[Sensitivity, ...] = ()
    """What would change it; empty where that was not asked for."""

    @property
    def winner(self) -> Ranked:
        return self.ranked[0]

    def mixes(self, count: int) -> list[Ranked]:
        """The best `count` that differ in more than lanes, shards or the batch limit."""
        return mixes(self.ranked)[:count]

    @property
    def serving(self) -> int:
        """How many of the candidates serve all that is asked for."""
        return sum(entry.serves for entry in self.ranked)

    @property
    def free(self) -> bool:
        """Whether there are devices without a price, so that requests for a dollar say nothing."""
        return any(entry.estimate.goodput and not entry.estimate.price for entry in self.ranked)

    def points(self) -> list[Point]:
        """For a Pareto plot, of what gets a request through: name, output tokens within the SLO a dollar (a second
        where some are `free`), tokens a second of each user, and whether it serves all. As simulated, where it was
        checked."""
        return [
            (
                entry.name,
                (entry.goodput if self.free else entry.goodput_per_dollar) * self.demand.output,
                1 / (entry.predicted.tpot or math.inf),
                entry.serves,
            )
            for entry in self.ranked
            if entry.estimate.goodput
        ]


def make_plan(
    asked: PlanRequest,
    *,
    check: bool = True,
    seed: int = 0,
    why: bool = False,
    progress: Progress | None = None,
    mapped: Mapped = one_by_one,
) -> Planned:
    """Find the best candidate; and with `why` what would change it, which takes as long again. Without `check` by the
    event loop formulas are believed. `mapped` runs what does not depend on each other.

    Raises InvalidRequest where nothing fits, or nothing meets the SLO.
    """
    slo, prefill, load = asked.slo, asked.prefill, asked.demand
    loop = EventRuns(asked.trace, load, slo, prefill, seed, mapped) if check else None
    every = choice(asked, load, asked.budget)
    ranked = settled(rank(every, load, slo, prefill=prefill, progress=progress, mapped=mapped), loop, progress)
    sensitivities: list[Sensitivity] = []
    if why:
        beyond = _beyond(asked, load, ranked)
        changes = Changes(
            ranked, load, slo, prefill, budget=asked.budget, beyond=beyond, loop=loop, progress=progress, mapped=mapped
        )
        systems = [entry.candidate.system for entry in ranked]
        quantities = prices(systems)
        if loop is None or loop.replayed(systems[0]):  # else the replay cannot tell
            asking = market(systems, load, slo)
            quantities += [entry for entry in asking if ranked[0].serves or entry.what != "load"]
        sensitivities = changes.sensitivities(quantities)
    ties = near_ties(ranked)
    below, above = cheaper(ranked, load, slo, prefill), surer(ranked, load, slo, prefill)
    return Planned(
        demand=load,
        ranked=tuple(ranked),
        ties=ties,
        intervals=intervals(ranked[0], load, slo, prefill, loop.repeated(ranked[0]) if loop else None),
        below=tuple(below),
        above=above,
        answer=tuple(reasons.answer(ranked, load, slo, prefill, ties, below, above)),
        plan=_plan(asked.name, ranked[0], load, slo),
        sensitivity=tuple(sensitivities),
    )


def choice(asked: PlanRequest, wanted: Demand, budget: float | None) -> tuple[Candidate, ...]:
    """All candidates for the demand within the budget."""
    tokens = max(1, round(wanted.context))
    return candidates(asked.model, asked.inventory, budget, asked.prefill, tokens, asked.speculation)


def _beyond(asked: PlanRequest, wanted: Demand, ranked: Sequence[Ranked]) -> list[Ranked]:
    """Candidates, by formula, that the budget leaves out, or of which it leaves too few."""
    if asked.budget is None:
        return []
    serving = {entry.candidate.system for entry in ranked if entry.serves}
    every = set(choice(asked, wanted, None)) - {entry.candidate for entry in ranked}
    return [
        looked_at(entry, wanted, asked.slo, asked.prefill, partly=False, fine=False)
        for entry in every
        if entry.system not in serving
    ]


def _plan(name: str, winner: Ranked, asked: Demand, slo: Slo) -> Plan:
    system, predicted = limited(winner), winner.predicted
    if not math.isfinite(predicted.ttft):
        predicted = replace(predicted, ttft=0.0)
    rate = asked.rate if math.isfinite(asked.rate) else 0.0
    summary = TraceSummary(asked.name, asked.requests, rate, asked.prompt, asked.output, asked.context)
    engine = engine_keywords(system, asked.longest)
    return Plan(name, system, predicted, summary, slo, replicas=winner.estimate.replicas, engine=engine)
