"""The rows of a batch: the keys of a holder's pages that each query reads. Arithmetic on numbers; touches no page.

A policy's choice arrives as a window and sinks, or as a list of pages or tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.pages import Pages, check_made_for, check_vectors

Ints = npt.NDArray[np.int64]
Table = npt.NDArray[np.int32]
EVERYTHING = 1 << 40  # a window that hides nothing

_UNSET = np.empty(0, np.int64)  # recognised by identity, since no rows at all have the same shape
_LEAST = {"count": 1, "kv_heads": 1, "group": 1, "stride": 1, "window": 1}  # of the others 0


def _unset() -> Ints:
    return _UNSET


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a batch at one holder, one entry an array each: int64 `[rows]`.

    A row asks `count` queries at positions start, start + 1, ..., each with `kv_heads * group` heads; the vector of
    its query i and head j is number first + i * stride + j of the flat q, and reads KV head j // group. Rows of
    different heads of one sequence so stand side by side, each with keys of its own.

    It may read positions [lo, hi). Position p is kept in slot p - base of every table of the row: `tables[row]` is
    int32 `[layers, kv_heads, entries]`, contiguous along the entries. Where `listed` is 0, entry e is the page of the
    slots from e * page_size on; where it is 1, entry e is slot e itself, as page * page_size + offset: a list of
    tokens, in any order. A list that has no positions of its own counts them from 0 and starts its queries above.

    A query at p sees key k iff k <= p and lo <= k < hi, and p - k < window or k < sinks.
    """

    first: Ints
    count: Ints
    start: Ints
    kv_heads: Ints
    group: Ints
    lo: Ints
    hi: Ints
    base: Ints
    tables: Sequence[Table]
    stride: Ints = field(default_factory=_unset)  # without: kv_heads * group, all heads of a sequence in one row
    window: Ints = field(default_factory=_unset)  # without: EVERYTHING
    sinks: Ints = field(default_factory=_unset)  # without: 0
    listed: Ints = field(default_factory=_unset)  # without: 0

    def __post_init__(self) -> None:
        n = len(self.tables)
        defaults = {
            "stride": self.kv_heads * self.group,
            "window": np.full(n, EVERYTHING, np.int64),
            "sinks": np.zeros(n, np.int64),
            "listed": np.zeros(n, np.int64),
        }
        for name in (f.name for f in dataclasses.fields(self)):
            if name == "tables":
                continue
            if getattr(self, name) is _UNSET:
                object.__setattr__(self, name, defaults[name])
            value = getattr(self, name)
            if value.dtype != np.int64 or value.shape != (n,):
                raise ValueError(f"{name} must be int64 [{n}], got {value.dtype} {list(value.shape)}")
            if value.size and value.min() < _LEAST.get(name, 0):
                raise ValueError(f"{name} has {value.min()}, allowed: {_LEAST.get(name, 0)} or more")
            if value.size and value.max() >= 2**31 and name != "window":
                raise ValueError(f"{name} has {value.max()}, allowed: below 2**31")
        ends = self.start + self.count
        if ends.size and ends.max() >= 2**31:
            raise ValueError(f"a row's queries end at {ends.max()}, allowed: below 2**31")
        if self.listed.size and self.listed.max() > 1:
            raise ValueError(f"listed has {self.listed.max()}, allowed: 0 or 1")

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def n(self) -> int:
        """How many query vectors the rows have together."""
        return int((self.count * self.kv_heads * self.group).sum())

    @property
    def layers(self) -> int:
        return self.tables[0].shape[0] if self.tables else 0


class Visible(NamedTuple):
    """What a block of queries sees: keys [lo, end), all of them, and keys [begin, hi) within `window`. Either range
    may be empty; then its end is not above its beginning."""

    lo: Ints
    end: Ints
    begin: Ints
    hi: Ints
    window: Ints


def visible(first: Ints, last: Ints, lo: Ints, hi: Ints, window: Ints, sinks: Ints) -> Visible:
    """What queries at positions [first, last] see of the keys [lo, hi)."""
    hi = np.minimum(hi, last + 1)
    unlimited = last - window + 1 <= np.maximum(lo, sinks)  # the window hides nothing from any of them
    end = np.where(unlimited, lo, np.minimum(sinks, hi))
    begin = np.where(unlimited, lo, np.maximum(np.maximum(lo, sinks), first - window + 1))
    return Visible(lo, end, begin, hi, np.where(unlimited, EVERYTHING, window))


class Planned(Protocol):
    """The common fields of every implementation's plan."""

    @property
    def pages(self) -> Pages:
        """The pages that it was made for."""

    @property
    def n(self) -> int:
        """How many query vectors a call takes."""

    @property
    def layers(self) -> int:
        """How many layers the tables have."""

    @property
    def missing(self) -> frozenset[int]:
        """Layers that lack an entry which the rows read."""


