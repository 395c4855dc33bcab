"""The price of a device at which another candidate wins: over all candidates, as they stand under other prices.

Neither an estimate nor a run of the event loop depends on prices, so a candidate's standing at any price follows from
the one that it has. What would be first there by formula alone is checked by the event loop before it is believed.
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
from lamina.simulator.costs.systems import System
from lamina.simulator.planning.candidates import Candidate
from lamina.simulator.planning.planner import Ranked, reachable
from lamina.simulator.planning.quantities import changed_devices
from lamina.simulator.planning.ties import handicap

_STEPS, _HALVINGS = 160, 24
"""Factors that are looked at up to the farthest, and halvings between the two of them where the winner changes."""
_CERTAIN = 1e-9
_TOGETHER = 4
"""Candidates that are checked at the same time, where the first at these prices is looked for."""
_SERVES = 1e30
"""What serves all comes before what does not, whatever the latter gives for a dollar."""
_Floats = NDArray[np.float64]
Unseen = Callable[[str, float, float], Sequence[Ranked]]


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

    `loop` checks what would be first by formula; None: formulas are believed. `unseen(device, factor, most)` lists
    candidates, by formula, that are within the budget once the device's price is so many times what it is, and then
    cost less than `most`.
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
            device.name: device.price for each in self._every for device, _ in each.candidate.system.devices
            if device.price
        }  # fmt: skip

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
        found = self._every[place]
        return self._loop is None or found.candidate in self._checked or self._loop.full(found)

    def _check(self, places: Sequence[int]) -> None:
        """Have the event loop run these candidates, which may stand otherwise then."""
        if self._loop is not None:
            some = [self._every[place] for place in places]
            self._checked.update(each.candidate for each in some)
            for place, found in zip(places, self._loop.checked(some), strict=True):
                self._every[place] = found
            self._columns()

    def _confirm(self, place: int) -> bool:
        """Whether that candidate has run on all of the trace. If not it does now, and may stand otherwise."""
        found = self._every[place]
        if self._loop is None or found.candidate in self._confirmed:
            return True
        self._confirmed.add(found.candidate)
        self._every[place] = self._loop.whole(found)
        self._columns()
        return False

    def _most(self, name: str, factor: float) -> float:
        """What the winner costs at that price; infinite where it doesn't serve all, or all that can be."""
        first = self._every[0]
        if not first.serves or math.isinf(first.estimate.demanded):
            return math.inf
        share = sum(device.price * n for device, n in first.candidate.system.devices if device.name == name)
        return first.estimate.price + first.estimate.replicas * share * (factor - 1)

    def winner(self, name: str, factor: float) -> Ranked:
        """What is first where that device costs so many times what it does."""
        return self._every[self._place(name, factor)]

    def _unsure(self) -> list[int]:
        """The places of the first candidates at these prices, the best first, as far as they are not believed."""
        first, key = self._place("", 1.0), self._keys("", np.array([1.0]))[:, 0]
        order = [first, *np.argsort(-key, kind="stable")[:_TOGETHER].tolist()]
        return list(dict.fromkeys(takewhile(lambda place: not self._believed(place), order)))[:_TOGETHER]

    def _place(self, name: str, factor: float) -> int:
        return int(self._first(name, np.array([factor]))[0])

    def _add(self, more: Sequence[Ranked]) -> None:
        known = {without_prices(each.candidate.system) for each in self._every}
        self._every += [each for each in more if without_prices(each.candidate.system) not in known]
        self._columns()

    def _counted(self, each: Ranked) -> float:
        """Requests a second within the SLO. Of one that the event loop has not run for long, as many as it may find."""
        if self._loop is None or self._loop.full(each):
            return each.goodput
        return max(each.goodput, reachable(each))

    def _columns(self) -> None:
        """One number for each candidate."""
        every = self._every
        self._serves = np.array([each.serves for each in every])
        self._goodput = np.array([self._counted(each) for each in every])
        self._handicap = np.array([handicap(each) for each in every])
        self._replicas = np.array([float(each.estimate.replicas) for each in every])
        self._unit = np.array([each.estimate.price / each.estimate.replicas for each in every])

    def _first(self, name: str, factors: _Floats) -> NDArray[np.intp]:
        """The place of the first candidate at each of these factors; among equals the one that is before the other."""
        key = self._keys(name, factors)
        best = np.argmax(key, axis=0)
        return np.where(key[0] * (1 + _CERTAIN) >= key[best, np.arange(key.shape[1])], 0, best)

    def _keys(self, name: str, factors: _Floats) -> _Floats:
        """How each candidate stands at each of these factors: more is better."""
        share = [sum(d.price * n for d, n in each.candidate.system.devices if d.name == name) for each in self._every]
        unit = self._unit[:, None] + np.array(share)[:, None] * (factors - 1)
        replicas = np.broadcast_to(self._replicas[:, None], unit.shape)
        serves = np.broadcast_to(self._serves[:, None], unit.shape)
        goodput = self._goodput[:, None]
        if self._budget is not None:
            allowed = np.floor(self._budget / np.maximum(unit, 1e-300) + _CERTAIN)
            fewer = np.minimum(allowed, replicas)
            serves = serves & (fewer == replicas)
            goodput = goodput * fewer / replicas
            replicas = fewer
        cost = np.maximum(unit * replicas, 1e-12)
        score = np.where(replicas > 0, goodput / cost / self._handicap[:, None], -1.0)
        return np.where(serves, _SERVES * score, score)

    def _nearest(self, name: str, farthest: float) -> tuple[float, int]:
        """The factor nearest to 1 at which the winner is not first, and the place of what is: 0 where it always is."""
        factors = farthest ** (np.arange(1, _STEPS + 1) / _STEPS)
        firsts = self._first(name, factors)
        changed = np.flatnonzero(firsts)
        if not changed.size:
            return farthest, 0
        at = int(changed[0])
        before, factor, place = (float(factors[at - 1]) if at else 1.0), float(factors[at]), int(firsts[at])
        for _ in range(_HALVINGS):
            middle = math.sqrt(before * factor)
            if first := self._place(name, middle):
                factor, place = middle, first
            else:
                before = middle
        return factor, place


def without_prices(system: System) -> System:
    """The system as it would be if all devices were free: equal for all prices."""
    return changed_devices(system, lambda device: replace(device, price=0.0))


def at_price(device: Device, name: str, factor: float) -> Device:
    """The device, at so many times its price if it has that name."""
    return replace(device, price=device.price * factor) if device.name == name else device
