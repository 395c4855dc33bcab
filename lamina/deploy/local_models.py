"""Model workers beyond 0 as processes, whoever starts them: started, watched, started again, ended.

`LocalModelWorkers` has them as child processes of this one. Knows how one is run and when to try again. Knows nothing
of what a model worker does: it connects to the address that it is given.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from lamina.deploy.worker_events import Backoff, State, WorkerStatus, incarnation
from lamina.system.child_process import ChildProcess, end_all
from lamina_protocols.channels import Credentials

logger = logging.getLogger("lamina")

_MAX_LINE = 4096  # characters of a child's line that are kept
_TAIL = 12  # lines that an error shows

OnEnded = Callable[[int, str, str, bool], None]
"""Rank, process name, how it ended with what it said last, and whether it stays down."""


class ModelWorkerProcesses(Protocol):
    """The processes of model workers 1 and up of one engine.

    Model worker 0 listens for them at `host` and shows `credentials`; None: at a Unix socket, to nobody else.
    """

    host: str | None
    credentials: Credentials | None

    def start(self, address: str, invite: Callable[[int, str], bytes], on_ended: OnEnded) -> None:
        """Have all started, each to connect to `address` with the secret that `invite(rank, name)` gives. Whichever
        ends is told to `on_ended`, and started again after a while under another name, unless it does so too often.
        Both are called on one thread of the members'. Returns at once."""

    def lost(self, name: str) -> None:
        """The engine has given this process up: it is ended, if it is still there. Unknown names are ignored."""

    def status(self) -> tuple[WorkerStatus, ...]:
        """Every place as it stands, in order."""

    def close(self) -> None:
        """End all. Harmless the second time."""


def process_name(rank: int, restarts: int) -> str:
    """What the process of a model worker is called."""
    return incarnation(f"model-{rank}", restarts)


class _Ended(NamedTuple):
    process: ChildProcess


class _Lost(NamedTuple):
    name: str


_Event: TypeAlias = _Ended | _Lost | None
"""What the supervising thread waits for; None asks it to end."""


@dataclass(eq=False)
class _Place:
    """Room for one rank: who is there, or when the next one starts (None: never)."""

    rank: int
    backoff: Backoff = field(default_factory=Backoff)
    process: ChildProcess | None = None
    due: float | None = 0.0
    restarts: int = 0
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL))

    @property
    def name(self) -> str:
        return process_name(self.rank, self.restarts)


class LocalModelWorkers:
    """Model workers 1 to `count` - 1 in child processes, each with so many threads.

    `command(name, address)` is what runs one; the secret is the first line that it hears. `clock` is in seconds. One
    thread starts them all (`child_process` says why).
    """

    host: str | None = None
    credentials: Credentials | None = None

    def __init__(
        self,
        count: int,
        *,
        threads: int,
        command: Callable[[str, str], Sequence[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = command or (lambda name, address: model_command(name, address, threads))
        self._clock = clock
        self._places = [_Place(rank) for rank in range(1, count)]
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._supervise, name="lamina-model-members", daemon=True)

    def start(self, address: str, invite: Callable[[int, str], bytes], on_ended: OnEnded) -> None:
        self._address, self._invite, self._on_ended = address, invite, on_ended
        self._thread.start()

    def lost(self, name: str) -> None:
        self._events.put(_Lost(name))

    def status(self) -> tuple[WorkerStatus, ...]:
        return tuple(self._status(place) for place in self._places)

    def close(self) -> None:
        self._events.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    @staticmethod
    def _status(place: _Place) -> WorkerStatus:
        process = place.process
        state: State = "up" if process is not None else "given up" if place.due is None else "lost"
        return WorkerStatus(place.name, None, state, place.restarts, None if process is None else process.pid)

    # The supervising thread.

    def _supervise(self) -> None:
        try:
            while True:
                self._start_due()
                try:
                    event = self._events.get(timeout=self._until_next())
                except queue.Empty:
                    continue
                match event:
                    case None:
                        return
                    case _Ended(process):
                        for place in self._places:
                            if place.process is process:
                                self._ended(place, process)
                    case _Lost(name):
                        for place in self._places:
                            if place.process is not None and place.name == name:
                                place.process.kill()
        except Exception as error:  # whoever waits must hear of it
            logger.exception("the model workers are no longer watched")
            for place in self._places:
                self._on_ended(place.rank, place.name, f"it is no longer watched: {error}", True)
        finally:
            end_all(place.process for place in self._places if place.process is not None)
            for place in self._places:
                place.process, place.due = None, None

    def _start_due(self) -> None:
        now = self._clock()
        for place in self._places:
            if place.process is None and place.due is not None and place.due <= now:
                place.tail.clear()
                secret = self._invite(place.rank, place.name)
                try:
                    place.process = ChildProcess(
                        place.name,
                        self._command(place.name, self._address),
                        lambda process, line, place=place: self._said(place, line),  # type: ignore[misc]
                        lambda process: self._events.put(_Ended(process)),
                        hears_errors=True,
                    )
                except OSError as error:
                    self._down(place, f"it cannot be started: {error}")
                    continue
                place.process.say(secret.hex())

    @staticmethod
    def _said(place: _Place, line: str) -> None:
        """On a thread of the child's."""
        place.tail.append(line[:_MAX_LINE].rstrip())
        logger.info("%s: %s", place.name, line[:_MAX_LINE].rstrip())

    def _until_next(self) -> float | None:
        """Seconds until a start is due; None: never."""
        times = [place.due for place in self._places if place.process is None and place.due is not None]
        return max(0.0, min(times) - self._clock()) if times else None

    def _ended(self, place: _Place, process: ChildProcess) -> None:
        place.process = None
        self._down(place, "\n  ".join([process.how(), *place.tail]))

    def _down(self, place: _Place, how: str) -> None:
        name, now = place.name, self._clock()
        delay = place.backoff.delay(now)
        place.due = None if delay is None else now + delay
        place.restarts += 1
        then = "too often: it stays down" if delay is None else f"it starts again in {delay:g} s"
        why, *said = how.split("\n")
        logger.warning("%s", "\n".join([f"{name} ended, {why}; {then}", *said]))
        self._on_ended(place.rank, name, how, delay is None)


def model_command(name: str, address: str, threads: int) -> list[str]:
    """What runs one model worker that ends with this process."""
    return [
        sys.executable, "-m", "lamina_workers.model_main", "--connect", address, "--name", name,
        "--threads", str(threads), "--die-with-parent",
    ]  # fmt: skip
