"""The unfinished requests of an engine, the state that sampling needs of each sample, and the way to the clients.

For the engine's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from operator import add
from typing import TYPE_CHECKING, NamedTuple, Protocol

from lamina.completions import FinishReason
from lamina.engine.masks import MaskAdvance, Masks
from lamina.errors import EngineError, InvalidRequest, LaminaError
from lamina.journal.resumption import Resumption
from lamina.kv.request import Outcome, Plan, PlannedRow, RetainedKv, ScheduledSequence
from lamina.messages.engine_request import EngineOutput, EngineRequest, ignore_outputs, unwatched
from lamina.scheduling.blame import TRIES
from lamina_workers.decoder.logprobs import PromptScores, RowLogprobs
from lamina_workers.decoder.sampler import Sampled, TokenHistory

if TYPE_CHECKING:
    from lamina.journal.history import KvLocation, RecoveredHolder
    from lamina.journal.recorder import Recorder
    from lamina.scheduling.control_plane import Step
    from lamina.scheduling.scheduler import Scheduler
    from lamina.text.structured_output import Constraint, Grammars

logger = logging.getLogger("lamina")


class Outputs(NamedTuple):
    """The outputs of a batch by request id, those of `scored` prompts apart, and the requests whose text does not
    follow its constraint. `sampled` counts its tokens, `prompt_tokens` those of prompts that it computed, `corrupted`
    the rows without finite logits."""

    by_request: dict[str, list[EngineOutput]]
    scored: dict[str, list[EngineOutput]]
    strayed: list[tuple[EngineRequest, InvalidRequest]]
    sampled: int
    prompt_tokens: int
    corrupted: int


class SampleListener(Protocol):
    """A part of the engine that learns from samples."""

    def recorded(self, plan: Plan, outcomes: Sequence[Outcome], requests: Mapping[str, EngineRequest]) -> None:
        """A batch is recorded, with these outcomes; no sample has been forgotten for it yet."""

    def ended(self, sequence: ScheduledSequence) -> None:
        """A sample has ended."""


class RequestRegistry:
    """`requests` by id, and for the samples that need them `histories` of tokens and `constraints`. With a `recorder`
    every output is in the journal before a client gets it."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Callable[[], float],
        masks: Masks,
        grammars: Grammars | None = None,
        recorder: Recorder | None = None,
        listener: SampleListener | None = None,
    ) -> None:
        self.requests: dict[str, EngineRequest] = {}
        self.histories: dict[ScheduledSequence, TokenHistory] = {}
        self.constraints: dict[ScheduledSequence, Constraint] = {}
        self._scheduler = scheduler
        self._clock = clock
        self._masks = masks
        self._recorder = recorder
        self._listener = listener
        self._resumption = Resumption(recorder, scheduler, grammars)

    def of(self, sample: ScheduledSequence) -> EngineRequest | None:
        """The request of a sample, unless it has ended."""
        return self.requests.get(sample.request.id)

    def disclaim(self) -> None:
        """End the previous engine's requests for which no client has come back."""
        for request in self._resumption.disclaim():
            self.end(request, None, "abort")

    def stopped(self, error: Callable[[], EngineError]) -> None:
        """The engine has stopped: every client gets an error. The scheduler is not used: it may have failed."""
        for request in self.requests.values():
            if self._recorder is not None and request not in self._resumption:
                self._recorder.failed(request)
            self._deliver(request, [EngineOutput(0, None, error=error())])
        if self._recorder is not None:
            self._recorder.close()

    def refuse(self, request: EngineRequest, error: EngineError) -> None:
        """A request came after the engine had stopped."""
        self._deliver(request, [EngineOutput(0, None, error=error)])

    def scheduled(self, requests: Mapping[ScheduledSequence, EngineRequest]) -> None:
        for sequence, request in requests.items():
            if request.scheduled is None:
                request.scheduled, request.cached_tokens = self._clock(), sequence.reused

    def begins(self, rows: Sequence[PlannedRow]) -> None:
        """A batch of these rows is about to begin. The journal has it before where they are suspects: the engine may
        die of it."""
        if self._recorder is not None:
            tried = rows if self._scheduler.blame.on_trial(rows) else ()
            self._recorder.begins(dict.fromkeys(row.sequence.request.id for row in tried))

    def record(self, step: Step, sampled: Sampled, now: float) -> Outputs:
        """A batch is computed: record its tokens, and make the outputs that `publish` sends. Samples that are complete
        end, and requests whose logits are not finite fail."""
        if (plan := step.plan) is None:
            raise EngineError("a step without rows has no outputs")
        corrupted = 0
        reports: dict[ScheduledSequence, list[RowLogprobs | None]] = {}
        drawn = iter(zip(sampled.tokens, sampled.logprobs, strict=True))
        for row in (row for row in plan.rows if row.sample):
            of_row = list(islice(drawn, row.samples))
            reports[row.sequence] = [report for _, report in of_row]
            if of_row[0][0] is None and not row.drafts:
                corrupted += 1
                self._corrupted(row.sequence)
        for row, scores in zip(plan.scored, sampled.prompts, strict=True):
            if not scores.finite:
                corrupted += 1
                self._corrupted(row.sequence)
        # Both look at sequences as they were before the batch is recorded.
        scored = self._scored(plan, sampled.prompts) if sampled.prompts else {}
        prompt_tokens = self._follow_prefill(plan)
        outcomes = step.recorded(sampled.tokens)
        if self._listener is not None:
            self._listener.recorded(plan, outcomes, self.requests)
        by_request, strayed = self._outputs(outcomes, reports, now)
        tokens = sum(outcome.token is not None for outcome in outcomes)
        return Outputs(by_request, scored, strayed, tokens, prompt_tokens, corrupted)

    def _corrupted(self, sequence: ScheduledSequence) -> None:
        """The logits of a sequence are not finite: its request ends, and its KV does not enter the prefix cache."""
        self._scheduler.end(sequence, "abort", keep=False)
        self.forget(sequence)
        if request := self.of(sequence):
            self.fail(request, EngineError("the model's logits are not finite for this request"))

    def _outputs(
        self, outcomes: Sequence[Outcome], reports: Mapping[ScheduledSequence, Sequence[RowLogprobs | None]], now: float
    ) -> tuple[dict[str, list[EngineOutput]], list[tuple[EngineRequest, InvalidRequest]]]:
        """The outputs of a recorded batch, and the requests that do not follow their constraint; `reports` are the log
        probabilities of each sequence's tokens. Ends the samples that are complete by their constraint."""
        by_request: dict[str, list[EngineOutput]] = {}
        strayed: list[tuple[EngineRequest, InvalidRequest]] = []
        of_sequence: dict[ScheduledSequence, list[Outcome]] = {}
        for outcome in outcomes:
            of_sequence.setdefault(outcome.sequence, []).append(outcome)
        advances = [
            MaskAdvance(sequence, constraint, [outcome.token for outcome in new if outcome.token is not None])
            for sequence, new in of_sequence.items()
            if new[-1].finish_reason != "stop" and (constraint := self.constraints.get(sequence)) is not None
        ]
        finished = self._masks.begin(advances, self._advanced) if advances else ()
        advanced = {advance.sequence: advance for advance in finished}
        for sequence, new in of_sequence.items():
            if (history := self.histories.get(sequence)) is not None:
                for outcome in new:
                    if outcome.token is not None:
                        history.append(outcome.token)
            reason = new[-1].finish_reason
            if (advance := advanced.get(sequence)) is not None:
                if advance.error is not None:
                    strayed.append((self.requests[sequence.request.id], advance.error))
                elif advance.constraint.finished:
                    self._scheduler.end(sequence, "stop")
                    reason = "stop"
            elif sequence.held and reason == "length":
                reason = None  # it may be "stop": `_advanced` ends the sample
            reasons = [*(None for _ in new[1:]), reason]
            by_request.setdefault(sequence.request.id, []).extend(
                EngineOutput(sequence.sample, outcome.token, end, report, at=now)
                for outcome, end, report in zip(new, reasons, reports[sequence], strict=False)
            )
            if reason is not None:
                self.forget(sequence)
        return by_request, strayed

    def _scored(self, plan: Plan, prompts: Sequence[PromptScores]) -> dict[str, list[EngineOutput]]:
        """The outputs with the scores of prompts of a batch that is not recorded yet, by request id. Sums of hidden
        states are put together, and leave with the last of them."""
        outputs: dict[str, list[EngineOutput]] = {}
        for row, scores in zip(plan.scored, prompts, strict=True):
            request = self.requests.get(row.sequence.request.id)
            if request is None:  # it has ended meanwhile
                continue
            if request.request.pooled:
                request.pooled = tuple(map(add, request.pooled, scores.hidden)) if request.pooled else scores.hidden
                if row.scored.stop < request.request.scored_to:
                    continue
                scores = PromptScores(row.scored.start, hidden=request.pooled)
            outputs[request.id] = [EngineOutput(row.sequence.sample, None, scores=scores)]
        return outputs

    def _follow_prefill(self, plan: Plan) -> int:
        """Notify clients how far their prompts are computed. Returns how many tokens of prompts the batch had."""
        computed = 0
        for row in plan.rows:
            prompt = len(row.sequence.request.prompt)
            if row.start >= prompt or row.rebuild:
                continue
            computed += min(row.count, prompt - row.start)
            request = self.requests.get(row.sequence.request.id)
            if request is None:
                continue
            try:
                request.prefilled(min(row.start + row.count, prompt), prompt)
            except Exception:  # any error of a client
                logger.exception("a client could not follow its prefill")
                request.prefilled = unwatched
        return computed

    def publish(self, plan: Plan, outputs: Outputs) -> None:
        """Write a recorded batch to the journal, then send its outputs to the clients, scores first. The journal has no
        scores: a client that comes back without them has them computed again."""
        scored = outputs.scored
        if self._recorder is not None:
            self._recorder.batch(plan, outputs.by_request)
        for request_id in dict.fromkeys((*scored, *outputs.by_request)):
            if (request := self.requests.get(request_id)) is not None:
                self._publish(request, [*scored.get(request_id, ()), *outputs.by_request.get(request_id, ())])
        for request, why in outputs.strayed:
            if request.id in self.requests:
                self.fail(request, why)

    def add(self, request: EngineRequest) -> None:
        """A request comes, or a client comes back for one."""
        if request.received is None:
            self._begin_request(request)
        else:
            self._take_up(request)

    def _begin_request(
        self,
        request: EngineRequest,
        known: Mapping[int, Sequence[int]] | None = None,
        kept: Mapping[int, RetainedKv] | None = None,
        recorded: bool = False,
    ) -> None:
        """Queue it. `known` and `kept` are the scheduler's; `recorded`: the journal has it already."""
        request.unfinished = request.request.n if known is None else len(known)
        self.requests[request.id] = request
        try:
            request.sequences = self._scheduler.add(request.request, known, kept)
            for sequence in request.sequences:
                self._follow_from(request, sequence)
        except LaminaError as error:
            self.fail(request, error)
            return
        if self._recorder is not None and not recorded:
            self._recorder.begun(request, known)
        if known and request.constraints:
            resumed = [
                MaskAdvance(s, self.constraints[s], known[s.sample]) for s in request.sequences if known[s.sample]
            ]
            for advance in self._masks.begin(resumed, self._advanced):
                self._advanced(advance)

    def _follow_from(self, request: EngineRequest, sequence: ScheduledSequence) -> None:
        """Make the history and the constraint of a sample, from its tokens so far."""
        params, prompt = request.params, request.request.prompt
        tokens = sequence.tokens[len(prompt) :]
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            self.histories[sequence] = history = TokenHistory(prompt)
            for token in tokens:
                history.append(token)
        if request.constraints:
            self.constraints[sequence] = request.constraints[sequence.sample]

    def _take_up(self, request: EngineRequest) -> None:
        """A client comes back: send what it has not received, then what follows."""
        if self._resumption.is_deadly(request):
            error = EngineError(f"{TRIES} engines died with this request, the last of it alone")
            self._deliver(request, [EngineOutput(0, None, error=error)])
            return
        old = self.requests.get(request.id)
        missing = self._resumption.claim(request, old)
        if missing is None:
            if old is not None:
                self.end(old, None, "abort")
            self._begin_request(request, self._resumption.anew(request))
            return
        if old is not None:
            self.requests[request.id] = request
        if missing and not self._deliver(request, missing):
            self.end(request, None, "abort")

    def recover(self, found: Mapping[KvLocation, RecoveredHolder]) -> tuple[EngineRequest, ...]:
        """Before `run`: go on with the unfinished requests of the previous engine, with the KV that was found. Returns
        them. A client that wants the outputs of one submits it again, with what it has received."""
        requests = []
        for request, tokens, computed, retained, deaths in self._resumption.unfinished(found):
            requests.append(request)
            self._begin_request(request, tokens, retained, recorded=True)
            for sequence in request.sequences:  # the engine may have died of the row after what was computed
                self._scheduler.blame.suspect(sequence, deaths, computed[sequence.sample], len(sequence.tokens))
        return tuple(requests)

    def rebuild(self) -> None:
        """After `recover`, when holders have said how much room they have: compute lost KV again."""
        self._resumption.rebuild()

    def end(self, request: EngineRequest, sample: int | None, reason: FinishReason) -> None:
        """End a request, or one sample of it. Harmless where it has ended."""
        if self.requests.get(request.id) is not request:
            return
        ended = [s for s in request.sequences if s.finish_reason is None and sample in (None, s.sample)]
        for sequence in ended:
            self._scheduler.end(sequence, reason)
        for sequence in ended:
            self.forget(sequence)
        if ended:
            now = self._clock()
            if self._recorder is not None:
                self._recorder.ended(ended, reason)
            self._publish(request, [EngineOutput(sequence.sample, None, reason, at=now) for sequence in ended])

    def fail(self, request: EngineRequest, error: LaminaError, cause: BaseException | None = None) -> None:
        for sequence in self._scheduler.abort(request.id):
            self.forget(sequence)
        self.requests.pop(request.id, None)
        if self._recorder is not None:
            self._recorder.failed(request)
        error.__cause__ = cause or error.__cause__
        self._deliver(request, [EngineOutput(0, None, error=error)])

    def forget(self, sequence: ScheduledSequence) -> None:
        self.histories.pop(sequence, None)
        self.constraints.pop(sequence, None)
        if self._listener is not None:
            self._listener.ended(sequence)
        request = self.requests.get(sequence.request.id)
        if request is not None:
            request.preemptions += sequence.preemptions

    def _advanced(self, advance: MaskAdvance) -> None:
        """A constraint for which no batch waited has gone on: end its sample where no token may follow."""
        sequence = advance.sequence
        request = self.requests.get(sequence.request.id)
        if request is None or self.constraints.get(sequence) is not advance.constraint:
            self.forget(sequence)  # it has ended
        elif advance.error is not None:
            self.fail(request, advance.error)
        elif reason := "stop" if advance.constraint.finished else sequence.ends_with(advance.tokens[-1]):
            self._scheduler.end(sequence, reason)
            self.forget(sequence)
            if self._recorder is not None:
                self._recorder.ended([sequence], reason)
            self._publish(request, [EngineOutput(sequence.sample, None, reason, at=self._clock())])

    def _publish(self, request: EngineRequest, outputs: list[EngineOutput]) -> None:
        request.unfinished -= sum(output.finish_reason is not None for output in outputs)
        if request.unfinished <= 0:
            self.requests.pop(request.id, None)
        if not self._deliver(request, outputs):
            self.end(request, None, "abort")

    def _deliver(self, request: EngineRequest, outputs: list[EngineOutput]) -> bool:
        """Whether the client took them. Its error does not stop the engine."""
        try:
            request.sink(request, outputs)
        except Exception:  # any error of a client
            logger.exception("a client could not take its outputs")
            request.sink = ignore_outputs
            return False
        return True
