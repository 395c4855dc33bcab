"""Model workers 1 and up as child processes of this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lamina.deploy.local_worker import LocalWorker
from lamina.deploy.restarts import Slot
from lamina.deploy.supervision import ModelSupervisor
from lamina.system.child_process import end_all, module_command
from lamina_protocols.channels.versions import PROTOCOL_VERSION, VARIABLE


class LocalModelWorkers(ModelSupervisor[LocalWorker]):
    """Model workers 1 to `count` - 1 in child processes, each with so many threads.

    `command(name, address)` is what runs one; it reads its secret, in hex, from its first line of input. One thread
    starts them all (`child_process` says why).
    """

    def __init__(
        self,
        count: int,
        *,
        threads: int,
        command: Callable[[str, str], Sequence[str]] | None = None,
    ) -> None:
        super().__init__(count)
        self._command = command or (lambda name, address: model_command(name, address, threads))

    def _launch(self, slot: Slot[LocalWorker]) -> LocalWorker:
        secret = self._invite(slot.number, slot.name)
        worker = LocalWorker(
            slot.name,
            self._command(slot.name, self._address),
            lambda worker: self._calls.put(lambda: self._ended(slot, worker.process.how(), worker.last_lines)),
            environment={VARIABLE: str(PROTOCOL_VERSION)},
        )
        worker.up = True
        worker.process.say(secret.hex())
        return worker

    def _kill(self, worker: LocalWorker) -> None:
        worker.process.kill()

    def _end(self, workers: Sequence[LocalWorker]) -> None:
        end_all(worker.process for worker in workers)


def model_command(name: str, address: str, threads: int) -> list[str]:
    """What runs one model worker that ends with this process."""
    return module_command(
        "lamina_workers.model_main", "--connect", address, "--name", name,
        "--threads", str(threads), "--die-with-parent",
    )  # fmt: skip
