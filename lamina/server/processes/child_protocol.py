"""The messages between a server's children and their supervisor: one JSON array per line, whose first item is a word.

A child receives on stdin, and sends on what was its stdout; anything else printed there goes to stderr instead.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from lamina.deploy.worker_events import WorkerAddress
from lamina_protocols.channels.channels import Credentials
from lamina_workers.process.exit import die_with_parent

LOG_LEVEL = "LAMINA_LOG_LEVEL"  # the variable with the log level of children
LEVELS = ("error", "warning", "info", "debug")


class SupervisorPipe:
    """Sends a child's messages to its supervisor. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, word: str, *items: Any) -> None:
        with self._lock:
            try:
                self._out.write(line(word, *items) + "\n")
                self._out.flush()
            except (OSError, ValueError):  # the supervisor is gone, and this process is about to end
                pass


def begin(name: str) -> tuple[SupervisorPipe, Iterator[list[Any]]]:
    """Make this process a child of the supervisor: it ends with it, leaves signals to it, and logs to stderr, each line
    after `name`. Returns the pipe to the supervisor, and the messages from it."""
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # where all processes get a signal, only the supervisor handles it
    level = os.environ.get(LOG_LEVEL, "warning").upper()
    logging.basicConfig(level=level, format=f"{name}: %(message)s", stream=sys.stderr)
    return SupervisorPipe(), receive()


def line(word: str, *items: Any) -> str:
    """A message as a line."""
    return json.dumps([word, *items])


def parse(text: str) -> list[Any] | None:
    """The message of a line; None where the line is no message."""
    try:
        message = json.loads(text)
    except ValueError:
        return None
    return message if isinstance(message, list) and message and isinstance(message[0], str) else None


def pack_worker(worker: WorkerAddress) -> list[Any]:
    """An attention worker as an item of a message."""
    shown = worker.credentials or Credentials()
    return [worker.name, worker.address, shown.token, worker.capacity, shown.ca.decode(), worker.at]


def unpack_worker(item: list[Any]) -> WorkerAddress:
    """The attention worker in an item of a message."""
    name, address, token, capacity, ca, place = item
    return WorkerAddress(name, address, Credentials(ca=ca.encode(), token=token), capacity, place)


def receive() -> Iterator[list[Any]]:
    """The supervisor's messages, until it is gone."""
    for text in sys.stdin:
        if (message := parse(text)) is not None:
            yield message
