"""When an ended worker starts again: the delay, the limit of restarts, and the name of each start.

Pure: the caller passes the time of any steady clock, in seconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

WORKERS_BACK = 10.0  # seconds that a restarted engine waits for all attention workers; then some are enough

W = TypeVar("W")


@dataclass(eq=False)
class Backoff:
    """How long one worker waits for its next start, so that a worker that always fails does not take the machine.

    The first delay is `first` seconds. It doubles with each restart of the last `window` seconds, of which there are
    `limit` at most: one more has to wait until the window has room, where it goes on for `ever`, else there is none.
    """

    first: float = 0.5
    limit: int = 6
    window: float = 60.0
    ever: bool = False
    _restarts: deque[float] = field(default_factory=deque)

    def delay(self, now: float) -> float | None:
        """Seconds from `now` to the next start, which is counted. None: there were too many."""
        while self._restarts and self._restarts[0] <= now - self.window:
            self._restarts.popleft()
        seconds = self.first * 2.0 ** len(self._restarts)
        if len(self._restarts) >= self.limit:
            if not self.ever:
                return None
            seconds = self._restarts.popleft() + self.window - now
        self._restarts.append(now + seconds)
        return seconds


def incarnation(name: str, restarts: int) -> str:
    """The name of a worker after so many restarts."""
    return name if restarts == 0 else f"{name}.{restarts}"


@dataclass(eq=False)
class Slot(Generic[W]):
    """Room for one worker: the worker, or the time of the next start.

    A slot is started while `is_due`, has its worker until `ended`, and is due again after a delay, or never. A `vacant`
    slot is not counted until it is opened: it has no worker, one that is about to end, or a standby.
    """

    base: str  # the name of its first worker
    number: int = 0
    worker: W | None = None
    due: float | None = 0.0  # when the next worker starts, while there is none; None: never
    restarts: int = 0
    vacant: bool = False
    backoff: Backoff = field(default_factory=Backoff)

    @property
    def name(self) -> str:
        """Of the worker, or of the next one. No two workers of a slot have the same."""
        return incarnation(self.base, self.restarts)

    @property
    def next_start(self) -> float | None:
        """When a worker is to be started; None: there is one, or there will be none."""
        return self.due if self.worker is None else None

    def is_due(self, now: float) -> bool:
        """Whether a worker is to be started."""
        return self.next_start is not None and self.next_start <= now

    def ended(self, now: float) -> str:
        """The worker has ended, or could not be started: plan the next start. Says when that is, for people."""
        delay = self.backoff.delay(now)
        self.worker = None
        self.restarts += 1
        self.due = None if delay is None else now + delay
        return "too often: it stays down" if delay is None else f"it starts again in {delay:g} s"

    def vacate(self) -> None:
        """Its worker is not needed any more, and no other is started."""
        self.vacant, self.due = True, None

    def open(self) -> None:
        """A worker is needed in a vacant slot."""
        self.vacant, self.due = False, 0.0

    def left(self) -> None:
        """The worker has ended, as it was told to."""
        self.worker = None
        self.restarts += 1

    def give_up(self) -> None:
        """No worker is started here any more."""
        self.worker = self.due = None
