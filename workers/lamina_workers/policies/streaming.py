"""`streaming`: the first tokens and the most recent ones (StreamingLLM; DuoAttention's streaming heads).

Keys keep the positions that RoPE gave them. What is in between is freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from lamina_workers.policies.policy import LONGEST, Policy, View


@dataclass(frozen=True)
class Streaming(Policy):
    """A query at p sees key k <= p where k < sink or p - k < recent."""

    name: ClassVar[str] = "streaming"
    sink: int = 64
    recent: int = 256

    def __post_init__(self) -> None:
        self.check("sink", 0, LONGEST)
        self.check("recent", 1, LONGEST)

    @property
    def sinks(self) -> int:
        return self.sink

    def seen_from(self, start: int) -> int:
        return max(0, start - self.recent + 1)

    def views(self, start: int, count: int) -> Iterator[View]:
        yield View(start, count, self.recent, self.sink)
