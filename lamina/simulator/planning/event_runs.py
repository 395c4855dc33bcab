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
from lamina.simulator.planning.planner import MOST_REQUESTS, REQUESTS, Ranked, rerun, search, verify
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
        self._trace, self._demand, self._slo = trace, demand, slo
        self._prefill, self._seed, self._mapped = prefill, seed, mapped
        self._known: dict[Candidate, Ranked] = {}

    def full(self, ranked: Ranked) -> bool:
        """Whether a candidate was checked by a run as long as those of the best."""
        least = _WHOLE * min(REQUESTS, len(self._trace.arrivals))
        return ranked.result is not None and ranked.result.requests >= least

    def _excerpt(self, ranked: Ranked) -> bool:
        """Whether that run can stand beside runs in other situations, which are on excerpts: all of a trace is less
        kind than these."""
        found = ranked.result
        return self.full(ranked) and found is not None and found.requests <= MOST_REQUESTS

    def checked(self, some: Sequence[Ranked]) -> list[Ranked]:
        """The candidates after full runs. Each begins anew with what the closed form says when it looks closely, since
        a coarse look or a short excerpt may have cut its rate or its replicas badly."""
        new = [each for each in some if each.candidate not in self._known]
        for each, found in zip(new, self._mapped(self._full_run, new), strict=True):
            self._known[each.candidate] = found
        return [self._known[each.candidate] for each in some]

    def _full_run(self, ranked: Ranked) -> Ranked:
        asked = ranked.candidate
        found = estimate(asked.system, asked.replicas, self._demand, self._slo, self._prefill)
        begins = Ranked(asked, found) if found.taken else ranked
        return verify([begins], self._trace, self._slo, prefill=self._prefill, seed=self._seed)[0]

    def whole(self, ranked: Ranked) -> Ranked:
        """The candidate after a run on all of the trace, up to `_ALL` requests; as it is where only the real scheduler
        can run it, which takes minutes for so many."""
        system, trace = ranked.candidate.system, self._trace
        if ranked.result is None or not is_usual(system, trace, True):
            return ranked
        return rerun(ranked, trace, self._slo, _ALL, prefill=self._prefill, seed=self._seed)

    def verified(self, some: Sequence[Ranked], progress: Progress | None = None) -> list[Ranked]:
        """The best of these after full runs, the best first."""
        return verify(
            some,
            self._trace,
            self._slo,
            prefill=self._prefill,
            seed=self._seed,
            progress=progress,
            mapped=self._mapped,
        )

    def search(self, ranked: Sequence[Ranked], count: int, progress: Progress | None = None) -> list[Ranked]:
        """All of these, the best of those first that the event loop has checked: see `planner.search`."""
        return search(
            ranked,
            self._trace,
            self._slo,
            count=count,
            prefill=self._prefill,
            seed=self._seed,
            progress=progress,
            mapped=self._mapped,
        )

    def elsewhere(self, ranked: Ranked, given: Situation, allowance: float = 0.0) -> Ranked:
        """A candidate in another situation: as it is where it serves there what is asked for, and no fewer replicas
        would; else with the replicas, the batch limit and the rate that it would take. A share may be less by
        `allowance`."""
        if given == Situation(ranked.candidate.system, self._demand, self._slo) and self._excerpt(ranked):
            return ranked  # nothing that it depends on is another
        count = ranked.candidate.replicas
        if not fits(given.system):
            nothing = replace(ranked.estimate, taken=0.0, share=0.0, capacity=0.0)
            return Ranked(Candidate(given.system, count), nothing)
        found = estimate(given.system, count, given.demand, given.slo, self._prefill)
        other = Ranked(Candidate(given.system, count), found)
        if not found.taken:
            return other
        trace = _longer(self._trace, given.prompts)
        before = ranked.estimate
        if ranked.serves and found.replicas >= before.replicas and math.isfinite(given.demand.rate):
            cost = found.price / found.replicas * before.replicas
            same = replace(found, replicas=before.replicas, price=cost, most=before.most)
            kept = replace(other, estimate=same, rate=given.demand.rate)
            kept = rerun(kept, trace, given.slo, REQUESTS, prefill=self._prefill, seed=self._seed)
            if kept.nearly(1 - allowance / kept.needed):
                return kept
        return verify([other], trace, given.slo, prefill=self._prefill, seed=self._seed, allowance=allowance)[0]

    def repeated(self, ranked: Ranked) -> Callable[[System], RunResult]:
        """What runs another system under the load of that candidate's own run."""
        requests = REQUESTS if ranked.result is None else ranked.result.requests
        part = at_rate(windows(self._trace, requests), ranked.rate)
        replicas = min(ranked.estimate.replicas, len(part.arrivals))

        def run(system: System) -> RunResult:
            return simulate(system, part, seed=self._seed, slo=self._slo, prefill=self._prefill, replicas=replicas)

        return run


def _longer(trace: Trace, factor: float) -> Trace:
    """The trace with prompts so many times as long, which share nothing."""
    if factor == 1:
        return trace
    arrivals = [replace(each, prompt=max(1, round(each.prompt * factor)), blocks=()) for each in trace.arrivals]
    return replace(trace, arrivals=tuple(arrivals))
