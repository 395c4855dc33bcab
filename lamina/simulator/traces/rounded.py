"""Times of arrival that were rounded to a step, such as Mooncake's to 3 seconds: found, and spread again.

Requests that came within a step then seem to come at once, and a trace that is played slower or faster shows bursts
that were never sent.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lamina.simulator.traces.arrivals import Trace

_EQUAL = 0.2
"""The least share of the requests that come at another's time where times were rounded."""
_OFF = 0.02
"""The share of a step by which a time may miss a multiple of it: clocks are read late, and milliseconds are whole."""


def step_of(trace: Trace) -> float:
    """The seconds that times were rounded to; 0 where they were not, or where it makes no difference."""
    at = np.array([arrival.at for arrival in trace.arrivals])
    distinct = np.unique(at)
    if len(distinct) < 3 or len(distinct) > (1 - _EQUAL) * len(at):
        return 0.0
    gaps = np.diff(distinct)
    steps = np.rint(gaps / gaps.min())
    step = float(gaps.sum() / steps.sum())
    off = distinct - distinct[0] - step * np.concatenate([[0.0], np.cumsum(steps)])
    return step if np.abs(off).max() <= _OFF * step else 0.0


def spread(trace: Trace) -> Trace:
    """The trace with times that were rounded spread within their step by chance, always the same, in their order. As
    it is where they were not rounded."""
    step = step_of(trace)
    if not step:
        return trace
    at = np.array([arrival.at for arrival in trace.arrivals])
    later = at + np.random.default_rng(0).random(len(at)) * step
    later = np.sort(later)  # steps do not overlap, so that each stays in its own
    said = f"times were rounded to {step:.3g} s; they are spread within it by chance"
    moved = zip(trace.arrivals, later.tolist(), strict=True)
    return replace(
        trace,
        arrivals=tuple(replace(arrival, at=when) for arrival, when in moved),
        remarks=(*trace.remarks, said),
    )
