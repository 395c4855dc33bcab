"""The pictures of a report as PNG files, by matplotlib of the extra `plots`. It is imported when a picture is drawn.

What they show is from `data`, as in the page. Each raises InvalidRequest without matplotlib, without anything to
draw, or for a path that cannot be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.errors import InvalidRequest
from lamina.simulator.event_loop.results import Distribution, RunResult, Sampled
from lamina.simulator.reports.data import (
    TIERS,
    X_LABEL,
    Y_LABEL,
    Point,
    checked,
    frontier,
    labels,
    numbered,
    over_time,
    printable,
    time_unit,
    words,
)
from lamina.system.figures import ACCENT, BAR, BEST, THIRD, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TIER_STYLES = ((BEST, "-"), (ACCENT, (0, (5, 2))), (THIRD, (0, (1, 1.5))))


def save_comparison(results: Iterable[RunResult], path: Path) -> None:
    """Throughput, tokens a dollar and goodput as bars, and the latencies' percentiles, of all systems."""
    runs = checked(results)
    names = [printable(name, 44) for name in labels(runs)]
    rates = (
        ("Output, tok/s", [run.tokens_per_second for run in runs]),
        ("Output, million tokens a dollar", [run.tokens_per_dollar / 1e6 for run in runs]),
        ("Goodput, requests/s within the SLO", [run.goodput for run in runs]),
    )
    latencies: tuple[tuple[str, list[Distribution]], ...] = (
        ("TTFT", [run.ttft for run in runs]),
        ("TPOT", [run.tpot for run in runs]),
        ("TBT", [run.tbt for run in runs]),
    )
    with picture(path, 12.5, 2.4 + 0.62 * len(runs)) as figure:
        axes = figure.subplots(2, 3, sharey=True)
        for panel, (title, values) in zip(axes[0], rates, strict=True):
            _bars(panel, title, values, [run.keeps_slo for run in runs])
        for panel, (title, distributions) in zip(axes[1], latencies, strict=True):
            _spreads(panel, title, distributions)
        axes[0][0].set_yticks(range(len(runs)), names)
        axes[0][0].set_ylim(len(runs) - 0.4, -0.6)  # the first on top
        figure.suptitle(_about(runs[0]), x=0.01, ha="left", fontsize=11)


def save_timeline(result: RunResult, path: Path) -> None:
    """Batch, waiting requests, share of the KV pages, and utilisation of each tier over the time of one run."""
    if not result.samples:
        raise InvalidRequest(f"the result of {printable(result.system)} has no samples to draw; allowed are some")
    unit, unit_name = time_unit(max(sample.at for sample in result.samples))

    def draw(axes: Axes, value: Callable[[Sampled], float], scale: float = 1.0, **style: Any) -> None:
        line = over_time(result.samples, value, 300)
        axes.plot([x / unit for x, _ in line], [y * scale for _, y in line], lw=1.4, **style)

    with picture(path, 9.0, 7.0) as figure:
        batch, waiting, pages, busy = figure.subplots(4, 1, sharex=True, height_ratios=(3, 2, 2, 3))
        draw(batch, lambda sample: sample.decode, color=BEST)
        batch.set_title(f"Batch, sequences in decode: mean {words(result.mean_batch)}, peak {result.peak_batch:,}")
        draw(waiting, lambda sample: sample.waiting, color=BEST)
        waiting.set_title("Waiting, requests")
        draw(pages, lambda sample: sample.kv_share, 100, color=BEST)
        pages.set_title("KV pages taken, %")
        for (tier, share), (colour, dashes) in zip(TIERS, _TIER_STYLES, strict=True):
            draw(busy, share, 100, color=colour, ls=dashes, label=tier)
        busy.set_title("Busy share of a step, %")
        busy.legend(ncols=3, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.98), borderaxespad=0)
        busy.set_xlabel(unit_name)
        for panel in (batch, waiting, pages, busy):
            panel.set_ylim(bottom=0)
            panel.margins(x=0)
        for panel in (pages, busy):
            panel.set_ylim(0, 104)
        figure.suptitle(f"{printable(result.system, 60)}: {_about(result)}", x=0.01, ha="left", fontsize=11)


