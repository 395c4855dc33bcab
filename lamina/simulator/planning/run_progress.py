"""One progress over many runs, and what maps a function over many things."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from lamina.simulator.event_loop.simulate import Progress

A = TypeVar("A")
B = TypeVar("B")


class Mapped(Protocol):
    """As `map`; perhaps by several processes, so that what the function changes is lost."""

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]: ...


def one_by_one(function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]:
    """The `Mapped` of a single process."""
    return map(function, items)


class RunProgress:
    """Progress over about so many `runs`, which never falls, and is at its end when `end` says so."""

    def __init__(self, progress: Progress | None, what: str, runs: int) -> None:
        self._progress, self._what, self._runs, self._done = progress, what, runs, 0

    def over(self, mapped: Iterable[B]) -> Iterator[B]:
        """Results as they come, each of a run."""
        for result in mapped:
            self.one()
            yield result

    def one(self) -> None:
        """A run is done."""
        self._done += 1
        if self._progress is not None and self._done < self._runs:
            self._progress(self._what, self._done, self._runs)

    def end(self) -> None:
        """All runs are done, or no more are needed."""
        if self._progress is not None:
            self._progress(self._what, self._runs, self._runs)
