"""Charts in SVG: well formed, in their frame, in proportion; no text gets out of its element."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_runs import candidates, plan

from lamina.simulator.reports.data import numbered
from lamina.simulator.reports.svg_charts import Bar, Curve, Spread, bars, panel, scatter, spreads

SIZES = st.floats(0, 1e9, allow_subnormal=False)
NAMES = st.text(max_size=40)


def parsed(text: str) -> Element:
    """The root; every number in it is finite, and every place inside the frame, or just beside it."""
    root = ElementTree.fromstring(text)
    assert root.get("role") == "img"
    width, height = map(float, root.get("viewBox", "").split()[2:])
    for element in root.iter():
        for key, value in element.attrib.items():
            if key in ("x", "cx", "width"):
                assert -1 <= float(value) <= width + 1
            if key in ("y", "cy", "height"):
                assert -1 <= float(value) <= height + 1
            if key == "d":
                assert all(math.isfinite(float(number)) for number in re.findall(r"-?\d+(?:\.\d+)?", value))
                assert "nan" not in value
                assert "inf" not in value
    return root


def texts(root: Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter("text")]


@given(st.lists(st.builds(Bar, NAMES, SIZES, NAMES, NAMES, st.booleans()), max_size=8), NAMES)
@settings(max_examples=60)
def test_bars(rows: list[Bar], about: str) -> None:
    root = parsed(bars(rows, about))
    lengths = [float(element.get("width", 0)) for element in root.iter("rect")]
    assert len(lengths) == len(rows)
    order = sorted(range(len(rows)), key=lambda at: rows[at].value)
    assert [lengths[at] for at in order] == sorted(lengths)


def test_bars_are_in_proportion() -> None:
    root = parsed(bars([Bar("a", 50.0, "50"), Bar("b", 100.0, "100", "2.00×", True), Bar("c", 0.0, "not known")], "x"))
    half, whole, none = (float(element.get("width", 0)) for element in root.iter("rect"))
    assert whole == pytest.approx(2 * half, abs=0.2)
    assert none == 0
    assert "100 2.00×" in texts(root)


@given(st.lists(st.builds(Spread, NAMES, SIZES, SIZES, SIZES), max_size=6), st.none() | st.floats(1e-3, 1e6))
@settings(max_examples=60)
def test_spreads(rows: list[Spread], limit: float | None) -> None:
    parsed(spreads(rows, "ms", "about", limit))


def test_a_wide_range_is_logarithmic() -> None:
    assert "s, logarithmic" in texts(parsed(spreads([Spread("a", 0.1, 1, 10)], "s", "")))
    narrow = texts(parsed(spreads([Spread("a", 1, 2, 3)], "s", "", 2.5)))
    assert "s" in narrow
    assert "SLO 2.5 s" in narrow
    assert "1.00 / 3.00" in narrow


@given(st.lists(st.tuples(SIZES, SIZES), max_size=20), SIZES, SIZES, st.booleans(), NAMES)
@settings(max_examples=60)
def test_panel(line: list[tuple[float, float]], seconds: float, high: float, percent: bool, name: str) -> None:
    curves = [Curve("model", tuple(line), name), Curve("attention", ())]
    parsed(panel(name, name, curves, seconds, high, name, [tuple(line)], percent))


@given(st.lists(st.tuples(NAMES, SIZES, SIZES, st.booleans()), max_size=20), NAMES)
@settings(max_examples=60)
def test_scatter(points: list[tuple[str, float, float, bool]], chosen: str) -> None:
    parsed(scatter(points, chosen, chosen))


def test_scatter_numbers_the_frontier_and_has_a_star() -> None:
    chosen = str(plan()["chosen"])
    root = parsed(scatter(candidates(), chosen, "about", "tokens a joule"))
    assert "tokens a joule" in texts(root)
    assert {str(place + 1) for place in range(len(numbered(candidates())))} <= set(texts(root))
    assert sum("translate" in element.get("transform", "") for element in root.iter("path")) == 1
    crosses = [element for element in root.iter("path") if "l5 5m0 -5" in element.get("d", "")]
    assert len(crosses) == sum(not point[3] for point in candidates())
    assert len(list(root.iter("circle"))) == sum(point[3] for point in candidates())
