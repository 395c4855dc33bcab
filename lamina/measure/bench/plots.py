"""A serving benchmark as one picture: how long things took, and what happened when. Drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from lamina.measure.bench.measures import Outcome, over_time
from lamina.measure.bench.serve import Result
from lamina.system.figures import ACCENT, BAR, BEST, SOFT, THIRD, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = 400
"""Requests that are drawn as lines; of more, evenly spread ones."""
_POINTS = 2000
"""Of a curve."""


def save_plot(result: Result, path: Path) -> None:
    """The latencies' cumulative distributions above; each request over time, and throughput and concurrency, below.

    Raises InvalidRequest without matplotlib, or for a path that cannot be written.
    """
    outcomes = sorted(result.run.outcomes, key=lambda outcome: outcome.sent)
    good = [outcome for outcome in outcomes if not outcome.error]
    slo = result.settings.slo
    with picture(path, 12.0, 9.0) as figure:
        grid = figure.add_gridspec(3, 4, height_ratios=(2.2, 3.2, 2.2))
        values = {
            "TTFT": [each.ttft for each in good],
            "TPOT": [tpot for each in good if (tpot := each.tpot) is not None],
            "ITL": [after - before for each in good for before, after in pairwise(each.chunks)],
            "E2EL": [each.e2el for each in good],
        }
        for number, (name, found) in enumerate(values.items()):
            _distribution(figure.add_subplot(grid[0, number]), name, found, slo.get(name.lower()))
        timeline = figure.add_subplot(grid[1, :])
        _timeline(timeline, outcomes)
        _rates(figure.add_subplot(grid[2, :], sharex=timeline), good, outcomes, result.summary.duration)
        about = f"{result.model[:60]}: {result.summary.completed} requests in {result.summary.duration:.1f} s"
        figure.suptitle(f"{about}, {result.summary.output_throughput:.1f} tokens/s", x=0.01, ha="left", fontsize=11)


def _distribution(at: Axes, name: str, seconds: Sequence[float], limit: float | None) -> None:
    ordered = sorted(seconds)
    scale, unit = (1.0, "s") if ordered and ordered[-1] >= 2 else (1e3, "ms")
    title = f"{name}, {unit}"
    if ordered:
        every = max(1, len(ordered) // _POINTS)
        places = [*range(0, len(ordered), every), len(ordered) - 1]
        at.plot(
            [ordered[place] * scale for place in places], [100 * (place + 1) / len(ordered) for place in places],
            color=BEST, lw=1.6, drawstyle="steps-post",
        )  # fmt: skip
        for share in (50, 99):
            at.axhline(share, color=SOFT, lw=0.7, ls=(0, (2, 2)))
        if limit is not None:
            at.axvline(limit * scale / 1e3, color=ACCENT, lw=1.2)
            title += f"; limit {limit * scale / 1e3:g}"
    at.set_title(title)
    at.set_xlim(0, max(at.get_xlim()[1], 1e-3) * 1.04)
    at.set_ylim(0, 101)
    at.set_yticks((0, 50, 99), ("0", "50 %", "99 %"))
    at.xaxis.set_major_formatter("{x:,.10g}")


def _timeline(at: Axes, outcomes: Sequence[Outcome]) -> None:
    """A line for each request, from when it was due to its end."""
    step = -(-len(outcomes) // _LINES)
    shown = list(enumerate(outcomes))[::step] if step else []
    width = max(0.8, min(6.0, 180 / max(1, len(shown))))
    kinds: tuple[tuple[str, str, Callable[[Outcome], tuple[float, float]]], ...] = (
        ("waits at the client", BAR, lambda each: (each.due, each.sent)),
        ("waits for the first token", ACCENT, lambda each: (each.sent, each.sent + each.ttft)),
        ("its tokens come", BEST, lambda each: (each.sent + each.ttft, each.ended)),
    )
    for label, colour, ends in kinds:
        spans = [(number, *ends(each)) for number, each in shown if not each.error]
        spans = [span for span in spans if span[2] - span[1] > 1e-3]
        if spans:
            numbers, begins, finishes = zip(*spans, strict=True)
            at.hlines(numbers, begins, finishes, color=colour, lw=width, label=label)
    failed = [(number, each) for number, each in shown if each.error]
    if failed:
        at.plot([each.ended for _, each in failed], [number for number, _ in failed], "x", color=THIRD, label="failed")
    at.set_title("Requests, in the order they were sent" + (f" (one of {step})" if step > 1 else ""))
    at.set_ylim(len(outcomes) - 0.4, -0.6)
    at.set_xlim(left=0)
    at.grid(axis="y", visible=False)
    at.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=4, borderaxespad=0)


def _rates(at: Axes, good: Sequence[Outcome], outcomes: Sequence[Outcome], seconds: float) -> None:
    width = next((each for each in (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0) if seconds / each <= 60), 300.0)
    rates = over_time(good, width)
    times = [(number + 0.5) * width for number in range(len(rates))]
    at.plot(times, rates, color=BEST, lw=1.4, drawstyle="steps-mid")
    at.set_title(f"Output tokens a second (in steps of {width:g} s), and requests under way")
    at.set_ylabel("tokens/s", color=BEST)
    at.set_ylim(bottom=0)
    at.set_xlabel("seconds")
    busy = [0.0] * (int(seconds / width) + 1)
    for each in outcomes:
        for number in range(int(each.sent / width), min(len(busy) - 1, int(each.ended / width)) + 1):
            busy[number] += max(0.0, min(each.ended, (number + 1) * width) - max(each.sent, number * width)) / width
    other = at.twinx()
    other.plot([(number + 0.5) * width for number in range(len(busy))], busy, color=ACCENT, lw=1)
    other.set_ylabel("requests", color=ACCENT)
    other.set_ylim(bottom=0)
    other.grid(False)
