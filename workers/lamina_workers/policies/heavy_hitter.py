"""`heavy_hitter`: the pages that have got the most attention so far, and the recent ones (H2O, arXiv 2306.14048).

H2O adds up the attention that each key gets from all queries and evicts the least. Here pages are counted, by their
sketches, from the first decode step on: every `every`-th step scans all of them, and each page's share of a query
head's attention is added to its sum. Sums are divided by how many of these steps could see the page, since an old page
was seen by more of them (as SinkLoRA, arXiv 2406.05678, normalises). Nothing is freed, so a page that becomes heavy
late is read again, which H2O cannot do; memory is not saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lamina_workers.policies.chooser import Chooser, Float32, Holding
from lamina_workers.policies.page_budget import Bounds, Budgeted, LastScan, Rescanning, best
from lamina_workers.policies.policy import LONGEST


@dataclass(frozen=True)
class HeavyHitter(Budgeted):
    """A `Budgeted` policy that counts in every `every`-th step."""

    name: ClassVar[str] = "heavy_hitter"
    every: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("every", 1, LONGEST)

    def chooser(self, at: Holding) -> Chooser:
        return _Counting(self, at, self.every)


@dataclass(slots=True)
class _Count(LastScan):
    """The count of one layer and KV head of a part: what its pages have `got` in the counted `steps`, and how many of
    these could see each, both float32 `[pages]`."""

    got: Float32
    steps: Float32


class _Counting(Rescanning[HeavyHitter, _Count]):
    stand_in = False

    def _turned(self, scan: _Count, tokens: int, q: Float32) -> bool:
        return False

    def _scan(self, before: _Count | None, at: Bounds, i: int, log_mass: Float32, tokens: int, q: Float32) -> _Count:
        """Count a step, and choose anew. Where the part was cut back there are fewer pages than before, and the others
        are dropped; the last one that is left may have new content."""
        with np.errstate(invalid="ignore"):  # of queries that are no numbers nothing is counted
            shares = np.nan_to_num(np.exp(log_mass - np.logaddexp.reduce(log_mass, axis=1, keepdims=True)))
        got, steps = shares.sum(0), np.ones(log_mass.shape[1], np.float32)
        if before is not None:
            kept = min(len(before.got), len(got))
            got[:kept] += before.got[:kept]
            steps[:kept] += before.steps[:kept]
        sinks, recent = int(at.sinks[i]), int(at.recent[i])
        chosen = best((got / steps)[sinks:recent], int(at.picks[i])) + sinks
        return _Count(np.concatenate([np.arange(sinks), chosen]), recent, tokens, got, steps)
