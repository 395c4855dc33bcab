"""The question and the answer of a scan of sketches, and the check of the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from lamina_kernels.paged.pages import check_vectors
from lamina_kernels.paged.rows import Ints, Table
from lamina_kernels.partial import Partial
from lamina_kernels.sketches.layout import Sketches


@dataclass(frozen=True, slots=True)
class Items:
    """The question of a decode step to sketches: an item is one KV head of one sequence, with its query heads.

    tables: of each item, int32 `[layers, entries]`, contiguous along the entries: entry e is the page of the tokens
    from e * page_size on. The others are int64 `[items]`: entries [0, sealed) have sketches; entries [0, sinks) and
    [recent, held) are always chosen, as are those from `sealed` on; `held` is how many there are.
    """

    tables: Sequence[Table]
    sealed: Ints
    sinks: Ints
    recent: Ints
    held: Ints

    def __post_init__(self) -> None:
        n = len(self.tables)
        for name in ("sealed", "sinks", "recent", "held"):
            value = getattr(self, name)
            if value.dtype != np.int64 or value.shape != (n,):
                raise ValueError(f"{name} must be int64 [{n}], got {value.dtype} {list(value.shape)}")
            if value.size and value.min() < 0:
                raise ValueError(f"{name} has {value.min()}, allowed: 0 or more")
        late = np.flatnonzero(self.sealed > self.held)
        if late.size:
            i = int(late[0])
            raise ValueError(f"item {i} holds {self.held[i]} entries, but {self.sealed[i]} of them are sealed")

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def layers(self) -> int:
        return self.tables[0].shape[0] if self.tables else 0


MISSED = 0.01  # of the estimated mass, for which means may stand


class Planned(Protocol):
    """What a scan's plan has, whoever made it."""

    @property
    def sketches(self) -> Sketches: ...

    @property
    def items(self) -> Items: ...

    @property
    def group(self) -> int: ...

    @property
    def missing(self) -> frozenset[int]: ...


class Choice(NamedTuple):
    """The answer of `scan`. It belongs to the plan, and is overwritten by the plan's next scan.

    log_mass: float32 `[items, group, capacity]`, the natural log of the sum of exp(logit) over a page's keys as the
    sketch has them, -inf from `sealed` on up to a multiple of 16, and anything behind; pages, entries: int32
    `[items, capacity]`, the first counts[i] of them chosen, in ascending order of the entries; counts: int64
    `[items]`; missed: float32 `[items * group]`, for which share of the estimated mass of the sealed pages means alone
    stand; tail: of the pages not chosen, by their sketches, float32 `[items * group, d_v]`; its lse is -inf where there
    are none; coarse: as missed, which share is of pages whose values are read in 4 bits; coarse_counts: int64
    `[items]`, how many these are.
    """

    log_mass: torch.Tensor
    pages: torch.Tensor
    entries: torch.Tensor
    counts: torch.Tensor
    missed: torch.Tensor
    tail: Partial
    coarse: torch.Tensor
    coarse_counts: torch.Tensor


def check_items(sketches: Sketches, items: Items, group: int) -> frozenset[int]:
    """Raise ValueError unless the entries of `items` are in their tables, and name pages.

    Returns the layers in which entry -1, none, stands among them.
    """
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    missing: set[int] = set()
    for number, (table, n_entries) in enumerate(zip(items.tables, items.held.tolist(), strict=True)):
        layers = items.layers
        if table.dtype != np.int32 or table.ndim != 2 or table.shape[0] != layers or table.shape[1] < n_entries:
            raise ValueError(
                f"the table of item {number} must be int32 [{layers}, {n_entries} or more], "
                f"got {table.dtype} {list(table.shape)}"
            )
        if table.shape[1] > 1 and table.strides[1] != 4:
            raise ValueError(f"the table of item {number} must be contiguous along its entries, got {table.strides}")
        if not n_entries or not layers:
            continue
        used = table[:, :n_entries]
        low, high = int(used.min()), int(used.max())
        if low < -1 or high >= sketches.n_pages:
            raise ValueError(
                f"the table of item {number} names page {low if low < -1 else high}; "
                f"there are pages 0 to {sketches.n_pages - 1}"
            )
        if low == -1:
            missing.update(np.flatnonzero((used == -1).any(axis=1)).tolist())
    return frozenset(missing)


def check_scan(
    plan: Planned,
    sketches: Sketches,
    layer: int,
    q: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    missed: float,
    coarse: float = 0.0,
) -> None:
    """Raise ValueError unless the plan was made for `sketches` and has that layer with all its pages, q is
    `[items * group, d_k]`, the scale is a number, soft_cap positive, and missed and coarse from 0 to 1."""
    if plan.sketches is not sketches:
        raise ValueError("the plan was made for other sketches")
    if not 0 <= layer < plan.items.layers:
        raise ValueError(f"layer must be from 0 to {plan.items.layers - 1}, got {layer}")
    if layer in plan.missing:
        raise ValueError(f"layer {layer} lacks a page that the items read")
    check_vectors("q", q, len(plan.items) * plan.group, sketches.layout.pages.d_k, sketches.scanned.device)
    if not np.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if soft_cap is not None and not 0 < soft_cap < float("inf"):
        raise ValueError(f"soft_cap must be above 0 and finite, or None, got {soft_cap}")
    for name, mass in (("missed", missed), ("coarse", coarse)):
        if not 0 <= mass <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {mass}")
