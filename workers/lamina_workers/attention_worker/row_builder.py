"""From policies to the rows that kernels take (`RowBuilder`): which vectors of q see which keys of a page table.

Pure arithmetic on numbers. It serves the past at a holder and the fresh tokens at the model worker alike, so static
policies give the same text however a prompt is cut and sharded.

A policy may let queries see ranges of keys (`range_rows`). Then the row's table has the pages of these ranges alone,
side by side, and keys and queries get lower positions. A window that ends inside a range moves with each query, and
skips the pages that were left out: there the queries are cut into several rows. Where a table's pages begin elsewhere
than those of the ranges, biases hide the tokens between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from lamina_kernels.paged.rows import EVERYTHING, Bias, Ints, Rows, Table
from lamina_workers.policies.policy import Policy, View


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
    ranges = np.clip(view.ranges, lowest, max(lowest, min(hi, last + 1)))
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    if not len(ranges):
        yield RangeRow(view.start, view.count, view.start, base, base, EVERYTHING, table[:, :, :0], None)
        return
    packed = _packed(view, ranges, base, table, size)
    query_shift = int(packed.shifts[-1])  # queries are behind all ranges
    for position, until in pairwise(_cuts(view, packed.edges)):
        first_key = position - view.window + 1  # the lowest key that this query's window shows
        number = int(np.searchsorted(packed.edges[:, 1], first_key, "right"))  # the first range with such a key
        row_lo, window = packed.lo, EVERYTHING
        if number == len(packed.edges):
            row_lo = packed.hi
        elif first_key >= packed.edges[number, 0]:  # the window ends inside this range, and moves with each query
            window = view.window - (query_shift - int(packed.shifts[number]))
        else:
            row_lo = max(packed.lo, int(packed.edges[number, 0] - packed.shifts[number]))
        count = until - position
        yield RangeRow(position, count, position - query_shift, row_lo, packed.hi, window, packed.table, packed.bias)


class _Packed(NamedTuple):
    """The pages of ranges, moved together to one table. Before, the pages of range i had positions `edges[i]`, int64
    `[ranges, 2]`; now they have `shifts[i]` less. Positions [lo, hi) of the new table can be read."""

    edges: Ints
    shifts: Ints
    table: Table
    bias: Bias | None
    lo: int
    hi: int


def _packed(view: View, ranges: Ints, base: int, table: Table, size: int) -> _Packed:
    """A table of the pages of these ranges alone, which are some of the view's."""
    entries = ranges - base
    begin, end = entries[:, 0] // size, -(-entries[:, 1] // size)  # of each range: its entries of the table
    begin[1:] = np.maximum(begin[1:], end[:-1])  # two ranges may share a page of a table that begins elsewhere
    lengths = end - begin
    moved_entries = begin - (np.cumsum(lengths) - lengths)
    shifts = moved_entries * size
    slots = np.arange(lengths.sum()) + np.repeat(moved_entries, lengths)
    aligned = view.ranges is None or not ((view.ranges - base) % size).any()
    bias = None if aligned else _bias(view, slots, base, table, size)
    edges = np.stack([begin, end], 1) * size + base
    lo, hi = int(ranges[0, 0] - shifts[0]), int(ranges[-1, 1] - shifts[-1])
    return _Packed(edges, shifts, np.take(table, slots, 2), bias, lo, hi)


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


@dataclass(frozen=True, slots=True)
class RowQueries:
    """Queries at positions start, ..., start + count - 1 of one sequence, with `heads` KV heads of `group` query heads
    each: the vectors from `first` on, token by token. They may read positions [lo, hi), which `table`, int32
    `[layers, heads, entries]`, keeps from position `base` on."""

    first: int
    start: int
    count: int
    group: int
    lo: int
    hi: int
    base: int
    table: Table


class Origin(NamedTuple):
    """Where a row comes from: the number of what was added, and the heads of its table, None: all. Up to position
    `until` its queries see keys by the same window."""

    number: int
    heads: slice | None
    until: int


