"""What happens in a scenario, as data. `World` does it."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from typing import Protocol

from .proxy import Toxic
from .server import gone, until
from .world import World

HEALED = Toxic()


class Event(Protocol):
    def happen(self, world: World) -> None:
        """Do it; return once it is over. Raises TimeoutError where the service does not do its part in time."""


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float

    def happen(self, world: World) -> None:
        time.sleep(self.seconds)


@dataclass(frozen=True, slots=True)
class WaitUntilWhole:
    """Until the server is healthy and has all its attention workers."""

    def happen(self, world: World) -> None:
        until(world.whole, world.server)


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal to processes of a role, at once: those with these numbers, in the order of `World.processes`."""

    role: str
    number: signal.Signals = signal.SIGKILL
    which: tuple[int, ...] = (0,)

    def happen(self, world: World) -> None:
        world.send(self.role, self.which, self.number)


@dataclass(frozen=True, slots=True)
class TellToGo:
    """SIGTERM to a process of a role, until it has gone."""

    role: str
    which: int = 0

    def happen(self, world: World) -> None:
        process = world.processes(self.role)[self.which]
        world.send(self.role, (self.which,), signal.SIGTERM)
        until(lambda: gone(process), world.server)


@dataclass(frozen=True, slots=True)
class SlowDown:
    """A process runs for a share of the time only, for so many seconds."""

    role: str
    share: float
    seconds: float
    which: int = 0

    def happen(self, world: World) -> None:
        world.slow_down(self.role, self.which, self.share, self.seconds)


@dataclass(frozen=True, slots=True)
class Network:
    """The way to a worker is spoilt for so many seconds. Needs workers behind proxies."""

    toxic: Toxic
    seconds: float
    which: int = 0

    def happen(self, world: World) -> None:
        world.spoil(self.which, self.toxic)
        time.sleep(self.seconds)
        world.spoil(self.which, HEALED)


@dataclass(frozen=True, slots=True)
class SpoilData:
    """The data channel of a worker over TCP is spoilt until the server's log says something. Needs workers behind
    proxies."""

    toxic: Toxic
    says: str
    which: int = 0

    def happen(self, world: World) -> None:
        world.spoil(self.which, self.toxic, data_alone=True)
        until(lambda: self.says in world.server.log, world.server)
        world.spoil(self.which, HEALED)


@dataclass(frozen=True, slots=True)
class ResetConnections:
    """Every connection to a worker ends, without a word. Needs workers behind proxies."""

    which: int = 0

    def happen(self, world: World) -> None:
        world.reset(self.which)


@dataclass(frozen=True, slots=True)
class FillDisk:
    """No file of the processes of a role grows any more."""

    role: str

    def happen(self, world: World) -> None:
        world.limit_files(self.role, 0)


@dataclass(frozen=True, slots=True)
class ReplaceAll:
    """One worker after the other is told to go (SIGTERM) and followed by a new one at its address, which the service
    has taken up before the next one goes. Needs workers at addresses."""

    def happen(self, world: World) -> None:
        for which in range(world.setup.workers):
            world.replace(which)
            until(world.whole, world.server)


@dataclass(frozen=True, slots=True)
class Join:
    """A machine joins. Needs --allow-join."""

    name: str = "den"

    def happen(self, world: World) -> None:
        world.join(self.name)


@dataclass(frozen=True, slots=True)
class Leave:
    """A machine that joined leaves in order."""

    name: str = "den"

    def happen(self, world: World) -> None:
        world.leave(self.name)


@dataclass(frozen=True, slots=True)
class ClientsCome:
    """So many clients more stream at the same time, until the service has so many attention workers; then they go."""

    count: int
    workers: int

    def happen(self, world: World) -> None:
        world.clients.come(self.count)
        try:
            until(lambda: world.workers() == self.workers, world.server)
        finally:
            world.clients.go()


@dataclass(frozen=True, slots=True)
class Expect:
    """From now on a service is whole with so many attention workers."""

    workers: int

    def happen(self, world: World) -> None:
        world.expected = self.workers


@dataclass(frozen=True, slots=True)
class KillAgain:
    """SIGKILL at a process of a role, so many times, each once the service has it again."""

    role: str
    times: int

    def happen(self, world: World) -> None:
        for _ in range(self.times):
            until(world.whole, world.server)
            world.send(self.role, (0,), signal.SIGKILL)
            until(lambda: not world.whole(), world.server)


@dataclass(frozen=True, slots=True)
class ClientsLeave:
    """So many clients close their connections in the middle of a stream."""

    count: int

    def happen(self, world: World) -> None:
        world.clients.leave(self.count)
