"""The records of a journal, and the state that they give: an engine's unfinished requests, their tokens, and where
their KV is.

Records are in the order of what happened to requests. They are plain data that msgpack can write: on disk a record is a
tuple, the name of its kind and then its fields.

`History` is the state. It is pure: the same records give the same state. A running engine applies each record that it
writes, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from lamina.kv.kv_shares import GONE, Part, Share
from lamina.kv.request import RetainedKv
from lamina.messages.engine_request import EngineRequest
from lamina.messages.request_codec import decode_request, encode_params, encode_request
from lamina.sampling_params import MAX_SAMPLES, SamplingParams
from lamina_protocols.frames.fields import shown
from lamina_protocols.messages.messages import PartHeld


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

    @classmethod
    def of(cls, request: EngineRequest) -> RequestRecord:
        return cls(encode_request(request.request), encode_params(request.params), request.seed)

    def restored(self) -> EngineRequest:
        """The request, without a sink. Raises TypeError, KeyError or InvalidRequest where it is none."""
        return EngineRequest(decode_request(self.request), SamplingParams(**self.params), self.seed)


class SampleRecord(NamedTuple):
    """The state of one sample: see `KnownSample`."""

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


FINISHED = 16 << 20  # bytes of ended requests that are kept, for clients that may have missed the last outputs
_REQUEST = 4096  # bytes about, of a request without its tokens
_TOKEN = 48  # of a token
_LOGPROB = 144  # of a token's log probability, and of each of the likeliest ones reported with it


class KvLocation(NamedTuple):
    """Where a holder is: the address of its process ("" in the engine's own), and the model worker that it serves."""

    address: str
    rank: int


@dataclass(slots=True)
class KnownSample:
    """One sample: its tokens after the prompt with their log probabilities, and how many of all its tokens have KV
    under `handle` (0: none), in which parts."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    reason: str | None = None
    handle: int = 0
    computed: int = 0
    parts: tuple[HeldPart, ...] = ()


@dataclass(slots=True)
class KnownRequest:
    """A request as it was submitted, and its samples. `tries`: how many engines have had it in a batch of
    suspects since its last token."""

    request: Mapping[str, Any]
    params: Mapping[str, Any]
    seed: int
    samples: list[KnownSample]
    tries: int = 0

    @property
    def deaths(self) -> int:
        """How many engines may have died of it since its last token: the last one died with it under way."""
        return self.tries + 1

    @property
    def open(self) -> bool:
        return any(sample.reason is None for sample in self.samples)

    @property
    def size(self) -> int:
        """How much memory it takes, in bytes about."""
        tokens = len(self.request["prompt"]) + sum(len(sample.tokens) for sample in self.samples)
        reports = [report for sample in self.samples for report in sample.logprobs if report is not None]
        return _REQUEST + _TOKEN * tokens + _LOGPROB * sum(1 + len(report[-1]) for report in reports)

    @property
    def known(self) -> dict[int, list[int]]:
        return {index: list(sample.tokens) for index, sample in enumerate(self.samples) if sample.reason is None}

    def missing(self, received: Sequence[tuple[Sequence[int], bool]]) -> list[tuple[int, int | None, str | None, Any]]:
        """What a client lacks that has `received` these tokens of each sample, and whether its end: tuples of sample,
        token, reason, logprobs. Raises ValueError for tokens, or an end, that the sample does not have."""
        missing: list[tuple[int, int | None, str | None, Any]] = []
        for index, (sample, (tokens, ended)) in enumerate(zip(self.samples, received, strict=True)):
            had = len(tokens)
            if list(tokens) != sample.tokens[:had]:
                raise ValueError(f"sample {index} has {len(sample.tokens)} tokens here, others than the {had} received")
            if ended:
                if sample.reason is None:  # the end of the journal is lost
                    raise ValueError(f"sample {index} goes on here, and has ended for the client")
                continue
            last = len(sample.tokens) - 1
            for position in range(had, len(sample.tokens)):
                reason = sample.reason if position == last else None
                missing.append((index, sample.tokens[position], reason, sample.logprobs[position]))
            if sample.reason is not None and had > last:
                missing.append((index, None, sample.reason, None))
        return missing


class History:
    """Every unfinished request of the records, and the last finished ones, FINISHED bytes at most.

    Requests in `unclaimed` stay, however many others finish after them.
    """

    def __init__(self) -> None:
        self.requests: dict[str, KnownRequest] = {}
        self.finished: OrderedDict[str, KnownRequest] = OrderedDict()
        self.unclaimed: set[str] = set()
        self._sizes: dict[str, int] = {}  # of finished requests, in bytes
        self._finished_size = 0  # their sum

    def apply(self, record: Record) -> None:
        """Raises ValueError, KeyError, IndexError or TypeError for a record that does not follow those before it."""
        match record:
            case BatchRecord(rows):
                for row in rows:
                    self._row(row)
            case KeptRecord(request_id, sample, parts):
                self.requests[request_id].samples[sample].parts = parts
            case RequestRecord(request, params, seed):
                if request["id"] in self.requests:
                    raise ValueError(f"request {request['id']!r} begins twice")
                if not 1 <= request["n"] <= MAX_SAMPLES:
                    raise ValueError(
                        f"request {request['id']!r} has {request['n']} samples, allowed: 1 to {MAX_SAMPLES}"
                    )
                self._forget(request["id"])
                samples = [KnownSample() for _ in range(request["n"])]
                self.requests[request["id"]] = KnownRequest(request, params, seed, samples)
            case SampleRecord(request_id, index, tokens, logprobs, reason, handle, computed, parts):
                if len(tokens) != len(logprobs):
                    raise ValueError(f"{len(tokens)} tokens with {len(logprobs)} reports")
                self.requests[request_id].samples[index] = KnownSample(
                    list(tokens), list(logprobs), reason, handle, computed, parts
                )
                self._ended(request_id)
            case EndRecord(request_id, ends):
                for index, reason in ends:
                    self.requests[request_id].samples[index].reason = reason
                self._ended(request_id)
            case TriedRecord(request_id, tries):
                self.requests[request_id].tries = tries
            case DropRecord(request_id):
                self.requests.pop(request_id, None)
                self._forget(request_id)

    def _row(self, row: BatchRow) -> None:
        sample = self.requests[row.request_id].samples[row.sample]
        sample.handle, sample.computed = row.handle, row.computed
        if len(row.tokens) != len(row.logprobs):
            raise ValueError(f"{len(row.tokens)} tokens with {len(row.logprobs)} reports")
        if row.tokens:
            self.requests[row.request_id].tries = 0
            sample.tokens += row.tokens
            sample.logprobs += row.logprobs
        if row.reason is not None:
            sample.reason = row.reason
            self._ended(row.request_id)

    def _ended(self, request_id: str) -> None:
        """A request has ended when all samples have. One that was aborted is not kept: its client does not come
        back."""
        request = self.requests[request_id]
        if request.open:
            return
        del self.requests[request_id]
        if any(sample.reason == "abort" for sample in request.samples):
            return
        for sample in request.samples:
            sample.handle, sample.parts = 0, ()
        self.finished[request_id] = request
        self._sizes[request_id] = request.size
        self._finished_size += request.size
        spare = (other_id for other_id in list(self.finished) if other_id not in self.unclaimed)
        while self._finished_size > FINISHED and (oldest := next(spare, None)) is not None:
            self._forget(oldest)

    def _forget(self, request_id: str) -> None:
        """Drop a finished request; harmless for any other."""
        self.finished.pop(request_id, None)
        self._finished_size -= self._sizes.pop(request_id, 0)

    def find(self, request_id: str) -> KnownRequest | None:
        """A request that is unfinished, or has finished lately."""
        return self.requests.get(request_id) or self.finished.get(request_id)

    def records(self) -> Iterator[Record]:
        """The fewest records that give this state."""
        for request_id, request in [*self.finished.items(), *self.requests.items()]:
            yield RequestRecord(request.request, request.params, request.seed)
            for index, s in enumerate(request.samples):
                if s != KnownSample():
                    yield SampleRecord(
                        request_id, index, tuple(s.tokens), tuple(s.logprobs), s.reason, s.handle, s.computed, s.parts
                    )
            if request.tries:
                yield TriedRecord(request_id, request.tries)


@dataclass(frozen=True, slots=True)
class RecoveredHolder:
    """What one holder keeps of the previous engine: its number in the new one, the first head of its rank among all
    heads, by pool, its parts by handle, and the pools of states."""

    number: int
    first_heads: tuple[int, ...]
    parts: Mapping[int, PartHeld]
    states: Container[int] = ()


class Adoption(NamedTuple):
    """What can be taken up of one sequence: for the scheduler, and its parts for placement."""

    kept: RetainedKv
    parts: tuple[Part, ...]


def adoption(
    sample: KnownSample, prompt: int, found: Mapping[KvLocation, RecoveredHolder], policy: str = ""
) -> Adoption | None:
    """What is still there of the KV of a sample with `prompt` tokens in its prompt, and of that policy. Missing shares
    have the holder GONE, and are taken over like those of a lost holder. None where the sample must be computed from
    its start."""
    computed = min(sample.computed, prompt + len(sample.tokens) - 1)
    shares: list[tuple[Share, int, PartHeld | None]] = []
    states: list[tuple[int, int]] = []  # after how many tokens each part of states has them
    for address, rank, handle, pool, heads, lo, hi in sample.parts:
        holder = found.get(KvLocation(address, rank))
        part = holder.parts.get(handle) if holder is not None else None
        if holder is not None and part is not None and part.pool == pool < len(holder.first_heads):
            local = tuple(head - holder.first_heads[pool] for head in heads)
            if (part.heads, part.lo) == (local, lo) and part.hi <= hi:
                shares.append((Share(holder.number, heads, lo, part.hi, pool, policy), handle, part))
                if pool in holder.states:
                    states.append((part.held, part.floor))
                if part.hi < hi:  # the engine died before it wrote where the rest grows
                    shares.append((Share(GONE, heads, part.hi, hi, pool, policy), 0, None))
                continue
        shares.append((Share(GONE, heads, lo, hi, pool, policy), 0, None))
    parts = [(share, part) for share, _, part in shares if part is not None]
    computed = min([computed, *(part.held for share, part in parts if part.held < share.hi)])
    floor = max((part.floor for _, part in parts), default=0)
    if not parts or computed < max(1, floor) or any(computed not in lengths for lengths in states):
        return None
    layout: list[Share] = []
    usable_parts: list[Part] = []
    for share, handle, part in shares:
        layout.append(share)
        if part is not None:
            usable_parts.append(Part(handle, share))
    if not any(part.share.lo < computed for part in usable_parts):
        return None
    return Adoption(RetainedKv(sample.handle, tuple(layout), computed, floor), tuple(usable_parts))
