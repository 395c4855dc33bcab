"""How long requests wait where nobody can go on with them: for a holder to join, or for a model worker to come back."""

from __future__ import annotations

from collections.abc import Callable

from lamina.clients import Clients
from lamina.errors import EngineError
from lamina.fleet import Fleet
from lamina.scheduling.scheduler import Scheduler


class Patience:
    """`hope` seconds at most, of the clock, from when it was missed; then they end with an error."""

    def __init__(
        self, hope: float, fleet: Fleet, scheduler: Scheduler, clients: Clients, clock: Callable[[], float]
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
