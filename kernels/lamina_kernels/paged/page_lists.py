"""Decode over lists of pages: one query for each list, all of whose tokens it sees.

What a policy chooses anew in a layer is attended so: the lists change with every call, the plan does not. Here are the
parts that the implementations share, and the plain way through `plan` and `attend`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lamina_kernels.paged.pages import Pages, check_made_for, check_vectors
from lamina_kernels.paged.rows import Ints, Rows, Table
from lamina_kernels.partial import Partial

Attend = Callable[..., Partial]


@dataclass(frozen=True, slots=True)
class ListPlan:
    """Room for `items` lists in `pages`, each with a query of `group` heads."""

    pages: Pages
    items: int
    group: int
    threads: int

    def __post_init__(self) -> None:
        for name in ("items", "group", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def check_lists(pages: Pages, plan: ListPlan, lists: Table, lengths: Ints, q: torch.Tensor) -> None:
    """Raise ValueError unless lists, int32 `[items, most]`, have room for `lengths` tokens, int64 `[items]`, and q is
    `[items * group, d_k]`. The pages that they name are the implementation's to check."""
    check_made_for(plan.pages, pages)
    check_vectors("q", q, plan.items * plan.group, pages.layout.d_k, pages.arena.device)
    if lists.dtype != np.int32 or lists.ndim != 2 or len(lists) != plan.items or not lists.flags.c_contiguous:
        raise ValueError(f"lists must be int32 [{plan.items}, most], contiguous, got {lists.dtype} {list(lists.shape)}")
    if lengths.dtype != np.int64 or lengths.shape != (plan.items,) or not lengths.flags.c_contiguous:
        raise ValueError(f"lengths must be int64 [{plan.items}], got {lengths.dtype} {list(lengths.shape)}")
    capacity = lists.shape[1] * pages.layout.page_size
    if lengths.min() < 0 or lengths.max() > capacity:
        bad = lengths.min() if lengths.min() < 0 else lengths.max()
        raise ValueError(f"lengths has {bad}, allowed: 0 to {capacity}")


def through_rows(plan_rows: Callable[[Pages, Rows, int], Any], attend: Attend) -> Attend:
    """The `attend_lists` of an implementation, by its `plan` and `attend`."""

    def attend_lists(
        pages: Pages,
        plan: ListPlan,
        lists: Table,
        lengths: Ints,
        q: torch.Tensor,
        scale: float,
        soft_cap: float | None = None,
    ) -> Partial:
        check_lists(pages, plan, lists, lengths, q)
        n, size = plan.items, pages.layout.page_size
        ones, nothing = np.ones(n, np.int64), np.zeros(n, np.int64)
        rows = Rows(
            first=np.arange(n) * plan.group,
            count=ones,
            start=lengths,
            kv_heads=ones,
            group=ones * plan.group,
            lo=nothing,
            hi=lengths,
            base=nothing,
            tables=[lists[i : i + 1, None, : -(-int(length) // size)] for i, length in enumerate(lengths)],
        )
        return attend(pages, plan_rows(pages, rows, plan.threads), 0, q, scale, soft_cap)

    return attend_lists
