"""A budget of pages: which of an item's pages are always read, and how many of the others may be.

Shared by the policies that read a fixed share of a sequence's pages, some of which scan them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.rows import Ints
from lamina_kernels.sketches import sketches
from lamina_kernels.sketches.sketches import Sketches
from lamina_protocols.messages import LayerSpec
from lamina_workers.policies.chooser import Float32, Holding, Int32, Items


class Budgeted(Protocol):
    """The parameters of a policy with a budget."""

    @property
    def sink(self) -> int:
        """First tokens that are always read."""

    @property
    def recent(self) -> int:
        """Last tokens that are always read."""

    @property
    def budget(self) -> float:
        """The share of all pages that is read beside those."""


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


def bounds(policy: Budgeted, items: Items, page_size: int) -> Bounds:
    """The bounds of a decode step's items."""
    held = -(-items.tokens // page_size)
    sealed = items.tokens // page_size
    recent = np.minimum(np.maximum(0, items.tokens - policy.recent) // page_size, sealed)
    sinks = np.minimum(np.where(items.begins, -(-policy.sink // page_size), 0), recent)
    return Bounds(held, sealed, sinks, recent, np.ceil(policy.budget * held).astype(np.int64))


@dataclass(frozen=True, slots=True)
class ScannedItems:
    """A decode step's items with their bounds, and the kernels' plan of a scan of them; None where all is read."""

    items: Items
    at: Bounds
    scan: Any

    def masses(self, of: Sketches, spec: LayerSpec, q: torch.Tensor) -> tuple[Float32, int]:
        """The log-masses of a layer's pages, `[items, group, entries]` as in `sketches.Choice`, and the bytes read."""
        found = sketches.scan(of, self.scan, spec.kv_layer, q, spec.scale, spec.soft_cap, 0.0)
        return found.log_mass.numpy(), int(self.at.held.sum()) * of.layout.sketch_bytes


def scanned(policy: Budgeted, holding: Holding, items: Items) -> ScannedItems:
    """The items of a decode step, planned for a policy that may scan."""
    at = bounds(policy, items, holding.page_size)
    if at.whole:
        return ScannedItems(items, at, None)
    asked = sketches.Items(items.tables, at.sealed, at.sinks, at.recent, at.held)
    return ScannedItems(items, at, sketches.plan_scan(holding.sketches, asked, items.group, holding.threads))


def best(scores: npt.NDArray[np.float32], number: int) -> Ints:
    """The indices of the `number` highest scores, float32 `[n]`: int64, ascending."""
    if number >= len(scores):
        return np.arange(len(scores))
    if number <= 0:
        return np.empty(0, np.int64)
    found: Ints = np.sort(np.argpartition(scores, -number)[-number:])
    return found


def lists(pages: Sequence[Int32]) -> tuple[Int32, Ints]:
    """The pages of items, int32 `[n]` each, as a `Choice` has them: int32 `[items, most]`, and the count of each."""
    counts = np.array([len(of_item) for of_item in pages], np.int64)
    together = np.zeros((len(pages), int(counts.max(initial=0))), np.int32)
    for row, of_item in zip(together, pages, strict=True):
        row[: len(of_item)] = of_item
    return together, counts
