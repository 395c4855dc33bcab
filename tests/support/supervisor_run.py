"""A supervisor that runs on the main thread while a test does its steps on another one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from lamina.server.processes.supervisor import Supervisor


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
