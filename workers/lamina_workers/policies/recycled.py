"""`recycled`: the pages that a full scan found are read again in the steps after it (Recycled Attention, arXiv
2411.05787).

A full scan reads the sketches of all pages, which ranks them by the attention that they get. The best are read; the
means of the others' values stand for them. One is made every `every` steps, and every 5 steps where the query has
turned away from that of the last full scan. In between the same pages are read, and the new ones. Nothing is freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from lamina_kernels.paged.rows import Ints
from lamina_kernels.partial import Partial, empty
from lamina_protocols.messages import LayerSpec
from lamina_workers.policies.chooser import Adaptive, Choice, Chooser, Float32, Holding, Int32, Items, everything
from lamina_workers.policies.page_budget import Bounds, ScannedItems, best, lists, scanned
from lamina_workers.policies.policy import LONGEST

CHECK = 5  # steps after which the query is compared with that of the last full scan: the paper's


@dataclass(frozen=True)
class Recycled(Adaptive):
    """`sink` first and `recent` last tokens are always read, and of all pages the share `budget` beside them. A full
    scan is made every `every` steps, or where the cosine of the query and that of the last one is below `turn`."""

    name: ClassVar[str] = "recycled"
    sink: int = 64
    recent: int = 256
    budget: float = 0.25
    every: int = 50
    turn: float = 0.8

    def __post_init__(self) -> None:
        self.check("sink", 0, LONGEST)
        self.check("recent", 1, LONGEST)
        self.check("budget", 0, 1)
        self.check("every", 1, LONGEST)
        self.check("turn", -1, 1)

    def chooser(self, at: Holding) -> Chooser:
        return _Recycling(self, at)


@dataclass(slots=True)
class _FullScan:
    """What the last one of a layer and KV head of a part found: `entries` of those below `upto`. The part had so many
    `tokens`, and the query heads this `q`, float32 `[group, d_k]`."""

    entries: Ints
    upto: int
    tokens: int
    q: Float32


class _Recycling:
    def __init__(self, policy: Recycled, at: Holding) -> None:
        self._policy = policy
        self._at = at
        self._scans: dict[int, dict[tuple[int, int], _FullScan]] = {}  # by part, then by layer and KV head

    def worth(self, tokens: Sequence[int]) -> bool:
        return True

    def plan(self, items: Items) -> ScannedItems:
        return scanned(self._policy, self._at, items)

    def choose(self, plan: ScannedItems, layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        items, at = plan.items, plan.at
        if at.whole:
            return everything(items, spec.kv_layer)
        queries = q.float().view(len(items), items.group, -1).numpy()
        known = [self._known(items, i, layer, queries[i]) for i in range(len(items))]
        missed = np.full((len(items), items.group), np.nan, np.float32)
        rest = empty(len(q), self._at.sketches.layout.pages.d_v)
        read, log_mass = 0, np.empty((len(items), items.group, 0), np.float32)
        if None in known:
            log_mass, read = plan.masses(self._at.sketches, spec, q)
        pages: list[Int32] = []
        for i, scan in enumerate(known):
            table = items.tables[i][spec.kv_layer]
            if scan is None:
                of_item = log_mass[i, :, : int(at.sealed[i])]
                scan = self._full_scan(at, i, of_item, int(items.tokens[i]), queries[i])
                self._scans.setdefault(items.parts[i], {})[layer, items.heads[i]] = scan
                own = slice(i * items.group, (i + 1) * items.group)
                missed[i] = self._rest(Partial(rest.out[own], rest.lse[own]), table, of_item, scan)
            pages.append(np.concatenate([table[scan.entries], table[scan.upto :]]))
        return Choice(*lists(pages), missed.reshape(-1), read, rest if read else None)

    def _known(self, items: Items, i: int, layer: int, q: Float32) -> _FullScan | None:
        """The full scan that still holds for an item; None where another is due."""
        scan = self._scans.get(items.parts[i], {}).get((layer, items.heads[i]))
        tokens = int(items.tokens[i])
        if scan is None or not 0 < tokens - scan.tokens < self._policy.every:  # or the part was cut back
            return None
        if (tokens - scan.tokens) % CHECK == 0:
            lengths = np.linalg.norm(q, axis=1) * np.linalg.norm(scan.q, axis=1)
            cosine = float(((q * scan.q).sum(1) / np.maximum(lengths, np.finfo(np.float32).tiny)).mean())
            if not cosine >= self._policy.turn:
                return None
        return scan

    @staticmethod
    def _full_scan(at: Bounds, i: int, log_mass: Float32, tokens: int, q: Float32) -> _FullScan:
        """The best entries by the largest share that any query head gives them; log_mass `[group, sealed]`."""
        sinks, recent = int(at.sinks[i]), int(at.recent[i])
        shares = log_mass - np.logaddexp.reduce(log_mass, axis=1, keepdims=True)
        chosen = best(shares.max(0)[sinks:recent], int(at.picks[i])) + sinks
        return _FullScan(np.concatenate([np.arange(sinks), chosen]), recent, tokens, q.copy())

    def _rest(self, rest: Partial, pages: Int32, log_mass: Float32, scan: _FullScan) -> Float32:
        """Fill `rest` with what stands for an item's pages that are not read. Returns their share of the mass,
        `[group]`."""
        others = np.ones(scan.upto, np.bool_)
        others[scan.entries] = False
        left = np.flatnonzero(others)
        if not left.size:
            return np.zeros(len(log_mass), np.float32)
        means = self._at.sketches.means[torch.from_numpy(pages[left].astype(np.int64))].float()
        of_left = torch.from_numpy(log_mass[:, left])
        rest.out.copy_(torch.softmax(of_left, -1) @ means)
        rest.lse.copy_(torch.logsumexp(of_left, -1))
        share: Float32 = np.exp(rest.lse.numpy() - np.logaddexp.reduce(log_mass, axis=1))
        return share

    def forget(self, handle: int) -> None:
        self._scans.pop(handle, None)
