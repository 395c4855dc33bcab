"""Every operation in plain torch, slow and obvious: what the fast kernels are tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamina_kernels.merge import check_merge
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
from lamina_kernels.partial import Partial, empty, merge

__all__ = ["Plan", "append", "attend", "copy", "gather", "merge_into", "plan", "plan_append"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What of a batch does not change from layer to layer."""

    rows: Rows
    window: int | None
    missing: frozenset[int]  # layers that lack a page which the rows read

    @property
    def n(self) -> int:
        """How many query vectors a call takes."""
        return self.rows.n

    @property
    def layers(self) -> int:
        """How many layers the tables have."""
        return self.rows.layers


def plan(pages: Pages, rows: Rows, window: int | None = None, threads: int = 1) -> Plan:
    """Check `rows` once for all layers. `threads` is of no use here."""
    return Plan(rows, window, check_rows(pages, rows, window))


def plan_append(pages: Pages, slots: torch.Tensor) -> torch.Tensor:
    """Check slots, int64 `[layers, n]` (page * page_size + offset for each vector), once for all layers."""
    check_slots(pages, slots)
    return slots


def append(pages: Pages, plan: torch.Tensor, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store k `[n, d_k]` and v `[n, d_v]` of a layer, rounded to the pages' dtype, at the plan's slots."""
    check_append(pages, plan, layer, k, v)
    at = pages.layout
    page, offset = plan[layer] // at.page_size, plan[layer] % at.page_size
    pages.k[page, :, offset] = k.to(at.dtype).reshape(-1, at.d_k // at.pair, at.pair)
    pages.v[page, offset // at.pair, :, offset % at.pair] = v.to(at.dtype)


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
    """
    rows = plan.rows
    check_attend(pages, plan, layer, q, scale, soft_cap, out)
    result, lse = empty(rows.n, pages.layout.d_v, q.dtype) if out is None else (out, torch.empty(rows.n))
    for row, table in enumerate(rows.tables):
        first, count, heads, group = (int(x[row]) for x in (rows.first, rows.count, rows.kv_heads, rows.group))
        lo, hi, base, start = (int(x[row]) for x in (rows.lo, rows.hi, rows.base, rows.start))
        if plan.window is not None:
            lo = max(lo, start - plan.window + 1)  # below, pages may be freed
        own = slice(first, first + count * heads * group)
        answers, sums = result[own].view(count, heads, group, -1), lse[own].view(count, heads, group)
        if lo >= hi:
            answers.zero_()
            sums.fill_(-torch.inf)
            continue
        keys = torch.arange(lo, hi)
        age = (start + torch.arange(count)).unsqueeze(1) - keys
        visible = (age >= 0) if plan.window is None else (age >= 0) & (age < plan.window)
        queries = q[own].float().view(count, heads, group, -1)
        skipped = (lo - base) // pages.layout.page_size  # whole pages that nothing of is read
        first_key = base + skipped * pages.layout.page_size
        for head in range(heads):
            k, v = gather(pages, torch.from_numpy(table[layer, head, skipped:]), hi - first_key)
            k, v = k[lo - first_key :].float(), v[lo - first_key :].float()
            logits = torch.einsum("tgd,kd->tgk", queries[:, head], k) * scale
            if soft_cap is not None:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            logits = logits.masked_fill(~visible.unsqueeze(1), -torch.inf)
            sums[:, head] = torch.logsumexp(logits, -1)
            weights = torch.softmax(logits, -1).nan_to_num(0.0)  # a query that sees nothing: 0 / 0
            answers[:, head] = (weights @ v).to(q.dtype)
    return Partial(result, lse)


def merge_into(into: Partial, past: Partial, index: torch.Tensor | None) -> None:
    """Merge `past` into the vectors `index` of `into`, in place: `merge` in float32, rounded once."""
    total, n, _ = check_merge(into, past, index)
    if not n:
        return
    if index is None:
        index = torch.arange(total)
    low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= total:
        raise ValueError(f"index must be from 0 to {total - 1}, got {low if low < 0 else high}")
    mine = Partial(into.out[index].float(), into.lse[index])
    out, into.lse[index] = merge((mine, Partial(past.out.float(), past.lse)))
    into.out[index] = out.to(into.out.dtype)
