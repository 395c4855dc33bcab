"""Whether a worker that fails again and again is used: a circuit breaker, in the words of SGLang's gateway. Pure.

closed      the worker is used; `threshold` failures within `window` seconds open the breaker
open        it is not used for `timeout` seconds
half-open   it is tried; a failure within `window` seconds opens the breaker again, for twice as long, up to `longest`
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

State = Literal["closed", "open", "half-open"]


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """When a breaker opens, and for how long. Times in seconds."""

    threshold: int
    window: float
    timeout: float
    longest: float


FLAPPING = BreakerLimits(threshold=3, window=300.0, timeout=30.0, longest=600.0)
"""For losses of any kind. Each costs its requests up to `worker_timeout` seconds and a rebuild."""
QUARANTINE = BreakerLimits(threshold=2, window=86_400.0, timeout=3600.0, longest=86_400.0)
"""For frames that came with changed bits. One is chance; a line, a network card or a memory that did it twice will do
it again, and a checksum of 32 bits misses one change in four thousand million."""


@dataclass(eq=False)
class CircuitBreaker:
    """The breaker of one worker. The caller passes the time of any steady clock, in seconds."""

    limits: BreakerLimits = FLAPPING
    _failures: deque[float] = field(default_factory=deque)
    _opened: int = 0  # times in a row
    _until: float | None = None  # until when it was open last

    def failed(self, now: float) -> bool:
        """The worker has failed. Returns whether that opens the breaker. One that is open stays as it is."""
        state = self.state(now)
        if state == "open":
            return False
        if state == "closed":
            self._opened = 0
        while self._failures and self._failures[0] <= now - self.limits.window:
            self._failures.popleft()
        self._failures.append(now)
        if state == "closed" and len(self._failures) < self.limits.threshold:
            return False
        self._failures.clear()
        self._until = now + min(self.limits.timeout * 2.0 ** min(self._opened, 30), self.limits.longest)
        self._opened += 1
        return True

    def state(self, now: float) -> State:
        """The state at this time."""
        if self._until is None or now >= self._until + self.limits.window:
            return "closed"
        return "open" if now < self._until else "half-open"

    def seconds(self, now: float) -> float:
        """Seconds for which the worker is not used; 0 where it may be."""
        return 0.0 if self._until is None else min(max(0.0, self._until - now), self.limits.longest)  # rounding


HeldBack = Literal["open", "quarantined"]


class PlaceBreakers:
    """Two breakers for one place of a worker: one counts losses, the other, which quarantines it, changed bits alone.

    Where an engine has no other worker, one whose losses have opened its breaker is used all the same: text is right,
    if slow, and without it there would be none. A quarantined one is not.
    """

    def __init__(self, flapping: BreakerLimits = FLAPPING, quarantine: BreakerLimits = QUARANTINE) -> None:
        self.flapping = CircuitBreaker(flapping)
        self.quarantine = CircuitBreaker(quarantine)

    def held_back(self, now: float) -> HeldBack | None:
        """Why a worker there is not used, if there is another; None where it may be."""
        if self.quarantine.seconds(now):
            return "quarantined"
        return "open" if self.flapping.seconds(now) else None

    def on_trial(self, now: float) -> bool:
        """Whether a breaker is half-open: a worker must answer heartbeats for a while before it gets KV."""
        return "half-open" in (self.flapping.state(now), self.quarantine.state(now))

    def seconds(self, now: float) -> float:
        """For how long a worker there is held back."""
        return max(self.quarantine.seconds(now), self.flapping.seconds(now))
