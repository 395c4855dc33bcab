"""Parts of a trace that stand for all of it, at the rate that is wanted. Pure."""

from __future__ import annotations

from dataclasses import replace

from lamina.simulator.traces import Arrival, Trace, scaled

WINDOWS = 16
"""That an excerpt is taken from."""


def windows(trace: Trace, count: int, parts: int = WINDOWS) -> Trace:
    """`count` of a trace's requests, from windows that lie evenly over it, one after another: loads and lengths change
    over a day, and its beginning alone would be another trace. All of it where it has no more."""
    total = len(trace.arrivals)
    if total <= count:
        return trace
    length = max(1, count // parts)
    taken: list[Arrival] = []
    gap = trace.seconds / (total - 1)
    for part in range(count // length):
        first = part * (total - length) // max(1, count // length - 1)
        arrivals = trace.arrivals[first : first + length]
        start = taken[-1].at + gap if taken else 0.0
        taken += [replace(arrival, at=start + arrival.at - arrivals[0].at) for arrival in arrivals]
    return Trace(trace.name, tuple(taken))


def at_rate(trace: Trace, rate: float) -> Trace:
    """The trace at so many requests a second; as it is where all come at once."""
    if not trace.seconds:
        return trace
    faster = scaled(trace, rate * trace.seconds / (len(trace.arrivals) - 1))
    return replace(faster, name=f"{trace.name} at {rate:.3g}/s")
