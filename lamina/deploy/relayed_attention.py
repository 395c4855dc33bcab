"""Attention workers of one process for an engine in another, which may be another engine the next minute.

The owner of the workers has an `AttentionRelay`: it sends the engine which workers are there. The engine has
`RelayedWorkers`, and sends what it wants of them as a `Wish`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from lamina.deploy.worker_events import (
    AttentionWorkers,
    MembershipEvents,
    OnJoined,
    OnLeft,
    WorkerAddress,
    WorkerStatus,
)
from lamina.errors import WorkersUnavailable
from lamina.system.progress import Progress

_WORKERS_UP = 120.0  # seconds
_WORKERS_BACK = 10.0  # seconds that a restarted engine waits for all attention workers; then some are enough
_AGAIN = 1.0  # seconds until the next look for workers, where none is there


@dataclass(frozen=True, slots=True)
class Lost:
    """The engine has given up a worker."""

    name: str


@dataclass(frozen=True, slots=True)
class Grow:
    """The engine wants so many workers."""

    count: int


@dataclass(frozen=True, slots=True)
class Retire:
    """The engine has drained a worker, which is not needed any more."""

    name: str


@dataclass(frozen=True, slots=True)
class Drained:
    """A worker that was asked to go is drained, or cannot be."""

    name: str


Wish: TypeAlias = Lost | Grow | Retire | Drained
"""What an engine sends the owner of its attention workers."""


class AttentionRelay:
    """The owner's side: the workers of `pool`, and others that join, for one engine after the other.

    A new engine gets the workers once `count` are there, or some after a while; later it gets them with each change.
    The engine may have the pool grow up to `limit` workers. They are the owner's, and stay when another engine comes.
    For one thread.
    """

    def __init__(self, count: int, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.due: float | None = None  # when an engine that waits gets the workers that are there
        self._count = count
        self._limit = limit
        self._clock = clock
        self._pool: AttentionWorkers | None = None
        self._up = False  # the first start is over
        self._workers: dict[str, WorkerAddress] = {}
        self._send: Callable[[tuple[WorkerAddress, ...]], object] | None = None  # to the engine that there is

    @property
    def introduced(self) -> bool:
        """Whether there is an engine that has the workers."""
        return self._up and self._send is not None and self.due is None

    def begin(self, pool: AttentionWorkers | None, workers: Iterable[WorkerAddress]) -> None:
        """The pool is up, with these workers."""
        self._up, self._pool = True, pool
        self._workers |= {worker.name: worker for worker in workers}
        self.serve(self._send)

    def serve(self, send: Callable[[tuple[WorkerAddress, ...]], object] | None) -> None:
        """A new engine, which gets the workers by `send`; None: there is none for now."""
        self._send = send
        self.due = self._clock() + _WORKERS_BACK if self._up and send is not None else None
        self.introduce()

    def introduce(self) -> None:
        """Send a new engine the workers that are there, if it is time."""
        if self.due is None:
            return
        now = self._clock()
        if len(self._workers) >= self._count or (self._workers and now >= self.due):
            self.due = None
            self.update()
        elif now >= self.due:
            self.due = now + _AGAIN

    def update(self) -> None:
        """Send the engine the workers that are there, unless it still waits for them."""
        if self.introduced and self._send is not None:
            self._send(tuple(self._workers.values()))

    def has(self, name: str) -> bool:
        """Whether there is an engine that has this worker."""
        return self.introduced and name in self._workers

    def joined(self, worker: WorkerAddress) -> None:
        """A worker is there."""
        self._workers[worker.name] = worker
        self.introduce() if self.due is not None else self.update()

    def left(self, name: str) -> None:
        """A worker is gone."""
        if self._workers.pop(name, None) is not None:
            self.update()

    def take(self, wish: Wish) -> None:
        """The engine wants something of the workers, or has drained one."""
        if isinstance(wish, Grow):
            if self._pool is not None and wish.count > self._count:
                self._count = min(wish.count, self._limit)
                self._pool.grow(self._count)
            return
        worker = self._workers.pop(wish.name, None)  # the engine does not use it any more
        if isinstance(wish, Lost):
            if self._pool is not None:
                self._pool.lost(wish.name)
        elif worker is not None:
            self._count -= 1
            if isinstance(wish, Retire) and self._pool is not None:
                self._pool.retire(wish.name)


class RelayedWorkers:
    """The engine's side: an `AttentionWorkers` whose workers another process starts. `tell` sends that process what the
    engine wants of them. `drains` has the names of workers that are to go; the process of the engine takes them.
    `update` is for any thread."""

    def __init__(self, tell: Callable[[Wish], object], optional: bool = False) -> None:
        self.optional = optional
        self.drains: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._tell = tell
        self._first: queue.SimpleQueue[tuple[WorkerAddress, ...] | None] = queue.SimpleQueue()
        self._workers: dict[str, WorkerAddress] | None = None  # None before the first call of `update`
        self._membership = MembershipEvents()
        self._lock = threading.Lock()

    def start(self, progress: Progress | None = None) -> tuple[WorkerAddress, ...]:
        """Wait for the first call of `update`. Raises WorkersUnavailable where none comes in time, or has no worker and
        one is needed."""
        try:
            workers = self._first.get(timeout=_WORKERS_UP)
        except queue.Empty:
            raise WorkersUnavailable(f"no attention workers within {_WORKERS_UP:g} s") from None
        if workers is None or not (workers or self.optional):
            raise WorkersUnavailable("no attention worker is up")
        return workers

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        self._membership.listen(on_joined, on_left)
        with self._lock:
            self._membership.deliver()

    def lost(self, name: str) -> None:
        self._tell(Lost(name))

    def grow(self, count: int) -> None:
        self._tell(Grow(count))

    def retire(self, name: str) -> None:
        self._tell(Retire(name))

    def drained(self, name: str) -> None:
        """Nothing to do: the other process notices the worker's end."""

    def status(self) -> tuple[WorkerStatus, ...]:
        return ()

    def close(self) -> None:
        self._first.put(None)

    def update(self, workers: Iterable[WorkerAddress]) -> None:
        """The workers that are there now. `start` waits for the first call; later a new worker has joined, and a
        missing one has left."""
        now = {worker.name: worker for worker in workers}
        with self._lock:
            before, self._workers = self._workers, now
            if before is None:
                self._first.put(tuple(now.values()))
                return
            for name in before.keys() - now.keys():
                self._membership.left(name)
            for name in now:
                if name not in before:
                    self._membership.joined(now[name])
