"""Attention workers as the engine meets them, whoever runs them: they are there, they join, they leave.

Knows names, addresses, and when to try again. Knows no process, no socket, no Ray, and nothing of what a worker does.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lamina.errors import EngineError
from lamina.system.progress import Progress
from lamina_protocols.channels import Credentials

logger = logging.getLogger("lamina")

WAITING = "attention workers"  # what progress is told while they come up

_FIRST_DELAY = 0.5  # seconds before a worker is started again; it doubles with each restart of the last minute
_MOST_RESTARTS = 6  # of one worker in a minute; after that it stays down
_WINDOW = 60.0  # seconds that a restart counts

State = Literal["starting", "up", "lost", "given up"]


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """One attention worker that can be connected to. A name is never used twice: a restarted worker has another.

    `address` is "host:port". `credentials` are a client's, None where it takes anybody who can reach it. `capacity` is
    its KV memory in bytes, None where only the handshake tells.
    """

    name: str
    address: str
    credentials: Credentials | None = None
    capacity: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One place for a worker, and who is there now. `restarts` counts over its whole life; `process` is a process id
    on this host, None where it runs elsewhere or not at all."""

    name: str
    address: str | None
    state: State
    restarts: int = 0
    process: int | None = None


OnJoined = Callable[[WorkerAddress], None]
OnLeft = Callable[[str], None]


class AttentionWorkers(Protocol):
    """The attention workers of one engine."""

    def start(self, progress: Progress | None = None) -> tuple[WorkerAddress, ...]:
        """Bring all of them up, or none: raises EngineError, in bounded time, with what stood in the way."""

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        """From now on tell who comes and who goes (by name), and first what happened since `start`.

        Both are called on one thread of the members', which they must not hold up.
        """

    def lost(self, name: str) -> None:
        """The engine has given this one up: whoever is still there under that name is ended or left alone, and a
        successful new start, or an address that answers again, is told as joined. Unknown names are ignored."""

    def status(self) -> tuple[WorkerStatus, ...]:
        """Every place as it stands, in order."""

    def close(self) -> None:
        """End those that were started, and the watching. Harmless the second time."""


class MembershipEvents:
    """Who came and who went, kept until somebody listens. `joined` and `left` are for one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[WorkerAddress | str] = []
        self._listeners: tuple[OnJoined, OnLeft] | None = None

    def listen(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        with self._lock:
            self._listeners = (on_joined, on_left)

    def joined(self, member: WorkerAddress) -> None:
        self._kept.append(member)

    def left(self, name: str) -> None:
        self._kept.append(name)

    def deliver(self) -> None:
        """Tell what is kept, in order, if anybody listens."""
        with self._lock:
            listeners = self._listeners
        if listeners is None:
            return
        on_joined, on_left = listeners
        while self._kept:
            item = self._kept.pop(0)
            try:
                on_joined(item) if isinstance(item, WorkerAddress) else on_left(item)
            except Exception:  # whatever the listener does wrong, the others must still be watched
                logger.exception("a change of attention workers could not be taken")


class Backoff:
    """How long to wait before one worker is started again, so that one that cannot live does not take the machine."""

    def __init__(self) -> None:
        self._restarts: deque[float] = deque()

    def delay(self, now: float) -> float | None:
        """Seconds from `now` (of any steady clock) to the next start, which is counted; None: too many, give up."""
        while self._restarts and self._restarts[0] <= now - _WINDOW:
            self._restarts.popleft()
        if len(self._restarts) >= _MOST_RESTARTS:
            return None
        seconds = _FIRST_DELAY * 2.0 ** len(self._restarts)
        self._restarts.append(now)
        return seconds


def incarnation(name: str, restarts: int) -> str:
    """The name of a worker after so many restarts."""
    return name if restarts == 0 else f"{name}.{restarts}"


class ListedWorkers:
    """Workers that somebody else started, at given addresses ("host:port"). They are neither started nor ended here.

    `answers(member)` says whether a worker takes connections there; it may take as long as `interval`, the seconds
    between two tries. `clock` is in seconds.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        credentials: Credentials | None,
        answers: Callable[[WorkerAddress], bool],
        clock: Callable[[], float],
        timeout: float = 30.0,
        interval: float = 2.0,
    ) -> None:
        self._members = [WorkerAddress(address, address, credentials) for address in addresses]
        self._restarts = [0] * len(addresses)
        self._up = [False] * len(addresses)
        self._answers = answers
        self._clock = clock
        self._timeout = timeout
        self._interval = interval
        self._news = MembershipEvents()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, progress: Progress | None = None) -> tuple[WorkerAddress, ...]:
        deadline = self._clock() + self._timeout
        while missing := self._try_missing():
            if progress is not None:
                progress(WAITING, len(self._up) - len(missing), len(self._up))
            if self._clock() >= deadline:
                raise EngineError(
                    f"no attention worker answers at {', '.join(missing)} within {self._timeout:g} s; start one there "
                    "with `lamina attention-worker --listen HOST:PORT`; one that speaks TLS answers nobody who does not"
                )
            if self._closed.wait(min(0.2, self._interval)):
                raise EngineError("closed while waiting for the attention workers")
        if progress is not None:
            progress(WAITING, len(self._up), len(self._up))
        self._thread = threading.Thread(target=self._watch, name="lamina-members", daemon=True)
        self._thread.start()
        return tuple(self._members)

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        self._news.listen(on_joined, on_left)

    def lost(self, name: str) -> None:
        with self._lock:
            for index, member in enumerate(self._members):
                if member.name == name:
                    self._up[index] = False

    def status(self) -> tuple[WorkerStatus, ...]:
        with self._lock:
            return tuple(
                WorkerStatus(member.name, member.address, "up" if up else "lost", restarts)
                for member, up, restarts in zip(self._members, self._up, self._restarts, strict=True)
            )

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _try_missing(self) -> list[str]:
        """The addresses that still do not answer."""
        missing = []
        for index, member in enumerate(self._members):
            if not self._up[index]:
                self._up[index] = self._answers(member)
                if not self._up[index]:
                    missing.append(member.address)
        return missing

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            for index in [index for index, up in enumerate(self._up) if not up]:
                if self._answers(self._members[index]):
                    self._news.joined(self._rejoined(index))
            self._news.deliver()

    def _rejoined(self, index: int) -> WorkerAddress:
        old = self._members[index]
        with self._lock:
            self._restarts[index] += 1
            name = incarnation(old.address, self._restarts[index])
            self._members[index] = WorkerAddress(name, old.address, old.credentials)
            self._up[index] = True
            return self._members[index]


def answers(member: WorkerAddress, timeout: float = 2.0) -> bool:
    """Whether a worker is there within so many seconds. One that refuses is there: connecting to it will say why."""
    from lamina_protocols.service import WorkerClient, WorkerRefused, WorkerUnreachable  # grpc, once it is needed

    with WorkerClient(member.address, member.credentials) as client:
        try:
            client.status(timeout)
        except WorkerUnreachable:
            return False
        except WorkerRefused:
            return True
    return True
