"""Runs of the simulator for people and for programs: a table (`table`), JSON (`to_json`) and CSV (`to_csv`). `page.py`
makes HTML of them.

Everything is pure and returns texts. The same runs give the same bytes. Numbers that are not known (a power that is not
published, a latency of no request) are a dash for people, null in JSON, and empty in CSV.

Text is in 100 columns: tables whose names are folded (`grid`), and sentences (`sentences`). `kept` and `room` say in
words what a model keeps of a sequence, and how much of it a system has room for. KV and states stand apart there.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lamina.simulator.costs.offloaded import UNBOUNDED
from lamina.simulator.costs.shapes import STATE_RECORDS, ModelShape
from lamina.simulator.costs.systems import System
from lamina.simulator.event_loop.results import Distribution, RunResult, Sampled
from lamina.simulator.reports.data import KEPT, NONE_KEEPS, UNKNOWN, best_of, checked, columns, labels, printable

VERSION = 1
"""The version of the JSON. It rises when a key changes its meaning."""
_NAME = 48
"""Letters of a system's name in a table, at most."""
DERIVED: dict[str, Callable[[RunResult], float]] = {
    "tokens_per_second": lambda run: run.tokens_per_second,
    "tokens_per_dollar": lambda run: run.tokens_per_dollar,
    "dollars_per_million": lambda run: run.dollars_per_million,
    "tokens_per_joule": lambda run: run.tokens_per_joule,
    "saturated_tokens_per_second": lambda run: run.saturated_tokens_per_second,
    "requests_per_second": lambda run: run.finished / run.seconds if run.seconds else 0.0,
    "link_bytes_per_second": lambda run: run.link_bytes / run.seconds if run.seconds else 0.0,
}
UNITS = {
    "seconds, saturated_seconds": "s",
    "price": "$/h",
    "power": "W, 0: not known",
    "mean_batch": "sequences",
    "ttft, tpot, tbt": "s",
    "goodput": "requests/s",
    "slo_share, *_utilisation, *_share": "0 to 1",
    "link_bytes": "bytes",
    "tokens_per_second, tokens_per_dollar, tokens_per_joule, dollars_per_million": "output tokens; 0: not known",
    "samples": "by field, one value a sampled step: at and seconds in s",
}
_SAMPLED = tuple(item.name for item in dataclasses.fields(Sampled))


def table(results: Iterable[RunResult]) -> str:
    """Plain text in lines of up to `WIDTH` columns: a row a system, in as many blocks of columns as that takes. `*`
    marks the best of a column, among what keeps the SLO. Raises InvalidRequest without results."""
    runs = checked(results)
    names = [printable(name, _NAME) for name in labels(runs)]
    blocks: list[list[list[str]]] = []
    first = max(map(len, ("system", *names)))
    free = 0
    for column, best in zip(columns(runs), best_of(runs), strict=True):
        # heads end where numbers do: before the place of the mark
        cells = [f"{column.head} ", f"{column.unit} "]
        cells += [column.text(run) + ("*" if place in best else " ") for place, run in enumerate(runs)]
        room = max(map(len, cells)) + 1
        if not blocks or room > free:
            free = WIDTH - first
            blocks.append([])
        free -= room
        blocks[-1].append([cell.rjust(room) for cell in cells])
    lines: list[str] = []
    for block in blocks:
        rows = zip(("system", "", *names), *block, strict=True)
        body = ["".join([name.ljust(first), *cells]).rstrip() for name, *cells in rows]
        body.insert(2, "-" * max(map(len, body)))
        lines += ["", *body] if lines else body
    if len(runs) > 1:
        note = f"* best of its column, {KEPT}" if any(run.keeps_slo for run in runs) else NONE_KEEPS
        lines += sentences([f"{note}; {UNKNOWN} not known"], 0)
    return "\n".join(lines) + "\n"


