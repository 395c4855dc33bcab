"""Text in 100 columns: tables whose names are folded, and sentences. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

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
        shown = [
            cell.ljust(room) if at < left else cell.rjust(room)
            for at, (cell, room) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(shown).rstrip())
        before = " " * (sum(widths[:name]) + 2 * name)
        lines += [f"{before}  {line}" if len(line) + 2 <= widths[name] else f"{before}{line}" for line in more]
    return lines


def sentences(said: Sequence[str], indent: int = 2, width: int = WIDTH) -> list[str]:
    """Each in lines of at most `width` columns, of which the first begins `indent` columns in, the others two more."""
    lines: list[str] = []
    for sentence in said:
        lines += textwrap.wrap(
            sentence, width, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2),
            break_long_words=False, break_on_hyphens=False,
        ) or [""]  # fmt: skip
    return lines
