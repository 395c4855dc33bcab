"""`heavy_hitter`: the pages that have got the most attention so far, and the recent ones (H2O, arXiv 2306.14048).

H2O adds up the attention that each key gets from all queries and evicts the least. Here pages are counted, by their
sketches, from the first decode step on: every `every`-th step scans all of them, and each page's share of a query
head's attention is added to its sum. Sums are divided by how many of these steps could see the page, since an old page
was seen by more of them (as SinkLoRA, arXiv 2406.05678, normalises). Nothing is freed, so a page that becomes heavy
late is read again, which H2O cannot do; memory is not saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from lamina_kernels.paged.rows import Ints
from lamina_protocols.messages import LayerSpec
from lamina_workers.policies.chooser import Adaptive, Choice, Chooser, Float32, Holding, Int32, Items, everything
from lamina_workers.policies.page_budget import Bounds, ScannedItems, best, lists, scanned
from lamina_workers.policies.policy import LONGEST


@dataclass(frozen=True)
class HeavyHitter(Adaptive):
    """`sink` first and `recent` last tokens are always read, and of all pages the share `budget` beside them."""

    name: ClassVar[str] = "heavy_hitter"
    sink: int = 64
    recent: int = 256
    budget: float = 0.25
    every: int = 4

    def __post_init__(self) -> None:
        self.check("sink", 0, LONGEST)
        self.check("recent", 1, LONGEST)
        self.check("budget", 0, 1)
        self.check("every", 1, LONGEST)

    def chooser(self, at: Holding) -> Chooser:
        return _Counting(self, at)


@dataclass(slots=True)
class _Count:
    """The count of one layer and KV head of a part: what its pages have `got` in the counted `steps`, and how many of
    these could see each, both float32 `[pages]`. There were `tokens` at the last one. Read are the `entries`, and all
    from `upto` on."""

    got: Float32 = field(default_factory=lambda: np.empty(0, np.float32))
    steps: Float32 = field(default_factory=lambda: np.empty(0, np.float32))
    tokens: int = 0
    entries: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    upto: int = 0

    def add(self, shares: Float32, tokens: int) -> None:
        """Count a step in which pages got `shares`, float32 `[pages]`. Where the part was cut back there are fewer
        pages than before, and the others are dropped; the last one that is left may have new content."""
        kept = min(len(self.got), len(shares))
        got, steps = shares.copy(), np.ones(len(shares), np.float32)
        got[:kept] += self.got[:kept]
        steps[:kept] += self.steps[:kept]
        self.got, self.steps, self.tokens = got, steps, tokens

    def choose(self, sinks: int, recent: int, picks: int) -> None:
        """Read from now on the `picks` pages of [sinks, recent) that have got the most, and all outside it."""
        chosen = best((self.got / self.steps)[sinks:recent], picks) + sinks
        self.entries, self.upto = np.concatenate([np.arange(sinks), chosen]), recent


class _Counting:
    def __init__(self, policy: HeavyHitter, at: Holding) -> None:
        self._policy = policy
        self._at = at
        self._counts: dict[int, dict[tuple[int, int], _Count]] = {}  # by part, then by layer and KV head

    def worth(self, tokens: Sequence[int]) -> bool:
        return True

    def plan(self, items: Items) -> ScannedItems:
        return scanned(self._policy, self._at, items)

    def choose(self, plan: ScannedItems, layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        items, at = plan.items, plan.at
        if at.whole:
            return everything(items, spec.kv_layer)
        known = [self._known(items, i, layer) for i in range(len(items))]
        missed = np.full((len(items), items.group), np.nan, np.float32)
        read, log_mass = 0, np.empty((len(items), items.group, 0), np.float32)
        if None in known:
            log_mass, read = plan.masses(self._at.sketches, spec, q)
        pages: list[Int32] = []
        for i, count in enumerate(known):
            if count is None:
                count, missed[i] = self._counted(items, at, i, layer, log_mass[i, :, : int(at.sealed[i])])
            table = items.tables[i][spec.kv_layer]
            pages.append(np.concatenate([table[count.entries], table[count.upto :]]))
        return Choice(*lists(pages), missed.reshape(-1), read)

    def _known(self, items: Items, i: int, layer: int) -> _Count | None:
        """The count by which an item goes on reading; None where another step is to be counted."""
        count = self._counts.get(items.parts[i], {}).get((layer, items.heads[i]))
        if count is None or not 0 < int(items.tokens[i]) - count.tokens < self._policy.every:  # or it was cut back
            return None
        return count

    def _counted(self, items: Items, at: Bounds, i: int, layer: int, log_mass: Float32) -> tuple[_Count, Float32]:
        """Count a step in which an item's pages got `log_mass`, float32 `[group, sealed]`, and choose anew. Returns
        also the share of each head's attention that goes to what is not read, `[group]`."""
        with np.errstate(invalid="ignore"):  # of queries that are no numbers nothing is counted
            shares = np.nan_to_num(np.exp(log_mass - np.logaddexp.reduce(log_mass, axis=1, keepdims=True)))
        counts = self._counts.setdefault(items.parts[i], {})
        count = counts.get((layer, items.heads[i]))
        tokens = int(items.tokens[i])
        if count is None:
            count = counts[layer, items.heads[i]] = _Count()
        count.add(shares.sum(0), tokens)
        count.choose(int(at.sinks[i]), int(at.recent[i]), int(at.picks[i]))
        others = np.ones(count.upto, np.bool_)
        others[count.entries] = False
        left: Float32 = shares[:, : count.upto][:, others].sum(1)
        return count, left

    def forget(self, handle: int) -> None:
        self._counts.pop(handle, None)