Gaps = Mapping[Policy | None, tuple[int, int]]
_NO_GAPS: Gaps = {}


class RowBuilder:
    """Collects rows, and gives them as the kernels take them. `page_size` is that of the tables."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._numbers: list[tuple[int, ...]] = []
        self._tables: list[Table] = []
        self._biases: list[Bias | None] = []
        self._added = 0
        self.origins: list[Origin] | None = []  # of each row, where one is what another asked for at other positions

    def add(self, asked: RowQueries, policies: Sequence[Policy | None], gaps: Gaps = _NO_GAPS) -> None:
        """Rows for what each KV head's policy lets it see. None: this head is attended elsewhere, and has no vectors
        here. `gaps`: entries [first, end) of the table that a policy has freed, and leaves out; all queries are behind
        them."""
        stride = sum(policy is not None for policy in policies) * asked.group
        before = 0
        for policy, heads in runs(policies):
            if policy is None:
                continue
            partial = heads.stop - heads.start < len(policies)
            of_heads = dataclasses.replace(asked, table=asked.table[:, heads]) if partial else asked
            first, end = gaps.get(policy, (0, 0))
            for view in policy.views(asked.start, asked.count):
                self._add(*self._closed(of_heads, view, (first, end)), before, stride)
                if first < end or view.count < asked.count or view.ranges is not None:
                    self.origins = None
                elif self.origins is not None:
                    self.origins.append(
                        Origin(self._added, heads if partial else None, policy.steady_until(asked.start))
                    )
            before += (heads.stop - heads.start) * asked.group
        self._added += 1

    def _closed(self, asked: RowQueries, view: View, gap: tuple[int, int]) -> tuple[RowQueries, View]:
        """Keys and queries without the entries of a gap: what lies behind it moves up."""
        first, end = gap
        if first >= end:
            return asked, view
        edge, width = asked.base + first * self._page_size, (end - first) * self._page_size
        if view.start < edge + width or view.ranges is not None:
            raise ValueError(f"queries from {view.start} on are not behind what was let go, [{edge}, {edge + width})")
        lo, hi = (x if x <= edge else max(edge, x - width) for x in (asked.lo, asked.hi))
        entries = -(-(asked.hi - asked.base) // self._page_size)
        table = np.concatenate([asked.table[:, :, :first], asked.table[:, :, end:entries]], axis=2)
        moved = dataclasses.replace(asked, start=asked.start - width, lo=lo, hi=hi, table=table)
        return moved, dataclasses.replace(view, start=view.start - width)

    def _add(self, asked: RowQueries, view: View, before: int, stride: int) -> None:
        table, lo, hi, base = asked.table, asked.lo, asked.hi, asked.base
        if view.ranges is None:
            rows = iter((RangeRow(view.start, view.count, view.start, lo, hi, view.window, table, None),))
        else:
            rows = range_rows(view, lo, hi, base, table, self._page_size)
        for row in rows:
            first = asked.first + (row.position - asked.start) * stride + before
            numbers = first, row.count, row.start, table.shape[1], asked.group, row.lo, row.hi, base, stride, row.window
            self._numbers.append((*numbers, view.sinks))
            self._tables.append(row.table)
            self._biases.append(row.bias)

    def rows(self) -> Rows:
        """All rows so far."""
        numbers = np.array(self._numbers, np.int64).reshape(-1, 11).T.copy()
        first, count, start, heads, group, lo, hi, base, stride, window, sinks = numbers
        biases = () if all(bias is None for bias in self._biases) else self._biases
        return Rows(first, count, start, heads, group, lo, hi, base, self._tables, stride, window, sinks, bias=biases)


def runs(policies: Sequence[Policy | None]) -> Iterator[tuple[Policy | None, slice]]:
    """Neighbouring heads of equal policies."""
    first = 0
    for policy, members in groupby(policies):
        end = first + sum(1 for _ in members)
        yield policy, slice(first, end)
        first = end
