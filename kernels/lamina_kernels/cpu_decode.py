"""Paged attention on a CPU, at the speed at which memory is read.

`plan` checks a batch and deals its work to threads, once for all layers; `attend` then only fills in a block of
arguments and launches the compiled loops. Knows pages and rows; knows no policy and no sequence.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from lamina_kernels.cpu_loops import APPEND, ARGUMENTS, STRIPS, append_kernel, attend_kernel
from lamina_kernels.emitter import kind_of
from lamina_kernels.launch import block_type, launch
from lamina_kernels.merge import merge_into
from lamina_kernels.microkernels import ROW, TILE
from lamina_kernels.pages import (
    Pages,
    Rows,
    check_append,
    check_attend,
    check_rows,
    check_slots,
    copy,
    gather,
)
from lamina_kernels.partial import Partial
from lamina_kernels.schedule import EVERYTHING, cut, deal

__all__ = ["AppendPlan", "Plan", "append", "attend", "copy", "gather", "merge_into", "plan", "plan_append"]

OUT_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as `settle` numbers them
APPEND_SHARE = 256  # vectors that are worth a thread

_Arguments, _AppendArguments = block_type(ARGUMENTS), block_type(APPEND)


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of a batch, cut into shares: the same for all layers. For one thread at a time: it owns scratch."""

    n: int  # query vectors
    layers: int
    missing: frozenset[int]  # layers that lack a page which the rows read
    query: torch.dtype  # in which the kernel takes queries
    kernel: int  # address of the compiled loops
    arguments: Any  # their block of arguments
    keep: tuple[Any, ...]  # what addresses in it point to


def plan(pages: Pages, rows: Rows, window: int | None = None, threads: int = 1) -> Plan:
    """Check `rows`, and cut their attention into `threads` equal shares, once for all layers.

    Raises ValueError on rows that overlap, read beyond their table, or name pages that do not exist. Page -1 is none:
    a layer where one is read cannot be attended.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    missing = check_rows(pages, rows, window)
    at, kind = pages.layout, kind_of(pages.layout.dtype)
    pieces, starts = deal(cut(rows, window), threads)
    vectors = -(-int(pieces["rows"].max(initial=1)) // TILE) * TILE
    partials = int(pieces["rows"][pieces["partial"] >= 0].sum())
    sizes = {
        "panel": vectors * at.d_k * kind.query.itemsize,
        "logits": TILE * ROW,
        "sums": vectors * at.d_v * 4,
        "totals": vectors * 64,
        "peaks": vectors * 4,
        "decays": TILE * 4,
        "tails": 2 * 32 * at.d_v * at.dtype.itemsize,
        "lists": 4 * STRIPS * 8,
    }
    ends = list(accumulate(-(-size // 64) * 64 for size in sizes.values()))
    scratch = torch.zeros(threads * ends[-1] + 64, dtype=torch.uint8)
    partial_out = torch.empty(partials * (at.d_v + 1))
    base = scratch.data_ptr() + -scratch.data_ptr() % 64
    a = _Arguments(
        shares=threads,
        window=window or EVERYTHING,
        pieces=pieces.ctypes.data,
        starts=starts.ctypes.data,
        partials=partial_out.data_ptr(),
        partial_lse=partial_out.data_ptr() + partials * at.d_v * 4,
        scratch_bytes=ends[-1],
        **{name: base + start for name, start in zip(sizes, [0, *ends[:-1]], strict=True)},
        **_describe(pages),
    )
    kernel = attend_kernel(kind, 2 if at.page_size % 32 == 0 else 1)
    keep = (rows, pieces, starts, scratch, partial_out)
    return Plan(rows.n, rows.layers, missing, kind.query, kernel, a, keep)


def _describe(pages: Pages) -> dict[str, int]:
    """What every block of arguments says of the pages."""
    at = pages.layout
    return {
        "arena": pages.arena.data_ptr(),
        "page_size": at.page_size,
        "page_bytes": at.page_bytes,
        "k_bytes": at.k_bytes,
        "itemsize": at.dtype.itemsize,
        "pair": at.pair,
        "d_k": at.d_k,
        "d_v": at.d_v,
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
    """Attention of q `[n, d_k]` over the pages of `layer`: out `[n, d_v]` in q's dtype, lse float32 `[n]`.

    A query at position p sees key position k iff k <= p, lo <= k < hi and, with a window, p - k < window.
    softmax(cap(scale * q.k)) v, where cap(x) = soft_cap * tanh(x / soft_cap), or x without a soft cap.
    Where the CPU multiplies bfloat16, q and the weights are rounded to it; sums are float32.
    """
    check_attend(pages, plan, layer, q, scale, soft_cap, out)
    out = q.new_empty(plan.n, pages.layout.d_v) if out is None else out
    lse = torch.empty(plan.n)
    q = q.to(plan.query).contiguous()
    a = plan.arguments
    if a.arena != pages.arena.data_ptr():
        raise ValueError("the plan was made for other pages")
    a.taken = a.finished = 0
    a.layer, a.q, a.out, a.lse = layer, q.data_ptr(), out.data_ptr(), lse.data_ptr()
    a.out_dtype, a.scale, a.soft_cap = OUT_DTYPES[out.dtype], scale, soft_cap or 0.0
    launch(plan.kernel, ctypes.addressof(a), a.shares)
    return Partial(out, lse)


@dataclass(frozen=True, slots=True)
class AppendPlan:
    """Where the K and V of a batch go, in every layer. For one thread at a time."""

    slots: torch.Tensor
    threads: int
    arguments: Any


def plan_append(pages: Pages, slots: torch.Tensor) -> AppendPlan:
    """Check slots, int64 `[layers, n]` (page * page_size + offset for each vector), once for all layers."""
    check_slots(pages, slots)
    slots = slots.contiguous()
    threads = min(1 + slots.shape[1] // APPEND_SHARE, torch.get_num_threads())
    return AppendPlan(slots, threads, _AppendArguments(shares=threads, n=slots.shape[1], **_describe(pages)))


def append(pages: Pages, plan: AppendPlan, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store k `[n, d_k]` and v `[n, d_v]` of a layer, rounded to the pages' dtype, at the plan's slots."""
    check_append(pages, plan.slots, layer, k, v)
    k, v = k.to(pages.layout.dtype).contiguous(), v.to(pages.layout.dtype).contiguous()
    a = plan.arguments
    if a.arena != pages.arena.data_ptr():
        raise ValueError("the plan was made for other pages")
    a.taken = a.finished = 0
    a.slots, a.k, a.v = plan.slots.data_ptr() + layer * plan.slots.shape[1] * 8, k.data_ptr(), v.data_ptr()
    launch(append_kernel(), ctypes.addressof(a), plan.threads)
