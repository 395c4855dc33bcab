"""`razor`: the first tokens, the recent ones, and one key and value that stand for all between (RazorAttention, arXiv
2407.15891, for the heads that retrieve nothing).

The mean of the keys and the mean of the values stand for n tokens, with ln n added to the logit. Prompts are read
whole. The paper's window is a constant, or a share of the prompt; here the share follows the context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from lamina_kernels.paged.pages import gather
from lamina_kernels.partial import Partial
from lamina_workers.policies.chooser import Chooser, Holding
from lamina_workers.policies.compared.base import NOTHING, Compared, Head, HeadChooser, Picked, indices


@dataclass(frozen=True)
class Razor(Compared):
    """Read are the `sink` first tokens and the last max(`recent`, `share` of the context)."""

    name: ClassVar[str] = "razor"
    share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("share", 0, 1)

    def read_from(self, position: int) -> int:
        return max(0, position - max(self.recent, int(self.share * position)) + 1)

    def chooser(self, at: Holding) -> Chooser:
        return _Averaging(self, at)


class _Sums(NamedTuple):
    """The sums of the keys and values, float32 `[d]`, of a head's entries from its sinks up to `upto`."""

    upto: int
    k: torch.Tensor
    v: torch.Tensor


class _Averaging(HeadChooser[Razor, _Sums]):
    def pick(self, head: Head) -> Picked:
        if head.sinks >= head.recent:
            return Picked(None)
        size, pages, spec = self.at.page_size, self.at.pages, head.spec
        zeros = torch.zeros(pages.layout.d_k, device=head.q.device), torch.zeros(pages.layout.d_v, device=head.q.device)
        sums = self.of(head)
        if sums is None or sums.upto > head.recent:
            sums = _Sums(head.sinks, *zeros)
        new = indices(head.pages[sums.upto : head.recent], head.q.device)
        keys, values = gather(pages, new, len(new) * size)
        sums = _Sums(head.recent, sums.k + keys.float().sum(0), sums.v + values.float().sum(0))
        self.keep(head, sums)
        tokens = (head.recent - head.sinks) * size
        logits = head.q @ (sums.k / tokens) * spec.scale
        if spec.soft_cap is not None:
            logits = spec.soft_cap * torch.tanh(logits / spec.soft_cap)
        out = (sums.v / tokens).expand(len(head.q), -1)
        read = 4 * (pages.layout.d_k + pages.layout.d_v)
        return Picked(NOTHING, read=read, rest=Partial(out, logits + math.log(tokens)))

    def written(self, handle: int, start: int) -> None:
        of_heads = self.kept.get(handle, {})
        for key in [key for key, sums in of_heads.items() if sums.upto * self.at.page_size > start]:
            del of_heads[key]
