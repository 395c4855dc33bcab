"""What a trace is like, in numbers: few enough to commit, and enough to draw a trace like it.

`trace_figures.toml` beside this file has those of three published traces. `scripts/simulate/trace_figures.py` makes it.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.errors import InvalidRequest
from lamina.simulator.traces.arrivals import Trace, blocks_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Floats = NDArray[np.float64]

_TAIL = (92.5, 95, 96, 97, 98, 99, 99.25, 99.5, 99.7, 99.8, 99.9, 99.95, 100)  # of long ones, it carries the mean
LEVELS = tuple(percent / 100 for percent in (0, 1, 2, *range(5, 95, 5), *_TAIL))
"""At which shares the committed quantiles are."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution: at or below `values[i]` is the share `levels[i]` of it, and straight lines lie between.

    Raises InvalidRequest unless levels rise from 0 to 1 and values are finite, 0 or more, and never fall.
    """

    levels: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        rises = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if len(self.levels) < 2 or not rises or (self.levels[0], self.levels[-1]) != (0, 1):
            raise InvalidRequest(f"levels are {self.levels!r:.80}; allowed are numbers that rise from 0 to 1")
        if len(self.values) != len(self.levels):
            raise InvalidRequest(f"there are {len(self.values)} values; allowed are {len(self.levels)}, one a level")
        falls = any(not a <= b for a, b in zip(self.values, self.values[1:], strict=False))
        if falls or not 0 <= self.values[0] <= self.values[-1] < math.inf:
            raise InvalidRequest(
                f"values are {self.values!r:.80}; allowed are finite numbers from 0 on that never fall"
            )

    def at(self, shares: Floats) -> Floats:
        """The values below which these shares lie."""
        return np.interp(shares, self.levels, self.values)


def uniform(low: float, high: float) -> Quantiles:
    """Every value from low to high is as likely."""
    return Quantiles((0.0, 1.0), (low, high))


@dataclass(frozen=True, slots=True)
class Sharing:
    """How prompts share their beginnings, with a cache that forgets nothing.

    `common` blocks begin every prompt; `depth` is the share of a prompt's other blocks that an earlier prompt had,
    `correlation` its rank correlation with the prompt's length, and `lag` how many seconds ago the last such prompt
    came, where there was one. `reused` is the share of all blocks.
    """

    common: int
    depth: Quantiles
    correlation: float
    lag: Quantiles
    reused: float


@dataclass(frozen=True, slots=True)
class Figures:
    """A trace in numbers. Lengths are tokens, times seconds; correlations are Spearman's.

    Where more than half of the gaps between arrivals are 0, times were rounded to multiples of `step`: then there are
    no `gaps`, as they would show only the rounding, and `step_cv` is the coefficient of variation of the gaps of a
    renewal process that has as unequal counts of arrivals a step (the root of variance / mean).
    """

    name: str
    source: str
    licence: str
    count: int
    seconds: float
    prompt_mean: float
    output_mean: float
    prompt: Quantiles
    output: Quantiles
    rank_correlation: float
    gap_cv: float
    gaps: Quantiles | None = None
    step: float = 0.0
    step_cv: float = 0.0
    sharing: Sharing | None = None

    @property
    def rate(self) -> float:
        """Requests a second, between the first and the last."""
        return (self.count - 1) / self.seconds


def summary(trace: Trace) -> dict[str, float]:
    """For people: counts, tokens, seconds, requests a second. Shares and correlations are 0 where there are none."""
    arrivals = trace.arrivals
    rate = (len(arrivals) - 1) / trace.seconds if trace.seconds else 0.0
    found = {"requests": float(len(arrivals)), "seconds": trace.seconds, "rate": rate, "gap_cv": _cv(_gaps(trace))}
    lengths = {"prompt": _lengths(trace, "prompt"), "output": _lengths(trace, "output")}
    for name, values in lengths.items():
        found[f"{name}_mean"] = float(values.mean())
        for percent in (50, 90, 99, 100):
            found[f"{name}_p{percent}"] = float(np.percentile(values, percent))
    found["rank_correlation"] = rank_correlation(lengths["prompt"], lengths["output"])
    shared, _ = _shared(trace)
    blocks = sum(len(arrival.blocks) for arrival in arrivals)
    found["reused_share"] = sum(shared) / blocks if blocks else 0.0
    return found


def measure(trace: Trace, source: str, licence: str) -> Figures:
    """The figures of a trace, to 6 digits. Raises InvalidRequest where it is too short for them."""
    if len(trace.arrivals) < 2 or not trace.seconds:
        raise InvalidRequest(f"{trace.name} has one moment; figures need requests at different times")
    prompt, output, gaps = _lengths(trace, "prompt"), _lengths(trace, "output"), _gaps(trace)
    step = step_cv = 0.0
    if np.mean(gaps == 0) > 0.5:
        step = float(np.median(gaps[gaps > 0]))
        step_cv = _step_cv(trace, step)
    return Figures(
        name=trace.name,
        source=source,
        licence=licence,
        count=len(trace.arrivals),
        seconds=_rounded(trace.seconds),
        prompt_mean=_rounded(prompt.mean()),
        output_mean=_rounded(output.mean()),
        prompt=_quantiles(prompt),
        output=_quantiles(output),
        rank_correlation=_rounded(rank_correlation(prompt, output)),
        gap_cv=_rounded(_cv(gaps)),
        gaps=None if step else _quantiles(gaps),
        step=_rounded(step),
        step_cv=_rounded(step_cv),
        sharing=_sharing(trace, prompt) if all(arrival.blocks for arrival in trace.arrivals) else None,
    )


@functools.cache
def published() -> Mapping[str, Figures]:
    """The committed figures, by the trace's name."""
    text = resources.files("lamina.simulator.traces").joinpath("trace_figures.toml").read_text("utf-8")
    return MappingProxyType({name: _from_toml(name, table) for name, table in tomllib.loads(text).items()})


def rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's: of ranks, where equal values share their mean rank. 0 where either is constant."""
    ranks = [_ranks(values) for values in (x, y)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if all(rank.std() for rank in ranks) else 0.0


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def _from_toml(name: str, table: dict[str, Any]) -> Figures:
    def quantiles(values: Any) -> Quantiles:
        return Quantiles(LEVELS, tuple(float(value) for value in values))

    fields = dict(table)
    for key in ("prompt", "output", "gaps"):
        if key in fields:
            fields[key] = quantiles(fields[key])
    if sharing := fields.pop("sharing", None):
        fields["sharing"] = Sharing(
            **{**sharing, "depth": quantiles(sharing["depth"]), "lag": quantiles(sharing["lag"])}
        )
    return Figures(name=name, **fields)


def _sharing(trace: Trace, prompt: Floats) -> Sharing:
    shared, lags = _shared(trace)
    columns = zip(*(arrival.blocks for arrival in trace.arrivals), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    blocks = np.array([blocks_of(arrival.prompt) for arrival in trace.arrivals])
    beyond = np.maximum(np.array(shared) - common, 0)
    depth = beyond / np.maximum(blocks - common, 1)
    return Sharing(
        common=common,
        depth=_quantiles(depth),
        correlation=_rounded(rank_correlation(prompt, depth)),
        lag=_quantiles(np.array(lags)[beyond > 0] if beyond.any() else np.zeros(1)),
        reused=_rounded(sum(shared) / int(blocks.sum())),
    )


def _shared(trace: Trace) -> tuple[list[int], list[float]]:
    """Of each prompt, how many of its first blocks earlier prompts had, and how many seconds ago the last one came
    that had them all (0 where none did)."""
    last: dict[int, float] = {}
    shared, lags = [], []
    for arrival in trace.arrivals:
        count = next((n for n, block in enumerate(arrival.blocks) if block not in last), len(arrival.blocks))
        shared.append(count)
        lags.append(arrival.at - last[arrival.blocks[count - 1]] if count else 0.0)
        last.update(dict.fromkeys(arrival.blocks, arrival.at))
    return shared, lags


def _lengths(trace: Trace, name: str) -> Floats:
    return np.array([getattr(arrival, name) for arrival in trace.arrivals], np.float64)


def _gaps(trace: Trace) -> Floats:
    return np.diff(np.array([arrival.at for arrival in trace.arrivals], np.float64))


def _step_cv(trace: Trace, step: float) -> float:
    """The root of variance / mean of how many arrive in each step, with those in which none does."""
    times = np.array([arrival.at for arrival in trace.arrivals]) - trace.arrivals[0].at
    _, counts = np.unique(np.rint(times / step), return_counts=True)
    mean = len(times) / (np.rint(times[-1] / step) + 1)
    return math.sqrt(max(0.0, float(np.sum(counts.astype(np.float64) ** 2) / len(times) - mean)))


def _cv(gaps: Floats) -> float:
    return float(gaps.std() / gaps.mean()) if gaps.size and gaps.mean() else 0.0


def _quantiles(values: Floats) -> Quantiles:
    return Quantiles(LEVELS, tuple(_rounded(value) for value in np.quantile(values, LEVELS)))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
