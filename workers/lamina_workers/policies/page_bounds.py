"""Which of an item's pages are read in any case, the first and the recent ones, and which may be left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lamina_kernels.paged.rows import Ints
from lamina_workers.policies.chooser import Items


@dataclass(frozen=True, slots=True)
class Bounds:
    """By item, int64 `[items]`: there are `held` entries, of which [0, sealed) have sketches; [0, sinks) and
    [recent, held) are always read."""

    held: Ints
    sealed: Ints
    sinks: Ints
    recent: Ints


def bounds(sink: int, recent: int | Ints, items: Items, page_size: int) -> Bounds:
    """The bounds of a decode step's items, where the `sink` first and `recent` last tokens are always read."""
    sealed = items.tokens // page_size
    last = np.minimum(np.maximum(0, items.tokens - recent) // page_size, sealed)
    sinks = np.minimum(np.where(items.begins, -(-sink // page_size), 0), last)
    return Bounds(-(-items.tokens // page_size), sealed, sinks, last)
