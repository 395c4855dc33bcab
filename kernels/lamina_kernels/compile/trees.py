"""Sixteen vectors of 16 lanes reduced to one by a tree of shuffles: LLVM IR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from lamina_kernels.compile.emitter import I32, VI, Emitter, Value

LINE = 64  # bytes of a row: a vector in memory


def _order(*lanes: Sequence[int]) -> Value:
    return ir.Constant(VI, [ir.Constant(I32, i) for lane in lanes for i in lane])


# The masks of a tree's four levels: which lanes of two vectors face each other.
_LEVELS = [
    (
        _order(*[(4 * k, 16 + 4 * k, 4 * k + 1, 17 + 4 * k) for k in range(4)]),
        _order(*[(4 * k + 2, 18 + 4 * k, 4 * k + 3, 19 + 4 * k) for k in range(4)]),
    ),
    (
        _order(*[(4 * k, 4 * k + 1, 16 + 4 * k, 17 + 4 * k) for k in range(4)]),
        _order(*[(4 * k + 2, 4 * k + 3, 18 + 4 * k, 19 + 4 * k) for k in range(4)]),
    ),
    (_order(range(8), range(16, 24)), _order(range(8, 16), range(24, 32))),
    (
        _order(range(4), range(8, 12), range(16, 20), range(24, 28)),
        _order(range(4, 8), range(12, 16), range(20, 24), range(28, 32)),
    ),
]


def tree(e: Emitter, rows: Value, kind: Any, join: Callable[[Value, Value], Value]) -> Value:
    """A vector whose lane i joins the 16 lanes of row i, for 16 rows from a pointer on."""

    def reduced(first: int, level: int) -> Value:
        if level < 0:
            return e.load(e.at(rows, LINE * first), kind)
        a, b = reduced(first, level - 1), reduced(first + (1 << level), level - 1)
        return join(*(e.b.shuffle_vector(a, b, mask) for mask in _LEVELS[level]))

    return reduced(0, len(_LEVELS) - 1)
