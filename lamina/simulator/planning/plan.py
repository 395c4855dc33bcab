"""From a model, a trace and an inventory to a plan: every step of `lamina plan`, without words for people or files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.speculation import Speculation
from lamina.simulator.costs.systems import System, price
from lamina.simulator.costs.uncertainty import Interval, spread
from lamina.simulator.event_loop.results import RunResult
from lamina.simulator.event_loop.simulate import Progress, Slo, simulate
from lamina.simulator.planning import reasons
from lamina.simulator.planning.candidates import Candidate, candidates
from lamina.simulator.planning.intervals import intervals
from lamina.simulator.planning.inventory import Inventory
from lamina.simulator.planning.kinds import best_of_kinds, split_pays
from lamina.simulator.planning.plan_file import Plan, Prediction, TraceSummary, engine_keywords
from lamina.simulator.planning.planner import REQUESTS, TOP, Ranked, limited, mixes, rank, top, verify
from lamina.simulator.planning.prices import Prices, at_price, without_prices
from lamina.simulator.planning.quantities import Situation, assumed, changed_devices, market
from lamina.simulator.planning.sensitivity import Changes, Flip, Sensitivity, flips, sensitivity
from lamina.simulator.planning.ties import near_ties, settled
from lamina.simulator.reports.data import Point
from lamina.simulator.steady_state.closed_form import estimate
from lamina.simulator.traces.arrivals import Trace
from lamina.simulator.traces.catalogue import at_rate, windows
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


@dataclass(frozen=True, slots=True)
class Planned:
    """What was found. `ranked` has all candidates. The ones checked by the event loop come first, in its order."""

    demand: Demand
    ranked: tuple[Ranked, ...]
    ties: tuple[Ranked, ...]
    """Near ties with the winner: those that lose nothing before lossy ones, each the cheapest first."""
    intervals: Mapping[str, Interval]
    """The winner's numbers, each with its 90 % interval: see `intervals.intervals` for their names."""
    why: tuple[str, ...]
    sensitivity: tuple[Sensitivity, ...]
    assumptions: tuple[Flip, ...]
    """That would flip the answer, those that may well be otherwise first."""
    plan: Plan
    best_of: Mapping[str, Ranked] = field(default_factory=dict)
    """By kind of system (`kinds.KINDS`), the best of it; empty where that was not asked for."""

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


def make_plan(
    asked: PlanRequest, *, check: int = TOP, seed: int = 0, compare: bool = False, progress: Progress | None = None
) -> Planned:
    """Rank all candidates, simulate the best `check` of them, and explain the first. With `compare` the best of each
    kind of system is found as well.

    Raises InvalidRequest where nothing fits, or nothing meets the SLO.
    """
    slo, prefill, wanted = asked.slo, asked.prefill, demand(asked.trace)
    if asked.rate is not None:
        wanted = wanted.at_rate(asked.rate)
    loop = _Loop(asked, seed)
    ranked = rank(_candidates(asked, wanted, asked.inventory), wanted, slo, prefill=prefill, progress=progress)
    if check:
        ranked = _merged(ranked, loop.verified(top(ranked, check), progress))
        ranked = settled(ranked, loop.checked)
    best, said = {}, list[str]()
    if compare:

        def verified(some: Sequence[Ranked]) -> list[Ranked]:
            return loop.verified(top(some, check)) if check else []

        best = best_of_kinds(ranked, verified)
        said.append(split_pays(best))
    prices = Prices(ranked, asked.budget, loop.checked if check else None, _unseen(asked, wanted, ranked[0]))
    changes = Changes(ranked, wanted, slo, prefill, loop.run if check else None)
    systems = [each.candidate.system for each in changes.systems()]
    found = sensitivity(prices, changes, market(systems, wanted, slo))
    would_flip = flips(changes, assumed(systems, lambda system: spread(system).tpot))
    ranked = prices.ranked
    sure = intervals(ranked[0], wanted, slo, prefill, loop.repeated(ranked[0]) if check else None)
    ties = near_ties(ranked)
    return Planned(
        demand=wanted,
        ranked=tuple(ranked),
        ties=ties,
        intervals=sure,
        why=tuple(said + reasons.why(ranked, wanted, slo, prefill, sure, ties)),
        sensitivity=tuple(found),
        assumptions=tuple(would_flip),
        plan=_plan(asked.name, ranked[0], wanted, slo),
        best_of=best,
    )


