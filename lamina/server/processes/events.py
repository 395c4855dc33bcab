"""What the supervisor of a server waits for."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, TypeAlias

from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import EngineError
from lamina.system.child_process import ChildProcess


class LineReceived(NamedTuple):
    """A child's line: a word, and what belongs to it."""

    child: ChildProcess
    said: list[Any]


class ChildEnded(NamedTuple):
    child: ChildProcess


class SignalReceived(NamedTuple):
    number: int


class WorkersStarted(NamedTuple):
    """All attention workers are up, or cannot be."""

    result: tuple[WorkerAddress, ...] | EngineError


class WorkerJoined(NamedTuple):
    worker: WorkerAddress


class WorkerLeft(NamedTuple):
    name: str


Event: TypeAlias = LineReceived | ChildEnded | SignalReceived | WorkersStarted | WorkerJoined | WorkerLeft


@contextmanager
def signals(events: queue.SimpleQueue[Event]) -> Iterator[None]:
    """SIGTERM and SIGINT become events."""

    def handle(number: int, _frame: FrameType | None) -> None:
        events.put(SignalReceived(number))  # SimpleQueue.put may be called within itself

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
