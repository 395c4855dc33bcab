"""The step loop of an engine, and the mailbox of its thread. What becomes of one batch is in `batch.py`.

One thread owns the loop and every torch call. Several batches can be under way, one a lane: while one waits for a
holder another computes. Calls come through a mailbox, which is emptied between batches. Outputs leave once a batch
and client, through a sink that does not block.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lamina.completions import FinishReason
from lamina.engine.batch import Batch, BatchParts
from lamina.engine.drafting import Drafting, Proposer
from lamina.engine.failures import FailureReports, Failures, WaitDeadline
from lamina.engine.holders import Drains, Holders
from lamina.engine.in_flight import InFlight
from lamina.engine.kv_migration import KvMigration
from lamina.engine.kv_spares import SpareKeeper
from lamina.engine.masks import Masks
from lamina.engine.observers import EngineStats, take_snapshot
from lamina.engine.request_registry import RequestRegistry
from lamina.engine.tiering import TierController
from lamina.errors import EngineError, InvalidRequest
from lamina.journal.history import KvLocation, RecoveredHolder
from lamina.kv.placement import Holder
from lamina.kv.prefix_nodes import PrefixSink
from lamina.messages.engine_request import EngineRequest
from lamina.messages.snapshot import Snapshot
from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.speculation import Speculation
from lamina_protocols.channels.channels import Credentials
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.interface import Workers
from lamina_workers.ports.port import AttentionPort

if TYPE_CHECKING:
    from lamina.journal.recorder import Recorder
    from lamina.text.structured_output import Grammars
    from lamina_workers.parallel.peers import Peer

logger = logging.getLogger("lamina")


def _unanswered(error: EngineError) -> None:
    """A message needs no answer."""


def refuse(done: Future[Any], error: EngineError) -> None:
    """The answer of a call that the engine does not make any more."""
    if done.set_running_or_notify_cancel():
        done.set_exception(error)


class _Letter(NamedTuple):
    do: Callable[[], object]
    refuse: Callable[[EngineError], object] = _unanswered


class Mailbox:
    """The mailbox of one engine. Its thread calls `shut` after it has stopped; until then it takes every message."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Letter | None] = queue.SimpleQueue()
        self._door = threading.Lock()  # keeps a request out after the waiting ones have been refused
        self._shut = threading.Event()
        self._cause: BaseException | None = None

    @property
    def is_shut(self) -> bool:
        return self._shut.is_set()

    @property
    def empty(self) -> bool:
        return self._queue.empty()

    def request(self, do: Callable[[], object], refuse: Callable[[EngineError], object]) -> None:
        """Have the engine's thread call `do` between two batches, or `refuse` where it stops before that. Raises
        EngineError where it has stopped already."""
        with self._door:
            if self._shut.is_set():
                raise self.error()
            self._queue.put(_Letter(do, refuse))

    def post(self, do: Callable[[], object]) -> None:
        """As `request`, but dropped where the engine has stopped."""
        self._queue.put(_Letter(do))

    def end(self) -> None:
        self._queue.put(None)

    def get(self, timeout: float | None) -> Callable[[], object] | None:
        """The next call to make, or None where the engine is to stop. Waits for `timeout` seconds (None: without end),
        then raises queue.Empty."""
        letter = self._queue.get(timeout=timeout)
        return None if letter is None else letter.do

    def shut(self, cause: BaseException | None) -> None:
        """The engine has stopped, by request or for this cause: refuse the requests that wait."""
        self._cause = cause
        with self._door:
            self._shut.set()
        while not self._queue.empty():
            if (letter := self._queue.get()) is not None:
                try:
                    letter.refuse(self.error())
                except Exception:  # any error; the other requests are refused all the same
                    logger.exception("a caller could not be notified that the engine has stopped")

    def error(self) -> EngineError:
        """Why the engine does nothing any more."""
        error = EngineError("the engine has stopped" + (f": {self._cause!r}" if self._cause else ""))
        error.__cause__ = self._cause
        return error


