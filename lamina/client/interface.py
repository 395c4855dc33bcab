"""An engine as its callers see it, and a connection to one in another process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from lamina.completions import FinishReason
from lamina.kv.prefix_nodes import PrefixSink
from lamina.messages.engine_messages import Command, Event
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.messages.snapshot import Snapshot

Delivery: TypeAlias = tuple[EngineRequest, list[EngineOutput]]
"""A request and its outputs of one batch: the arguments of an `EngineRequest.sink`."""


class EngineClient(Protocol):
    """What clients use of an engine, in this process or another. For any thread."""

    @property
    def alive(self) -> bool:
        """Whether requests are served."""

    @property
    def halted(self) -> bool:
        """Whether nothing can be computed at present: no attention worker is left, or a model worker is missing.
        Requests wait."""

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises EngineError where the engine has stopped."""

    def abort(self, request: EngineRequest, sample: int | None = None, reason: FinishReason = "abort") -> None:
        """End a request, or one sample of it. Harmless where it has ended."""

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        """Call `sink` soon, on some thread, with what the engine is doing; perhaps never where it has stopped."""

    def prefix_events(self, sink: PrefixSink) -> None:
        """Call `sink`, on some thread, with each change of the prefix cache, first with all that is there, until it
        returns False or another sink comes. With another engine after this one, it begins anew."""

    def close(self) -> None:
        """Stop soon; unfinished requests end with an EngineError."""


class Wire(Protocol):
    """A connection to an `EngineHost`. Either method raises EngineError once it is broken."""

    def ask(self, commands: Sequence[Command]) -> None:
        """Do commands at the host, in order; returns when they are done."""

    def events(self) -> Sequence[Event]:
        """The next events, in order; waits for one."""
