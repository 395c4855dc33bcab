"""Paged attention on a CPU, at the speed at which memory is read.

`plan` checks a batch and deals its work to threads, once for all layers; `attend` then only fills in a block of
arguments and launches the compiled loops. The work of lists of pages is dealt in a compiled loop too, `deal_lists`: in
numpy the arithmetic of `schedule` takes longer than the attention. Every list is one output; where a share ends inside
a list, the list is cut at a multiple of 32 tokens, and its parts are merged.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from operator import gt, ne, sub
from typing import Any

import numba
import numpy as np
import torch
from numba import from_dtype, int32, int64

from lamina_kernels.attention.loops import ARGUMENTS, SCRATCH, attend_kernel
from lamina_kernels.attention.merge import merge_into as merge_into  # one of the kernels
from lamina_kernels.attention.merge import merge_kernel
from lamina_kernels.attention.microkernels import BLOCK, ROW, TILE, WORTH
from lamina_kernels.attention.moves import APPEND, CODES, append_kernel
from lamina_kernels.attention.strips import STRIPS
from lamina_kernels.compile.emitter import kind_of
from lamina_kernels.compile.launch import block_type, launch, load_each
from lamina_kernels.paged.page_lists import ListPlan, check_lists
from lamina_kernels.paged.pages import (
    FLOATS,
    AppendPlan,
    Order,
    PageLayout,
    Pages,
    check_append,
    check_order,
    check_slots,
)
from lamina_kernels.paged.rows import EVERYTHING, Ints, Rows, Table, check_attend, check_rows
from lamina_kernels.paged.schedule import FIXED, MAX_ROWS, MIN_KEYS, PIECE, READ, Pieces, block_tokens, cut, deal
from lamina_kernels.partial import Partial

APPEND_SHARE = 256  # vectors that are worth a thread
DEAL_EVERY = 16  # tokens, or for long rows this part of them: so many keys of each head may be in a share too many
DEAL_PART = 128
KEPT_PLANS = 32
_CUT = 32  # tokens: a list is cut at multiples of it
_NONE_MOVED: Mapping[int, Table] = {}

_Arguments, _AppendArguments = block_type(ARGUMENTS), block_type(APPEND)


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of a batch, cut into shares: the same for all layers. For one thread at a time: it owns scratch."""

    pages: Pages
    n: int  # query vectors
    layers: int
    missing: frozenset[int]  # layers that lack a page which the rows read
    query: torch.dtype  # in which the kernel takes queries
    kernel: int  # address of the compiled loops
    arguments: Any  # their block of arguments
    keep: tuple[Any, ...]  # the memory that addresses in it point to


def layout(page_size: int, d_k: int, d_v: int, dtype: torch.dtype, latent: bool = False) -> PageLayout:
    return PageLayout(page_size, d_k, d_v, dtype, Order.CHANNELS, latent)


def prepare(layout: PageLayout) -> Iterator[tuple[int, int]]:
    """Load the kernels for such pages, and compile what numba's cache on disk lacks: how many of how many."""
    return load_each((lambda: _attend_kernel(layout), append_kernel, merge_kernel, deal_lists_kernel))


def _attend_kernel(layout: PageLayout) -> int:
    return attend_kernel(kind_of(layout.dtype), 2 if layout.page_size % 32 == 0 else 1)


def plan(pages: Pages, rows: Rows, threads: int = 1) -> Plan:
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    check_order(pages, Order.CHANNELS)
    missing = check_rows(pages, rows)
    pieces, starts = deal(cut(rows), threads)
    return _assemble(pages, pieces, starts, _room(pieces), _partials(pieces), rows, missing)


def _partials(pieces: Pieces) -> int:
    """How many query vectors belong to outputs in several pieces, counted once a piece."""
    return int(pieces["rows"][pieces["partial"] >= 0].sum())


