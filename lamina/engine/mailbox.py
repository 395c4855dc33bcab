"""What any thread asks of the one that runs an engine, in order. Knows nothing of what is asked."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from lamina.errors import EngineError

logger = logging.getLogger("lamina")


def _nobody(error: EngineError) -> None:
    """Whoever tells something needs no answer."""


class _Asked(NamedTuple):
    do: Callable[[], object]
    refuse: Callable[[EngineError], object] = _nobody


class Mailbox:
    """Of one engine. `shut` is called by its thread, once it has stopped; until then all that comes is taken up."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._door = threading.Lock()  # nothing may be asked any more once what was there has been refused
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

    def ask(self, do: Callable[[], object], refuse: Callable[[EngineError], object]) -> None:
        """Have the engine's thread `do` something between two batches; `refuse` is called where it has stopped before.
        Raises EngineError where that has happened already."""
        with self._door:
            if self._shut.is_set():
                raise self.error()
            self._queue.put(_Asked(do, refuse))

    def tell(self, do: Callable[[], object]) -> None:
        """As `ask`, and forgotten where the engine has stopped."""
        self._queue.put(_Asked(do))

    def end(self) -> None:
        """Ask the engine to stop."""
        self._queue.put(None)

    def get(self, timeout: float | None) -> Callable[[], object] | None:
        """The next thing to do, None where it is to stop. Waits `timeout` seconds at most, without end for None, and
        raises queue.Empty."""
        asked = self._queue.get(timeout=timeout)
        return None if asked is None else asked.do

    def shut(self, cause: BaseException | None) -> None:
        """The engine has stopped, for this reason unless it was asked to: whoever came too late is told."""
        self._cause = cause
        with self._door:
            self._shut.set()
        while not self._queue.empty():
            if (asked := self._queue.get()) is not None:
                try:
                    asked.refuse(self.error())
                except Exception:  # it may be anything, and those behind it are to be told too
                    logger.exception("somebody could not be told that the engine has stopped")

    def error(self) -> EngineError:
        """Why nothing is done any more."""
        error = EngineError("the engine has stopped" + (f": {self._cause!r}" if self._cause else ""))
        error.__cause__ = self._cause
        return error
