"""Requests of any thread to the thread that runs an engine, in order."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from lamina.errors import EngineError

logger = logging.getLogger("lamina")


def _unanswered(error: EngineError) -> None:
    """A message needs no answer."""


class _Letter(NamedTuple):
    do: Callable[[], object]
    refuse: Callable[[EngineError], object] = _unanswered


class Mailbox:
    """The mailbox of one engine. Its thread calls `shut` once it has stopped; until then everything is taken up."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Letter | None] = queue.SimpleQueue()
        self._door = threading.Lock()  # no request may come any more once those that were there have been refused
        self._shut = threading.Event()
        self._cause: BaseException | None = None

    @property
    def is_shut(self) -> bool:
        """Whether the engine has stopped."""
        return self._shut.is_set()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do, just now."""
        return self._queue.empty()

    def request(self, do: Callable[[], object], refuse: Callable[[EngineError], object]) -> None:
        """Have the engine's thread `do` something between two batches; `refuse` is called where the engine stops before
        that. Raises EngineError where it has stopped already."""
        with self._door:
            if self._shut.is_set():
                raise self.error()
            self._queue.put(_Letter(do, refuse))

    def post(self, do: Callable[[], object]) -> None:
        """As `request`, and forgotten where the engine has stopped."""
        self._queue.put(_Letter(do))

    def end(self) -> None:
        """Ask the engine to stop."""
        self._queue.put(None)

    def get(self, timeout: float | None) -> Callable[[], object] | None:
        """The next thing to do, None where the engine is to stop. Waits `timeout` seconds at most, without end for
        None, and raises queue.Empty."""
        letter = self._queue.get(timeout=timeout)
        return None if letter is None else letter.do

    def shut(self, cause: BaseException | None) -> None:
        """The engine has stopped, for this reason unless it was asked to: requests that came too late are refused."""
        self._cause = cause
        with self._door:
            self._shut.set()
        while not self._queue.empty():
            if (letter := self._queue.get()) is not None:
                try:
                    letter.refuse(self.error())
                except Exception:  # it may be anything, and the requests behind it are refused too
                    logger.exception("a caller could not be notified that the engine has stopped")

    def error(self) -> EngineError:
        """Why nothing is done any more."""
        error = EngineError("the engine has stopped" + (f": {self._cause!r}" if self._cause else ""))
        error.__cause__ = self._cause
        return error
