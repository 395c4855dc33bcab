"""Signals that a thread answers, whatever the main thread waits for."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def answering_signals(numbers: Sequence[signal.Signals], answer: Callable[[], None]) -> Iterator[None]:
    """Each of these signals calls `answer`, on a thread of its own, one call after another. For the main thread.

    A handler of Python runs on the main thread when that next runs Python code. A signal that comes just before this
    thread begins to wait, or on another thread, does not interrupt the waiting: nobody would answer it. So the handlers
    do nothing here, and the thread reads the bytes that the interpreter writes when a signal comes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_answer, args=(reader, frozenset(numbers), answer), name="signals", daemon=True)
    thread.start()
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _nothing) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
        os.close(writer)
        thread.join()
        os.close(reader)


def _nothing(*_: object) -> None:
    """A handler: without one the interpreter writes no byte."""


def _answer(reader: int, numbers: frozenset[int], answer: Callable[[], None]) -> None:
    while number := os.read(reader, 1):
        if number[0] in numbers:
            answer()
