"""What tables and pictures of runs show: columns, names, means over time, the frontier. Pure. Names come from files:
they are made printable here, and the drawing code escapes them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lamina.errors import InvalidRequest
from lamina.simulator.event_loop.results import ATTAINMENT, RunResult, Sampled

Point = tuple[str, float, float, bool]
"""A candidate: its name, x, y, and whether it is feasible."""
Line = tuple[tuple[float, float], ...]
UNKNOWN = "–"
X_LABEL, Y_LABEL = "output tokens a dollar, within the SLO", "tokens a second of each user"
"""Axis labels of a Pareto plot."""
FREE_LABEL = "output tokens a second, within the SLO"
"""The label in place of `X_LABEL` where devices are free."""
NUMBERED = 12
KEPT = f"among systems with {ATTAINMENT:.0%} of their requests within the SLO"
NONE_KEEPS = f"No system has {ATTAINMENT:.0%} of its requests within the SLO: nothing is marked as the best"
TIERS: tuple[tuple[str, Callable[[Sampled], float]], ...] = (
    ("model", lambda sample: sample.model_share),
    ("attention", lambda sample: sample.attention_share),
    ("network", lambda sample: sample.network_share),
)
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Column:
    """One number of a run. `best` is +1 where more is better, -1 where less is, 0 where neither."""

    head: str
    unit: str
    value: Callable[[RunResult], float]
    best: int = 0
    zero: bool = True
    """Whether 0 is a value; otherwise it stands for not known."""
    form: str = ""
    """A format of its own, instead of that of `words`."""

    def known(self, result: RunResult) -> float | None:
        value = self.value(result)
        return value if math.isfinite(value) and (self.zero or value) else None

    def text(self, result: RunResult) -> str:
        value = self.known(result)
        return words(value) if value is None or not self.form else format(value, self.form)


COLUMNS = (
    Column("output", "tok/s", lambda run: run.tokens_per_second, +1),
    Column(
        "when full", "tok/s", lambda run: run.saturated_tokens_per_second if run.mostly_full else 0.0, +1, zero=False
    ),
    Column("price", "$/h", lambda run: run.price, zero=False, form=",.2f"),
    Column("cost", "$/M tok", lambda run: run.dollars_per_million, -1, zero=False),
    Column("energy", "tok/J", lambda run: run.tokens_per_joule, +1, zero=False),
    Column("batch", "mean", lambda run: run.mean_batch),
    Column("TTFT", "p50 s", lambda run: run.ttft.p50, -1),
    Column("TTFT", "p99 s", lambda run: run.ttft.p99, -1),
    Column("TPOT", "p50 ms", lambda run: run.tpot.p50 * 1e3, -1),
    Column("TPOT", "p99 ms", lambda run: run.tpot.p99 * 1e3, -1),
    Column("TBT", "p99 ms", lambda run: run.tbt.p99 * 1e3, -1),
    Column("goodput", "req/s", lambda run: run.goodput, +1),
    Column("in SLO", "%", lambda run: run.slo_share * 100, +1),
    Column("model", "busy %", lambda run: run.model_utilisation * 100),
    Column("attention", "busy %", lambda run: run.attention_utilisation * 100),
    Column("network", "busy %", lambda run: run.network_utilisation * 100),
    Column("link", "GB/s", lambda run: run.link_bytes / run.seconds / 1e9 if run.seconds else 0.0),
)


def checked(results: Iterable[RunResult]) -> tuple[RunResult, ...]:
    """The results; raises InvalidRequest where there are none."""
    runs = tuple(results)
    if not runs:
        raise InvalidRequest("there are no results to report; allowed are one or more")
    return runs


def columns(results: Sequence[RunResult]) -> tuple[Column, ...]:
    """The `COLUMNS` with a value in any result."""
    return tuple(column for column in COLUMNS if any(column.known(run) is not None for run in results))


def best_of(results: Sequence[RunResult]) -> tuple[frozenset[int], ...]:
    """For each of `columns(results)` the places of its best value, among what keeps the SLO; none where all
    are alike."""
    marked: list[frozenset[int]] = []
    compliant = [(place, run) for place, run in enumerate(results) if run.keeps_slo]
    for column in columns(results):
        values = {place: value for place, run in compliant if (value := column.known(run)) is not None}
        best = max(values.values(), key=lambda value: value * column.best) if values and column.best else None
        places = frozenset(place for place, value in values.items() if best is not None and words(value) == words(best))
        marked.append(places if len(places) < len(compliant) else frozenset())
    return tuple(marked)


def printable(text: str, most: int = 200) -> str:
    """On one line, without control characters, at most `most` characters: of a longer one the beginning and the end."""
    clean = "".join(letter if letter.isprintable() else " " for letter in text)
    clean = " ".join(clean.split()) or UNKNOWN
    if len(clean) <= most:
        return clean
    tail = most * 2 // 5
    return clean[: most - tail - 1].rstrip() + "…" + clean[-tail:].lstrip()


def labels(results: Sequence[RunResult]) -> tuple[str, ...]:
    """A name for each result: its system's, with what else sets it apart from the others."""
    names = [printable(result.system) for result in results]
    for more in ("policy", "model", "trace", "seed"):
        count = Counter(names)
        if len(count) == len(names):
            break
        values = [printable(str(getattr(result, more))) for result in results]
        if len(set(values)) > 1:
            words = [f"seed {value}" if more == "seed" else value for value in values]
            names = [f"{name}, {word}" if count[name] > 1 else name for name, word in zip(names, words, strict=True)]
    count = Counter(names)
    return tuple(f"{name} #{place}" if count[name] > 1 else name for place, name in enumerate(names, 1))


