"""Writes what an engine does into its journal, and reads the journal when clients or engines come back.

For the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lamina.completions import FinishReason
from lamina.journal.history import (
    Adoption,
    BatchRecord,
    BatchRow,
    DropRecord,
    EndRecord,
    HeldPart,
    KeptRecord,
    KnownRequest,
    KvLocation,
    RecoveredHolder,
    RequestRecord,
    SampleRecord,
    TriedRecord,
    adoption,
)
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina_workers.decoder.logprobs import RowLogprobs

if TYPE_CHECKING:
    from lamina.journal.journal import Journal
    from lamina.kv.kv_shares import Part
    from lamina.kv.placement import Placement
    from lamina.kv.request import Plan, ScheduledSequence
    from lamina_protocols.messages.messages import Surveyed


class Recorder:
    """Keeps the journal of one engine. `address` maps a holder's number to that of its process, "" for this one."""

    def __init__(self, journal: Journal, placement: Placement, address: Callable[[int], str]) -> None:
        self._journal = journal
        self._placement = placement
        self._address = address
        self._places: dict[int, tuple[str, int]] = {}  # numbers are never reused
        self._parts: dict[ScheduledSequence, tuple[Part, ...]] = {}  # by the journal's last record
        self._deaths: dict[str, int] = {}  # of engines, by request that goes on without a token since

    # While the engine runs.

    def begun(self, request: EngineRequest, known: Mapping[int, Sequence[int]] | None) -> None:
        """A request has begun. Its samples in `known` go on from these tokens, the others have ended."""
        self._deaths.pop(request.id, None)  # of an earlier one with that id
        self._journal.append(RequestRecord.of(request))
        if known is None or request.received is None:
            return
        for index, (tokens, _) in enumerate(request.received):
            reason = None if index in known else "stop"  # the client knows the true one
            reports = (None,) * len(tokens)
            self._journal.append(SampleRecord(request.id, index, tuple(tokens), reports, reason, 0, 0, ()))

    def begins(self, suspects: Iterable[str]) -> None:
        """A batch is about to begin, with these requests where it has suspects alone. All that was noted is written
        before: the engine may die of a request that has just come. It dies once, in however many batches it was."""
        requests = self._journal.history.requests
        for request_id in suspects:
            deaths = self._deaths.get(request_id, 0)
            if request_id in requests and requests[request_id].tries < deaths:
                self._journal.append(TriedRecord(request_id, deaths))
        self._journal.commit()

    def batch(self, plan: Plan, outputs: Mapping[str, Sequence[EngineOutput]]) -> None:
        """A batch is complete. It is written before clients get its outputs."""
        sampled: dict[tuple[str, int], list[EngineOutput]] = {}
        for request_id, batch in outputs.items():
            for output in batch:
                sampled.setdefault((request_id, output.sample), []).append(output)
        rows = []
        for row in plan.rows:
            sequence = row.sequence
            request_id = sequence.request.id
            if row.rebuild or request_id not in self._journal.history.requests:
                continue
            row_outputs = sampled.get((request_id, sequence.sample), [])
            reason = row_outputs[-1].finish_reason if row_outputs else None
            if not row_outputs and sequence.finish_reason is not None:  # it ended meanwhile
                self._parts.pop(sequence, None)
                continue
            if not row_outputs or reason is sequence.finish_reason is None:
                self._keep(sequence, row.handle)
            else:
                self._parts.pop(sequence, None)
            end = row.start + row.known + max(0, len(row_outputs) - 1)  # the last token has no KV
            token_reports = [(output.token, _report(output)) for output in row_outputs if output.token is not None]
            tokens, reports = zip(*token_reports, strict=True) if token_reports else ((), ())
            if tokens:
                self._deaths.pop(request_id, None)
            rows.append(BatchRow(request_id, sequence.sample, row.handle, end, tokens, reason, reports))
        if rows:
            self._journal.append(BatchRecord(tuple(rows)))
        self._journal.commit()

    def _keep(self, sequence: ScheduledSequence, handle: int) -> None:
        parts = self._placement.parts(handle)
        if self._parts.get(sequence) == parts:
            return
        self._parts[sequence] = parts
        parts_held = tuple(
            HeldPart(*self._place(share.holder), part.handle, share.pool, share.heads, share.lo, share.hi)
            for part in parts
            for share in (part.share,)
        )
        self._journal.append(KeptRecord(sequence.request.id, sequence.sample, parts_held))

    def _place(self, number: int) -> tuple[str, int]:
        place = self._places.get(number)
        if place is None:
            place = self._places[number] = (self._address(number), self._placement.holders[number].rank)
        return place

    def ended(self, sequences: Iterable[ScheduledSequence], reason: FinishReason) -> None:
        ends: dict[str, list[tuple[int, str]]] = {}
        for sequence in sequences:
            self._parts.pop(sequence, None)
            ends.setdefault(sequence.request.id, []).append((sequence.sample, reason))
        for request_id, samples in ends.items():
            if request_id in self._journal.history.requests:
                self._journal.append(EndRecord(request_id, tuple(samples)))
        self._journal.commit()

    def failed(self, request: EngineRequest) -> None:
        for sequence in request.sequences:
            self._parts.pop(sequence, None)
        self._journal.append(DropRecord(request.id))
        self._journal.commit()

    def close(self) -> None:
        self._journal.close()

    # When clients, or engines, come back.

    def missing(self, request: EngineRequest) -> list[EngineOutput] | None:
        """The outputs that a client has not received; None where its request and tokens are not those of the
        journal."""
        entry = self._journal.history.find(request.id)
        if entry is None or request.received is None or not _same(entry, request):
            return None
        try:
            missing = entry.missing(request.received)
        except ValueError:
            return None
        self.claimed(request.id)
        return [_output(*fields, at=request.submitted) for fields in missing]

    def claimed(self, request_id: str) -> None:
        """A client has come for a request, or none will: it need not be kept any longer."""
        self._journal.history.unclaimed.discard(request_id)

    def drop(self, request_id: str) -> None:
        self.claimed(request_id)
        self._journal.append(DropRecord(request_id))

    def unfinished(self) -> list[tuple[EngineRequest, KnownRequest]]:
        """The unfinished requests of the previous engine, in the order in which they came."""
        requests = self._journal.history.requests
        self._journal.history.unclaimed.update(requests)
        self._deaths = {request_id: entry.deaths for request_id, entry in requests.items()}
        return [
            (RequestRecord(entry.request, entry.params, entry.seed).restored(), entry)
            for entry in list(requests.values())
        ]

    def adopt(self, known: KnownRequest, found: Mapping[KvLocation, RecoveredHolder]) -> dict[int, Adoption]:
        """Take up what holders still have of the KV of its unfinished samples. Returns that, by sample."""
        prompt, policy = len(known.request["prompt"]), known.request.get("policy", "")
        adoptions = {
            index: adopted
            for index, sample in enumerate(known.samples)
            if sample.reason is None and (adopted := adoption(sample, prompt, found, policy)) is not None
        }
        for index, adopted in adoptions.items():
            self._placement.adopt(adopted.kept.handle, adopted.parts)
            known.samples[index].computed = adopted.kept.computed
        return adoptions


def found(
    surveys: Mapping[int, Surveyed], placement: Placement, address: Callable[[int], str]
) -> dict[KvLocation, RecoveredHolder]:
    """What surveyed holders keep, by their location."""
    return {
        KvLocation(address(number), placement.holders[number].rank): RecoveredHolder(
            number, placement.first_heads(number), {part.handle: part for part in surveyed.parts}, placement.states
        )
        for number, surveyed in surveys.items()
    }


def _same(known: KnownRequest, request: EngineRequest) -> bool:
    core, fields = request.request, known.request
    recorded = (tuple(fields["prompt"]), fields["max_tokens"], fields["n"], fields.get("policy", ""), known.seed)
    return recorded == (core.prompt, core.max_tokens, core.n, core.policy, request.seed)


def _report(output: EngineOutput) -> Any:
    report = output.logprobs
    return None if report is None else (report.chosen, tuple(report.top))


def _output(sample: int, token: int | None, reason: Any, logprobs: Any, at: float) -> EngineOutput:
    report = None if logprobs is None else RowLogprobs(logprobs[0], tuple(tuple(pair) for pair in logprobs[1]))
    return EngineOutput(sample, token, reason, report, at=at)
