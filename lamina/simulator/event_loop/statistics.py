"""Percentiles of latencies, and a fair sample of a run's steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import ceil

from lamina.simulator.event_loop.results import Distribution, Sampled

MOST_SAMPLES = 2000


def distribution(values: Iterable[float]) -> Distribution:
    """Mean and percentiles (nearest rank) of values that count once each; zeros where there are none."""
    return weighted_distribution(Counter(values))


def weighted_distribution(counts: Mapping[float, int]) -> Distribution:
    """Mean and percentiles of values, by how often each came."""
    whole = sum(counts.values())
    if not whole:
        return Distribution(0.0, 0.0, 0.0, 0.0)
    ordered = sorted(counts.items())
    percentiles, passed, at = [], 0, iter(ordered)
    value = ordered[0][0]
    for share in (0.5, 0.9, 0.99):
        while passed < ceil(share * whole):
            value, count = next(at)
            passed += count
        percentiles.append(value)
    mean = sum(value * count for value, count in ordered) / whole
    return Distribution(mean, *percentiles)


class Samples:
    """A sample of at most MOST_SAMPLES of any number of steps: every nth of them, with n doubled when it is full."""

    def __init__(self) -> None:
        self._kept: list[Sampled] = []
        self._every = 1
        self._seen = 0

    def due(self) -> bool:
        """Whether the next step is wanted. Every step is asked about once."""
        self._seen += 1
        return (self._seen - 1) % self._every == 0

    @property
    def unwanted(self) -> int:
        """How many of the next steps are not."""
        return -self._seen % self._every

    def skip(self, steps: int) -> None:
        """Go past so many unwanted steps."""
        self._seen += steps

    def add(self, sample: Sampled) -> None:
        self._kept.append(sample)
        if len(self._kept) >= MOST_SAMPLES:
            del self._kept[1::2]
            self._every *= 2

    def kept(self) -> tuple[Sampled, ...]:
        return tuple(self._kept)
