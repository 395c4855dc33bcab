"""How long exchanges with a holder take, and how long a thread spends on attention.

The clock is passed in; loading this file loads no torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

EXCHANGE_BUCKETS = (0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Upper bounds in seconds, each included, of `Exchanges.counts`; one more count is for what took longer."""


class Link(NamedTuple):
    """The way to one holder and its traffic: bytes, and a histogram of the seconds that exchanges of a layer took."""

    name: str
    address: str
    channel: str
    in_process: bool
    bytes_sent: int
    bytes_received: int
    seconds: float
    counts: tuple[int, ...]


class Exchanges:
    """A histogram of seconds. `counts` has one entry a bucket, which do not include one another."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.counts = [0] * (len(EXCHANGE_BUCKETS) + 1)

    def add(self, seconds: float) -> None:
        self.seconds += seconds
        self.counts[bisect_left(EXCHANGE_BUCKETS, seconds)] += 1


@dataclass(slots=True)
class Times:
    """What the attention of a batch took, in seconds over all layers. Holders here took `local` to attend, of the
    others the slowest took `remote`, as they say themselves; `answered` went by from asking those to having their
    answers, the last `waited` of it with nothing else to do (or with other batches)."""

    local: float = 0.0
    remote: float = 0.0
    answered: float = 0.0
    waited: float = 0.0


class Stopwatch:
    """Sums the seconds between each `start` and the `stop` after it. A `stop` without a start does nothing."""

    __slots__ = ("_clock", "_since", "seconds")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds = 0.0
        self._clock = clock
        self._since: float | None = None

    def start(self) -> None:
        self._since = self._clock()

    def stop(self) -> None:
        if self._since is not None:
            self.seconds += self._clock() - self._since
            self._since = None