def save_pareto(points: Sequence[Point], chosen: str, path: Path, across: str = X_LABEL) -> None:
    """Candidates (name, x, y, feasible): the frontier of the feasible ones as a line, with the `numbered` of it
    named below, `chosen` as a star. `across` is the name of the x axis."""
    if not points:
        raise InvalidRequest("there are no points to draw; allowed are one or more")
    best = frontier(points)
    named = numbered(points)
    with picture(path, 8.0, 5.0 + 0.17 * len(named)) as figure:
        axes = figure.subplots()
        for feasible, marker, colour, text in ((False, "x", "#9aa1aa", "not feasible"), (True, "o", BAR, "feasible")):
            mine = [point for point in points if point[3] is feasible]
            if mine:
                axes.scatter([p[1] for p in mine], [p[2] for p in mine], s=22, marker=marker, color=colour, label=text)
        if best:
            axes.plot([p[1] for p in best], [p[2] for p in best], "o-", color=BEST, ms=5, lw=1.2, label="frontier")
        for point in [point for point in points if point[0] == chosen][:1]:
            axes.scatter(
                [point[1]],
                [point[2]],
                s=170,
                marker="*",
                color=ACCENT,
                zorder=5,
                label=printable(f"chosen: {chosen}", 80),
                ec="white",
            )
        for number, point in enumerate(named, 1):
            axes.annotate(str(number), point[1:3], xytext=(5, 5), textcoords="offset points", fontsize=8)
        legend = [f"{number}  {printable(point[0], 110)}" for number, point in enumerate(named, 1)]
        axes.set_xlabel(across, loc="right")
        if legend:
            figure.supxlabel("\n".join(legend), x=0.02, ha="left", fontsize=8)
        axes.set_title(Y_LABEL, fontweight="normal", fontsize=9)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.yaxis.set_major_formatter("{x:,.10g}")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.06), ncols=2, borderaxespad=0)


def _bars(at: Axes, title: str, values: Sequence[float], kept: Sequence[bool]) -> None:
    """The best of what keeps the SLO is darker."""
    top = max(values)
    best = max((value for value, keeps in zip(values, kept, strict=True) if keeps), default=None)
    colours = [BEST if keeps and value == best else BAR for value, keeps in zip(values, kept, strict=True)]
    drawn = at.barh(range(len(values)), values, height=0.55, color=colours)
    at.bar_label(drawn, [words(value) if value else "–" for value in values], padding=4)
    at.set_title(title)
    at.set_xlim(0, top * 1.18 or 1.0)
    at.grid(False)
    at.xaxis.set_visible(False)
    at.spines["bottom"].set_visible(False)
    at.tick_params(left=False)


def _spreads(at: Axes, title: str, found: Sequence[Distribution]) -> None:
    values = [value for latency in found for value in (latency.p50, latency.p99) if value > 0]
    scale, unit = (1.0, "s") if max(values, default=0.0) >= 2 else (1e3, "ms")
    for place, latency in enumerate(found):
        p50, p90, p99 = (value * scale for value in (latency.p50, latency.p90, latency.p99))
        at.plot([p50, p99], [place, place], color=BAR, lw=3, solid_capstyle="butt", zorder=2)
        at.plot([p50], [place], "o", color=BEST, ms=6, zorder=3, label="p50" if not place else None)
        at.plot([p90], [place], "|", color=BEST, ms=11, mew=2, zorder=3, label="p90" if not place else None)
        at.plot([p99], [place], "D", color=BEST, mfc="white", ms=6, zorder=3, label="p99" if not place else None)
    at.set_title(f"{title}, {unit}")
    at.grid(axis="y", visible=False)
    at.tick_params(left=False)
    if values and max(values) > 20 * min(values):
        at.set_xscale("log")
        at.xaxis.set_minor_formatter("")
        at.set_title(f"{title}, {unit}, logarithmic")
    else:
        at.set_xlim(0, max(values, default=1.0) * scale * 1.08)
    at.xaxis.set_major_formatter("{x:,.10g}")
    if title == "TTFT":
        at.legend(ncols=3, frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.14), handletextpad=0.2)


def _about(run: RunResult) -> str:
    return f"{printable(run.model, 40)} on {printable(run.trace, 40)}, simulated"
