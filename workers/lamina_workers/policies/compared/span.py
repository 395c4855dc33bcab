"""`span`: a window that grows with the context, alpha + beta * N, beside one block of sinks (MoA, arXiv 2406.14909).

N is the query's own position, rounded down to a block of 64, so the window is the same however a prompt is cut. alpha
may be negative: such a window begins to grow at a length of its own, and is a block before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lamina_workers.policies.policy import LONGEST, Policy, View

BLOCK = 64


@dataclass(frozen=True)
class Span(Policy):
    """A query at p sees key k <= p where k < 64 or p - k < alpha + beta * 64 * floor(p / 64); with an alpha below 1
    that window is 64 at least."""

    name: ClassVar[str] = "span"
    alpha: int = 256
    beta: float = 0.0

    def __post_init__(self) -> None:
        self.check("alpha", -LONGEST, LONGEST)
        self.check("beta", 0, 1)

    @property
    def sinks(self) -> int:
        return BLOCK

    def seen_from(self, start: int) -> int:
        # Where the next block begins the window grows by 64 * beta <= 64: less than the queries have moved on since
        # this block began, but perhaps more than since `start`. So the first query of the next block counts too.
        after = (start // BLOCK + 1) * BLOCK
        return max(0, min(start - self._window(start) + 1, after - self._window(after) + 1))

    def views(self, start: int, count: int) -> Iterator[View]:
        first, end = start, start + count
        while first < end:
            last = min(end, (first // BLOCK + 1) * BLOCK) if self.beta else end
            yield View(first, last - first, self._window(first), BLOCK)
            first = last

    def _window(self, position: int) -> int:
        window = self.alpha + int(self.beta * (position // BLOCK * BLOCK))
        return window if self.alpha > 0 else max(window, BLOCK)
