"""Traces that tests draw, and what a trace is like in a few numbers."""

from __future__ import annotations

import numpy as np
from simulate.trace_figures import gaps_of, lengths_of, rank_correlation, shared_blocks, variation

from lamina.simulator.traces.arrivals import Arrival, Trace


def poisson(rate: float, count: int, prompt: int, output: int, seed: int = 0) -> Trace:
    """`count` requests of these lengths that come independently, `rate` a second."""
    gaps = np.random.default_rng(seed).gamma(1.0, 1.0, count - 1) / rate
    at = [0.0, *np.cumsum(gaps).tolist()]
    return Trace(f"poisson {rate:g}/s", tuple(Arrival(when, prompt, output) for when in at))


def summary(trace: Trace) -> dict[str, float]:
    """Counts, tokens, seconds, requests a second. Shares and correlations are 0 where there are none."""
    arrivals = trace.arrivals
    rate = (len(arrivals) - 1) / trace.seconds if trace.seconds else 0.0
    found = {
        "requests": float(len(arrivals)),
        "seconds": trace.seconds,
        "rate": rate,
        "gap_cv": variation(gaps_of(trace)),
    }
    lengths = {"prompt": lengths_of(trace, "prompt"), "output": lengths_of(trace, "output")}
    for name, values in lengths.items():
        found[f"{name}_mean"] = float(values.mean())
        for percent in (50, 90, 99, 100):
            found[f"{name}_p{percent}"] = float(np.percentile(values, percent))
    found["rank_correlation"] = rank_correlation(lengths["prompt"], lengths["output"])
    shared, _ = shared_blocks(trace)
    blocks = sum(len(arrival.blocks) for arrival in arrivals)
    found["reused_share"] = sum(shared) / blocks if blocks else 0.0
    return found
