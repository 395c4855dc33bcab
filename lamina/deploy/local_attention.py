"""Attention workers as child processes of this one, on loopback."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lamina.deploy.local_worker import LocalWorker
from lamina.deploy.restarts import Slot
from lamina.deploy.supervision import AttentionSupervisor
from lamina.deploy.worker_events import WorkerAddress
from lamina.system.child_process import end_all, module_command
from lamina_protocols.channels.channels import Credentials
from lamina_protocols.messages.layers import ColdTier

_LISTENING = re.compile(r"listening (\S+:\d+)")


class LocalAttentionWorkers(AttentionSupervisor[LocalWorker]):
    """`count` attention workers in child processes, each with `kv_memory` bytes of KV and so many threads; up to `most`
    where more are asked for.

    `devices` names that of each, where it is not the CPU; `cold` is where KV goes that nobody reads. `command(name)` is
    what runs a worker; it gets `--token-file FILE` at its end, and must print `listening HOST:PORT` within `timeout`
    seconds. A standby takes no memory for KV. One thread starts them all (`child_process` says why).
    """

    keeps_standby = True  # the start of a process takes seconds of a core

    def __init__(
        self,
        count: int,
        *,
        kv_memory: int,
        threads: int,
        most: int | None = None,
        devices: Sequence[str] = (),
        cold: ColdTier | None = None,
        command: Callable[[str], Sequence[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        timeout: float = 60.0,
    ) -> None:
        super().__init__(count, clock, most=most)
        self._kv_memory = kv_memory
        self._devices = devices
        self._token = secrets.token_urlsafe(32)  # loopback is open to every user of this host
        self._command = command or (lambda name: attention_command(name, kv_memory, threads, cold))
        self._timeout = timeout

    def _launch(self, slot: Slot[LocalWorker]) -> LocalWorker:
        with _readable(self._token) as descriptor:
            return LocalWorker(
                slot.name,
                [*self._command(slot.name), *self._placed(slot.number), "--token-file", f"/dev/fd/{descriptor}"],
                lambda worker: self._calls.put(lambda: self._process_ended(slot, worker)),
                takes=lambda worker, line: self._takes(slot, worker, line),
                pass_fds=[descriptor],
                deadline=self._clock() + self._timeout,
            )

    def _placed(self, index: int) -> list[str]:
        return ["--device", self._devices[index]] if self._devices else []

    def _takes(self, slot: Slot[LocalWorker], worker: LocalWorker, line: str) -> bool:
        """On a thread of the child's."""
        match = _LISTENING.fullmatch(line.strip())
        if match is None:
            return False
        address = WorkerAddress(slot.name, match[1], Credentials(token=self._token), self._kv_memory, slot.base)
        self._calls.put(lambda: self._joined(worker, address))
        return True

    def _process_ended(self, slot: Slot[LocalWorker], worker: LocalWorker) -> None:
        self._ended(slot, worker.process.how(), () if worker.up else worker.last_lines)

    def _overdue(self, slot: Slot[LocalWorker], worker: LocalWorker) -> None:
        worker.last_lines.append(f"it did not say where it listens within {self._timeout:g} s")
        self._kill(worker)

    def _kill(self, worker: LocalWorker) -> None:
        worker.process.kill()

    def _dismiss(self, worker: LocalWorker) -> None:
        worker.process.terminate()

    def _end(self, workers: Sequence[LocalWorker]) -> None:
        end_all(worker.process for worker in workers)


def attention_command(name: str, kv_memory: int, threads: int, cold: ColdTier | None = None) -> list[str]:
    """What runs one worker that ends with this process."""
    kept = () if cold is None else ("--kv-cold", cold.folder, "--kv-resident", str(int(cold.resident * kv_memory)))
    return module_command(
        "lamina_workers.attention_main", "--listen", "127.0.0.1:0", "--name", name,
        "--kv-memory", str(kv_memory), "--threads", str(threads), "--die-with-parent", *kept,
    )  # fmt: skip


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
