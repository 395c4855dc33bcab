"""How an engine handles failed batches, lost holders and missing model workers, and how long requests wait.

Batches and moves that cannot go on are given up, lost holders leave the register, and a request that makes its batches
fail ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lamina.engine.batch import Batch
from lamina.engine.holders import HolderChange, Holders
from lamina.engine.in_flight import InFlight
from lamina.engine.request_registry import RequestRegistry
from lamina.errors import EngineError
from lamina.kv.placement import Holder
from lamina.kv.request import PlannedRow
from lamina.scheduling.blame import TRIES
from lamina.scheduling.scheduler import Scheduler
from lamina_protocols.channels.channels import Credentials
from lamina_workers.errors import HolderFault, HolderLost, RankLost
from lamina_workers.model_worker.interface import Workers
from lamina_workers.ports.port import AttentionPort

if TYPE_CHECKING:
    from lamina.engine.observers import BatchDone
    from lamina_workers.parallel.peers import Peer

logger = logging.getLogger("lamina")

MAX_IN_VAIN = 8  # requests that end for their failures, and no batch goes well, after which the engine is doubted


@dataclass(frozen=True, slots=True)
class FailureReports:
    """Callbacks of an engine's owner; none may block. `lost` gets the name of each attention worker that is lost,
    `drained` that of each that was let go empty, `rebuilt` how many of how many lost tokens are computed again, `room`
    how many tokens one sequence can have, once lost workers are back, now that one has joined or has gone for good.
    `held_back` gives the attention workers that are there and not used, and why: see `Snapshot`."""

    lost: Callable[[str], None] | None = None
    rebuilt: Callable[[int, int], None] | None = None
    room: Callable[[int], None] | None = None
    drained: Callable[[str], None] | None = None
    held_back: Callable[[], Mapping[str, str]] | None = None


class Copier(Protocol):
    """A part of the engine that copies KV between batches."""

    def abandon(self) -> None:
        """Give up what is under way: the next epoch begins."""


class Failures:
    """Handles the failures of one engine. Everything is called between two steps of its batches."""

    def __init__(
        self,
        worker: Workers[Peer],
        scheduler: Scheduler,
        *,
        holders: Holders,
        copiers: Sequence[Copier],
        in_flight: InFlight,
        registry: RequestRegistry,
        deadline: WaitDeadline,
        reports: FailureReports,
    ) -> None:
        self._worker = worker
        self._scheduler = scheduler
        self._holders = holders
        self._copiers = copiers
        self._in_flight = in_flight
        self._registry = registry
        self._deadline = deadline
        self._reports = reports
        self._in_vain = 0  # see `_failed_in_vain`; since a batch was computed
        self._rebuild: tuple[int, int] | None = None  # tokens rebuilt before the last loss, and due since
        self._late: list[tuple[AttentionPort, Holder, Credentials | None]] = []  # came while a rank was missing

    @property
    def held_back(self) -> Mapping[str, str]:
        """The attention workers that are there and not used, and why."""
        return {} if self._reports.held_back is None else self._reports.held_back()

    # Batches.

    def batch_done(self, done: BatchDone) -> None:
        """A batch was computed: report how many lost tokens are computed again by now."""
        self._in_vain = 0
        if self._rebuild is None:
            return
        before, due = self._rebuild
        rebuilt = self._scheduler.counters.rebuilt_tokens - before
        if self._reports.rebuilt is not None:
            self._reports.rebuilt(min(rebuilt, due), due)
        if rebuilt >= due:
            logger.info("%d tokens of lost KV are computed again", due)
            self._rebuild = None

    def failed(self, batch: Batch, fault: HolderFault) -> None:
        """A batch cannot go on. It runs again, unless one of its requests is found to be to blame, and ends. Raises
        EngineError where the engine is to blame."""
        trace = None if isinstance(fault, (HolderLost, RankLost)) else fault.__cause__  # a death is no bug
        logger.warning("a batch failed and runs again: %s", fault, exc_info=trace)
        rows: Sequence[PlannedRow] = batch.step.rows
        if isinstance(fault, RankLost):
            rows = self._in_flight.rows()
            self._halt()
        elif isinstance(fault, HolderLost) and (lost := [*self._worker.lost(), *fault.holders]):
            # Where the books contradict the holders, the books may be wrong. Holders that vanish are no sign of that,
            # however many do.
            if self._lose(lost, fault) and fault.holders:
                self._failed_in_vain(fault)
            return
        else:  # a pool in this process cannot be lost
            self._in_flight.drop(batch)
        if self._blame(rows, fault) or (not rows and not self._worker.missing):
            self._failed_in_vain(fault)

    def _blame(self, rows: Sequence[PlannedRow], fault: HolderFault) -> bool:
        """These rows were in batches that failed. The request that is to blame ends with an error, once it is known.
        Returns whether it is."""
        culprit = self._scheduler.blame.failed(rows)
        if culprit is None or not (request := self._registry.of(culprit)):
            return False
        why = f"{TRIES} batches in a row failed with this request, the last of it alone: {fault}"
        self._registry.fail(request, EngineError(why), fault)
        return True

    def _failed_in_vain(self, fault: Exception) -> None:
        """A request has ended for its failures, or a batch without requests has failed. Any number of requests may be
        bad, so a batch without any is tried: no holder counts the failures of bad requests against it once that goes
        well. Where it fails too, or cannot be, too many times, the engine ends."""
        self._in_vain += 1
        # What a batch of one token would not find: no batch can be planned, or the books contradict the holders.
        wrong_books = not isinstance(fault, HolderFault) or (isinstance(fault, HolderLost) and fault.holders)
        if not (wrong_books or self._worker.missing) and self._holders.probe() is None:
            self._in_vain = 0
        elif self._in_vain >= MAX_IN_VAIN:
            raise EngineError(f"no batch goes well any more, {self._in_vain} requests were tried: {fault}") from fault

    def blocked(self) -> None:
        """There is work, but no batch under way, none that can be planned, and nothing that is waited for. So the
        scheduler is wrong, and would be so for ever. The request for which the others may wait ends."""
        running, foremost = len(self._scheduler.running), self._scheduler.foremost
        why = f"no batch can be planned and nothing is waited for, with {running} running sequences"
        if foremost is None or not (request := self._registry.of(foremost)):
            raise EngineError(why)
        logger.error("request %s cannot go on, and ends: %s", request.id, why)
        self._registry.fail(request, error := EngineError(f"this request cannot go on: {why}"))
        self._failed_in_vain(error)

    def failed_outside(self) -> None:
        """A holder failed outside of any batch: moves are given up, and batches where it, or a model worker, is
        gone."""
        self._abandon_copies()
        if self._worker.missing:
            self._halt()
        elif lost := self._worker.lost():
            self._lose(lost)

    def _abandon(self) -> None:
        """Give up every batch and every move under way."""
        self._abandon_copies()
        self._in_flight.abandon()

    def _abandon_copies(self) -> None:
        for copier in self._copiers:
            copier.abandon()

    # Holders.

    def join(self, port: AttentionPort, holder: Holder, credentials: Credentials | None) -> None:
        if self._worker.missing:  # a missing rank cannot connect to it yet
            self._late.append((port, holder, credentials))
            return
        try:
            self._holders.join(port, holder, credentials)
        except HolderFault as fault:  # another rank cannot connect to it
            logger.warning("%s", fault)
            port.close()
            self._report_lost((port.name,))

    def leave(self, name: str) -> None:
        """An attention worker is gone. Harmless for one that has left already."""
        if numbers := self._holders.numbers(name):
            self._lose(numbers)

    def _lose(self, numbers: list[int], fault: HolderFault | None = None) -> bool:
        """Holders are gone, with their attention workers: their KV is rebuilt elsewhere, and the batches under way run
        again. A row of theirs may have been the reason. Returns whether a request has ended for it."""
        numbers = self._holders.companions(numbers)
        rows = self._in_flight.rows(numbers)
        self._abandon()
        self._holders.lose(numbers)
        return self._blame(rows, fault or HolderLost("an attention worker is gone"))

    def holders_changed(self, change: HolderChange) -> None:
        """After a loss: note what is to be rebuilt, report the names, and start the wait where no holder is left. What
        is lost may come back, so there is as much room as before."""
        if change.kind != "lost":
            if self._reports.room is not None:
                self._reports.room(self._scheduler.admission.most_hoped())
            if change.kind == "drained" and self._reports.drained is not None:
                for name in change.names:
                    self._reports.drained(name)
            return
        self._rebuild = (self._scheduler.counters.rebuilt_tokens, change.rebuilt) if change.rebuilt else None
        self._report_lost(change.names)
        if self._holders.empty:
            self._deadline.start()

    def _report_lost(self, names: Iterable[str]) -> None:
        if self._reports.lost is not None:
            for name in names:
                self._reports.lost(name)

    # Model workers.

    def rank_gone(self, rank: int, why: str, stays: bool) -> None:
        """A model worker is gone. Raises EngineError where it `stays` away and the engine needs it."""
        if rank not in self._worker.missing:  # a replica is not missed
            return
        if stays:
            raise EngineError(f"model worker {rank} is gone and stays away: {why}")
        self.rank_missed(f"model worker {rank} is gone: {why}")

    def rank_missed(self, why: str) -> None:
        """A needed model worker cannot be reached: its process may stand still, so that no end of it is told."""
        if not self._deadline.started:
            rows = self._in_flight.rows()
            self._halt()
            if self._blame(rows, fault := RankLost(why)):
                self._failed_in_vain(fault)

    def _halt(self) -> None:
        """A needed rank is gone: nothing can be computed before it is back."""
        self._abandon()
        self._deadline.start()

    def rank_back(self, peer: Peer) -> bool:
        """A rank is there again; its seats at attention workers have kept their KV. False where it is gone again."""
        self._abandon()
        try:
            back = self._worker.returned(peer)
        except RankLost as loss:
            logger.warning("%s", loss)
            return False
        self._holders.emptied(back.pools)
        if back.gone:
            self._lose(back.gone)
        late, self._late = self._late, []
        for joining in late:
            self.join(*joining)
        return True


class WaitDeadline:
    """Ends requests with an error after they have waited for `timeout` seconds of the clock.

    Two waits are timed. The engine is halted while no holder is there or a model worker is missing: `start` begins that
    wait. While the engine goes on, single requests may be stranded, which no holder can keep: `check` sees that.
    """

    def __init__(
        self,
        timeout: float,
        holders: Holders,
        scheduler: Scheduler,
        registry: RequestRegistry,
        clock: Callable[[], float],
    ) -> None:
        self._timeout = timeout
        self._holders = holders
        self._scheduler = scheduler
        self._registry = registry
        self._clock = clock
        self._halted: float | None = None  # since when the engine is halted
        self._stranded: float | None = None  # since when requests are stranded
        self._full = False  # the holders that are there cannot keep a single token

    @property
    def started(self) -> bool:
        return self._halted is not None

    @property
    def hopeless(self) -> bool:
        """Whether no request can be served before a holder joins or a model worker comes back. For any thread."""
        return self.started or self._full

    def start(self) -> None:
        """The engine is halted. This wait has its full time, however long requests were stranded before."""
        self._halted = self._clock()

    def left(self) -> float | None:
        """Seconds that requests may still wait; None where no request waits for a holder. Called where nothing can be
        computed."""
        self._look()
        since = self._stranded if self._halted is None else self._halted
        if since is None or not self._registry.requests:
            return None
        return max(0.0, since + self._timeout - self._clock())

    def check(self) -> bool:
        """Called between two batches. Whether requests were stranded for too long, and have ended."""
        if self._holders.halted:
            if self._holders.empty and not self.started:  # none has joined yet, or all that are there are to go
                self.start()
            return False
        self._halted = None
        if self._full:
            self._look()
        if not self._scheduler.admission.stranded:
            self._stranded = None
        elif self._stranded is None:
            self._stranded = self._clock()
        elif self._clock() > self._stranded + self._timeout:
            self.expire()
            return True
        return False

    def _look(self) -> None:
        self._full = not self._scheduler.admission.longest_possible()

    def expire(self) -> None:
        """The time is over: end the requests that wait."""
        stranded = {sequence.request.id for sequence in self._scheduler.admission.stranded}
        for request in [r for r in self._registry.requests.values() if self._holders.halted or r.id in stranded]:
            self._registry.fail(request, EngineError(self._why()))

    def _why(self) -> str:
        if missing := self._holders.missing:
            return f"model worker {', '.join(map(str, missing))} has not come back for {self._timeout:g} s"
        reason = "no attention worker is left" if self._holders.empty else "no attention worker has room for this"
        return f"{reason}, and none has joined for {self._timeout:g} s; start an attention worker and try again"
