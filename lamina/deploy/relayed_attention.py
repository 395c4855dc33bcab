"""Attention workers that another process runs; their joins and ends are relayed to this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable

from lamina.deploy.worker_events import MembershipEvents, OnJoined, OnLeft, WorkerAddress, WorkerStatus
from lamina.errors import WorkersUnavailable
from lamina.system.progress import Progress

_WORKERS_UP = 120.0  # seconds


class RelayedWorkers:
    """An `AttentionWorkers` for an engine whose workers another process starts. `tell` is how that process gets to know
    what the engine wants: ("lost", name), ("grow", count), ("retire", name). `drains` has the names of workers that
    want to go; the engine's owner takes them. `there`, `joined` and `left` are for any thread."""

    def __init__(self, tell: Callable[[str, str | int], object], optional: bool = False) -> None:
        self.optional = optional
        self.drains: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._tell = tell
        self._first: queue.SimpleQueue[tuple[WorkerAddress, ...] | None] = queue.SimpleQueue()
        self._there: dict[str, WorkerAddress] | None = None  # None before the first call of `there`
        self._membership = MembershipEvents()
        self._lock = threading.Lock()

    def start(self, progress: Progress | None = None) -> tuple[WorkerAddress, ...]:
        """Wait for the first call of `there`. Raises WorkersUnavailable where none comes in time, or has no worker and
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
        self._tell("lost", name)

    def grow(self, count: int) -> None:
        self._tell("grow", count)

    def retire(self, name: str) -> None:
        self._tell("retire", name)

    def drained(self, name: str) -> None:
        """Nothing to do: the other process notices the worker's end."""

    def status(self) -> tuple[WorkerStatus, ...]:
        return ()

    def close(self) -> None:
        self._first.put(None)

    # Calls of the relaying side.

    def there(self, workers: Iterable[WorkerAddress]) -> None:
        """These workers are there now. `start` waits for the first call; later a new worker has joined, and a missing
        one has left."""
        now = {worker.name: worker for worker in workers}
        with self._lock:
            before, self._there = self._there, now
            if before is None:
                self._first.put(tuple(now.values()))
                return
            for name in before.keys() - now.keys():
                self._membership.left(name)
            for name in now:
                if name not in before:
                    self._membership.joined(now[name])

    def joined(self, worker: WorkerAddress) -> None:
        """One more is there."""
        self.there([*(self._there or {}).values(), worker])

    def left(self, name: str) -> None:
        """One is gone."""
        self.there([worker for worker in (self._there or {}).values() if worker.name != name])
