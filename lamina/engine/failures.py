"""What goes wrong with holders and model workers, and who of them comes and goes, while batches are under way.

Gives up the batches and moves that cannot go on, has `Holders` do what is to be done about KV, and those told who want
to know. Knows nothing of what a batch does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

from lamina.engine.holders import Holders
from lamina.engine.in_flight import InFlight, Lane
from lamina.engine.request_registry import RequestRegistry
from lamina.engine.stats import EngineStats
from lamina.engine.tiering import TierController
from lamina.errors import EngineError, LaminaError
from lamina.scheduling.placement import Holder
from lamina.scheduling.scheduler import Scheduler
from lamina_protocols.channels import Credentials
from lamina_workers.errors import HolderFault, HolderLost, RankLost
from lamina_workers.model_worker.interface import Workers
from lamina_workers.ports.port import AttentionPort

if TYPE_CHECKING:
    from lamina_workers.parallel.peers import Peer

logger = logging.getLogger("lamina")

MAX_FAULTS = 3  # batches in a row that may fail at a holder before their requests do


class _Late(NamedTuple):
    """An attention worker that came while a rank was missing."""

    port: AttentionPort
    holder: Holder
    credentials: Credentials | None


class Failures:
    """For one engine; everything is called between two steps of its batches.

    `on_lost` is told the name of each attention worker that was given up, `on_rebuilt` how many of how many lost tokens
    have been computed again.
    """

    def __init__(
        self,
        worker: Workers[Peer],
        scheduler: Scheduler,
        fleet: Holders,
        tiers: TierController,
        batches: InFlight,
        clients: RequestRegistry,
        patience: WaitDeadline,
        tally: EngineStats,
        on_lost: Callable[[str], None] | None,
        on_rebuilt: Callable[[int, int], None],
    ) -> None:
        self._worker = worker
        self._scheduler = scheduler
        self._fleet = fleet
        self._tiers = tiers
        self._batches = batches
        self._clients = clients
        self._patience = patience
        self._tally = tally
        self._on_lost = on_lost
        self._on_rebuilt = on_rebuilt
        self._faults = 0  # since a batch went well
        self._rebuild: tuple[int, int] | None = None  # tokens computed again before the last loss, and due since
        self._late: list[_Late] = []

    # Batches.

    def went_well(self) -> None:
        """No holder has failed in a batch."""
        self._faults = 0

    def report_rebuilt(self) -> None:
        """A batch is recorded: perhaps some of its tokens were lost ones."""
        if self._rebuild is None:
            return
        before, due = self._rebuild
        done = self._scheduler.counters.rebuilt_tokens - before
        self._on_rebuilt(min(done, due), due)
        if done >= due:
            logger.info("%d tokens of lost KV are computed again", due)
            self._rebuild = None

    def failed(self, lane: Lane, fault: HolderFault) -> None:
        """A batch cannot go on. Raises EngineError where that has happened too often in a row."""
        if isinstance(fault, RankLost):
            logger.warning("%s", fault)
            self._faults += 1
            if self._faults >= 3 * MAX_FAULTS and not self._worker.missing:
                raise EngineError(f"the model workers failed {self._faults} times in a row: {fault}") from fault
            self._halt()
        elif isinstance(fault, HolderLost) and (gone := self._worker.lost()):
            logger.warning("%s", fault)
            self._lose(gone)
        else:  # also where it is the local one, which cannot be lost
            self.run_again(lane, fault)

    def run_again(self, lane: Lane, fault: HolderFault) -> None:
        """Plan the batch again; where that keeps failing give up its requests, and at last everything."""
        self._faults += 1
        self._tally.failed_batches += lane.answered.up
        logger.warning("a batch failed and runs again: %s", fault)
        if lane.answered.up:
            self._batches.drop(lane)
        else:  # something that had no reply of its own was lost: perhaps stored keys
            self._abandon()
        if self._faults % MAX_FAULTS == 0 and lane.plan is not None:
            for request_id in {row.sequence.request.id for row in lane.plan.rows}:
                error = EngineError(f"a holder failed {MAX_FAULTS} times in a row: {fault}")
                if ticket := self._clients.tickets.get(request_id):
                    self._clients.fail(ticket, error, fault)
        if self._faults >= 3 * MAX_FAULTS:
            raise EngineError(f"a holder failed {self._faults} times in a row: {fault}") from fault
        if not lane.answered.up:
            self._scheduler.recompute()

    def failed_outside(self) -> None:
        """A holder failed outside of any batch. Where it is not lost, it may have lost what it was to store."""
        self._abandon()
        if self._worker.missing:
            self._patience.miss()
        elif gone := self._worker.lost():
            self._lose(gone)
        else:
            self._scheduler.recompute()

    def _abandon(self) -> None:
        """Give up every batch under way, and every move."""
        self._tiers.abandon()
        self._batches.abandon()

    # Holders.

    def join(self, port: AttentionPort, holder: Holder, credentials: Credentials | None) -> None:
        """One attention worker more; see `Engine.join`."""
        if self._worker.missing:  # who could not use it yet
            self._late.append(_Late(port, holder, credentials))
            return
        try:
            self._fleet.join(port, holder, credentials)
        except HolderFault as fault:  # another rank cannot use it
            logger.warning("%s", fault)
            port.close()
            if self._on_lost is not None:
                self._on_lost(port.name)
            return
        self._tally.joined()
        self._tiers.changed()

    def leave(self, name: str) -> None:
        """An attention worker is known to be gone. Harmless where that was noticed already."""
        if numbers := [number for number, known in self._fleet.names.items() if known == name]:
            self._lose(numbers)

    def _lose(self, numbers: list[int]) -> None:
        """Holders are gone, and their attention workers with them: what those kept is rebuilt elsewhere, and the
        batches under way run again."""
        self._abandon()
        numbers = self._fleet.companions(numbers)
        names = list(dict.fromkeys(self._fleet.names[number] for number in numbers))
        self._tally.lost(names)
        due = self._fleet.lose(numbers)
        self._rebuild = (self._scheduler.counters.rebuilt_tokens, due) if due else None
        if self._on_lost is not None:
            for name in names:
                self._on_lost(name)
        self._tiers.changed()
        if self._fleet.empty:
            self._patience.miss()

    def drain(self, name: str, done: Future[int]) -> None:
        """Let an attention worker go once its KV has moved to the others. No batch may be under way."""
        self._tiers.abandon()
        try:
            done.set_result(self._fleet.drain(name))
            self._tiers.changed()
        except HolderFault as fault:
            done.set_exception(EngineError(f"{name} could not be drained: {fault}"))
            self.failed_outside()
        except LaminaError as error:
            done.set_exception(error)

    # Model workers.

    def rank_gone(self, rank: int, why: str, stays: bool) -> None:
        """A model worker is gone. Raises EngineError where it `stays` away and nothing goes on without it."""
        if rank not in self._worker.missing:  # a replica is not missed
            return
        if stays:
            raise EngineError(f"model worker {rank} is gone and stays away: {why}")
        if not self._patience.halted:
            self._halt()

    def _halt(self) -> None:
        """A rank is gone: nothing can be computed before it is back."""
        self._abandon()
        self._patience.miss()

    def rank_back(self, peer: Peer) -> None:
        """A rank is there again. Its seats at attention workers have what they had."""
        self._abandon()
        try:
            back = self._worker.returned(peer)
        except RankLost as loss:
            logger.warning("%s", loss)
            return
        self._fleet.emptied(back.pools)
        if gone := [*back.gone, *self._fleet.torn(back.kept)]:
            self._lose(gone)
        self._tally.returned += 1
        late, self._late = self._late, []
        for each in late:
            self.join(*each)


class WaitDeadline:
    """`hope` seconds at most, of the clock, from when it was missed; then they end with an error."""

    def __init__(
        self, hope: float, fleet: Holders, scheduler: Scheduler, clients: RequestRegistry, clock: Callable[[], float]
    ) -> None:
        self._hope = hope
        self._fleet = fleet
        self._scheduler = scheduler
        self._clients = clients
        self._clock = clock
        self._halted: float | None = None  # since when nobody can go on
        self._stranded: float | None = None  # since when some are stranded, while others go on

    @property
    def halted(self) -> bool:
        """Whether it is known that nobody can go on."""
        return self._halted is not None

    def miss(self) -> None:
        """From now on nobody can go on. It has all its time, however long some were stranded before."""
        self._halted = self._clock()

    def left(self) -> float | None:
        """Seconds that requests may still wait; None where they wait for nobody, or there are none."""
        since = self._stranded if self._halted is None else self._halted
        if since is None or not self._clients.tickets:
            return None
        return max(0.0, since + self._hope - self._clock())

    def look(self) -> bool:
        """To be called between batches. Those whom no holder can keep any more wait for one that can, while others go
        on. Whether that was too long, so that they have been given up."""
        if self._fleet.halted:
            return False
        self._halted = None
        if not self._scheduler.stranded:
            self._stranded = None
        elif self._stranded is None:
            self._stranded = self._clock()
        elif self._clock() > self._stranded + self._hope:
            self.despair()
            return True
        return False

    def despair(self) -> None:
        """Nobody has come in time: whoever waits for that is told."""
        stranded = {sequence.request.id for sequence in self._scheduler.stranded}
        for ticket in [t for t in self._clients.tickets.values() if self._fleet.halted or t.request.id in stranded]:
            self._clients.fail(ticket, EngineError(self._why()))

    def _why(self) -> str:
        if missing := self._fleet.missing:
            return f"model worker {', '.join(map(str, missing))} has not come back for {self._hope:g} s"
        left = "no attention worker is left" if self._fleet.empty else "no holder that is left has room for this"
        return f"{left}, and none has joined for {self._hope:g} s; start an attention worker and try again"
