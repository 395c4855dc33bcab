"""Weights that stay in few bits: bytes of one of them, scales and the padding of the kernels' order included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lamina.errors import InvalidRequest
from lamina.simulator.costs.bounds import number_within, text
from lamina_kernels.packed.layout import LAYOUTS, ROWS, Format

FLOATS: Mapping[str, float] = {"float32": 4.0, "bfloat16": 2.0}
"""Bytes of a weight that is not packed."""
QUANTIZED = ("int4", "int8")
"""What an engine makes of floats while it loads them; the other kinds are those of a file."""
FORMATS: Mapping[str, Format] = {
    "int4": Format.U4, "int8": Format.U8, "q4_0": Format.U4, "q4_1": Format.U4M, "q5_0": Format.U5, "q5_1": Format.U5M,
    "q8_0": Format.U8, "q4_k": Format.K4, "q5_k": Format.K5, "q6_k": Format.K6,
    "mxfp4": Format.F4,
}  # fmt: skip
"""What each kind becomes in memory; tables of int4 are int8. AWQ, and GPTQ with zero points, take what q4_1 takes."""
_LEAST, _MOST = 0.125, 4.0


@dataclass(frozen=True, slots=True)
class Packing:
    """Matrices whose weights take `nbytes` bytes each, those of the input table and the head `table` bytes (0: as the
    others). Norms and biases stay floats.

    `name` is one of `FORMATS`, or stands for a mix of them. Raises InvalidRequest for a number out of bounds.
    """

    name: str
    nbytes: float
    table: float = 0.0

    def __post_init__(self) -> None:
        text("name of a packing", self.name, 80)
        number_within(f"bytes a weight of {self.name!r}", self.nbytes, _LEAST, _MOST)
        if self.table:
            number_within(f"bytes a weight of the tables of {self.name!r}", self.table, _LEAST, _MOST)


def packing(name: str) -> Packing:
    """The packing of that name, in any case; or of a mix, given as the mean bytes of a weight, such as "0.61". Raises
    InvalidRequest, which lists the names."""
    kind = name.lower()
    if kind in FORMATS:
        return Packing(kind, _nbytes(kind), _nbytes("int8") if kind == "int4" else 0.0)
    try:
        return Packing("packed", float(name))
    except ValueError:
        raise InvalidRequest(
            f"weights is {name!r:.80}; allowed are {', '.join((*FLOATS, *FORMATS))}, or the bytes of a weight, scales "
            f"included, from {_LEAST} to {_MOST:g}"
        ) from None


def _nbytes(kind: str) -> float:
    layout = LAYOUTS[FORMATS[kind]]
    return layout.record / (ROWS * layout.group)
