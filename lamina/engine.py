"""The step loop: schedule, announce, execute, record, publish. One step on one screen.

One thread owns the loop and every torch call. Requests and aborts come through an inbox that is drained between
batches; outputs leave once a batch and client, through a sink that never blocks. Knows tokens; knows nothing of text.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lamina.errors import EngineError, LaminaError
from lamina.placement import Placement
from lamina.request import Plan, PlannedRow, Request
from lamina.request import Sequence as Sample
from lamina.scheduler import Scheduler
from lamina.types import FinishReason, SamplingParams
from lamina_protocols.messages import Announced
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker import HolderShare, ModelWorker, Work
from lamina_workers.resolver import Span
from lamina_workers.sampler import RowLogprobs, RowSampling, Sampled, TokenHistory

logger = logging.getLogger("lamina")

MAX_FAULTS = 3  # batches in a row that may fail at a holder before their requests do


@dataclass(frozen=True, slots=True)
class Output:
    """One step of one sample: a token, or the end, at a time of the engine's clock. `error` ends the whole request."""

    sample: int
    token: int | None
    finish_reason: FinishReason | None = None
    logprobs: RowLogprobs | None = None
    error: LaminaError | None = None
    at: float = 0.0


def _nobody(ticket: Ticket, outputs: list[Output]) -> None:
    """The sink of a ticket that was not submitted."""


def _unwatched(done: int, total: int) -> None:
    """The `prefilled` of a ticket whose prefill nobody follows."""


@dataclass(slots=True)
class Ticket:
    """A request and what becomes of it.

    Whoever submits it sets `submitted`, `sink`, which the engine calls with each batch's outputs, and perhaps
    `prefilled`, which it calls with how many of the prompt's tokens are computed; neither may block. Times are the
    engine clock's, in seconds; None until it happened.
    """

    request: Request
    params: SamplingParams
    seed: int
    sink: Callable[[Ticket, list[Output]], None] = _nobody
    prefilled: Callable[[int, int], None] = _unwatched
    submitted: float = 0.0
    scheduled: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    unfinished: int = 0
    sequences: tuple[Sample, ...] = ()


class _End(NamedTuple):
    """What `abort` asks for."""

    ticket: Ticket
    sample: int | None
    reason: FinishReason