def words(value: float | None) -> str:
    """A number with three significant digits, and no fewer before the point."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    size = abs(value)
    if size >= 1e9:
        return f"{value:.3g}"
    for least, form in ((99.95, ",.0f"), (9.995, ".1f"), (0.9995, ".2f")):
        if size >= least:
            return format(value, form)
    return f"{value:#.3g}" if size >= 1e-4 else f"{value:.3g}"


def ticks(high: float, intervals: int) -> tuple[float, ...]:
    """Round numbers from 0 that cover `high`, the last of them at or above it, in at most so many intervals."""
    if not (math.isfinite(high) and high > 0):
        high = 1.0
    unit = 10.0 ** math.floor(math.log10(high / intervals))
    step = next(nice * unit for nice in (*_NICE, 20.0) if nice * unit * intervals >= high * (1 - 1e-9))
    count = math.ceil(high / step - 1e-9)
    return tuple(float(f"{place * step:.12g}") for place in range(count + 1))


def log_ticks(low: float, high: float) -> tuple[float, float, tuple[float, ...]]:
    """(start, end, ticks) of a logarithmic axis for `low` to `high`, both above 0.

    Start and end are 1, 2 or 5 times a power of ten; the ticks are all such numbers, or powers alone where those are
    many.
    """
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = [float(f"{digit}e{power}") for power in range(first, last + 2) for digit in (1, 2, 5)]
    start = max(value for value in every if value <= low * (1 + 1e-9))
    end = min(value for value in every if value >= high * (1 - 1e-9) and value > start)
    marks = [value for value in every if start <= value <= end]
    if len(marks) > 6:
        marks = [value for value in every[::3] if start <= value <= end]
        marks = marks[:: math.ceil(len(marks) / 5)]
    return start, end, tuple(value for value in marks if start <= value <= end)


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit of time in which a run that long is drawn: its seconds and its name."""
    if seconds > 3 * 3600:
        return 3600.0, "h"
    return (60.0, "min") if seconds > 300 else (1.0, "s")


def over_time(samples: Sequence[Sampled], value: Callable[[Sampled], float], bins: int = 120) -> Line:
    """(seconds, mean) of one quantity, in at most `bins` equal spans of time, weighted by the steps' seconds."""
    if not samples:
        return ()
    start = min(sample.at for sample in samples)
    span = max(sample.at for sample in samples) - start
    if len(samples) <= bins or span <= 0:
        return tuple(sorted((sample.at, value(sample)) for sample in samples))
    weights, sums, times = [0.0] * bins, [0.0] * bins, [0.0] * bins
    for sample in samples:
        place = min(int((sample.at - start) / span * bins), bins - 1)
        weight = max(sample.seconds, 1e-12)
        weights[place] += weight
        sums[place] += weight * value(sample)
        times[place] += weight * sample.at
    return tuple((times[n] / weights[n], sums[n] / weights[n]) for n in range(bins) if weights[n])


def frontier(points: Iterable[Point]) -> tuple[Point, ...]:
    """The feasible points that no other feasible one beats in x and y, by rising x; more is better in both."""
    best: list[Point] = []
    for point in sorted((point for point in points if point[3]), key=lambda point: (-point[1], -point[2], point[0])):
        if not best or point[2] > best[-1][2]:
            best.append(point)
    return tuple(reversed(best))


def numbered(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points of the frontier that are named, in the order of their numbers: at most `NUMBERED`, with the largest
    x."""
    return frontier(points)[-NUMBERED:]
