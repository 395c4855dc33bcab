"""Constraints go on by their new tokens here, and look ahead along drafts, so that the engine's thread never waits for
an expensive mask."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from lamina.errors import InvalidRequest
from lamina.kv.request import ScheduledSequence

if TYPE_CHECKING:
    from lamina.text.structured_output import Constraint

PATIENCE = 0.005
"""The most seconds that a batch waits for the masks of its rows. A row whose mask takes longer is left out of batches
until it is there."""

_NICE = 10  # of the thread with slow masks: the step's threads go first


@dataclass(eq=False, slots=True)
class MaskAdvance:
    """A constraint on its way over `tokens`, or where they are `drafts` a look ahead along them. `error`: why it could
    not go on. `arrived` is called with it where nobody waited for it."""

    sequence: ScheduledSequence
    constraint: Constraint
    tokens: Sequence[int]
    drafts: bool = False
    error: InvalidRequest | None = None
    over: bool = False
    late: bool = False  # nobody waits for it: it is announced when it is over
    done: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    arrived: Callable[[MaskAdvance], None] = lambda _: None


class Masks:
    """Two threads, one for constraints whose masks were fast so far, one for the others. The methods are for the
    engine's thread; `post` has a call made on it between two batches. `patience` in seconds."""

    def __init__(self, post: Callable[[Callable[[], None]], None], patience: float = PATIENCE) -> None:
        self.late = 0
        """How many constraints nobody waits for are not there yet."""
        self._post = post
        self._patience = patience
        self._lock = threading.Lock()  # of `over` and `late` of each
        self._numbers = count()
        self._queues: dict[
            bool, queue.PriorityQueue[tuple[float, int, MaskAdvance | None]]
        ] = {}  # by whether it is slow

    def begin(self, advances: Sequence[MaskAdvance], arrived: Callable[[MaskAdvance], None]) -> list[MaskAdvance]:
        """Have constraints go on, and wait for those that were fast so far as long as patience lasts. Returns those
        that are there. The sequences of the others are `held`, and `arrived` is called with each when it is there."""
        done, waited = threading.Semaphore(0), 0
        for advance in advances:
            slow = advance.late = advance.constraint.slow
            advance.done, advance.arrived = done, arrived
            waited += not slow
            self._queue(slow).put((advance.constraint.spent, next(self._numbers), advance))
        end = time.monotonic() + self._patience
        while waited and done.acquire(timeout=max(0.0, end - time.monotonic())):
            waited -= 1
        with self._lock:
            ready = [advance for advance in advances if advance.over and not advance.late]
            for advance in advances:
                advance.late = advance.late or not advance.over
        for advance in advances:
            advance.sequence.held = advance.late
            self.late += advance.late
        return ready

    def close(self) -> None:
        """End the threads, without waiting for them."""
        for advance_queue in self._queues.values():
            advance_queue.put((-1.0, 0, None))

    def _queue(self, slow: bool) -> queue.PriorityQueue[tuple[float, int, MaskAdvance | None]]:
        if slow not in self._queues:
            self._queues[slow] = queue.PriorityQueue()
            threading.Thread(
                target=self._run, args=(self._queues[slow], _NICE if slow else 0), name="lamina-masks", daemon=True
            ).start()
        return self._queues[slow]

    def _run(self, waiting: queue.PriorityQueue[tuple[float, int, MaskAdvance | None]], nice: int) -> None:
        """Those that have taken least time go first, so a sample with slow masks delays itself more than others."""
        if nice:
            with suppress(OSError, AttributeError):  # elsewhere than on Linux
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        while (advance := waiting.get()[2]) is not None:
            if advance.sequence.finish_reason in (None, "length"):  # else nobody asks any more
                try:
                    go = advance.constraint.foresee if advance.drafts else advance.constraint.advance
                    go(*advance.tokens)
                except InvalidRequest as error:
                    advance.error = error.with_traceback(None)  # it would keep the matcher
                except BaseException as error:  # noqa: BLE001  # a panic in Rust
                    advance.error = InvalidRequest(f"llguidance failed: {error!r:.300}")
            with self._lock:
                advance.over, late = True, advance.late
            if late:
                self._post(lambda advance=advance: self._there(advance))  # type: ignore[misc]
            else:
                advance.done.release()

    def _there(self, advance: MaskAdvance) -> None:
        self.late -= 1
        advance.sequence.held = False
        advance.arrived(advance)