def to_json(results: Iterable[RunResult]) -> str:
    """Every field and what follows from it. Keys keep their order; samples are lists by field; no NaN, no infinity."""
    document = {"version": VERSION, "units": UNITS, "results": [_record(run) for run in checked(results)]}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def to_csv(results: Iterable[RunResult]) -> str:
    """One row a system, distributions as `ttft_p50` and so on, assumptions as one text; samples are left out."""
    rows: list[dict[str, Any]] = []
    for run in checked(results):
        row: dict[str, Any] = {}
        for key, value in _record(run, samples=False).items():
            if key == "assumptions":
                row[key] = "; ".join(f"{name}: {text}" for name, text in value.items())
            elif isinstance(value, dict):
                row |= {f"{key}_{part}": number for part, number in value.items()}
            else:
                row[key] = value
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _record(run: RunResult, samples: bool = True) -> dict[str, Any]:
    """The fields in their order, then the derived numbers, then assumptions and samples."""
    record: dict[str, Any] = {}
    for item in dataclasses.fields(run):
        value = getattr(run, item.name)
        if isinstance(value, Distribution):
            record[item.name] = {name: finite(number) for name, number in dataclasses.asdict(value).items()}
        elif item.name not in ("assumptions", "samples"):
            record[item.name] = finite(value)
    record |= {name: finite(derived(run)) for name, derived in DERIVED.items()}
    record["assumptions"] = {str(name): str(text) for name, text in run.assumptions.items()}
    if samples:
        record["samples"] = {name: [finite(getattr(sample, name)) for sample in run.samples] for name in _SAMPLED}
    return record


def finite(value: Any) -> Any:
    """The value as JSON has it: None for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> Any:
    """Texts come from files: one that a spreadsheet would take for a formula gets an apostrophe in front. A carriage
    return alone, which `csv` writes without quotes and then cannot read, becomes a line feed."""
    if not isinstance(value, str) or not value:
        return value
    safe = f"'{value}" if value[0] in "=+-@\t\r" else value
    return safe.replace("\r\n", "\n").replace("\r", "\n")


_UNITS = ("B", "KB", "MB", "GB", "TB")


def kept(shape: ModelShape, element: float = 2.0) -> str:
    """Such as "24.6 KB of KV a token (12 layers); 162 MB of states a sequence (36 layers, 2 records of 80.8 MB)"."""
    parts = []
    if shape.attentions:
        parts.append(f"{in_bytes(shape.kv_bytes_per_token(element))} of KV a token ({_layers(shape.attentions)})")
    if shape.states:
        records = f"{STATE_RECORDS} records of {in_bytes(shape.state_bytes)}"
        parts.append(f"{in_bytes(shape.state_bytes_held)} of states a sequence ({_layers(shape.states)}, {records})")
    return "; ".join(parts) or "nothing"


def room(system: System) -> str:
    """Such as "room for 1,394,000 tokens of KV and 340 sequences' states"."""
    capacity = system.capacity
    parts = []
    if capacity.tokens < UNBOUNDED:
        parts.append(f"{capacity.tokens:,} tokens of KV")
    if capacity.sequences < UNBOUNDED:
        parts.append(f"{capacity.sequences:,} sequences' states")
    return f"room for {' and '.join(parts) or 'any number of sequences'}"


def in_bytes(count: float) -> str:
    """Three digits and a decimal unit."""
    power = 0
    while count >= 999.5 and power + 1 < len(_UNITS):
        count, power = count / 1000, power + 1
    return f"{count:.3g} {_UNITS[power]}"


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count != 1 else ''}"


WIDTH = 100
"""Columns of everything that a command of the simulator prints."""
_LEAST = 20
"""Columns of the names, at least: what is longer than the rest leaves goes over `WIDTH` then."""


def grid(rows: Sequence[Sequence[str]], left: int = 1, width: int = WIDTH) -> list[str]:
    """Lines of a table, the first of `rows` its head. The first `left` columns are words and begin together, the last
    of them is folded where the line would be longer than `width`; the others are numbers, and end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    name = left - 1
    others = sum(widths) - widths[name] + 2 * (len(widths) - 1)
    widths[name] = min(widths[name], max(_LEAST, width - others))
    lines: list[str] = []
    for row in rows:
        first, *more = textwrap.wrap(row[name], widths[name]) or [""]
        cells = [*row[:name], first, *row[left:]]
        padded = [
            cell.ljust(room) if index < left else cell.rjust(room)
            for index, (cell, room) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
        before = " " * (sum(widths[:name]) + 2 * name)
        lines += [f"{before}  {line}" if len(line) + 2 <= widths[name] else f"{before}{line}" for line in more]
    return lines


def sentences(said: Sequence[str], indent: int = 2) -> list[str]:
    """Each in lines of at most `WIDTH` columns, of which the first begins `indent` columns in, the others two more."""
    lines: list[str] = []
    for sentence in said:
        lines += textwrap.wrap(
            sentence,
            WIDTH,
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + 2),
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return lines
