"""How far off a predicted number may be: factors of a 90 % interval, from what predictions of its class missed.

`uncertainty.toml` beside this file has them, each with its source. Classes are by whose efficiency the devices have
(an engine's that was measured on GPUs, though another one is planned; a measurement of the machine at hand; the bare
roofline) and by the kind of model. Errors of different sources are independent here, so that logarithms of their
factors add as squares do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lamina.errors import InvalidRequest
from lamina.simulator.costs.bounds import Text
from lamina.simulator.costs.hardware import ROOFLINE, Device, Efficiency, load
from lamina.simulator.costs.systems import Colocated, System
from lamina.system.toml_models import Table, read_tables, validated

Factors = tuple[float, float]
"""What is true is within a predicted number times the first and times the second, in nine of ten cases."""
RATIO_ERROR = {"small": 0.2, "dense": 0.2, "sparse": 0.35}
"""How far a ratio of two systems' throughput is off, by the kind of model: of pairs of measured cells that differ in
their tensor parallel size or device alone 86, 91 and 100 % are within it (scripts/simulate_engines.py)."""
_MEASURED = ("h100", "h200")
"""The devices that engines' efficiencies are fitted on."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A predicted number and the bounds between which it is in nine of ten cases. Raises InvalidRequest where `low` to
    `high` does not hold `value`."""

    low: float
    value: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:  # NaN compares false
            raise InvalidRequest(f"an interval is {self}; allowed is low <= value <= high")


@dataclass(frozen=True, slots=True)
class Spread:
    """Factors around predicted TPOT, TTFT and goodput (tokens or requests a second)."""

    tpot: Factors = (1.0, 1.0)
    ttft: Factors = (1.0, 1.0)
    goodput: Factors = (1.0, 1.0)

    def beside(self, other: Spread) -> Spread:
        """The spread of a number that has both kinds of errors."""
        return self._with(other, _combined)

    def widest(self, other: Spread) -> Spread:
        """The spread of a number that is in both classes: the wider bound of each."""
        return self._with(other, lambda a, b: (min(a[0], b[0]), max(a[1], b[1])))

    def _with(self, other: Spread, both: Callable[[Factors, Factors], Factors]) -> Spread:
        return Spread(both(self.tpot, other.tpot), both(self.ttft, other.ttft), both(self.goodput, other.goodput))


def spread(system: System) -> Spread:
    """How far off what is predicted of a system may be."""
    kind = system.model.kind
    widest = functools.reduce(Spread.widest, [_of_device(device, kind) for device, _ in system.devices])
    return widest if isinstance(system, Colocated) else widest.beside(_table()["wire", kind])


def _of_device(device: Device, kind: str) -> Spread:
    """The spread of one device, which is wider where an engine's efficiency was not measured on it."""
    name = basis(device.efficiency)
    measured_spread = _table()[name, kind]
    measured = name != "engine" or device.name in _MEASURED
    return measured_spread if measured else measured_spread.beside(_table()["elsewhere", kind])


def basis(efficiency: Efficiency) -> str:
    """Whose efficiency that is: of an "engine" of the packaged catalogue, "roofline", or "measured": a file's own."""
    if efficiency == ROOFLINE:
        return "roofline"
    return "engine" if efficiency in load().engines.values() else "measured"


@functools.cache
def _table() -> Mapping[tuple[str, str], Spread]:
    return read_tables(Path(__file__).with_name("uncertainty.toml"), _read)


_Bounds = tuple[Annotated[float, Field(ge=0.01, le=1)], Annotated[float, Field(ge=1, le=100)]]


class _Entry(Table):
    basis: str
    models: tuple[Literal["small", "dense", "sparse"], ...]
    tpot: _Bounds
    ttft: _Bounds
    goodput: _Bounds
    source: Text


class _File(Table):
    spread: tuple[_Entry, ...]


def _read(data: Mapping[str, Any]) -> dict[tuple[str, str], Spread]:
    return {
        (entry.basis, kind): Spread(entry.tpot, entry.ttft, entry.goodput)
        for entry in validated(_File, data).spread
        for kind in entry.models
    }


def _combined(a: Factors, b: Factors) -> Factors:
    low, high = (math.hypot(math.log(x), math.log(y)) for x, y in zip(a, b, strict=True))
    return math.exp(-low), math.exp(high)
