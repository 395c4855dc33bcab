"""A budget of pages: which of an item's pages are always read, and how many of the others may be.

Shared by the policies that read a fixed share of a sequence's pages, and by those of them that scan all pages now and
then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.rows import Ints
from lamina_kernels.partial import Partial, empty
from lamina_kernels.sketches import sketches
from lamina_kernels.sketches.sketches import Sketches
from lamina_protocols.layers import LayerSpec
from lamina_workers.policies.chooser import Adaptive, Choice, Float32, Holding, Int32, Items, everything
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
    held = -(-items.tokens // page_size)
    sealed = items.tokens // page_size
    last = np.minimum(np.maximum(0, items.tokens - recent) // page_size, sealed)
    sinks = np.minimum(np.where(items.begins, -(-sink // page_size), 0), last)
    return Bounds(held, sealed, sinks, last, np.ceil(budget * held).astype(np.int64))


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


@dataclass(slots=True)
class LastScan:
    """What a head of a part keeps to until its next scan, which was made at so many `tokens`: it reads the `entries`,
    and all from `upto` on."""

    entries: Ints
    upto: int
    tokens: int


P = TypeVar("P", bound=Budgeted)
L = TypeVar("L", bound=LastScan)


class Rescanning(ABC, Generic[P, L]):
    """A chooser that in some steps scans the sketches of all pages of a head, `every` steps at the latest, and in
    between reads what the last scan chose, and what is new."""

    stand_in: ClassVar[bool]  # whether the means of their values stand for the pages that a scan leaves out

    def __init__(self, policy: P, at: Holding, every: int) -> None:
        self._policy = policy
        self._at = at
        self._every = every
        self._scans: dict[int, dict[tuple[int, int], L]] = {}  # by part, then by layer and KV head

    @abstractmethod
    def _turned(self, scan: L, tokens: int, q: Float32) -> bool:
        """Whether a head with these queries, float32 `[group, d_k]`, is scanned sooner."""

    @abstractmethod
    def _scan(self, before: L | None, at: Bounds, i: int, log_mass: Float32, tokens: int, q: Float32) -> L:
        """What item i reads from now on, by its pages' masses, float32 `[group, sealed]`. `before`: its last scan."""

    def worth(self, tokens: Sequence[int]) -> bool:
        return True

    def plan(self, items: Items) -> ScannedItems:
        policy, holding = self._policy, self._at
        at = bounds(policy.sink, policy.recent, policy.budget, items, holding.page_size)
        if at.whole:
            return ScannedItems(items, at, None)
        asked = sketches.Items(items.tables, at.sealed, at.sinks, at.recent, at.held)
        return ScannedItems(items, at, sketches.plan_scan(holding.sketches, asked, items.group, holding.threads))

    def choose(self, plan: ScannedItems, layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        items, at = plan.items, plan.at
        if at.whole:
            return everything(items, spec.kv_layer)
        queries = q.float().view(len(items), items.group, -1).numpy()
        known = [self._known(items, i, layer, queries[i]) for i in range(len(items))]
        missed = np.full((len(items), items.group), np.nan, np.float32)
        read, log_mass = 0, np.empty((len(items), items.group, 0), np.float32)
        if None in known:
            log_mass, read = plan.masses(self._at.sketches, spec, q)
        rest = empty(len(q), self._at.sketches.layout.pages.d_v) if read and self.stand_in else None
        pages: list[Int32] = []
        for i, scan in enumerate(known):
            table = items.tables[i][spec.kv_layer]
            if scan is None:
                scans, key = self._scans.setdefault(items.parts[i], {}), (layer, items.heads[i])
                masses = log_mass[i, :, : int(at.sealed[i])]
                scan = scans[key] = self._scan(scans.get(key), at, i, masses, int(items.tokens[i]), queries[i])
                own = slice(i * items.group, (i + 1) * items.group)
                missed[i] = self._missed(scan, masses, table, rest and Partial(rest.out[own], rest.lse[own]))
            pages.append(np.concatenate([table[scan.entries], table[scan.upto :]]))
        return Choice(*lists(pages), missed.reshape(-1), read, rest)

    def forget(self, handle: int) -> None:
        self._scans.pop(handle, None)

    def _known(self, items: Items, i: int, layer: int, q: Float32) -> L | None:
        """The scan that still holds for an item; None where another is due."""
        scan = self._scans.get(items.parts[i], {}).get((layer, items.heads[i]))
        tokens = int(items.tokens[i])
        if scan is None or not 0 < tokens - scan.tokens < self._every:  # or the part was cut back
            return None
        return None if self._turned(scan, tokens, q) else scan

    def _missed(self, scan: L, log_mass: Float32, pages: Int32, rest: Partial | None) -> Float32:
        """The share of the mass, `[group]`, of an item's pages that are not read; `rest` is filled with what stands
        for them."""
        others = np.ones(scan.upto, np.bool_)
        others[scan.entries] = False
        left = np.flatnonzero(others)
        if not left.size:
            return np.zeros(len(log_mass), np.float32)
        of_left = torch.from_numpy(log_mass[:, left])
        lse = torch.logsumexp(of_left, -1)
        if rest is not None:
            means = self._at.sketches.means[torch.from_numpy(pages[left].astype(np.int64))].float()
            rest.out.copy_(torch.softmax(of_left, -1) @ means)
            rest.lse.copy_(lse)
        share: Float32 = np.exp(lse.numpy() - np.logaddexp.reduce(log_mass, axis=1))
        return share
