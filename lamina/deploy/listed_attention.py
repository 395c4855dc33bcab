"""Attention workers at given addresses, started by other programs: awaited, and taken again when they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lamina.deploy.supervision import AttentionSupervisor, Slot, Worker
from lamina.deploy.worker_events import WorkerAddress
from lamina.system.progress import Progress
from lamina_protocols.channels.channels import Credentials


class ListedWorkers(AttentionSupervisor[Worker]):
    """Workers at given addresses ("host:port"). They are neither started nor ended here.

    `answers(address)` gives the seconds since the start of the worker at that address, None where no worker answers; it
    may take as long as `interval`, the seconds between two attempts. A worker that was drained is not taken again, but
    the next process at its address is. `credentials` are asked for before each attempt. All are to answer within
    `timeout` seconds, or within `refused` where nothing listens at the port. `clock` is in seconds.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        credentials: Callable[[], Credentials | None],
        answers: Callable[[WorkerAddress], float | None],
        clock: Callable[[], float],
        timeout: float = 30.0,
        refused: float = 10.0,
        interval: float = 2.0,
    ) -> None:
        super().__init__(len(addresses), clock)
        for slot, address in zip(self._slots, addresses, strict=True):
            slot.base = address
        self._credentials = credentials
        self._answers = answers
        self._timeout = timeout
        self._refused = min(refused, timeout)
        self._interval = interval
        self._drained_at: dict[str, float] = {}  # by address: since when a worker has been drained there

    def drained(self, name: str) -> None:
        self._calls.put(lambda: self._await_next(name))

    def start(self, progress: Progress | None = None) -> tuple[WorkerAddress, ...]:
        self._began = self._clock()
        return super().start(progress)

    def _launch(self, slot: Slot[Worker]) -> Worker:
        address = WorkerAddress(slot.name, slot.base, self._credentials(), place=slot.base)
        age = self._answers(address)
        if age is None:
            raise ConnectionError("no answer")
        if slot.base in self._drained_at and age >= self._clock() - self._drained_at[slot.base]:
            raise ConnectionError(f"the attention worker that was drained still answers at {slot.base}")
        self._drained_at.pop(slot.base, None)
        worker = Worker()
        self._calls.put(lambda: self._joined(worker, address))
        return worker

    def _not_launched(self, slot: Slot[Worker], error: OSError) -> None:
        now, starting = self._clock(), not self._started.is_set()
        slot.due = now + (min(0.2, self._interval) if starting else self._interval)
        refused = isinstance(error, ConnectionRefusedError)
        wait = self._refused if refused else self._timeout
        if starting and now >= self._began + wait:
            missing = ", ".join(slot.base for slot in self._slots if slot.worker is None)
            self._fail(
                f"no attention worker answers at {missing} within {wait:g} s: "
                f"{'nothing listens at that port' if refused else error}; start one there "
                "with `lamina attention-worker --listen HOST:PORT`; a worker with TLS answers no client without it"
            )

    def _kill(self, worker: Worker) -> None:
        """The worker may still run; it is taken again when it answers."""
        slot = next(slot for slot in self._slots if slot.worker is worker)
        slot.worker, slot.due = None, self._clock() + self._interval
        slot.restarts += 1

    def _dismiss(self, worker: Worker) -> None:
        """The program that started it ends it."""

    def _await_next(self, name: str) -> None:
        for slot in self._slots:
            if slot.worker is not None and slot.name == name:
                self._drained_at[slot.base] = self._clock()
                self._kill(slot.worker)

    def _end(self, workers: Sequence[Worker]) -> None:
        """Other programs end them."""


def answers(worker: WorkerAddress, timeout: float = 2.0) -> float | None:
    """The seconds since a worker's start, None where no worker answers within `timeout`. A refusal is an answer, of a
    new worker: connecting raises its reason. Raises ConnectionRefusedError where the host answers that nothing listens
    at the port, ConnectionError where the two ends cannot agree on TLS."""
    from lamina_protocols.channels.grpc_client import WorkerClient, WorkerRefused, WorkerUnreachable  # loads grpc

    with WorkerClient(worker.address, worker.credentials) as client:
        try:
            return client.status(timeout).uptime
        except WorkerUnreachable as error:
            if "Connection refused" in str(error):
                raise ConnectionRefusedError(str(error)) from error
            if "TLS" in str(error):
                raise ConnectionError(str(error)) from error
            return None
        except WorkerRefused:
            return 0.0
