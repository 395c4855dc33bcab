"""Who wants what of an engine: tickets, what sampling must know of each sample, and what its clients are told.

For the engine's thread. Knows the scheduler and the journal; knows nothing of batches' messages, holders or lanes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lamina.completions import FinishReason
from lamina.errors import EngineError, InvalidRequest, LaminaError
from lamina.journal.resumption import Resumption
from lamina.messages.engine_request import EngineOutput, EngineRequest, nobody, unwatched
from lamina.scheduling.request import Outcome, Plan, RetainedKv, ScheduledSequence
from lamina_workers.decoder.logprobs import RowLogprobs
from lamina_workers.decoder.sampler import TokenHistory

if TYPE_CHECKING:
    from lamina.journal.history import KvLocation, RecoveredRequest
    from lamina.journal.recorder import Recorder
    from lamina.scheduling.scheduler import Scheduler
    from lamina.text.structured_output import Constraint, Grammars

logger = logging.getLogger("lamina")


class RequestRegistry:
    """The requests that have not ended. With a `recorder` all is in the journal before anybody is told of it."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Callable[[], float],
        grammars: Grammars | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.tickets: dict[str, EngineRequest] = {}
        self.histories: dict[ScheduledSequence, TokenHistory] = {}
        self.constraints: dict[ScheduledSequence, Constraint] = {}
        self._scheduler = scheduler
        self._clock = clock
        self._recorder = recorder
        self._returning = Resumption(recorder, scheduler, grammars)

    def of(self, sample: ScheduledSequence) -> EngineRequest | None:
        """Who asked for it, unless that has ended."""
        return self.tickets.get(sample.request.id)

    def disclaim(self) -> None:
        """Whoever has not come back by now for what an engine before began will not: those requests end."""
        for ticket in self._returning.disclaim():
            self.end(ticket, None, "abort")

    def stopped(self, error: Callable[[], EngineError]) -> None:
        """The engine has stopped: everybody is told. The scheduler is not touched: perhaps it is what broke."""
        for ticket in self.tickets.values():
            if self._recorder is not None and ticket not in self._returning:
                self._recorder.failed(ticket)
            self._deliver(ticket, [EngineOutput(0, None, error=error())])
        if self._recorder is not None:
            self._recorder.close()

    def refuse(self, ticket: EngineRequest, error: EngineError) -> None:
        """A request came too late."""
        self._deliver(ticket, [EngineOutput(0, None, error=error)])

    def scheduled(self, tickets: Mapping[ScheduledSequence, EngineRequest]) -> None:
        """These are in a batch that every holder has accepted."""
        for sequence, ticket in tickets.items():
            if ticket.scheduled is None:
                ticket.scheduled, ticket.cached_tokens = self._clock(), sequence.reused

    def record(
        self, plan: Plan, outcomes: Sequence[Outcome], reports: Mapping[ScheduledSequence, RowLogprobs | None]
    ) -> None:
        """Tell of a batch that is complete; `reports` are the log probabilities of those who sampled."""
        outputs: dict[str, list[EngineOutput]] = {}
        strayed: list[tuple[EngineRequest, InvalidRequest]] = []
        now = self._clock()
        for outcome in outcomes:
            sequence = outcome.sequence
            if sequence in self.histories:
                self.histories[sequence].append(outcome.token)
            reason = outcome.finish_reason
            if reason != "stop" and sequence in self.constraints:
                try:
                    reason = self._follow(sequence, outcome.token) or reason
                except InvalidRequest as error:
                    strayed.append((self.tickets[sequence.request.id], error))
            output = EngineOutput(sequence.sample, outcome.token, reason, reports[sequence], at=now)
            outputs.setdefault(sequence.request.id, []).append(output)
            if reason is not None:
                self.forget(sequence)
        if self._recorder is not None:  # before anybody is told
            self._recorder.batch(plan, outputs)
        for request_id, batch in outputs.items():
            self._publish(self.tickets[request_id], batch)
        for ticket, why in strayed:
            if ticket.request.id in self.tickets:
                self.fail(ticket, why)

    def add(self, ticket: EngineRequest) -> None:
        """A request comes, or a client comes back for one."""
        if ticket.received is None:
            self._begin_request(ticket)
        else:
            self._take_up(ticket)

    def _begin_request(
        self,
        ticket: EngineRequest,
        known: Mapping[int, Sequence[int]] | None = None,
        kept: Mapping[int, RetainedKv] | None = None,
        recorded: bool = False,
    ) -> None:
        """Queue it. `known` and `kept` are the scheduler's; `recorded`: the journal has it already."""
        ticket.unfinished = ticket.request.n if known is None else len(known)
        self.tickets[ticket.request.id] = ticket
        try:
            ticket.sequences = self._scheduler.add(ticket.request, known, kept)
            for sequence in ticket.sequences:
                self._follow_from(ticket, sequence)
        except LaminaError as error:
            self.fail(ticket, error)
            return
        if self._recorder is not None and not recorded:
            self._recorder.begun(ticket, known)

    def _follow_from(self, ticket: EngineRequest, sequence: ScheduledSequence) -> None:
        """What sampling needs to know of the tokens so far."""
        params, prompt = ticket.params, ticket.request.prompt
        tokens = sequence.tokens[len(prompt) :]
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            self.histories[sequence] = history = TokenHistory(prompt)
            for token in tokens:
                history.append(token)
        if ticket.constraints:
            self.constraints[sequence] = constraint = ticket.constraints[sequence.sample]
            for token in tokens:
                constraint.advance(token)

    def _take_up(self, ticket: EngineRequest) -> None:
        """Have a client that comes back get what it has not got, and what comes then."""
        old = self.tickets.get(ticket.request.id)
        missing = self._returning.claim(ticket, old)
        if missing is None:
            if old is not None:
                self.end(old, None, "abort")
            self._begin_request(ticket, self._returning.anew(ticket))
            return
        if old is not None:
            self.tickets[ticket.request.id] = ticket
        if missing and not self._deliver(ticket, missing):
            self.end(ticket, None, "abort")

    def recover(self, found: Mapping[KvLocation, RecoveredRequest]) -> tuple[EngineRequest, ...]:
        """Before `run`: go on with what an engine before had not finished, with the KV that was found. Returns its
        requests: whoever wants the outputs of one submits it again, with what it has received."""
        tickets = []
        for ticket, known, kept in self._returning.unfinished(found):
            tickets.append(ticket)
            self._begin_request(ticket, known, kept, recorded=True)
        return tuple(tickets)

    def rebuild(self) -> None:
        """After `recover`, once holders have said how much room they have: what is gone is computed again."""
        self._returning.rebuild()

    def end(self, ticket: EngineRequest, sample: int | None, reason: FinishReason) -> None:
        """End a request, or one sample of it. Harmless where it has ended."""
        if self.tickets.get(ticket.request.id) is not ticket:
            return
        ended = [s for s in ticket.sequences if s.finish_reason is None and sample in (None, s.sample)]
        for sequence in ended:
            self._scheduler.end(sequence, reason)
        for sequence in ended:
            self.forget(sequence)
        if ended:
            now = self._clock()
            if self._recorder is not None:
                self._recorder.ended(ended, reason)
            self._publish(ticket, [EngineOutput(sequence.sample, None, reason, at=now) for sequence in ended])

    def fail(self, ticket: EngineRequest, error: LaminaError, cause: BaseException | None = None) -> None:
        """End a request with an error."""
        for sequence in self._scheduler.abort(ticket.request.id):
            self.forget(sequence)
        self.tickets.pop(ticket.request.id, None)
        if self._recorder is not None:
            self._recorder.failed(ticket)
        error.__cause__ = cause or error.__cause__
        self._deliver(ticket, [EngineOutput(0, None, error=error)])

    def forget(self, sequence: ScheduledSequence) -> None:
        """A sample has ended."""
        self.histories.pop(sequence, None)
        self.constraints.pop(sequence, None)
        ticket = self.tickets.get(sequence.request.id)
        if ticket is not None:
            ticket.preemptions += sequence.preemptions

    def follow_prefill(self, plan: Plan) -> int:
        """Tell clients how far their prompts are computed. Returns how many tokens of prompts the batch had."""
        computed = 0
        for row in plan.rows:
            prompt = len(row.sequence.request.prompt)
            if row.start >= prompt or row.rebuild:
                continue
            computed += min(row.count, prompt - row.start)
            ticket = self.tickets.get(row.sequence.request.id)
            if ticket is None:
                continue
            try:
                ticket.prefilled(min(row.start + row.count, prompt), prompt)
            except Exception:  # it may be anything
                logger.exception("a client could not follow its prefill")
                ticket.prefilled = unwatched
        return computed

    def _follow(self, sequence: ScheduledSequence, token: int) -> FinishReason | None:
        """Tell a sample's constraint what was recorded, once, and end the sample where nothing may follow."""
        constraint = self.constraints[sequence]
        constraint.advance(token)
        if not constraint.finished:
            return None
        self._scheduler.end(sequence, "stop")
        return "stop"

    def _publish(self, ticket: EngineRequest, outputs: list[EngineOutput]) -> None:
        ticket.unfinished -= sum(output.finish_reason is not None for output in outputs)
        if ticket.unfinished <= 0:
            self.tickets.pop(ticket.request.id, None)
        if not self._deliver(ticket, outputs):
            self.end(ticket, None, "abort")

    def _deliver(self, ticket: EngineRequest, outputs: list[EngineOutput]) -> bool:
        """Whether the client took them: what it does wrong is no reason to stop for the others."""
        try:
            ticket.sink(ticket, outputs)
        except Exception:  # it may be anything
            logger.exception("a client could not take its outputs")
            ticket.sink = nobody
            return False
        return True