class _Loop:
    """The event loop on the trace that was asked for; what it has run it remembers."""

    def __init__(self, asked: PlanRequest, seed: int) -> None:
        self._asked, self._seed = asked, seed
        self._known: dict[Candidate, Ranked] = {}

    def verified(self, some: Sequence[Ranked], progress: Progress | None = None) -> list[Ranked]:
        """These, checked, the best first."""
        asked = self._asked
        return verify(some, asked.trace, asked.slo, prefill=asked.prefill, seed=self._seed, progress=progress)

    def checked(self, ranked: Ranked) -> Ranked:
        if ranked.candidate not in self._known:
            self._known[ranked.candidate] = self.verified([ranked])[0]
        return self._known[ranked.candidate]

    def run(self, ranked: Ranked, given: Situation) -> Ranked:
        """A candidate in another situation."""
        asked = self._asked
        found = estimate(given.system, ranked.candidate.replicas, given.demand, given.slo, asked.prefill)
        other = Ranked(Candidate(given.system, ranked.candidate.replicas), found)
        trace = _longer(asked.trace, given.prompts)
        return verify([other], trace, given.slo, prefill=asked.prefill, seed=self._seed)[0]

    def repeated(self, ranked: Ranked) -> Callable[[System], RunResult]:
        """What runs another system under that candidate's load."""
        asked = self._asked
        part = at_rate(windows(asked.trace, REQUESTS), ranked.rate)
        replicas = min(ranked.estimate.replicas, len(part.arrivals))

        def run(system: System) -> RunResult:
            return simulate(
                system, part, seed=self._seed, slo=asked.slo, prefill=asked.prefill, replicas=replicas
            )  # fmt: skip

        return run


def _merged(ranked: Sequence[Ranked], checked: Sequence[Ranked]) -> list[Ranked]:
    """What was checked first, then the others in their order."""
    known = {each.candidate for each in checked}
    return [*checked, *(each for each in ranked if each.candidate not in known)]


def _candidates(asked: PlanRequest, wanted: Demand, inventory: Inventory) -> tuple[Candidate, ...]:
    tokens = max(1, round(wanted.context))
    return candidates(asked.model, inventory, asked.budget, asked.prefill, tokens, asked.speculation)


def _unseen(asked: PlanRequest, wanted: Demand, winner: Ranked) -> Callable[[str, float], list[Ranked]]:
    """Candidates, by formula, that the budget leaves out until a device's price is so many times what it is, and that
    then cost less than the winner."""
    inventory, now = asked.inventory, {have.device.name: have.device for have in asked.inventory.have}
    known = {without_prices(each.system) for each in _candidates(asked, wanted, inventory)}

    def unseen(name: str, factor: float) -> list[Ranked]:
        have = tuple(replace(each, device=at_price(each.device, name, factor)) for each in inventory.have)
        most = price(changed_devices(winner.candidate.system, lambda device: at_price(device, name, factor)))
        most *= winner.estimate.replicas
        new = [
            each
            for each in _candidates(asked, wanted, replace(inventory, have=have))
            if without_prices(each.system) not in known and (price(each.system) < most or math.isinf(wanted.rate))
        ]
        found = []
        for each in sorted(new, key=lambda each: price(each.system))[:_UNSEEN]:
            system = changed_devices(each.system, lambda device: now[device.name])
            yields = estimate(system, each.replicas, wanted, asked.slo, asked.prefill, parts=False)
            found.append(Ranked(Candidate(system, each.replicas), yields))
        return found

    return unseen


def _longer(trace: Trace, factor: float) -> Trace:
    """The trace with prompts so many times as long, which share nothing."""
    if factor == 1:
        return trace
    arrivals = [replace(each, prompt=max(1, round(each.prompt * factor)), blocks=()) for each in trace.arrivals]
    return replace(trace, arrivals=tuple(arrivals))


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
