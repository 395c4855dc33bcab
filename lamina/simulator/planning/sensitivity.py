"""How far one thing has to change until another candidate wins, over all feasible candidates: what others decide, such
as prices and load (`sensitivity`), and what the cost model assumes (`flips`).

Prices are exact (`prices`). For the rest the closed form is asked about the best mixes, and what it finds is planned
again: the event loop runs winner and rival just beyond the change. Where the winner still keeps its place, the search
goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lamina.simulator.event_loop.simulate import Progress, Slo
from lamina.simulator.planning.candidates import fits
from lamina.simulator.planning.planner import NOISE, Ranked, mixes
from lamina.simulator.planning.prices import Change, Prices
from lamina.simulator.planning.quantities import Quantity, Situation
from lamina.simulator.planning.run_progress import Mapped, RunProgress, one_by_one
from lamina.simulator.planning.ties import handicap
from lamina.simulator.steady_state.closed_form import Estimate, estimate
from lamina.simulator.traces.demand import Demand

FARTHEST = 10.0
"""By what factor prices are changed at most."""
FAR = 4.0
"""By what factor other things are."""
CONTENDERS = 12
"""Mixes that are looked at where something other than a price changes, the best first."""
_STEPS, _HALVINGS = 4, 5
_CLEARLY = 1 + 1e-9
_BEYOND = 1.02
"""How far beyond a change it is planned again."""
_AGAIN = 3
"""Changes of one thing in one direction that are planned again."""
Run = Callable[[Ranked, Situation, float], Ranked]
"""A candidate in a situation through the event loop, at the rate that it would take there."""
Standing = tuple[bool, float]
"""Whether all is served, and requests for a dollar: more is better."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How far something has to rise or fall until another of the `rivals` wins; None where `farthest` times isn't
    enough."""

    what: str
    now: float
    unit: str
    rise: Change | None
    fall: Change | None
    farthest: float = FARTHEST
    rivals: int = 1

    def __str__(self) -> str:
        changes = [
            f"at {change.factor:.2f}x and {word} ({plain(self.now * change.factor)} {self.unit}) {change.winner} wins"
            f"{'' if change.checked else ', by formula'}"
            for word, change in (("more", self.rise), ("less", self.fall))
            if change is not None
        ]
        said = "; ".join(changes)
        if not changes:
            said = f"the winner does not change up to {self.farthest:g}x either way"
        if not self.rivals:
            said = "there is no other candidate"
        return f"{self.what}, now {plain(self.now)} {self.unit}: {said}"


@dataclass(frozen=True, slots=True)
class Flip:
    """An assumption that flips the answer at `change.factor` times its value. `low` and `high`: the factors between
    which it is with a chance of 90 %, for the reason that `source` gives."""

    what: str
    now: float
    unit: str
    change: Change
    low: float
    high: float
    source: str

    @property
    def likely(self) -> bool:
        """Whether it flips within its interval."""
        return self.low <= self.change.factor <= self.high

    def __str__(self) -> str:
        less = self.change.factor < 1
        value, low, high = (plain(self.now * factor) for factor in (self.change.factor, self.low, self.high))
        return (
            f"{self.what}: {'below' if less else 'above'} {value} {self.unit} {self.change.winner} wins"
            f"{'' if self.change.checked else ', by formula'}; now {plain(self.now)}, likely {low} to {high} "
            f"({self.source}): {'the answer may well be another' if self.likely else 'unlikely'}"
        )


class Changes:
    """Winner and rivals under changes of anything but prices. `run`: None where formulas are believed."""

    def __init__(
        self,
        ranked: Sequence[Ranked],
        demand: Demand,
        slo: Slo,
        prefill: bool,
        run: Run | None = None,
        *,
        progress: Progress | None = None,
        mapped: Mapped = one_by_one,
    ) -> None:
        self._winner = ranked[0]
        self._rivals = [each for each in mixes(ranked) if each is not ranked[0]][:CONTENDERS]
        self._demand, self._slo, self._prefill, self._run = demand, slo, prefill, run
        self._progress, self._mapped = progress, mapped
        self._known: dict[tuple[str, str, float], Standing] = {}
        self._now: dict[str, Estimate] = {}

    @property
    def field(self) -> list[Ranked]:
        """The winner, and what it is compared with."""
        return [self._winner, *self._rivals]

    def changes(self, every: Sequence[tuple[Quantity, float]]) -> list[Change | None]:
        """`change` of each of these."""
        told = RunProgress(self._progress, "comparing", len(every))
        found = list(told.over(self._mapped(lambda pair: self.change(*pair), every)))
        told.end()
        return found

    def change(self, quantity: Quantity, farthest: float) -> Change | None:
        """The nearest factor between 1 and `farthest` at which another is first."""
        start = 1.0
        for _ in range(_AGAIN):
            found = self._nearest(quantity, start, farthest)
            if found is None:
                return None
            factor, rival = found
            if self._run is None:
                return Change(factor, rival.name, False)
            beyond = factor * _BEYOND if farthest > 1 else factor / _BEYOND
            mine = self._run(self._winner, self._at(self._winner, quantity, beyond), NOISE)
            theirs = self._run(rival, self._at(rival, quantity, beyond), 0.0)
            if _standing(theirs) > _standing(mine, NOISE):
                rival = replace(rival, estimate=replace(rival.estimate, replicas=theirs.estimate.replicas))
                return Change(factor, rival.name, True)
            start = beyond
        return None

    def _nearest(self, quantity: Quantity, start: float, farthest: float) -> tuple[float, Ranked] | None:
        """By the closed form, beyond `start`: steps first, then halvings."""
        if (start - farthest) * (1 - farthest) <= 0:
            return None
        before = start
        for step in range(1, _STEPS + 1):
            factor = start * (farthest / start) ** (step / _STEPS)
            rival = self._better(quantity, factor)
            if rival is None:
                before = factor
                continue
            for _ in range(_HALVINGS):
                middle = math.sqrt(before * factor)
                other = self._better(quantity, middle)
                if other is not None:
                    factor, rival = middle, other
                else:
                    before = middle
            return factor, rival
        return None

    def _better(self, quantity: Quantity, factor: float) -> Ranked | None:
        """The best of the rivals that are before the winner at that factor."""
        first, found = self._then(self._winner, quantity, factor), None
        for each in self._rivals:
            then = self._then(each, quantity, factor)
            if then[0] >= first[0] and then > (first[0], first[1] * _CLEARLY):
                first, found = then, each
        return found

    def _at(self, each: Ranked, quantity: Quantity, factor: float) -> Situation:
        return quantity.change(Situation(each.candidate.system, self._demand, self._slo), factor)

    def _then(self, each: Ranked, quantity: Quantity, factor: float) -> Standing:
        """How a candidate stands then by the closed form, corrected by what the event loop found now. One that serves
        all, other than the closed form said, is asked for as much less; one that does not serves nothing then."""
        given, at = self._at(each, quantity, factor), (each.name, quantity.what, factor)
        if given.system == each.candidate.system and given.demand == self._demand and given.slo == self._slo:
            at = (each.name, "", 1.0)  # it does not depend on this
        if at not in self._known and not fits(given.system):
            self._known[at] = False, 0.0
        if at not in self._known:
            now, count = each.estimate, each.candidate.replicas
            coarse = self._coarse(each)
            asked = given.demand
            if each.serves and not coarse.serves and math.isfinite(now.demanded) and coarse.taken:
                asked = asked.at_rate(asked.rate * coarse.taken / now.demanded)
            then = estimate(given.system, count, asked, given.slo, self._prefill, fine=False)
            ratio = each.goodput / coarse.goodput if coarse.goodput else 0.0
            trusted = then.serves and (each.serves or not coarse.serves)
            self._known[at] = trusted, then.goodput_per_dollar * ratio / handicap(each)
        return self._known[at]

    def _coarse(self, each: Ranked) -> Estimate:
        """As it is, as coarsely as it is estimated then."""
        if each.name not in self._now:
            system, count = each.candidate.system, each.candidate.replicas
            self._now[each.name] = estimate(system, count, self._demand, self._slo, self._prefill, fine=False)
        return self._now[each.name]


def _standing(ranked: Ranked, allowance: float = 0.0) -> Standing:
    return ranked.serves or ranked.nearly(1 - allowance / ranked.needed), ranked.goodput_per_dollar / handicap(ranked)


def sensitivity(prices: Prices, changes: Changes, quantities: Sequence[Quantity]) -> list[Sensitivity]:
    """For the price of each device, then for each of these quantities."""
    found = []
    for name, price in prices.devices().items():
        rise, fall = prices.change(name, FARTHEST), prices.change(name, 1 / FARTHEST)
        found.append(Sensitivity(f"price of {name}", price, "$/h", rise, fall, FARTHEST, len(prices.ranked) - 1))
    both = changes.changes([(quantity, factor) for quantity in quantities for factor in (FAR, 1 / FAR)])
    for quantity, rise, fall in zip(quantities, both[::2], both[1::2], strict=True):
        found.append(Sensitivity(quantity.what, quantity.now, quantity.unit, rise, fall, FAR, len(changes.field) - 1))
    return found


def flips(changes: Changes, assumed: Sequence[Quantity]) -> list[Flip]:
    """The assumptions that would flip the answer, those that may well be otherwise first. Each is changed as far as it
    is likely to be, and half as far again."""
    ends = [(each, end**1.5) for each in assumed for end in each.likely or () if end != 1]
    found = [
        Flip(each.what, each.now, each.unit, change, *(each.likely or (1.0, 1.0)), each.source)
        for (each, _), change in zip(ends, changes.changes(ends), strict=True)
        if change is not None
    ]
    return sorted(found, key=lambda flip: (not flip.likely, abs(math.log(flip.change.factor))))


def plain(value: float) -> str:
    """Three digits, and no powers of ten where people count."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
