"""Every operation in plain torch, slow and obvious: what the fast kernels are tested against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lamina_kernels.attention.merge import check_merge
from lamina_kernels.paged.page_lists import ListPlan, through_rows
from lamina_kernels.paged.pages import (
    AppendPlan,
    Order,
    PageLayout,
    Pages,
    check_append,
    check_range,
    check_slots,
    gather,
    quantise,
)
from lamina_kernels.paged.rows import Rows, Table, check_attend, check_rows
from lamina_kernels.partial import Partial, empty, merge


@dataclass(frozen=True, slots=True)
class Plan:
    """The part of a batch's work that is the same in all layers."""

    pages: Pages
    rows: Rows
    missing: frozenset[int]  # layers that lack a page which the rows read

    @property
    def n(self) -> int:
        """How many query vectors a call takes."""
        return self.rows.n

    @property
    def layers(self) -> int:
        """How many layers the tables have."""
        return self.rows.layers


def layout(page_size: int, d_k: int, d_v: int, dtype: torch.dtype, latent: bool = False) -> PageLayout:
    """They read any order."""
    return PageLayout(page_size, d_k, d_v, dtype, Order.TOKENS, latent)


def prepare(layout: PageLayout) -> Iterator[tuple[int, int]]:
    """There is nothing to load."""
    return iter(())


def plan(pages: Pages, rows: Rows, threads: int = 1) -> Plan:
    """As `select.Kernels.plan`; `threads` is of no use here."""
    return Plan(pages, rows, check_rows(pages, rows))


def grown(plan: Plan) -> None:
    """None: batches are planned anew."""


def plan_append(pages: Pages, slots: torch.Tensor) -> AppendPlan:
    check_slots(pages, slots)
    return AppendPlan(pages, slots)


def append(pages: Pages, plan: AppendPlan, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
    check_append(pages, plan, layer, k, v)
    pages_layout = pages.layout
    page, offset = plan.slots[layer] // pages_layout.page_size, plan.slots[layer] % pages_layout.page_size
    if pages_layout.scaled:
        k, pages.scales[page, 0, offset] = quantise(k, pages_layout.dtype)
    pages.k[page, offset] = k.to(pages_layout.dtype).reshape(
        -1, pages_layout.key_width // pages_layout.k_pack, pages_layout.k_pack
    )
    if pages_layout.latent:
        return
    if pages_layout.scaled:
        v, pages.scales[page, 1, offset] = quantise(v, pages_layout.dtype)
    pages.v[page, offset // pages_layout.v_pack, offset % pages_layout.v_pack] = v.to(pages_layout.dtype)


def attend(
    pages: Pages,
    plan: Plan,
    layer: int,
    q: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
    out: torch.Tensor | None = None,
) -> Partial:
    rows = plan.rows
    check_attend(pages, plan, layer, q, scale, soft_cap, out)
    result, lse = empty(rows.n, pages.layout.d_v, q.dtype) if out is None else (out, torch.empty(rows.n))
    for row, table in enumerate(rows.tables):
        first, count, stride = int(rows.first[row]), int(rows.count[row]), int(rows.stride[row])
        heads, group = int(rows.kv_heads[row]), int(rows.group[row])
        vectors = first + torch.arange(count)[:, None] * stride + torch.arange(heads * group)
        queries = q[vectors].float().view(count, heads, group, -1)
        sums = torch.full((count, heads, group), -torch.inf)
        answers = torch.zeros(count, heads, group, pages.layout.d_v, dtype=q.dtype)
        keys = torch.arange(int(rows.lo[row]), max(int(rows.lo[row]), int(rows.hi[row])))
        age = (int(rows.start[row]) + torch.arange(count)).unsqueeze(1) - keys
        visible = (age >= 0) & ((age < int(rows.window[row])) | (keys < int(rows.sinks[row])))
        visible_keys = visible.any(0)  # a key that no query sees may lie in a freed page
        keys, visible = keys[visible_keys] - int(rows.base[row]), visible[:, visible_keys]
        for head in range(heads if len(keys) else 0):
            k, v = _read(pages, table[layer, head], keys, bool(rows.listed[row]))
            logits = torch.einsum("tgd,kd->tgk", queries[:, head], k) * scale
            if soft_cap is not None:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            logits = logits.masked_fill(~visible.unsqueeze(1), -torch.inf)
            sums[:, head] = torch.logsumexp(logits, -1)
            nothing = sums[:, head].unsqueeze(-1) == -torch.inf  # not so where a logit is NaN: that must be seen
            weights = torch.softmax(logits, -1).masked_fill(nothing, 0.0)
            answers[:, head] = (weights @ v).to(q.dtype)
        result[vectors], lse[vectors] = answers.flatten(1, 2), sums.flatten(1)
    return Partial(result, lse)


def _read(pages: Pages, entries: Table, slots: torch.Tensor, listed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """k `[n, d_k]` and v `[n, d_v]` in float32, of the table's `slots` (int64 `[n]`)."""
    table, size = torch.from_numpy(entries.astype(np.int64)), pages.layout.page_size
    place = table[slots] if listed else table[slots // size] * size + slots % size
    needed, inverse = torch.unique(place // size, return_inverse=True)
    k, v = gather(pages, needed, len(needed) * size)
    index = inverse * size + place % size
    return k[index, : pages.layout.d_k].float(), v[index].float()


def merge_into(into: Partial, past: Partial, index: torch.Tensor | None) -> None:
    total, n, _ = check_merge(into, past, index)
    if not n:
        return
    if index is None:
        index = torch.arange(total)
    check_range("index", index, total)
    mine = Partial(into.out[index].float(), into.lse[index])
    out, into.lse[index] = merge((mine, Partial(past.out.float(), past.lse)))
    into.out[index] = out.to(into.out.dtype)


def plan_lists(pages: Pages, items: int, group: int, threads: int = 1) -> ListPlan:
    return ListPlan(pages, items, group, threads)


attend_lists = through_rows(plan, attend)
