"""What an adaptive policy is given in a decode step, and what it answers: pages to read, and what stands for the rest.

A chooser is made once a worker for each adaptive policy in use. It reads queries and sketches of pages; pages only to
build an index of what they hold. Kernels attend what it chose, and the partials merge.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.pages import Pages
from lamina_kernels.partial import Partial
from lamina_kernels.sketches.layout import Sketches
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.policies.policy import Policy
from lamina_workers.policies.query_samples import QuerySamples

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Holding:
    """What choosers share: the worker's pages, the sketches of the full ones, and how many threads they may use.

    `samples` are of the queries of prompts. `keys(handle, layer, head, lo, hi)` are a copy of a part's keys, float32
    `[hi - lo, d_k]`, at positions that count from its first token, all of them stored."""

    sketches: Sketches
    page_size: int
    threads: int
    pages: Pages
    samples: QuerySamples
    keys: Callable[[int, int, int, int, int], Float32]


@dataclass(frozen=True, slots=True)
class Items:
    """What a decode step asks of one policy in some layers: one query to each of some parts' KV heads.

    `parts` and `heads` name them. `tables` are int32 views `[layers, entries]`: entry e is the page of the part's
    tokens e * page_size ...; every page is held, and all are full but perhaps the last. `tokens` of each are read. The
    part's first token is the sequence's number `lo`, the query's own its number `positions`.
    """

    parts: Sequence[int]
    heads: Sequence[int]
    tables: Sequence[Int32]
    tokens: npt.NDArray[np.int64]
    lo: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    group: int

    @property
    def begins(self) -> npt.NDArray[np.bool_]:
        """Whether each part has the first token of its sequence; else it has no sinks."""
        first: npt.NDArray[np.bool_] = self.lo == 0
        return first

    def __len__(self) -> int:
        return len(self.tables)


class Choice(NamedTuple):
    """Per item the pages to read exactly: of int32 `[items, most]`, contiguous, the first counts[i], in the order of
    their tokens, the table's last one always. counts: int64 `[items]`.

    `rest`, where given, stands for the others: a partial of all items' vectors, which is merged into what was read.
    `missed`, float32 `[items * group]`, estimates the attention mass of pages for which at most their means stand; NaN
    where it is unknown. `coarse`, likewise, that of pages whose values were read in 4 bits; None: nothing. `read`
    counts the bytes that were read to choose, and of sketches.
    """

    pages: Int32
    counts: npt.NDArray[np.int64]
    missed: Float32
    read: int = 0
    rest: Partial | None = None
    coarse: Float32 | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """Some queries of a prompt to the KV head `head` of a part, in a layer. Positions count from the part's first one.

    q: float32 `[n, group, d_k]`, at the ascending `positions`, int64 `[n]`, one in each `stride`; none came before.
    The part's first `tokens` keys of the layer are stored, in the pages of `table`, int32 `[entries]`, a view: those of
    the queries' own row too, where the part keeps them. `left` tokens of the prompt are still to come after the row;
    then the part has `whole`. Its first token is the sequence's number `lo`.
    """

    handle: int
    layer: int
    spec: LayerSpec
    head: int
    positions: npt.NDArray[np.int64]
    stride: int
    q: Float32
    table: Int32
    tokens: int
    left: int
    whole: int
    lo: int


class Chooser(Protocol):
    """Chooses for one adaptive policy. Called by the worker's one thread."""

    def worth(self, tokens: Sequence[int]) -> bool:
        """Whether to choose at all in layers where items read so many tokens each; else everything is read."""
        return True

    @abstractmethod
    def plan(self, items: Items) -> Any:
        """What is the same for all layers of a decode step."""

    @abstractmethod
    def choose(self, plan: Any, layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        """What the queries q of that layer, `[items * group, d_k]`, item by item, need to read."""

    # What happens to parts. A chooser that keeps nothing of them need not know.

    def observe(self, shown: Shown) -> None:
        """Queries of a prompt have come, wherever the prompt is attended: as many as the policy's `sampled` says. The
        same ones are among `Holding.samples`."""
        return

    def fork(self, handle: int, parent: int, tokens: int) -> None:
        """A part is new, and has the first `tokens` of another."""
        return

    def written(self, handle: int, start: int) -> None:
        """A part's tokens from `start` on are new, or differ from before."""
        return

    def forget(self, handle: int) -> None:
        """A part is closed."""
        return


class Adaptive(Policy):
    """A policy with a chooser."""

    adaptive: ClassVar[bool] = True

    def chooser(self, at: Holding) -> Chooser:
        """A new chooser for one worker."""
        raise NotImplementedError(f"policy {self.name} has no chooser")


def everything(items: Items, layer: int) -> Choice:
    """All pages of a layer: nothing is missed."""
    return Choice(*lists([table[layer] for table in items.tables]), np.zeros(len(items) * items.group, np.float32))


def lists(pages: Sequence[Int32]) -> tuple[Int32, npt.NDArray[np.int64]]:
    """The pages of items, int32 `[n]` each, as a `Choice` has them: int32 `[items, most]`, and the count of each."""
    counts = np.array([len(of_item) for of_item in pages], np.int64)
    together = np.zeros((len(pages), int(counts.max(initial=0))), np.int32)
    for row, of_item in zip(together, pages, strict=True):
        row[: len(of_item)] = of_item
    return together, counts
