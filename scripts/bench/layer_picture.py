#!/usr/bin/env python3
"""Where the time of a layer goes, as horizontal stacked bars in an SVG file, one bar a variant.

usage: scripts/bench/layer_picture.py STAGES.json PICTURE.svg

STAGES.json has a title, the unit of time, and the variants from top to bottom, each with its stages in their order:

    {"title": "A layer of a decode step, 8 x 1024",
     "unit": "us",
     "variants": [{"name": "before, Unix socket",
                   "stages": [["send", 62], ["wake the worker", 42], ["attend", 202], ["send back, wake", 136]]},
                  {"name": "after, Unix socket",
                   "stages": [["send", 15], ["attend", 279], ["send back, wake", 14]]}]}

A stage has the same colour in each variant, in the order in which the names first come; there are colours for twelve.
A stage of negative length is refused. Nothing but Python is needed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

COLOURS = ("#4a76c9", "#3f9a58", "#e0913a", "#b5485b", "#7d5fb2", "#2b9aa5",
           "#c9b037", "#8a8f98", "#93b1e6", "#94cfa5", "#f0c48f", "#dba0aa")  # fmt: skip
WIDTH, LEFT, RIGHT = 860, 190, 70  # pixels: of the picture, of the names, of the sums
TOP, BAR, GAP, KEY = 50, 26, 16, 22  # pixels: above the first bar, a bar, between bars, a line of the key
LETTER = 7.0  # pixels of a character of 12 px text, about


class Variant(NamedTuple):
    """A bar: its name, and the name and length of each stage."""

    name: str
    stages: list[tuple[str, float]]

    @property
    def total(self) -> float:
        return sum(length for _, length in self.stages)


def read(stages: Any) -> tuple[str, str, list[Variant]]:
    """Title, unit and variants of a file's content. Raises ValueError for what no bar can show."""
    variants = [
        Variant(str(each["name"]), [(str(name), float(length)) for name, length in each["stages"]])
        for each in stages["variants"]
    ]
    names = key(variants)
    wrong = [length for each in variants for _, length in each.stages if not 0 <= length < math.inf]
    if wrong:
        raise ValueError(f"a stage takes {wrong[0]}; allowed are finite numbers from 0")
    if not variants or not names or max(each.total for each in variants) == 0:
        raise ValueError("there are no stages to draw; at least one must take time")
    if len(names) > len(COLOURS):
        raise ValueError(f"there are {len(names)} stages of different names; allowed are {len(COLOURS)}")
    return str(stages["title"]), str(stages.get("unit", "us")), variants


def key(variants: Sequence[Variant]) -> list[str]:
    """The names of all stages, each once, in the order in which they first come."""
    return list(dict.fromkeys(name for each in variants for name, _ in each.stages))


def nice(most: float) -> float:
    """The distance of marks on the axis: 1, 2 or 5 times a power of ten, 4 to 10 of them."""
    power = 10.0 ** math.floor(math.log10(most))
    return next(power * step for step in (0.1, 0.2, 0.5, 1.0) if most / (power * step) <= 10)


def text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{" " + style if style else ""}>{escape(words)}</text>'


def draw(title: str, unit: str, variants: Sequence[Variant]) -> str:
    """The picture as SVG."""
    most = max(each.total for each in variants)
    scale = (WIDTH - LEFT - RIGHT) / most
    colours = dict(zip(key(variants), COLOURS, strict=False))
    bottom = TOP + len(variants) * (BAR + GAP)
    places, height = key_places(list(colours), bottom + 40)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
        text(20, 26, title, 'font-size="15" font-weight="bold"'),
    ]
    mark = nice(most)
    for number in range(int(most / mark) + 1):
        x = LEFT + number * mark * scale
        out.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{bottom}" stroke="#dddddd"/>')
        label = f"{number * mark:g}" + (f" {unit}" if number == 0 else "")
        out.append(text(x, bottom + 14, label, 'text-anchor="middle" fill="#666"'))
    for number, each in enumerate(variants):
        y = TOP + number * (BAR + GAP)
        out += bar(each, y, scale, colours, unit)
    for name, (x, y) in places.items():
        out.append(f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" fill="{colours[name]}"/>')
        out.append(text(x + 17, y, name))
    return "\n".join([*out, "</svg>", ""])


def bar(variant: Variant, y: float, scale: float, colours: dict[str, str], unit: str) -> list[str]:
    """One variant: its name, its stages with their lengths where there is room, and their sum."""
    out = [text(LEFT - 10, y + BAR / 2 + 4, variant.name, 'text-anchor="end"')]
    x = float(LEFT)
    for name, length in variant.stages:
        width, label = length * scale, f"{length:.0f}"
        out.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colours[name]}" stroke="#ffffff">'
            f"<title>{escape(name)}: {length:g} {escape(unit)}</title></rect>"
        )
        if width > LETTER * len(label) + 4:
            out.append(text(x + width / 2, y + BAR / 2 + 4, label, 'text-anchor="middle" fill="#ffffff"'))
        x += width
    out.append(text(x + 6, y + BAR / 2 + 4, f"{variant.total:.0f}", 'font-weight="bold"'))
    return out


def key_places(names: Sequence[str], y: float) -> tuple[dict[str, tuple[float, float]], float]:
    """Where each stage's name stands below the bars, in as many lines as are needed, and the height of the picture."""
    places, x = {}, 20.0
    for name in names:
        width = 17 + LETTER * len(name) + 18
        if x > 20 and x + width > WIDTH:
            x, y = 20.0, y + KEY
        places[name] = (x, y)
        x += width
    return places, y + KEY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", type=Path, help="the JSON file")
    parser.add_argument("picture", type=Path, help="the SVG file")
    args = parser.parse_args()
    args.picture.write_text(draw(*read(json.loads(args.stages.read_text()))))


if __name__ == "__main__":
    main()
