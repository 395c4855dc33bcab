"""`page_top_k`: in every step the pages whose keys could matter most (Quest, arXiv 2406.10774).

No key of a page has a larger inner product with q than sum over channels of max(q_c * low_c, q_c * high_c), where low
and high are the channel's least and largest value in the page. Pages are ranked by that bound, the largest over the
query heads that share the KV head. Nothing stands for what is not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lamina_kernels.sketches.layout import LEVELS
from lamina_workers.policies.chooser import Chooser, Float32, Holding, Int32
from lamina_workers.policies.compared.base import Budgeted, Head, HeadChooser, Picked, best, indices
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


class _Bounding(HeadChooser[PageTopK, None]):
    def pick(self, head: Head) -> Picked:
        number, choice = head.budget(self.policy.budget, self.policy.least), head.recent - head.sinks
        if number >= choice:
            return Picked(None)
        entries = best(self._bounds(head.q, head.pages[head.sinks : head.recent]), number) + head.sinks
        return Picked(entries, read=choice * 4 * self.at.sketches.layout.padded)  # lows and steps, two bytes each

    def _bounds(self, q: torch.Tensor, pages: Int32) -> Float32:
        """For q, float32 `[group, d_k]`: of each page the bound of what q.k can be, float32 `[pages]`, the highest of
        all heads. max(q * low, q * high) is q * middle + |q| * half the width."""
        index = indices(pages, q.device)
        half = self.at.sketches.steps[index].float() * (LEVELS / 2)
        middle = self.at.sketches.lows[index].float() + half
        highest: Float32 = (q @ middle.T + q.abs() @ half.T).amax(0).cpu().numpy()
        return highest
