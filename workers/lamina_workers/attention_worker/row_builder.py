"""From policies to the rows that kernels take: which vectors of q see which keys of a page table.

Pure arithmetic on numbers. It serves the past at a holder and the fresh tokens at the model worker alike, so static
policies give the same text however a prompt is cut and sharded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from lamina_kernels.paged.rows import Rows, Table
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


Gaps = Mapping[Policy | None, tuple[int, int]]
_NO_GAPS: Gaps = {}


class RowBuilder:
    """Collects rows, and gives them as the kernels take them. `page_size` is that of the tables."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._numbers: list[tuple[int, ...]] = []
        self._tables: list[Table] = []

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
            for view in policy.views(asked.start, asked.count):
                self._add(*self._closed(of_heads, view, gaps.get(policy, (0, 0))), before, stride)
            before += (heads.stop - heads.start) * asked.group

    def _closed(self, asked: Asked, view: View, gap: tuple[int, int]) -> tuple[Asked, View]:
        """Keys and queries without the entries of a gap: what lies behind it moves up."""
        first, end = gap
        if first >= end:
            return asked, view
        edge, width = asked.base + first * self._page_size, (end - first) * self._page_size
        if view.start < edge + width or view.listed is not None:
            raise ValueError(f"queries from {view.start} on are not behind what was let go, [{edge}, {edge + width})")
        lo, hi = (x if x <= edge else max(edge, x - width) for x in (asked.lo, asked.hi))
        entries = -(-(asked.hi - asked.base) // self._page_size)
        table = np.concatenate([asked.table[:, :, :first], asked.table[:, :, end:entries]], axis=2)
        moved = dataclasses.replace(asked, start=asked.start - width, lo=lo, hi=hi, table=table)
        return moved, dataclasses.replace(view, start=view.start - width)

    def _add(self, asked: Asked, view: View, before: int, stride: int) -> None:
        first = asked.first + (view.start - asked.start) * stride + before
        table, start, lo, hi, base = asked.table, view.start, asked.lo, asked.hi, asked.base
        if view.listed is not None:
            tokens = np.asarray(view.listed, np.int64)
            tokens = tokens[(tokens >= lo) & (tokens < hi)]
            start = int((tokens < view.start).sum())
            slot, offset = np.divmod(tokens - base, self._page_size)
            pages = table[:, :, slot]  # -1: none, where a layer with another window has freed it
            table = np.ascontiguousarray(np.where(pages < 0, -1, pages * self._page_size + offset.astype(np.int32)))
            lo, hi, base = 0, len(tokens), 0
        self._tables.append(table)
        listed = int(view.listed is not None)
        count = table.shape[1]
        self._numbers.append(
            (first, view.count, start, count, asked.group, lo, hi, base, stride, view.window, view.sinks, listed)
        )

    def rows(self) -> Rows:
        """All rows so far."""
        numbers = np.array(self._numbers, np.int64).reshape(-1, 12).T.copy()
        first, count, start, heads, group, lo, hi, base, stride, window, sinks, listed = numbers
        return Rows(first, count, start, heads, group, lo, hi, base, self._tables, stride, window, sinks, listed)


def runs(policies: Sequence[Policy | None]) -> Iterator[tuple[Policy | None, slice]]:
    """Neighbouring heads of equal policies."""
    first = 0
    for policy, members in groupby(policies):
        end = first + sum(1 for _ in members)
        yield policy, slice(first, end)
        first = end
