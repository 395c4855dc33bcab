"""An engine as its callers see it, and the events that cross a connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from lamina.completions import FinishReason
from lamina.messages.engine_request import EngineRequest
from lamina.messages.request_codec import (
    Command,
)
from lamina.messages.snapshot import Snapshot

Event: TypeAlias = tuple[Any, ...]
"""("outputs", id, outputs, scheduled, cached tokens, preemptions, spared) | ("prefilled", id, done, total) |
("progress", what, done, total) | ("snapshot", number, fields) | ("log", level, text) | ("stopped", why). Times are
seconds since the submission, but for those of snapshots."""


class EngineClient(Protocol):
    """What clients use of an engine, wherever it runs. For any thread."""

    @property
    def alive(self) -> bool:
        """Whether requests are served."""

    def submit(self, ticket: EngineRequest) -> None:
        """Queue a request. Raises EngineError where the engine has stopped."""

    def abort(self, ticket: EngineRequest, sample: int | None = None, reason: FinishReason = "abort") -> None:
        """End a request, or one sample of it. Harmless where it has ended."""

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        """Have `sink` told, soon and on some thread, what the engine is doing; perhaps never where it has stopped."""

    def close(self) -> None:
        """Stop soon; unfinished requests end with an EngineError."""


class Wire(Protocol):
    """The way to an `EngineHost`. Either method raises EngineError once nobody is there."""

    def ask(self, commands: Sequence[Command]) -> None:
        """Have commands done, in order; returns when they are."""

    def events(self) -> Sequence[Event]:
        """The next events, in order; waits for one."""
