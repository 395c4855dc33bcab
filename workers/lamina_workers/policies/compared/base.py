"""Choosers that pick pages head by head, in plain numpy and torch: a policy says what one head reads in one step.

The first and the recent tokens are always read. All pages stay; what a paper's system would have freed is not read.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.rows import Ints
from lamina_kernels.partial import Partial, empty
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.policies.chooser import Adaptive, Choice, Chooser, Float32, Holding, Int32, Items, lists
from lamina_workers.policies.page_bounds import Bounds, bounds
from lamina_workers.policies.policy import LONGEST


@dataclass(frozen=True)
class Compared(Adaptive):
    """A policy whose chooser is a `HeadChooser`. `sink` first and `recent` last tokens are always read."""

    sink: int = 64
    recent: int = 256

    def __post_init__(self) -> None:
        self.check("sink", 0, LONGEST)
        self.check("recent", 1, LONGEST)

    def read_from(self, position: int) -> int:
        """The first of the recent tokens of a query at that position."""
        return max(0, position - self.recent + 1)


@dataclass(frozen=True)
class Budgeted(Compared):
    """Of all pages the share `budget` is read beside the first and the recent ones."""

    budget: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("budget", 0, 1)


@dataclass(frozen=True, slots=True)
class Head:
    """A decode query `q`, float32 `[group, d_k]`, to KV head `head` of a part, in a layer; it is at `position`, counted
    from the part's first token, and reads `tokens`. `pages`, int32, are the part's; of them [0, sinks) and those from
    `recent` on are always read."""

    part: int
    layer: int
    head: int
    spec: LayerSpec
    q: torch.Tensor
    pages: Int32
    position: int
    tokens: int
    sinks: int
    recent: int

    @property
    def key(self) -> tuple[int, int]:
        """By what a chooser keeps something of a part's heads."""
        return self.layer, self.head

    def budget(self, share: float, least: int = 0) -> int:
        """That share of all pages, rounded up, or `least`."""
        return max(least, math.ceil(share * len(self.pages)))


class Picked(NamedTuple):
    """The entries in [sinks, recent) that a head reads, int64, ascending; None: all. `missed`, `[group]`, is the mass
    that is not read, where it is known; `read` are bytes that were read to pick. `rest` stands for the others: out
    float32 `[group, d_v]`, lse float32 `[group]`."""

    entries: Ints | None
    missed: Float32 | None = None
    read: int = 0
    rest: Partial | None = None


NOTHING: Ints = np.empty(0, np.int64)
P = TypeVar("P", bound=Compared)
S = TypeVar("S")


class HeadChooser(Chooser, Generic[P, S]):
    """Chooses for a `Compared` policy. `kept` is what it knows of parts: by handle, then by `Head.key`."""

    def __init__(self, policy: P, at: Holding) -> None:
        self.policy = policy
        self.at = at
        self.kept: dict[int, dict[tuple[int, int], S]] = {}

    @abstractmethod
    def pick(self, head: Head) -> Picked:
        """What a head reads in this step, where there is something between its first and its recent pages."""

    def plan(self, items: Items) -> tuple[Items, Bounds]:
        read_from = np.array([self.policy.read_from(position) for position in items.positions.tolist()], np.int64)
        return items, bounds(self.policy.sink, items.tokens - (read_from - items.lo), items, self.at.page_size)

    def choose(self, plan: tuple[Items, Bounds], layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        items, ends = plan
        queries = q.float().view(len(items), items.group, -1)
        pages: list[Int32] = []
        missed_mass = np.zeros((len(items), items.group), np.float32)
        read, rest_partial = 0, None
        for i, table in enumerate(items.tables):
            sinks, recent, of_layer = int(ends.sinks[i]), int(ends.recent[i]), table[spec.kv_layer]
            position = int(items.positions[i] - items.lo[i])
            names = items.parts[i], layer, items.heads[i], spec, queries[i], of_layer
            picked = self.pick(Head(*names, position, int(items.tokens[i]), sinks, recent))
            read += picked.read
            if picked.entries is None:
                pages.append(of_layer)
            else:
                pages.append(np.concatenate([of_layer[:sinks], of_layer[picked.entries], of_layer[recent:]]))
                if len(picked.entries) < recent - sinks:
                    missed_mass[i] = np.nan
            if picked.missed is not None:
                missed_mass[i] = picked.missed
            if picked.rest is not None:
                rest_partial = rest_partial or empty(len(q), self.at.pages.layout.d_v, torch.float32, q.device)
                of_item = slice(i * items.group, (i + 1) * items.group)
                rest_partial.out[of_item], rest_partial.lse[of_item] = picked.rest
        return Choice(*lists(pages), missed_mass.reshape(-1), read, rest_partial)

    def of(self, head: Head) -> S | None:
        """What is known of a head."""
        return self.kept.get(head.part, {}).get(head.key)

    def keep(self, head: Head, known: S) -> None:
        """Know this of a head from now on."""
        self.kept.setdefault(head.part, {})[head.key] = known

    def forget(self, handle: int) -> None:
        self.kept.pop(handle, None)


def best(scores: npt.NDArray[np.float32], number: int) -> Ints:
    """The indices of the `number` highest scores, float32 `[n]`: int64, ascending."""
    if number >= len(scores):
        return np.arange(len(scores))
    if number <= 0:
        return NOTHING
    indices: Ints = np.sort(np.argpartition(scores, -number)[-number:])
    return indices


def indices(pages: Int32 | Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers of pages as torch takes them."""
    return torch.from_numpy(np.asarray(pages, np.int64)).to(device)
