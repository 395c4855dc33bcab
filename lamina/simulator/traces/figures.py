"""What a trace is like, in numbers: few enough to commit, and enough to draw a trace like it.

`trace_figures.toml` beside this file has those of three published traces. `scripts/simulate/trace_figures.py` makes it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.errors import InvalidRequest
from lamina.system.text_files import read_toml

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_TAIL = (92.5, 95, 96, 97, 98, 99, 99.25, 99.5, 99.7, 99.8, 99.9, 99.95, 100)  # of long ones, it carries the mean
LEVELS = tuple(percent / 100 for percent in (0, 1, 2, *range(5, 95, 5), *_TAIL))
"""The shares at which quantiles are committed."""


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
    """A trace in numbers. Lengths are tokens, times seconds; correlations are Spearman's. `context` is the mean number
    of tokens a sequence has in decode, over all that decode at a time: E[o (p + o / 2)] / E[o].

    `load` is the rate over the trace's, in equal parts of about a minute, without what is chance (below); none where
    all of it may be. `minute_cv` is how the counts of these parts vary, chance included. Gaps between arrivals are
    those of the same trace at an even load.

    Where times were rounded to multiples of `step` there are no `gaps`, as they would show only the rounding, and
    `step_cv` is the coefficient of variation of the gaps of a renewal process that has as unequal counts of arrivals a
    step (the root of variance / mean).
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
    context: float
    rank_correlation: float
    gap_cv: float
    minute_cv: float
    load: tuple[float, ...] = ()
    gaps: Quantiles | None = None
    step: float = 0.0
    step_cv: float = 0.0
    sharing: Sharing | None = None

    @property
    def rate(self) -> float:
        """Requests a second, between the first and the last."""
        return (self.count - 1) / self.seconds


def minutes_of(at: Floats) -> tuple[Integers, float]:
    """How many of these times are in each of equal parts of about a minute, and the seconds of a part. Times begin at
    0; the last part has the last of them."""
    parts = max(1, round(float(at[-1]) / 60))
    counts, _ = np.histogram(at, parts, (0.0, max(float(at[-1]), 1e-9)))
    return counts.astype(np.int64), float(at[-1]) / parts


@functools.cache
def published() -> Mapping[str, Figures]:
    """The committed figures, by the trace's name."""
    tables = read_toml(Path(__file__).with_name("trace_figures.toml"))
    return {name: _from_toml(name, table) for name, table in tables.items()}


def _from_toml(name: str, table: dict[str, Any]) -> Figures:
    def quantiles(values: Any) -> Quantiles:
        return Quantiles(LEVELS, tuple(float(value) for value in values))

    fields = dict(table)
    for key in ("prompt", "output", "gaps"):
        if key in fields:
            fields[key] = quantiles(fields[key])
    fields["load"] = tuple(fields.get("load", ()))
    if sharing := fields.pop("sharing", None):
        fields["sharing"] = Sharing(
            **{**sharing, "depth": quantiles(sharing["depth"]), "lag": quantiles(sharing["lag"])}
        )
    return Figures(name=name, **fields)
