"""An engine's snapshot as Prometheus metrics. Totals continue from those of the previous engine after a restart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, zip_longest
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from lamina.messages.snapshot import BATCH_BUCKETS, EXCHANGE_BUCKETS, HolderSnapshot, Snapshot

F = TypeVar("F", bound=Metric)

_COUNTERS: Mapping[str, tuple[str, str]] = {
    "generation_tokens": ("generation_tokens", "Tokens sampled."),
    "prompt_tokens": ("computed_prompt_tokens", "Tokens of prompts that were computed, not found in the prefix cache."),
    "prefix_queries": ("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache."),
    "prefix_hits": ("prefix_cache_hits", "Tokens of prompts that the prefix cache had."),
    "preemptions": ("num_preemptions", "Sequences whose KV was given up for others, to be computed again."),
    "evictions": ("prefix_cache_evictions", "Prefixes that were given up for room."),
    "batches": ("batches", "Batches that were complete."),
    "plan_seconds": ("plan_seconds", "Seconds of planning batches."),
    "announce_seconds": (
        "announce_seconds",
        "Seconds between announcing batches and having the answers of all that keep KV.",
    ),
    "failed_batches": ("failed_batches", "Batches that an attention worker's failure or loss stopped; they ran again."),
    "rebuilt_tokens": ("rebuilt_tokens", "Tokens whose KV was lost with an attention worker and computed again."),
    "lost_holders": ("recoveries", "Attention workers that were lost, and recovered from."),
    "joined_holders": ("attention_workers_joined", "Attention workers that joined after the start."),
    "returned_workers": ("model_workers_returned", "Model workers that were gone and came back."),
    "corrupted": ("corrupted_requests", "Samples that ended because their logits were not finite."),
    "blocked": (
        "blocked_requests",
        "Requests that ended because no batch could be planned, an error of the scheduler.",
    ),
    "kv_read": ("kv_read_bytes", "KV read in decode under policies that choose, what was read to choose included."),
    "kv_whole": ("kv_whole_bytes", "What reading all of that KV would have taken."),
    "missed_mass": ("missed_mass", "Estimated attention mass that queries did not read, summed over queries."),
    "missed_queries": ("missed_mass_queries", "Query vectors that the estimates of missed mass are of."),
    "expert_bytes": ("expert_bytes", "Bytes of experts that were read, of each once a batch that chose it."),
    "expert_rows": ("expert_rows", "Pairs of a token and an expert that it chose, in all layers."),
    "drafts": ("spec_decode_num_drafts", "Rows with drafts that were verified."),
    "draft_tokens": ("spec_decode_num_draft_tokens", "Drafts that were verified."),
    "accepted_tokens": ("spec_decode_num_accepted_tokens", "Drafts that became tokens."),
}
"""By field of the snapshot, the metric's name without prefix and suffix, and its documentation."""

_TIERS = {"model": "model_seconds", "attention": "attention_seconds", "idle": "idle_seconds"}
_SUMS = (*_COUNTERS, *_TIERS.values(), "batch_tokens")


