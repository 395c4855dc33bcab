"""How far one thing has to change until another candidate wins, over all feasible candidates: what others decide, such
as prices and load (`sensitivity`), and what the cost model assumes (`flips`).

Prices are exact (`prices`). For the rest the closed form is asked about the best mixes, and what it finds is planned
again: the event loop runs winner and rival just beyond the change. Where the winner still keeps its place, it runs them
at the farthest factor, and between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lamina.simulator.event_loop.simulate import Progress, Slo
from lamina.simulator.planning.candidates import fits
from lamina.simulator.planning.planner import FINALISTS, NOISE, Ranked, mixes
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
_STEPS, _HALVINGS = 4, 5
_CLEARLY = 1 + 1e-9
_LOADS, _WIDER = 8, 1.04
"""Loads that are tried to have the closed form say what the event loop found, each so many times the one before."""
_BEYOND = 1.02
"""How far beyond a change it is planned again."""
_BETWEEN = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Parts of the way to the farthest factor at which it is planned again where another wins there, and not at the change
of the closed form."""
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
        # The best of the other mixes: of so many there are full runs.
        self._rivals = [each for each in mixes(ranked) if each is not ranked[0]][:FINALISTS]
        self._demand, self._slo, self._prefill, self._run = demand, slo, prefill, run
        self._progress, self._mapped = progress, mapped
        self._known: dict[tuple[str, str, float], Standing] = {}
        self._now: dict[str, tuple[float, Estimate]] = {}

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
        """The nearest factor between 1 and `farthest` at which another is first. Where the event loop does not find
        what the closed form says, it looks at `farthest` and, if another is first there, between the two."""
        found = self._nearest(quantity, farthest)
        if found is None:
            return None
        factor, rival = found
        if self._run is None:
            return Change(factor, rival.name, False)
        near = factor * _BEYOND if farthest > 1 else factor / _BEYOND
        if first := self._first(quantity, near, rival, self._run):
            return Change(factor, first.name, True)
        ends = near >= farthest if farthest > 1 else near <= farthest
        if ends or not (first := self._first_by_formula(quantity, farthest, self._run)):
            return None
        for part in _BETWEEN:
            at = near * (farthest / near) ** part
            if nearer := self._first_by_formula(quantity, at, self._run):
                return Change(at, nearer.name, True)
        return Change(farthest, first.name, True)

    def _first_by_formula(self, quantity: Quantity, factor: float, run: Run) -> Ranked | None:
        """`_first` of the best rival by the closed form."""
        rival = self._better(quantity, factor)
        return rival and self._first(quantity, factor, rival, run)

    def _first(self, quantity: Quantity, factor: float, rival: Ranked, run: Run) -> Ranked | None:
        """The rival, with the replicas that it then has, if the event loop says that it is before the winner there."""
        mine = run(self._winner, self._at(self._winner, quantity, factor), NOISE)
        theirs = run(rival, self._at(rival, quantity, factor), 0.0)
        if _standing(theirs) <= _standing(mine, NOISE):
            return None
        return replace(rival, estimate=replace(rival.estimate, replicas=theirs.estimate.replicas))

    def _nearest(self, quantity: Quantity, farthest: float) -> tuple[float, Ranked] | None:
        """By the closed form: steps first, then halvings."""
        before = 1.0
        for step in range(1, _STEPS + 1):
            factor = farthest ** (step / _STEPS)
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
        """How a candidate stands then by the closed form, corrected by what the event loop found now."""
        given, at = self._at(each, quantity, factor), (each.name, quantity.what, factor)
        if given == Situation(each.candidate.system, self._demand, self._slo):
            return _standing(each)  # it does not depend on this
        if at not in self._known and not fits(given.system):
            self._known[at] = False, 0.0
        if at not in self._known:
            load, now = self._corrected(each)
            then = self._estimated(each, given, load)
            ratio = each.goodput / now.goodput if now.goodput else 0.0
            trusted = then.serves and (each.serves or not now.serves)
            self._known[at] = trusted, then.goodput_per_dollar * ratio / handicap(each)
        return self._known[at]

    def _corrected(self, each: Ranked) -> tuple[float, Estimate]:
        """How many times the load the closed form is asked for, to say of now what the event loop found; and what it
        says then."""
        if each.name not in self._now:
            given = Situation(each.candidate.system, self._demand, self._slo)
            plain = self._estimated(each, given, 1.0)
            self._now[each.name] = self._agreeing(each, given, plain) or (1.0, plain)
        return self._now[each.name]

    def _agreeing(self, each: Ranked, given: Situation, plain: Estimate) -> tuple[float, Estimate] | None:
        """The load nearest to the real one, of those near it, at which a candidate serves all by the closed form with
        as many replicas as the event loop found. None where nothing is to be corrected, or no load agrees."""
        count = each.estimate.replicas
        agrees = plain.serves and plain.replicas == count
        if agrees or not each.serves or not plain.capacity or math.isinf(plain.demanded):
            return None

        def tried(load: float) -> tuple[float, Estimate] | None:
            found = self._estimated(each, given, load)
            return (load, found) if found.serves and found.replicas == count else None

        more = plain.serves and plain.replicas < count
        one = plain.capacity / each.candidate.replicas / plain.demanded
        wrong, load = 1.0, max(1.0, one * (count - 1)) if more else min(1.0, one * count)
        found = tried(load)
        for _ in range(_LOADS):
            if found is not None:
                break
            wrong, load = load, load * _WIDER if more else load / _WIDER
            found = tried(load)
        for _ in range(_HALVINGS if found else 0):
            middle = math.sqrt(wrong * load)
            if nearer := tried(middle):
                found, load = nearer, middle
            else:
                wrong = middle
        return found

    def _estimated(self, each: Ranked, given: Situation, load: float) -> Estimate:
        """By the closed form, coarsely, at so many times the load."""
        asked = given.demand if load == 1 else given.demand.at_rate(given.demand.rate * load)
        return estimate(given.system, each.candidate.replicas, asked, given.slo, self._prefill, fine=False)


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
