"""Policies that see whole blocks of keys: what two of them share. Pure arithmetic on positions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from lamina_kernels.paged.rows import Ints
from lamina_workers.policies.policy import Policy, View


class BlockPolicy(Policy):
    """All queries of a block of `unit` tokens see the same blocks of keys."""

    def seen_blocks(self, number: int) -> Ints:
        """The blocks of keys that queries in block `number` see, different and ascending; that block is the last."""
        raise NotImplementedError(f"policy {self.name} sees no blocks")

    def views(self, start: int, count: int) -> Iterator[View]:
        first, end = start, start + count
        while first < end:
            number = first // self.unit
            last = min(end, (number + 1) * self.unit)
            yield View(first, last - first, ranges=_ranges(self, number))
            first = last


@lru_cache(maxsize=4096)  # the steps of a block see the same
def _ranges(policy: BlockPolicy, number: int) -> Ints:
    """The keys that queries in a block see: `[n, 2]`, neighbouring blocks together. Not to be written to."""
    numbers = policy.seen_blocks(number)
    ends = np.flatnonzero(np.append(np.diff(numbers) != 1, True))
    begins = np.append(0, ends[:-1] + 1)
    ranges = np.stack([numbers[begins], numbers[ends] + 1], 1) * policy.unit
    ranges.setflags(write=False)
    return ranges
