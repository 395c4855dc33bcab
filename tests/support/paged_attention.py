"""Shared by the tests of the kernels: keys in shuffled pages and slots amid NaN, and attention over them in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from hypothesis import strategies as st

from lamina_kernels.paged.pages import PageLayout, Pages
from lamina_kernels.paged.rows import EVERYTHING, Rows, Table
from lamina_kernels.partial import Partial
from lamina_kernels.select import Kernels

LIMITS = {  # of the relative norm of the error of out, by the dtype that K and V are stored in
    torch.float32: 1e-5,
    torch.bfloat16: 5e-3,
    torch.float16: 1e-3,
    torch.int8: 2e-2,
    torch.float8_e4m3fn: 8e-2,
}
LSE_LIMITS = {dtype: max(limit * 4, 2e-5) for dtype, limit in LIMITS.items()}  # of `lse_error`
SIZES = (16, 32, 48, 64, 80, 96, 112, 128, 192, 256)  # of heads


@dataclass(frozen=True)
class Row:
    """One row of `Rows`: queries at [start, start + count), keys in [lo, hi), a table whose slot 0 is position base."""

    start: int
    count: int
    lo: int
    hi: int
    base: int = 0
    window: int = EVERYTHING
    sinks: int = 0
    listed: int = 0
    heads: int | None = None  # KV heads of the row; None: all that there are

    @property
    def held(self) -> int:
        """How many slots the row needs: those up to its last query, however far it may read."""
        return max(1, min(self.hi, self.start + self.count) - self.base)

    @property
    def seen(self) -> np.ndarray:
        """Of each held slot, whether any query of the row sees it."""
        key = self.base + np.arange(self.held)
        near = (self.start - key < self.window) | (key < self.sinks)
        return (key >= self.lo) & (key < self.hi) & (key < self.start + self.count) & near


Sequences = Sequence[Row | Sequence[Row]]  # rows of different heads of one sequence stand together


@dataclass(frozen=True)
class World:
    """Pages of two layers, NaN but for the keys of layer 1 that some query sees, and random queries."""

    pages: Pages
    rows: Rows
    q: torch.Tensor
    keys: list[tuple[torch.Tensor, torch.Tensor]]  # of each row, before rounding: k [heads, slots, d_k], v

    @property
    def scale(self) -> float:
        return float(self.pages.layout.d_k**-0.5)

    def expected(self, scale: float | None = None, soft_cap: float | None = None) -> Partial:
        """Attention in layer 1 over the unrounded inputs, in float64 on the CPU; the lse in float64 too."""
        rows, queries = self.rows, self.q.cpu().double()
        out = torch.full((rows.n, self.pages.layout.d_v), torch.nan, dtype=torch.float64)
        lse = torch.full((rows.n,), torch.nan, dtype=torch.float64)
        for row, (k, v) in enumerate(self.keys):
            count, heads, group = int(rows.count[row]), int(rows.kv_heads[row]), int(rows.group[row])
            token = torch.arange(count).unsqueeze(1)
            own = int(rows.first[row]) + token * int(rows.stride[row]) + torch.arange(heads * group)
            q = queries[own].view(count, heads, group, -1)
            logits = torch.einsum("thgd,hkd->thgk", q, k.double()) * (self.scale if scale is None else scale)
            if soft_cap:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            key = int(rows.base[row]) + torch.arange(k.shape[1])
            age = int(rows.start[row]) + token - key
            seen = (age >= 0) & (key >= int(rows.lo[row])) & (key < int(rows.hi[row]))
            seen &= (age < int(rows.window[row])) | (key < int(rows.sinks[row]))
            logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
            weights = torch.softmax(logits, -1).nan_to_num(0.0)
            out[own] = torch.einsum("thgk,hkd->thgd", weights, v.double()).flatten(1, 2)
            lse[own] = torch.logsumexp(logits, -1).flatten(1)
        return Partial(out, lse)

    def within(self, window: int | None) -> World:
        """The same world, no row of which sees further back than `window`. Sinks stay visible."""
        if window is None:
            return self
        rows = dataclasses.replace(self.rows, window=np.minimum(self.rows.window, window))
        return dataclasses.replace(self, rows=rows)

    def reordered(self, order: Sequence[int]) -> World:
        """The same rows and queries in another order."""
        return dataclasses.replace(self, rows=take(self.rows, order), keys=[self.keys[i] for i in order])


def build(
    kernels: Kernels,
    layout: PageLayout,
    given: Sequences,
    kv_heads: int = 2,
    group: int = 3,
    seed: int = 0,
    spread: float = 1.0,
    device: str = "cpu",
) -> World:
    """Store random keys for `given` through `kernels.append`; queries are `spread` times as large.

    Every head of a row has pages of its own in random order. A listed row's tokens lie anywhere in slots that no
    other row sees: in pages of its own, and at the ends of those of others. Entries that no query reads are -1.
    """
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    sequences = [[each] if isinstance(each, Row) else list(each) for each in given]
    own = [row for sequence in sequences for row in sequence]
    heads = np.array([row.heads or kv_heads for row in own], np.int64)
    first, stride, vectors = [], [], 0
    for sequence in sequences:
        ends = list(accumulate((row.heads or kv_heads) * group for row in sequence))
        first += [vectors + begin for begin in [0, *ends[:-1]]]
        stride += [ends[-1]] * len(sequence)
        vectors += sequence[0].count * ends[-1]

    needed = [-(-row.held // layout.page_size) for row in own]
    numbers = random.permutation(2 * int(heads @ np.array(needed, np.int64)) + 3).astype(np.int32)
    tables, places = _tables(own, heads.tolist(), needed, layout.page_size, numbers, random)
    pages = Pages.allocate(layout, len(numbers), device)
    pages.arena.fill_(255)  # NaN in every dtype that has one, and in scales
    keys = []
    for row, n in zip(own, heads.tolist(), strict=True):
        k = torch.randn(n, row.held, layout.d_k, generator=generator)
        front = k[..., : layout.d_v]
        keys.append((k, front if layout.latent else torch.randn(n, row.held, layout.d_v, generator=generator)))
    slots = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(p.reshape(-1) for p in places)]))
    plan = kernels.plan_append(pages, torch.stack([torch.zeros_like(slots), slots]).to(device))
    stored = [torch.empty(0, layout.d_k)], [torch.empty(0, layout.own_v)]
    for row, (k, v) in zip(own, keys, strict=True):
        for x, into in zip((k, v[..., : layout.own_v]), stored, strict=True):
            into.append(x[:, torch.from_numpy(row.seen)].flatten(0, 1))
    kernels.append(pages, plan, 1, *(torch.cat(x).to(device) for x in stored))

    columns = {
        name: np.array([getattr(row, name) for row in own], np.int64)
        for name in ("count", "start", "lo", "hi", "base", "window", "sinks", "listed")
    }
    rows = Rows(
        first=np.array(first, np.int64),
        stride=np.array(stride, np.int64),
        kv_heads=heads,
        group=np.full(len(own), group),
        tables=tables,
        **columns,
    )
    q = torch.randn(rows.n, layout.d_k, generator=generator) * spread
    return World(pages, rows, q.to(device), keys)


def _tables(
    own: list[Row], heads: list[int], needed: list[int], size: int, numbers: Table, random: np.random.Generator
) -> tuple[list[Table], list[np.ndarray]]:
    """Each row's table `[2, heads, entries]`, and the slots `[heads, keys]` of layer 1 at which its seen keys lie."""
    tables, places, used = [], [], 0
    for row, n, pages in zip(own, heads, needed, strict=True):
        table = np.full((2, n, pages + 1), -7, np.int32)[:, :, :pages]  # only its entries are contiguous
        table[:] = numbers[used : used + table.size].reshape(table.shape)
        used += table.size
        slot = np.flatnonzero(row.seen)
        places.append(table[1][:, slot // size].astype(np.int64) * size + slot % size)
        table[:, :, ~np.isin(np.arange(pages), slot // size)] = -1
        tables.append(table)

    paged = [p.reshape(-1) for row, p in zip(own, places, strict=True) if not row.listed]
    free = np.setdiff1d(np.arange(len(numbers) * size), np.concatenate([np.empty(0, np.int64), *paged]))
    free, used = random.permutation(free), 0
    for i, (row, n) in enumerate(zip(own, heads, strict=True)):
        if not row.listed:
            continue
        table = np.full((2, n, row.held + 5), -7, np.int32)[:, :, : row.held + 2]
        table[:] = -1
        listed = 2 * n * int(row.seen.sum())
        table[:, :, : row.held][:, :, row.seen] = free[used : used + listed].reshape(2, n, -1)
        used += listed
        tables[i], places[i] = table, table[1, :, : row.held][:, row.seen].astype(np.int64)
    return tables, places


def take(rows: Rows, order: Sequence[int]) -> Rows:
    """The rows numbered `order`."""
    lists = {"tables": [rows.tables[i] for i in order]}
    names = [f.name for f in dataclasses.fields(rows) if f.name not in lists]
    return dataclasses.replace(rows, **lists, **{name: getattr(rows, name)[list(order)] for name in names})


def attend(kernels: Kernels, world: World, threads: int = 2, soft_cap: float | None = None) -> Partial:
    """Attention of all queries in layer 1."""
    plan = kernels.plan(world.pages, world.rows, threads)
    return kernels.attend(world.pages, plan, 1, world.q, world.scale, soft_cap)


def errors(kernels: Kernels, world: World, threads: int = 2, soft_cap: float | None = None) -> tuple[float, float]:
    """Of attention in layer 1 against float64: `relative_error` of out and `lse_error`, each over what is allowed.

    Neither may be above 1.
    """
    dtype = world.pages.layout.dtype
    result, wanted = attend(kernels, world, threads, soft_cap), world.expected(soft_cap=soft_cap)
    return (
        relative_error(result.out, wanted.out) / LIMITS[dtype],
        lse_error(result.lse, wanted.lse) / LSE_LIMITS[dtype],
    )


def relative_error(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over the norm of what was wanted, or of the difference alone where that is 0.

    inf where anything is NaN.
    """
    wanted = wanted.cpu().double()
    difference, norm = (given.cpu().double() - wanted).norm(), wanted.norm()
    error = difference / norm if norm > 0 else difference
    return float(error.nan_to_num(torch.inf))


def lse_error(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over 1 + |wanted|; -inf, of what sees nothing, must be met exactly."""
    given, wanted = given.cpu().double(), wanted.cpu().double()
    difference = torch.where(given == wanted, 0.0, (given - wanted).abs() / (1 + wanted.abs()))
    return float(difference.nan_to_num(torch.inf).amax()) if difference.numel() else 0.0


@st.composite
def any_row(draw: st.DrawFn, start: int | None = None, count: int | None = None, heads: int | None = None) -> Row:
    """A row with every option there is, of up to some hundred keys."""
    start = draw(st.integers(0, 300)) if start is None else start
    count = draw(st.sampled_from([1, 1, 2, 7, 16, 45])) if count is None else count
    base = draw(st.just(0) | st.integers(0, start))
    lo = draw(st.just(base) | st.integers(base, start))
    return Row(
        start,
        count,
        lo,
        hi=draw(st.sampled_from([start, start + count, start + count + 70, lo, (lo + start) // 2])),
        base=base,
        window=draw(st.sampled_from([EVERYTHING, EVERYTHING, 1, 33, 200])),
        sinks=draw(st.sampled_from([0, 0, 4, 40])),
        listed=draw(st.integers(0, 1)),
        heads=heads,
    )


@st.composite
def any_sequence(draw: st.DrawFn, kv_heads: int) -> list[Row]:
    """All heads of a sequence: in one row, or in rows of unlike keys side by side."""
    widths = draw(st.sampled_from([[kv_heads], [1] * kv_heads, [kv_heads - 1, 1] if kv_heads > 1 else [1]]))
    one = draw(any_row(heads=widths[0]))
    return [one, *(draw(any_row(one.start, one.count, width)) for width in widths[1:])]
