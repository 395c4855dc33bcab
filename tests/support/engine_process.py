"""The engine of a server as a process of its own, for tests without HTTP: to be killed, and asked over its socket."""

from __future__ import annotations

import os
import queue
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from lamina.client.remote import RemoteEngine
from lamina.server.processes.child_protocol import FROM_CHILD, TO_ENGINE, Failed, Ready, StartEngine
from lamina.server.processes.engine_link import SocketWire
from lamina.server.processes.supervisor import ENGINE_MODULE
from lamina.system.child_process import ChildProcess

SECRET = secrets.token_hex(32)
PATIENCE = 100.0  # seconds


class EngineProcess:
    """One engine after the other, as `start` and `kill` say, and the remote engine that goes on over all of them."""

    def __init__(self, folder: Path, model: Path | str, **config: Any) -> None:
        self._folder, self._model, self._config = folder, str(model), config
        self._child: ChildProcess | None = None
        self._wire: SocketWire | None = None
        self.remote: RemoteEngine | None = None
        self.starts = 0

    def start(self) -> RemoteEngine:
        """Returns once it serves. Raises RuntimeError with what it says where it does not."""
        self.starts += 1
        said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        path = str(self._folder / f"engine-{self.starts}.sock")
        self._child = ChildProcess(
            "engine",
            [sys.executable, "-m", ENGINE_MODULE],
            lambda _, text: said.put(FROM_CHILD.parse(text)),
            lambda child: said.put(f"ended, {child.how()}"),
            environment=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self._child.say(TO_ENGINE.line(StartEngine(self._model, self._config, path, SECRET, False, False)))
        while not isinstance(message := said.get(timeout=PATIENCE), Ready):
            if isinstance(message, (Failed, str)):
                raise RuntimeError(f"the engine did not start: {message}")
        self._wire = SocketWire(path, bytes.fromhex(SECRET), f"client-{self.starts}")
        if self.remote is None:
            self.remote = RemoteEngine(self._wire, time.monotonic, patience=PATIENCE)
        elif not self.remote.rejoin(self._wire):
            raise RuntimeError("the remote engine has given up")
        return self.remote

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait(10)
        if self._wire is not None:
            self._wire.close()
