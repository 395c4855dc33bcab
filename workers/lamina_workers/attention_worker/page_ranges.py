"""Rows over ranges of keys: a page table of only the pages that hold them, in which keys and queries move up.

A window that ends inside a range moves with each query, and it moves over pages that are left out at once: there the
queries are cut apart. Where a table's pages begin elsewhere than those of the ranges, biases hide what is between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lamina_kernels.paged.rows import EVERYTHING, Bias, Ints, Table
from lamina_workers.policies.policy import View


@dataclass(frozen=True, slots=True)
class RangeRow:
    """Queries at positions `position`, ..., of which there are `count`, over a table of fewer pages, which begins where
    the whole one does: there they are at `start`, ..., read [lo, hi) and see what is within `window`."""

    position: int
    count: int
    start: int
    lo: int
    hi: int
    window: int
    table: Table
    bias: Bias | None


def range_rows(view: View, lo: int, hi: int, base: int, table: Table, size: int) -> Iterator[RangeRow]:
    """The rows of a view with ranges, that may read positions [lo, hi). `table`, int32 `[layers, heads, entries]`, has
    the pages, of `size` tokens, from position `base` on."""
    if view.ranges is None:
        raise ValueError(f"the view from {view.start} on has no ranges")
    last = view.start + view.count - 1
    lowest = max(lo, view.start - view.window + 1)
    ends = np.clip(view.ranges, lowest, max(lowest, min(hi, last + 1)))
    ends = ends[ends[:, 0] < ends[:, 1]] - base
    if not len(ends):
        yield RangeRow(view.start, view.count, view.start, base, base, EVERYTHING, table[:, :, :0], None)
        return
    begin, stop = ends[:, 0] // size, -(-ends[:, 1] // size)
    begin[1:] = np.maximum(begin[1:], stop[:-1])  # two ranges may share a page of a table that begins elsewhere
    place = np.cumsum(stop - begin) - (stop - begin)  # where each range's pages go
    moved = (begin - place) * size  # by how much each range's positions move
    slots = np.arange(place[-1] + stop[-1] - begin[-1]) + np.repeat(begin - place, stop - begin)
    chosen, shift = np.take(table, slots, 2), int(moved[-1])
    bias = _bias(view, slots, base, chosen, size) if ((view.ranges - base) % size).any() else None
    first, end = int(ends[0, 0] + base - moved[0]), int(ends[-1, 1] + base - shift)
    edges = np.stack([begin, stop], 1) * size + base
    for position, until in pairwise(_cuts(view, edges)):
        hidden = position - view.window + 1  # the lowest key that this query's window shows
        at = int(np.searchsorted(edges[:, 1], hidden, "right"))  # the first range above, or around
        low, window = first, EVERYTHING
        if at == len(edges):
            low = end
        elif hidden >= edges[at, 0]:
            window = view.window - (shift - int(moved[at]))
        else:
            low = max(first, int(edges[at, 0] - moved[at]))
        yield RangeRow(position, until - position, position - shift, low, end, window, chosen, bias)


def _cuts(view: View, edges: Ints) -> list[int]:
    """Where the queries of a view are cut: from one to the next, windows end in the same range, or between the same."""
    start, end = view.start, view.start + view.count
    if view.window >= EVERYTHING:
        return [start, end]
    inside = np.unique(edges + view.window - 1)
    return [start, *inside[(inside > start) & (inside < end)].tolist(), end]


def _bias(view: View, slots: Ints, base: int, table: Table, size: int) -> Bias:
    """float32, the shape of the table's slots: -inf for tokens outside the ranges."""
    keys = (slots[:, None] * size + np.arange(size)).reshape(-1) + base
    hidden = np.where(view.ranged(keys), 0, -np.inf).astype(np.float32)
    return np.broadcast_to(hidden, (*table.shape[:2], len(hidden)))
