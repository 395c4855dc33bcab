"""A serving benchmark's result as text in the layout of vLLM's (`text`), as plain data for JSON (`record`), and as one
picture (`save_plot`).

Text and data are pure. The picture shows how long things took, and what happened when. It is drawn by matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.measure.bench.measures import METRICS, Outcome, Spread, latencies, over_time
from lamina.measure.bench.serve import Result
from lamina.system.figures import ACCENT, BAR, BEST, SOFT, THIRD, picture
from lamina.system.machine import Machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = "lamina.bench.serve"
VERSION = 1
_WIDTH = 60
_SHOWN_DETAIL = 110


def text(result: Result) -> str:
    """Many lines, each a name and a value; notes at the end."""
    summary, settings = result.summary, result.settings
    lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]

    def add(name: str, value: float | int | str) -> None:
        formatted = f"{value:.2f}" if isinstance(value, float) else str(value)
        lines.append(f"{name + ':':<44} {formatted}")

    add("Model", result.model)
    add("Successful requests", summary.completed)
    add("Failed requests", sum(summary.failures.values()))
    if settings.max_concurrency is not None:
        add("Maximum request concurrency", settings.max_concurrency)
    if settings.request_rate is not None and not math.isinf(settings.request_rate):
        add("Request rate configured (RPS)", float(settings.request_rate))
    add("Benchmark duration (s)", summary.duration)
    add("Total input tokens", summary.total_input_tokens)
    add("Total generated tokens", summary.total_output_tokens)
    add("Request throughput (req/s)", summary.request_throughput)
    if summary.request_goodput is not None:
        add("Request goodput (req/s)", summary.request_goodput)
    add("Output token throughput (tok/s)", summary.output_throughput)
    add("Peak output token throughput (tok/s)", summary.max_output_tokens_per_s)
    add("Total token throughput (tok/s)", summary.total_token_throughput)
    add("Peak concurrent requests", summary.max_concurrent_requests)
    add("Mean concurrent requests", summary.mean_concurrent_requests)
    for key, title in METRICS.items():
        spread = summary.spreads[key]
        lines.append(f" {title} ".center(_WIDTH, "-"))
        name = key.upper()
        add(f"Mean {name} (ms)", spread.mean)
        add(f"Median {name} (ms)", spread.median)
        for number, value in spread.percentiles.items():
            add(f"P{number:g} {name} (ms)", value)
    lines.append("=" * _WIDTH)
    for kind, count in summary.failures.items():
        detail = result.details.get(kind, "")
        lines.append(f"failed: {count} x {kind}{f' ({detail[:_SHOWN_DETAIL]})' if detail else ''}")
    lines += result.notes
    if summary.chunks:
        lines.append(
            f"client: {result.cpu_per_chunk * 1e6:.0f} us of processor time a chunk, "
            f"{result.run.cpu / summary.duration:.1%} of one core"
        )
    return "\n".join(lines) + "\n"


def record(result: Result, machine: Machine, *, date: str, version: str, detailed: bool = False) -> dict[str, Any]:
    """The result for JSON. Times are milliseconds but for `duration`, and in `requests`, which are seconds."""
    summary = result.summary
    settings = {name: value for name, value in asdict(result.settings).items() if name != "api_key"}
    settings |= {"trace_dir": str(settings["trace_dir"]) if settings["trace_dir"] else None}
    if settings["request_rate"] == math.inf:  # JSON has no infinity
        settings["request_rate"] = "inf"
    fields: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": VERSION,
        "date": date,
        "lamina_version": version,
        "model_id": result.model,
        "max_model_len": result.context,
        "settings": settings,
        "nonce": result.nonce,
        "machine": {"processor": machine.processor, "cores": machine.cores, "memory": machine.memory},
        "load_average_before": result.load,
        "prompt_words": {"count": len(result.words.words), "tokens": result.words.tokens, "by": result.words.source},
        "num_prompts": len(result.run.outcomes) + result.run.unfinished,
        **asdict(replace(summary, spreads={})),
        "failed": sum(summary.failures.values()),
        "unfinished": result.run.unfinished,
        "failure_details": dict(result.details),
        "client_cpu_seconds": result.run.cpu,
        "client_cpu_us_per_chunk": result.cpu_per_chunk * 1e6,
        "notes": list(result.notes),
    }
    del fields["spreads"]
    for name, spread in summary.spreads.items():
        fields |= _named(name, spread)
    if detailed:
        fields["requests"] = [_request(outcome) for outcome in result.run.outcomes]
    return fields


def _request(outcome: Outcome) -> dict[str, Any]:
    """One request, in seconds and tokens."""
    return {
        "due": outcome.due,
        "sent": outcome.sent,
        "ended": outcome.ended,
        "chunks": list(outcome.chunks),
        "planned_prompt": outcome.planned,
        "asked": outcome.asked,
        "prompt_tokens": outcome.prompt,
        "output_tokens": outcome.output,
        "cached_tokens": outcome.cached,
        "finish_reason": outcome.finish,
        "error": outcome.error,
        "detail": outcome.detail,
    }


def _named(name: str, spread: Spread) -> Mapping[str, float]:
    fields = {f"mean_{name}_ms": spread.mean, f"median_{name}_ms": spread.median, f"std_{name}_ms": spread.std}
    return fields | {f"p{number:g}_{name}_ms": value for number, value in spread.percentiles.items()}


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
        for number, (name, seconds) in enumerate(latencies(good).items()):
            _distribution(figure.add_subplot(grid[0, number]), name.upper(), seconds, slo.get(name))
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
