"""How far off a predicted number may be: factors of a 90 % interval."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.simulator.costs.systems import System


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    value: float
    high: float


@dataclass(frozen=True, slots=True)
class Spread:
    tpot: tuple[float, float]
    ttft: tuple[float, float]
    goodput: tuple[float, float]
    source: str = ""


def spread(system: System) -> Spread:
    return Spread((0.8, 1.25), (0.7, 1.4), (0.8, 1.25))