class Engine:
    """Requests in, outputs out. Somebody's thread must `run` it; the other public methods are for any thread."""

    def __init__(
        self, worker: ModelWorker, scheduler: Scheduler, placement: Placement, clock: Callable[[], float]
    ) -> None:
        self._worker = worker
        self._scheduler = scheduler
        self._placement = placement
        self._clock = clock
        self._inbox: queue.SimpleQueue[Ticket | _End | None] = queue.SimpleQueue()
        self._tickets: dict[str, Ticket] = {}
        self._histories: dict[Sample, TokenHistory] = {}
        self._faults = 0  # since a batch was last complete
        self._door = threading.Lock()  # nothing may be submitted once the loop has stopped
        self._stopped = threading.Event()
        self._cause: BaseException | None = None  # of the stop, where nobody asked for it

    # Any thread.

    @property
    def alive(self) -> bool:
        """Whether requests are served, now or as soon as the loop runs."""
        return not self._stopped.is_set()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request. Raises EngineError where the engine has stopped."""
        with self._door:
            if self._stopped.is_set():
                raise self._stop_error()
            self._inbox.put(ticket)

    def abort(self, ticket: Ticket, sample: int | None = None, reason: FinishReason = "abort") -> None:
        """End a request, or one sample of it. Harmless where it has ended; what is under way is thrown away."""
        self._inbox.put(_End(ticket, sample, reason))

    def close(self) -> None:
        """Stop after the batch in flight; unfinished requests end with an EngineError."""
        self._inbox.put(None)

    # The engine's thread.

    def run(self) -> None:
        """Serve requests until `close`. Every torch call is made here."""
        try:
            while self._drain_inbox():
                self.step()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            logger.exception("the engine stopped")
            self._cause = error
        with self._door:
            self._stopped.set()
        while not self._inbox.empty():  # those who came too late are told like the others
            late = self._inbox.get()
            if isinstance(late, Ticket):
                self._tickets[late.request.id] = late
        for ticket in self._tickets.values():  # the scheduler is not touched: perhaps it is what broke
            self._deliver(ticket, [Output(0, None, error=self._stop_error())])

    def _stop_error(self) -> EngineError:
        error = EngineError("the engine has stopped" + (f": {self._cause!r}" if self._cause else ""))
        error.__cause__ = self._cause
        return error

    def _drain_inbox(self) -> bool:
        """Do what was asked since the last batch; wait only where there is nothing else to do."""
        while True:
            try:
                item = self._inbox.get(block=not self._scheduler.has_work)
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, Ticket):
                self._add(item)
            else:
                self._end(*item)

    def step(self) -> None:
        """One batch: from the scheduler's plan to the outputs that its clients get."""
        plan = self._scheduler.plan()
        if plan is None:
            return
        shares = self._shares(plan)
        try:
            accepted = self._announce(plan, shares)
        except HolderFault as fault:  # something that had no reply of its own was lost: perhaps stored keys
            self._recover(plan, fault)
            self._scheduler.recompute()
            return
        if accepted and plan.rows:
            try:
                sampled = self._worker.execute(self._work(plan), shares)
            except HolderFault as fault:
                self._recover(plan, fault)
                return
            self._record(plan, sampled)
        if accepted:
            self._faults = 0

    def _announce(self, plan: Plan, shares: list[HolderShare]) -> bool:
        """Whether every holder accepts. Where one refuses, the scheduler has made room for its next plan."""
        replies = self._worker.announce(shares)
        free_pages = min(reply.free_pages for reply in replies)
        accepted = all(reply.accepted for reply in replies)
        if accepted:
            self._scheduler.accepted(plan, free_pages, _floors(plan, shares, replies))
        else:
            for sequence in self._scheduler.refused(plan, free_pages):
                reason = next(reply.reason for reply in replies if not reply.accepted)
                self._fail(self._tickets[sequence.request.id], EngineError(f"the holders have no room: {reason}"))
        return accepted

    def _shares(self, plan: Plan) -> list[HolderShare]:
        return [HolderShare(plan.first, *placed) for placed in self._placement.place(plan)]

    def _work(self, plan: Plan) -> Work:
        token_ids: list[int] = []
        rope_lengths: list[int] = []
        sampled, sampling = [], []
        for row in plan.rows:
            tokens, end = row.sequence.tokens, row.start + row.count
            token_ids += tokens[row.start : end]
            prompt = len(row.sequence.request.prompt)
            rope_lengths += [max(prompt, position + 1) for position in range(row.start, end)]
            ticket = self._tickets[row.sequence.request.id]
            if ticket.scheduled is None:
                ticket.scheduled, ticket.cached_tokens = self._clock(), row.sequence.reused
            if row.sample:
                sampled.append(len(token_ids) - 1)
                sampling.append(self._row_sampling(row, ticket))
        spans = tuple(Span(row.start, row.count) for row in plan.rows)
        return Work(spans, token_ids, rope_lengths, tuple(sampled), tuple(sampling))

    def _row_sampling(self, row: PlannedRow, ticket: Ticket) -> RowSampling:
        params, sequence = ticket.params, row.sequence
        position = len(sequence.tokens) - len(ticket.request.prompt)
        stops = ticket.request.stop_token_ids
        return RowSampling(
            temperature=params.temperature or 0.0,
            top_p=params.top_p or 1.0,
            top_k=max(0, params.top_k or 0),
            min_p=params.min_p or 0.0,
            repetition_penalty=params.repetition_penalty or 1.0,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            history=self._histories.get(sequence),
            logit_bias=params.logit_bias,
            suppressed=tuple(stops) if position < params.min_tokens else (),
            seed=ticket.seed,
            sample_index=sequence.sample,
            position=position,
            logprobs=params.logprobs,
        )

    def _record(self, plan: Plan, sampled: Sampled) -> None:
        rows = [row for row in plan.rows if row.sample]
        for row, token in zip(rows, sampled.tokens, strict=True):
            if token is None:
                self._scheduler.end(row.sequence, "abort", keep=False)
                if ticket := self._tickets.get(row.sequence.request.id):
                    self._fail(ticket, EngineError("the model's logits are not finite for this request"))
        self._report_prefill(plan)
        reports = dict(zip((row.sequence for row in rows), sampled.logprobs, strict=True))
        outputs: dict[str, list[Output]] = {}
        now = self._clock()
        for outcome in self._scheduler.record(plan, [token or 0 for token in sampled.tokens]):
            sequence = outcome.sequence
            if sequence in self._histories:
                self._histories[sequence].append(outcome.token)
            output = Output(sequence.sample, outcome.token, outcome.finish_reason, reports[sequence], at=now)
            outputs.setdefault(sequence.request.id, []).append(output)
            if outcome.finish_reason is not None:
                self._forget(sequence)
        for request_id, batch in outputs.items():
            self._publish(self._tickets[request_id], batch)

    def _report_prefill(self, plan: Plan) -> None:
        for row in plan.rows:
            prompt = len(row.sequence.request.prompt)
            ticket = self._tickets.get(row.sequence.request.id)
            if row.start >= prompt or ticket is None:
                continue
            try:
                ticket.prefilled(min(row.start + row.count, prompt), prompt)
            except Exception:  # it may be anything
                logger.exception("a client could not follow its prefill")
                ticket.prefilled = _unwatched

    def _publish(self, ticket: Ticket, outputs: list[Output]) -> None:
        ticket.unfinished -= sum(output.finish_reason is not None for output in outputs)
        if ticket.unfinished <= 0:
            self._tickets.pop(ticket.request.id, None)
        if not self._deliver(ticket, outputs):
            self._end(ticket, None, "abort")

    def _deliver(self, ticket: Ticket, outputs: list[Output]) -> bool:
        """Whether the client took them: what it does wrong is no reason to stop for the others."""
        try:
            ticket.sink(ticket, outputs)
        except Exception:  # it may be anything
            logger.exception("a client could not take its outputs")
            ticket.sink = _nobody
            return False
        return True

    def _recover(self, plan: Plan, fault: HolderFault) -> None:
        """Plan the batch again; where that keeps failing give up its requests, and at last everything."""
        self._faults += 1
        logger.warning("a batch failed and runs again: %s", fault)
        self._scheduler.drop(plan)
        if self._faults % MAX_FAULTS == 0:
            for request_id in {row.sequence.request.id for row in plan.rows}:
                error = EngineError(f"a holder failed {MAX_FAULTS} times in a row: {fault}")
                self._fail(self._tickets[request_id], error, fault)
        if self._faults >= 3 * MAX_FAULTS:
            raise EngineError(f"a holder failed {self._faults} times in a row: {fault}") from fault

    def _add(self, ticket: Ticket) -> None:
        ticket.unfinished = ticket.request.n
        self._tickets[ticket.request.id] = ticket
        try:
            ticket.sequences = self._scheduler.add(ticket.request)
        except LaminaError as error:
            self._fail(ticket, error)
            return
        if ticket.params.repetition_penalty != 1 or ticket.params.presence_penalty or ticket.params.frequency_penalty:
            for sequence in ticket.sequences:
                self._histories[sequence] = TokenHistory(ticket.request.prompt)

    def _end(self, ticket: Ticket, sample: int | None, reason: FinishReason) -> None:
        if ticket.request.id not in self._tickets:
            return
        ended = [s for s in ticket.sequences if s.finish_reason is None and sample in (None, s.sample)]
        for sequence in ended:
            self._scheduler.end(sequence, reason)
        for sequence in ended:
            self._forget(sequence)
        if ended:
            now = self._clock()
            self._publish(ticket, [Output(sequence.sample, None, reason, at=now) for sequence in ended])

    def _forget(self, sequence: Sample) -> None:
        self._histories.pop(sequence, None)
        ticket = self._tickets.get(sequence.request.id)
        if ticket is not None:
            ticket.preemptions += sequence.preemptions

    def _fail(self, ticket: Ticket, error: LaminaError, cause: BaseException | None = None) -> None:
        """End a request with an error."""
        for sequence in self._scheduler.abort(ticket.request.id):
            self._forget(sequence)
        self._tickets.pop(ticket.request.id, None)
        error.__cause__ = cause or error.__cause__
        self._deliver(ticket, [Output(0, None, error=error)])


def _floors(plan: Plan, shares: Sequence[HolderShare], replies: Sequence[Announced]) -> list[int]:
    """Per row the highest floor of its parts."""
    floors = [0] * len(plan.rows)
    for share, reply in zip(shares, replies, strict=True):
        for route, floor in zip(share.routes, reply.floors, strict=True):
            floors[route.source] = max(floors[route.source], floor)
    return floors