class Engine:
    """Requests in, outputs out. A thread of the caller must `run` it; the other public methods are for any thread.

    Attention workers are the holders of `control` that have a name. Where none is left, requests wait for one to join,
    `wait` seconds at most. `clock`: seconds. With a `recorder` the engine keeps a journal. With a `proposer` it
    verifies drafts, as many as `speculation` deals.
    """

    def __init__(
        self,
        worker: Workers[Peer],
        control: ControlPlane,
        clock: Callable[[], float],
        *,
        grammars: Grammars | None = None,
        recorder: Recorder | None = None,
        wait: float = 60.0,
        speculation: Speculation | None = None,
        proposer: Proposer | None = None,
        reports: FailureReports | None = None,
    ) -> None:
        self._worker = worker
        self._control = control
        self._scheduler = control.scheduler
        self._clock = clock
        self._grammars = grammars
        self._mailbox = Mailbox()
        self._stats = EngineStats(clock())
        self._masks = Masks(self._mailbox.post)
        self._drafting = Drafting(proposer, speculation, self._stats, clock)
        self._registry = RequestRegistry(self._scheduler, clock, self._masks, grammars, recorder, self._drafting)
        self._in_flight = InFlight(worker, self._stats)
        migration = KvMigration(worker, control, clock)
        names = {number: holder.name for number, holder in control.placement.holders.items() if holder.name}
        self._holders = Holders(worker, control, names)
        self._drains = Drains(control, self._holders, migration, clock)
        self._tiering = TierController(control, migration, clock)
        self._spares = SpareKeeper(worker, control, clock)
        self._deadline = WaitDeadline(wait, self._holders, self._scheduler, self._registry, clock)
        spares = (self._spares,) if self._spares.on else ()
        self._failures = Failures(
            worker,
            self._scheduler,
            holders=self._holders,
            copiers=(self._tiering, *spares),
            in_flight=self._in_flight,
            registry=self._registry,
            deadline=self._deadline,
            reports=reports or FailureReports(),
        )
        self._holders.listeners = (self._stats, self._tiering, self._drains, self._failures, *spares)
        self._parts = BatchParts(
            worker=worker,
            control=control,
            registry=self._registry,
            holders=self._holders,
            tiering=self._tiering,
            stats=self._stats,
            observers=(self._failures, self._stats, self._tiering, self._drafting, *spares),
            clock=clock,
            hears=self._drafting.hears,
        )

    # Any thread.

    @property
    def alive(self) -> bool:
        """Whether requests are served, now or as soon as the loop runs."""
        return not self._mailbox.is_shut

    @property
    def halted(self) -> bool:
        """Whether nothing can be computed before an attention worker joins or a model worker comes back."""
        return self._deadline.hopeless

    def submit(self, request: EngineRequest) -> None:
        """Queue a request, its schema or grammar compiled on the caller's thread. Raises EngineError where the engine
        has stopped, InvalidRequest where its text cannot be held to that, PolicyError where its policy cannot be."""
        policy = self._scheduler.config.policy(request.request.policy).name
        request.request = replace(request.request, policy=policy)
        if request.params.constrained:
            if self._grammars is None:
                raise InvalidRequest("this engine has no tokenizer; it can hold no text to a schema or grammar")
            request.constraints = self._grammars.constraints(request.params, request.request.n)
        self._mailbox.request(partial(self._registry.add, request), partial(self._registry.refuse, request))

    def abort(self, request: EngineRequest, sample: int | None = None, reason: FinishReason = "abort") -> None:
        """End a request, or one sample of it. Harmless where it has ended; its batch under way is discarded."""
        self._mailbox.post(partial(self._registry.end, request, sample, reason))

    def join(self, port: AttentionPort, holder: Holder, credentials: Credentials | None = None) -> None:
        """One attention worker more, by the name of its port: new sequences use it, running ones grow there. With
        several ranks `holder` is that of rank 0, and the others connect with `credentials`."""
        self._worker.prepare(port)
        self._mailbox.post(partial(self._failures.join, port, holder, credentials))

    def leave(self, name: str) -> None:
        """An attention worker is gone. Harmless for one that has left already."""
        self._mailbox.post(partial(self._failures.leave, name))

    def rank_gone(self, rank: int, why: str, stays: bool) -> None:
        """A model worker beyond this one is gone, and comes back unless it `stays` away."""
        self._mailbox.post(partial(self._failures.rank_gone, rank, why, stays))

    def rank_back(self, peer: Peer) -> None:
        self._mailbox.post(lambda: self._stats.came_back(self._failures.rank_back(peer)))

    def drain(self, name: str) -> Future[int]:
        """Have an attention worker go once its KV has moved to the others, while all requests go on. The result is as
        `Drains.begin` says. Raises EngineError where the engine has stopped."""
        done: Future[int] = Future()
        self._mailbox.request(partial(self._drains.begin, name, done), partial(refuse, done))
        return done

    def leaving(self, name: str) -> None:
        """An attention worker is about to end: it is drained, where that is possible."""
        self._mailbox.post(partial(self._drains.leaving, name))

    def disclaim(self) -> None:
        """End the previous engine's requests for which no client has come back."""
        self._mailbox.post(self._registry.disclaim)

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        """Have the engine's thread call `sink` with a snapshot between two batches; never after the engine has
        stopped."""
        self._mailbox.post(partial(self._snapshot, sink))

    def look(self, look: Callable[[ControlPlane, EngineStats], None]) -> None:
        """Have the engine's thread call `look`, which must not raise, between two batches."""
        self._mailbox.post(partial(look, self._control, self._stats))

    def prefix_events(self, sink: PrefixSink) -> None:
        """Have the engine's thread call `sink` with each change of the prefix cache, first with all that is there."""
        cache = self._scheduler.running.prefix_cache
        self._mailbox.post(lambda: cache.events.listen(sink, cache))

    def close(self) -> None:
        """Stop after the batches under way; unfinished requests end with an EngineError."""
        self._mailbox.end()

    # The engine's thread.

    def recover(self, found: Mapping[KvLocation, RecoveredHolder], last_handle: int) -> tuple[EngineRequest, ...]:
        """As `RequestRegistry.recover`; no handle up to `last_handle` is given to others.

        Pages that sequences share would be counted for each of them. So holders with KV are asked how much room they
        have before anything is planned.
        """
        self._control.placement.number_from(last_handle, 0)
        requests = self._registry.recover(found)
        if requests:
            self._holders.ask_for_room(holder.number for holder in found.values())
            self._registry.rebuild()
        return requests

    def run(self) -> None:
        """Serve requests until `close`. Every torch call is made here."""
        self._stats.began = self._clock()
        cause: BaseException | None = None
        try:
            while self._read_mail():
                self.step()
        except BaseException as error:  # any error: no caller may wait for ever
            logger.exception("the engine stopped")
            cause = error
        self._mailbox.shut(cause)
        self._in_flight.close()
        self._masks.close()
        self._drains.give_up(self._mailbox.error())
        self._registry.stopped(self._mailbox.error)

    def _read_mail(self) -> bool:
        """Make the calls that came since the last batch; wait only where nothing else can be done. False: stop."""
        while True:
            if self._deadline.check():
                self._in_flight.full = False
            drains = self._drains.under_way
            moves = self._tiering.busy or self._spares.busy or drains
            work = self._control.has_work or moves
            stranded = bool(self._scheduler.admission.stranded) and not drains
            masks = self._masks.late > 0 and not moves
            served = not moves and not self._registry.requests  # what cannot be announced delays no request
            waits = self._in_flight.full and (self._holders.halted or stranded or masks or served)
            idle = not self._in_flight and (not work or waits)
            since = self._clock() if idle else 0.0
            try:
                do = self._mailbox.get(self._deadline.left() if idle else 0.0)
            except queue.Empty:
                if idle:
                    self._deadline.expire()
                elif moves or self._in_flight or not self._in_flight.full:
                    return True
                else:
                    self._stats.blocked += 1
                    self._failures.blocked()
                self._in_flight.full = False
                return True
            finally:
                if idle:
                    self._stats.idle_seconds += self._clock() - since
            if do is None:
                return False
            self._in_flight.full = False
            do()

    def _snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        snapshot = take_snapshot(
            self._stats,
            self._control,
            links=self._worker.links(),
            names=self._holders.names,
            attention_seconds=self._worker.attention_seconds,
            experts_read=self._worker.experts_read,
            local_share=self._tiering.local_share,
            now=self._clock(),
            drafts=self._drafting.counts,
            spared=[request.spared for request in self._registry.requests.values()],
            held_back=self._failures.held_back,
            kv_redundant=self._spares.share,
        )
        try:
            sink(snapshot)
        except Exception:  # any error of a client
            logger.exception("a client could not take its snapshot")

    # A batch.

    def step(self) -> None:
        """Begin batches where lanes are free, then go on with one whose reply has come, or that has waited longest."""
        if missing := self._worker.missing:
            self._failures.rank_missed(f"model worker {missing[0]} cannot be reached")
            self._in_flight.full = True
            return
        self._move()
        while len(self._in_flight) < self._control.tuner.lanes and not self._in_flight.full:
            since = self._clock()
            if self._drafting.on:
                self._drafting.propose(self._scheduler.decoding(self._control.tuner.lanes), self._registry, self._masks)
            step = self._control.plan(alone=not self._in_flight)
            self._stats.plan_seconds += self._clock() - since
            if step is None:
                self._in_flight.full = True
                break
            self._in_flight.add(Batch(self._parts, step))
        if self._in_flight:
            self._advance(self._in_flight.next())
        elif self._tiering.busy or self._spares.busy:
            self._move(waits=True)
            self._in_flight.full = False  # a copy may have left pages to ask for

    def _move(self, waits: bool = False) -> None:
        """Move sequences between holders, and let drained workers go. With `waits` there is nothing else to do. A copy
        is announced with all operations that wait, so too many go first."""
        if self._control.placement.overfull:
            self._in_flight.full = False
            return
        drains = self._drains.under_way
        if drains or self._tiering.busy:
            self._in_flight.full = False  # a move may have freed pages
        try:
            if drains:
                self._drains.step(self._in_flight.holders)
            self._tiering.step(waits)
            if self._spares.on and self._spares.step(waits):
                self._in_flight.full = False
        except HolderFault as fault:
            logger.warning("moving sequences failed: %s", fault)
            if not self._worker.missing and not self._worker.lost():
                self._drains.give_up(fault)
            self._failures.failed_outside()

    def _advance(self, batch: Batch) -> None:
        """Go on with a batch until it is over, or until it waits while there are others to go on with."""
        try:
            batch.waiting = next(batch.run)
            while len(self._in_flight) == 1 == self._control.tuner.lanes:
                batch.waiting = next(batch.run)
        except StopIteration:
            self._in_flight.over(batch)
        except HolderFault as fault:
            self._failures.failed(batch, fault)
