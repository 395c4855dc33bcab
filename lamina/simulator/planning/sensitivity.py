"""How far one thing has to change until another candidate wins. `Prices` changes the price of a device, `Changes` all
else: links, load, prompts, the SLO, the speed of devices.

Changes of prices are exact, over all feasible candidates. Neither an estimate nor a run of the event loop depends on
prices, so a candidate's standing at any price follows from the one that it has. A candidate that would be first by what
is not sure is checked before it is believed.

For other changes winner and rivals are replayed with all requests of the changed trace, until the factor is close where
another is first. What a run found beyond the replay is taken to be so at all factors. A rival that a coarse look, which
is too kind, has behind the winner is not replayed.
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
from lamina.simulator.event_loop.results import ATTAINMENT
from lamina.simulator.event_loop.simulate import Progress, Slo
from lamina.simulator.planning.candidates import fits
from lamina.simulator.planning.planner import Ranked, handicap, mixes
from lamina.simulator.planning.quantities import Quantity, Situation
from lamina.simulator.planning.run_progress import Mapped, RunProgress, one_by_one
from lamina.simulator.steady_state.closed_form import estimate
from lamina.simulator.traces.demand import Demand

_PRICE_STEPS, _PRICE_HALVINGS = 160, 24
"""Prices that are tried from 1 to the farthest factor, and halvings between the two where the winner changes."""
_ROUNDING = 1e-9
"""The relative error of sums. A candidate that leads by less does not replace the winner, and a budget that just pays
for a replica does pay for it."""
_CHECKED_TOGETHER = 4
"""Candidates that are checked at the same time, while the first at today's prices is looked for."""
_SERVES_ALL_FACTOR = 1e30
"""The score of a candidate that serves the whole demand is multiplied by this. So it comes before each candidate that
does not, whatever that one gives for a dollar."""
_Floats = NDArray[np.float64]
Unseen = Callable[[str, float, float], Sequence[Ranked]]
"""(device, factor, most) -> candidates, by formula, that are within the budget only once that device's price is
`factor` times what it is, and that then cost less than `most` dollars an hour."""


@dataclass(frozen=True, slots=True)
class Change:
    """At `factor` times what something is, and beyond, `winner` takes the first place."""

    factor: float
    winner: str


class Checks(Protocol):
    """The event loop, and what it need not run."""

    def sure(self, ranked: Ranked) -> bool:
        """Whether the standing of that candidate is known."""
        ...

    def checked(self, some: Sequence[Ranked]) -> list[Ranked]:
        """These, so that it is."""
        ...

    def run(self, ranked: Ranked) -> Ranked:
        """The candidate after a run."""
        ...


class Prices:
    """All candidates within `budget` dollars an hour (None: any), the winner first.

    `loop` checks a candidate that would be first; None: formulas are believed. `unseen` lists further candidates, which
    a lower price brings within the budget.

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

    def settle(self) -> Prices:
        """Put the winner at these prices first, after a run of its own."""
        while True:
            if unsure := self._unsure():
                self._check(unsure)
                continue
            place = self._place("", 1.0)
            if self._loop is not None and self._every[place].result is None:
                self._every[place] = self._loop.run(self._every[place])
                self._columns()
                continue
            self._every.insert(0, self._every.pop(place))
            self._columns()
            return self

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
                return Change(factor, self._every[place].name)
            self._check([place])

    def _believed(self, place: int) -> bool:
        """Whether that candidate's standing is believed."""
        return self._loop is None or self._loop.sure(self._every[place])

    def _check(self, places: Sequence[int]) -> None:
        """Have these candidates checked, which may stand otherwise then."""
        if self._loop is not None:
            for place, result in zip(places, self._loop.checked([self._every[n] for n in places]), strict=True):
                self._every[place] = result
            self._columns()

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

    def _columns(self) -> None:
        """Set the columns that `_keys` computes with: one number for each candidate, in the order of places."""
        every = self._every if self._loop is None else [entry.hoped for entry in self._every]
        self._serves = np.array([entry.serves for entry in every])
        self._goodput = np.array([entry.goodput for entry in every])
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
RIVALS, _NEAR = 6, 0.75
"""Of other mixes of devices, the best so many that serve all are compared with the winner, and the cheapest that with a
replica fewer, or with all that there may be, serve this part of it."""
_STEPS, _HALVINGS = 4, 5
"""Factors that are tried up to the farthest, and halvings between the two where the winner changes."""
_CLEARLY = 1 + 1e-9
"""A rival comes before the winner where it gives more than this many times as much."""
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
            for word, change in (("more", self.rise), ("less", self.fall))
            if change is not None
        ]
        words = "; ".join(changes)
        if not changes:
            words = f"the winner does not change up to {self.farthest:g}x either way"
        if not self.rivals:
            words = "there is no other candidate"
        return f"{self.what}, now {plain(self.now)} {self.unit}: {words}"


