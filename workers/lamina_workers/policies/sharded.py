"""`sharded`: blocks near the query, and every stride-th block before (S2-Attention's heterogeneous context sharding,
arXiv 2407.17678). Only for checkpoints that were trained with it. The blocks between are freed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from lamina_kernels.paged.rows import Ints
from lamina_workers.policies.block_policy import BlockPolicy
from lamina_workers.policies.policy import LONGEST, Bools


@dataclass(frozen=True)
class Sharded(BlockPolicy):
    """Query block qb sees key block kb <= qb where qb - kb < local or (kb + offset) mod stride = 0.

    KV head h has the offset `offset` + h * `step`: so the heads of a layer keep different blocks, together all of them.
    """

    name: ClassVar[str] = "sharded"
    block: int = 64
    local: int = 16
    stride: int = 8
    offset: int = 0
    step: int = 1

    def __post_init__(self) -> None:
        self.check("block", 4, 4096)  # a view is made for each
        for name, low in (("local", 1), ("stride", 1), ("offset", 0), ("step", 0)):
            self.check(name, low, LONGEST)

    def of_head(self, head: int) -> Sharded:
        return replace(self, offset=(self.offset + head * self.step) % self.stride, step=0)

    @property
    def unit(self) -> int:
        return self.block

    def seen_from(self, start: int) -> int:
        return max(0, start // self.block - self.local + 1) * self.block

    def stays(self, positions: Ints, size: int) -> Bools:
        ends: Bools = self._far(positions // self.block) | self._far((positions + size - 1) // self.block)
        return ends

    def seen_blocks(self, number: int) -> Ints:
        near = max(0, number - self.local + 1)
        return np.concatenate([np.arange(-self.offset % self.stride, near, self.stride), np.arange(near, number + 1)])

    def _far(self, blocks: Ints) -> Bools:
        far: Bools = (blocks + self.offset) % self.stride == 0
        return far
