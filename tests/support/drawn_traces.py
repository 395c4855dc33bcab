"""Traces that tests draw, and what a trace is like in a few numbers."""

from __future__ import annotations

import numpy as np

from lamina.simulator.traces.arrivals import Arrival, Trace


def poisson(rate: float, count: int, prompt: int, output: int, seed: int = 0) -> Trace:
    """`count` requests of these lengths that come independently, `rate` a second."""
    gaps = np.random.default_rng(seed).gamma(1.0, 1.0, count - 1) / rate
    at = [0.0, *np.cumsum(gaps).tolist()]
    return Trace(f"poisson {rate:g}/s", tuple(Arrival(when, prompt, output) for when in at))


def summary(trace: Trace) -> dict[str, float]:
    """Means of tokens, and the coefficient of variation of gaps."""
    gaps = np.diff([arrival.at for arrival in trace.arrivals])
    return {
        "prompt_mean": float(np.mean([arrival.prompt for arrival in trace.arrivals])),
        "output_mean": float(np.mean([arrival.output for arrival in trace.arrivals])),
        "gap_cv": float(gaps.std() / gaps.mean()),
    }


def reused_share(trace: Trace) -> float:
    """The share of all blocks of prompts that a cache which forgets nothing has from earlier prompts."""
    names: set[int] = set()
    shared = total = 0
    for arrival in trace.arrivals:
        shared += next((n for n, block in enumerate(arrival.blocks) if block not in names), len(arrival.blocks))
        total += len(arrival.blocks)
        names.update(arrival.blocks)
    return shared / total if total else 0.0
