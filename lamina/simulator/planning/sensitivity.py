"""How far one thing has to change until another candidate wins, over all feasible candidates. `Prices` changes the
price of a device, `Changes` all else. `sensitivity` asks about what others decide, such as prices and load; `flips`
asks about what the cost model assumes.

Changes of prices are exact. Neither an estimate nor a run of the event loop depends on prices, so a candidate's
standing at any price follows from the one that it has. A candidate that would be first by formula alone is checked by
the event loop before it is believed.

For other changes the closed form is asked about the best mixes, and its answers are planned again. The event loop runs
winner and rival just beyond the change. Where the winner still keeps its place, it runs them at the farthest factor,
and between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lamina.simulator.costs.hardware import Device
from lamina.simulator.costs.systems import without_prices
from lamina.simulator.event_loop.simulate import Progress, Slo
from lamina.simulator.planning.candidates import Candidate, fits
from lamina.simulator.planning.planner import FINALISTS, NOISE, Ranked, handicap, mixes, reachable
from lamina.simulator.planning.quantities import Quantity, Situation
from lamina.simulator.planning.run_progress import Mapped, RunProgress, one_by_one
from lamina.simulator.steady_state.closed_form import Estimate, estimate
from lamina.simulator.traces.demand import Demand

_PRICE_STEPS, _PRICE_HALVINGS = 160, 24
"""Prices that are tried from 1 to the farthest factor, and halvings between the two where the winner changes."""
_ROUNDING = 1e-9
"""The relative error of sums. A candidate that leads by less does not replace the winner, and a budget that just pays
for a replica does pay for it."""
_CHECKED_TOGETHER = 4
"""Candidates that the event loop checks at the same time, while the first at today's prices is looked for."""
_SERVES_ALL_FACTOR = 1e30
"""The score of a candidate that serves the whole demand is multiplied by this. So it comes before each candidate that
does not, whatever that one gives for a dollar."""
_Floats = NDArray[np.float64]
Unseen = Callable[[str, float, float], Sequence[Ranked]]
"""(device, factor, most) -> candidates, by formula, that are within the budget only once that device's price is
`factor` times what it is, and that then cost less than `most` dollars an hour."""


@dataclass(frozen=True, slots=True)
class Change:
    """A price at which the winner changes: at `factor` times what it is, and beyond, `winner` takes the first
    place. `checked`: by the event loop, not by formula alone."""

    factor: float
    winner: str
    checked: bool = True


class Checks(Protocol):
    """The event loop."""

    def full(self, ranked: Ranked) -> bool:
        """Whether it ran that candidate for long enough to be believed."""
        ...

    def checked(self, some: Sequence[Ranked]) -> list[Ranked]:
        """The candidates after runs that are."""
        ...

    def whole(self, ranked: Ranked) -> Ranked:
        """The candidate after a run on all of the trace."""
        ...