def check_rows(pages: Pages, rows: Rows) -> frozenset[int]:
    """Raise ValueError unless `rows` cover q, and what they may read lies in their tables and in `pages`.

    Returns the layers in which entry -1, none, stands where a row reads: another window may have freed it there.
    """
    _check_cover(rows)
    reads = visible(rows.start, rows.start + rows.count - 1, rows.lo, rows.hi, rows.window, rows.sinks)
    ranges = np.stack(reads[:4], -1).tolist()
    size = pages.layout.page_size
    missing: set[int] = set()
    for row, (table, (lo, end, begin, hi)) in enumerate(zip(rows.tables, ranges, strict=True)):
        base, listed = int(rows.base[row]), bool(rows.listed[row])
        unit, limit, what = (1, pages.slots, "slot") if listed else (size, pages.n_pages, "page")
        shape = (rows.layers, int(rows.kv_heads[row]))
        if table.dtype != np.int32 or table.ndim != 3 or table.shape[:2] != shape or not _addressable(table):
            raise ValueError(
                f"the table of row {row} must be int32 [{shape[0]}, {shape[1]}, entries], contiguous along the "
                f"entries, got {table.dtype} {list(table.shape)}"
            )
        table_end = base + table.shape[2] * unit
        for first, stop in ((lo, end), (begin, hi)):
            if first >= stop:
                continue
            if first < base or stop > table_end:
                raise ValueError(f"row {row} reads [{first}, {stop}), but its table holds [{base}, {table_end})")
            used = table[:, :, (first - base) // unit : (stop - 1 - base) // unit + 1]
            low, high = int(used.min()), int(used.max())
            if low < -1 or high >= limit:
                bad = low if low < -1 else high
                raise ValueError(f"the table of row {row} names {what} {bad}; there are {what}s 0 to {limit - 1}")
            if low == -1:
                missing.update(np.flatnonzero((used == -1).any(axis=(1, 2))).tolist())
    return frozenset(missing)


def _check_cover(rows: Rows) -> None:
    """Raise ValueError unless every vector of q belongs to exactly one row."""
    heads = rows.kv_heads * rows.group
    if (rows.stride < heads).any():
        row = int(np.flatnonzero(rows.stride < heads)[0])
        raise ValueError(f"row {row} has {heads[row]} heads, more than its stride {rows.stride[row]}")
    if (rows.stride == heads).all():
        order = np.argsort(rows.first, kind="stable")
        size = (rows.count * heads)[order]
        wrong = np.flatnonzero(rows.first[order] != np.cumsum(size) - size)
        if wrong.size:
            row = int(order[wrong[0]])
            raise ValueError(f"rows must cover q without gap or overlap, but row {row} begins at {rows.first[row]}")
        return
    ends = rows.first + (rows.count - 1) * rows.stride + heads
    if ends.max(initial=0) > rows.n:
        row = int(ends.argmax())
        raise ValueError(f"rows must cover q without gap or overlap, but row {row} ends at {ends[row]} of {rows.n}")
    covered = np.zeros(rows.n, np.int64)
    for first, count, stride, width in zip(rows.first, rows.count, rows.stride, heads, strict=True):
        covered[first + (np.arange(count)[:, None] * stride + np.arange(width)).reshape(-1)] += 1
    if (covered != 1).any():
        vector = int(np.flatnonzero(covered != 1)[0])
        raise ValueError(f"rows must cover q without gap or overlap, but {covered[vector]} have vector {vector}")


def _addressable(x: npt.NDArray[Any]) -> bool:
    """Whether numbers of 4 bytes are contiguous along the last axis, and whole numbers apart along the others."""
    return (x.shape[2] < 2 or x.strides[2] == 4) and not any(step % 4 for step in x.strides[:2])


def check_attend(
    pages: Pages,
    plan: Planned,
    layer: int,
    q: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    out: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of `attend` fit the plan and the pages."""
    layout = pages.layout
    check_made_for(plan.pages, pages)
    check_vectors("q", q, plan.n, layout.d_k, pages.arena.device)
    if out is not None:
        check_vectors("out", out, plan.n, layout.d_v, pages.arena.device)
        if out.dtype != q.dtype or not out.is_contiguous():
            raise ValueError(f"out must be contiguous {q.dtype} as q is, got {out.dtype} with strides {out.stride()}")
    if not 0 <= layer < plan.layers and plan.n:
        raise ValueError(f"layer must be from 0 to {plan.layers - 1}, got {layer}")
    if layer in plan.missing:
        lacking = ", ".join(map(str, sorted(plan.missing)))
        raise ValueError(f"layer {layer} lacks a page that the plan reads; layers that lack one: {lacking}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap must be positive and finite, got {soft_cap}")
