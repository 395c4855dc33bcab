"""The event loop as a plan asks for it: on the plan's own trace, with candidates as they are and as they might be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from lamina.simulator.costs.systems import System
from lamina.simulator.event_loop.quick_instance import is_usual
from lamina.simulator.event_loop.results import RunResult
from lamina.simulator.event_loop.simulate import Progress, Slo, simulate
from lamina.simulator.planning.candidates import Candidate, fits
from lamina.simulator.planning.planner import MOST_REQUESTS, REQUESTS, Conditions, Ranked, rerun, search, verify
from lamina.simulator.planning.quantities import Situation
from lamina.simulator.planning.run_progress import Mapped, one_by_one
from lamina.simulator.steady_state.closed_form import estimate
from lamina.simulator.traces.arrivals import Trace
from lamina.simulator.traces.catalogue import at_rate, windows
from lamina.simulator.traces.demand import Demand

_WHOLE = 0.9
"""The share of the requests of a full run that is one: windows of an excerpt are cut evenly."""

_ALL = 20_000
"""The most requests of a run on the whole trace."""


class EventRuns:
    """Runs of candidates on one trace, several at a time where `mapped` does so. Each candidate is run once."""

    def __init__(
        self, trace: Trace, demand: Demand, slo: Slo, prefill: bool, seed: int, mapped: Mapped = one_by_one
    ) -> None:
        self._conditions = Conditions(trace, slo, prefill, seed)
        self._demand, self._mapped = demand, mapped
        self._results: dict[Candidate, Ranked] = {}

    def full(self, ranked: Ranked) -> bool:
        """Whether a candidate was checked by a run as long as those of the best."""
        least = _WHOLE * min(REQUESTS, len(self._conditions.trace.arrivals))
        return ranked.result is not None and ranked.result.requests >= least

    def _excerpt(self, ranked: Ranked) -> bool:
        """Whether that run can stand beside runs in other situations, which are on excerpts: all of a trace is less
        kind than these."""
        result = ranked.result
        return self.full(ranked) and result is not None and result.requests <= MOST_REQUESTS

    def checked(self, some: Sequence[Ranked]) -> list[Ranked]:
        """The candidates after full runs. Each begins anew with what the closed form says when it looks closely, since
        a coarse look or a short excerpt may have cut its rate or its replicas badly."""
        new = [entry for entry in some if entry.candidate not in self._results]
        for entry, result in zip(new, self._mapped(self._full_run, new), strict=True):
            self._results[entry.candidate] = result
        return [self._results[entry.candidate] for entry in some]

    def _full_run(self, ranked: Ranked) -> Ranked:
        candidate = ranked.candidate
        slo, prefill = self._conditions.slo, self._conditions.prefill
        forecast = estimate(candidate.system, candidate.replicas, self._demand, slo, prefill)
        begins = Ranked(candidate, forecast) if forecast.taken else ranked
        return verify([begins], self._conditions)[0]

    def whole(self, ranked: Ranked) -> Ranked:
        """The candidate after a run on all of the trace, up to `_ALL` requests; as it is where only the real scheduler
        can run it, which takes minutes for so many."""
        if ranked.result is None or not is_usual(ranked.candidate.system, self._conditions.trace, True):
            return ranked
        return rerun(ranked, self._conditions, _ALL)

    def verified(self, some: Sequence[Ranked], progress: Progress | None = None) -> list[Ranked]:
        """The best of these after full runs, the best first."""
        return verify(some, self._conditions, progress=progress, mapped=self._mapped)

    def search(self, ranked: Sequence[Ranked], count: int, progress: Progress | None = None) -> list[Ranked]:
        """All of these, the best of those first that the event loop has checked: see `planner.search`."""
        return search(ranked, self._conditions, count=count, progress=progress, mapped=self._mapped)

    def elsewhere(self, ranked: Ranked, given: Situation, allowance: float = 0.0) -> Ranked:
        """A candidate in another situation: as it is where it serves there what is asked for, and no fewer replicas
        would; else with the replicas, the batch limit and the rate that it would take. A share may be less by
        `allowance`."""
        if given == Situation(ranked.candidate.system, self._demand, self._conditions.slo) and self._excerpt(ranked):
            return ranked  # nothing that it depends on is another
        count = ranked.candidate.replicas
        if not fits(given.system):
            nothing = replace(ranked.estimate, taken=0.0, share=0.0, capacity=0.0)
            return Ranked(Candidate(given.system, count), nothing)
        forecast = estimate(given.system, count, given.demand, given.slo, self._conditions.prefill)
        other = Ranked(Candidate(given.system, count), forecast)
        if not forecast.taken:
            return other
        conditions = replace(self._conditions, trace=_longer(self._conditions.trace, given.prompts), slo=given.slo)
        before = ranked.estimate
        if ranked.serves and forecast.replicas >= before.replicas and math.isfinite(given.demand.rate):
            cost = forecast.price / forecast.replicas * before.replicas
            unchanged = replace(forecast, replicas=before.replicas, price=cost, most=before.most)
            repeated = replace(other, estimate=unchanged, rate=given.demand.rate)
            repeated = rerun(repeated, conditions, REQUESTS)
            if repeated.nearly(1 - allowance / repeated.needed):
                return repeated
        return verify([other], conditions, allowance=allowance)[0]

    def repeated(self, ranked: Ranked) -> Callable[[System], RunResult]:
        """What runs another system under the load of that candidate's own run."""
        requests = REQUESTS if ranked.result is None else ranked.result.requests
        conditions = self._conditions
        part = at_rate(windows(conditions.trace, requests), ranked.rate)
        replicas = min(ranked.estimate.replicas, len(part.arrivals))

        def run(system: System) -> RunResult:
            return simulate(
                system, part, seed=conditions.seed, slo=conditions.slo, prefill=conditions.prefill, replicas=replicas
            )

        return run


def _longer(trace: Trace, factor: float) -> Trace:
    """The trace with prompts so many times as long, which share nothing."""
    if factor == 1:
        return trace
    arrivals = [
        replace(arrival, prompt=max(1, round(arrival.prompt * factor)), blocks=()) for arrival in trace.arrivals
    ]
    return replace(trace, arrivals=tuple(arrivals))
