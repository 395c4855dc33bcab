"""What is known of an engine's work: `BatchDone`, which each `BatchObserver` gets after a batch, the counters that
`EngineStats` keeps of them, and the snapshots that are made of the counters of all parts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from lamina.kv.kv_shares import Pages
from lamina.kv.request import Plan
from lamina.messages.engine_request import NOTHING_SPARED, EngineOutput, KvSavings
from lamina.messages.snapshot import BATCH_BUCKETS, EXCHANGE_BUCKETS, HolderSnapshot, SequenceSnapshot, Snapshot
from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.speculation import SpeculationCounts
from lamina_protocols.messages.messages import Announced, Usage
from lamina_workers.ports.timing import Link, Times

if TYPE_CHECKING:
    import torch

    from lamina.engine.holders import HolderChange
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
    blocked: int = 0
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
    return {request_id: KvSavings.of(request_usages) for request_id, request_usages in usages.items()}


_NO_EXCHANGES = (0,) * (len(EXCHANGE_BUCKETS) + 1)


def take_snapshot(
    stats: EngineStats,
    control: ControlPlane,
    *,
    links: Mapping[int, Link],
    names: Mapping[int, str],
    attention_seconds: float,
    experts_read: tuple[int, int],
    local_share: float,
    now: float,
    drafts: SpeculationCounts | None = None,
    spared: Iterable[KvSavings] = (),
    held_back: Mapping[str, str] | None = None,
    kv_redundant: float = 0.0,
) -> Snapshot:
    """What the engine is doing now. `links` are those to the holders of rank 0, `names` those of attention workers, by
    number of the holder. `now`: by the engine's clock. `drafts`: what became of them, None without speculation.
    `spared`: what policies have saved of each request. `held_back`, `kv_redundant`: see `Snapshot`."""
    scheduler = control.scheduler
    drafts = drafts or SpeculationCounts()
    total, resident = (sum(column) for column in zip((0.0, 0.0), *((x.held, x.resident) for x in spared), strict=True))
    counters, uptime, named = scheduler.counters, now - stats.began, _Names(control, links, names)
    counted = asdict(stats) | {"batch_counts": tuple(stats.batch_counts), "missing": tuple(stats.missing)}
    return Snapshot(
        **counted,  # EngineStats has the names of Snapshot
        uptime=uptime,
        held_back=held_back or {},
        running=len(scheduler.running),
        waiting=scheduler.waiting,
        lanes=control.tuner.lanes,
        local_share=local_share,
        kv_redundant=kv_redundant,
        kv_resident=min(1.0, resident / total) if total else 1.0,
        prefix_queries=counters.looked_up_tokens,
        prefix_hits=counters.found_tokens,
        preemptions=counters.preempted,
        evictions=counters.evicted,
        rebuilt_tokens=counters.rebuilt_tokens,
        model_seconds=max(0.0, uptime - stats.idle_seconds - attention_seconds),
        attention_seconds=attention_seconds,
        expert_bytes=experts_read[0],
        expert_rows=experts_read[1],
        drafts=drafts.drafts,
        draft_tokens=drafts.draft_tokens,
        accepted_tokens=drafts.accepted_tokens,
        accepted_at=tuple(drafts.accepted_at),
        page_size=scheduler.config.page_size,
        block_pages=max(1, sum(scheduler.config.page_set(control.placement.layout(1), 0).values())),
        cached_pages=named.pages(scheduler.running.prefix_cache.evictable),
        holders=tuple(named.holders()),
        sequences=tuple(
            SequenceSnapshot(
                request=sequence.request.id,
                sample=sequence.sample,
                tokens=len(sequence.tokens),
                prefill=sequence.left > 1,
                pages=named.pages(scheduler.running.pages(sequence)),
            )
            for sequence in scheduler.running
        ),
    )


class _Names:
    """The holders by name. The links of other ranks are unknown here: their holders count with the one of the same name
    at rank 0, or stand alone."""

    def __init__(self, control: ControlPlane, links: Mapping[int, Link], names: Mapping[int, str]) -> None:
        self._control = control
        self._links = links
        holders = control.placement.holders
        self._others = {n: holder.rank for n, holder in holders.items() if holder.rank and n not in links}
        self._names = {number: names.get(number, link.name) for number, link in links.items()}
        self._names |= {number: names.get(number, f"rank-{rank}") for number, rank in self._others.items()}

    def pages(self, pages: Pages) -> dict[str, int]:
        """Pages by name, of all pools."""
        counts: Counter[str] = Counter()
        for (number, _), count in pages.items():
            if number in self._names:
                counts[self._names[number]] += count
        return dict(counts)

    def holders(self) -> Iterator[HolderSnapshot]:
        """One row for each name: every rank has a part of the pages of an attention worker."""
        parts: dict[str, list[int]] = {}
        for number in self._others:
            parts.setdefault(self._names[number], []).append(number)
        for number, link in sorted(self._links.items()):
            one = self._holder(number, link)
            for part in parts.pop(self._names[number], ()):
                one = _sum(one, self._holder(part, link))
            yield one
        for name, numbers in parts.items():
            for number in numbers:
                yield self._holder(number, Link(name, "", "in process", True, 0, 0, 0.0, _NO_EXCHANGES))

    def _holder(self, number: int, link: Link) -> HolderSnapshot:
        holder, free_pages = self._control.placement.holders[number], self._control.scheduler.ledger.free
        pools = tuple((total, max(0, free_pages.get((number, pool), 0))) for pool, total in enumerate(holder.pages))
        return HolderSnapshot(
            name=self._names[number],
            address=link.address,
            channel=link.channel,
            local=link.in_process,
            total_pages=sum(total for total, _ in pools),
            free_pages=sum(free for _, free in pools),
            pools=pools if len(pools) > 1 else (),
            bytes_sent=link.bytes_sent,
            bytes_received=link.bytes_received,
            exchange_seconds=link.seconds,
            exchange_counts=link.counts,
            keeps=self._control.placement.keeps(number),
        )


def _sum(one: HolderSnapshot, part: HolderSnapshot) -> HolderSnapshot:
    """One holder with the pages of both."""
    pools = zip(one.pools, part.pools, strict=True)
    return replace(
        one,
        total_pages=one.total_pages + part.total_pages,
        free_pages=one.free_pages + part.free_pages,
        pools=tuple((total + more, free + also) for (total, free), (more, also) in pools),
    )


@dataclass(frozen=True, slots=True)
class BatchDone:
    """A batch that is complete and recorded; its outputs have not left yet.

    `outputs` are by request id. `prompt_tokens` counts computed tokens of prompts, `sampled` the sampled tokens.
    `running` counts the sequences with KV, before the batch was recorded. `local_tokens` and `remote_tokens` are the
    tokens of KV that it read in either tier. `times` is what its attention took, `attended`
    the seconds of attention of all batches so far, `now` its end by the engine's clock. `hidden`: see `BatchWork`.
    """

    plan: Plan
    outputs: Mapping[str, Sequence[EngineOutput]]
    prompt_tokens: int
    sampled: int
    running: int
    local_tokens: int
    remote_tokens: int
    times: Times
    attended: float
    now: float
    hidden: Sequence[torch.Tensor] | None = None

    @property
    def prefill(self) -> bool:
        """Whether a row has more than one known token."""
        return any(row.known > 1 for row in self.plan.rows)


class BatchObserver(Protocol):
    """A part of the engine that learns from batches."""

    def batch_done(self, done: BatchDone) -> None:
        """Called on the engine's thread, before the outputs leave."""
