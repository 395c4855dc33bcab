"""What the built-in page shows, as plain data for JSON: an engine's snapshot, with sequences under short labels.

Knows the snapshot and what a page needs of it; knows no HTTP, no clock and no engine. Requests have ids that may say
who asks: none of them is in the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.messages.snapshot import EXCHANGE_BUCKETS, HolderSnapshot, SequenceSnapshot, Snapshot

MAX_SEQUENCES = 256
"""Sequences that are shown one by one; the pages of further ones are summed."""

_NUMBERS = (
    *("began", "uptime", "running", "waiting", "lanes", "page_size", "batches", "failed_batches", "corrupted"),
    *("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions", "evictions"),
    *("lost_holders", "joined_holders", "returned_workers", "rebuilt_tokens"),
    *("model_seconds", "attention_seconds", "idle_seconds"),
    *("kv_read", "kv_whole", "missed_mass", "missed_queries"),
)


class Labels:
    """Numbers that stand for sequences, counted in the order in which they are first seen, each kept while its
    sequence has KV."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, int], int] = {}
        self._last = 0

    def of(self, sequences: Sequence[SequenceSnapshot]) -> list[int]:
        """The label of each; those of all others are forgotten."""
        kept: dict[tuple[str, int], int] = {}
        for sequence in sequences:
            key = (sequence.request, sequence.sample)
            number = kept.get(key) or self._numbers.get(key)
            if number is None:
                self._last += 1
                number = self._last
            kept[key] = number
        self._numbers = kept
        return [kept[sequence.request, sequence.sample] for sequence in sequences]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of `count` values in seconds: half of them are at most `p50`, 99 of 100 at most `p99`."""

    count: int
    p50: float
    p99: float


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """By nearest rank; None where there are no values."""
    if not values:
        return None
    ranked = sorted(values)
    p50, p99 = (ranked[math.ceil(len(ranked) * share) - 1] for share in (0.5, 0.99))
    return Percentiles(len(ranked), p50, p99)


@dataclass(frozen=True, slots=True)
class Server:
    """What the HTTP side knows. `message` says in words what an engine that is not ready does, or why it is dead;
    `max_model_len` is in tokens, None where no model is loaded; latencies are those of the last `seconds`."""

    model: str
    version: str
    state: str
    message: str
    restarts: int
    active: int
    max_requests: int
    max_model_len: int | None
    seconds: float
    first_token: Percentiles | None
    next_token: Percentiles | None


def status(server: Server, snapshot: Snapshot | None, labels: Labels) -> dict[str, Any]:
    """Everything, as JSON can carry it. `engine` is null where nothing is known of it."""
    return {**dataclasses.asdict(server), "engine": None if snapshot is None else _engine(snapshot, labels)}


def _engine(snapshot: Snapshot, labels: Labels) -> dict[str, Any]:
    """Counters and sizes under the snapshot's names. `pages` of a holder has one number a sequence, in their order,
    and `other_pages` is the sum of those that are not listed."""
    labelled = sorted(zip(labels.of(snapshot.sequences), snapshot.sequences, strict=True), key=lambda pair: pair[0])
    listed, others = labelled[:MAX_SEQUENCES], labelled[MAX_SEQUENCES:]
    return {
        **{name: _number(getattr(snapshot, name)) for name in _NUMBERS},
        "missing": snapshot.missing,
        "exchange_buckets": EXCHANGE_BUCKETS,
        "sequences": [
            {"label": label, "tokens": sequence.tokens, "prefill": sequence.prefill} for label, sequence in listed
        ],
        "holders": [
            _holder(
                holder,
                [sequence.pages.get(holder.name, 0) for _, sequence in listed],
                sum(sequence.pages.get(holder.name, 0) for _, sequence in others),
                snapshot.cached_pages,
            )
            for holder in snapshot.holders
        ],
    }


def _holder(holder: HolderSnapshot, pages: list[int], others: int, cached: Mapping[str, int]) -> dict[str, Any]:
    return {
        "name": holder.name,
        "address": holder.address,
        "channel": holder.channel,
        "local": holder.local,
        "total_pages": holder.total_pages,
        "free_pages": holder.free_pages,
        "cached_pages": cached.get(holder.name, 0),
        "pages": pages,
        "other_pages": others,
        "bytes_sent": holder.bytes_sent,
        "bytes_received": holder.bytes_received,
        "exchange_seconds": _number(holder.exchange_seconds),
        "exchange_counts": holder.exchange_counts,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