class Changes:
    """Winner and rivals under changes of anything but prices."""

    def __init__(
        self,
        ranked: Sequence[Ranked],
        demand: Demand,
        slo: Slo,
        prefill: bool,
        *,
        progress: Progress | None = None,
        mapped: Mapped = one_by_one,
    ) -> None:
        self._winner = ranked[0]
        serving = [entry for entry in mixes(ranked) if entry.serves and entry is not ranked[0]]
        near = sorted((entry for entry in ranked[1:] if entry.hopeful > _NEAR), key=lambda entry: -entry.hopeful)
        cheap = sorted(mixes(near), key=lambda entry: entry.hoped_price)
        self._rivals = list(dict.fromkeys([*serving[:RIVALS], *cheap[:RIVALS]]))
        self._demand, self._slo, self._prefill = demand, slo, prefill
        self._progress, self._mapped = progress, mapped

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
        """The nearest factor between 1 and `farthest` at which another is first."""
        before = 1.0
        for step in range(1, _STEPS + 1):
            factor = farthest ** (step / _STEPS)
            rival = self._first(quantity, factor, some=True)
            if rival is None:
                before = factor
                continue
            for _ in range(_HALVINGS):
                middle = math.sqrt(before * factor)
                if self._first(quantity, middle, some=True) is None:
                    before = middle
                else:
                    factor = middle
            return Change(factor, (self._first(quantity, factor) or rival).name)
        return None

    def _first(
        self, quantity: Quantity, factor: float, some: bool = False, partly: bool | None = None
    ) -> Ranked | None:
        """The best of the rivals that are before the winner at that factor, or `some` that is. What serves a part
        counts only where nothing serves all."""
        if partly is None:
            partly = not self._winner.serves or math.isinf(self._demand.rate)

        def then(each: Ranked, fine: bool) -> tuple[bool, float, int]:
            return self._then(each, quantity.change(self._now(each), factor), fine, partly)

        best, first = None, then(self._winner, True)
        least = first[0], first[1] * _CLEARLY
        coarse = [(then(rival, False), rival) for rival in self._rivals]
        for hoped, rival in sorted(coarse, key=lambda pair: pair[0][:2], reverse=True):
            if hoped[:2] <= least or (some and best is not None):
                break
            standing = then(rival, True)
            if standing[:2] > least:
                least, best = standing[:2], replace(rival, estimate=replace(rival.estimate, replicas=standing[2]))
        if best is None and not first[0] and not partly:
            return self._first(quantity, factor, some, True)
        return best

    def _now(self, each: Ranked) -> Situation:
        return Situation(each.candidate.system, self._demand, self._slo)

    def _then(self, each: Ranked, situation: Situation, fine: bool, partly: bool) -> tuple[bool, float, int]:
        """How a candidate stands then: whether it serves all, what it gives, and with how many replicas."""
        if situation == self._now(each):  # it does not depend on this
            return each.serves, each.goodput_per_dollar / handicap(each), each.estimate.replicas
        if not fits(situation.system):
            return False, 0.0, 1
        count, needed, demand = each.candidate.replicas, ATTAINMENT - each.bias, situation.demand
        then = estimate(situation.system, count, demand, situation.slo, self._prefill, fine, needed, partly)
        return then.serves, then.goodput_per_dollar / handicap(each), then.replicas


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


def plain(value: float) -> str:
    """Three digits, and no powers of ten where people count."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
