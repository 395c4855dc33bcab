"""What a scenario gave: from the answers of its clients to the figures of one row. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .load import Answer


@dataclass(frozen=True, slots=True)
class Result:
    """One run. Times are readings of one clock, in seconds: when the fault `began`, and when the service was whole
    again and each client had had a token since (None: never). `start` are the seconds that the server took to serve.
    `counters` are the engine's at the end, `left` what still ran once the clients had gone, `texts` those of an
    undisturbed engine by prompt."""

    answers: tuple[Answer, ...]
    start: float
    began: float
    whole: float | None
    texts: Mapping[int, str]
    counters: Mapping[str, Any] = field(default_factory=dict)
    left: str = ""
    log: str = ""
    exit_status: int | None = None

    @property
    def recovery(self) -> float | None:
        """Seconds from the fault until the service was whole and every stream went on."""
        return None if self.whole is None else self.whole - self.began

    @property
    def before(self) -> list[Answer]:
        return [each for each in self.answers if each.end == "done" and each.ended <= self.began]

    @property
    def after(self) -> list[Answer]:
        whole = self.whole
        return [] if whole is None else [each for each in self.answers if each.end == "done" and each.sent >= whole]

    def ended(self, how: str) -> list[Answer]:
        return [each for each in self.answers if each.end == how]

    def tokens_lost(self, asked: int) -> int:
        """Of the requests that were lost: tokens that were asked for and did not come."""
        return sum(asked - each.tokens for each in self.ended("lost"))

    @property
    def changed(self) -> list[Answer]:
        """Answers whose text is not that of an undisturbed engine, or its beginning where they were cut short."""
        return [each for each in self.answers if not self._as_undisturbed(each)]

    def _as_undisturbed(self, answer: Answer) -> bool:
        text = self.texts[answer.prompt] if answer.text else ""
        return answer.text == text if answer.end == "done" else text.startswith(answer.text)

    @property
    def pause(self) -> float:
        """The longest time between two pieces of one stream, from the fault on; seconds."""
        gaps = (
            later - earlier for each in self.answers for earlier, later in pairwise(each.times) if later > self.began
        )
        return max(gaps, default=0.0)


NOTHING = Result((), 0.0, 0.0, None, {})
"""Of a scenario that could not be run."""


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one scenario. Seconds; TTFT and TPOT are medians of the requests that ended before the fault, and
    of those sent after the recovery, None where there are none."""

    scenario: str
    failure: str
    start: float
    done: int
    lost: int
    refused: int
    left: int
    tokens_lost: int
    changed: int
    ttft_before: float | None
    ttft_after: float | None
    tpot_before: float | None
    tpot_after: float | None
    pause: float
    recovery: float | None
    recomputed: int
    problems: tuple[str, ...]


def row(scenario: str, failure: str, result: Result, asked: int, problems: Iterable[str]) -> Row:
    """`asked`: the tokens of each answer. `problems`: what the scenario's checks found."""
    return Row(
        scenario=scenario,
        failure=failure,
        start=result.start,
        done=len(result.ended("done")),
        lost=len(result.ended("lost")),
        refused=len(result.ended("refused")),
        left=len(result.ended("left")),
        tokens_lost=result.tokens_lost(asked),
        changed=len(result.changed),
        ttft_before=_median(each.ttft for each in result.before),
        ttft_after=_median(each.ttft for each in result.after),
        tpot_before=_median(each.tpot for each in result.before),
        tpot_after=_median(each.tpot for each in result.after),
        pause=result.pause,
        recovery=result.recovery,
        recomputed=int(result.counters.get("rebuilt_tokens", 0)),
        problems=tuple(problems),
    )


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
