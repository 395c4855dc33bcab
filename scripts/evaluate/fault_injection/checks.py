"""What must hold after a scenario, as data. Each check says what is wrong, or nothing. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from .result import Result


class Check(Protocol):
    def problem(self, result: Result) -> str:
        """What is wrong, in words; empty where nothing is."""


@dataclass(frozen=True, slots=True)
class NoneLost:
    """No request was lost, but for so many at `most`."""

    most: int = 0

    def problem(self, result: Result) -> str:
        lost = result.ended("lost")
        return f"{len(lost)} requests lost, allowed are {self.most}: {lost[0].why}" if len(lost) > self.most else ""


@dataclass(frozen=True, slots=True)
class NoneRefused:
    """No request was refused: the server took requests all the time."""

    def problem(self, result: Result) -> str:
        refused = result.ended("refused")
        return f"{len(refused)} requests refused: {refused[0].why}" if refused else ""


@dataclass(frozen=True, slots=True)
class SameTexts:
    """Every text is that of an undisturbed engine."""

    def problem(self, result: Result) -> str:
        changed = result.changed
        if not changed:
            return ""
        first = changed[0]
        expected = result.texts[first.prompt]
        return f"{len(changed)} texts changed: prompt {first.prompt} gave {first.text!r}, not {expected!r}"


@dataclass(frozen=True, slots=True)
class Recovered:
    """The service was whole again, and every stream went on, within so many seconds."""

    seconds: float = 60.0

    def problem(self, result: Result) -> str:
        if result.recovery is None:
            return "the service did not recover"
        late = f"it took {result.recovery:.1f} s, allowed are {self.seconds:g}"
        return late if result.recovery > self.seconds else ""


@dataclass(frozen=True, slots=True)
class NothingLeft:
    """Once the clients have gone, no request runs and only the prefix cache has pages."""

    def problem(self, result: Result) -> str:
        return result.left


@dataclass(frozen=True, slots=True)
class Counted:
    """A counter of the engine's snapshot is within these bounds at the end."""

    counter: str
    least: int = 0
    most: int = 1 << 62

    def problem(self, result: Result) -> str:
        found = result.counters.get(self.counter)
        fine = found is not None and self.least <= found <= self.most
        return "" if fine else f"{self.counter} is {found}; allowed are {self.least} to {self.most}"


@dataclass(frozen=True, slots=True)
class LogSays:
    pattern: str

    def problem(self, result: Result) -> str:
        return "" if re.search(self.pattern, result.log) else f"the log does not say {self.pattern!r}"


@dataclass(frozen=True, slots=True)
class Exited:
    """The server has ended, with this status."""

    status: int = 0

    def problem(self, result: Result) -> str:
        found = result.exit_status
        return "" if found == self.status else f"the exit status is {found}; expected is {self.status}"
