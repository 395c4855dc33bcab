"""The oracle sees a wrong, a repeated and a missing token, an unfinished request, and what the cluster complains of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import oracle
import pytest
from scenario import Answer, KillEngine, Outcome, Scenario, Setup, Submit

SUBMIT = Submit(0.0, request=0, prompt=4, tokens=6)
TEXT = [3, 1, 4, 1, 5, 9]


@pytest.fixture(autouse=True)
def _text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "reference_text", lambda submit, sample, model: TEXT)


def kinds(
    change: Callable[[Answer], None] = lambda answer: None,
    scenario: Scenario = Scenario(),  # noqa: B008  # it is frozen
    counts: Counter[str] | None = None,
    complaints: list[str] | None = None,
) -> list[str]:
    answer = Answer(SUBMIT, [list(TEXT)], ["length"])
    change(answer)
    outcome = Outcome({0: answer}, complaints or [], counts or Counter(), [], 1.0)
    return [violation.kind for violation in oracle.violations(scenario, outcome)]


def got(*tokens: int, end: str | None = "length") -> Callable[[Answer], None]:
    def change(answer: Answer) -> None:
        answer.samples[0][:], answer.ends[0] = tokens, end

    return change


def failed(error: str, left: bool = False) -> Callable[[Answer], None]:
    def change(answer: Answer) -> None:
        answer.error, answer.left, answer.ends[0] = error, left, None
        del answer.samples[0][3:]

    return change


def test_the_whole_text_is_right() -> None:
    assert kinds() == []


def test_each_wrong_text_has_its_kind() -> None:
    assert kinds(got(3, 1, 7, 1, 5, 9)) == ["a wrong token"]
    assert kinds(got(3, 1, 4, 4, 1, 5)) == ["a repeated token"]
    assert kinds(got(*TEXT, 2)) == ["too many tokens"]
    assert kinds(got(3, 1)) == ["too few tokens"]
    assert kinds(got(*TEXT, end="stop")) == ["ended by stop"]


def test_an_unfinished_request_is_wrong_only_once_all_is_healed() -> None:
    unfinished = got(3, 1, end=None)
    assert kinds(unfinished) == ["a request does not end"]
    assert kinds(unfinished, replace(Scenario(), mode="safety")) == []
    assert kinds(got(3, 2, end=None), replace(Scenario(), mode="safety")) == ["a wrong token"]


def test_a_request_may_fail_only_for_what_happened() -> None:
    blamed = "3 batches in a row failed with this request, the last of it alone: gone"
    assert kinds(failed("any")) == ["any"]
    assert kinds(failed("any", left=True)) == []
    assert kinds(failed(blamed)) == ["N batches in a row failed with this request, the last of it alone: gone"]
    assert kinds(failed(blamed), counts=Counter(KillWorker=3, steps=9)) == []
    assert kinds(failed(blamed), counts=Counter(KillWorker=2, deaths=2, Submit=9, slices=40, Leave=3)) != []
    assert kinds(failed(blamed), counts=Counter(Cut=1)) == []
    killed = Scenario(events=(KillEngine(0.1),))
    assert kinds(failed("the engine's process is gone"), killed) == []
    linked = replace(killed, setup=Setup(link=True))
    assert kinds(failed("the engine's process is gone"), linked) == ["the engine's process is gone"]


def test_complaints_of_two_seeds_are_of_one_kind() -> None:
    one = kinds(complaints=["worker-1: 12 pages free of 64"])
    assert one == kinds(complaints=["worker-3: 9 pages free of 88"]) == ["worker-N: N pages free of N"]
