"""Costs of batches of decode alone: computed for contexts 4 % apart, and straight between them."""

from __future__ import annotations

import math

from lamina.simulator.costs.cost_model import Load, StepCost
from lamina.simulator.costs.systems import System

_GRID = 16
"""Contexts to a doubling whose seconds are computed."""
_STRIDE = 2 ** (1 / _GRID) - 1
Numbers = tuple[float, float, float, float, float]
"""The numbers of a `StepCost`: seconds, those of model, attention and network, and bytes over the link."""


class DecodeCosts:
    """Costs of batches of decode alone, remembered for all instances of a system."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._known: dict[tuple[int, int], tuple[float, StepCost, StepCost]] = {}

    def __call__(self, batch: int, context: int) -> Numbers:
        """The cost of a batch of so many sequences, with so many tokens in all."""
        mean = context / batch
        return self._between(mean, *self._ends(batch, mean))

    def line(self, batch: int, context: int) -> tuple[float, Numbers, Numbers]:
        """The mean context up to which costs go straight on, what a step costs, and what the step after it costs."""
        mean = context / batch
        low, a, b = self._ends(batch, mean)
        return low * (1 + _STRIDE), self._between(mean, low, a, b), self._between(mean + 1, low, a, b)

    def _ends(self, batch: int, mean: float) -> tuple[float, StepCost, StepCost]:
        place = int(math.log2(mean) * _GRID)
        found = self._known.get((batch, place))
        if found is None:
            low, high = 2 ** (place / _GRID), 2 ** ((place + 1) / _GRID)
            step = self._system.step
            found = self._known[batch, place] = low, step(Load(batch, low)), step(Load(batch, high))
        return found

    def _between(self, mean: float, low: float, a: StepCost, b: StepCost) -> Numbers:
        part = (mean - low) / (low * _STRIDE)
        return (
            a.seconds + part * (b.seconds - a.seconds),
            a.model + part * (b.model - a.model),
            a.attention + part * (b.attention - a.attention),
            a.network + part * (b.network - a.network),
            a.link_bytes + part * (b.link_bytes - a.link_bytes),
        )
