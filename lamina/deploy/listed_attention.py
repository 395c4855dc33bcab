"""Attention workers at given addresses, started by other programs: awaited, and taken again when they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lamina.deploy.restarts import Slot
from lamina.deploy.supervision import AttentionSupervisor, Worker
from lamina.deploy.worker_events import WorkerAddress
from lamina.system.progress import Progress
from lamina_protocols.channels import Credentials


class ListedWorkers(AttentionSupervisor[Worker]):
    """Workers at given addresses ("host:port"). They are neither started nor ended here.

    `answers(address)` says whether a worker takes connections there; it may take as long as `interval`, the seconds
    between two attempts. All are to answer within `timeout` seconds, or within `refused` where nothing listens at the
    port. `clock` is in seconds.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        credentials: Credentials | None,
        answers: Callable[[WorkerAddress], bool],
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

    def start(self, progress: Progress | None = None) -> tuple[WorkerAddress, ...]:
        self._began = self._clock()
        return super().start(progress)

    def _launch(self, slot: Slot[Worker]) -> Worker:
        address = WorkerAddress(slot.name, slot.base, self._credentials)
        if not self._answers(address):
            raise ConnectionError(f"no attention worker answers at {slot.base}")
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
                f"no attention worker answers at {missing} within {wait:g} s"
                f"{': nothing listens at that port' if refused else ''}; start one there "
                "with `lamina attention-worker --listen HOST:PORT`; a worker with TLS answers no client without it"
            )

    def _kill(self, worker: Worker) -> None:
        """The worker may still run; it is taken again when it answers."""
        slot = next(slot for slot in self._slots if slot.worker is worker)
        slot.worker, slot.due = None, self._clock() + self._interval
        slot.restarts += 1

    def _end(self, workers: Sequence[Worker]) -> None:
        """Other programs end them."""


def answers(worker: WorkerAddress, timeout: float = 2.0) -> bool:
    """Whether a worker answers within so many seconds. A refusal is an answer: connecting raises its reason. Raises
    ConnectionRefusedError where the host answers that nothing listens at the port."""
    from lamina_protocols.service import WorkerClient, WorkerRefused, WorkerUnreachable  # loads grpc

    with WorkerClient(worker.address, worker.credentials) as client:
        try:
            client.status(timeout)
        except WorkerUnreachable as error:
            if "Connection refused" in str(error):
                raise ConnectionRefusedError(str(error)) from error
            return False
        except WorkerRefused:
            return True
    return True
