#!/usr/bin/env python3
"""One picture of a serving benchmark: how long things took, and what happened when.

usage: scripts/bench/serve_picture.py RESULT.json [--out PICTURE.png]

RESULT.json is what `lamina bench serve --save-result RESULT.json --save-detailed` keeps. Above are the cumulative
distributions of the latencies, below each request over time, throughput and concurrency. Drawn by matplotlib (the extra
`plots`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.measure.bench.measures import Outcome, latencies, over_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEST, BAR, SOFT, RULE = "#0065a3", "#8fb8d4", "#59616b", "#dcdfe3"
ACCENT, THIRD = "#b04a00", "#00705a"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "text.parse_math": False,  # names come from files, and may hold dollars
}
_LINES = 400
"""Requests that are drawn as lines; of more, evenly spread ones."""
_POINTS = 2000
"""Of a curve."""


def outcomes_of(record: dict[str, Any]) -> list[Outcome]:
    """The requests of a result, in the order in which they were sent."""
    names = {"planned_prompt": "planned", "prompt_tokens": "prompt", "output_tokens": "output",
             "cached_tokens": "cached", "finish_reason": "finish"}  # fmt: skip
    outcomes = [
        Outcome(**{names.get(name, name): value for name, value in item.items()}) for item in record["requests"]
    ]
    return sorted(outcomes, key=lambda outcome: outcome.sent)


def draw(record: dict[str, Any], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    outcomes, duration = outcomes_of(record), record["duration"]
    good = [outcome for outcome in outcomes if not outcome.error]
    with rc_context(_STYLE):
        figure = Figure(figsize=(12.0, 9.0), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(3, 4, height_ratios=(2.2, 3.2, 2.2))
        for number, (name, seconds) in enumerate(latencies(good).items()):
            limit = record["settings"]["slo"].get(name)
            _distribution(figure.add_subplot(grid[0, number]), name.upper(), seconds, limit)
        timeline = figure.add_subplot(grid[1, :])
        _timeline(timeline, outcomes)
        _rates(figure.add_subplot(grid[2, :], sharex=timeline), good, outcomes, duration)
        about = f"{record['model_id'][:60]}: {record['completed']} requests in {duration:.1f} s"
        figure.suptitle(f"{about}, {record['output_throughput']:.1f} tokens/s", x=0.01, ha="left", fontsize=11)
        figure.savefig(path, format="png", dpi=130, metadata={"Software": "lamina"})


def _distribution(at: Axes, name: str, seconds: Sequence[float], limit: float | None) -> None:
    ordered = sorted(seconds)
    scale, unit = (1.0, "s") if ordered and ordered[-1] >= 2 else (1e3, "ms")
    title = f"{name}, {unit}"
    if ordered:
        every = max(1, len(ordered) // _POINTS)
        places = [*range(0, len(ordered), every), len(ordered) - 1]
        at.plot(
            [ordered[place] * scale for place in places],
            [100 * (place + 1) / len(ordered) for place in places],
            color=BEST,
            lw=1.6,
            drawstyle="steps-post",
        )
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
    lines = list(enumerate(outcomes))[::step] if step else []
    width = max(0.8, min(6.0, 180 / max(1, len(lines))))
    kinds: tuple[tuple[str, str, Callable[[Outcome], tuple[float, float]]], ...] = (
        ("waits at the client", BAR, lambda outcome: (outcome.due, outcome.sent)),
        ("waits for the first token", ACCENT, lambda outcome: (outcome.sent, outcome.sent + outcome.ttft)),
        ("its tokens come", BEST, lambda outcome: (outcome.sent + outcome.ttft, outcome.ended)),
    )
    for label, colour, ends in kinds:
        spans = [(number, *ends(outcome)) for number, outcome in lines if not outcome.error]
        spans = [span for span in spans if span[2] - span[1] > 1e-3]
        if spans:
            numbers, begins, finishes = zip(*spans, strict=True)
            at.hlines(numbers, begins, finishes, color=colour, lw=width, label=label)
    failed = [(number, outcome) for number, outcome in lines if outcome.error]
    if failed:
        at.plot(
            [outcome.ended for _, outcome in failed], [number for number, _ in failed], "x", color=THIRD, label="failed"
        )
    at.set_title("Requests, in the order they were sent" + (f" (one of {step})" if step > 1 else ""))
    at.set_ylim(len(outcomes) - 0.4, -0.6)
    at.set_xlim(left=0)
    at.grid(axis="y", visible=False)
    at.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=4, borderaxespad=0)


def _rates(at: Axes, good: Sequence[Outcome], outcomes: Sequence[Outcome], seconds: float) -> None:
    width = next((step for step in (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0) if seconds / step <= 60), 300.0)
    rates = over_time(good, width)
    times = [(number + 0.5) * width for number in range(len(rates))]
    at.plot(times, rates, color=BEST, lw=1.4, drawstyle="steps-mid")
    at.set_title(f"Output tokens a second (in steps of {width:g} s), and requests under way")
    at.set_ylabel("tokens/s", color=BEST)
    at.set_ylim(bottom=0)
    at.set_xlabel("seconds")
    busy = [0.0] * (int(seconds / width) + 1)
    for outcome in outcomes:
        for number in range(int(outcome.sent / width), min(len(busy) - 1, int(outcome.ended / width)) + 1):
            busy[number] += (
                max(0.0, min(outcome.ended, (number + 1) * width) - max(outcome.sent, number * width)) / width
            )
    other = at.twinx()
    other.plot([(number + 0.5) * width for number in range(len(busy))], busy, color=ACCENT, lw=1)
    other.set_ylabel("requests", color=ACCENT)
    other.set_ylim(bottom=0)
    other.grid(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = json.loads(options.result.read_text())
    if not record.get("requests"):
        sys.exit(f"{options.result} has no requests; `lamina bench serve` keeps them with --save-detailed")
    draw(record, options.out or options.result.with_suffix(".png"))


if __name__ == "__main__":
    main()
