"""Workers as child processes of this one: attention workers, on loopback, and model workers 1 and up.

A `LocalWorker` is one such process, with the last lines of its output.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from lamina.deploy.supervision import AttentionSupervisor, ModelSupervisor, Slot, Worker
from lamina.deploy.worker_events import WorkerAddress
from lamina.system.child_process import ChildProcess, end_all, module_command
from lamina_protocols.channels.channels import Credentials
from lamina_protocols.channels.versions import PROTOCOL_VERSION, VARIABLE
from lamina_protocols.messages.layers import ColdTier

logger = logging.getLogger("lamina")

_MAX_LINE = 4096  # characters of a line that are kept
_LAST_LINES = 12  # lines that an error shows


class LocalWorker(Worker):
    """A child process that runs `command`. Raises OSError where it cannot be started.

    `takes(worker, line)` says whether a line was a message for the supervisor; all other lines are logged and, the
    last of them, kept. `on_end(worker)` comes after the last line. Both are called on a thread of the child's.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        on_end: Callable[[LocalWorker], None],
        *,
        takes: Callable[[LocalWorker, str], bool] = lambda worker, line: False,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._takes = takes
        self.process = ChildProcess(
            name,
            command,
            self._hear,
            lambda _: on_end(self),
            pass_fds=pass_fds,
            environment=environment,
            merge_stderr=True,
        )
        self.pid = self.process.pid

    def _hear(self, process: ChildProcess, line: str) -> None:
        line = line[:_MAX_LINE].rstrip()
        if not self._takes(self, line):
            self.last_lines.append(line)
            logger.info("%s: %s", process.name, line)


LISTENING = re.compile(r"listening (\S+:\d+)")
"""The line by which an attention worker says where it listens."""


class LocalAttentionWorkers(AttentionSupervisor[LocalWorker]):
    """`count` attention workers in child processes, each with `kv_memory` bytes of KV and so many threads; up to `most`
    where more are asked for.

    `devices` names that of each, where it is not the CPU; `cold` is where KV goes that is not read. `command(name)` is
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
        slot.deadline = self._clock() + self._timeout
        with _readable(self._token) as descriptor:
            return LocalWorker(
                slot.name,
                [*self._command(slot.name), *self._placed(slot.number), "--token-file", f"/dev/fd/{descriptor}"],
                lambda worker: self._calls.put(lambda: self._process_ended(slot, worker)),
                takes=lambda worker, line: self._takes(slot, worker, line),
                pass_fds=[descriptor],
            )

    def _placed(self, index: int) -> list[str]:
        return ["--device", self._devices[index]] if self._devices else []

    def _takes(self, slot: Slot[LocalWorker], worker: LocalWorker, line: str) -> bool:
        """On a thread of the child's."""
        match = LISTENING.fullmatch(line.strip())
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
    cold_options = (
        () if cold is None else ("--kv-cold", cold.folder, "--kv-resident", str(int(cold.resident * kv_memory)))
    )
    return module_command(
        "lamina_workers.attention_main",
        "--listen",
        "127.0.0.1:0",
        "--name",
        name,
        "--kv-memory",
        str(kv_memory),
        "--threads",
        str(threads),
        "--die-with-parent",
        *cold_options,
    )


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


class LocalModelWorkers(ModelSupervisor[LocalWorker]):
    """Model workers 1 to `count` - 1 in child processes, each with so many threads.

    `command(name, address)` is what runs one; it reads its secret, in hex, from its first line of input. One thread
    starts them all (`child_process` says why).
    """

    def __init__(self, count: int, *, threads: int, command: Callable[[str, str], Sequence[str]] | None = None) -> None:
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
        "lamina_workers.model_main",
        "--connect",
        address,
        "--name",
        name,
        "--threads",
        str(threads),
        "--die-with-parent",
    )
