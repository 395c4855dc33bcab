"""The messages that carry a sample of a prompt's queries to the holders whose policies learn from them.

A holder says in `Announced.samples` what it wants of each row that brings it no queries: a prompt that is attended
elsewhere, or beyond the holder's range. It gets one `Sample` for each such row and layer, once the row's K and V of the
layer are on their way. A sample moves with the KV of its part, by `FetchSample` and `Sample`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Sample:
    """Some of a prompt's queries, for the part `handle` of a row of the batch. It has no answer.

    positions: those of the tokens, ascending. heads: the part's KV heads that are asked. q: of two bytes a number,
    `[positions * heads * group, query_width]`, by position, then KV head, then its query heads.
    """

    epoch: int
    batch: int
    layer: int
    handle: int
    heads: tuple[int, ...]
    positions: tuple[int, ...]
    q: torch.Tensor


@dataclass(frozen=True, slots=True)
class FetchSample:
    """Ask for what is kept of the queries at positions [lo, hi) to a part in one layer; and for all later ones
    too where the part's range ends at `hi`. Needs no announcement, changes nothing."""

    epoch: int
    batch: int
    layer: int
    handle: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class FetchedSample:
    """The answer. heads, positions and q as in `Sample`, all empty where nothing is kept."""

    epoch: int
    batch: int
    layer: int
    heads: tuple[int, ...]
    positions: tuple[int, ...]
    q: torch.Tensor
