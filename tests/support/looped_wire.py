"""A connection that ends where it begins: what is sent comes out as bytes, on another clock."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Any

from lamina.client.interface import Event
from lamina.client.remote import EngineHost, fetch
from lamina.errors import EngineError
from lamina.messages.request_codec import Command

AHEAD = 1000.0  # seconds that the far end's clock is ahead of ours


class Loop:
    """A wire that does not leave the process. What crosses it must be plain data."""

    def __init__(self, engine: Any, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._host = EngineHost(engine, self._events, clock)
        self.cut = False
        self.asked: list[Command] = []

    def ask(self, commands: Sequence[Command]) -> None:
        check_plain(list(commands))
        if self.cut:
            raise EngineError("the wire is cut")
        self.asked += commands
        self._host.ask(commands)

    def events(self) -> Sequence[Event]:
        while not (fetched := fetch(self._events, 0.05)):
            if self.cut:
                raise EngineError("the wire is cut")
            if not self._engine.alive:
                return [("stopped", "the engine has stopped")]
            self._host.report()
        check_plain(fetched)
        return fetched

    def put(self, event: Event) -> None:
        self._events.put(event)


def check_plain(value: object) -> None:
    if isinstance(value, tuple | list):
        for item in value:
            check_plain(item)
    elif isinstance(value, dict):
        check_plain(list(value.items()))
    else:
        assert value is None or type(value) in (bool, int, float, str), value