class Prices:
    """All candidates within `budget` dollars an hour (None: any), the winner first.

    `loop` checks a candidate that would be first by formula; None: formulas are believed. `unseen` lists further
    candidates, which a lower price brings within the budget.

    A "place" is an index in the list of candidates. That list keeps its order at other prices, and the winner at
    today's prices is at place 0. How candidates stand at a price is computed as one score each (`_keys`).
    """

    def __init__(
        self,
        ranked: Sequence[Ranked],
        budget: float | None = None,
        loop: Checks | None = None,
        unseen: Unseen = lambda name, factor, most: (),
    ) -> None:
        self._every, self._budget, self._loop, self._unseen = list(ranked), budget, loop, unseen
        self._checked: set[Candidate] = set()
        self._confirmed: set[Candidate] = set()
        self._columns()

    @property
    def ranked(self) -> list[Ranked]:
        """The candidates, with all that has been checked meanwhile."""
        return list(self._every)

    def devices(self) -> dict[str, float]:
        """Dollars an hour of each device that has a price, by name."""
        return {
            device.name: device.price
            for entry in self._every
            for device, _ in entry.candidate.system.devices
            if device.price
        }

    def settle(self) -> None:
        """Put the winner at these prices first. All of the trace is run for it, since excerpts flatter what is near
        its limit."""
        while True:
            if unsure := self._unsure():
                self._check(unsure)
                continue
            place = self._place("", 1.0)
            if not self._confirm(place):
                continue
            if not place:
                return
            self._every.insert(0, self._every.pop(place))
            self._columns()

    def change(self, name: str, farthest: float) -> Change | None:
        """The nearest factor, between 1 and `farthest`, of the price of that device at which another candidate is
        first; None: the winner still is at all of them."""
        if farthest < 1 and self._budget is not None:
            self._add(self._unseen(name, farthest, self._most(name, farthest)))
        while True:
            factor, place = self._nearest(name, farthest)
            if not place:
                return None
            if self._believed(place):
                return Change(factor, self._every[place].name, self._loop is not None)
            self._check([place])

    def _believed(self, place: int) -> bool:
        """Whether that candidate's standing is believed."""
        entry = self._every[place]
        return self._loop is None or entry.candidate in self._checked or self._loop.full(entry)

    def _check(self, places: Sequence[int]) -> None:
        """Have the event loop run these candidates, which may stand otherwise then."""
        if self._loop is not None:
            entries = [self._every[place] for place in places]
            self._checked.update(entry.candidate for entry in entries)
            for place, result in zip(places, self._loop.checked(entries), strict=True):
                self._every[place] = result
            self._columns()

    def _confirm(self, place: int) -> bool:
        """Whether that candidate has run on all of the trace. If not it does now, and may stand otherwise."""
        entry = self._every[place]
        if self._loop is None or entry.candidate in self._confirmed:
            return True
        self._confirmed.add(entry.candidate)
        self._every[place] = self._loop.whole(entry)
        self._columns()
        return False

    def _most(self, name: str, factor: float) -> float:
        """Dollars an hour that the winner costs at that price; infinite where it doesn't serve the whole demand, or the
        demand is unlimited."""
        first = self._every[0]
        if not first.serves or math.isinf(first.estimate.demanded):
            return math.inf
        share = sum(device.price * n for device, n in first.candidate.system.devices if device.name == name)
        return first.estimate.price + first.estimate.replicas * share * (factor - 1)

    def winner(self, name: str, factor: float) -> Ranked:
        """The best candidate where that device costs so many times what it does."""
        return self._every[self._place(name, factor)]

    def _unsure(self) -> list[int]:
        """The places of the best candidates at today's prices, the best first, up to one whose standing is believed."""
        first, key = self._place("", 1.0), self._keys("", np.array([1.0]))[:, 0]
        order = [first, *np.argsort(-key, kind="stable")[:_CHECKED_TOGETHER].tolist()]
        return list(dict.fromkeys(takewhile(lambda place: not self._believed(place), order)))[:_CHECKED_TOGETHER]

    def _place(self, name: str, factor: float) -> int:
        """The place of the best candidate where that device costs `factor` times what it does."""
        return int(self._first(name, np.array([factor]))[0])

    def _add(self, more: Sequence[Ranked]) -> None:
        systems = {without_prices(entry.candidate.system) for entry in self._every}
        self._every += [entry for entry in more if without_prices(entry.candidate.system) not in systems]
        self._columns()

    def _counted(self, each: Ranked) -> float:
        """Requests a second within the SLO. Of one that the event loop has not run for long, as many as it may find."""
        if self._loop is None or self._loop.full(each):
            return each.goodput
        return max(each.goodput, reachable(each))

    def _columns(self) -> None:
        """Set the columns that `_keys` computes with: one number for each candidate, in the order of places."""
        every = self._every
        self._serves = np.array([entry.serves for entry in every])
        self._goodput = np.array([self._counted(entry) for entry in every])
        self._handicap = np.array([handicap(entry) for entry in every])
        self._replicas = np.array([float(entry.estimate.replicas) for entry in every])
        self._unit = np.array([entry.estimate.price / entry.estimate.replicas for entry in every])

    def _first(self, name: str, factors: _Floats) -> NDArray[np.intp]:
        """The place of the best candidate at each of these factors of the device's price, int `[factors]`. The winner,
        at place 0, stays the best unless another leads by more than `_ROUNDING`. Among equals the lowest place is."""
        key = self._keys(name, factors)
        best = np.argmax(key, axis=0)
        return np.where(key[0] * (1 + _ROUNDING) >= key[best, np.arange(key.shape[1])], 0, best)

    def _keys(self, name: str, factors: _Floats) -> _Floats:
        """The score of each candidate at each of these factors of the device's price, `[candidates, factors]`: requests
        within the SLO for a dollar, divided by the handicap, and times `_SERVES_ALL_FACTOR` where the whole demand is
        served. -1: no replica is within the budget."""
        share = [sum(d.price * n for d, n in entry.candidate.system.devices if d.name == name) for entry in self._every]
        unit = self._unit[:, None] + np.array(share)[:, None] * (factors - 1)
        replicas = np.broadcast_to(self._replicas[:, None], unit.shape)
        serves = np.broadcast_to(self._serves[:, None], unit.shape)
        goodput = self._goodput[:, None]
        if self._budget is not None:
            allowed = np.floor(self._budget / np.maximum(unit, 1e-300) + _ROUNDING)
            fewer = np.minimum(allowed, replicas)
            serves = serves & (fewer == replicas)
            goodput = goodput * fewer / replicas
            replicas = fewer
        cost = np.maximum(unit * replicas, 1e-12)
        score = np.where(replicas > 0, goodput / cost / self._handicap[:, None], -1.0)
        return np.where(serves, _SERVES_ALL_FACTOR * score, score)

    def _nearest(self, name: str, farthest: float) -> tuple[float, int]:
        """The factor nearest to 1 at which the winner is not the best, and the place of the candidate that is. Place 0:
        the winner is the best at all factors."""
        factors = farthest ** (np.arange(1, _PRICE_STEPS + 1) / _PRICE_STEPS)
        firsts = self._first(name, factors)
        changed = np.flatnonzero(firsts)
        if not changed.size:
            return farthest, 0
        index = int(changed[0])
        before, factor, place = (float(factors[index - 1]) if index else 1.0), float(factors[index]), int(firsts[index])
        for _ in range(_PRICE_HALVINGS):
            middle = math.sqrt(before * factor)
            if first := self._place(name, middle):
                factor, place = middle, first
            else:
                before = middle
        return factor, place


