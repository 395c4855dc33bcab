"""A snapshot of an engine, made of what its parts count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from lamina.engine.stats import EngineStats
from lamina.messages.snapshot import EXCHANGE_BUCKETS, HolderSnapshot, SequenceSnapshot, Snapshot
from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.kv_shares import Pages
from lamina_workers.ports.timing import Link

_NO_EXCHANGES = (0,) * (len(EXCHANGE_BUCKETS) + 1)


def take_snapshot(
    stats: EngineStats,
    control: ControlPlane,
    links: Mapping[int, Link],
    names: Mapping[int, str],
    attention_seconds: float,
    local_share: float,
    now: float,
) -> Snapshot:
    """What the engine is doing now. `links` are the links to the holders of rank 0, by number; `names` those of
    attention workers, by number of the holder."""
    scheduler = control.scheduler
    counters, uptime, named = scheduler.counters, now - stats.began, _Names(control, links, names)
    return Snapshot(
        uptime=uptime,
        running=len(scheduler.running),
        waiting=scheduler.waiting,
        lanes=control.lanes.count,
        local_share=local_share,
        batches=stats.batches,
        prompt_tokens=stats.prompt_tokens,
        generation_tokens=stats.generation_tokens,
        prefix_queries=counters.looked_up_tokens,
        prefix_hits=counters.found_tokens,
        preemptions=counters.preempted,
        evictions=counters.evicted,
        rebuilt_tokens=counters.rebuilt_tokens,
        lost_holders=stats.lost_holders,
        joined_holders=stats.joined_holders,
        failed_batches=stats.failed_batches,
        model_seconds=max(0.0, uptime - stats.idle_seconds - attention_seconds),
        attention_seconds=attention_seconds,
        kv_read=stats.kv_read,
        kv_whole=stats.kv_whole,
        missed_mass=stats.missed_mass,
        missed_queries=stats.missed_queries,
        page_size=scheduler.config.page_size,
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
        idle_seconds=stats.idle_seconds,
        corrupted=stats.corrupted,
        batch_tokens=stats.batch_tokens,
        batch_counts=tuple(stats.batch_counts),
        missing=tuple(stats.missing),
        returned_workers=stats.returned,
        began=stats.began,
    )


class _Names:
    """The holders by their names. Other ranks have links of their own, of which nothing is known here: their holders
    are counted with the one of the same name at rank 0, or stand alone."""

    def __init__(self, control: ControlPlane, links: Mapping[int, Link], names: Mapping[int, str]) -> None:
        self._control = control
        self._links = links
        known = control.placement.holders
        self._others = {n: holder.rank for n, holder in known.items() if holder.rank and n not in links}
        self._names = {number: names.get(number, link.name) for number, link in links.items()}
        self._names |= {number: names.get(number, f"rank-{rank}") for number, rank in self._others.items()}

    def pages(self, pages: Pages) -> dict[str, int]:
        """Pages by name."""
        counts: Counter[str] = Counter()
        for number, count in pages.items():
            if number in self._names:
                counts[self._names[number]] += count
        return dict(counts)

    def holders(self) -> Iterator[HolderSnapshot]:
        """One row for each name: at an attention worker, every rank has a part of its pages."""
        parts: dict[str, list[int]] = {}
        for number in self._others:
            parts.setdefault(self._names[number], []).append(number)
        for number, link in sorted(self._links.items()):
            one = self._holder(number, link)
            for part in parts.pop(self._names[number], ()):
                total, free = self._room(part)
                one = replace(one, total_pages=one.total_pages + total, free_pages=one.free_pages + free)
            yield one
        for name, numbers in parts.items():
            for number in numbers:
                yield self._holder(number, Link(name, "", "in process", True, 0, 0, 0.0, _NO_EXCHANGES))

    def _holder(self, number: int, link: Link) -> HolderSnapshot:
        total, free = self._room(number)
        return HolderSnapshot(
            name=self._names[number],
            address=link.address,
            channel=link.channel,
            local=link.in_process,
            total_pages=total,
            free_pages=free,
            bytes_sent=link.bytes_sent,
            bytes_received=link.bytes_received,
            exchange_seconds=link.seconds,
            exchange_counts=link.counts,
        )

    def _room(self, number: int) -> tuple[int, int]:
        """Pages in all, and free. A prefill pool that has said nothing yet is free."""
        control = self._control
        total = control.placement.holders[number].pages
        if number in control.placement.prefill_pools:
            return total, max(0, control.prefill_free.get(number, total))
        return total, max(0, control.scheduler.ledger.free.get(number, 0))
