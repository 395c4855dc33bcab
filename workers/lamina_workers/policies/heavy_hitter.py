"""`heavy_hitter`: the pages that have got the most attention so far, and the recent ones; the others are freed (H2O,
arXiv 2306.14048).

H2O adds up the attention that each key gets from all queries, and evicts the least. Here it is pages that are counted,
by a sample of the prompt's queries and every `every`-th of decode's (`attention_worker.heavy_pages`). A page's sum is
divided by how many of them could see it, since an old page was seen by more (as SinkLoRA, arXiv 2406.05678,
normalises). Prompts are read whole, so pages are freed only in decode. What is freed does not come back: a page that
would have become heavy later is not read again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lamina_workers.policies.policy import LONGEST, Policy

SAMPLE = 32  # queries are counted of a row of a prompt that is as long as it is far from the end, up to twice as many


@dataclass(frozen=True)
class HeavyHitter(Policy):
    """Kept are the `sink` first and `recent` last tokens, and of the pages before the recent ones the share `budget`
    with most attention."""

    name: ClassVar[str] = "heavy_hitter"
    evicts: ClassVar[bool] = True
    sink: int = 64
    recent: int = 256
    budget: float = 0.25
    every: int = 64

    def __post_init__(self) -> None:
        self.check("sink", 0, LONGEST)
        self.check("recent", 1, LONGEST)
        self.check("budget", 0, 1)
        self.check("every", 1, LONGEST)

    @property
    def sinks(self) -> int:
        return self.sink

    def kept_from(self, start: int) -> int:
        return max(0, start - self.recent + 1)

    def sampled(self, start: int, prompt: int) -> int:
        if prompt <= self.sink + self.recent:
            return 0
        return 1 << max(0, ((prompt - start) // SAMPLE).bit_length() - 1)

    def counts(self, start: int) -> bool:
        return start % self.every == 0

    def remaining(self, sinks: int, slots: int) -> int:
        return min(slots, sinks + math.ceil(self.budget * slots))

    def staying(self, first: int, end: int, size: int) -> int:
        return min(max(0, end - first), self.remaining(-(-self.sink // size), end))
