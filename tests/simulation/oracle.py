"""Says what is wrong with what came of a scenario.

Safety, in both modes: every token is that of the reference at its place, none comes twice, nothing comes after an end,
and the cluster itself has no complaint: no page leaks, no foreign KV is taken. Liveness, where all faults end: every
request ends with its whole text, unless its client left, or something happened that is allowed to end it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from scenario import (
    Answer,
    Break,
    Cut,
    Delay,
    Event,
    Flip,
    Freeze,
    FreezeEngine,
    KillEngine,
    KillModelWorker,
    KillWorker,
    Outcome,
    Reset,
    Scenario,
    Slow,
    Submit,
    reference_text,
)

from lamina.scheduling.blame import TRIES

PATIENT = 1.0  # seconds; setups that wait less for a worker may see requests end
_START = 0.01  # seconds in which the first engine starts
_ONCE = KillWorker, KillModelWorker, KillEngine, Reset, Flip, Break  # each fails the batches under way, once
_LASTING = Freeze, FreezeEngine, Slow, Delay, Cut  # each may fail one batch after the other


class Violation(NamedTuple):
    """`kind` is the same for the same fault in another scenario; `text` has the numbers of this one."""

    kind: str
    text: str


def violations(scenario: Scenario, outcome: Outcome) -> list[Violation]:
    """Everything that must not be, the gravest first."""
    found = [*_wrong_texts(scenario, outcome)]
    found += [Violation(_without_numbers(complaint), complaint) for complaint in outcome.complaints]
    if scenario.mode == "liveness":
        found += _unfinished(scenario, outcome)
    return found


def _wrong_texts(scenario: Scenario, outcome: Outcome) -> Iterator[Violation]:
    for number, answer in sorted(outcome.answers.items()):
        for sample, (tokens, end) in enumerate(zip(answer.samples, answer.ends, strict=True)):
            right = reference_text(answer.submit, sample, scenario.setup.model)
            where = f"request {number}, sample {sample}"
            if len(tokens) > len(right):
                yield Violation("too many tokens", f"{where}: {len(tokens)} tokens of {len(right)}")
            for at, (got, wanted) in enumerate(zip(tokens, right, strict=False)):
                if got != wanted:
                    again = at and got == right[at - 1]
                    kind = "a repeated token" if again else "a wrong token"
                    yield Violation(kind, f"{where}: token {at} is {got}, not {wanted}")
                    break
            if end == "length" and len(tokens) < len(right):
                yield Violation("too few tokens", f"{where}: it ended with {len(tokens)} tokens of {len(right)}")
            if end not in (None, "length") and not answer.left:
                yield Violation(f"ended by {end}", f"{where}: nobody ended it, and it ended by {end!r}")


def _unfinished(scenario: Scenario, outcome: Outcome) -> Iterator[Violation]:
    for number, answer in sorted(outcome.answers.items()):
        if answer.error and not _excused(answer, scenario, outcome):
            yield Violation(_without_numbers(answer.error), f"request {number} failed: {answer.error}")
        elif not answer.over and not answer.left:
            got = [len(tokens) for tokens in answer.samples]
            yield Violation("a request does not end", f"request {number} has {got} tokens after {outcome.seconds:g} s")


def _excused(answer: Answer, scenario: Scenario, outcome: Outcome) -> bool:
    """Whether a request may have ended with this error after all that has happened."""
    counts, error = outcome.counts, answer.error
    restarts = _count(scenario, KillEngine)
    if answer.left:
        return True
    if "batches in a row failed with this request" in error:  # alone, it cannot be told from what kills workers
        return sum(counts[kind.__name__] for kind in _ONCE) >= TRIES or any(counts[kind.__name__] for kind in _LASTING)
    if "engines died with this request" in error:
        return restarts >= TRIES
    if re.search("none has joined for|has not come back for|no other engine came for", error):
        return scenario.setup.wait < PATIENT
    if error.startswith("ContextTooLong"):  # an engine that starts without its workers does not know what they have
        return bool(restarts) or any(not isinstance(event, Submit) and event.at < _START for event in scenario.events)
    if not scenario.setup.link:  # the client is in the engine's process
        return bool(restarts)
    return False


def _count(scenario: Scenario, kind: type[Event]) -> int:
    return sum(isinstance(event, kind) for event in scenario.events)


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "N", text)[:120]
