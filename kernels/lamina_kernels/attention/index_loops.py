"""The compiled loop over index keys: what each scores for some index queries.

Strips of keys stream through; each is read once for all queries of a piece, while the next one is fetched. Nothing here
is checked: addresses and sizes come from `scores`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, literally, njit, types

from lamina_kernels.attention import microkernels as micro
from lamina_kernels.attention import moves as cpu_moves
from lamina_kernels.attention.microkernels import ROW, TILE, Dot
from lamina_kernels.attention.moves import PAGES
from lamina_kernels.compile import emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.emitter import Kind
from lamina_kernels.compile.intrinsics import pointer, take
from lamina_kernels.compile.launch import HEADER, TAKEN, source_fingerprint

SCRATCH = TILE * ROW  # bytes that a piece needs
PIECE = np.dtype(
    [
        ("table", "i8"),  # address of the pages' numbers, int32
        ("begin", "i8"),  # the first strip of 16 * unit keys
        ("end", "i8"),
        ("rows", "i8"),  # index queries
        ("panel", "i8"),  # address of them, as `dot` reads them
        ("of_q", "i8"),  # address of what a unit of each is worth, for INT8 alone
        ("weights", "i8"),  # address of the weight of each, 0: there are none
        ("scores", "i8"),  # address of the scores of the first `heads` of them
    ]
)
SCORES = np.dtype(
    [*HEADER, *PAGES, *((name, "i8") for name in ("pieces", "scratch", "heads", "stride", "steps", "words"))]
)


@njit  # type: ignore[untyped-decorator]
def _floats(address: int, n: int) -> Any:
    return carray(pointer(address), (n,), np.float32)


@njit  # type: ignore[untyped-decorator]
def _add_up(a: Any, piece: Any, row: int, rows: int, logits: int, strip: int, width: int) -> None:
    """Make scores of the products of queries row, ..., row + rows - 1 with a strip of keys."""
    for r in range(rows):
        number = row + r
        of_row = _floats(logits + r * ROW, width)
        score = _floats(piece.scores + (number // a.heads * a.stride + strip * width) * 4, width)
        first = number % a.heads == 0
        if piece.weights:
            weight = _floats(piece.weights, number + 1)[number]
            for i in range(width):
                added = weight * max(of_row[i], np.float32(0.0))
                score[i] = added if first else score[i] + added
        elif first:
            for i in range(width):
                score[i] = of_row[i]
        else:
            for i in range(width):
                score[i] = max(score[i], of_row[i])


@njit  # type: ignore[untyped-decorator]
def _strip(a: Any, table: Any, strip: int, width: int) -> tuple[int, int]:
    """Addresses of a strip of index keys, and of their scales."""
    page, offset = strip * width // a.page_size, strip * width % a.page_size
    page_address = a.arena + np.int64(table[page]) * a.page_bytes
    return page_address + (a.d_k * a.page_size + offset * a.k_pack) * a.itemsize, page_address + a.kv_bytes + offset * 4


@njit  # type: ignore[untyped-decorator]
def _score_pieces(kind: int, unit: int, block: Any) -> None:
    kind, unit = literally(kind), literally(unit)
    a = carray(block, (1,), SCORES)[0]
    pieces = carray(pointer(a.pieces), (a.shares,), PIECE)
    width, stride = 16 * unit, a.page_size * a.itemsize * a.k_pack
    share = take(block, TAKEN)
    while share < a.shares:
        piece, logits = pieces[share], a.scratch + share * SCRATCH
        table = carray(pointer(piece.table), (piece.end * width // a.page_size + 1,), np.int32)
        for strip in range(piece.begin, piece.end):
            keys, of_k = _strip(a, table, strip, width)
            ahead, _ = _strip(a, table, min(strip + 1, piece.end - 1), width)
            for row in range(0, piece.rows, TILE):
                rows = min(TILE, piece.rows - row)
                panel, far = piece.panel + row * a.words * 4, ahead if row == 0 else keys
                of_q = piece.of_q + row * 4
                one = np.float32(1.0)
                micro.dot(kind, unit, Dot(rows, panel, keys, far, logits, a.steps, stride, of_q, of_k, one))
                _add_up(a, piece, row, rows, logits, strip, width)
        share = take(block, TAKEN)


@cache
def score_kernel(kind: Kind, unit: int) -> int:
    """The address of the kernel for strips of 16 * unit keys, compiled where numba's cache on disk does not have it."""
    code = int(kind)
    fingerprint = source_fingerprint(micro, intrinsics, emitter, launching, cpu_moves)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _score_pieces(code, unit, block)

    return int(kernel.address)
