"""How long is waited in front of a server that isn't always free. Pure formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wait:
    """Mean seconds over all, and the share that waits at all."""

    seconds: float
    share: float


def queue(rate: float, service: float, arrivals: float, services: float) -> Wait:
    """One server, `rate` a second with `service` seconds each: Kingman's formula (1961), which is Pollaczek and
    Khinchine's for Poisson arrivals. The last two are squared coefficients of variation, of the times between arrivals
    and of service. Infinite where it can't keep up."""
    busy = rate * service
    if busy >= 1:
        return Wait(math.inf, 1.0)
    return Wait((arrivals + services) / 2 * busy / (1 - busy) * service, busy)


def in_time(waits: Sequence[Wait], left: float) -> float:
    """The share that waits no longer than `left` seconds in all of them: 1 - P exp(-t P / W) for the share P that waits
    and the mean W, as it is for an M/M/1 queue."""
    if left < 0:
        return 0.0
    seconds, waiting = sum(wait.seconds for wait in waits), 1 - math.prod(1 - wait.share for wait in waits)
    if math.isinf(left) or seconds <= 0:
        return 1.0
    return 0.0 if math.isinf(seconds) else 1 - waiting * math.exp(-left * waiting / seconds)
