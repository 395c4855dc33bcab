"""What KV policies have saved at one part; `Announced` carries it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lamina_protocols.errors import ProtocolError

_MOST_MASS = 2.0**62  # as many queries as there may be


def _check_mass(value: float) -> None:
    if not 0 <= value <= _MOST_MASS:
        raise ProtocolError(f"attention mass of {value:g}, allowed: 0 to {_MOST_MASS:g}")


@dataclass(frozen=True, slots=True)
class Usage:
    """What policies have saved at one part. All numbers are counted, none is computed from a formula.

    `read` and `whole` are of decode so far, over all its layers and KV heads: the bytes read, of KV and to choose among
    it, and the bytes that reading everything would have taken. `missed` is the sum, over `queries` query vectors, of
    the estimated attention mass that they did not read; `worst` is the largest; `coarse` is the sum of what they read
    in 4 bits. `held` pages are in use now, where keeping everything would take `kept`; `resident` of them are in
    memory.
    """

    read: int
    whole: int
    missed: Annotated[float, _check_mass]
    queries: int
    worst: Annotated[float, _check_mass]
    held: int
    kept: int
    resident: int
    coarse: Annotated[float, _check_mass] = 0.0