class EngineMetrics:
    """The engine's part of a scrape: first `see`, then `families`."""

    def __init__(self, model_name: str) -> None:
        self._values = (model_name, "0")
        self._latest: Snapshot | None = None
        self._alive = False
        self._before = dict.fromkeys(_SUMS, 0.0)  # the counts of previous engines
        self._batches_before = (0,) * (len(BATCH_BUCKETS) + 1)
        self._accepted_before: tuple[int, ...] = ()

    def see(self, snapshot: Snapshot | None, alive: bool) -> None:
        """Take the engine's newest snapshot, None where there is none, and whether the engine serves requests."""
        latest = self._latest
        if snapshot is not None and latest is not None and snapshot.began != latest.began:
            self._batches_before = self._batches(latest)
            self._accepted_before = self._accepted(latest)
            self._before = {name: self._total(latest, name) for name in _SUMS}
        self._latest, self._alive = snapshot or latest, alive

    def families(self) -> Iterator[Metric]:
        """Every metric, including those without a value."""
        latest = self._latest
        yield self._gauge("engine_up", "Whether the engine serves requests: 1 or 0.", self._alive)
        yield from self._totals(latest)
        yield self._batch_sizes(latest)
        yield from self._now(latest)
        yield from self._workers(latest)
        yield from self._autoscaling(latest)

    def _totals(self, latest: Snapshot | None) -> Iterator[Metric]:
        for name, (metric, text) in _COUNTERS.items():
            yield self._counter(metric, text, self._total(latest, name))
        read = self._total(latest, "prompt_tokens") + self._total(latest, "prefix_hits")
        yield self._counter("prompt_tokens", "Tokens of prompts that were read: computed, or found in the cache.", read)
        tiers = family(CounterMetricFamily, "tier_seconds", "What the engine's thread spent its time on.", "tier")
        for tier, name in _TIERS.items():
            tiers.add_metric((*self._values, tier), self._total(latest, name))
        yield tiers
        what = "Drafts that became tokens, by their position in their row."
        accepted = family(CounterMetricFamily, "spec_decode_num_accepted_tokens_per_pos", what, "position")
        for position, count in enumerate(self._accepted(latest)):
            accepted.add_metric((*self._values, str(position)), count)
        yield accepted

    def _batch_sizes(self, latest: Snapshot | None) -> Metric:
        sizes = family(HistogramMetricFamily, "iteration_tokens_total", "Tokens computed in a batch.")
        counts, total = self._batches(latest), self._total(latest, "batch_tokens")
        sizes.add_metric(self._values, cumulative(BATCH_BUCKETS, counts), total)
        return sizes

    def _now(self, latest: Snapshot | None) -> Iterator[Metric]:
        """Gauges of the present state, and means since this engine began."""
        present = latest if self._alive else None
        keepers = _keepers(present)
        total = sum(holder.total_pages for holder in keepers)
        used = sum(_pages(holder, present)["used"] for holder in keepers) if present else 0
        running, waiting = (present.running, present.waiting) if present else (0, 0)
        read = latest.kv_read / latest.kv_whole if latest and latest.kv_whole else 1.0
        share = latest.missed_mass / latest.missed_queries if latest and latest.missed_queries else 0.0
        yield self._gauge("num_requests_running", "Samples that have KV.", running)
        yield self._gauge("num_requests_waiting", "Samples that wait for room, or for a prefix.", waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV pages that sequences use.", used / max(1, total))
        yield self._gauge("lanes", "Batches that may be under way at a time.", present.lanes if present else 0)
        yield self._gauge(
            "kv_read_ratio", "KV read in decode, of what reading all would take; 1 without policies.", read
        )
        resident = present.kv_resident if present else 1.0
        what = "KV pages in memory, of those that requests under way hold; 1 without kv_cold."
        yield self._gauge("kv_resident_ratio", what, resident)
        what = "Share of the KV at attention workers that has all its spares; 0 without redundancy."
        yield self._gauge("kv_redundant_share", what, present.kv_redundant if present else 0.0)
        yield self._gauge("missed_mass_ratio", "Estimated mean share of attention that queries did not read.", share)
        info = family(GaugeMetricFamily, "cache_config_info", "How KV is kept.", "block_size", "num_gpu_blocks")
        if present:
            blocks = total // present.block_pages
            info.add_metric((*self._values, str(present.page_size), str(blocks)), 1)
        yield info

    def _workers(self, latest: Snapshot | None) -> Iterator[Metric]:
        up = family(GaugeMetricFamily, "attention_worker_up", "Whether an attention worker is there.", "worker")
        pages = family(
            GaugeMetricFamily,
            "kv_pages",
            "KV pages of an attention worker, or of the engine (local), by state.",
            "worker",
            "state",
        )
        what = "Where the layers keep several things, pages of each."
        by_pool = family(GaugeMetricFamily, "kv_pool_pages", what, "worker", "pool", "state")
        what = "Bytes to and from a worker."
        crossed = family(CounterMetricFamily, "attention_exchange_bytes", what, "worker", "direction")
        what = "From a layer's query to its answer."
        took = family(HistogramMetricFamily, "attention_exchange_seconds", what, "worker")
        for holder in latest.holders if latest else ():
            name = holder.name
            if not holder.local:
                up.add_metric((*self._values, name), self._alive)
                crossed.add_metric((*self._values, name, "sent"), holder.bytes_sent)
                crossed.add_metric((*self._values, name, "received"), holder.bytes_received)
            took.add_metric(
                (*self._values, name), cumulative(EXCHANGE_BUCKETS, holder.exchange_counts), holder.exchange_seconds
            )
            for state, count in _pages(holder, latest).items() if self._alive else ():
                pages.add_metric((*self._values, name, state), count)
            for pool, (total, free) in enumerate(holder.pools) if self._alive else ():
                by_pool.add_metric((*self._values, name, str(pool), "taken"), total - free)
                by_pool.add_metric((*self._values, name, str(pool), "free"), free)
        what = "Attention workers that are there and not used, by the reason."
        held_back = family(GaugeMetricFamily, "attention_worker_held_back", what, "worker", "reason")
        for name, reason in latest.held_back.items() if latest and self._alive else ():
            held_back.add_metric((*self._values, name, reason), 1)
        for name in latest.missing if latest else ():
            up.add_metric((*self._values, name), 0)
        yield from (up, pages, *(gauge for gauge in (by_pool, held_back) if gauge.samples), crossed, took)

    def _autoscaling(self, latest: Snapshot | None) -> Iterator[Metric]:
        """Nothing where the number of attention workers stays."""
        if latest is None or latest.workers_wanted is None or not self._alive:
            return
        full_in = math.inf if latest.kv_full_in is None else latest.kv_full_in
        yield self._gauge("attention_workers_wanted", "Attention workers, as KV grows.", latest.workers_wanted)
        yield self._gauge("kv_full_in_seconds", "Until all memory for KV is full, as KV grows.", full_in)

    def _total(self, snapshot: Snapshot | None, name: str) -> float:
        return self._before[name] + (float(getattr(snapshot, name)) if snapshot is not None else 0.0)

    def _batches(self, snapshot: Snapshot | None) -> tuple[int, ...]:
        if snapshot is None:
            return self._batches_before
        return tuple(map(sum, zip(self._batches_before, snapshot.batch_counts, strict=True)))

    def _accepted(self, snapshot: Snapshot | None) -> tuple[int, ...]:
        counts = zip_longest(self._accepted_before, snapshot.accepted_at if snapshot else (), fillvalue=0)
        return tuple(map(sum, counts))

    def _counter(self, name: str, text: str, value: float) -> Metric:
        counter = family(CounterMetricFamily, name, text)
        counter.add_metric(self._values, value)
        return counter

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = family(GaugeMetricFamily, name, text)
        gauge.add_metric(self._values, value)
        return gauge


def family(kind: Callable[..., F], name: str, text: str, *labels: str) -> F:
    """An empty family of metrics of one model, with further labels."""
    return kind(f"lamina:{name}", text, labels=("model_name", "engine", *labels))


def cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """A histogram's buckets in Prometheus's form: the count of each includes all lower ones."""
    return [
        (str(float(bound)) if bound != float("inf") else "+Inf", total)
        for bound, total in zip((*bounds, float("inf")), accumulate(counts), strict=True)
    ]


def _keepers(snapshot: Snapshot | None) -> Sequence[HolderSnapshot]:
    """The holders that keep sequences."""
    return [holder for holder in snapshot.holders if holder.keeps] if snapshot else ()


def _pages(holder: HolderSnapshot, snapshot: Snapshot | None) -> dict[str, int]:
    """A holder's pages by state; their sum is all of its pages."""
    in_use = max(0, holder.total_pages - holder.free_pages)
    cached = min(in_use, max(0, snapshot.cached_pages.get(holder.name, 0))) if snapshot else 0
    return {"used": in_use - cached, "cached": cached, "free": holder.total_pages - in_use}
