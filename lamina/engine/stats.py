"""What the engine counts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lamina.messages.engine_request import NOTHING_SPARED, KvSavings
from lamina.messages.snapshot import BATCH_BUCKETS
from lamina_protocols.messages import Announced, Usage

if TYPE_CHECKING:
    from lamina.engine.holders import HolderChange
    from lamina.engine.observers import BatchDone
    from lamina.scheduling.control_plane import Step


@dataclass(slots=True)
class EngineStats:
    """Counters of one engine since `began`, a time of its clock. Seconds are of that clock. The engine's thread adds to
    them."""

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

    def batch_done(self, done: BatchDone) -> None:
        """Count a batch."""
        tokens = sum(row.count for row in done.plan.rows)
        self.batches += 1
        self.batch_tokens += tokens
        self.batch_counts[bisect_left(BATCH_BUCKETS, tokens)] += 1
        self.prompt_tokens += done.prompt_tokens
        self.generation_tokens += done.sampled

    def holders_changed(self, change: HolderChange) -> None:
        """Count attention workers. One that joins takes the place of one that is missing, if any is."""
        if change.kind == "lost":
            self.lost_holders += len(change.names)
            self.missing += change.names
        elif change.kind == "joined":
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


def savings(step: Step, answers: Mapping[int, Announced]) -> dict[str, KvSavings]:
    """What policies have spared each request of a step so far, by the parts whose holders say so."""
    usages: dict[str, list[Usage]] = {}
    for number, answer in answers.items():
        routes = step.batches[number].routes
        if len(answer.usages) == len(routes):
            for route, usage in zip(routes, answer.usages, strict=True):
                usages.setdefault(step.rows[route.source].sequence.request.id, []).append(usage)
    return {request_id: _sum(each) for request_id, each in usages.items()}


def _sum(usages: list[Usage]) -> KvSavings:
    columns = [[getattr(usage, name) for usage in usages] for name in KvSavings._fields]
    return KvSavings(*map(sum, columns))._replace(worst=max(columns[KvSavings._fields.index("worst")]))
