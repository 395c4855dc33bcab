"""A supervisor that runs on the main thread while a test does its steps on another one. Its children only pretend to
be an engine and an HTTP server: `pretend` says so, and `fake_server_child` has them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamina.server.processes.server_plan import ServerPlan
from lamina.server.processes.supervisor import Supervisor
from lamina.server.settings import ServerSettings

PATIENCE = 30.0


def run_beside(supervisor: Supervisor, *steps: Callable[[], None]) -> None:
    """Run it until the steps are done and it has ended; a step that fails ends it at once, and is raised here."""
    failures: list[BaseException] = []

    def do() -> None:
        try:
            for step in steps:
                step()
        except BaseException as error:  # noqa: BLE001  # it is raised below
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=do)
    thread.start()
    try:
        supervisor.run()
    finally:
        thread.join()
        if failures:
            raise failures[0]


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All children of supervisors only pretend, and write what they hear to `folder`."""
    monkeypatch.setenv("FAKE_CHILD_FOLDER", str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for name in ("ENGINE_MODULE", "HTTP_MODULE"):
        monkeypatch.setattr(f"lamina.server.processes.supervisor.{name}", "fake_server_child")


class World:
    """A supervisor whose children only pretend, what it tells people, and what its children heard in `folder`."""

    def __init__(self, folder: Path, plan: ServerPlan | None = None) -> None:
        self.folder = folder
        self.messages: list[str] = []
        settings = ServerSettings(model="m", api_keys=("secret",))
        plan = plan or ServerPlan({"m": "m"}, {"threads": 1}, settings, "127.0.0.1", 0, drain=5.0)
        self.supervisor = Supervisor(plan, self)

    def progress(self, what: str, done: int, total: int | None) -> None:
        self.messages.append(f"{what} {done}/{total}")

    def said(self, message: str) -> None:
        self.messages.append(message)

    def run(self, *steps: Callable[[], None]) -> None:
        """Runs it, with the steps done on a thread beside it. Raises what it or a step raised."""
        run_beside(self.supervisor, *steps)

    def heard(self, role: str) -> list[list[Any]]:
        file = self.folder / f"{role}.log"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def until(self, true: Callable[[], bool]) -> Callable[[], None]:
        def wait() -> None:
            deadline = time.monotonic() + PATIENCE
            while not true():
                if time.monotonic() > deadline:
                    raise AssertionError(f"it did not come: {self.messages}, {self.heard('http')}")
                time.sleep(0.01)

        return wait

    @property
    def serving(self) -> Callable[[], None]:
        return self.until(
            lambda: any(message.startswith("serving m at http://127.0.0.1:") for message in self.messages)
        )

    def pid(self, role: str) -> int:
        return int((self.folder / f"{role}.pid").read_text())

    def kill(self, role: str) -> Callable[[], None]:
        return lambda: os.kill(self.pid(role), signal.SIGKILL)

    def behave(self, role: str, how: str) -> Callable[[], None]:
        return lambda: (self.folder / f"{role}.txt").write_text(how) and None

    @staticmethod
    def signal() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
