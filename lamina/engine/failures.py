"""How an engine handles failed batches, lost holders and missing model workers, and how long requests wait.

Batches and moves that cannot go on are given up, and lost holders leave the register.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamina.engine.holders import HolderChange, Holders
from lamina.engine.in_flight import InFlight, Lane
from lamina.engine.request_registry import RequestRegistry
from lamina.engine.tiering import TierController
from lamina.errors import EngineError, LaminaError
from lamina.messages.engine_request import unwatched
from lamina.scheduling.holder import Holder
from lamina.scheduling.scheduler import Scheduler
from lamina_protocols.channels import Credentials
from lamina_workers.errors import HolderFault, HolderLost, RankLost
from lamina_workers.model_worker.interface import Workers
from lamina_workers.ports.port import AttentionPort

if TYPE_CHECKING:
    from lamina.engine.observers import BatchDone
    from lamina_workers.parallel.peers import Peer

logger = logging.getLogger("lamina")

MAX_FAULTS = 3  # batches in a row that fail at a holder, after which their requests end


def unlost(name: str) -> None:
    """The `lost` of an engine without attention workers."""


@dataclass(frozen=True, slots=True)
class FailureReports:
    """Callbacks of an engine's owner; neither may block. `lost` gets the name of each attention worker that is lost,
    `rebuilt` how many of how many lost tokens are computed again."""

    lost: Callable[[str], None] = unlost
    rebuilt: Callable[[int, int], None] = unwatched


class Failures:
    """Handles the failures of one engine. Everything is called between two steps of its batches."""

    def __init__(
        self,
        worker: Workers[Peer],
        scheduler: Scheduler,
        holders: Holders,
        tiering: TierController,
        in_flight: InFlight,
        registry: RequestRegistry,
        deadline: WaitDeadline,
        reports: FailureReports,
    ) -> None:
        self._worker = worker
        self._scheduler = scheduler
        self._holders = holders
        self._tiering = tiering
        self._in_flight = in_flight
        self._registry = registry
        self._deadline = deadline
        self._reports = reports
        self._faults = 0  # since a batch went well
        self._rebuild: tuple[int, int] | None = None  # tokens rebuilt before the last loss, and due since
        self._late: list[tuple[AttentionPort, Holder, Credentials | None]] = []  # came while a rank was missing

    # Batches.

    def went_well(self) -> None:
        """A batch is over, and no holder has failed in it."""
        self._faults = 0

    def batch_done(self, done: BatchDone) -> None:
        """Report how many lost tokens are computed again by now."""
        if self._rebuild is None:
            return
        before, due = self._rebuild
        rebuilt = self._scheduler.counters.rebuilt_tokens - before
        self._reports.rebuilt(min(rebuilt, due), due)
        if rebuilt >= due:
            logger.info("%d tokens of lost KV are computed again", due)
            self._rebuild = None

    def failed(self, lane: Lane, fault: HolderFault) -> None:
        """A batch cannot go on. Raises EngineError after too many failures in a row."""
        if isinstance(fault, RankLost):
            logger.warning("%s", fault)
            self._faults += 1
            if self._faults >= 3 * MAX_FAULTS and not self._worker.missing:
                raise EngineError(f"the model workers failed {self._faults} times in a row: {fault}") from fault
            self._halt()
        elif isinstance(fault, HolderLost) and (gone := self._worker.lost()):
            logger.warning("%s", fault)
            self._lose(gone)
        else:  # a pool in this process cannot be lost
            self.run_again(lane, fault)

    def run_again(self, lane: Lane, fault: HolderFault) -> None:
        """Plan the batch again. After MAX_FAULTS failures in a row its requests end, after three times as many the
        engine."""
        self._faults += 1
        logger.warning("a batch failed and runs again: %s", fault)
        self._in_flight.drop(lane)
        if self._faults % MAX_FAULTS == 0:
            for request_id in {row.sequence.request.id for row in lane.step.rows}:
                error = EngineError(f"a holder failed {MAX_FAULTS} times in a row: {fault}")
                if request := self._registry.requests.get(request_id):
                    self._registry.fail(request, error, fault)
        if self._faults >= 3 * MAX_FAULTS:
            raise EngineError(f"a holder failed {self._faults} times in a row: {fault}") from fault

    def failed_outside(self) -> None:
        """A holder failed outside of any batch: moves are given up, and batches where it, or a model worker, is
        gone."""
        self._tiering.abandon()
        if self._worker.missing:
            self._halt()
        elif gone := self._worker.lost():
            self._lose(gone)

    def _abandon(self) -> None:
        """Give up every batch and every move under way."""
        self._tiering.abandon()
        self._in_flight.abandon()

    # Holders.

    def join(self, port: AttentionPort, holder: Holder, credentials: Credentials | None) -> None:
        """One attention worker more; see `Engine.join`."""
        if self._worker.missing:  # a missing rank cannot connect to it yet
            self._late.append((port, holder, credentials))
            return
        try:
            self._holders.join(port, holder, credentials)
        except HolderFault as fault:  # another rank cannot connect to it
            logger.warning("%s", fault)
            port.close()
            self._reports.lost(port.name)

    def leave(self, name: str) -> None:
        """An attention worker is gone. Harmless for one that has left already."""
        if numbers := self._holders.numbers(name):
            self._lose(numbers)

    def _lose(self, numbers: list[int]) -> None:
        """Holders are gone, with their attention workers: their KV is rebuilt elsewhere, and the batches under way run
        again."""
        self._abandon()
        self._holders.lose(self._holders.companions(numbers))

    def drain(self, name: str, done: Future[int]) -> None:
        """Let an attention worker go after its KV has moved to the others. No batch may be under way."""
        self._tiering.abandon()
        try:
            done.set_result(self._holders.drain(name))
        except HolderFault as fault:
            done.set_exception(EngineError(f"{name} could not be drained: {fault}"))
            self.failed_outside()
        except LaminaError as error:
            done.set_exception(error)

    def holders_changed(self, change: HolderChange) -> None:
        """After a loss: note what is to be rebuilt, report the names, and start the wait where no holder is left."""
        if change.kind != "lost":
            return
        self._rebuild = (self._scheduler.counters.rebuilt_tokens, change.rebuilt) if change.rebuilt else None
        for name in change.names:
            self._reports.lost(name)
        if self._holders.empty:
            self._deadline.start()

    # Model workers.

    def rank_gone(self, rank: int, why: str, stays: bool) -> None:
        """A model worker is gone. Raises EngineError where it `stays` away and the engine needs it."""
        if rank not in self._worker.missing:  # a replica is not missed
            return
        if stays:
            raise EngineError(f"model worker {rank} is gone and stays away: {why}")
        if not self._deadline.started:
            self._halt()

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

    Two waits are timed. The engine is halted while no holder is left or a model worker is missing: `start` begins that
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

    @property
    def started(self) -> bool:
        """Whether the wait of a halted engine has begun."""
        return self._halted is not None

    def start(self) -> None:
        """The engine is halted. This wait has its full time, however long requests were stranded before."""
        self._halted = self._clock()

    def left(self) -> float | None:
        """Seconds that requests may still wait; None where no request waits for a holder."""
        since = self._stranded if self._halted is None else self._halted
        if since is None or not self._registry.requests:
            return None
        return max(0.0, since + self._timeout - self._clock())

    def check(self) -> bool:
        """Called between two batches. Whether requests were stranded for too long, and have ended."""
        if self._holders.halted:
            return False
        self._halted = None
        if not self._scheduler.admission.stranded:
            self._stranded = None
        elif self._stranded is None:
            self._stranded = self._clock()
        elif self._clock() > self._stranded + self._timeout:
            self.expire()
            return True
        return False

    def expire(self) -> None:
        """The time is over: end the requests that wait."""
        stranded = {sequence.request.id for sequence in self._scheduler.admission.stranded}
        for request in [r for r in self._registry.requests.values() if self._holders.halted or r.id in stranded]:
            self._registry.fail(request, EngineError(self._why()))

    def _why(self) -> str:
        if missing := self._holders.missing:
            return f"model worker {', '.join(map(str, missing))} has not come back for {self._timeout:g} s"
        left = "no attention worker is left" if self._holders.empty else "no holder that is left has room for this"
        return f"{left}, and none has joined for {self._timeout:g} s; start an attention worker and try again"
