"""The figures and checks of fault scenarios, from answers that are made up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from evaluate.fault_injection.checks import (
    Check,
    Counted,
    Exited,
    LogSays,
    NoneLost,
    NoneRefused,
    NothingLeft,
    Recovered,
    SameTexts,
)
from evaluate.fault_injection.load import Answer
from evaluate.fault_injection.result import Result, row
from evaluate.fault_injection.table import table


def answer(prompt: int, sent: float, *times: float, end: str = "done", text: str | None = None) -> Answer:
    """A token at each time; the text of a prompt is its number again and again."""
    written = str(prompt) * len(times) if text is None else text
    return Answer(prompt, sent, list(times), len(times), written, times[-1] if times else sent, end, "why")


RESULT = Result(
    answers=(
        answer(1, 0.0, 0.5, 0.6, 0.7),
        answer(2, 1.0, 1.2, 1.4, 4.4),  # the fault is at 2.0
        answer(3, 1.0, 1.5, end="lost"),
        answer(4, 2.5, end="refused"),
        answer(5, 6.0, 6.1, 6.4, 6.7),
        answer(6, 6.0, 6.3, 6.4, end="left"),
    ),
    start=3.0,
    began=2.0,
    whole=5.0,
    texts={number: str(number) * 3 for number in range(1, 7)},
    counters={"rebuilt_tokens": 40, "lost_holders": 1},
)


def changed(**fields: Any) -> Result:
    return dataclasses.replace(RESULT, **fields)


def test_row_counts_requests_by_their_end_and_the_tokens_that_lost_ones_lack() -> None:
    found = row("worker killed", "SIGKILL", RESULT, 3, ["something"])
    assert (found.done, found.lost, found.refused, found.left) == (3, 1, 1, 1)
    assert (found.tokens_lost, found.changed, found.recomputed) == (2, 0, 40)
    assert found.problems == ("something",)


def test_latencies_are_those_before_the_fault_and_after_the_recovery() -> None:
    found = row("worker killed", "SIGKILL", RESULT, 3, [])
    assert (found.ttft_before, found.ttft_after) == pytest.approx((0.5, 0.1))
    assert (found.tpot_before, found.tpot_after) == pytest.approx((0.1, 0.3))
    assert (found.pause, found.recovery) == pytest.approx((3.0, 3.0))


def test_without_a_recovery_nothing_comes_after_it() -> None:
    found = row("worker killed", "SIGKILL", changed(whole=None), 3, [])
    assert (found.recovery, found.ttft_after, found.tpot_after) == (None, None, None)


@pytest.mark.parametrize(
    ("check", "holds", "fails"),
    [
        (NoneLost(most=1), RESULT, changed(answers=(answer(3, 1.0, end="lost"),) * 2)),
        (NoneRefused(), changed(answers=()), RESULT),
        (SameTexts(), RESULT, changed(answers=(answer(1, 0.0, 1.0, 2.0, 3.0, text="112"),))),
        (SameTexts(), RESULT, changed(answers=(answer(1, 0.0, 1.0, 2.0),))),  # a token is missing
        (SameTexts(), RESULT, changed(answers=(answer(3, 0.0, 1.0, 2.0, end="lost", text="34"),))),
        (Recovered(3.0), RESULT, changed(whole=None)),
        (Recovered(3.0), RESULT, changed(whole=5.1)),
        (NothingLeft(), RESULT, changed(left="2 sequences")),
        (Counted("lost_holders", 1, 1), RESULT, changed(counters={"lost_holders": 2})),
        (Counted("lost_holders", 1, 1), RESULT, changed(counters={})),
        (LogSays("jour.al"), changed(log="the journal"), RESULT),
        (Exited(0), changed(exit_status=0), RESULT),
    ],
    ids=lambda value: type(value).__name__,
)
def test_check_says_what_does_not_hold(check: Check, holds: Result, fails: Result) -> None:
    assert check.problem(holds) == ""
    assert check.problem(fails) != ""


def test_what_does_not_hold_stands_below_the_table() -> None:
    found = table([row("worker killed", "SIGKILL", RESULT, 3, ["2 texts changed"])])
    assert found.splitlines()[-2:] == ["", "- worker killed: 2 texts changed"]
