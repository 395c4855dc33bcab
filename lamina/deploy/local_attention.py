"""Attention workers as child processes of this one, on loopback: started, watched, started again, ended.

Knows what they print. Knows nothing of what a worker does. One thread starts them all (`child_process` says why).
"""

from __future__ import annotations

import logging
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from lamina.deploy.worker_events import (
    WAITING,
    Backoff,
    MembershipEvents,
    OnJoined,
    OnLeft,
    State,
    WorkerAddress,
    WorkerStatus,
    incarnation,
)
from lamina.errors import EngineError
from lamina.system.child_process import ChildProcess, end_all
from lamina.system.progress import Progress
from lamina_protocols.channels import Credentials

logger = logging.getLogger("lamina")

_LISTENING = re.compile(r"listening (\S+:\d+)")
_MAX_LINE = 4096  # characters of a child's line that are kept
_TAIL = 12  # lines that an error shows


class _Said(NamedTuple):
    process: ChildProcess
    line: str


class _Ended(NamedTuple):
    process: ChildProcess


class _Lost(NamedTuple):
    name: str


_Event: TypeAlias = _Said | _Ended | _Lost | None
"""What the supervising thread waits for; None asks it to end."""


@dataclass(eq=False)
class _Child:
    """One process. `deadline` is when it must have said where it listens, None once nobody waits for that."""

    place: int
    name: str
    process: ChildProcess
    deadline: float | None
    address: str | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL))
    given_up: bool = False  # the engine does not want it any more: nobody is told of its end


@dataclass
class _Place:
    """Room for one worker: who is there, or when the next one starts (None: never)."""

    name: str
    backoff: Backoff
    child: _Child | None = None
    due: float | None = 0.0
    restarts: int = 0


