"""Reports of simulated runs: what people and programs read agrees with the runs, and nothing in a name gets out."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated_runs import SECONDS, five, plan, run

from lamina.errors import InvalidRequest
from lamina.simulator.event_loop.results import Distribution, RunResult, Sampled
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.reports.data import (
    COLUMNS,
    best_of,
    columns,
    frontier,
    labels,
    log_ticks,
    over_time,
    printable,
    ticks,
    words,
)
from lamina.simulator.reports.page import html
from lamina.simulator.reports.report import WIDTH, grid, sentences, table, to_csv, to_json

HOSTILE = "<script>alert('x')</script> & \"a\" \x1b[31m\x00\n=1+1"
NAN = Distribution(math.nan, math.nan, math.nan, math.nan)
VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what was seen."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def checked_page(text: str) -> Page:
    page = Page(text)
    allowed = (
        "html head meta title style body main section div h1 h2 h3 p b span ul li dl dt dd table thead tbody tr th td "
        "ol figure figcaption svg g text tspan rect path circle"
    )
    assert {tag for tag, _ in page.tags} <= {*allowed.split()}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("src", "href", "srcset") for name in attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)
        assert "nan" not in re.sub(r">[^<]*<|aria-label=\"[^\"]*\"", "", drawing)
    return page


class TestTable:
    def test_every_block_is_aligned_and_the_best_of_what_keeps_the_slo_is_marked(self) -> None:
        runs = five()
        text = table(runs)
        *blocks, last = text.removesuffix("\n").split("\n\n")
        *body, note = last.splitlines()
        assert max(map(len, text.splitlines())) <= WIDTH
        assert note.startswith("* best")
        cells: dict[str, list[str]] = {}
        name = max(len(run.system) for run in runs)
        for block in (*blocks, "\n".join(body)):
            head, units, rule, *rows = block.splitlines()
            assert set(rule) == {"-"}
            assert [row[:name].rstrip() for row in rows] == [run.system for run in runs]
            ends = [match.end() for match in re.finditer(r"\S+(?: \S+)*", units)]
            for row in rows:  # each number ends where its head does; a mark comes after it
                assert [match.end() + name for match in re.finditer(r"[^\s*]+", row[name:])] == ends
            for place, unit in enumerate(re.split(r" {2,}", units.strip())):
                cells[f"{head[name:].split()[0]} {unit}"] = [row[name:].split()[place] for row in rows]
        assert cells["output tok/s"] == ["4,180", "4,215", "3,920", "5,075*", "4,460"]
        assert "1.86" in text  # the cheapest has 12 % in time
        assert "1.86*" not in text
        assert "2.22*" in text
        for unit in ("$/M tok", "tok/J", "p50 s", "p99 ms", "busy %", "GB/s"):
            assert unit in text

    def test_nothing_that_keeps_no_slo_is_the_best(self) -> None:
        runs = [run(0, slo_share=0.4), run(3, slo_share=0.1)]
        text = table(runs)
        assert "*" not in text
        assert "No system has 90% of its requests within the SLO" in text
        page = html(runs, "t")
        assert "Most tokens" not in page
        assert page.count("No system has 90% of its requests within the SLO") == 2
        assert 'class="best"' not in page
        assert 'fill:var(--best)"/>' not in page.split("<h2>Latency")[0].split("<h2>Throughput")[1]

    def test_one_system_has_no_best(self) -> None:
        text = table([run()])
        assert "*" not in text
        assert "5,075" in text

    def test_alike_is_no_best(self) -> None:
        lines = table([run(0, system="a"), run(0, system="b")]).splitlines()
        assert not any("*" in line for line in lines[:-1])

    def test_steady_state_is_shown_where_there_was_one(self) -> None:
        assert "when full" not in table(five())
        full = table([run(0), run(3, saturated_seconds=3000.0, saturated_tokens=19_500_000)])
        assert "when full" in full
        assert "6,500" in full

    def test_what_is_not_known_is_a_dash(self) -> None:
        text = table([run(0, ttft=NAN, power=0.0, price=0.0), run(3)])
        assert text.splitlines()[3].count("–") >= 5

    def test_a_hostile_name(self) -> None:
        text = table([run(0, system=HOSTILE), run(3)])
        assert "\x1b" not in text
        assert "\x00" not in text
        assert len(text.splitlines()) == 3 * 5 + 2 + 1


class TestJson:
    def test_everything_is_there(self) -> None:
        runs = five()
        made = json.loads(to_json(runs))
        for result, record in zip(runs, made["results"], strict=True):
            for item in dataclasses.fields(RunResult):
                assert item.name in record
            assert record["ttft"] == dataclasses.asdict(result.ttft)
            assert record["tokens_per_second"] == result.tokens_per_second
            assert record["tokens_per_dollar"] == result.tokens_per_dollar
            assert record["tokens_per_joule"] == result.tokens_per_joule
            assert record["dollars_per_million"] == result.dollars_per_million
            assert record["assumptions"] == result.assumptions
            assert record["samples"]["decode"] == [sample.decode for sample in result.samples]
            assert set(record["samples"]) == {item.name for item in dataclasses.fields(Sampled)}
        assert [list(record) for record in made["results"]] == [list(made["results"][0])] * 5
        assert to_json(runs) == to_json(five())

    def test_only_finite_numbers(self) -> None:
        broken = run(0, ttft=NAN, power=math.inf, samples=3, mean_batch=-math.inf)

        def refuse(name: str) -> Any:
            raise AssertionError(name)

        record = json.loads(to_json([broken]), parse_constant=refuse)["results"][0]
        assert record["ttft"]["p50"] is None
        assert record["power"] is None


class TestCsv:
    def test_one_row_a_system(self) -> None:
        runs = five()
        rows = list(csv.DictReader(io.StringIO(to_csv(runs))))
        assert [row["system"] for row in rows] == [result.system for result in runs]
        for row, result in zip(rows, runs, strict=True):
            assert float(row["ttft_p99"]) == result.ttft.p99
            assert float(row["tokens_per_second"]) == result.tokens_per_second
            assert "usable memory: " in row["assumptions"]
            assert "samples" not in row

    @pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@sum", "\t=1"])
    def test_no_name_becomes_a_formula(self, name: str) -> None:
        row = next(csv.DictReader(io.StringIO(to_csv([run(0, system=name)]))))
        assert row["system"] == f"'{name}"

    def test_negative_numbers_stay_numbers(self) -> None:
        row = next(csv.DictReader(io.StringIO(to_csv([run(0, power=-5.0)]))))
        assert row["power"] == "-5.0"

    def test_not_finite_is_empty(self) -> None:
        assert next(csv.DictReader(io.StringIO(to_csv([run(0, tbt=NAN)]))))["tbt_p50"] == ""


class TestPage:
    def test_it_needs_nothing_and_says_everything(self) -> None:
        runs = five()
        made = html(runs, "Five systems", Slo(2.0, 0.1), plan())
        page = checked_page(made)
        told = "\n".join(page.text)
        for result in runs:
            assert result.system in told
            assert all(text in told for text in result.assumptions.values())
        for head in ("Throughput and cost", "Latency", "Batch over time", "Utilisation over time", "All numbers"):
            assert head in told
        for head in ("The plan", "Candidates", "why", "ranked", "what would change it"):
            assert head in told
        assert "SLO: TTFT 2 s, TPOT 100 ms" in told
        assert "Simulated, not measured." in told
        assert "5,075 tok/s, 1.21 times vLLM 4x H100" in re.sub(r"<[^>]+>", "", made)
        assert "Most tokens a dollar: Lamina DOP(2, 4)" in " ".join(told.split())
        assert sum(tag == "svg" for tag, _ in page.tags) == 4 + 3 + 5 + 5 + 1
        assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg")
        policy = next(attributes for tag, attributes in page.tags if attributes.get("http-equiv"))
        assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
        assert "prefers-color-scheme:dark" in made

    def test_the_same_runs_give_the_same_page(self) -> None:
        assert html(five(), "t", plan=plan()) == html(five(), "t", plan=plan())

    def test_one_system_is_compared_with_none(self) -> None:
        made = html([run()], "One")
        told = "\n".join(checked_page(made).text)
        assert "×" not in told.replace("1.21×", "")
        assert "best of its column" not in told
        assert "5,075 output tokens a second for $2.22 a million, at $40.64 an hour." in told
        assert "The plan" not in told

    def test_without_samples_nothing_is_drawn_over_time(self) -> None:
        told = "\n".join(checked_page(html([run(samples=0)], "One")).text)
        assert "over time" not in told

    def test_nothing_known(self) -> None:
        empty = run(
            0, samples=0, seconds=0.0, price=0.0, power=0.0, output_tokens=0, finished=0, ttft=NAN, tpot=NAN, tbt=NAN,
            goodput=0.0, assumptions={}, rejected=4, link_bytes=0.0,
        )  # fmt: skip
        told = "\n".join(checked_page(html([empty, empty], "Nothing")).text)
        assert "Nothing was noted." in told
        assert "finished 0 of 19,366 requests (4 could never have fitted)." in told
        assert "Latency" not in told

    def test_names_are_shown_and_do_nothing(self) -> None:
        result = run(0, system=HOSTILE, model=HOSTILE, trace=HOSTILE, policy=HOSTILE, assumptions={HOSTILE: HOSTILE})
        given_ = {HOSTILE: HOSTILE, "deep": {HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}, "rows": [{HOSTILE: HOSTILE}]}
        given_ |= {"points": [(HOSTILE, 1.0, 2.0, True)], "chosen": HOSTILE}
        page = checked_page(html([result, run(3)], HOSTILE, plan=given_))
        assert any("<script>alert('x')</script>" in text for text in page.text)

    @given(st.text(max_size=60), st.text(max_size=60))
    @settings(max_examples=40)
    @example("", "\r")
    @example("a\rb", "c\r\nd")
    def test_any_name(self, system: str, text: str) -> None:
        result = run(1, samples=4, system=system, assumptions={text: system})
        checked_page(html([result, run(2, samples=4)], text, plan={text: system, "points": [(text, 1, 1, False)]}))
        json.loads(to_json([result]))
        assert len(list(csv.reader(io.StringIO(to_csv([result]))))) == 2
        assert len(table([result]).splitlines()) in (9, 14)  # a block of four lines, and another one or two

    def test_a_plan_s_values(self) -> None:
        given_ = {"yes": True, "none": None, "number": 0.123456, "count": 12345, "empty": []}
        given_ |= {"uneven": [{"a": 1}, {"b": "two"}]}
        told = "\n".join(checked_page(html([run()], "t", plan=given_)).text)
        for text in ("yes", "None", "0.123", "12345", "two"):
            assert text in told
        assert "SLO:" not in told

    def test_what_differs_is_assumed_of_some(self) -> None:
        told = re.sub(r"<[^>]+>", "", html(five(), "t"))
        assert "0.82 of the bandwidth, fitted to one published cell (Lamina DOP(2, 4), overlap, 2 lanes)" in told
        assert told.count("90 % of each device") == 1


@pytest.mark.parametrize("report", [table, to_json, to_csv, lambda runs: html(runs, "none")])
def test_no_results(report: Any) -> None:
    with pytest.raises(InvalidRequest, match="no results"):
        report([])


POINTS = st.lists(st.tuples(st.text(max_size=2), st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=30)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"), (0.1, "0.100"), (0.99999, "1.00"), (9.999, "10.0"), (99.97, "100"), (1234.5, "1,234"),
        (-3.14159, "-3.14"), (2e6, "2,000,000"), (3e9, "3e+09"), (1e-7, "1e-07"), (math.nan, "–"), (None, "–"),
    ],
)  # fmt: skip
def test_words(value: float | None, said: str) -> None:
    assert words(value) == said


@given(st.text(max_size=80), st.integers(8, 50))
def test_printable(text: str, most: int) -> None:
    made = printable(text, most)
    assert 0 < len(made) <= most
    assert made.isprintable()
    assert made == printable(made, most)


def test_a_long_name_keeps_its_end() -> None:
    assert printable("x" * 100 + " number 7", 20) == "x" * 11 + "…number 7"


def test_labels() -> None:
    assert labels(five()) == tuple(result.system for result in five())
    assert labels([run(0), run(0, policy="streaming"), run(3)])[:2] == ("vLLM 4x H100, full", "vLLM 4x H100, streaming")
    assert labels([run(0, seed=1), run(0, seed=2)]) == ("vLLM 4x H100, seed 1", "vLLM 4x H100, seed 2")
    assert labels([run(0), run(0)]) == ("vLLM 4x H100 #1", "vLLM 4x H100 #2")


@given(st.floats(1e-12, 1e12), st.integers(2, 6))
def test_ticks(high: float, intervals: int) -> None:
    marks = ticks(high, intervals)
    assert marks[0] == 0.0
    assert marks[-1] >= high * (1 - 1e-6)
    assert 2 <= len(marks) <= intervals + 1
    assert marks[-2] < high


@given(st.floats(1e-9, 1e9), st.floats(1, 1e9))
def test_log_ticks(low: float, ratio: float) -> None:
    start, end, marks = log_ticks(low, low * ratio)
    assert start <= low * (1 + 1e-6)
    assert end >= low * ratio * (1 - 1e-6)
    assert start < end
    assert len(marks) <= 6
    assert list(marks) == sorted(set(marks))
    assert all(start <= mark <= end for mark in marks)


def test_over_time_keeps_the_mean() -> None:
    samples = run(3, samples=1500).samples
    line = over_time(samples, lambda sample: sample.decode, 100)
    assert len(line) == 100
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert all(0 <= x <= SECONDS for x, _ in line)
    assert min(s.decode for s in samples) <= min(y for _, y in line)
    assert max(y for _, y in line) <= max(s.decode for s in samples)
    mean = sum(s.decode for s in samples) / len(samples)
    assert sum(y for _, y in line) / 100 == pytest.approx(mean, rel=0.01)


def test_over_time_weighs_by_seconds() -> None:
    one, two = run(3, samples=2).samples
    many = [
        dataclasses.replace(one, at=0.0, seconds=3.0, decode=10),
        dataclasses.replace(two, at=0.1, seconds=1.0, decode=2),
    ]
    last = dataclasses.replace(two, at=10.0, decode=7)
    assert over_time([*many, last], lambda sample: sample.decode, 2) == ((pytest.approx(0.025), 8.0), (10.0, 7.0))
    assert over_time(many, lambda sample: sample.decode, 2) == ((0.0, 10), (0.1, 2))
    assert over_time([], lambda sample: sample.decode) == ()


@given(POINTS)
def test_frontier(points: list[tuple[str, float, float, bool]]) -> None:
    best = frontier(points)
    good = [point for point in points if point[3]]
    assert bool(best) is bool(good)
    assert all(not (a[1] >= b[1] and a[2] >= b[2] and a[1:3] != b[1:3]) for b in best for a in good)
    assert all(any(b[1] >= point[1] and b[2] >= point[2] for b in best) for point in good)
    assert [point[1] for point in best] == sorted({point[1] for point in best})


def test_columns_and_the_best() -> None:
    runs = five()
    shown = columns(runs)
    assert len(shown) == len(COLUMNS) - 1  # nobody waited, so there is no rate while full
    for column, best in zip(shown, best_of(runs), strict=True):
        values = [column.known(result) for result in runs]
        kept = [value for value, result in zip(values, runs, strict=True) if result.keeps_slo]
        assert all(column.text(runs[place]) == column.text(runs[min(best)]) for place in best)
        for place in best:
            assert all(
                value is None or (value - (values[place] or 0)) * column.best <= 0.005 * abs(value) for value in kept
            )
        assert column.best or not best
    assert run(saturated_seconds=2.0, saturated_tokens=10).saturated_tokens_per_second == 5.0


NAMES = st.lists(st.text("ab x", min_size=1, max_size=12), min_size=1, max_size=30).map(" ".join)


@given(st.lists(st.tuples(NAMES, st.integers(0, 10**9).map(str), st.integers(0, 10**9).map(str)), min_size=1))
def test_a_table_is_folded_in_its_names(rows: list[tuple[str, str, str]]) -> None:
    lines = grid(rows)
    assert all(len(line) <= WIDTH for line in lines)
    assert " ".join(lines).split().sort() == " ".join(" ".join(row) for row in rows).split().sort()


def test_numbers_end_together_and_names_begin_together() -> None:
    lines = grid(
        [("kind", "system", "$"), ("split", "a long name of a system", "4.50"), ("whole", "b", "12.00")], 2, 31
    )
    assert lines == [
        "kind   system                    $",
        "split  a long name of a       4.50",
        "         system",
        "whole  b                     12.00",
    ]


def test_sentences_are_folded() -> None:
    lines = sentences(["word " * 50, "next"])
    assert all(len(line) <= WIDTH for line in lines)
    assert lines[-1] == "  next"
    assert lines[1].startswith("    word")
