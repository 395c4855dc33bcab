"""Rows as a table in Markdown. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from .result import Row

COLUMNS = (
    "scenario", "failure", "start", "answered", "refused", "lost", "tokens lost", "TTFT", "TPOT", "pause", "recovery",
    "computed again",
)  # fmt: skip


def table(rows: Iterable[Row], header: bool = True) -> str:
    """TTFT and TPOT in milliseconds, before and after; the other times in seconds. Below it what does not hold."""
    rows = list(rows)
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"] if header else []
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    problems = [f"- {row.scenario}: {problem}" for row in rows for problem in row.problems]
    return "\n".join([*lines, *(["", *problems] if problems else [])])


def _cells(row: Row) -> list[str]:
    return [
        row.scenario,
        row.failure,
        f"{row.start:.1f}",
        str(row.done),
        str(row.refused),
        str(row.lost),
        str(row.tokens_lost),
        f"{_ms(row.ttft_before)} → {_ms(row.ttft_after)}",
        f"{_ms(row.tpot_before)} → {_ms(row.tpot_after)}",
        f"{row.pause:.2f}",
        "-" if row.recovery is None else f"{row.recovery:.1f}",
        str(row.recomputed),
    ]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f}"
