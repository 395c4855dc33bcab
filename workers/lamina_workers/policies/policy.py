"""What a policy is, and how one is written: `streaming(sink=64, recent=256)`. Pure arithmetic on positions.

A policy belongs to one layer and one KV head. A *static* one says which keys a query sees by their positions alone, so
past and fresh tokens, any chunks and any shards agree. An *adaptive* one reads less in decode: a `chooser.Chooser`
chooses by the queries. Prefill and rebuilding read everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lamina_kernels.paged.rows import EVERYTHING
from lamina_workers.errors import PolicyError

LONGEST = 1 << 24  # tokens that a parameter may be
MAX_TEXT = 200


@dataclass(frozen=True, slots=True)
class View:
    """How the queries at positions start, ..., start + count - 1 see: key k <= p where p - k < window or k < sinks.

    With `listed`, ascending positions, it sees only the keys of the list.
    """

    start: int
    count: int
    window: int = EVERYTHING
    sinks: int = 0
    listed: Sequence[int] | None = None


@dataclass(frozen=True)
class Policy:
    """The base, which sees and keeps everything. A policy is a frozen dataclass whose fields are its parameters.

    `seen_from` never falls as `start` grows: what lies behind it, but for the first `sinks` tokens, is freed.
    """

    name: ClassVar[str]
    adaptive: ClassVar[bool] = False  # whether it has a chooser
    sketched: ClassVar[bool] = False  # whether its chooser reads sketches of pages
    compensated: ClassVar[bool] = False  # whether a mean stands for the pages that decode has freed

    @property
    def sinks(self) -> int:
        """How many of the first tokens stay visible and are kept."""
        return 0

    def seen_from(self, start: int) -> int:
        """The lowest position above the sinks that a query at `start` or later sees."""
        return 0

    def kept_from(self, start: int) -> int:
        """The lowest position above the sinks that is kept once a decode step at `start` has come. Never falls as
        `start` grows. Above `seen_from(start)` only where the policy is `compensated`."""
        return self.seen_from(start)

    def views(self, start: int, count: int) -> Iterator[View]:
        """What `count` queries from `start` on see, in order, in as few views as possible."""
        yield View(start, count)

    def returns_to(self, position: int) -> int:
        """The lowest start whose queries see nothing of [sinks, position): a part that has freed what lies below
        `position` can return to it."""
        low, high = 0, 2 * LONGEST
        while low < high:
            middle = (low + high) // 2
            if self.kept_from(middle) >= position:
                high = middle
            else:
                low = middle + 1
        return low

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
            if view.listed is None:
                yield dataclasses.replace(view, window=min(view.window, self.window), sinks=0)
                continue
            for position in range(view.start, view.start + view.count):  # each query's list begins elsewhere
                seen = [key for key in view.listed if position - self.window < key <= position]
                yield View(position, 1, listed=seen)


def within(policy: Policy, window: int | None) -> Policy:
    """The policy in a layer with that sliding window."""
    return policy if window is None else Windowed(policy, window)
