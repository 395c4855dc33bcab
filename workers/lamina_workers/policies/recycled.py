"""`recycled`: the pages that a full scan found are read again in the steps after it (Recycled Attention, arXiv
2411.05787).

A full scan reads the sketches of all pages, which ranks them by the attention that they get. The best are read; the
means of the others' values stand for them. One is made every `every` steps, and every 5 steps where the query has
turned away from that of the last full scan. In between the same pages are read, and the new ones. Nothing is freed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lamina_workers.policies.chooser import Chooser, Float32, Holding
from lamina_workers.policies.page_budget import Bounds, Budgeted, LastScan, Rescanning, best
from lamina_workers.policies.policy import LONGEST

CHECK = 5  # steps after which the query is compared with that of the last full scan: the paper's


@dataclass(frozen=True)
class Recycled(Budgeted):
    """A `Budgeted` policy. A full scan is made every `every` steps, or where the cosine of the query and that of the
    last one is below `turn`."""

    name: ClassVar[str] = "recycled"
    every: int = 50
    turn: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("every", 1, LONGEST)
        self.check("turn", -1, 1)

    def chooser(self, at: Holding) -> Chooser:
        return _Recycling(self, at, self.every)


@dataclass(slots=True)
class _FullScan(LastScan):
    """With the query heads' `q`, float32 `[group, d_k]`."""

    q: Float32


class _Recycling(Rescanning[Recycled, _FullScan]):
    stand_in = True

    def _turned(self, scan: _FullScan, tokens: int, q: Float32) -> bool:
        if (tokens - scan.tokens) % CHECK:
            return False
        lengths = np.linalg.norm(q, axis=1) * np.linalg.norm(scan.q, axis=1)
        cosine = float(((q * scan.q).sum(1) / np.maximum(lengths, np.finfo(np.float32).tiny)).mean())
        return not cosine >= self._policy.turn

    def _scan(
        self, before: _FullScan | None, at: Bounds, i: int, log_mass: Float32, tokens: int, q: Float32
    ) -> _FullScan:
        """The best entries by the largest share that any query head gives them."""
        sinks, recent = int(at.sinks[i]), int(at.recent[i])
        shares = log_mass - np.logaddexp.reduce(log_mass, axis=1, keepdims=True)
        chosen = best(shares.max(0)[sinks:recent], int(at.picks[i])) + sinks
        return _FullScan(np.concatenate([np.arange(sinks), chosen]), recent, tokens, q.copy())
