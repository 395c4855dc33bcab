"""Attention workers at given addresses, started by other programs: awaited, and taken again when they answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from lamina.deploy.restarts import incarnation
from lamina.deploy.worker_events import WAITING, MembershipEvents, OnJoined, OnLeft, WorkerAddress, WorkerStatus
from lamina.errors import EngineError
from lamina.system.progress import Progress
from lamina_protocols.channels import Credentials


class ListedWorkers:
    """Workers at given addresses ("host:port"). They are neither started nor ended here.

    `answers(address)` says whether a worker takes connections there; it may take as long as `interval`, the seconds
    between two attempts. All are to answer within `timeout` seconds. `clock` is in seconds.
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
        self._addresses = [WorkerAddress(address, address, credentials) for address in addresses]
        self._restarts = [0] * len(addresses)
        self._up = [False] * len(addresses)
        self._answers = answers
        self._clock = clock
        self._timeout = timeout
        self._interval = interval
        self._membership = MembershipEvents()
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
                    "with `lamina attention-worker --listen HOST:PORT`; a worker with TLS answers no client without it"
                )
            if self._closed.wait(min(0.2, self._interval)):
                raise EngineError("closed while waiting for the attention workers")
        if progress is not None:
            progress(WAITING, len(self._up), len(self._up))
        self._thread = threading.Thread(target=self._watch, name="lamina-attention-workers", daemon=True)
        self._thread.start()
        return tuple(self._addresses)

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        self._membership.listen(on_joined, on_left)

    def lost(self, name: str) -> None:
        with self._lock:
            for index, worker in enumerate(self._addresses):
                if worker.name == name:
                    self._up[index] = False

    def status(self) -> tuple[WorkerStatus, ...]:
        with self._lock:
            return tuple(
                WorkerStatus(worker.name, worker.address, "up" if up else "lost", restarts)
                for worker, up, restarts in zip(self._addresses, self._up, self._restarts, strict=True)
            )

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _try_missing(self) -> list[str]:
        """The addresses that still do not answer."""
        missing = []
        for index, worker in enumerate(self._addresses):
            if not self._up[index]:
                self._up[index] = self._answers(worker)
                if not self._up[index]:
                    missing.append(worker.address)
        return missing

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            for index in [index for index, up in enumerate(self._up) if not up]:
                if self._answers(self._addresses[index]):
                    self._membership.joined(self._rejoined(index))
            self._membership.deliver()

    def _rejoined(self, index: int) -> WorkerAddress:
        old = self._addresses[index]
        with self._lock:
            self._restarts[index] += 1
            name = incarnation(old.address, self._restarts[index])
            self._addresses[index] = WorkerAddress(name, old.address, old.credentials)
            self._up[index] = True
            return self._addresses[index]


def answers(worker: WorkerAddress, timeout: float = 2.0) -> bool:
    """Whether a worker answers within so many seconds. A refusal is an answer: connecting raises its reason."""
    from lamina_protocols.service import WorkerClient, WorkerRefused, WorkerUnreachable  # loads grpc

    with WorkerClient(worker.address, worker.credentials) as client:
        try:
            client.status(timeout)
        except WorkerUnreachable:
            return False
        except WorkerRefused:
            return True
    return True
