"""Whether a worker that fails again and again is used: a circuit breaker, in the words of SGLang's gateway. Pure.

closed      the worker is used; `threshold` failures within `window` seconds open the breaker
open        it is not used for `timeout` seconds
half-open   it is tried; a failure within `window` seconds opens the breaker again, for twice as long, up to `most`

The circuit breakers of one engine's attention workers, and the timers of those that are held back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from lamina.deploy.worker_events import WorkerAddress
from lamina.system.timers import Cancellable, later

State = Literal["closed", "open", "half-open"]


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """When a breaker opens, and for how long. Times in seconds."""

    threshold: int
    window: float
    timeout: float
    most: float


FLAPPING = BreakerLimits(threshold=3, window=300.0, timeout=30.0, most=600.0)
"""For losses of any kind. Each costs its requests up to `worker_timeout` seconds and a rebuild."""
QUARANTINE = BreakerLimits(threshold=2, window=86_400.0, timeout=3600.0, most=86_400.0)
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
        self._until = now + min(self.limits.timeout * 2.0 ** min(self._opened, 30), self.limits.most)
        self._opened += 1
        return True

    def state(self, now: float) -> State:
        """The state at this time."""
        if self._until is None or now >= self._until + self.limits.window:
            return "closed"
        return "open" if now < self._until else "half-open"

    def left(self, now: float) -> float:
        """Seconds for which the worker is not used; 0 where it may be."""
        return 0.0 if self._until is None else min(max(0.0, self._until - now), self.limits.most)  # rounding


logger = logging.getLogger("lamina")

Held = Literal["open", "quarantined"]


class _Breakers:
    """Of one place."""

    def __init__(self, flapping: BreakerLimits, quarantine: BreakerLimits) -> None:
        self.flapping = CircuitBreaker(flapping)
        self.quarantine = CircuitBreaker(quarantine)

    def held(self, now: float) -> Held | None:
        """Why a worker there is not used; None where it may be."""
        if self.quarantine.left(now):
            return "quarantined"
        return "open" if self.flapping.left(now) else None

    def left(self, now: float) -> float:
        return max(self.quarantine.left(now), self.flapping.left(now))


class WorkerBreakers:
    """Two breakers for each place of a worker: one counts losses, the other, which quarantines it, changed bits alone.

    `alone()` says that the engine has no attention worker. Then one whose losses have opened its breaker is used all
    the same: text is right, if slow, and without it there would be none. A quarantined one is not.

    For any thread; no method waits.
    """

    def __init__(
        self,
        alone: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        flapping: BreakerLimits = FLAPPING,
        quarantine: BreakerLimits = QUARANTINE,
    ) -> None:
        self._alone = alone
        self._clock = clock
        self._limits = flapping, quarantine
        self._lock = threading.RLock()
        self._places: dict[str, str] = {}  # by the worker's name
        self._breakers: dict[str, _Breakers] = {}  # by place, of those that ever failed
        self._held: dict[str, tuple[Cancellable, Callable[[], None]]] = {}  # by name
        self._closed = False

    def known(self, worker: WorkerAddress) -> None:
        """The engine is about to use a worker."""
        with self._lock:
            self._places[worker.name] = worker.at

    def admit(self, worker: WorkerAddress, use: Callable[[], None]) -> None:
        """Call `use`, at once or once the worker is no longer held back; then on a thread of its own."""
        with self._lock:
            self.known(worker)
            breakers, now = self._breakers.get(worker.at), self._clock()
            held = None if breakers is None else breakers.held(now)
            if breakers is not None and held is not None and (held == "quarantined" or not self._alone()):
                self._hold(worker.name, breakers.left(now), use)
                return
        use()

    def on_trial(self, worker: WorkerAddress) -> bool:
        """Whether a breaker is half-open, so that the worker must answer heartbeats for a while before it gets KV. Not
        where the engine has no other."""
        with self._lock:
            breakers, now = self._breakers.get(worker.at), self._clock()
            states = () if breakers is None else (breakers.flapping.state(now), breakers.quarantine.state(now))
            return "half-open" in states and not self._alone()

    def failed(self, name: str) -> None:
        """A worker was lost, or cannot be used."""
        self._count(name, corrupt=False)
        with self._lock:
            if name not in self._held:  # it may have joined again meanwhile
                self._places.pop(name, None)
            now = self._clock()
            if self._alone():
                for each, (timer, use) in list(self._held.items()):
                    breakers = self._breakers[self._places[each]]
                    if breakers.held(now) == "open":
                        timer.cancel()
                        self._hold(each, 0.0, use)

    def corrupt(self, name: str) -> None:
        """A frame of a worker, or one that it got, came with changed bits; its loss follows."""
        self._count(name, corrupt=True)

    def left(self, name: str) -> None:
        """A worker is gone: it is held back no more."""
        with self._lock:
            if (held := self._held.pop(name, None)) is not None:
                held[0].cancel()
                del self._places[name]

    def held(self) -> dict[str, Held]:
        """The workers that are there and not used, by name, and why."""
        with self._lock:
            now = self._clock()
            return {name: self._breakers[self._places[name]].held(now) or "open" for name in self._held}

    def close(self) -> None:
        """Hold nobody back any more, and use nobody."""
        with self._lock:
            self._closed = True
            for timer, _ in self._held.values():
                timer.cancel()
            self._held.clear()

    def _count(self, name: str, corrupt: bool) -> None:
        with self._lock:
            place, now = self._places.get(name), self._clock()
            if place is None:
                return
            breakers = self._breakers.setdefault(place, _Breakers(*self._limits))
            if corrupt:
                if breakers.quarantine.failed(now):
                    logger.error(
                        "attention worker %s is quarantined for %.0f min: frames to or from it came with changed bits "
                        "again; look at its line, network card and memory",
                        name,
                        breakers.quarantine.left(now) / 60,
                    )
            elif breakers.flapping.failed(now):
                logger.warning(
                    "attention worker %s was lost too often lately: it is not used for %.0f s, if there is another",
                    name,
                    breakers.flapping.left(now),
                )

    def _hold(self, name: str, seconds: float, use: Callable[[], None]) -> None:
        """Call `use` in so many seconds, unless the worker leaves before. The caller has the lock."""
        if self._closed:
            return
        self._held[name] = later(seconds, partial(self._release, name, use)), use

    def _release(self, name: str, use: Callable[[], None]) -> None:
        with self._lock:
            if self._held.pop(name, None) is None:  # it has left
                return
        use()
