"""From policies to the rows that kernels take: which vectors of q see which keys of a page table.

Pure arithmetic on numbers. It serves the past at a holder and the fresh tokens at the model worker alike, so static
policies give the same text however a prompt is cut and sharded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from lamina_kernels.paged.rows import Bias, Rows, Table
from lamina_workers.attention_worker.page_ranges import RangeRow, range_rows
from lamina_workers.policies.policy import Policy, View


@dataclass(frozen=True, slots=True)
class Asked:
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

    def add(self, asked: Asked, policies: Sequence[Policy | None], gaps: Gaps = _NO_GAPS) -> None:
        """Rows for what each KV head's policy lets it see. None: this head is attended elsewhere, and has no vectors
        here. `gaps`: entries [first, end) of the table that a policy has freed, and leaves out; all queries are behind
        them."""
        stride = sum(policy is not None for policy in policies) * asked.group
        before = 0
        for policy, heads in runs(policies):
            if policy is None:
                continue
            some = heads.stop - heads.start < len(policies)
            of_heads = dataclasses.replace(asked, table=asked.table[:, heads]) if some else asked
            first, end = gaps.get(policy, (0, 0))
            for view in policy.views(asked.start, asked.count):
                self._add(*self._closed(of_heads, view, (first, end)), before, stride)
                if first < end or view.count < asked.count or view.ranges is not None:
                    self.origins = None
                elif self.origins is not None:
                    self.origins.append(Origin(self._added, heads if some else None, policy.steady_until(asked.start)))
            before += (heads.stop - heads.start) * asked.group
        self._added += 1

    def _closed(self, asked: Asked, view: View, gap: tuple[int, int]) -> tuple[Asked, View]:
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

    def _add(self, asked: Asked, view: View, before: int, stride: int) -> None:
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
