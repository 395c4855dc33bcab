"""`dilated`: a window with gaps. Blocks near the query, and every so many-th block before as far as the window reaches
(the dilated sliding window of Longformer, arXiv 2004.05150, in blocks of keys), beside the first tokens.

Gaps move with the query, so what is in the window is kept; what lies behind it is freed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lamina_kernels.paged.rows import Ints
from lamina_workers.errors import PolicyError
from lamina_workers.policies.block_policy import BlockPolicy
from lamina_workers.policies.policy import LONGEST


@dataclass(frozen=True)
class Dilated(BlockPolicy):
    """Query block qb sees key block kb <= qb where qb - kb < local, or qb - kb < reach is a multiple of `dilation`;
    and the `sink` first tokens, which are whole blocks."""

    name: ClassVar[str] = "dilated"
    block: int = 64
    sink: int = 64
    local: int = 4
    reach: int = 64
    dilation: int = 4

    def __post_init__(self) -> None:
        self.check("block", 4, 4096)  # a view is made for each
        for name, low in (("sink", 0), ("local", 1), ("reach", self.local), ("dilation", 1)):
            self.check(name, low, LONGEST)
        if self.sink % self.block:
            raise PolicyError(f"{self.name}: sink is {self.sink}; allowed are multiples of the block, {self.block}")

    @property
    def sinks(self) -> int:
        return self.sink

    @property
    def unit(self) -> int:
        return self.block

    def seen_from(self, start: int) -> int:
        return max(0, start // self.block - self.reach + 1) * self.block

    def seen_blocks(self, number: int) -> Ints:
        near = max(0, number - self.local + 1)
        farthest = (min(number, self.reach - 1)) // self.dilation * self.dilation
        far = np.arange(number - farthest, near, self.dilation)
        window = np.concatenate([far, np.arange(near, number + 1)])
        sinks = min(self.sink // self.block, number + 1)
        return np.concatenate([np.arange(sinks), window[window >= sinks]])
