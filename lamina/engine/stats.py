"""What the engine counts, and how a snapshot is made of it and of the scheduler's and the holders' own numbers.

Pure: told the time; knows no tensor and no message.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from lamina.messages.engine_request import NOTHING_SPARED, KvSavings
from lamina.messages.snapshot import BATCH_BUCKETS
from lamina_workers.ports.timing import EXCHANGE_BUCKETS

_NO_EXCHANGES = (0,) * (len(EXCHANGE_BUCKETS) + 1)


@dataclass(slots=True)
class EngineStats:
    """Counters of one engine since `began`, which is a time of its clock. The engine's thread adds to them."""

    began: float
    idle_seconds: float = 0.0
    batches: int = 0
    failed_batches: int = 0
    batch_tokens: int = 0
    batch_counts: list[int] = field(default_factory=lambda: [0] * (len(BATCH_BUCKETS) + 1))
    prompt_tokens: int = 0
    generation_tokens: int = 0
    corrupted: int = 0
    lost_holders: int = 0
    joined_holders: int = 0
    returned: int = 0  # model workers that were gone and came back
    missing: list[str] = field(default_factory=list)
    kv_read: float = 0.0
    kv_whole: float = 0.0
    missed_mass: float = 0.0
    missed_queries: float = 0.0
    attention_seconds: float = 0.0  # this, `lanes` and `local_share` are set when a snapshot is taken
    lanes: int = 1
    local_share: float = 1.0
    scratch_free: dict[int, int] = field(default_factory=dict)  # pages of holders that keep prompts only, once told

    def complete(self, tokens: int, prompt_tokens: int, sampled: int) -> None:
        """A batch of so many tokens is complete: so many of prompts, computed for the first time or after a
        preemption, and so many sampled."""
        self.batches += 1
        self.batch_tokens += tokens
        self.batch_counts[bisect_left(BATCH_BUCKETS, tokens)] += 1
        self.prompt_tokens += prompt_tokens
        self.generation_tokens += sampled

    def lost(self, names: Iterable[str]) -> None:
        """Holders are gone that nobody let go."""
        for name in names:
            self.lost_holders += 1
            self.missing.append(name)

    def joined(self) -> None:
        """There is one holder more: it takes the place of one that is missing, if any is."""
        self.joined_holders += 1
        del self.missing[:1]

    def spared(self, before: KvSavings, now: KvSavings) -> None:
        """A request's policies have spared so much by now. Where its KV was lost they have begun from nothing again."""
        if now.whole < before.whole or now.queries < before.queries:
            before = NOTHING_SPARED
        self.kv_read += max(0.0, now.read - before.read)
        self.kv_whole += now.whole - before.whole
        self.missed_mass += max(0.0, now.missed - before.missed)
        self.missed_queries += now.queries - before.queries
