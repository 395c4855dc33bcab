"""Rows that are multiplied in groups, each with a matrix of its own: what the kernels of linear maps have in common.

A plan is int64 numbers: how many groups there are, how many rows, and GROUP numbers for each group: its matrix, its
first row, and where its rows end. Without a plan all rows are one group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from lamina_kernels.compile.intrinsics import pointer

FIELDS = ("plan", "weights", "order", "identity")
"""Of an argument block. weights: addresses of matrices. order: numbers of rows of x, by row of the groups; 0: as they
are. identity: IDENTITY."""

HEAD, GROUP = 2, 3
_NUMBERS = np.arange(64, dtype=np.int64)
IDENTITY = int(_NUMBERS.ctypes.data)
"""The address of the numbers from 0 on."""


@njit  # type: ignore[untyped-decorator]
def count_of(a: Any) -> Any:
    """How many groups a block has."""
    return carray(pointer(a.plan), (HEAD,), np.int64)[0] if a.plan else 1


@njit  # type: ignore[untyped-decorator]
def group_of(a: Any, i: int) -> Any:
    """First row, end and the matrix of group i."""
    if not a.plan:
        return 0, a.rows, a.w
    group = carray(pointer(a.plan + 8 * (HEAD + GROUP * i)), (GROUP,), np.int64)
    return group[1], group[2], carray(pointer(a.weights + 8 * group[0]), (1,), np.int64)[0]


@njit  # type: ignore[untyped-decorator]
def rows_from(a: Any, row: int, row_bytes: int) -> Any:
    """Where rows of x begin, and the address of the numbers of those that are row `row` and the ones behind it."""
    if a.order:
        return a.x, a.order + 8 * row
    return a.x + row * row_bytes, a.identity
