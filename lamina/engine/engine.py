"""The step loop: schedule, announce, execute, record, publish. One batch on one screen.

One thread owns the loop and every torch call. Several batches can be under way, one a lane: while one waits for a
holder another computes. Requests, aborts and news of holders come through an inbox that is drained between batches;
outputs leave once a batch and client, through a sink that never blocks. Knows tokens; knows nothing of text, nor of
what becomes of a batch that fails: that is `Failures`.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from lamina.completions import FinishReason
from lamina.engine.batch_input import work
from lamina.engine.failures import Failures, WaitDeadline
from lamina.engine.holder_answers import floors_of, spared_of
from lamina.engine.holders import Holders
from lamina.engine.in_flight import Answered, InFlight, Lane
from lamina.engine.kv_migration import KvMigration
from lamina.engine.mailbox import Mailbox
from lamina.engine.observer import observe
from lamina.engine.request_registry import RequestRegistry
from lamina.engine.stats import EngineStats
from lamina.engine.tiering import TierController
from lamina.errors import EngineError, InvalidRequest
from lamina.journal.history import KvLocation, RecoveredRequest
from lamina.messages.engine_request import EngineRequest, unwatched
from lamina.messages.snapshot import Snapshot
from lamina.scheduling.kv_shares import Pages
from lamina.scheduling.lane_tuner import LaneTuner
from lamina.scheduling.local_share import LocalShare
from lamina.scheduling.placement import Holder, Placement
from lamina.scheduling.request import Plan, ScheduledSequence
from lamina.scheduling.scheduler import Scheduler
from lamina_protocols.channels import Credentials
from lamina_protocols.messages import Announced
from lamina_protocols.routes import HolderBatch
from lamina_workers.decoder.sampler import Sampled, TokenHistory
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.attention_merge import Waiting
from lamina_workers.model_worker.interface import Workers
from lamina_workers.ports.port import AttentionPort

if TYPE_CHECKING:
    from lamina.journal.recorder import Recorder
    from lamina.text.structured_output import Grammars
    from lamina_workers.parallel.peers import Peer

logger = logging.getLogger("lamina")


class Engine:
    """Requests in, outputs out. Somebody's thread must `run` it; the other public methods are for any thread.

    Without any holder requests wait for one to join, `hope` seconds at most. `on_lost` is told the name of each that
    was given up, `on_rebuilt` how many of how many lost tokens have been computed again. Neither may block.
    """

    def __init__(
        self,
        worker: Workers[Peer],
        scheduler: Scheduler,
        placement: Placement,
        clock: Callable[[], float],
        *,
        names: Mapping[int, str] | None = None,
        scratch: Collection[int] = (),
        lanes: LaneTuner | None = None,
        balance: LocalShare | None = None,
        grammars: Grammars | None = None,
        hope: float = 60.0,
        recorder: Recorder | None = None,
        on_lost: Callable[[str], None] | None = None,
        on_rebuilt: Callable[[int, int], None] = unwatched,
    ) -> None:
        self._worker = worker
        self._scheduler = scheduler
        self._placement = placement
        self._scratch = frozenset(scratch)  # holders of which the scheduler knows nothing
        self._clock = clock
        self._lane_count = lanes or LaneTuner(1)
        self._grammars = grammars
        self._inbox = Mailbox()
        self._tally = EngineStats(clock())
        self._clients = RequestRegistry(scheduler, clock, grammars, recorder)
        self._batches = InFlight(worker, scheduler, self._tally)
        mover = KvMigration(worker, scheduler, placement, clock)
        self._fleet = Holders(worker, scheduler, placement, dict(names or {}), self._scratch, mover)
        self._tiers = TierController(balance or LocalShare(), mover, scheduler, placement, clock)
        self._patience = WaitDeadline(hope, self._fleet, scheduler, self._clients, clock)
        self._losses = Failures(
            worker, scheduler, self._fleet, self._tiers, self._batches, self._clients, self._patience, self._tally,
            on_lost, on_rebuilt,
        )  # fmt: skip

    # Any thread.

    @property
    def alive(self) -> bool:
        """Whether requests are served, now or as soon as the loop runs."""
        return not self._inbox.is_shut

    def submit(self, ticket: EngineRequest) -> None:
        """Queue a request. Raises EngineError where the engine has stopped, and InvalidRequest where its text cannot
        be held to what it asks for: that is compiled here, not on the engine's thread."""
        if ticket.params.constrained:
            if self._grammars is None:
                raise InvalidRequest("this engine has no tokenizer; it can hold no text to a schema or grammar")
            ticket.constraints = self._grammars.constraints(ticket.params, ticket.request.n)
        self._inbox.ask(partial(self._clients.add, ticket), partial(self._clients.refuse, ticket))

    def abort(self, ticket: EngineRequest, sample: int | None = None, reason: FinishReason = "abort") -> None:
        """End a request, or one sample of it. Harmless where it has ended; what is under way is thrown away."""
        self._inbox.tell(partial(self._clients.end, ticket, sample, reason))

    def join(self, port: AttentionPort, holder: Holder, credentials: Credentials | None = None) -> None:
        """One attention worker more, by the name of its port. New sequences use it. With several ranks `holder` is that
        of rank 0, and the others connect with `credentials`."""
        self._inbox.tell(partial(self._losses.join, port, holder, credentials))

    def leave(self, name: str) -> None:
        """An attention worker is known to be gone. Harmless where that was noticed already."""
        self._inbox.tell(partial(self._losses.leave, name))

    def rank_gone(self, rank: int, why: str, stays: bool) -> None:
        """A model worker beyond this one is known to be gone, and comes back unless it `stays` away."""
        self._inbox.tell(partial(self._losses.rank_gone, rank, why, stays))

    def rank_back(self, peer: Peer) -> None:
        """A model worker that was gone is there again."""
        self._inbox.tell(partial(self._losses.rank_back, peer))

    def drain(self, name: str) -> Future[int]:
        """Let an attention worker go once its KV has moved to the others; the result is how many tokens moved. Raises
        EngineError where the engine has stopped."""
        done: Future[int] = Future()
        self._inbox.ask(partial(self._drain, name, done), partial(_refuse, done))
        return done

    def disclaim(self) -> None:
        """Whoever has not come back by now for a request that an engine before began will not: those are ended."""
        self._inbox.tell(self._clients.disclaim)

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        """Have `sink` told, by the engine's thread and between two batches, what the engine is doing; never where it
        has stopped."""
        self._inbox.tell(partial(self._look, sink))

    def close(self) -> None:
        """Stop after the batches under way; unfinished requests end with an EngineError."""
        self._inbox.end()

    # The engine's thread.

    def recover(self, found: Mapping[KvLocation, RecoveredRequest], last_handle: int) -> tuple[EngineRequest, ...]:
        """As `RequestRegistry.recover`; no handle up to `last_handle` is given to others.

        What is shared among sequences is unknown here, and would be counted for each: so holders that have something
        are asked how much room they have, before anything is planned by it.
        """
        self._scheduler.number_handles_from(last_handle)
        tickets = self._clients.recover(found)
        if tickets:
            self._fleet.ask_for_room(each.number for each in found.values())
            self._clients.rebuild()
        return tickets

    def run(self) -> None:
        """Serve requests until `close`. Every torch call is made here."""
        self._tally.began = self._clock()
        cause: BaseException | None = None
        try:
            while self._drain_inbox():
                self.step()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            logger.exception("the engine stopped")
            cause = error
        self._inbox.shut(cause)
        self._batches.close()
        self._clients.stopped(self._inbox.error)

    def _drain_inbox(self) -> bool:
        """Do what was asked since the last batch; wait only where there is nothing else to do. False: stop."""
        while True:
            if self._patience.look():
                self._batches.full = False
            work = self._scheduler.has_work or self._placement.pending or self._tiers.busy
            waits = self._batches.full and (self._fleet.halted or bool(self._scheduler.stranded))
            idle = not self._batches and (not work or waits)
            since = self._clock() if idle else 0.0
            try:
                do = self._inbox.get(self._patience.left() if idle else 0.0)
            except queue.Empty:
                if idle:
                    self._patience.despair()
                    self._batches.full = False
                return True
            finally:
                if idle:
                    self._tally.idle_seconds += self._clock() - since
            if do is None:
                return False
            self._batches.full = False
            do()

    def _drain(self, name: str, done: Future[int]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            while self._batches:
                self._advance(self._batches.next())
            self._losses.drain(name, done)
        except BaseException as error:  # the engine stops, and nobody may wait for ever
            if not done.done():
                done.set_exception(error)
            raise

    def _look(self, sink: Callable[[Snapshot], None]) -> None:
        self._tally.lanes, self._tally.attention_seconds = self._lane_count.count, self._worker.attention_seconds
        self._tally.local_share = self._tiers.local_share
        links, names = self._worker.links(), self._fleet.names
        taken = observe(self._tally, self._scheduler, self._placement, links, names, self._scratch, self._clock())
        try:
            sink(taken)
        except Exception:  # it may be anything
            logger.exception("a client could not take its snapshot")

    # A batch.

    def step(self) -> None:
        """Begin batches where lanes are free, and go on with one whose reply has come: with the one that has waited
        longest where none has."""
        if self._worker.missing:
            self._batches.full = True
            return
        self._move()
        while len(self._batches) < self._lane_count.count and not self._batches.full:
            plan = self._scheduler.plan(self._lane_count.count)
            if plan is None and (self._batches or not self._placement.pending):
                self._batches.full = True
                break
            self._batches.add(self._begin(plan))
        if self._batches:
            self._advance(self._batches.next())

    def _move(self) -> None:
        """Let sequences change their place, between batches."""
        if self._tiers.busy:
            self._batches.full = False  # what has moved away leaves room
        try:
            self._tiers.step()
        except HolderFault as fault:
            logger.warning("moving sequences failed: %s", fault)
            self._losses.failed_outside()

    def _begin(self, plan: Plan | None) -> Lane:
        rows = plan.rows if plan is not None else ()
        # Looked up now: the batch goes on for those that end meanwhile.
        tickets = {row.sequence: self._clients.tickets[row.sequence.request.id] for row in rows}
        histories = {s: history for s in tickets if (history := self._clients.histories.get(s)) is not None}
        answered = Answered()
        return Lane(plan, self._batch(plan, tickets, histories, answered), answered)

    def _advance(self, lane: Lane) -> None:
        """Go on with a batch until it is over, or until it waits while there are others to go on with."""
        try:
            lane.waiting = next(lane.run)
            while len(self._batches) == 1 == self._lane_count.count:
                lane.waiting = next(lane.run)
        except StopIteration:
            self._batches.over(lane)
        except HolderFault as fault:
            self._losses.failed(lane, fault)

    def _batch(
        self,
        plan: Plan | None,
        tickets: Mapping[ScheduledSequence, EngineRequest],
        histories: Mapping[ScheduledSequence, TokenHistory],
        answered: Answered,
    ) -> Generator[Waiting, None, None]:
        """One batch: from the scheduler's plan to the outputs that its clients get."""
        shares = self._placement.place(plan) if plan is not None else self._placement.outgoing()
        batch, answers = yield from self._worker.announce(shares)
        answered.up = True
        free = self._fleet.answered(shares, answers)
        self._tally.scratch_free |= {n: answer.free_pages for n, answer in answers.items() if n in self._scratch}
        if plan is None:
            self._scheduler.told(free)
            return
        if self._agreed(plan, free, shares, answers) and plan.rows:
            self._clients.scheduled(tickets)
            lanes = self._lane_count
            sampled = yield from self._worker.execute(
                work(plan, tickets, histories, self._clients.constraints), batch, shares, lanes.count > 1
            )
            self._tiers.completed(plan, self._worker.times, lanes.count, lanes.trying)
            self._record(plan, sampled)
        self._losses.went_well()

    def _agreed(
        self, plan: Plan, free: Pages, shares: Mapping[int, HolderBatch], answers: Mapping[int, Announced]
    ) -> bool:
        """Whether every holder accepts. Where one refuses, the scheduler has made room for its next plan."""
        if refusal := next((answer for answer in answers.values() if not answer.accepted), None):
            self._tiers.abandon()  # what moves must not keep from others what they cannot do without
            for sequence in self._scheduler.refused(plan, free):
                if ticket := self._clients.of(sequence):
                    self._clients.fail(ticket, EngineError(f"the holders have no room: {refusal.reason}"))
            return False
        kept = {number: answer for number, answer in answers.items() if number not in self._scratch}
        self._scheduler.accepted(plan, free, floors_of(plan, shares, kept))
        for request_id, spared in spared_of(plan, shares, kept).items():
            if ticket := self._clients.tickets.get(request_id):
                self._tally.spared(ticket.spared, spared)
                ticket.spared = spared
        return True

    def _record(self, plan: Plan, sampled: Sampled) -> None:
        rows = [row for row in plan.rows if row.sample]
        for row, token in zip(rows, sampled.tokens, strict=True):
            if token is None:
                self._tally.corrupted += 1
                self._scheduler.end(row.sequence, "abort", keep=False)
                self._clients.forget(row.sequence)
                if ticket := self._clients.of(row.sequence):
                    self._clients.fail(ticket, EngineError("the model's logits are not finite for this request"))
        prompt_tokens = self._clients.follow_prefill(plan)
        reports = dict(zip((row.sequence for row in rows), sampled.logprobs, strict=True))
        now = self._clock()
        outcomes = self._scheduler.record(plan, [token or 0 for token in sampled.tokens])
        self._placement.recorded(plan)
        self._losses.report_rebuilt()
        prefill = any(row.count > 1 for row in plan.rows)
        self._tally.complete(sum(row.count for row in plan.rows), prompt_tokens, len(outcomes))
        if self._tiers.all_local:
            self._lane_count.alone()
        else:
            mixed, attended = prefill or not self._tiers.settled, self._worker.attention_seconds
            self._lane_count.completed(len(outcomes), len(self._clients.tickets), mixed, now, attended)
        self._clients.record(plan, outcomes, reports)


def _refuse(done: Future[int], error: EngineError) -> None:
    if done.set_running_or_notify_cancel():
        done.set_exception(error)
