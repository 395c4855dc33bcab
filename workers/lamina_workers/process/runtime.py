"""The clock and the threads of a process, behind one interface, so that they can be replaced as a whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol


class Signal(Protocol):
    """As `threading.Event`, as far as it is used."""

    def set(self) -> None: ...
    def is_set(self) -> bool: ...
    def wait(self, timeout: float | None = None) -> bool: ...


class Running(Protocol):
    """What was started. `join` waits for its end, and returns at once where its own thread calls it."""

    def join(self) -> None: ...


class Runtime(Protocol):
    """Seconds of a clock that never jumps, waits by it, and threads."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...

    def signal(self) -> Signal: ...

    def start(self, do: Callable[[], None], name: str, daemon: bool = True) -> Running:
        """Call `do` on a thread of its own. Raises RuntimeError where there are no new threads: when Python ends."""


class _Thread(threading.Thread):
    def join(self, timeout: float | None = None) -> None:
        if self is not threading.current_thread():
            super().join(timeout)


class Threads:
    """Those of the operating system."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def signal(self) -> Signal:
        return threading.Event()

    def start(self, do: Callable[[], None], name: str, daemon: bool = True) -> Running:
        thread = _Thread(target=do, name=name, daemon=daemon)
        thread.start()
        return thread


THREADS = Threads()
