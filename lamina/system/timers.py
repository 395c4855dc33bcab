"""Calls that are made later, on threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class Cancellable(Protocol):
    """A call that is to be made later."""

    def cancel(self) -> None:
        """Do not make it, unless it has begun."""


def later(seconds: float, call: Callable[[], object]) -> Cancellable:
    """Make a call after so many seconds, on a thread of its own that does not keep the process alive."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer
