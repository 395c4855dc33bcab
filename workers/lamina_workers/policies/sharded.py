"""`sharded`: blocks near the query, and every stride-th block before (S2-Attention's heterogeneous context sharding,
arXiv 2407.17678). Only for checkpoints that were trained with it: nothing is freed, and little is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lamina_workers.policies.policy import LONGEST, Policy, View


@dataclass(frozen=True)
class Sharded(Policy):
    """Query block qb sees key block kb <= qb where qb - kb < local or (kb + offset) mod stride = 0.

    `offset` is the paper's h * step + c for KV head h.
    """

    name: ClassVar[str] = "sharded"
    block: int = 64
    local: int = 16
    stride: int = 8
    offset: int = 0

    def __post_init__(self) -> None:
        self.check("block", 4, 4096)  # a view is made for each
        for name, low in (("local", 1), ("stride", 1), ("offset", 0)):
            self.check(name, low, LONGEST)

    def views(self, start: int, count: int) -> Iterator[View]:
        first, end = start, start + count
        while first < end:
            number = first // self.block
            last = min(end, (number + 1) * self.block)
            near = max(0, number - self.local + 1)
            far = np.arange(-self.offset % self.stride, near, self.stride)
            tokens = (far[:, None] * self.block + np.arange(self.block)).reshape(-1)
            listed = np.concatenate([tokens, np.arange(near * self.block, last)])
            yield View(first, last - first, listed=listed.tolist())
            first = last
