"""Snapshots of engines that are not there."""

from __future__ import annotations

import dataclasses
from typing import Any

from lamina.messages.snapshot import EXCHANGE_BUCKETS, HolderSnapshot, SequenceSnapshot, Snapshot


def holder(name: str, **changes: Any) -> HolderSnapshot:
    """An attention worker with 100 pages, of which 40 are free."""
    fields: dict[str, Any] = {"address": "host:1", "channel": "tcp", "local": False}
    fields |= {"total_pages": 100, "free_pages": 40, "bytes_sent": 1000, "bytes_received": 2000}
    fields |= {"exchange_seconds": 3.5, "exchange_counts": (0, 5, *(0,) * (len(EXCHANGE_BUCKETS) - 2), 2)}
    return HolderSnapshot(name, **fields | changes)


def sequence(request: str, pages: dict[str, int], sample: int = 0) -> SequenceSnapshot:
    """One in decode, of which each page has 16 tokens."""
    return SequenceSnapshot(request, sample, 16 * sum(pages.values()), prefill=False, pages=pages)


def snapshot(number: float = 0, **changes: Any) -> Snapshot:
    """All numbers without a default are `number`; there are no holders and no sequences."""
    numbers = {
        field.name: number
        for field in dataclasses.fields(Snapshot)
        if field.default is dataclasses.MISSING and field.type in ("int", "float")
    }
    return Snapshot(**numbers | {"cached_pages": {}, "holders": (), "sequences": ()} | changes)
