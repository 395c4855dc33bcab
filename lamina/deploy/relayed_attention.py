"""Attention workers that another process runs, and tells of. Knows names and addresses; knows not how it is told."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable

from lamina.deploy.worker_events import MembershipEvents, OnJoined, OnLeft, WorkerAddress, WorkerStatus
from lamina.errors import WorkersUnavailable
from lamina.system.progress import Progress

_WORKERS_UP = 120.0  # seconds


class RelayedWorkers:
    """`members.Members` for an engine whose workers somebody else starts. `on_lost` gets the name of each that the
    engine has given up. The methods that tell are for any thread."""

    def __init__(self, on_lost: Callable[[str], None]) -> None:
        self._on_lost = on_lost
        self._first: queue.SimpleQueue[tuple[WorkerAddress, ...] | None] = queue.SimpleQueue()
        self._there: dict[str, WorkerAddress] | None = None  # None until the first are told
        self._news = MembershipEvents()
        self._lock = threading.Lock()

    def start(self, progress: Progress | None = None) -> tuple[WorkerAddress, ...]:
        """Wait for the first. Raises WorkersUnavailable where nobody tells of any in time."""
        try:
            members = self._first.get(timeout=_WORKERS_UP)
        except queue.Empty:
            raise WorkersUnavailable(f"no attention workers within {_WORKERS_UP:g} s") from None
        if not members:
            raise WorkersUnavailable("no attention worker is up")
        return members

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        self._news.listen(on_joined, on_left)
        with self._lock:
            self._news.deliver()

    def lost(self, name: str) -> None:
        self._on_lost(name)

    def status(self) -> tuple[WorkerStatus, ...]:
        return ()

    def close(self) -> None:
        self._first.put(None)

    # What it is told.

    def there(self, members: Iterable[WorkerAddress]) -> None:
        """These are there now. The first time they are what `start` waits for; later whoever is new has joined, and
        whoever is missing has left."""
        now = {member.name: member for member in members}
        with self._lock:
            before, self._there = self._there, now
            if before is None:
                self._first.put(tuple(now.values()))
                return
            for name in before.keys() - now.keys():
                self._news.left(name)
            for name in now:
                if name not in before:
                    self._news.joined(now[name])
            self._news.deliver()

    def joined(self, member: WorkerAddress) -> None:
        """One more is there."""
        self.there([*(self._there or {}).values(), member])

    def left(self, name: str) -> None:
        """One is gone."""
        self.there([member for member in (self._there or {}).values() if member.name != name])
