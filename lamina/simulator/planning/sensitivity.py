"""How far one thing has to change until another candidate wins: prices, links, load, prompts, the SLO, the speed of
devices.

Neither an estimate nor a run depends on prices, so it is known how each candidate stands at any price. One that would
be first, and is not sure to serve all, is checked before it is believed.

For other changes the replay of the best candidates says about where the first changes. The factors on both sides of
that are planned again, by all requests of the changed trace. A candidate counts for what it may give at most: by its
price, by a coarse look, by the replay and by the event loop in turn, until the first of all is sure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from heapq import heappop, heappush
from itertools import pairwise
from typing import NamedTuple

from lamina.errors import InvalidRequest
from lamina.simulator.costs.systems import System, price
from lamina.simulator.event_loop.simulate import Progress, Slo
from lamina.simulator.planning.candidates import Candidate, fits
from lamina.simulator.planning.event_runs import EventRuns, settled
from lamina.simulator.planning.planner import MARGIN, Ranked, described, handicap, looked_at, mix, rank, worth
from lamina.simulator.planning.quantities import Quantity, Situation
from lamina.simulator.planning.run_progress import Mapped, RunProgress, one_by_one
from lamina.simulator.steady_state.closed_form import CLOSE
from lamina.simulator.traces.demand import Demand

FAR = 4.0
"""The largest factor by which something is changed."""
_STEPS = 4
"""Factors up to the farthest that are replayed first."""
NOTHING = "nothing that keeps the SLO"


@dataclass(frozen=True, slots=True)
class Change:
    """At `factor` times what something is, and beyond, `winner` takes the first place."""

    factor: float
    winner: str


class First(NamedTuple):
    """The candidate at that place of the ranking (below 0: none), in that number, and the share of all it serves."""

    place: int
    replicas: int
    served: float = 1.0


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How far something has to rise or fall until another wins; None where `FAR` times is not enough."""

    what: str
    now: float
    unit: str
    rise: Change | None
    fall: Change | None

    def __str__(self) -> str:
        ways = []
        for change, word, end in ((self.rise, "up", FAR), (self.fall, "down", 1 / FAR)):
            factor = end if change is None else change.factor
            beyond = " at least" if change is None else f" ({plain(self.now * factor)}), then {change.winner}"
            ways.append(f"{word} to {factor:.2f}x{beyond}")
        ranges = "; ".join(ways)
        if self.rise is None and self.fall is None:
            ranges = f"from {1 / FAR:.2f}x to {FAR:.2f}x"
        return f"{self.what}, now {plain(self.now)} {self.unit}: the same {ranges}"


