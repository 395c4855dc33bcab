"""A connection that ends where it begins: what is sent comes out as bytes, on another clock."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Any

from lamina.client.remote import EngineHost, fetch
from lamina.errors import EngineError
from lamina.messages.engine_messages import (
    Command,
    Event,
    Stopped,
    pack_commands,
    pack_events,
    unpack_commands,
    unpack_events,
)

AHEAD = 1000.0  # seconds that the far end's clock is ahead of ours


class Loop:
    """A wire that does not leave the process. What crosses it is packed and unpacked."""

    def __init__(self, engine: Any, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._host = EngineHost(engine, self._events.put, clock)
        self.cut = False
        self.asked: list[Command] = []

    def ask(self, commands: Sequence[Command]) -> None:
        if self.cut:
            raise EngineError("the wire is cut")
        self.asked += commands
        for packed in pack_commands(commands):
            self._host.ask(unpack_commands(packed))

    def events(self) -> Sequence[Event]:
        while not (fetched := fetch(self._events, 0.05)):
            if self.cut:
                raise EngineError("the wire is cut")
            if not self._engine.alive:
                return [Stopped("the engine has stopped")]
            self._host.report()
        return unpack_events(pack_events(fetched))

    def put(self, event: Event) -> None:
        self._events.put(event)
