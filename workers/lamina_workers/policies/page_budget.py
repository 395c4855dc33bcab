"""A budget of pages: which of an item's pages are always read, and how many of the others may be.

Shared by the policies that read a fixed share of a sequence's pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.rows import Ints
from lamina_kernels.sketches import sketches
from lamina_kernels.sketches.items import Items as SketchItems
from lamina_kernels.sketches.layout import Sketches
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.policies.chooser import Adaptive, Float32, Holding, Items
from lamina_workers.policies.policy import LONGEST


@dataclass(frozen=True)
class Budgeted(Adaptive):
    """`sink` first and `recent` last tokens are always read, and of all pages the share `budget` beside them."""

    sink: int = 64
    recent: int = 256
    budget: float = 0.25

    def __post_init__(self) -> None:
        self.check("sink", 0, LONGEST)
        self.check("recent", 1, LONGEST)
        self.check("budget", 0, 1)


@dataclass(frozen=True, slots=True)
class Bounds:
    """By item, int64 `[items]`: there are `held` entries, of which [0, sealed) have sketches; [0, sinks) and
    [recent, held) are always read, and `picks` of those in between."""

    held: Ints
    sealed: Ints
    sinks: Ints
    recent: Ints
    picks: Ints

    @property
    def whole(self) -> bool:
        """Whether every page of every item is read anyway."""
        return bool((self.picks >= self.recent - self.sinks).all())


def bounds(sink: int, recent: int, budget: float, items: Items, page_size: int) -> Bounds:
    """The bounds of a decode step's items, by the parameters of `Budgeted`."""
    page_counts = -(-items.tokens // page_size)
    sealed = items.tokens // page_size
    last = np.minimum(np.maximum(0, items.tokens - recent) // page_size, sealed)
    sinks = np.minimum(np.where(items.begins, -(-sink // page_size), 0), last)
    return Bounds(page_counts, sealed, sinks, last, np.ceil(budget * page_counts).astype(np.int64))


@dataclass(frozen=True, slots=True)
class ScannedItems:
    """A decode step's items with their bounds, and the kernels' plan of a scan of them; None where all is read."""

    items: Items
    at: Bounds
    scan: Any

    def masses(self, of: Sketches, spec: LayerSpec, q: torch.Tensor) -> tuple[Float32, int]:
        """The log-masses of a layer's pages, `[items, group, entries]` as in a scan's `Choice`, and the bytes read."""
        scan_result = sketches.scan(of, self.scan, spec.kv_layer, q, spec.scale, spec.soft_cap, 0.0)
        return scan_result.log_mass.cpu().numpy(), int(self.at.held.sum()) * of.layout.scanned_bytes


def planned(policy: Budgeted, items: Items, at: Holding) -> ScannedItems:
    """A decode step's items of a policy."""
    item_bounds = bounds(policy.sink, policy.recent, policy.budget, items, at.page_size)
    if item_bounds.whole:
        return ScannedItems(items, item_bounds, None)
    ends = item_bounds.sealed, item_bounds.sinks, item_bounds.recent, item_bounds.held
    scan = sketches.plan_scan(at.sketches, SketchItems(items.tables, *ends), items.group, at.threads)
    return ScannedItems(items, item_bounds, scan)


def best(scores: npt.NDArray[np.float32], number: int) -> Ints:
    """The indices of the `number` highest scores, float32 `[n]`: int64, ascending."""
    if number >= len(scores):
        return np.arange(len(scores))
    if number <= 0:
        return np.empty(0, np.int64)
    indices: Ints = np.sort(np.argpartition(scores, -number)[-number:])
    return indices
