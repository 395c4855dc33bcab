"""The records of a journal, in the order of what happened to requests. Plain data that msgpack can write.

On disk a record is a tuple: the name of its kind, then its fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from lamina_protocols.frames.fields import shown


class HeldPart(NamedTuple):
    """A part of a sequence at a holder: the address of the holder's process ("" in the engine's own), the model worker
    that it serves, the part's handle and pool there, its KV heads among those of all ranks, and its positions [lo, hi).
    """

    address: str
    rank: int
    handle: int
    pool: int
    heads: tuple[int, ...]
    lo: int
    hi: int


class RequestRecord(NamedTuple):
    """A request has begun: the fields of the request and of its sampling parameters, and its seed."""

    request: Mapping[str, Any]
    params: Mapping[str, Any]
    seed: int


class SampleRecord(NamedTuple):
    """The state of one sample: see `history.KnownSample`."""

    request_id: str
    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[Any, ...]
    reason: str | None
    handle: int
    computed: int
    parts: tuple[HeldPart, ...]


class BatchRow(NamedTuple):
    """The result of a batch for one sample: its new tokens with their log probabilities, and why it ended with the last
    of them, if it did; `computed` of all its tokens have KV under `handle`."""

    request_id: str
    sample: int
    handle: int
    computed: int
    tokens: tuple[int, ...]
    reason: str | None
    logprobs: tuple[Any, ...]


class BatchRecord(NamedTuple):
    """A batch is complete."""

    rows: tuple[BatchRow, ...]


class KeptRecord(NamedTuple):
    """Where a sample's KV is from now on."""

    request_id: str
    sample: int
    parts: tuple[HeldPart, ...]


class EndRecord(NamedTuple):
    """Samples of a request have ended, each with a reason."""

    request_id: str
    ends: tuple[tuple[int, str], ...]


class TriedRecord(NamedTuple):
    """A request is in a batch of suspects of the `tries`th engine since its last token: an engine that dies now may die
    of it."""

    request_id: str
    tries: int


class DropRecord(NamedTuple):
    """A request is forgotten: no engine goes on with it."""

    request_id: str


Record: TypeAlias = RequestRecord | SampleRecord | BatchRecord | KeptRecord | EndRecord | TriedRecord | DropRecord

_NAMES: dict[type[Record], str] = {
    RequestRecord: "request",
    SampleRecord: "known",
    BatchRecord: "batch",
    KeptRecord: "kept",
    EndRecord: "end",
    TriedRecord: "tried",
    DropRecord: "drop",
}
_KINDS = {name: kind for kind, name in _NAMES.items()}


def to_plain(record: Record) -> tuple[Any, ...]:
    """The tuple that is written."""
    return (_NAMES[type(record)], *record)


def from_plain(plain: tuple[Any, ...]) -> Record:
    """The record of a tuple that was read. Raises ValueError or TypeError for anything else."""
    kind = _KINDS.get(plain[0]) if plain and isinstance(plain[0], str) else None
    if kind is None:
        raise ValueError(f"a record of an unknown kind: {shown(plain)}")
    record = kind(*plain[1:])
    if isinstance(record, BatchRecord):
        return BatchRecord(tuple(BatchRow(*row) for row in record.rows))
    if isinstance(record, SampleRecord | KeptRecord):
        return record._replace(parts=tuple(HeldPart(*part) for part in record.parts))
    return record
