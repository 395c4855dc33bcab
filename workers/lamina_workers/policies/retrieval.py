"""`retrieval`: the pages of each head that its queries attend to.

RetrievalAttention (arXiv 2409.10516) with a budget that follows the query. Every step reads the keys of all pages'
sketches, in 4 bits, which give each page's share of the attention. A page is then read in one of three grades: exactly,
where much is at stake; in 4 bits, its values too, where less is; or not at all, and then the mean of its values stands
for it (as in RetroInfer's estimation zone). Nothing is kept from one step to the next, so no query reads what another
one needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from lamina_kernels.sketches import sketches
from lamina_kernels.sketches.items import Items as SketchItems
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.errors import PolicyError
from lamina_workers.policies.chooser import Adaptive, Choice, Chooser, Holding, Items
from lamina_workers.policies.policy import LONGEST

# What choosing costs in a layer, in bytes of KV that could be read in order meanwhile (docs/internals/log.md).
CALL = 9e6  # the calls
BYTE = 2.0  # a byte of sketches, computing and the few pages that are read exactly included
IN_CODES = 0.25  # of the pages, whose values are read in 4 bits
INDEXES = ("scan", "graph")
SAMPLED = 256  # positions of each stretch of a prompt whose queries are kept: some 1,700 of 32K tokens, 2,200 of 128K


@dataclass(frozen=True)
class Retrieval(Adaptive):
    """`sink` first and `recent` last tokens are always read exactly. By estimate means alone stand for at most `missed`
    of a query's attention mass. Of the pages that are not read exactly, the root of the sum of the squares of their
    shares is at most `coarse`: so the errors of 4 bits add up, which are independent from page to page.

    index: "scan" has no index. With "graph" (see `indexed`) each query head reads the pages of its `top`
    best keys instead, unless these are more than `budget` of all; parts of `least` tokens or more are indexed, and
    again whenever `segment` tokens have come."""

    name: ClassVar[str] = "retrieval"
    sink: int = 32
    recent: int = 64
    missed: float = 0.005
    coarse: float = 0.05
    budget: float = 0.7
    index: str = "scan"
    top: int = 100
    least: int = 8192
    segment: int = 2048

    def __post_init__(self) -> None:
        self.check("sink", 0, LONGEST)
        self.check("recent", 1, LONGEST)
        self.check("missed", 0, 1)
        self.check("coarse", 0, 1)
        self.check("budget", 0, 1)
        self.check("top", 1, 10_000)
        self.check("least", 1, LONGEST)
        self.check("segment", 1, LONGEST)
        if self.index not in INDEXES:
            raise PolicyError(f"{self.name}: index is {self.index!r:.40}; allowed are {', '.join(INDEXES)}")

    def sampled(self, start: int, prompt: int) -> int:
        if self.index != "graph" or prompt < self.least // 2:
            return 0
        # As many of the last positions as of each stretch before them that is twice as long: decode asks like the last.
        return max(2, 1 << ((prompt - start) // SAMPLED).bit_length() >> 1)

    @property
    def builds(self) -> bool:
        return self.index != "scan"

    def chooser(self, at: Holding) -> Chooser:
        if not self.builds:
            return _Retrieving(self, at)
        from lamina_workers.policies.indexed import Indexed  # which needs FAISS

        return Indexed(self, at, _Retrieving(self, at))


@dataclass(frozen=True, slots=True)
class _RetrievingPlan:
    scan: Any  # the kernels' plan
    scanned: int  # bytes of sketches that every layer reads of all pages


@dataclass(frozen=True, slots=True)
class _Retrieving(Chooser):
    """The chooser."""

    policy: Retrieval
    at: Holding

    def worth(self, tokens: Sequence[int]) -> bool:
        layout = self.at.sketches.layout
        pages = sum(tokens) / self.at.page_size
        sketched = pages * (layout.scanned_bytes + IN_CODES * layout.value_bytes)
        return CALL + BYTE * sketched < pages * layout.pages.page_bytes

    def plan(self, items: Items) -> _RetrievingPlan:
        size, policy, page_sketches = self.at.page_size, self.policy, self.at.sketches
        page_counts, sealed = -(-items.tokens // size), items.tokens // size
        recent = np.maximum(0, (items.tokens - policy.recent) // size)
        sinks = np.minimum(np.where(items.begins, -(-policy.sink // size), 0), page_counts)
        scan_items = SketchItems(items.tables, sealed, sinks, recent, page_counts)
        scan = sketches.plan_scan(page_sketches, scan_items, items.group, self.at.threads)
        return _RetrievingPlan(scan, int(sealed.sum()) * page_sketches.layout.scanned_bytes)

    def choose(self, plan: _RetrievingPlan, layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        policy, page_sketches = self.policy, self.at.sketches
        numbers = spec.kv_layer, q, spec.scale, spec.soft_cap
        scan_result = sketches.scan(page_sketches, plan.scan, *numbers, policy.missed, coarse=policy.coarse)
        read = plan.scanned + int(scan_result.coarse_counts.sum()) * page_sketches.layout.value_bytes
        pages, counts, missed_mass, coarse = (
            x.numpy() for x in (scan_result.pages, scan_result.counts, scan_result.missed, scan_result.coarse)
        )
        return Choice(pages, counts, missed_mass, read, scan_result.tail, coarse)
