"""Charts as inline SVG, drawn by hand: text in, text out.

Colours are CSS variables of the page (`STYLE`), so that light and dark need one drawing. Every text is escaped here. A
chart is as wide as its column; `<title>`s show what a pointer rests on, and no information is in colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lamina.simulator.reports.data import (
    X_LABEL,
    Y_LABEL,
    Line,
    Point,
    frontier,
    log_ticks,
    numbered,
    printable,
    ticks,
    time_unit,
    words,
)

STYLE = """:root{--page:#fff;--ink:#1d2126;--soft:#59616b;--rule:#dcdfe3;--faint:#c3c8ce;--panel:#f6f7f8;
--best:#0065a3;--bar:#6399c0;--model:#0065a3;--attention:#b04a00;--network:#00705a}
@media (prefers-color-scheme:dark){:root{--page:#15181c;--ink:#e8eaed;--soft:#a4acb6;--rule:#31363d;--faint:#4a515a;
--panel:#1d2126;--best:#6cbaf2;--bar:#3f6d96;--model:#6cbaf2;--attention:#f2a254;--network:#45cfa6}}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:12.5px system-ui,sans-serif;fill:var(--ink);font-variant-numeric:tabular-nums}
svg .s{fill:var(--soft);font-size:11.5px}svg .b{font-weight:650}svg .e{text-anchor:end}svg .m{text-anchor:middle}
svg .grid{stroke:var(--rule);fill:none}svg .axis{stroke:var(--faint);fill:none}
svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}svg .others{fill:none;stroke:var(--faint);stroke-width:1}
svg .model{stroke:var(--model)}svg .attention{stroke:var(--attention);stroke-dasharray:6 3}
svg .network{stroke:var(--network);stroke-dasharray:1.5 2.5}
svg .tmodel{fill:var(--model)}svg .tattention{fill:var(--attention)}svg .tnetwork{fill:var(--network)}
svg .hollow{fill:var(--page);stroke:var(--best);stroke-width:2}
svg .limit{stroke:var(--attention);stroke-width:1.5;stroke-dasharray:5 3}
svg .halo{stroke:var(--page);stroke-width:3px;paint-order:stroke;stroke-linejoin:round}"""

WIDTH = 360


@dataclass(frozen=True, slots=True)
class Bar:
    """`note` follows the value; `best` is drawn stronger, and in words too."""

    label: str
    value: float
    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of one thing, in the chart's unit."""

    label: str
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Curve:
    """A line over seconds; `kind` is a tier's name, which gives its colour and dashes; `text` names it in words."""

    kind: str
    line: Line
    text: str = ""


def bars(rows: Sequence[Bar], about: str) -> str:
    """Horizontal bars from 0, each with its name above and its value at its end."""
    longest = max((row.value for row in rows), default=0.0)
    parts: list[str] = []
    for place, row in enumerate(rows):
        top = place * 38
        text = " ".join(word for word in (row.text, row.note) if word)
        room = WIDTH - 12 - 6.2 * max(len(" ".join(w for w in (r.text, r.note) if w)) for r in rows)
        length = max(room * row.value / longest, 1.0) if longest > 0 and row.value > 0 else 0.0
        weight = ' class="b"' if row.best else ""
        parts += [
            f"<g><title>{_text(f'{row.label}: {text}', 240)}</title>",
            f'<text y="{top + 12}"{weight}>{_text(row.label, 50)}</text>',
            f'<rect y="{top + 17}" width="{length:.1f}" height="13" rx="1.5" '
            f'style="fill:var(--{"best" if row.best else "bar"})"/>',
            f'<text x="{length + 6:.1f}" y="{top + 28}"><tspan{weight}>{_text(row.text, 40)}</tspan>'
            + (f' <tspan class="s">{_text(row.note, 40)}</tspan>' if row.note else "")
            + "</text></g>",
        ]
    return _svg(WIDTH, len(rows) * 38, about, parts)


def spreads(rows: Sequence[Spread], unit: str, about: str, limit: float | None = None) -> str:
    """Percentiles, a row each: from p50 (a disc) over p90 (a tick) to p99 (a diamond). The axis is logarithmic where
    they differ much. `limit` is drawn across: what an SLO allows."""
    values = [value for row in rows for value in (row.p50, row.p90, row.p99) if value > 0]
    numbers = [*values, limit] if limit else values
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    logarithmic = low > 0 and high > 20 * low
    if logarithmic:
        start, end, marks = log_ticks(max(low, high * 1e-9), high)  # what is below lies at the edge
    else:
        marks = ticks(high, 4)
        start, end = 0.0, marks[-1]
    x_start, x_end = 8.0, WIDTH - 104.0
    bottom = 18 + len(rows) * 40

    def at(value: float) -> float:
        return x_start + (x_end - x_start) * _share(max(value, start), start, end, logarithmic)

    parts = [f'<text class="s e" x="{WIDTH}" y="10">p50 / p99, {_text(unit, 10)}</text>']
    for mark in marks:
        parts.append(f'<path class="grid" d="M{at(mark):.1f} 18V{bottom}"/>')
        parts.append(f'<text class="s m" x="{at(mark):.1f}" y="{bottom + 14}">{_tick(mark)}</text>')
    if limit:
        x, text = at(limit), _text(f"SLO {_tick(limit)} {unit}", 30)
        parts.append(f'<path class="limit" d="M{x:.1f} 14V{bottom}"/>')
        side, dx = ("e", -5) if x > 90 else ("", 5)
        parts.append(f'<text class="s tattention {side}" x="{x + dx:.1f}" y="11">{text}</text>')
    for place, row in enumerate(rows):
        top = 18 + place * 40
        y = top + 27
        x50, x90, x99 = (at(value) for value in (row.p50, row.p90, row.p99))
        title = f"{row.label}: p50 {words(row.p50)}, p90 {words(row.p90)}, p99 {words(row.p99)} {unit}"
        parts += [
            f"<g><title>{_text(title, 240)}</title>",
            f'<text class="halo" y="{top + 13}">{_text(row.label, 50)}</text>',
            f'<path d="M{x50:.1f} {y}H{x99:.1f}" style="stroke:var(--bar);stroke-width:4"/>',
            f'<path d="M{x90:.1f} {y - 6}v12" style="stroke:var(--best);stroke-width:2"/>',
            f'<circle cx="{x50:.1f}" cy="{y}" r="4.5" style="fill:var(--best)"/>',
            f'<path d="M{x99:.1f} {y - 6}l6 6l-6 6l-6 -6z" class="hollow"/>',
            f'<text class="e" x="{WIDTH}" y="{y + 4}">{words(row.p50)} / {words(row.p99)}</text></g>',
        ]
    note = f"{unit}, logarithmic" if logarithmic else unit
    parts.append(f'<text class="s m" x="{(x_start + x_end) / 2:.1f}" y="{bottom + 29}">{_text(note, 40)}</text>')
    return _svg(WIDTH, bottom + 34, about, parts)


def panel(
    title: str,
    note: str,
    curves: Sequence[Curve],
    seconds: float,
    high: float,
    about: str,
    others: Sequence[Line] = (),
    percent: bool = False,
) -> str:
    """Lines over 0 to `seconds`, from 0 to about `high`; `others` are the neighbours' lines, grey."""
    x_start, x_end, top, bottom = 42.0, WIDTH - 8.0, 40.0, 150.0
    marks = (0.0, 0.5, 1.0) if percent else ticks(high, 4)
    unit, name = time_unit(seconds)
    seconds = seconds if seconds > 0 else 1.0

    def path(line: Line, kind: str) -> str:
        corners = (
            f"{x_start + (x_end - x_start) * min(max(x / seconds, 0.0), 1.0):.1f} "
            f"{bottom - (bottom - top) * min(max(y / marks[-1], 0.0), 1.0):.1f}"
            for x, y in line
        )
        return f'<path class="{kind}" d="M{"L".join(corners)}"/>' if line else ""

    parts = [f'<text class="b" y="12">{_text(title, 50)}</text>']
    if note:
        parts.append(f'<text class="s" y="28">{_text(note, 60)}</text>')
    x = 0.0
    for curve in curves:
        if curve.text:
            parts.append(f'<path class="line {curve.kind}" d="M{x:.1f} 24h16"/>')
            parts.append(f'<text class="s t{curve.kind}" x="{x + 20:.1f}" y="28">{_text(curve.text, 30)}</text>')
            x += 34 + 6.1 * len(curve.text)
    for mark in marks:
        y = bottom - (bottom - top) * mark / marks[-1]
        parts.append(f'<path class="{"grid" if mark else "axis"}" d="M{x_start:.1f} {y:.1f}H{x_end:.1f}"/>')
        parts.append(
            f'<text class="s e" x="{x_start - 5:.1f}" y="{y + 4:.1f}">'
            f"{f'{mark:.0%}' if percent else _tick(mark)}</text>"
        )
    times = [mark for mark in ticks(seconds / unit, 6) if mark * unit <= seconds * 1.0001]
    for mark in times:
        x = x_start + (x_end - x_start) * mark * unit / seconds
        text = f"{_tick(mark)} {name}" if mark == times[-1] else _tick(mark)
        side = "e" if x > x_end - 20 else "m"
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom:.1f}v4"/>')
        parts.append(f'<text class="s {side}" x="{min(x, x_end):.1f}" y="{bottom + 17:.1f}">{text}</text>')
    parts += [path(line, "others") for line in others]
    parts += [path(curve.line, f"line {curve.kind}") for curve in curves]
    return _svg(WIDTH, int(bottom) + 22, about, parts)


def scatter(points: Sequence[Point], chosen: str, about: str, across: str = X_LABEL) -> str:
    """Candidates: feasible ones as discs, others as small crosses, the frontier as a line with the
    `numbered` of it, `chosen` as a star. `across` is the name of the x axis."""
    width, x_start, x_end, top, bottom = 520, 52.0, 508.0, 24.0, 330.0
    marks_x = ticks(max((point[1] for point in points), default=1.0), 5)
    marks_y = ticks(max((point[2] for point in points), default=1.0), 5)

    def at(point: Point) -> tuple[float, float]:
        return (
            x_start + (x_end - x_start) * max(point[1], 0.0) / marks_x[-1],
            bottom - (bottom - top) * max(point[2], 0.0) / marks_y[-1],
        )

    parts = [f'<text class="s" y="11">{Y_LABEL}</text>']
    for mark in marks_x:
        x = x_start + (x_end - x_start) * mark / marks_x[-1]
        side = "e" if mark == marks_x[-1] else "m"
        parts.append(f'<path class="{"grid" if mark else "axis"}" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>')
        parts.append(f'<text class="s {side}" x="{x:.1f}" y="{bottom + 16:.1f}">{_tick(mark)}</text>')
    for mark in marks_y:
        y = bottom - (bottom - top) * mark / marks_y[-1]
        parts.append(f'<path class="{"grid" if mark else "axis"}" d="M{x_start:.1f} {y:.1f}H{x_end:.1f}"/>')
        parts.append(f'<text class="s e" x="{x_start - 6:.1f}" y="{y + 4:.1f}">{_tick(mark)}</text>')
    parts.append(f'<text class="s e" x="{x_end:.1f}" y="{bottom + 33:.1f}">{_text(across, 60)}</text>')

    best = frontier(points)
    ahead = set(best)
    if len(best) > 1:
        corners = [f"{x:.1f} {y:.1f}" for x, y in map(at, best)]
        parts.append(f'<path class="line model" d="M{"L".join(corners)}" style="opacity:.55"/>')
    for point in sorted(points, key=lambda point: (point[3], point in ahead)):
        x, y = at(point)
        title = f"<title>{_text(f'{point[0]}: {words(point[1])}, {words(point[2])}', 240)}</title>"
        if not point[3]:
            parts.append(
                f'<path d="M{x - 2.5:.1f} {y - 2.5:.1f}l5 5m0 -5l-5 5" style="stroke:var(--soft);opacity:.6">'
                f"{title}</path>"
            )
        elif point in ahead:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" style="fill:var(--best)">{title}</circle>')
        else:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:var(--bar)">{title}</circle>')
    winners = [point for point in points if point[0] == chosen]
    for point in winners[:1]:
        x, y = at(point)
        parts.append(
            f'<path d="{_STAR}" transform="translate({x:.1f} {y:.1f})" '
            'style="fill:var(--attention);stroke:var(--page);stroke-width:1.5"/>'
        )
    for number, point in enumerate(numbered(points), 1):
        x, y = at(point)
        parts.append(f'<text class="halo s" x="{min(x + 6, width - 14):.1f}" y="{max(y - 6, 24):.1f}">{number}</text>')
    return _svg(width, int(bottom) + 38, about, parts)


_STAR = "M0 -9L2.5 -3L9 -2.8L4 1.4L5.6 7.6L0 4.2L-5.6 7.6L-4 1.4L-9 -2.8L-2.5 -3Z"


def _share(value: float, start: float, end: float, logarithmic: bool) -> float:
    """Where on an axis a value lies, 0 to 1."""
    if logarithmic:
        return math.log(value / start) / math.log(end / start)
    return (value - start) / (end - start)


def _tick(value: float) -> str:
    return f"{value:,.10g}" if 1e-4 <= abs(value) < 1e7 or not value else f"{value:.3g}"


def _text(text: str, most: int) -> str:
    return escape(printable(text, most))


def _svg(width: int, height: int, about: str, parts: Sequence[str]) -> str:
    name = escape(printable(about, 300))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
