"""Messages of any thread to the thread that runs an engine, in order."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from lamina.errors import EngineError

logger = logging.getLogger("lamina")


def _unanswered(error: EngineError) -> None:
    """A message needs no answer."""


def refuse(done: Future[Any], error: EngineError) -> None:
    """The answer of a call that the engine does not make any more."""
    if done.set_running_or_notify_cancel():
        done.set_exception(error)


class _Letter(NamedTuple):
    do: Callable[[], object]
    refuse: Callable[[EngineError], object] = _unanswered


class Mailbox:
    """The mailbox of one engine. Its thread calls `shut` after it has stopped; until then it takes every message."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Letter | None] = queue.SimpleQueue()
        self._door = threading.Lock()  # keeps a request out after the waiting ones have been refused
        self._shut = threading.Event()
        self._cause: BaseException | None = None

    @property
    def is_shut(self) -> bool:
        """Whether the engine has stopped."""
        return self._shut.is_set()

    @property
    def empty(self) -> bool:
        """Whether no message waits at present."""
        return self._queue.empty()

    def request(self, do: Callable[[], object], refuse: Callable[[EngineError], object]) -> None:
        """Have the engine's thread call `do` between two batches, or `refuse` where it stops before that. Raises
        EngineError where it has stopped already."""
        with self._door:
            if self._shut.is_set():
                raise self.error()
            self._queue.put(_Letter(do, refuse))

    def post(self, do: Callable[[], object]) -> None:
        """As `request`, but dropped where the engine has stopped."""
        self._queue.put(_Letter(do))

    def end(self) -> None:
        """Ask the engine to stop."""
        self._queue.put(None)

    def get(self, timeout: float | None) -> Callable[[], object] | None:
        """The next call to make, or None where the engine is to stop. Waits for `timeout` seconds (None: without end),
        then raises queue.Empty."""
        letter = self._queue.get(timeout=timeout)
        return None if letter is None else letter.do

    def shut(self, cause: BaseException | None) -> None:
        """The engine has stopped, by request or for this cause: refuse the requests that wait."""
        self._cause = cause
        with self._door:
            self._shut.set()
        while not self._queue.empty():
            if (letter := self._queue.get()) is not None:
                try:
                    letter.refuse(self.error())
                except Exception:  # any error; the other requests are refused all the same
                    logger.exception("a caller could not be notified that the engine has stopped")

    def error(self) -> EngineError:
        """Why the engine does nothing any more."""
        error = EngineError("the engine has stopped" + (f": {self._cause!r}" if self._cause else ""))
        error.__cause__ = self._cause
        return error