class LocalAttentionWorkers:
    """`count` attention workers in child processes, each with `kv_memory` bytes of KV and so many threads.

    `devices` names that of each, where it is not the CPU. `command(name)` is what runs a worker; it gets
    `--token-file FILE` at its end, and must print `listening HOST:PORT` within `timeout` seconds.
    """

    def __init__(
        self,
        count: int,
        *,
        kv_memory: int,
        threads: int,
        devices: Sequence[str] = (),
        command: Callable[[str], Sequence[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        timeout: float = 60.0,
    ) -> None:
        self._kv_memory = kv_memory
        self._devices = devices
        self._token = secrets.token_urlsafe(32)  # loopback is open to every user of this host
        self._command = command or (lambda name: attention_command(name, kv_memory, threads))
        self._clock = clock
        self._timeout = timeout
        self._places = [_Place(f"attention-{index}", Backoff()) for index in range(count)]
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._news = MembershipEvents()
        self._progress: Progress | None = None
        self._started = threading.Event()  # all are up, or it failed
        self._failure: EngineError | None = None
        self._thread = threading.Thread(target=self._supervise, name="lamina-members", daemon=True)

    def start(self, progress: Progress | None = None) -> tuple[WorkerAddress, ...]:
        self._progress = progress
        self._thread.start()
        try:
            self._started.wait()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if self._failure is not None:
            self.close()
            raise self._failure
        return tuple(self._member(place.child) for place in self._places if place.child is not None)

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        self._news.listen(on_joined, on_left)
        self._events.put(_Lost(""))  # wakes the thread, which tells what is kept

    def lost(self, name: str) -> None:
        self._events.put(_Lost(name))

    def status(self) -> tuple[WorkerStatus, ...]:
        return tuple(self._status(place) for place in self._places)

    def close(self) -> None:
        self._events.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _status(self, place: _Place) -> WorkerStatus:
        child = place.child
        if child is None:
            state: State = "given up" if place.due is None else "lost"
            return WorkerStatus(place.name, None, state, place.restarts)
        state = "starting" if child.address is None else "up"
        return WorkerStatus(child.name, child.address, state, place.restarts, child.process.pid)

    # The supervising thread.

    def _supervise(self) -> None:
        try:
            while self._failure is None:
                self._start_due()
                try:
                    event = self._events.get(timeout=self._until_next())
                except queue.Empty:
                    self._end_silent()
                    continue
                if event is None:
                    break
                self._take(event)
                self._news.deliver()
        except EngineError as error:
            self._failure = error
        except Exception as error:  # the children must end, and whoever waits must hear of it
            logger.exception("the attention workers are no longer watched")
            self._failure = EngineError(f"cannot run the attention workers: {error}")
            self._failure.__cause__ = error
        finally:
            self._end_all()
            if not self._started.is_set():
                self._failure = self._failure or EngineError("closed while the attention workers were starting")
                self._started.set()

    def _take(self, event: _Said | _Ended | _Lost) -> None:
        if isinstance(event, _Said):
            self._heard(self._child(event.process), event.line)
        elif isinstance(event, _Ended):
            self._ended(self._child(event.process))
        else:
            for place in self._places:
                if place.child is not None and place.child.name == event.name:
                    place.child.given_up = True
                    place.child.process.kill()

    def _start_due(self) -> None:
        now = self._clock()
        for index, place in enumerate(self._places):
            if place.child is None and place.due is not None and place.due <= now:
                name = incarnation(place.name, place.restarts)
                try:
                    place.child = self._spawn(index, name)
                except OSError as error:
                    if not self._started.is_set():
                        raise EngineError(f"cannot start {name}: {error}") from error
                    self._plan_restart(place, f"cannot start {name}: {error}")

    def _spawn(self, index: int, name: str) -> _Child:
        with _readable(self._token) as descriptor:
            process = ChildProcess(
                name,
                [*self._command(name), *self._placed(index), "--token-file", f"/dev/fd/{descriptor}"],
                self._said,
                self._gone,
                pass_fds=[descriptor],
                hears_errors=True,
            )
        return _Child(index, name, process, self._clock() + self._timeout)

    def _placed(self, index: int) -> list[str]:
        return ["--device", self._devices[index]] if self._devices else []

    # On a thread of the child's.

    def _said(self, process: ChildProcess, line: str) -> None:
        self._events.put(_Said(process, line[:_MAX_LINE]))

    def _gone(self, process: ChildProcess) -> None:
        self._events.put(_Ended(process))

    def _until_next(self) -> float | None:
        """Seconds until something is due without an event; None: never."""
        times = [place.due for place in self._places if place.child is None and place.due is not None]
        times += [p.child.deadline for p in self._places if p.child is not None and p.child.deadline is not None]
        return max(0.0, min(times) - self._clock()) if times else None

    def _end_silent(self) -> None:
        now = self._clock()
        for place in self._places:
            child = place.child
            if child is not None and child.deadline is not None and child.deadline <= now:
                child.tail.append(f"it did not say where it listens within {self._timeout:g} s")
                child.deadline = None
                child.process.kill()

    def _child(self, process: ChildProcess) -> _Child:
        return next(p.child for p in self._places if p.child is not None and p.child.process is process)

    def _heard(self, child: _Child, line: str) -> None:
        if child.address is None and (match := _LISTENING.fullmatch(line.strip())):
            self._listening(child, match[1])
        else:
            child.tail.append(line.rstrip())
            logger.info("%s: %s", child.name, line.rstrip())

    def _listening(self, child: _Child, address: str) -> None:
        child.address, child.deadline = address, None
        logger.info("%s: process %d at %s", child.name, child.process.pid, address)
        if self._started.is_set():
            self._news.joined(self._member(child))
            return
        up = sum(place.child is not None and place.child.address is not None for place in self._places)
        if self._progress is not None:
            self._progress(WAITING, up, len(self._places))
        if up == len(self._places):
            self._started.set()

    def _ended(self, child: _Child) -> None:
        place = self._places[child.place]
        place.child = None
        if not self._started.is_set():
            tail = "\n  ".join(["", *child.tail])
            self._failure = EngineError(f"{child.name} did not start, {child.process.how()}{tail}")
            return
        if child.address is not None and not child.given_up:
            self._news.left(child.name)
        said = f", having said: {' | '.join(child.tail)}" if child.address is None else ""
        self._plan_restart(place, f"{child.name} ended, {child.process.how()}{said}")

    def _plan_restart(self, place: _Place, why: str) -> None:
        place.restarts += 1
        now = self._clock()
        delay = place.backoff.delay(now)
        place.due = None if delay is None else now + delay
        then = "too often: it stays down" if delay is None else f"it starts again in {delay:g} s"
        logger.warning("%s; %s", why, then)

    def _member(self, child: _Child) -> WorkerAddress:
        return WorkerAddress(child.name, child.address or "", Credentials(token=self._token), self._kv_memory)

    def _end_all(self) -> None:
        end_all(place.child.process for place in self._places if place.child is not None)
        for place in self._places:
            place.child, place.due = None, None


def attention_command(name: str, kv_memory: int, threads: int) -> list[str]:
    """What runs one worker that ends with this process."""
    return [
        sys.executable, "-m", "lamina_workers.attention_main", "--listen", "127.0.0.1:0", "--name", name,
        "--kv-memory", str(kv_memory), "--threads", str(threads), "--die-with-parent",
    ]  # fmt: skip


@contextmanager
def _readable(text: str) -> Iterator[int]:
    """A descriptor from which a child can read `text`: no file is left behind, however this process ends."""
    reading, writing = os.pipe()
    try:
        os.write(writing, text.encode())  # far less than a pipe holds
        os.close(writing)
        yield reading
    finally:
        os.close(reading)
