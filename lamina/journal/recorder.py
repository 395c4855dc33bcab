"""What an engine tells its journal, and what it asks of it when clients come back.

For the engine's thread. Knows requests, batches and who keeps what; knows no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lamina.completions import FinishReason
from lamina.journal.history import Adoption, History, KnownRequest, KvLocation, RecoveredRequest, adoption
from lamina.journal.records import (
    BatchRecord,
    BatchRow,
    DropRecord,
    EndRecord,
    HeldPart,
    KeptRecord,
    Record,
    RequestRecord,
    SampleRecord,
)
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.messages.request_codec import decode_request, encode_request
from lamina_workers.decoder.logprobs import RowLogprobs

if TYPE_CHECKING:
    from lamina.scheduling.placement import Part, Placement
    from lamina.scheduling.request import Plan, ScheduledSequence
    from lamina_protocols.messages import Surveyed


class Records(Protocol):
    """What is recorded in: `journal.Journal` is one."""

    history: History

    @property
    def engine(self) -> str: ...
    @property
    def starts(self) -> int: ...
    def append(self, record: Record) -> None: ...
    def commit(self) -> None: ...
    def close(self) -> None: ...


class Recorder:
    """Keeps a journal for one engine. `address` is that of a holder's process, "" for this one."""

    def __init__(self, journal: Records, placement: Placement, address: Callable[[int], str]) -> None:
        self._journal = journal
        self._placement = placement
        self._address = address
        self._places: dict[int, tuple[str, int]] = {}  # numbers are never reused
        self._parts: dict[ScheduledSequence, tuple[Part, ...]] = {}  # as the journal has them

    # While the engine runs.

    def begun(self, ticket: EngineRequest, known: Mapping[int, Sequence[int]] | None) -> None:
        """A request is taken; of its samples those in `known` go on from these tokens, the others have ended."""
        _, request, params, seed = encode_request(ticket)
        self._journal.append(RequestRecord(request, params, seed))
        if known is None or ticket.received is None:
            return
        for at, (tokens, _) in enumerate(ticket.received):
            reason = None if at in known else "stop"  # its client knows which
            reports = (None,) * len(tokens)
            self._journal.append(SampleRecord(ticket.request.id, at, tuple(tokens), reports, reason, 0, 0, ()))

    def batch(self, plan: Plan, outputs: Mapping[str, Sequence[EngineOutput]]) -> None:
        """A batch is complete: written before anybody is told of it."""
        told = {(request_id, output.sample): output for request_id, batch in outputs.items() for output in batch}
        rows = []
        for row in plan.rows:
            sequence = row.sequence
            request_id = sequence.request.id
            if row.rebuild or request_id not in self._journal.history.requests:
                continue
            output = told.get((request_id, sequence.sample))
            if output is None and sequence.finish_reason is not None:  # it was ended meanwhile
                self._parts.pop(sequence, None)
                continue
            if output is None or output.finish_reason is None:
                self._keep(sequence, row.handle)
            else:
                self._parts.pop(sequence, None)
            token, reason, logprobs = (None, None, None) if output is None else _told(output)
            end = row.start + row.count
            rows.append(BatchRow(request_id, sequence.sample, row.handle, end, token, reason, logprobs))
        if rows:
            self._journal.append(BatchRecord(tuple(rows)))
        self._journal.commit()

    def _keep(self, sequence: ScheduledSequence, handle: int) -> None:
        parts = self._placement.parts(handle)
        if self._parts.get(sequence) == parts:
            return
        self._parts[sequence] = parts
        held = tuple(
            HeldPart(*self._place(part.share.holder), part.handle, part.share.heads, part.share.lo, part.share.hi)
            for part in parts
        )
        self._journal.append(KeptRecord(sequence.request.id, sequence.sample, held))

    def _place(self, number: int) -> tuple[str, int]:
        place = self._places.get(number)
        if place is None:
            place = self._places[number] = (self._address(number), self._placement.holders[number].rank)
        return place

    def ended(self, sequences: Iterable[ScheduledSequence], reason: FinishReason) -> None:
        """Samples of a request were ended from outside."""
        ends: dict[str, list[tuple[int, str]]] = {}
        for sequence in sequences:
            self._parts.pop(sequence, None)
            ends.setdefault(sequence.request.id, []).append((sequence.sample, reason))
        for request_id, samples in ends.items():
            if request_id in self._journal.history.requests:
                self._journal.append(EndRecord(request_id, tuple(samples)))
        self._journal.commit()

    def failed(self, ticket: EngineRequest) -> None:
        """A request has ended with an error, of which its client is told."""
        for sequence in ticket.sequences:
            self._parts.pop(sequence, None)
        self._journal.append(DropRecord(ticket.request.id))
        self._journal.commit()

    def close(self) -> None:
        self._journal.close()

    # When clients, or engines, come back.

    def missing(self, ticket: EngineRequest) -> list[EngineOutput] | None:
        """What the client of a request has not received; None where the request is not known as the client knows it."""
        known = self._journal.history.find(ticket.request.id)
        if known is None or ticket.received is None or not _same(known, ticket):
            return None
        try:
            missing = known.missing(ticket.received)
        except ValueError:
            return None
        self.claimed(ticket.request.id)
        return [_output(*each, at=ticket.submitted) for each in missing]

    def claimed(self, request_id: str) -> None:
        """Somebody has asked for it, or nobody will: it need not be kept for others any longer."""
        self._journal.history.unclaimed.discard(request_id)

    def drop(self, request_id: str) -> None:
        """Nobody wants to know of it any more."""
        self.claimed(request_id)
        self._journal.append(DropRecord(request_id))

    def unfinished(self) -> list[tuple[EngineRequest, KnownRequest]]:
        """The requests that an engine before had not ended, in the order in which they came."""
        requests = self._journal.history.requests
        self._journal.history.unclaimed.update(requests)
        return [(decode_request(known.request, known.params, known.seed), known) for known in list(requests.values())]

    def adopt(self, known: KnownRequest, found: Mapping[KvLocation, RecoveredRequest]) -> dict[int, Adoption]:
        """What is still there of the KV of its samples that have not ended."""
        prompt = len(known.request["prompt"])
        adoptions = {
            at: adopted
            for at, sample in enumerate(known.samples)
            if sample.reason is None and (adopted := adoption(sample, prompt, found)) is not None
        }
        for at, adopted in adoptions.items():
            self._placement.adopt(adopted.kept.handle, adopted.parts)
            known.samples[at].computed = adopted.kept.computed
        return adoptions


def found(
    surveys: Mapping[int, Surveyed], placement: Placement, address: Callable[[int], str]
) -> dict[KvLocation, RecoveredRequest]:
    """What surveyed holders keep, by where they are."""
    return {
        KvLocation(address(number), placement.holders[number].rank): RecoveredRequest(
            number, placement.first_head(number), {part.handle: part for part in surveyed.parts}
        )
        for number, surveyed in surveys.items()
    }


def _same(known: KnownRequest, ticket: EngineRequest) -> bool:
    request = ticket.request
    mine = (request.prompt, request.max_tokens, request.n, ticket.seed)
    theirs = known.request
    return mine == (tuple(theirs["prompt"]), theirs["max_tokens"], theirs["n"], known.seed)


def _told(output: EngineOutput) -> tuple[int | None, str | None, Any]:
    report = output.logprobs
    plain = None if report is None else (report.chosen, tuple(report.top))
    return output.token, output.finish_reason, plain


def _output(sample: int, token: int | None, reason: Any, logprobs: Any, at: float) -> EngineOutput:
    report = None if logprobs is None else RowLogprobs(logprobs[0], tuple(tuple(each) for each in logprobs[1]))
    return EngineOutput(sample, token, reason, report, at=at)
