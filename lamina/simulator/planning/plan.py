"""From a model, a trace and an inventory to a plan (`make_plan`): every step of `lamina plan`, without words for people
or files.

A plan also compares best with best: each kind of system, optimised alone under the same budget and inventory
(`best_of_kinds`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lamina.simulator.costs.cost_model import Speculation
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.systems import (
    Colocated,
    Disaggregated,
    Offloaded,
    System,
    changed_devices,
    price,
    without_prices,
)
from lamina.simulator.costs.uncertainty import Interval
from lamina.simulator.event_loop.simulate import Progress, Slo
from lamina.simulator.planning import reasons
from lamina.simulator.planning.candidates import Candidate, candidates
from lamina.simulator.planning.deployment import engine_keywords
from lamina.simulator.planning.event_runs import EventRuns
from lamina.simulator.planning.intervals import intervals
from lamina.simulator.planning.inventory import Inventory
from lamina.simulator.planning.plan_file import Plan, TraceSummary
from lamina.simulator.planning.planner import Ranked, advantage, limited, mixes, near_ties, rank, ratio_error
from lamina.simulator.planning.quantities import market
from lamina.simulator.planning.run_progress import Mapped, one_by_one
from lamina.simulator.planning.sensitivity import Changes, Prices, Sensitivity, Unseen, at_price, sensitivity
from lamina.simulator.reports.data import Point
from lamina.simulator.steady_state.closed_form import estimate
from lamina.simulator.traces.arrivals import Trace
from lamina.simulator.traces.demand import Demand, demand

_UNSEEN = 200
"""Candidates beyond the budget that are looked at, the cheapest first."""


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
    why: tuple[str, ...]
    sensitivity: tuple[Sensitivity, ...]
    plan: Plan
    best_of: Mapping[str, Ranked] = field(default_factory=dict)
    """By kind of system (`KINDS`), the best of it; empty where that was not asked for."""

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
    compare: Inventory | None = None,
    progress: Progress | None = None,
    mapped: Mapped = one_by_one,
) -> Planned:
    """Find the best candidate, and explain it. Without `check` by the event loop formulas are believed. With `compare`,
    devices with systems that need not be deployable, the best of each kind of system is found as well. `mapped` runs
    what does not depend on each other.

    Raises InvalidRequest where nothing fits, or nothing meets the SLO.
    """
    slo, prefill, load = asked.slo, asked.prefill, asked.demand
    loop = EventRuns(asked.trace, load, slo, prefill, seed, mapped) if check else None
    prices = find(asked, load, loop=loop, progress=progress, mapped=mapped)
    best, sentences = {}, list[str]()
    if compare is not None:
        every = _candidates(asked, load, compare)
        everything = rank(every, load, slo, prefill=prefill, progress=progress, mapped=mapped)
        best = best_of_kinds(everything, loop)
        sentences.append(split_pays(best))
    changes = Changes(prices.ranked, load, slo, prefill, progress=progress, mapped=mapped)
    systems = [entry.candidate.system for entry in changes.field]
    sensitivities = sensitivity(prices, changes, market(systems, load, slo))
    ranked = prices.ranked
    sure = intervals(ranked[0], load, slo, prefill, loop.repeated(ranked[0]) if loop else None)
    ties = near_ties(ranked)
    return Planned(
        demand=load,
        ranked=tuple(ranked),
        ties=ties,
        intervals=sure,
        why=tuple(sentences + reasons.why(ranked, load, slo, prefill, ties)),
        sensitivity=tuple(sensitivities),
        plan=_plan(asked.name, ranked[0], load, slo),
        best_of=best,
    )


def find(
    asked: PlanRequest,
    wanted: Demand,
    *,
    loop: EventRuns | None = None,
    progress: Progress | None = None,
    mapped: Mapped = one_by_one,
) -> Prices:
    """All candidates for the demand, the best first, as they stand at these prices and at others. With `loop` whatever
    would be first is checked."""
    slo, prefill = asked.slo, asked.prefill
    every = _candidates(asked, wanted, asked.inventory)
    ranked = rank(every, wanted, slo, prefill=prefill, progress=progress, mapped=mapped)
    if loop is not None:
        ranked = loop.searched(ranked, progress)
    return Prices(ranked, asked.budget, loop, _unseen(asked, wanted)).settle()


def _candidates(asked: PlanRequest, wanted: Demand, inventory: Inventory) -> tuple[Candidate, ...]:
    tokens = max(1, round(wanted.context))
    return candidates(asked.model, inventory, asked.budget, asked.prefill, tokens, asked.speculation)


def _unseen(asked: PlanRequest, wanted: Demand) -> Unseen:
    """Candidates, by formula, that the budget leaves out until a device's price is so many times what it is, and that
    then cost less than `most` dollars an hour."""
    inventory, now = asked.inventory, {have.device.name: have.device for have in asked.inventory.have}

    def unseen(name: str, factor: float, most: float) -> list[Ranked]:
        systems = {without_prices(entry.system) for entry in _candidates(asked, wanted, inventory)}
        have = tuple(replace(entry, device=at_price(entry.device, name, factor)) for entry in inventory.have)
        new = [
            entry
            for entry in _candidates(asked, wanted, replace(inventory, have=have))
            if without_prices(entry.system) not in systems and price(entry.system) < most
        ]
        newcomers = []
        for entry in sorted(new, key=lambda entry: price(entry.system))[:_UNSEEN]:
            system = changed_devices(entry.system, lambda device: now[device.name])
            yields = estimate(system, entry.replicas, wanted, asked.slo, asked.prefill, fine=False)
            newcomers.append(Ranked(Candidate(system, entry.replicas), yields))
        return newcomers

    return unseen


def _plan(name: str, winner: Ranked, asked: Demand, slo: Slo) -> Plan:
    system, predicted = limited(winner), winner.predicted
    if not math.isfinite(predicted.ttft):
        predicted = replace(predicted, ttft=0.0)
    rate = asked.rate if math.isfinite(asked.rate) else 0.0
    summary = TraceSummary(asked.name, asked.requests, rate, asked.prompt, asked.output, asked.context)
    engine = engine_keywords(system, asked.longest)
    return Plan(name, system, predicted, summary, slo, replicas=winner.estimate.replicas, engine=engine)


TOGETHER, PREFILL, SPLIT, BOTH = "co-located", "disaggregated prefill", "attention offloaded", "both"
KINDS = (TOGETHER, PREFILL, SPLIT, BOTH)
"""Everything on the same devices; prompts on others; attention on others; prompts and attention on others."""


def kind(system: System) -> str:
    """Which of `KINDS` a system is."""
    if isinstance(system, Disaggregated):
        return PREFILL if isinstance(system.decode, Colocated) else BOTH
    return SPLIT if isinstance(system, Offloaded) else TOGETHER


def best_of_kinds(ranked: Sequence[Ranked], loop: EventRuns | None = None) -> dict[str, Ranked]:
    """The best of each kind that gets a request through, in the order of `KINDS`, after a run by `loop`."""
    best: dict[str, Ranked] = {}
    for name in KINDS:
        if mine := [entry for entry in ranked if kind(entry.candidate.system) == name and entry.estimate.goodput]:
            best[name] = Prices(loop.searched(mine) if loop else mine, loop=loop).settle().ranked[0]
    return best


def split_pays(best: Mapping[str, Ranked]) -> str:
    """The sentence that says whether moving attention to other devices pays, and by how much."""
    together = [best[name] for name in (TOGETHER, PREFILL) if name in best]
    split = [best[name] for name in (SPLIT, BOTH) if name in best]
    if not split:
        return "The split does not pay: nothing that offloads attention gets a request through within the SLO."
    if not together:
        return f"The split pays: only what offloads attention gets requests through, such as {split[0].name}."
    mine, theirs = _first(split), _first(together)
    gain = advantage(mine, theirs)
    sentence = f"the best split, {mine.name}, gives {_times(gain)} of the best without, {theirs.name}"
    if mine.serves != theirs.serves:
        able = "the best split serves all that is asked for, and nothing without does"
        unable = "nothing that offloads attention serves all that is asked for, and the best without does"
        return f"The split pays: {able}." if mine.serves else f"The split does not pay: {unable}."
    error = ratio_error(mine)
    if gain > 1 + error:
        return f"The split pays: {sentence}."
    if gain >= 1 / (1 + error):
        return f"The split does not pay: {sentence}, a tie within the error of such a comparison ({error:.0%})."
    return f"The split does not pay: {sentence}."


def _first(some: Sequence[Ranked]) -> Ranked:
    """What serves all before what does not, then by what it gives."""
    first = some[0]
    for entry in some[1:]:
        if (entry.serves, advantage(entry, first)) > (first.serves, 1.0):
            first = entry
    return first


def _times(gain: float) -> str:
    return "requests for nothing, instead" if math.isinf(gain) else f"{gain:.2f} times the requests for a dollar"
