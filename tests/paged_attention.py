"""Shared by the tests of the kernels: pages filled through a table, and attention over them in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lamina_kernels.pages import PageLayout, Pages, Rows
from lamina_kernels.partial import Partial
from lamina_kernels.select import Kernels


class Row(NamedTuple):
    """One row: queries at [start, start + count), keys in [lo, hi), a table whose slot 0 is position base."""

    start: int
    count: int
    lo: int
    hi: int
    base: int = 0


@dataclass(frozen=True)
class World:
    """Two layers of pages in shuffled order, all NaN but for the keys that rows may read, and random queries."""

    pages: Pages
    rows: Rows
    given: Sequence[Row]
    q: torch.Tensor
    keys: list[tuple[torch.Tensor, torch.Tensor]]  # per row, of layer 1: [heads, hi - lo, d], before rounding

    def expected(self, scale: float, window: int | None = None, soft_cap: float | None = None) -> Partial:
        """Attention in layer 1 over the unrounded inputs, in float64; the lse in float64 too."""
        outs, sums = [], []
        for row, (k, v), first in zip(self.given, self.keys, self.rows.first.tolist(), strict=True):
            heads, n, d_k = k.shape
            q = self.q[first:].double()[: row.count * heads * int(self.rows.group[0])].view(row.count, heads, -1, d_k)
            logits = torch.einsum("thgd,hkd->thgk", q, k.double()) * scale
            if soft_cap:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            age = torch.arange(row.start, row.start + row.count)[:, None] - torch.arange(row.lo, row.lo + n)
            seen = (age >= 0) & (age < (window or 1 << 60))
            logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
            weights = torch.softmax(logits, -1).nan_to_num(0.0)
            outs.append(torch.einsum("thgk,hkd->thgd", weights, v.double()).reshape(-1, v.shape[-1]))
            sums.append(torch.logsumexp(logits, -1).reshape(-1))
        return Partial(torch.cat(outs), torch.cat(sums))


def build(
    kernels: Kernels,
    layout: PageLayout,
    given: Sequence[Row],
    kv_heads: int = 2,
    group: int = 3,
    seed: int = 0,
    spread: float = 1.0,
) -> World:
    """Store random keys for `given` through `kernels.append`; queries are `spread` times as large."""
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    layers, size = 2, layout.page_size
    lengths = [max(1, -(-(max(row.hi, row.lo) - row.base) // size)) for row in given]
    numbers = random.permutation(sum(lengths) * layers * kv_heads + 2).astype(np.int32)
    pages = Pages.allocate(layout, len(numbers))
    pages.arena.fill_(255)  # NaN in every dtype
    tables, keys, used = [], [], 0
    for row, n in zip(given, lengths, strict=True):
        table = numbers[used : used + layers * kv_heads * n].reshape(layers, kv_heads, n).copy()
        used += table.size
        slot = torch.arange(row.lo - row.base, max(row.lo, row.hi) - row.base)
        k = torch.randn(kv_heads, len(slot), layout.d_k, generator=generator)
        v = torch.randn(kv_heads, len(slot), layout.d_v, generator=generator)
        for head in range(kv_heads):
            page = torch.from_numpy(table[1, head]).long()[slot // size]
            slots = kernels.plan_append(pages, (page * size + slot % size)[None])
            kernels.append(pages, slots, 0, k[head], v[head])
        tables.append(table)
        keys.append((k, v))
    column = {name: np.array([getattr(row, name) for row in given], np.int64) for name in Row._fields}
    vectors = column["count"] * kv_heads * group
    heads, groups = np.full(len(given), kv_heads), np.full(len(given), group)
    rows = Rows(first=np.cumsum(vectors) - vectors, kv_heads=heads, group=groups, tables=tables, **column)
    q = torch.randn(rows.n, layout.d_k, generator=generator) * spread
    return World(pages, rows, given, q, keys)


def relative_error(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over the norm of what was wanted, or of the difference alone where that is 0."""
    difference, norm = (given.double() - wanted.double()).norm(), wanted.double().norm()
    return float(difference / norm if norm > 0 else difference)
