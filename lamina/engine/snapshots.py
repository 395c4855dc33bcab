"""Snapshots of an engine, made of the counters of its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace

from lamina.engine.stats import EngineStats
from lamina.kv.kv_shares import Pages
from lamina.messages.engine_request import KvSavings
from lamina.messages.snapshot import EXCHANGE_BUCKETS, HolderSnapshot, SequenceSnapshot, Snapshot
from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.speculation import SpeculationCounts
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
    held, resident = (sum(column) for column in zip((0.0, 0.0), *((x.held, x.resident) for x in spared), strict=True))
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
        kv_resident=min(1.0, resident / held) if held else 1.0,
        prefix_queries=counters.looked_up_tokens,
        prefix_hits=counters.found_tokens,
        preemptions=counters.preempted,
        evictions=counters.evicted,
        rebuilt_tokens=counters.rebuilt_tokens,
        model_seconds=max(0.0, uptime - stats.idle_seconds - attention_seconds),
        attention_seconds=attention_seconds,
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
        known = control.placement.holders
        self._others = {n: holder.rank for n, holder in known.items() if holder.rank and n not in links}
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
        holder, left = self._control.placement.holders[number], self._control.scheduler.ledger.free
        pools = tuple((total, max(0, left.get((number, pool), 0))) for pool, total in enumerate(holder.pages))
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
