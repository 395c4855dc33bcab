"""The counters of an engine."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lamina.messages.engine_request import NOTHING_SPARED, KvSavings
from lamina.messages.snapshot import BATCH_BUCKETS
from lamina_protocols.messages.messages import Announced, Usage

if TYPE_CHECKING:
    from lamina.engine.holders import HolderChange
    from lamina.engine.observers import BatchDone
    from lamina.scheduling.control_plane import Step


@dataclass(slots=True)
class EngineStats:
    """Counters since `began`, a time of the engine's clock. Seconds are of that clock. For the engine's thread. Each
    field is one of `Snapshot` too."""

    began: float
    idle_seconds: float = 0.0
    plan_seconds: float = 0.0
    announce_seconds: float = 0.0
    batches: int = 0
    failed_batches: int = 0
    batch_tokens: int = 0
    batch_counts: list[int] = field(default_factory=lambda: [0] * (len(BATCH_BUCKETS) + 1))
    prompt_tokens: int = 0
    generation_tokens: int = 0
    corrupted: int = 0
    lost_holders: int = 0
    joined_holders: int = 0
    returned_workers: int = 0
    missing: list[str] = field(default_factory=list)
    kv_read: float = 0.0
    kv_whole: float = 0.0
    missed_mass: float = 0.0
    missed_queries: float = 0.0
    workers_wanted: int | None = None
    kv_full_in: float | None = None

    def batch_done(self, done: BatchDone) -> None:
        """Count a batch."""
        tokens = sum(row.count for row in done.plan.rows)
        self.batches += 1
        self.batch_tokens += tokens
        self.batch_counts[bisect_left(BATCH_BUCKETS, tokens)] += 1
        self.prompt_tokens += done.prompt_tokens
        self.generation_tokens += done.sampled

    def holders_changed(self, change: HolderChange) -> None:
        """Count attention workers. One that joins replaces a missing one, if there is one."""
        if change.kind == "lost":
            self.lost_holders += len(change.names)
            self.missing += change.names
        elif change.kind == "joined":
            self.joined_holders += 1
            del self.missing[:1]

    def came_back(self, workers: int) -> None:
        """Count model workers that were gone."""
        self.returned_workers += workers

    def spared(self, before: KvSavings, now: KvSavings) -> None:
        """Add what a request's policies have saved since `before`. Lost KV makes their sums begin at 0 again."""
        if now.whole < before.whole or now.queries < before.queries:
            before = NOTHING_SPARED
        self.kv_read += max(0.0, now.read - before.read)
        self.kv_whole += now.whole - before.whole
        self.missed_mass += max(0.0, now.missed - before.missed)
        self.missed_queries += now.queries - before.queries


def savings(step: Step, answers: Mapping[int, Announced]) -> dict[str, KvSavings]:
    """What policies have saved each request of a step so far, by the holders' answers."""
    usages: dict[str, list[Usage]] = {}
    for number, answer in answers.items():
        routes = step.batches[number].routes
        if len(answer.usages) == len(routes):
            for route, usage in zip(routes, answer.usages, strict=True):
                usages.setdefault(step.rows[route.source].sequence.request.id, []).append(usage)
    return {request_id: _sum(each) for request_id, each in usages.items()}


def _sum(usages: list[Usage]) -> KvSavings:
    # As floats: sums of integers that a holder makes up may be too large to be sent on.
    columns = [[float(getattr(usage, name)) for usage in usages] for name in KvSavings._fields]
    return KvSavings(*map(sum, columns))._replace(worst=max(columns[KvSavings._fields.index("worst")]))
