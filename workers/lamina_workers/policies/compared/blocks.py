"""Policies that see whole blocks of keys, `dilated` and `sharded`. Pure arithmetic on positions.

`dilated` is a window with gaps: blocks near the query, one block of every so many before them as far as the window
reaches, and the first tokens (the dilated sliding window of Longformer, arXiv 2004.05150, in blocks of keys).

`sharded` sees blocks near the query, and one of every `stride` blocks before them (S2-Attention's heterogeneous context
sharding, arXiv 2407.17678). It is only for checkpoints that were trained with it.

All blocks are kept. A layer whose model has a sliding window is read as without a policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np

from lamina_kernels.paged.rows import Ints
from lamina_workers.errors import PolicyError
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import LONGEST, Policy, View


@dataclass(frozen=True)
class BlockPolicy(Policy):
    """All queries of a block of `block` tokens see the same blocks of keys. Blocks are whole pages."""

    ranged: ClassVar[bool] = True
    block: int = 64

    def __post_init__(self) -> None:
        self.check("block", 4, 4096)  # a view is made for each

    def seen_blocks(self, number: int) -> Ints:
        """The blocks of keys that queries in block `number` see, different and ascending; that block is the last."""
        raise NotImplementedError(f"policy {self.name} sees no blocks")

    def within(self, window: int) -> Policy:
        return Full().within(window)

    def views(self, start: int, count: int) -> Iterator[View]:
        first, end = start, start + count
        while first < end:
            number = first // self.block
            last = min(end, (number + 1) * self.block)
            yield View(first, last - first, ranges=_ranges(self, number))
            first = last


@lru_cache(maxsize=4096)  # the steps of a block see the same
def _ranges(policy: BlockPolicy, number: int) -> Ints:
    """The keys that queries in a block see: `[n, 2]`, neighbouring blocks together. Not to be written to."""
    numbers = policy.seen_blocks(number)
    ends = np.flatnonzero(np.append(np.diff(numbers) != 1, True))
    begins = np.append(0, ends[:-1] + 1)
    ranges = np.stack([numbers[begins], numbers[ends] + 1], 1) * policy.block
    ranges.setflags(write=False)
    return ranges


@dataclass(frozen=True)
class Dilated(BlockPolicy):
    """Query block qb sees key block kb <= qb where qb - kb < local, or qb - kb < reach is a multiple of `dilation`;
    and the `sink` first tokens, which are whole blocks."""

    name: ClassVar[str] = "dilated"
    sink: int = 64
    local: int = 4
    reach: int = 64
    dilation: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("sink", 0), ("local", 1), ("reach", self.local), ("dilation", 1)):
            self.check(name, low, LONGEST)
        if self.sink % self.block:
            raise PolicyError(f"{self.name}: sink is {self.sink}; allowed are multiples of the block, {self.block}")

    def seen_blocks(self, number: int) -> Ints:
        near = max(0, number - self.local + 1)
        farthest = (min(number, self.reach - 1)) // self.dilation * self.dilation
        far = np.arange(number - farthest, near, self.dilation)
        window = np.concatenate([far, np.arange(near, number + 1)])
        sinks = min(self.sink // self.block, number + 1)
        return np.concatenate([np.arange(sinks), window[window >= sinks]])


@dataclass(frozen=True)
class Sharded(BlockPolicy):
    """Query block qb sees key block kb <= qb where qb - kb < local or (kb + offset) mod stride = 0.

    KV head h has the offset `offset` + h * `step`: so the heads of a layer keep different blocks, together all of them.
    """

    name: ClassVar[str] = "sharded"
    local: int = 16
    stride: int = 8
    offset: int = 0
    step: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("local", 1), ("stride", 1), ("offset", 0), ("step", 0)):
            self.check(name, low, LONGEST)

    def of_head(self, head: int) -> Sharded:
        return replace(self, offset=(self.offset + head * self.step) % self.stride, step=0)

    def seen_blocks(self, number: int) -> Ints:
        near = max(0, number - self.local + 1)
        return np.concatenate([np.arange(-self.offset % self.stride, near, self.stride), np.arange(near, number + 1)])
