"""The attention worker that a machine runs for its server: started for the address that the server sees, started again
when it ends, and told to leave in order. For one thread.
"""

from __future__ import annotations

import queue
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.deploy.local import LISTENING, LocalWorker
from lamina.deploy.supervision import Backoff, Slot
from lamina.system.child_process import module_command
from lamina_protocols.channels.channels import Credentials, join_address, split_address
from lamina_workers.process.credentials import TOKEN_NAME, make_credentials

LEAVING_S = 12.0  # for a worker to end in order
_UP_S = 60.0  # for a worker to listen


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """What a machine gives: `memory` bytes of KV and so many threads, as `name`. `server`: the "host:port" or "host" to
    join, None: the one that is known or found. `port`: where the worker listens, 0: any. `folder`: see `records`."""

    name: str
    memory: int
    threads: int
    folder: Path
    server: str | None = None
    port: int = 0


class _Process(LocalWorker):
    """A worker at the address `you`, for which `credentials` were made in `folder`."""

    port = 0
    you = ""
    credentials = Credentials()
    folder: tempfile.TemporaryDirectory[str] | None = None
    end_by: float | None = None  # it was told to end: when it is killed

    def forget_key(self) -> None:
        """The worker has read its key, or is gone: nobody else should read it."""
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None


class MachineWorker:
    """One worker at most. `said` gets what people should read; `command(arguments)` is what runs a worker."""

    def __init__(
        self,
        options: JoinOptions,
        said: Callable[[str], None],
        command: Callable[[Sequence[str]], Sequence[str]] | None = None,
    ) -> None:
        self._options, self._say = options, said
        self._command = command or (lambda arguments: module_command("lamina_workers.attention_main", *arguments))
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._slot: Slot[_Process] = Slot("worker", backoff=Backoff(ever=True))
        self._ended = False

    @property
    def runs(self) -> bool:
        """Whether there is a process."""
        return self._slot.worker is not None

    def ended(self) -> bool:
        """Whether one has ended since the last call."""
        ended, self._ended = self._ended, False
        return ended

    def offer(self, here: str, you: str) -> dict[str, Any] | None:
        """What the server needs to reach the worker, None while there is none. One is started where it is time: it
        listens at `here`, the machine's own address, with a certificate for `you`, the same as the server sees it."""
        worker = self._slot.worker
        if worker is None:
            if self._slot.is_due(time.monotonic()):
                self._start(here, you)
            return None
        if worker.you != you:
            self.end()
        if not worker.up or worker.end_by is not None:
            return None
        access = {"token": worker.credentials.token, "ca": worker.credentials.ca.decode()}
        return {"port": worker.port, "memory": self._options.memory, **access}

    def end(self) -> None:
        """Have the process end in order; another one follows while `offer` is called."""
        worker = self._slot.worker
        if worker is not None and worker.end_by is None:
            worker.end_by = time.monotonic() + LEAVING_S
            worker.process.terminate()

    def mind(self) -> None:
        """Take what has happened, and kill what has not done its part in time."""
        while not self._events.empty():
            self._events.get_nowait()()
        worker = self._slot.worker
        if worker is not None:
            due = [time for time in (self._slot.deadline, worker.end_by) if time is not None]
            if due and time.monotonic() >= min(due):
                worker.process.kill()

    def close(self, at_once: bool = False) -> None:
        """However this program ends, no process stays."""
        if (worker := self._slot.worker) is None:
            return
        if not at_once:
            self.end()
        if at_once or not worker.process.wait(LEAVING_S):
            worker.process.kill()
            worker.process.wait(LEAVING_S)
        worker.forget_key()

    def _start(self, here: str, you: str) -> None:
        options, folder = self._options, tempfile.TemporaryDirectory(prefix="lamina-join-")  # mode 0700
        credentials = make_credentials(folder.name, [you])
        arguments = {
            "--listen": join_address(here, options.port),
            "--name": options.name,
            "--kv-memory": str(options.memory),
            "--threads": str(options.threads),
            "--tls-dir": folder.name,
            "--token-file": str(Path(folder.name) / TOKEN_NAME),
        }
        try:
            worker = _Process(
                "worker",
                self._command(["--die-with-parent", *(word for pair in arguments.items() for word in pair)]),
                lambda worker: self._events.put(lambda: self._gone(worker)),
                takes=self._heard,
            )
        except OSError as error:
            folder.cleanup()
            self._say(f"the worker cannot be started: {error}; {self._slot.ended(time.monotonic())}")
            return
        worker.you, worker.credentials, worker.folder = you, credentials, folder
        self._slot.worker, self._slot.deadline = worker, time.monotonic() + _UP_S

    def _heard(self, worker: LocalWorker, line: str) -> bool:
        """On a thread of the child's."""
        if (match := LISTENING.fullmatch(line.strip())) is None:
            return False
        self._events.put(lambda: self._listening(worker, split_address(match[1])[1]))
        return True

    def _listening(self, worker: LocalWorker, port: int) -> None:
        if isinstance(worker, _Process):
            worker.up, worker.port, self._slot.deadline = True, port, None
            worker.forget_key()
            gib = self._options.memory / 2**30
            self._say(f"the worker listens at {join_address(worker.you, port)} with {gib:.1f} GiB")

    def _gone(self, worker: LocalWorker) -> None:
        if not isinstance(worker, _Process):
            return
        worker.forget_key()
        self._ended = True
        if worker.end_by is not None:  # as it was told to
            self._slot.worker, self._slot.due = None, time.monotonic()
            return
        then = self._slot.ended(time.monotonic())
        lines = [f"the worker has ended, {worker.process.how()}; {then}", *([] if worker.up else worker.last_lines)]
        self._say("\n  ".join(lines))
