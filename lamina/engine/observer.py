"""A snapshot of the engine made of what its parts count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from lamina.engine.stats import _NO_EXCHANGES, EngineStats
from lamina.messages.snapshot import HolderSnapshot, SequenceSnapshot, Snapshot
from lamina.scheduling.kv_shares import Pages
from lamina.scheduling.placement import Placement
from lamina.scheduling.scheduler import Scheduler
from lamina_workers.ports.timing import Link


def observe(
    tally: EngineStats,
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