class Changes:
    """Winner and rivals where something changes. `beyond` are candidates, by formula, that are within the `budget` only
    at other prices; `loop` checks what would be first at those, unless formulas are believed."""

    def __init__(
        self,
        ranked: Sequence[Ranked],
        demand: Demand,
        slo: Slo,
        prefill: bool,
        *,
        budget: float | None = None,
        beyond: Sequence[Ranked] = (),
        loop: EventRuns | None = None,
        progress: Progress | None = None,
        mapped: Mapped = one_by_one,
    ) -> None:
        self._ranked, self._inside = [*ranked, *beyond], range(len(ranked))
        self._mixes = [mix(entry.candidate.system) for entry in self._ranked]
        near = [entry.closely or entry.nearly for entry in ranked]
        self._rivals = [place for place in self._inside if near[place] or self._mixes[place] == self._mixes[0]]
        self._demand, self._slo, self._prefill, self._budget = demand, slo, prefill, budget
        self._loop, self._progress, self._mapped = loop, progress, mapped
        self._all = ranked[0].serves or math.isinf(demand.rate)

    def sensitivities(self, quantities: Sequence[Quantity]) -> list[Sensitivity]:
        """Of prices, then of these others."""
        devices = [quantity for quantity in quantities if quantity.device]
        others = [quantity for quantity in quantities if not quantity.device]
        nearest = [self.change(quantity, end) for quantity in devices for end in (FAR, 1 / FAR)]
        pairs = [(quantity, end) for quantity in others for end in (FAR, 1 / FAR)]
        reports = RunProgress(self._progress, "comparing", len(pairs))
        nearest += reports.over(self._mapped(lambda pair: self.change(*pair), pairs))
        reports.end()
        return [
            Sensitivity(quantity.what, quantity.now, quantity.unit, rise, fall)
            for quantity, rise, fall in zip((*devices, *others), nearest[::2], nearest[1::2], strict=True)
        ]

    def change(self, quantity: Quantity, farthest: float) -> Change | None:
        """The nearest factor between 1 and `farthest` at which another is first, or the winner in another number."""
        wide = CLOSE / abs(math.log(farthest))

        @cache
        def seen(place: float) -> First:
            return self._first(quantity, farthest**place)

        low, high = self._forecast(quantity, farthest, wide)
        step = wide
        while not self._differs(seen(high)) and high < 1:
            low, high, step = high, min(1.0, high + step), 2 * step
        if not self._differs(seen(high)):
            return None
        step = wide
        while low > 0 and self._differs(seen(low)):
            low, high, step = max(0.0, low - step), low, 2 * step
        while high - low > 1.5 * wide:
            middle = (low + high) / 2
            low, high = (low, middle) if self._differs(seen(middle)) else (middle, high)
        first = seen(high)
        system = self._ranked[first.place].candidate.system
        words = NOTHING if first.place < 0 else described(system, first.replicas)
        if first.place >= 0 and (first.served == 1) != self._all:
            words += f", which serves {'all' if first.served == 1 else f'{first.served:.0%} in time'}"
        return Change(farthest**high, words)

    def _forecast(self, quantity: Quantity, farthest: float, wide: float) -> tuple[float, float]:
        """About where that is, by the replay of the rivals: powers of `farthest`, between which the first changes."""

        def differs(place: float) -> bool:
            return self._differs(self._first(quantity, farthest**place, self._rivals, sure=False))

        steps = [step / _STEPS for step in range(_STEPS + 1)]
        low, high = next((pair for pair in pairwise(steps) if differs(pair[1])), (1.0, 1.0))
        while high - low > wide:
            middle = (low + high) / 2
            low, high = (low, middle) if differs(middle) else (middle, high)
        return low, high

    def _differs(self, first: First) -> bool:
        alike = first.place >= 0 and self._mixes[first.place] == self._mixes[0]
        return not alike or (first.replicas, first.served == 1) != (self._ranked[0].estimate.replicas, self._all)

    def _first(
        self, quantity: Quantity, factor: float, places: Sequence[int] | None = None, sure: bool = True
    ) -> First:
        """What is first of these (default: of all) at that factor; by the replay alone, unless it has to be `sure`.
        Where nothing serves all it is planned again."""
        if quantity.device:
            return self._first_at_price(quantity, factor, sure)
        then = quantity.change(self._now(self._ranked[0]), factor)
        loop = self._loop.situated(then.demand, then.slo) if sure and self._loop is not None else None
        if math.isinf(then.demand.rate):
            return self._planned(quantity, factor, places, sure)
        candidates: dict[int, Candidate] = {}
        # Whether it misses the SLO, its worth below 0, its place, and what is known of it: the least is the best.
        hopes: list[tuple[bool, float, int, Ranked | None]] = []

        def all_in_time(place: int, replicas: int) -> tuple[bool, float]:
            dollars = max(price(candidates[place].system) * replicas, 1e-12) * handicap(self._ranked[place])
            return False, -then.demand.rate * 3600 / dollars

        def hope(place: int, look: Ranked) -> None:
            best = look if loop is None or not look.closely else look.hoped
            order = not best.serves, -worth(best) if best.serves else 0.0
            if not look.closely and (look.nearly or look.serves):  # of a few requests more are in time, or fewer
                order = all_in_time(place, look.estimate.replicas - (look.nearly and look.serves))
            heappush(hopes, (*order, place, look))

        for place in self._inside if places is None else places:
            entry = self._ranked[place]
            situation = quantity.change(self._now(entry), factor)
            candidates[place] = replace(entry.candidate, system=situation.system)
            if situation == self._now(entry):  # it does not depend on this
                hope(place, entry)
            elif fits(situation.system):
                heappush(hopes, (*all_in_time(place, 1), place, None))

        def leads(place: int, gives: float) -> bool:
            """Whether its worth is above that of all other mixes by more than the replay may be wrong."""
            others = (theirs for _, theirs, other, _ in hopes if self._mixes[other] != self._mixes[place])
            return gives < (1 + MARGIN) * min(others, default=0.0)

        while hopes:
            misses, gives, place, look = heappop(hopes)
            if look is None or not look.closely:
                fine = look is not None
                hope(place, looked_at(candidates[place], then.demand, then.slo, self._prefill, partly=False, fine=fine))
            elif misses:
                return self._planned(quantity, factor, places, sure)
            elif loop is not None and look.result is None and not (loop.sure(look) and leads(place, gives)):
                hope(place, loop.run(look))
            else:
                return First(place, look.estimate.replicas)
        return First(-1, 0)

    def _now(self, entry: Ranked) -> Situation:
        return Situation(entry.candidate.system, self._demand, self._slo)

    def _planned(self, quantity: Quantity, factor: float, places: Sequence[int] | None, sure: bool) -> First:
        """What is first of these at that factor, as a plan finds it: of what the budget then leaves of each."""
        then = quantity.change(self._now(self._ranked[0]), factor)
        loop = self._loop if sure else None
        if loop is not None and not quantity.device:
            loop = loop.situated(then.demand, then.slo)
        bought: dict[System, tuple[int, int]] = {}
        for place in self._inside if places is None else places:
            candidate = self._ranked[place].candidate
            system, count = quantity.change(self._now(self._ranked[place]), factor).system, candidate.replicas
            if quantity.device and self._budget is not None:
                count = int(min(count, self._budget / max(price(system), 1e-12) + 1e-9))
            if count and fits(system):
                bought[system] = count, place
        every = {Candidate(system, count): place for system, (count, place) in bought.items()}
        if not every:
            return First(-1, 0)
        try:
            first = settled(rank(list(every), then.demand, then.slo, prefill=self._prefill), loop)[0]
        except InvalidRequest:
            return First(-1, 0)
        served = 1.0 if first.serves or math.isinf(then.demand.rate) else first.goodput / then.demand.rate
        return First(every[first.candidate], first.estimate.replicas, served)

    def _first_at_price(self, quantity: Quantity, factor: float, sure: bool) -> First:
        """The same where a device costs so many times what it does: what a run may find to be so is checked."""
        everything, endless = range(len(self._ranked)), math.isinf(self._demand.rate)
        while True:
            serves, _, place, count = max(self._at_price(place, quantity.device, factor) for place in everything)
            if self._budget is not None and (endless or not serves):  # how much depends on how many can be bought
                return self._planned(quantity, factor, everything, sure)
            place, first = -place, First(-place, count, float(endless or serves))
            if self._loop is None or not self._differs(first) or self._loop.sure(self._ranked[place]):
                return first
            (self._ranked[place],) = self._loop.checked([self._ranked[place]])

    def _at_price(self, place: int, device: str, factor: float) -> tuple[bool, float, int, int]:
        """Whether it serves all, or may do so, its worth, its place below 0, and its number, where that device costs so
        many times what it does."""
        entry = self._ranked[place] if self._loop is None else self._ranked[place].hoped
        devices = entry.candidate.system.devices
        unit = sum(part.price * (factor if part.name == device else 1) * number for part, number in devices)
        replicas = count = entry.estimate.replicas
        if self._budget is not None:
            count = int(min(replicas, self._budget / max(unit, 1e-12) + 1e-9))
        gives = worth(entry) * entry.estimate.price / max(unit * replicas, 1e-12) if count else -1.0
        return entry.serves and count == replicas, gives, -place, count


def plain(value: float) -> str:
    """Three digits, and no powers of ten where people count."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
