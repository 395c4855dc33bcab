"""What an adaptive policy is given in a decode step, and what it answers: pages to read, and what stands for the rest.

A chooser is made once a worker for each adaptive policy in use. It reads queries and sketches of pages; pages only to
build an index of what they hold. Kernels attend what it chose, and the partials merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.pages import Pages
from lamina_kernels.partial import Partial
from lamina_kernels.sketches.sketches import Sketches
from lamina_protocols.layers import LayerSpec
from lamina_workers.policies.policy import Policy

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Holding:
    """What choosers share: the worker's pages, the sketches of the full ones, and how many threads they may use."""

    sketches: Sketches
    page_size: int
    threads: int
    pages: Pages


@dataclass(frozen=True, slots=True)
class Items:
    """What a decode step asks of one policy in some layers: one query to each of some parts' KV heads.

    `parts` and `heads` name them. `tables` are int32 views `[layers, entries]`: entry e is the page of the part's
    tokens e * page_size ...; every page is held, and all are full but perhaps the last. `tokens` of each are read. The
    part's first token is the sequence's first where `begins`; else it has no sinks.
    """

    parts: Sequence[int]
    heads: Sequence[int]
    tables: Sequence[Int32]
    tokens: npt.NDArray[np.int64]
    begins: npt.NDArray[np.bool_]
    group: int

    def __len__(self) -> int:
        return len(self.tables)


class Choice(NamedTuple):
    """Per item the pages to read exactly: of int32 `[items, most]`, contiguous, the first counts[i], in the order of
    their tokens, the table's last one always. counts: int64 `[items]`.

    `missed`, float32 `[items * group]`, estimates the attention mass of what is not read; NaN where it is unknown.
    `rest`, where given, stands for it: a partial of all items' vectors, which is merged into what was read. `read`
    counts the bytes that were read to choose.
    """

    pages: Int32
    counts: npt.NDArray[np.int64]
    missed: Float32
    read: int = 0
    rest: Partial | None = None


class Chooser(Protocol):
    """Chooses for one adaptive policy. Called by the worker's one thread."""

    def worth(self, tokens: Sequence[int]) -> bool:
        """Whether to choose at all in layers where items read so many tokens each; else everything is read."""

    def plan(self, items: Items) -> Any:
        """What is the same for all layers of a decode step."""

    def choose(self, plan: Any, layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        """What the queries q of that layer, `[items * group, d_k]`, item by item, need to read."""

    def forget(self, handle: int) -> None:
        """A part is closed."""


@runtime_checkable
class Observer(Protocol):
    """A chooser that is shown more than decode's queries. Positions count from the part's first token."""

    def observe(self, handle: int, layer: int, head: int, first: int, q: Float32) -> None:
        """Prefill's queries of a part's KV head, float32 `[t, group, d_k]`, at positions first, first + 1, ..."""

    def fork(self, handle: int, parent: int, tokens: int) -> None:
        """A part is new, and has the first `tokens` of another."""

    def written(self, handle: int, start: int) -> None:
        """A part's tokens from `start` on are new, or differ from before."""


class Adaptive(Policy):
    """A policy with a chooser."""

    adaptive: ClassVar[bool] = True
    sketched: ClassVar[bool] = True

    def chooser(self, at: Holding) -> Chooser:
        """A new chooser for one worker."""
        raise NotImplementedError(f"policy {self.name} has no chooser")


def everything(items: Items, layer: int) -> Choice:
    """All pages of a layer: nothing is missed."""
    counts = np.array([table.shape[1] for table in items.tables], np.int64)
    pages = np.zeros((len(items), int(counts.max(initial=0))), np.int32)
    for row, table in zip(pages, items.tables, strict=True):
        row[: table.shape[1]] = table[layer]
    return Choice(pages, counts, np.zeros(len(items) * items.group, np.float32))
