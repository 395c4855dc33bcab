"""Where KV lives: an arena of pages, and which pages a row of a batch reads.

A page is `page_size` tokens of one layer and one KV head: its K block, then its V block, nothing else. Inside a
block the order is the kernels' own: in bfloat16, channels of K and tokens of V stand in pairs, K as
`[d_k / 2, token, 2]` and V as `[token / 2, d_v, 2]`, because the CPU's bf16 instruction multiplies and adds two
neighbours at once; the other dtypes use K `[d_k, token]` and V `[token, d_v]`. Knows nothing of who owns a page,
of sequences, or of layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels import memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The shape of one page. `dtype` is what K and V are stored in."""

    page_size: int
    d_k: int
    d_v: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("page_size", "d_k", "d_v"):
            value = getattr(self, name)
            if value not in range(16, 257, 16):
                raise ValueError(f"{name} must be a multiple of 16 from 16 to 256, got {value!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"KV dtype must be one of {', '.join(map(str, DTYPES))}, got {self.dtype!r}")

    @property
    def pair(self) -> int:
        """How many neighbours stand side by side inside a block."""
        return 2 if self.dtype is torch.bfloat16 else 1

    @property
    def k_bytes(self) -> int:
        """Bytes of a page's K block, which is where its V block begins."""
        return self.page_size * self.d_k * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: exactly its K and V."""
        return self.page_size * (self.d_k + self.d_v) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Pages:
    """An arena of pages. arena: uint8 `[n_pages, page_bytes]`, contiguous, 64-byte aligned."""

    layout: PageLayout
    arena: torch.Tensor

    def __post_init__(self) -> None:
        arena, wanted = self.arena, self.layout.page_bytes
        if arena.dtype != torch.uint8 or arena.ndim != 2 or arena.shape[1] != wanted:
            raise ValueError(f"arena must be uint8 [n_pages, {wanted}], got {arena.dtype} {list(arena.shape)}")
        if not arena.is_contiguous() or arena.data_ptr() % 64:
            raise ValueError("arena must be contiguous and 64-byte aligned")

    @classmethod
    def allocate(cls, layout: PageLayout, n_pages: int) -> Pages:
        """An arena of zeros whose memory is taken only when touched, in huge pages where the system has them."""
        if n_pages < 1:
            raise ValueError(f"n_pages must be at least 1, got {n_pages}")
        return cls(layout, memory.allocate(n_pages * layout.page_bytes).view(n_pages, layout.page_bytes))

    @property
    def n_pages(self) -> int:
        return self.arena.shape[0]

    @property
    def k(self) -> torch.Tensor:
        """A view of every K block: `[n_pages, d_k / pair, page_size, pair]`."""
        at = self.layout
        return self.arena[:, : at.k_bytes].view(at.dtype).view(-1, at.d_k // at.pair, at.page_size, at.pair)

    @property
    def v(self) -> torch.Tensor:
        """A view of every V block: `[n_pages, page_size / pair, d_v, pair]`."""
        at = self.layout
        return self.arena[:, at.k_bytes :].view(at.dtype).view(-1, at.page_size // at.pair, at.d_v, at.pair)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a batch at one holder, one entry an array each: int64 `[rows]`.

    A row asks `count` queries at positions start, start + 1, ..., each with `kv_heads * group` heads; its
    vectors stand in the flat q from `first` on, token-major, then head, and head j reads KV head j // group.
    It may read positions [lo, hi). Position p is kept in slot p - base of every table of the row:
    `tables[row]` is int32 `[layers, kv_heads, pages]`, the page of slot s being entry s // page_size.
    """

    first: Ints
    count: Ints
    start: Ints
    kv_heads: Ints
    group: Ints
    lo: Ints
    hi: Ints
    base: Ints
    tables: Sequence[npt.NDArray[np.int32]]

    def __post_init__(self) -> None:
        for name in ("first", "count", "start", "kv_heads", "group", "lo", "hi", "base"):
            value = getattr(self, name)
            if value.dtype != np.int64 or value.shape != (len(self.tables),):
                raise ValueError(f"{name} must be int64 [{len(self.tables)}], got {value.dtype} {list(value.shape)}")
            if value.size and value.min() < (1 if name in ("count", "kv_heads", "group") else 0):
                raise ValueError(f"{name} has {value.min()}, which is too small")
            if value.size and value.max() >= 2**31:
                raise ValueError(f"{name} has {value.max()}, allowed: below 2**31")

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def n(self) -> int:
        """How many query vectors the rows have together."""
        return int((self.count * self.kv_heads * self.group).sum())

    @property
    def layers(self) -> int:
        return self.tables[0].shape[0] if self.tables else 0


class Planned(Protocol):
    """What every implementation's plan says of itself."""

    @property
    def n(self) -> int:
        """How many query vectors a call takes."""

    @property
    def layers(self) -> int:
        """How many layers the tables have."""

    @property
    def missing(self) -> frozenset[int]:
        """Layers that lack a page which the rows read."""


def check_rows(pages: Pages, rows: Rows, window: int | None) -> frozenset[int]:
    """Raise ValueError unless `rows` tile q, and what they may read lies in their tables and in `pages`.

    Returns the layers in which page -1, none, stands where a row reads: another window may have freed it there.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")
    order = np.argsort(rows.first, kind="stable")
    size = (rows.count * rows.kv_heads * rows.group)[order]
    wrong = np.flatnonzero(rows.first[order] != np.cumsum(size) - size)
    if wrong.size:
        row = order[wrong[0]]
        raise ValueError(f"rows must cover q without gap or overlap, but row {row} begins at {rows.first[row]}")
    missing: set[int] = set()
    lowest = rows.lo if window is None else np.maximum(rows.lo, rows.start - window + 1)
    for row, table in enumerate(rows.tables):
        base, lo, hi = int(rows.base[row]), int(lowest[row]), int(rows.hi[row])
        shape = (rows.layers, int(rows.kv_heads[row]))
        if table.dtype != np.int32 or table.ndim != 3 or table.shape[:2] != shape or not table.flags.c_contiguous:
            raise ValueError(
                f"the table of row {row} must be contiguous int32 [{shape[0]}, {shape[1]}, pages], "
                f"got {table.dtype} {list(table.shape)}"
            )
        if lo >= hi:
            continue
        end = base + table.shape[2] * pages.layout.page_size
        if lo < base or hi > end:
            raise ValueError(f"row {row} reads [{lo}, {hi}), but its table holds [{base}, {end})")
        first, last = (lo - base) // pages.layout.page_size, (hi - 1 - base) // pages.layout.page_size
        used = table[:, :, first : last + 1]
        low, high = int(used.min()), int(used.max())
        if low < -1 or high >= pages.n_pages:
            bad = low if low < -1 else high
            raise ValueError(f"the table of row {row} names page {bad}; there are pages 0 to {pages.n_pages - 1}")
        if low == -1:
            missing.update(np.flatnonzero((used == -1).any(axis=(1, 2))).tolist())
    return frozenset(missing)


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
    at = pages.layout
    _check_vectors("q", q, plan.n, at.d_k)
    if out is not None:
        _check_vectors("out", out, plan.n, at.d_v)
        if out.dtype != q.dtype or not out.is_contiguous():
            raise ValueError(f"out must be contiguous and {q.dtype} as q is, got {out.dtype}")
    if not 0 <= layer < plan.layers and plan.n:
        raise ValueError(f"layer must be from 0 to {plan.layers - 1}, got {layer}")
    if layer in plan.missing:
        raise ValueError(f"layer {layer} lacks a page in the range that the plan reads; it lacks none in other layers")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap must be positive and finite, got {soft_cap}")


def check_slots(pages: Pages, slots: torch.Tensor) -> None:
    """Raise ValueError unless slots is int64 `[layers, n]`, and every slot exists."""
    if slots.dtype != torch.int64 or slots.ndim != 2:
        raise ValueError(f"slots must be int64 [layers, n], got {slots.dtype} {list(slots.shape)}")
    _check_range("slots", slots, pages.n_pages * pages.layout.page_size)


def check_append(pages: Pages, slots: torch.Tensor, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError unless slots `[layers, n]` has that layer, k is `[n, d_k]` and v `[n, d_v]`."""
    layers, n = slots.shape
    if not 0 <= layer < layers:
        raise ValueError(f"layer must be from 0 to {layers - 1}, got {layer}")
    _check_vectors("k", k, n, pages.layout.d_k)
    _check_vectors("v", v, n, pages.layout.d_v)


def _check_vectors(name: str, x: torch.Tensor, n: int, d: int) -> None:
    if x.shape != (n, d) or x.dtype not in DTYPES or x.device.type != "cpu":
        allowed = ", ".join(map(str, DTYPES))
        raise ValueError(
            f"{name} must be [{n}, {d}] on the CPU in one of {allowed}, got {x.dtype} {list(x.shape)} on {x.device}"
        )


def _check_range(name: str, numbers: torch.Tensor, end: int) -> None:
    if not numbers.numel():
        return
    low, high = (int(x) for x in numbers.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"{name} must be from 0 to {end - 1}, got {low if low < 0 else high}")


def gather(pages: Pages, table: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `tokens` slots of the pages named in `table` (int `[pages]`): k `[tokens, d_k]`, v `[tokens, d_v]`."""
    at = pages.layout
    if not 0 <= tokens <= len(table) * at.page_size:
        raise ValueError(f"tokens must be from 0 to {len(table) * at.page_size}, got {tokens}")
    index = table[: -(-tokens // at.page_size)].long()
    _check_range("table", index, pages.n_pages)
    k = pages.k[index].permute(0, 2, 1, 3).reshape(-1, at.d_k)
    v = pages.v[index].permute(0, 1, 3, 2).reshape(-1, at.d_v)
    return k[:tokens], v[:tokens]


def copy(pages: Pages, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy whole pages: page `src[i]` to page `dst[i]`, both int64 `[n]`; no page is in both."""
    for name, index in (("src", src), ("dst", dst)):
        if index.dtype != torch.int64 or index.shape != (len(src),):
            raise ValueError(f"{name} must be int64 [{len(src)}], got {index.dtype} {list(index.shape)}")
        _check_range(name, index, pages.n_pages)
    pages.arena[dst] = pages.arena[src]