def at_price(device: Device, name: str, factor: float) -> Device:
    """The device, at so many times its price if it has that name."""
    return replace(device, price=device.price * factor) if device.name == name else device


FARTHEST = 10.0
"""The largest factor by which prices are changed."""
FAR = 4.0
"""The largest factor by which other quantities are changed."""
_STEPS, _HALVINGS = 4, 5
"""Factors that are tried up to the farthest, and halvings between the two where the winner changes."""
_CLEARLY = 1 + 1e-9
"""A rival comes before the winner where it gives more than this many times as much."""
_LOADS, _WIDER = 8, 1.04
"""Loads that are tried until the closed form agrees with the event loop, and the ratio of each to the one before."""
_BEYOND = 1.02
"""How far beyond the change that the closed form finds the event loop runs."""
_BETWEEN = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Parts of the way to the farthest factor. The event loop runs at these where another candidate wins at the farthest
factor, but not at the change that the closed form finds."""
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
        words = "; ".join(changes)
        if not changes:
            words = f"the winner does not change up to {self.farthest:g}x either way"
        if not self.rivals:
            words = "there is no other candidate"
        return f"{self.what}, now {plain(self.now)} {self.unit}: {words}"


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
        self._rivals = [entry for entry in mixes(ranked) if entry is not ranked[0]][:FINALISTS]
        self._demand, self._slo, self._prefill, self._run = demand, slo, prefill, run
        self._progress, self._mapped = progress, mapped
        self._standings: dict[tuple[str, str, float], Standing] = {}
        self._now: dict[str, tuple[float, Estimate]] = {}

    @property
    def field(self) -> list[Ranked]:
        """The winner, and what it is compared with."""
        return [self._winner, *self._rivals]

    def changes(self, every: Sequence[tuple[Quantity, float]]) -> list[Change | None]:
        """`change` of each of these."""
        reports = RunProgress(self._progress, "comparing", len(every))
        nearest = list(reports.over(self._mapped(lambda pair: self.change(*pair), every)))
        reports.end()
        return nearest

    def change(self, quantity: Quantity, farthest: float) -> Change | None:
        """The nearest factor between 1 and `farthest` at which another is first. Where the event loop does not find
        what the closed form says, it looks at `farthest` and, if another is first there, between the two."""
        nearest = self._nearest(quantity, farthest)
        if nearest is None:
            return None
        factor, rival = nearest
        if self._run is None:
            return Change(factor, rival.name, False)
        near = factor * _BEYOND if farthest > 1 else factor / _BEYOND
        if first := self._first(quantity, near, rival, self._run):
            return Change(factor, first.name, True)
        ends = near >= farthest if farthest > 1 else near <= farthest
        if ends or not (first := self._first_by_formula(quantity, farthest, self._run)):
            return None
        for part in _BETWEEN:
            middle = near * (farthest / near) ** part
            if nearer := self._first_by_formula(quantity, middle, self._run):
                return Change(middle, nearer.name, True)
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
        first, better = self._then(self._winner, quantity, factor), None
        for rival in self._rivals:
            then = self._then(rival, quantity, factor)
            if then[0] >= first[0] and then > (first[0], first[1] * _CLEARLY):
                first, better = then, rival
        return better

    def _at(self, each: Ranked, quantity: Quantity, factor: float) -> Situation:
        return quantity.change(Situation(each.candidate.system, self._demand, self._slo), factor)

    def _then(self, each: Ranked, quantity: Quantity, factor: float) -> Standing:
        """How a candidate stands then by the closed form, corrected by what the event loop found now."""
        situation, key = self._at(each, quantity, factor), (each.name, quantity.what, factor)
        if situation == Situation(each.candidate.system, self._demand, self._slo):
            return _standing(each)  # it does not depend on this
        if key not in self._standings and not fits(situation.system):
            self._standings[key] = False, 0.0
        if key not in self._standings:
            load, now = self._corrected(each)
            then = self._estimated(each, situation, load)
            ratio = each.goodput / now.goodput if now.goodput else 0.0
            trusted = then.serves and (each.serves or not now.serves)
            self._standings[key] = trusted, then.goodput_per_dollar * ratio / handicap(each)
        return self._standings[key]

    def _corrected(self, each: Ranked) -> tuple[float, Estimate]:
        """How many times the load the closed form is asked for, to say of now what the event loop found; and what it
        says then."""
        if each.name not in self._now:
            situation = Situation(each.candidate.system, self._demand, self._slo)
            plain = self._estimated(each, situation, 1.0)
            self._now[each.name] = self._agreeing(each, situation, plain) or (1.0, plain)
        return self._now[each.name]

    def _agreeing(self, each: Ranked, given: Situation, plain: Estimate) -> tuple[float, Estimate] | None:
        """The load nearest to the real one, of those near it, at which a candidate serves all by the closed form with
        as many replicas as the event loop found. None where nothing is to be corrected, or no load agrees."""
        count = each.estimate.replicas
        agrees = plain.serves and plain.replicas == count
        if agrees or not each.serves or not plain.capacity or math.isinf(plain.demanded):
            return None

        def tried(load: float) -> tuple[float, Estimate] | None:
            forecast = self._estimated(each, given, load)
            return (load, forecast) if forecast.serves and forecast.replicas == count else None

        more = plain.serves and plain.replicas < count
        one = plain.capacity / each.candidate.replicas / plain.demanded
        wrong, load = 1.0, max(1.0, one * (count - 1)) if more else min(1.0, one * count)
        agreement = tried(load)
        for _ in range(_LOADS):
            if agreement is not None:
                break
            wrong, load = load, load * _WIDER if more else load / _WIDER
            agreement = tried(load)
        for _ in range(_HALVINGS if agreement else 0):
            middle = math.sqrt(wrong * load)
            if nearer := tried(middle):
                agreement, load = nearer, middle
            else:
                wrong = middle
        return agreement

    def _estimated(self, each: Ranked, given: Situation, load: float) -> Estimate:
        """By the closed form, coarsely, at so many times the load."""
        demand = given.demand if load == 1 else given.demand.at_rate(given.demand.rate * load)
        return estimate(given.system, each.candidate.replicas, demand, given.slo, self._prefill, fine=False)


def _standing(ranked: Ranked, allowance: float = 0.0) -> Standing:
    return ranked.serves or ranked.nearly(1 - allowance / ranked.needed), ranked.goodput_per_dollar / handicap(ranked)


def sensitivity(prices: Prices, changes: Changes, quantities: Sequence[Quantity]) -> list[Sensitivity]:
    """For the price of each device, then for each of these quantities."""
    sensitivities = []
    for name, price in prices.devices().items():
        rise, fall = prices.change(name, FARTHEST), prices.change(name, 1 / FARTHEST)
        sensitivities.append(
            Sensitivity(f"price of {name}", price, "$/h", rise, fall, FARTHEST, len(prices.ranked) - 1)
        )
    pairs = changes.changes([(quantity, factor) for quantity in quantities for factor in (FAR, 1 / FAR)])
    for quantity, rise, fall in zip(quantities, pairs[::2], pairs[1::2], strict=True):
        sensitivities.append(
            Sensitivity(quantity.what, quantity.now, quantity.unit, rise, fall, FAR, len(changes.field) - 1)
        )
    return sensitivities


def flips(changes: Changes, assumed: Sequence[Quantity]) -> list[Flip]:
    """The assumptions that would flip the answer, those that may well be otherwise first. Each is changed as far as it
    is likely to be, and half as far again."""
    ends = [(quantity, end**1.5) for quantity in assumed for end in quantity.likely or () if end != 1]
    flipped = [
        Flip(quantity.what, quantity.now, quantity.unit, change, *(quantity.likely or (1.0, 1.0)), quantity.source)
        for (quantity, _), change in zip(ends, changes.changes(ends), strict=True)
        if change is not None
    ]
    return sorted(flipped, key=lambda flip: (not flip.likely, abs(math.log(flip.change.factor))))


def plain(value: float) -> str:
    """Three digits, and no powers of ten where people count."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
