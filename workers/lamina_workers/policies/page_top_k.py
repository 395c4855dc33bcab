"""`page_top_k`: in every step the pages whose keys could matter most (Quest, arXiv 2406.10774).

No key of a page has a larger inner product with q than sum over channels of max(q_c * low_c, q_c * high_c), where low
and high are the channel's least and largest value in the page. Pages are ranked by that bound, the largest over the
query heads that share the KV head. Nothing stands for what is not read, and nothing is freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from lamina_kernels.sketches.layout import LEVELS
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.policies.chooser import Choice, Chooser, Float32, Holding, Int32, Items, everything, lists
from lamina_workers.policies.page_budget import Budgeted, ScannedItems, best, bounds
from lamina_workers.policies.policy import LONGEST


@dataclass(frozen=True)
class PageTopK(Budgeted):
    """A `Budgeted` policy whose budget is `least` pages or more."""

    name: ClassVar[str] = "page_top_k"
    least: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("least", 0, LONGEST)

    def chooser(self, at: Holding) -> Chooser:
        return _Bounding(self, at)


class _Bounding:
    def __init__(self, policy: PageTopK, at: Holding) -> None:
        self._policy = policy
        self._holding = at

    def worth(self, tokens: Sequence[int]) -> bool:
        return True

    def plan(self, items: Items) -> ScannedItems:
        policy = self._policy
        item_bounds = bounds(policy.sink, policy.recent, policy.budget, items, self._holding.page_size)
        np.maximum(item_bounds.picks, policy.least, out=item_bounds.picks)
        return ScannedItems(items, item_bounds, None)

    def choose(self, plan: ScannedItems, layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        items, item_bounds = plan.items, plan.at
        if item_bounds.whole:
            return everything(items, spec.kv_layer)
        queries = q.float().view(len(items), items.group, -1)
        chosen: list[Int32] = []
        bounded = 0  # pages
        missed_mass = np.zeros((len(items), items.group), np.float32)
        for i, table in enumerate(items.tables):
            pages = table[spec.kv_layer]
            sinks, recent, picks = (int(x[i]) for x in (item_bounds.sinks, item_bounds.recent, item_bounds.picks))
            if picks >= recent - sinks:
                chosen.append(pages)
                continue
            bounded += recent - sinks
            missed_mass[i] = np.nan
            page_slots = best(self._bounds(queries[i], pages[sinks:recent]), picks) + sinks
            chosen.append(np.concatenate([pages[:sinks], pages[page_slots], pages[recent:]]))
        layout = self._holding.sketches.layout
        read = bounded * 4 * layout.padded  # lows and steps, two bytes each
        return Choice(*lists(chosen), missed_mass.reshape(-1), read)

    def _bounds(self, q: torch.Tensor, pages: Int32) -> Float32:
        """For q, float32 `[group, d_k]`: of each page the bound of what q.k can be, float32 `[pages]`, the highest of
        all heads. max(q * low, q * high) is q * middle + |q| * half the width."""
        index = torch.from_numpy(pages.astype(np.int64))
        half = self._holding.sketches.steps[index].float() * (LEVELS / 2)
        middle = self._holding.sketches.lows[index].float() + half
        highest: Float32 = (q @ middle.T + q.abs() @ half.T).amax(0).cpu().numpy()
        return highest

    def forget(self, handle: int) -> None:
        """Nothing is kept of parts."""