def _room(pieces: Pieces) -> int:
    """For how many query vectors a piece needs scratch."""
    return -(-int(pieces["rows"].max(initial=1)) // TILE) * TILE


def _point_to(a: Any, pieces: Pieces, starts: Ints, partials: int, d_v: int) -> torch.Tensor:
    """Let a block of arguments point to pieces and to memory for their partials, which is returned."""
    partial_out = torch.empty(partials * (d_v + 1))
    a.pieces, a.starts = pieces.ctypes.data, starts.ctypes.data
    a.partials, a.partial_lse = partial_out.data_ptr(), partial_out.data_ptr() + partials * d_v * 4
    return partial_out


def grown(plan: Plan) -> Grown | None:
    """As `select.Kernels.grown`. None for rows without keys, with lists, with a window that ends before the
    queries; and where rows of several tokens lie among each other in q."""
    rows: Rows = plan.keep[0]
    plain = (rows.lo < rows.hi) & (rows.listed == 0) & ((rows.window >= EVERYTHING) | (rows.hi >= rows.start))
    plain &= (rows.count == 1) | (rows.stride == rows.kv_heads * rows.group)
    return Grown(plan) if plain.all() else None


class Grown:
    """Plans of rows that go on from batch to batch. They are made in place, so only the last one is valid. Now and then
    their work is dealt anew, so that shares stay equal; so it is where a row has another number of queries. For each
    number of query vectors that a batch has there is a plan of its own, of the last `KEPT_PLANS` numbers."""

    def __init__(self, plan: Plan) -> None:
        pieces = plan.keep[1]
        self._plans = {plan.n: (_room(pieces), plan)}  # with the query vectors of a piece for which there is scratch
        self._follow(plan)

    def _follow(self, plan: Plan) -> None:
        """Note which pieces belong to each row, and which end where a row's keys end: the last ones of their
        outputs."""
        rows, pieces, *_ = plan.keep
        self._plan, self._rows = plan, rows
        # As they are now; those of the plan's rows are of the last deal.
        self._start, self._count, self._hi = rows.start.tolist(), rows.count.tolist(), rows.hi.tolist()
        self._deal_at = max(self._start) + max(DEAL_EVERY, min(self._hi) // DEAL_PART)
        blocks = -(-rows.count // block_tokens(rows.group))
        output = pieces["output"]
        self._of_piece = np.repeat(np.arange(len(rows)), rows.kv_heads * blocks)[output]
        self._last = np.append(output[1:] != output[:-1], True)
        self._position, self._end = pieces["position"], pieces["hi"]
        self._window, self._begin = pieces["window"], pieces["lo"]
        self._windowed = bool((self._window < EVERYTHING).any())
        self._growing: list[bool] = []
        self._ends = np.zeros(0, np.int64)
        # A window that hides nothing yet has pieces without one: where it begins to hide, work is dealt anew.
        edge = np.maximum(rows.lo, rows.sinks) + rows.window - rows.count
        late = (rows.window < EVERYTHING) & (rows.start <= edge)
        self._until: list[int] = np.where(late, edge, EVERYTHING).tolist() if late.any() else []

    def next(
        self, start: Sequence[int], count: Sequence[int], hi: Sequence[int], moved: Mapping[int, Table] = _NONE_MOVED
    ) -> Plan:
        """As `select.Grown.next`: the same plan as before, or another one."""
        near = max(start) < self._deal_at and not any(map(gt, start, self._until))
        if count == self._count and not moved and near:
            self._move(start, hi)
            return self._plan
        rows = self._rows
        begins, counts, ends = (np.array(x, np.int64) for x in (start, count, hi))
        vectors = counts * rows.kv_heads * rows.group
        tables = [moved.get(number, table) for number, table in enumerate(rows.tables)] if moved else rows.tables
        self._follow(
            self._dealt(
                dataclasses.replace(
                    rows, first=np.cumsum(vectors) - vectors, start=begins, count=counts, hi=ends, tables=tables
                )
            )
        )
        return self._plan

    def _move(self, start: Sequence[int], hi: Sequence[int]) -> None:
        """The rows' queries are further, but as many as before."""
        steps = list(map(sub, start, self._start))
        growing = list(map(ne, hi, self._hi))
        if growing != self._growing:
            self._growing = growing
            self._ends = np.where(self._last, np.array(growing, np.int64)[self._of_piece], 0)
        if steps.count(steps[0]) == len(steps):  # which takes half the time
            self._position += steps[0]
            self._end += self._ends if steps[0] == 1 else self._ends * steps[0]
        else:
            of_pieces = np.array(steps, np.int64)[self._of_piece]
            self._position += of_pieces
            self._end += self._ends * of_pieces
        if self._windowed:  # keys behind a window may be gone, so no piece touches them
            np.maximum(self._begin, self._position - self._window + 1, out=self._begin)
            np.minimum(self._begin, self._end, out=self._begin)
        self._start, self._hi = start, hi

    def _dealt(self, rows: Rows) -> Plan:
        """A plan of these rows: with the scratch and the block of arguments of one of as many query vectors, where
        there was one."""
        n, plan = rows.n, self._plan
        pieces, starts = deal(cut(rows), plan.arguments.shares)
        room, last = self._plans.pop(n, (0, plan))
        if _room(pieces) <= room:
            a, scratch = last.arguments, last.keep[3]
            partial_out = _point_to(a, pieces, starts, _partials(pieces), plan.pages.layout.d_v)
            plan = dataclasses.replace(last, keep=(rows, pieces, starts, scratch, partial_out))
        else:
            room = _room(pieces)
            plan = _assemble(plan.pages, pieces, starts, room, _partials(pieces), rows, plan.missing)
        self._plans = {**dict(list(self._plans.items())[1 - KEPT_PLANS :]), n: (room, plan)}
        return plan


def _assemble(
    pages: Pages,
    pieces: Pieces,
    starts: Ints,
    vectors: int,
    partials: int,
    rows: Rows | ListPlan,
    missing: frozenset[int] = frozenset(),
) -> Plan:
    """A plan with scratch for `vectors` query vectors a piece, a multiple of TILE, and for so many partials."""
    pages_layout, kind, threads = pages.layout, kind_of(pages.layout.dtype), len(starts) - 1
    listed = isinstance(rows, Rows) and bool(rows.listed.any())
    n, layers = (rows.n, rows.layers) if isinstance(rows, Rows) else (rows.items * rows.group, 1)
    sizes = {
        "panel": vectors * pages_layout.d_k * 4 // kind.words[0],
        "scales": vectors * 4,
        "logits": TILE * ROW,
        "sums": vectors * pages_layout.d_v * 4,
        "totals": vectors * 64,
        "peaks": vectors * 4,
        "decays": 2 * WORTH,
        "tails": 2 * 32 * pages_layout.d_v * pages_layout.dtype.itemsize,
        "lists": 4 * STRIPS * 8,
        "slots": 2 * BLOCK * 4,
        "gathered": BLOCK * (pages_layout.d_k + pages_layout.own_v) * pages_layout.dtype.itemsize * listed,
        "spread": BLOCK * pages_layout.d_v * pages_layout.dtype.itemsize * pages_layout.latent,
    }
    ends = list(accumulate(-(-sizes[name] // 64) * 64 for name in SCRATCH))
    # By numpy, since torch would wake a team of threads to write zeros.
    scratch = torch.from_numpy(np.zeros(threads * ends[-1] + 64, np.uint8))
    base = scratch.data_ptr() + -scratch.data_ptr() % 64
    a = _Arguments(
        shares=threads,
        scratch_bytes=ends[-1],
        **{name: base + start for name, start in zip(SCRATCH, [0, *ends[:-1]], strict=True)},
        **_describe(pages),
    )
    keep = (rows, pieces, starts, scratch, _point_to(a, pieces, starts, partials, pages_layout.d_v))
    return Plan(pages, n, layers, missing, kind.query, _attend_kernel(pages_layout), a, keep)


def _describe(pages: Pages) -> dict[str, int]:
    """The fields of the pages in every block of arguments."""
    pages_layout = pages.layout
    return {
        "arena": pages.arena.data_ptr(),
        "page_size": pages_layout.page_size,
        "page_bytes": pages_layout.page_bytes,
        "k_bytes": pages_layout.k_bytes,
        "kv_bytes": pages_layout.kv_bytes,
        "itemsize": pages_layout.dtype.itemsize,
        "k_pack": pages_layout.k_pack,
        "v_pack": pages_layout.v_pack,
        "scaled": int(pages_layout.scaled),
        "d_k": pages_layout.d_k,
        "d_v": pages_layout.d_v,
        "own_v": pages_layout.own_v,
    }


def attend(
    pages: Pages,
    plan: Plan,
    layer: int,
    q: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
    out: torch.Tensor | None = None,
) -> Partial:
    """As `select.Kernels.attend`. Where the CPU multiplies bfloat16, q and the weights are rounded to it; with KV in
    int8 they are rounded to 16 bits. Sums are float32."""
    check_attend(pages, plan, layer, q, scale, soft_cap, out)
    out = q.new_empty(plan.n, pages.layout.d_v) if out is None else out
    lse = torch.empty(plan.n)
    q = q.to(plan.query).contiguous()
    a = plan.arguments
    a.taken = a.finished = 0
    a.layer, a.q, a.out, a.lse = layer, q.data_ptr(), out.data_ptr(), lse.data_ptr()
    a.out_dtype, a.scale, a.soft_cap = FLOATS.index(out.dtype), scale, soft_cap or 0.0
    launch(plan.kernel, ctypes.addressof(a), a.shares)
    return Partial(out, lse)


@dataclass(frozen=True, slots=True)
class CompiledLists(ListPlan):
    """The same with what the kernel is called with. For one thread at a time."""

    plan: Plan
    pieces: Pieces
    starts: Ints


def plan_lists(pages: Pages, items: int, group: int, threads: int = 1) -> CompiledLists:
    """As `select.Kernels.plan_lists`; `group` is at most 128."""
    check_order(pages, Order.CHANNELS)
    lists = ListPlan(pages, items, group, threads)
    if group > MAX_ROWS:
        raise ValueError(f"group must be at most {MAX_ROWS}, got {group}")
    pieces, starts = np.zeros(items + threads, PIECE), np.zeros(threads + 1, np.int64)
    vectors = -(-group // TILE) * TILE
    plan = _assemble(pages, pieces, starts, vectors, 2 * threads * group, lists)
    return CompiledLists(pages, items, group, threads, plan, pieces, starts)


def attend_lists(
    pages: Pages,
    plan: CompiledLists,
    lists: Table,
    lengths: Ints,
    q: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
) -> Partial:
    """As `page_lists.through_rows`, in a tenth of the time that planning would take."""
    check_lists(pages, plan, lists, lengths, q)
    bad = deal_lists(plan.pieces, plan.starts, lists, lengths, plan.group, pages.layout.page_size, pages.n_pages)
    if bad >= 0:
        raise ValueError(f"list {bad} names a page that does not exist; there are pages 0 to {pages.n_pages - 1}")
    return attend(pages, plan.plan, 0, q, scale, soft_cap)


@dataclass(frozen=True, slots=True)
class CompiledAppend(AppendPlan):
    """The same with what the kernel is called with. For one thread at a time."""

    threads: int
    arguments: Any  # the kernel's block of arguments
    codes: torch.Tensor  # its scratch


def plan_append(pages: Pages, slots: torch.Tensor) -> CompiledAppend:
    check_order(pages, Order.CHANNELS)
    check_slots(pages, slots)
    slots = slots.contiguous()
    threads = min(1 + slots.shape[1] // APPEND_SHARE, torch.get_num_threads())
    codes = torch.empty(threads * CODES, dtype=torch.uint8)
    described = _describe(pages) | {"d_k": pages.layout.key_width}  # index keys are stored too
    a = _AppendArguments(shares=threads, n=slots.shape[1], codes=codes.data_ptr(), **described)
    return CompiledAppend(pages, slots, threads, a, codes)


def append(pages: Pages, plan: CompiledAppend, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
    check_append(pages, plan, layer, k, v)
    k, v = k.to(pages.layout.loaded).contiguous(), v.to(pages.layout.loaded).contiguous()
    a = plan.arguments
    a.taken = a.finished = 0
    a.slots, a.k, a.v = plan.slots.data_ptr() + layer * plan.slots.shape[1] * 8, k.data_ptr(), v.data_ptr()
    launch(append_kernel(), ctypes.addressof(a), plan.threads)


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
    items, entries = lists.shape
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
            piece.table, piece.layer_stride, piece.listed = address + i * entries * 4, 0, 0
            piece.output, piece.parts, piece.partial = i, 1, -1
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
            for number in range(first, n):
                pieces[number].partial = partials
                partials += group
    while share < shares:
        share += 1
        starts[share] = n
    return -1
