"""A serving benchmark's result as text in the layout of vLLM's (`text`), and as plain data for JSON (`record`). Pure.

`scripts/bench/serve_picture.py` draws what is kept as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from lamina.measure.bench.measures import METRICS, Outcome, Spread
from lamina.measure.bench.serve import Result

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


def record(result: Result, *, detailed: bool = False) -> dict[str, Any]:
    """The result for JSON. Times are milliseconds but for `duration`, and in `requests`, which are seconds."""
    summary = result.summary
    settings = {name: value for name, value in asdict(result.settings).items() if name != "api_key"}
    settings |= {"trace_dir": str(settings["trace_dir"]) if settings["trace_dir"] else None}
    if settings["request_rate"] == math.inf:  # JSON has no infinity
        settings["request_rate"] = "inf"
    fields: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": VERSION,
        "model_id": result.model,
        "max_model_len": result.context,
        "settings": settings,
        "nonce": result.nonce,
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
