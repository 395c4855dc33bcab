"""The workers of an engine as it meets them, however they are run: addresses, states, joins, ends.

An engine is given its attention workers as `AttentionWorkers`, its model workers as a `ModelSupervisor`
(`supervision.py`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from lamina.system.progress import Progress
from lamina_protocols.channels.channels import Credentials

logger = logging.getLogger("lamina")

WAITING = "attention workers"  # the name of this stage in reports of progress

State = Literal["starting", "up", "lost", "given up"]


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """One attention worker that can be connected to. A name is never used twice: a restarted worker has another.

    `address` is "host:port". `credentials` are a client's, None where the worker takes any client that can reach it.
    `capacity` is its KV memory in bytes, None where only the handshake tells. `place` is what it shares with those
    before and after it: a slot, a machine or an address; "" for its name.
    """

    name: str
    address: str
    credentials: Credentials | None = None
    capacity: int | None = None
    place: str = ""

    @property
    def at(self) -> str:
        """By what its failures are counted."""
        return self.place or self.name


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One slot for a worker as it stands. `name` is that of the worker, or of the next one where there is none.
    `restarts` counts over the slot's whole life; `process` is a process id on the worker's host."""

    name: str
    address: str | None
    state: State
    restarts: int = 0
    process: int | None = None


OnJoined = Callable[[WorkerAddress], None]
OnLeft = Callable[[str], None]
OnEnded = Callable[[int, str, str, bool], None]
"""Rank, process name, how the process ended with its last lines of output, and whether it stays down."""


class AttentionWorkers(Protocol):
    """The attention workers of one engine. `optional`: it starts without any, too, and others may join later."""

    optional: bool

    def start(self, progress: Progress | None = None) -> tuple[WorkerAddress, ...]:
        """Bring all of them up, or none: raises EngineError, in bounded time, with what stood in the way."""

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        """From now on report each worker that joins or leaves (by name), and first what happened since `start`.

        Both are called on one thread, which they must not hold up.
        """

    def lost(self, name: str) -> None:
        """The engine has given this worker up. Its process is ended, if it is ours, and the engine does not get its
        end as an event. The next worker of the slot joins as usual. Unknown names are ignored."""

    def grow(self, count: int) -> None:
        """Have so many workers: those that lack are started, and join as usual. Returns at once."""

    def retire(self, name: str) -> None:
        """The engine has drained this worker: its process ends, none is started in its place, and the engine does not
        get its end as an event. Unknown names are ignored. Returns at once."""

    def drained(self, name: str) -> None:
        """The engine has let this worker go, with nothing of its KV left there. A later process in its place joins as
        usual. Unknown names are ignored."""

    def status(self) -> tuple[WorkerStatus, ...]:
        """Every slot as it stands, in order."""

    def close(self) -> None:
        """End the workers that were started here, and the watching. Harmless the second time."""


class MembershipEvents:
    """Workers that joined or left, which wait until there is a listener. `joined`, `left` and `deliver` are for one
    thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[WorkerAddress | str] = []
        self._listeners: tuple[OnJoined, OnLeft] | None = None

    def listen(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        """Have all events go to these two. Events that wait go with the next event, or with `deliver`."""
        with self._lock:
            self._listeners = (on_joined, on_left)

    def joined(self, worker: WorkerAddress) -> None:
        self._events.append(worker)
        self.deliver()

    def left(self, name: str) -> None:
        self._events.append(name)
        self.deliver()

    def deliver(self) -> None:
        """Pass on the events that wait, in order, if there is a listener."""
        with self._lock:
            listeners = self._listeners
        if listeners is None:
            return
        on_joined, on_left = listeners
        while self._events:
            event = self._events.pop(0)
            try:
                on_joined(event) if isinstance(event, WorkerAddress) else on_left(event)
            except Exception:  # the other workers must still be watched
                logger.exception("a change of attention workers could not be taken")
