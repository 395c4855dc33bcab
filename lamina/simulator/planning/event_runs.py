"""The event loop as a plan asks for it: on all of the plan's own trace, for what the replay cannot tell apart.

Where requests share prefixes, or the model has states, the replay says little: the engine's own scheduler has to run,
which takes seconds for a hundred requests. Then an excerpt stands for the trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile

from lamina.simulator.costs.systems import System, price, without_prices
from lamina.simulator.event_loop.results import ATTAINMENT, RunResult
from lamina.simulator.event_loop.simulate import Progress, Slo, simulate
from lamina.simulator.planning.planner import CHOSEN, Ranked, limited, looked_at, mixes, with_replicas, worth
from lamina.simulator.planning.run_progress import Mapped, RunProgress, one_by_one
from lamina.simulator.traces.arrivals import Trace
from lamina.simulator.traces.catalogue import at_rate, windows
from lamina.simulator.traces.demand import MOST, Demand

EXCERPT = 2400
"""Requests that the engine's own scheduler runs."""
_LOWER = (0.97, 0.94, 0.91)
"""Shares of a rate that are tried in turn where too few are in time."""

_TOGETHER = 4
"""Candidates that are checked at the same time, while the first is looked for."""


class EventRuns:
    """Runs of candidates on one trace, several at a time where `mapped` does so."""

    def __init__(
        self, trace: Trace, demand: Demand, slo: Slo, prefill: bool, seed: int, mapped: Mapped = one_by_one
    ) -> None:
        self._trace, self._excerpt = windows(trace, MOST), windows(trace, EXCERPT)
        self._demand, self._slo, self._prefill, self._seed, self._mapped = demand, slo, prefill, seed, mapped
        self._shares = any(request.blocks or request.after is not None for request in trace.arrivals)
        self._ran: dict[tuple[System, int], Ranked] = {}

    def situated(self, demand: Demand, slo: Slo) -> EventRuns:
        """Runs of the same requests for another demand and SLO, one at a time, with prompts as long as it has them."""
        trace, factor = self._trace, demand.prompt / self._demand.prompt
        if factor != 1:
            arrivals = (replace(entry, prompt=max(1, round(entry.prompt * factor))) for entry in trace.arrivals)
            trace = replace(trace, arrivals=tuple(arrivals))
        return EventRuns(trace, demand, slo, self._prefill, self._seed)

    def replayed(self, system: System) -> bool:
        """Whether the replay has all that matters."""
        return not self._shares and not system.model.states

    def sure(self, ranked: Ranked) -> bool:
        """Whether its standing is known: by a run, or by a replay of all requests that leaves no doubt."""
        system = ranked.candidate.system
        return ranked.result is not None or (ranked.closely and not ranked.close and self.replayed(system))

    def checked(self, some: Sequence[Ranked]) -> list[Ranked]:
        """These, so that each is sure."""

        def check(ranked: Ranked) -> Ranked:
            look = ranked if ranked.closely else looked_at(ranked.candidate, self._demand, self._slo, self._prefill)
            return look if self.sure(look) else self.run(look)

        return list(map(self._kept, self._mapped(check, some)))

    def searched(self, ranked: Sequence[Ranked], progress: Progress | None = None) -> list[Ranked]:
        """All of these; the best mixes are run where the replay does not have all that matters."""
        chosen = [entry for entry in mixes(ranked)[:CHOSEN] if not self.replayed(entry.candidate.system)]
        reports = RunProgress(progress, "simulating", len(chosen))
        ran = dict(zip(map(id, chosen), map(self._kept, reports.over(self._mapped(self.run, chosen))), strict=True))
        reports.end()
        return [ran.get(id(entry), entry) for entry in ranked]

    def run(self, ranked: Ranked) -> Ranked:
        """The candidate after the event loop: with as few replicas as serve what is asked for or, where not even all
        do, at the highest rate tried that keeps the SLO."""
        system = ranked.candidate.system
        earlier = self._ran.get((without_prices(system), ranked.candidate.replicas))
        if earlier is None:
            return self._kept(self._run(ranked))
        forecast = replace(earlier.estimate, price=price(system) * earlier.estimate.replicas)
        return replace(earlier, candidate=ranked.candidate, estimate=forecast)

    def _kept(self, ranked: Ranked) -> Ranked:
        """The same; a run is known from then on, at any price."""
        if ranked.result is not None:
            self._ran[without_prices(ranked.candidate.system), ranked.candidate.replicas] = ranked
        return ranked

    def _run(self, ranked: Ranked) -> Ranked:
        forecast, available = ranked.estimate, ranked.candidate.replicas
        best = self._at(ranked.hoped, min(ranked.hoped.estimate.taken, forecast.demanded))
        if best.rate < forecast.demanded or math.isinf(forecast.demanded):
            highest = best.rate
            for lower in _LOWER:
                if best.share >= ATTAINMENT:
                    break
                best = self._at(best, highest * lower)
            return best
        while not best.serves and best.estimate.replicas < min(available, forecast.replicas + 1):
            more = max(forecast.replicas, best.estimate.replicas + 1)
            best = self._at(with_replicas(ranked, more), best.rate)
        while not self.replayed(ranked.candidate.system) and best.serves and best.estimate.replicas > 1:
            fewer = self._at(with_replicas(best, best.estimate.replicas - 1), best.rate)
            if not fewer.serves:
                break
            best = fewer
        return best

    def repeated(self, ranked: Ranked) -> Callable[[System], RunResult] | None:
        """What runs another system under the load of that candidate's own run; None where the replay can tell."""
        if ranked.result is None or self.replayed(ranked.candidate.system):
            return None
        return lambda system: self._result(system, ranked.rate, ranked.estimate.replicas)

    def _at(self, ranked: Ranked, rate: float) -> Ranked:
        return replace(ranked, result=self._result(limited(ranked), rate, ranked.estimate.replicas), rate=rate)

    def _result(self, system: System, rate: float, replicas: int) -> RunResult:
        trace = at_rate(self._trace if self.replayed(system) else self._excerpt, rate)
        replicas = min(replicas, len(trace.arrivals))
        return simulate(system, trace, seed=self._seed, slo=self._slo, prefill=self._prefill, replicas=replicas)


def settled(ranked: Sequence[Ranked], loop: EventRuns | None = None, progress: Progress | None = None) -> list[Ranked]:
    """The candidates of `rank` with the winner first, after a run of its own. What would be first is checked before it
    is believed; without `loop` formulas are."""
    every = list(ranked) if loop is None else loop.searched(ranked, progress)

    def standing(place: int) -> tuple[bool, float]:
        entry = every[place] if loop is None else every[place].hoped
        return not entry.serves, -worth(entry)

    def doubtful(place: int) -> bool:
        return loop is not None and not loop.sure(every[place])

    while True:
        order = sorted(range(len(every)), key=standing)
        first = order[0]
        if loop is not None and (unsure := list(takewhile(doubtful, order[:_TOGETHER]))):
            for place, entry in zip(unsure, loop.checked([every[place] for place in unsure]), strict=True):
                every[place] = entry
        elif loop is not None and every[first].result is None:
            every[first] = loop.run(every[first])
        else:
            return [every.pop(first), *every]
