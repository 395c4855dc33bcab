"""From policies to the rows that kernels take (`RowBuilder`): which vectors of q see which keys of a page table.

Pure arithmetic on numbers. It serves the past at a holder and the fresh tokens at the model worker alike, so static
policies give the same text however a prompt is cut and sharded.

A policy may let queries see ranges of keys. Then the row has a list of the tokens in these ranges alone, and keys and
queries get lower positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from lamina_kernels.paged.rows import Ints, Rows, Table
from lamina_workers.policies.policy import Policy, View


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
    """Where a row comes from: the number of what was added, and the heads of its table, None: all."""

    number: int
    heads: slice | None


class RowBuilder:
    """Collects rows, and gives them as the kernels take them. `page_size` is that of the tables."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._numbers: list[tuple[int, ...]] = []
        self._tables: list[Table] = []
        self._added = 0
        self.origins: list[Origin] | None = []  # of each row, where later ones are the same at later positions

    def add(self, asked: RowQueries, policies: Sequence[Policy | None]) -> None:
        """Rows for what each KV head's policy lets it see. None: this head is attended elsewhere, and has no vectors
        here."""
        stride = sum(policy is not None for policy in policies) * asked.group
        before = 0
        for policy, heads in runs(policies):
            if policy is None:
                continue
            partial = heads.stop - heads.start < len(policies)
            of_heads = dataclasses.replace(asked, table=asked.table[:, heads]) if partial else asked
            for view in policy.views(asked.start, asked.count):
                self._add(of_heads, view, before, stride)
                if not policy.steady:
                    self.origins = None
                elif self.origins is not None:
                    self.origins.append(Origin(self._added, heads if partial else None))
            before += (heads.stop - heads.start) * asked.group
        self._added += 1

    def _add(self, asked: RowQueries, view: View, before: int, stride: int) -> None:
        first = asked.first + (view.start - asked.start) * stride + before
        row, listed = asked, view.ranges is not None
        if view.ranges is not None:
            row, view = _listed(asked, view, view.ranges, self._page_size)
        numbers = first, view.count, view.start, row.table.shape[1], row.group, row.lo, row.hi, row.base
        self._numbers.append((*numbers, stride, view.window, view.sinks, listed))
        self._tables.append(row.table)

    def rows(self) -> Rows:
        """All rows so far."""
        numbers = np.array(self._numbers, np.int64).reshape(-1, 12).T.copy()
        first, count, start, heads, group, lo, hi, base, stride, window, sinks, listed = numbers
        return Rows(first, count, start, heads, group, lo, hi, base, self._tables, stride, window, sinks, listed)


def _listed(asked: RowQueries, view: View, ranges: Ints, size: int) -> tuple[RowQueries, View]:
    """The same over a list of the tokens in these ranges alone, wherever the table's pages begin."""
    ranges = np.clip(ranges, asked.lo, max(asked.lo, min(asked.hi, view.start + view.count)))
    keys = np.concatenate([np.arange(first, end) for first, end in ranges.tolist()])
    shift = int(ranges[-1, 1]) - len(keys)  # of the last range; keys before it only have to stay before
    entries, offsets = np.divmod(keys - asked.base, size)
    pages = np.take(asked.table, entries, 2)
    slots = np.where(pages < 0, -1, pages * size + offsets).astype(np.int32)
    listed = dataclasses.replace(asked, lo=0, hi=len(keys), base=0, table=slots)
    return listed, View(max(0, view.start - shift), view.count)


def runs(policies: Sequence[Policy | None]) -> Iterator[tuple[Policy | None, slice]]:
    """Neighbouring heads of equal policies."""
    first = 0
    for policy, members in groupby(policies):
        end = first + sum(1 for _ in members)
        yield policy, slice(first, end)
        first = end
