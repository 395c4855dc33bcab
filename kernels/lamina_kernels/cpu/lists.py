"""Deals lists of pages to threads, compiled: in numpy the arithmetic of `schedule` takes longer than the attention.

Every list is one output; where a share ends inside one it is cut, at a multiple of 32 tokens, and its parts merge.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
from numba import from_dtype, int32, int64

from lamina_kernels.paged.rows import EVERYTHING, Ints, Table
from lamina_kernels.paged.schedule import FIXED, MIN_KEYS, PIECE, READ, Pieces

_CUT = 32  # tokens


def deal_lists(pieces: Pieces, starts: Ints, lists: Table, lengths: Ints, group: int, size: int, n_pages: int) -> int:
    """Fill in pieces `[items + shares]` and starts `[shares + 1]` as `schedule.deal` does. Returns the first list that
    names a page outside [0, n_pages), -1 where none does."""
    bad: int = deal_lists_kernel()(pieces, starts, lists, lengths, group, size, n_pages, lists.ctypes.data)
    return bad


@cache
def deal_lists_kernel() -> Any:
    """The compiled loop."""
    record = from_dtype(PIECE)
    signature = int64(record[::1], int64[::1], int32[:, ::1], int64[::1], int64, int64, int64, int64)
    return numba.njit(signature, cache=True)(_deal)


def _deal(pieces: Any, starts: Any, lists: Any, lengths: Any, group: int, size: int, n_pages: int, address: int) -> int:
    items, most = lists.shape
    shares = len(starts) - 1
    rate, total = group + READ, 0
    for i in range(items):
        for e in range((lengths[i] + size - 1) // size):
            if lists[i, e] < 0 or lists[i, e] >= n_pages:
                return i
        total += (lengths[i] + FIXED) * rate
    n, share, done, partials = 0, 0, 0, 0
    starts[0] = 0
    for i in range(items):
        lo, hi, first = 0, lengths[i], n
        while True:
            piece = pieces[n]
            piece.q, piece.stride, piece.group, piece.rows = i * group, group, group, group
            piece.position, piece.lo, piece.hi, piece.window = hi, lo, hi, EVERYTHING
            piece.table, piece.layer_stride, piece.listed = address + i * most * 4, 0, 0
            piece.bias, piece.bias_stride, piece.output, piece.parts, piece.partial = 0, 0, i, 1, -1
            n += 1
            edge = total * (share + 1) // shares
            if share + 1 >= shares or done + (hi - lo + FIXED) * rate <= edge:
                done += (hi - lo + FIXED) * rate
                break
            key = lo + (edge - done) // rate // _CUT * _CUT
            share += 1
            if hi - key < MIN_KEYS:  # this share takes it whole
                done += (hi - lo + FIXED) * rate
                starts[share] = n
                break
            if key - lo < MIN_KEYS:  # the next share takes it whole
                n -= 1
                starts[share] = n
                continue
            piece.hi = key
            done += (key - lo) * rate
            starts[share] = n
            lo = key
        if n - first > 1:
            pieces[first].parts = n - first
            for at in range(first, n):
                pieces[at].partial = partials
                partials += group
    while share < shares:
        share += 1
        starts[share] = n
    return -1
