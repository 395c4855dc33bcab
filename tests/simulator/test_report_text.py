"""Tables and sentences for a terminal: within 100 columns, with all their words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lamina.simulator.reports.report import WIDTH, grid, sentences

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
