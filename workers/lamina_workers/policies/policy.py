"""What a policy is, and how one is written: `streaming(sink=64, recent=256)`. Pure arithmetic on positions.

A policy belongs to one layer and one KV head. A *static* one says which keys a query sees by their positions alone, so
past and fresh tokens, any chunks and any shards agree. An *adaptive* one reads less in decode: a `chooser.Chooser`
chooses by the queries. Prefill and rebuilding read everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lamina_kernels.paged.rows import EVERYTHING, Ints
from lamina_workers.errors import PolicyError

Bools = npt.NDArray[np.bool_]
LONGEST = 1 << 24  # tokens that a parameter may be
MAX_TEXT = 200


@dataclass(frozen=True, slots=True)
class View:
    """How the queries at positions start, ..., start + count - 1 see: key k <= p where p - k < window or k < sinks.

    With `ranges`, int64 `[n, 2]`, it sees those in one of these [first, end) instead, which ascend.
    """

    start: int
    count: int
    window: int = EVERYTHING
    sinks: int = 0
    ranges: Ints | None = None

    def seen(self, position: int) -> list[tuple[int, int]]:
        """The keys [first, end), ascending, that the query at this position sees."""
        end = position + 1
        near = max(0, end - self.window)
        every = [[0, min(self.sinks, near)], [near, end]] if self.ranges is None else self.ranges.tolist()
        return [(first, min(stop, end)) for first, stop in every if first < min(stop, end)]

    def keys(self, position: int, lo: int, hi: int) -> int:
        """How many keys in [lo, hi) the query at this position sees."""
        if self.ranges is None:
            return sum(max(0, min(end, hi) - max(first, lo)) for first, end in self.seen(position))
        first, end = self.ranges.T  # there may be hundreds of thousands
        return int(np.maximum(0, np.minimum(end, min(position + 1, hi)) - np.maximum(first, lo)).sum())


@dataclass(frozen=True)
class Policy:
    """The base, which sees and keeps everything. A policy is a frozen dataclass whose fields are its parameters.

    `seen_from` never falls as `start` grows: what lies behind it is freed, but for the sinks.
    """

    name: ClassVar[str]
    adaptive: ClassVar[bool] = False  # whether it has a chooser, which may read sketches of pages
    ranged: ClassVar[bool] = False  # whether its views have `ranges`

    @property
    def sinks(self) -> int:
        """How many of the first tokens stay visible and are kept."""
        return 0

    @property
    def builds(self) -> bool:
        """Whether its chooser builds an index of keys: that needs FAISS, memory and time beside the KV."""
        return False

    def seen_from(self, start: int) -> int:
        """The lowest position, but for sinks, that a query at `start` or later sees."""
        return 0

    def stays(self, positions: Ints) -> Bools:
        """Whether the page that begins at each of these positions is kept as long as its part is."""
        return positions < self.sinks

    def staying(self, first: int, end: int, size: int) -> int:
        """How many of a sequence's pages [first, end), of `size` tokens each, stay."""
        return max(0, min(end, -(-self.sinks // size)) - first)

    def of_head(self, head: int) -> Policy:
        """What a text that is for all KV heads of a layer means for this one."""
        return self

    def views(self, start: int, count: int) -> Iterator[View]:
        """What `count` queries from `start` on see, in order, in as few views as possible."""
        yield View(start, count)

    @cached_property
    def steady(self) -> bool:
        """Whether all queries have the same window and sinks, so that one view has them all."""
        first = next(self.views(0, 2 * LONGEST))
        return first.count == 2 * LONGEST and first.ranges is None

    def within(self, window: int) -> Policy:
        """The policy in a layer whose model has that sliding window."""
        return Windowed(self, window)

    def returns_to(self, position: int) -> int:
        """The lowest start whose queries see nothing below `position` but what stays: a part that has freed what lies
        there can return to it."""
        low, high = 0, 2 * LONGEST
        while low < high:
            middle = (low + high) // 2
            if self.seen_from(middle) >= position:
                high = middle
            else:
                low = middle + 1
        return low

    def sampled(self, start: int, prompt: int) -> int:
        """The stride, a power of two, of positions whose queries its chooser is to be shown, of a row that begins at
        `start` in a prompt of `prompt` tokens; 0: of no row of that prompt."""
        return 0

    def __str__(self) -> str:
        fields = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))
        return f"{self.name}({fields})" if fields else self.name

    def check(self, name: str, low: float, high: float) -> None:
        """Raise PolicyError unless the field of that name is in [low, high]."""
        value = getattr(self, name)
        if not low <= value <= high:  # NaN compares false
            raise PolicyError(f"{self.name}: {name} is {value}; allowed is {low} to {high}")


@dataclass(frozen=True)
class Windowed(Policy):
    """A policy in a layer whose model has a sliding window: then nothing lies outside it, sinks neither."""

    name: ClassVar[str] = "windowed"
    inner: Policy
    window: int

    def seen_from(self, start: int) -> int:
        return max(self.inner.seen_from(start), start - self.window + 1, 0)

    def views(self, start: int, count: int) -> Iterator[View]:
        for view in self.inner.views(start, count):
            yield dataclasses.replace(view, window=min(view.window, self.window), sinks=0)


def within(policy: Policy, window: int | None) -> Policy:
    """The policy in a layer with that sliding window."""
    return policy if window is None else policy.within(window)
