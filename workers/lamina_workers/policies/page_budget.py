"""A budget of pages: which of an item's pages are always read, and how many of the others may be.

Shared by the policies that read a fixed share of a sequence's pages. Knows numbers of entries, no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lamina_workers.policies.chooser import Int32, Items

Ints = npt.NDArray[np.int64]


class Budgeted(Protocol):
    """The parameters of such a policy."""

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
    [recent, held) are always read, and so many `picks` of those in between."""

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
    """Those of a decode step."""
    held = -(-items.tokens // page_size)
    sealed = items.tokens // page_size
    recent = np.minimum(np.maximum(0, items.tokens - policy.recent) // page_size, sealed)
    sinks = np.minimum(np.where(items.begins, -(-policy.sink // page_size), 0), recent)
    return Bounds(held, sealed, sinks, recent, np.ceil(policy.budget * held).astype(np.int64))


def best(scores: npt.NDArray[np.float32], number: int) -> Ints:
    """Where the `number` highest scores, float32 `[n]`, stand: int64, ascending."""
    if number >= len(scores):
        return np.arange(len(scores))
    if number <= 0:
        return np.empty(0, np.int64)
    found: Ints = np.sort(np.argpartition(scores, -number)[-number:])
    return found


def lists(pages: Sequence[Int32]) -> tuple[Int32, Ints]:
    """The pages of items, int32 `[n]` each, as a `Choice` has them: int32 `[items, most]`, and how many each has."""
    counts = np.array([len(of_item) for of_item in pages], np.int64)
    together = np.zeros((len(pages), int(counts.max(initial=0))), np.int32)
    for row, of_item in zip(together, pages, strict=True):
        row[: len(of_item)] = of_item
    return together, counts
