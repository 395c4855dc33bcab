"""Signals that are answered while the main thread waits."""

from __future__ import annotations

import os
import queue
import signal
import threading

import pytest

from lamina_workers.process.signals import answering_signals

PATIENCE = 20.0  # seconds


@pytest.mark.fault("F15")
def test_a_signal_that_does_not_interrupt_the_main_thread_is_answered() -> None:
    """A handler of Python would wait for the main thread, which waits for the answer: no call would come in time."""
    calls: queue.SimpleQueue[str] = queue.SimpleQueue()

    def send() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # this thread gets it

    sender = threading.Timer(0.2, send)
    with answering_signals((signal.SIGTERM,), lambda: calls.put("ended")):
        sender.start()
        assert calls.get(timeout=PATIENCE) == "ended"
    sender.join()


def test_only_these_signals_are_answered_and_handlers_come_back() -> None:
    calls: queue.SimpleQueue[int] = queue.SimpleQueue()
    others: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: others.append(number))
    term = signal.getsignal(signal.SIGTERM)
    try:
        with answering_signals((signal.SIGTERM, signal.SIGINT), lambda: calls.put(1)):
            for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert [calls.get(timeout=PATIENCE) for _ in range(2)] == [1, 1]
        assert calls.empty()
        assert others == [signal.SIGUSR2] * 2
        assert signal.getsignal(signal.SIGTERM) == term
    finally:
        signal.signal(signal.SIGUSR2, before)
