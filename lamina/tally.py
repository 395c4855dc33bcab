"""What the engine counts, and how a snapshot is made of it and of the scheduler's and the holders' own numbers.

Pure: told the time; knows no tensor and no message.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from lamina.messages.engine_request import NOTHING_SPARED, Spared
from lamina.messages.snapshot import BATCH_BUCKETS, HolderSnapshot, SequenceSnapshot, Snapshot
from lamina.scheduling.kv_shares import Pages
from lamina.scheduling.placement import Placement
from lamina.scheduling.scheduler import Scheduler
from lamina_workers.ports.timing import EXCHANGE_BUCKETS, Link

_NO_EXCHANGES = (0,) * (len(EXCHANGE_BUCKETS) + 1)


@dataclass(slots=True)
class Tally:
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

    def spared(self, before: Spared, now: Spared) -> None:
        """A request's policies have spared so much by now. Where its KV was lost they have begun from nothing again."""
        if now.whole < before.whole or now.queries < before.queries:
            before = NOTHING_SPARED
        self.kv_read += max(0.0, now.read - before.read)
        self.kv_whole += now.whole - before.whole
        self.missed_mass += max(0.0, now.missed - before.missed)
        self.missed_queries += now.queries - before.queries


def survey(
    tally: Tally,
    scheduler: Scheduler,
    placement: Placement,
    links: Mapping[int, Link],
    known: Mapping[int, str],
    scratch: Collection[int],
    now: float,
) -> Snapshot:
    """What the engine is doing now. `links` are those to the holders, by number; a holder goes by its name in `known`,
    where it has one. Other ranks have links of their own, of which nothing is known here. Those of `scratch` are no
    concern of the scheduler's."""
    elsewhere = {
        number: holder.rank for number, holder in placement.holders.items() if holder.rank and number not in links
    }
    names = {number: known.get(number, link.name) for number, link in links.items()}
    names |= {number: known.get(number, f"rank-{rank}") for number, rank in elsewhere.items()}
    free, counters, uptime = scheduler.free, scheduler.counters, now - tally.began

    def room(number: int) -> tuple[int, int]:
        """In all, and free."""
        total = placement.holders[number].pages
        left = tally.scratch_free.get(number) if number in scratch else free.get(number, 0)
        return total, total if left is None else max(0, left)

    def holder(number: int, link: Link) -> HolderSnapshot:
        total, left = room(number)
        return HolderSnapshot(
            name=names[number],
            address=link.address,
            channel=link.channel,
            local=link.in_process,
            total_pages=total,
            free_pages=left,
            bytes_sent=link.bytes_sent,
            bytes_received=link.bytes_received,
            exchange_seconds=link.seconds,
            exchange_counts=link.counts,
        )

    def holders() -> Iterator[HolderSnapshot]:
        """One for each name: at an attention worker, every rank has a part of its pages."""
        parts: dict[str, list[int]] = {}
        for number in elsewhere:
            parts.setdefault(names[number], []).append(number)
        for number, link in sorted(links.items()):
            one = holder(number, link)
            for part in parts.pop(names[number], ()):
                total, left = room(part)
                one = replace(one, total_pages=one.total_pages + total, free_pages=one.free_pages + left)
            yield one
        for name, numbers in parts.items():
            for number in numbers:
                yield holder(number, Link(name, "", "in process", True, 0, 0, 0.0, _NO_EXCHANGES))

    def named(pages: Pages) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for number, count in pages.items():
            if number in names:
                counts[names[number]] += count
        return dict(counts)

    return Snapshot(
        uptime=uptime,
        running=scheduler.running,
        waiting=scheduler.waiting,
        lanes=tally.lanes,
        local_share=tally.local_share,
        batches=tally.batches,
        prompt_tokens=tally.prompt_tokens,
        generation_tokens=tally.generation_tokens,
        prefix_queries=counters.looked_up_tokens,
        prefix_hits=counters.found_tokens,
        preemptions=counters.preempted,
        evictions=counters.evicted,
        rebuilt_tokens=counters.rebuilt_tokens,
        lost_holders=tally.lost_holders,
        joined_holders=tally.joined_holders,
        failed_batches=tally.failed_batches,
        model_seconds=max(0.0, uptime - tally.idle_seconds - tally.attention_seconds),
        attention_seconds=tally.attention_seconds,
        kv_read=tally.kv_read,
        kv_whole=tally.kv_whole,
        missed_mass=tally.missed_mass,
        missed_queries=tally.missed_queries,
        page_size=scheduler.config.page_size,
        cached_pages=named(scheduler.cached),
        holders=tuple(holders()),
        sequences=tuple(
            SequenceSnapshot(
                request=sequence.request.id,
                sample=sequence.sample,
                tokens=len(sequence.tokens),
                prefill=sequence.left > 1,
                pages=named(scheduler.kept(sequence)),
            )
            for sequence in scheduler.sequences
        ),
        idle_seconds=tally.idle_seconds,
        corrupted=tally.corrupted,
        batch_tokens=tally.batch_tokens,
        batch_counts=tuple(tally.batch_counts),
        missing=tuple(tally.missing),
        returned_workers=tally.returned,
        began=tally.began,
    )
