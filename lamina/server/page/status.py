"""The data of the built-in page, as plain data for JSON (`status`): an engine's snapshot, with short labels for
sequences, and the recent latencies of first and further tokens (`RecentLatencies`).

Request ids may identify a client, so none of them is in the data.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.completions import Completion
from lamina.errors import LaminaError
from lamina.messages.engine_request import EngineRequest
from lamina.messages.snapshot import EXCHANGE_BUCKETS, HolderSnapshot, SequenceSnapshot, Snapshot
from lamina.server.frontend import Observer

SECONDS = 30.0
"""The age up to which a latency counts as recent."""

_MOST = 2048  # values kept of each kind

MAX_SEQUENCES = 256
"""The most sequences listed one by one; the pages of all others are summed."""

_NUMBERS = (
    *("began", "uptime", "running", "waiting", "lanes", "page_size", "batches", "failed_batches"),
    *("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions", "evictions"),
    *("corrupted", "blocked", "lost_holders", "joined_holders", "returned_workers", "rebuilt_tokens"),
    *("model_seconds", "attention_seconds", "idle_seconds"),
    *("kv_read", "kv_whole", "missed_mass", "missed_queries"),
    *("drafts", "draft_tokens", "accepted_tokens"),
)
_OF_NOBODY = ("began", "uptime", "running", "waiting", "lanes", "page_size")  # numbers that count no work


def status(server: Server, snapshot: Snapshot | None, labels: Labels) -> dict[str, Any]:
    """The whole data, as JSON can hold it. `engine` is None where there is no snapshot."""
    return {**dataclasses.asdict(server), "engine": None if snapshot is None else _engine(snapshot, labels)}


def _engine(snapshot: Snapshot, labels: Labels) -> dict[str, Any]:
    """Counters and sizes under the snapshot's names. `pages` of a holder has one number per listed sequence, in their
    order, and `other_pages` is the sum over the others."""
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


@dataclass(frozen=True, slots=True)
class Server:
    """The state of the HTTP side. `message` says why the engine is not ready; `max_model_len` is in tokens, None where
    no model is loaded; latencies are of the last `seconds`."""

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


def of_one(snapshot: Snapshot, sequences: Sequence[SequenceSnapshot], held: int) -> Snapshot:
    """A snapshot as it would be with these sequences alone, of `held` samples under way: what counts the work of others
    is 0."""
    holders = [
        dataclasses.replace(
            holder,
            free_pages=max(0, holder.total_pages - sum(sequence.pages.get(holder.name, 0) for sequence in sequences)),
            bytes_sent=0,
            bytes_received=0,
            exchange_seconds=0.0,
            exchange_counts=(0,) * len(holder.exchange_counts),
            pools=(),
        )
        for holder in snapshot.holders
    ]
    zeros: dict[str, Any] = {name: 0 for name in _NUMBERS if name not in _OF_NOBODY}
    running = len(sequences)
    return dataclasses.replace(
        snapshot,
        **zeros,
        running=running,
        waiting=max(0, held - running),
        accepted_at=(),
        cached_pages={},
        sequences=tuple(sequences),
        holders=tuple(holders),
    )


class Labels:
    """Numbers for sequences, in the order of their first appearance. A sequence keeps its number while it has KV."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, int], int] = {}
        self._last = 0

    def of(self, sequences: Sequence[SequenceSnapshot]) -> list[int]:
        """The label of each sequence; the labels of all others are dropped."""
        numbers: dict[tuple[str, int], int] = {}
        for sequence in sequences:
            key = (sequence.request, sequence.sample)
            number = numbers.get(key) or self._numbers.get(key)
            if number is None:
                self._last += 1
                number = self._last
            numbers[key] = number
        self._numbers = numbers
        return [numbers[sequence.request, sequence.sample] for sequence in sequences]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of `count` values in seconds, half are at most `p50`, and 99 of 100 at most `p99`."""

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


class RecentLatencies:
    """An observer that keeps the newest latencies, and passes every call on to the observer `behind` it. `clock` is
    monotonic, in seconds."""

    def __init__(self, behind: Observer, clock: Callable[[], float]) -> None:
        self._behind = behind
        self._clock = clock
        self._first: deque[tuple[float, float]] = deque(maxlen=_MOST)
        self._next: deque[tuple[float, float]] = deque(maxlen=_MOST)

    def first_token(self, seconds: float) -> None:
        self._first.append((self._clock(), seconds))
        self._behind.first_token(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        self._next.append((self._clock(), seconds / count))
        self._behind.next_tokens(seconds, count)

    def ended(self, request: EngineRequest, completion: Completion, seconds: float) -> None:
        self._behind.ended(request, completion, seconds)

    def failed(self, request: EngineRequest, error: LaminaError) -> None:
        self._behind.failed(request, error)

    def lately(self) -> tuple[list[float], list[float]]:
        """The seconds until first tokens, and the seconds per further token; the oldest first."""
        since = self._clock() - SECONDS
        return _newer(self._first, since), _newer(self._next, since)


def _newer(values: deque[tuple[float, float]], since: float) -> list[float]:
    while values and values[0][0] < since:
        values.popleft()
    return [seconds for _, seconds in values]
