"""How far one thing has to change until another candidate wins: prices, links, load, prompts, the SLO, the speed of
devices.

Neither an estimate nor a run depends on prices, so that of all candidates it is known how they stand at any price; one
that would be first by what is not sure is checked before it is believed. For other changes winner and rivals are
replayed with all requests of the changed trace, until the factor is close where another mix of devices is first, or
another number of the winner's. Then all candidates are looked at there, and one that is before these becomes a rival.
What a run found beyond the replay is taken to be so at all factors. What a coarse look, which is too kind, has behind
the first is not replayed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lamina.simulator.costs.systems import price
from lamina.simulator.event_loop.results import ATTAINMENT
from lamina.simulator.event_loop.simulate import Progress, Slo
from lamina.simulator.planning.candidates import fits
from lamina.simulator.planning.event_runs import EventRuns
from lamina.simulator.planning.planner import Ranked, described, handicap, mix, mixes, worth
from lamina.simulator.planning.quantities import Quantity, Situation
from lamina.simulator.planning.run_progress import Mapped, RunProgress, one_by_one
from lamina.simulator.steady_state.closed_form import estimate
from lamina.simulator.traces.demand import Demand

FARTHEST, FAR = 10.0, 4.0
"""The largest factors by which prices are changed, and other quantities."""
RIVALS, _NEAR = 6, 0.75
"""Of other mixes of devices, the best so many that serve all are compared with the winner, and the cheapest that with a
replica fewer, or with all that there may be, serve this part of it."""
_STEPS, _HALVINGS = 4, 7
"""Factors that are tried up to the farthest, and halvings between the two where the winner changes."""
_CLEARLY = 1 + 1e-9
"""A rival comes before the winner where it gives more than this many times as much."""


@dataclass(frozen=True, slots=True)
class Change:
    """At `factor` times what something is, and beyond, `winner` takes the first place."""

    factor: float
    winner: str


class Standing(NamedTuple):
    """How the candidate at that place of the ranking stands: more is better. `worth` is requests for a dollar."""

    serves: bool
    worth: float
    place: int
    replicas: int


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How far something has to rise or fall until another wins; None where `farthest` times isn't enough."""

    what: str
    now: float
    unit: str
    rise: Change | None
    fall: Change | None
    farthest: float = FARTHEST

    def __str__(self) -> str:
        ways = []
        for change, word, end in ((self.rise, "up", self.farthest), (self.fall, "down", 1 / self.farthest)):
            factor = end if change is None else change.factor
            beyond = " at least" if change is None else f" ({plain(self.now * factor)}), then {change.winner}"
            ways.append(f"{word} to {factor:.2f}x{beyond}")
        ranges = "; ".join(ways)
        if self.rise is None and self.fall is None:
            ranges = f"from {1 / self.farthest:.2f}x to {self.farthest:.2f}x"
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
        self._ranked = [*ranked, *beyond]
        places = {id(entry): place for place, entry in enumerate(ranked)}
        serving = [entry for entry in mixes(ranked) if entry.serves and entry is not ranked[0]]
        near = sorted((entry for entry in ranked[1:] if entry.hopeful > _NEAR), key=lambda entry: -entry.hopeful)
        cheap = sorted(mixes(near), key=lambda entry: entry.hoped_price)
        first = mix(ranked[0].candidate.system)
        alike = [mix(entry.candidate.system) == first for entry in ranked]
        self._variants = [place for place in range(1, len(alike)) if alike[place]]
        self._others = [place for place in range(1, len(alike)) if not alike[place]]
        rivals = dict.fromkeys(places[id(entry)] for entry in (*serving[:RIVALS], *cheap[:RIVALS]))
        self._rivals = [place for place in rivals if not alike[place]]
        self._beyond = range(len(ranked), len(self._ranked))
        self._demand, self._slo, self._prefill, self._budget = demand, slo, prefill, budget
        self._loop, self._progress, self._mapped = loop, progress, mapped

    def sensitivities(self, quantities: Sequence[Quantity]) -> list[Sensitivity]:
        """Of prices, then of these others."""
        devices = [quantity for quantity in quantities if quantity.device]
        others = [quantity for quantity in quantities if not quantity.device]
        nearest = [self.change(quantity, end) for quantity in devices for end in (FARTHEST, 1 / FARTHEST)]
        pairs = [(quantity, end) for quantity in others for end in (FAR, 1 / FAR)]
        reports = RunProgress(self._progress, "comparing", len(pairs))
        nearest += reports.over(self._mapped(lambda pair: self.change(*pair), pairs))
        reports.end()
        return [
            Sensitivity(quantity.what, quantity.now, quantity.unit, rise, fall, FARTHEST if quantity.device else FAR)
            for quantity, rise, fall in zip((*devices, *others), nearest[::2], nearest[1::2], strict=True)
        ]

    def change(self, quantity: Quantity, farthest: float) -> Change | None:
        """The nearest factor between 1 and `farthest` at which another is first, or the winner in another number."""
        rivals = [*self._others, *self._beyond] if quantity.device else list(self._rivals)
        while True:
            factor, first = self._nearest(quantity, farthest, rivals)
            entry = self._ranked[first.place]
            if quantity.device:
                if self._differs(first) and self._loop is not None and not self._loop.sure(entry):
                    (self._ranked[first.place],) = self._loop.checked([entry])
                    continue
            else:
                others = [place for place in self._others if place not in rivals]
                newcomer = self._first(quantity, factor, others, first)
                if newcomer.place != first.place:
                    rivals.append(newcomer.place)
                    continue
            return Change(factor, described(entry.candidate.system, first.replicas)) if self._differs(first) else None

    def _nearest(self, quantity: Quantity, farthest: float, rivals: Sequence[int]) -> tuple[float, Standing]:
        """That factor by these rivals, and which is first there; the farthest one, where the winner is at all."""
        before, factor, first = 1.0, farthest, self._standing(0, quantity, 1.0)
        for step in range(1, _STEPS + 1):
            factor = farthest ** (step / _STEPS)
            first = self._first(quantity, factor, rivals)
            if self._differs(first):
                break
            before = factor
        for _ in range(_HALVINGS if self._differs(first) else 0):
            middle = math.sqrt(before * factor)
            nearer = self._first(quantity, middle, rivals)
            if self._differs(nearer):
                factor, first = middle, nearer
            else:
                before = middle
        return factor, first

    def _differs(self, first: Standing) -> bool:
        return first.place != 0 or first.replicas != self._ranked[0].estimate.replicas

    def _first(
        self, quantity: Quantity, factor: float, places: Sequence[int], first: Standing | None = None
    ) -> Standing:
        """What is first at that factor: the winner in its best form, or the `first` that was found, unless one of these
        gives clearly more. What serves a part counts only where nothing serves all."""
        for partly in (False, True):
            if first is None or partly:
                place = 0 if first is None else first.place
                first = self._standing(place, quantity, factor, partly)
                if not place:
                    first = self._better(first, quantity, factor, self._variants, partly)._replace(place=0)
            best = self._better(first, quantity, factor, places, partly)
            if best.serves and math.isfinite(self._demand.rate):
                break
        return best

    def _better(
        self, best: Standing, quantity: Quantity, factor: float, places: Sequence[int], partly: bool
    ) -> Standing:
        """The best of that one and these, by a coarse look and then by all requests."""
        hoped = []
        for place in places:
            if best.serves and not quantity.device:
                entry = self._ranked[place]
                situation = quantity.change(self._now(entry), factor)
                bound = situation.demand.rate * 3600 / max(price(situation.system), 1e-12) / handicap(entry)
                if bound <= best.worth:  # it costs too much, even with all in time
                    continue
            hoped.append(self._standing(place, quantity, factor, partly, fine=False))
        for hope in sorted(hoped, reverse=True):
            if hope[:2] <= (best.serves, best.worth * _CLEARLY):
                break
            standing = self._standing(hope.place, quantity, factor, partly)
            if standing[:2] > (best.serves, best.worth * _CLEARLY):
                best = standing
        return best

    def _now(self, each: Ranked) -> Situation:
        return Situation(each.candidate.system, self._demand, self._slo)

    def _standing(
        self, place: int, quantity: Quantity, factor: float, partly: bool = False, fine: bool = True
    ) -> Standing:
        """How a candidate stands at that factor: by all requests, if `fine`."""
        entry = self._ranked[place]
        if quantity.device:
            return self._at_price(place, quantity.device, factor)
        situation = quantity.change(self._now(entry), factor)
        if situation == self._now(entry):  # it does not depend on this
            return Standing(entry.serves, worth(entry), place, entry.estimate.replicas)
        if not fits(situation.system):
            return Standing(False, 0.0, place, 1)
        count, needed, demand = entry.candidate.replicas, ATTAINMENT - entry.bias, situation.demand
        then = estimate(situation.system, count, demand, situation.slo, self._prefill, fine, needed, partly)
        gives = then.goodput_per_dollar / handicap(entry) if then.serves or partly else 0.0
        return Standing(then.serves, gives, place, then.replicas)

    def _at_price(self, place: int, device: str, factor: float) -> Standing:
        """How it stands, or as a run may find that it does, where that device costs so many times what it does."""
        entry = self._ranked[place] if self._loop is None else self._ranked[place].hoped
        devices = entry.candidate.system.devices
        unit = sum(part.price * (factor if part.name == device else 1) * number for part, number in devices)
        replicas = count = entry.estimate.replicas
        if self._budget is not None:
            count = int(min(replicas, self._budget / max(unit, 1e-12) + 1e-9))
        gives = worth(entry) * entry.estimate.price / max(unit * replicas, 1e-12) if count else -1.0
        return Standing(entry.serves and count == replicas, gives, place, count)


def plain(value: float) -> str:
    """Three digits, and no powers of ten where people count."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
