"""Makes a failing scenario small: fewer events by delta debugging (Zeller's ddmin), plainer settings, rounder numbers.

Knows nothing of what a scenario means: a scenario is data, and `fails` says whether it still shows the fault.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
_DIGITS = (0, 1, 2)  # decimals to which times are rounded, the fewest first


class Budget:
    """How many tries there are: `tries`, and those that `seconds` allow."""

    def __init__(self, tries: int, seconds: float) -> None:
        self._left = tries
        self._until = time.monotonic() + seconds

    def spent(self) -> bool:
        """Whether no further try is allowed. Counts one."""
        self._left -= 1
        return self._left < 0 or time.monotonic() > self._until


def ddmin(items: Sequence[T], fails: Callable[[list[T]], bool]) -> list[T]:
    """The fewest of `items`, in order, for which it still fails: no single one can be removed."""
    kept, parts = list(items), 2
    while kept:
        size = -(-len(kept) // parts)
        for begin in range(0, len(kept), size):
            rest = kept[:begin] + kept[begin + size :]
            if fails(rest):
                kept, parts = rest, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(len(kept), 2 * parts)
    return kept


def shrunk(scenario: Any, fails: Callable[[Any], bool], tries: int = 400, seconds: float = 60.0) -> Any:
    """The smallest scenario found that still `fails`: a dataclass with `setup`, a dataclass whose fields have defaults,
    and `events`, dataclasses. Ends after so many tries or seconds with the best so far."""
    budget = Budget(tries, seconds)

    def still(changed: Any) -> bool:
        return not budget.spent() and fails(changed)

    before = None
    while scenario != before:
        before = scenario
        scenario = _rounder(_plainer(_shorter(scenario, still), still), still)
    return scenario


def _shorter(scenario: Any, still: Callable[[Any], bool]) -> Any:
    """Its setup with as few events as possible."""

    def with_events(events: Sequence[Any]) -> Any:
        return dataclasses.replace(scenario, events=tuple(events))

    return with_events(ddmin(scenario.events, lambda events: still(with_events(events))))


def _plainer(scenario: Any, still: Callable[[Any], bool]) -> Any:
    """Its setup with as many defaults as possible."""
    for field in dataclasses.fields(scenario.setup):
        if field.default is dataclasses.MISSING or getattr(scenario.setup, field.name) == field.default:
            continue
        changed = dataclasses.replace(scenario.setup, **{field.name: field.default})
        if still(other := dataclasses.replace(scenario, setup=changed)):
            scenario = other
    return scenario


def _rounder(scenario: Any, still: Callable[[Any], bool]) -> Any:
    """Its events with rounder times and smaller numbers."""
    for at in range(len(scenario.events)):
        for field in dataclasses.fields(scenario.events[at]):
            for value in _simpler(getattr(scenario.events[at], field.name)):
                events = list(scenario.events)
                events[at] = dataclasses.replace(events[at], **{field.name: value})
                if still(other := dataclasses.replace(scenario, events=tuple(events))):
                    scenario = other
                    break
    return scenario


def _simpler(value: object) -> Iterator[object]:
    """Plainer values of the same kind, the plainest first."""
    if isinstance(value, bool):
        if value:
            yield False
    elif isinstance(value, float):
        yield from dict.fromkeys(rounded for digits in _DIGITS if (rounded := round(value, digits)) != value)
    elif isinstance(value, int) and value > 1:
        yield from dict.fromkeys((1, value // 2))
