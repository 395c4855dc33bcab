"""The HTTP process and its link to the engine: the real `RemoteEngine` and `EngineHost`, with simulated frames between.

What their threads do happens here at once, or when a frame arrives: nothing waits. A frame arrives after a while, in
order. When either process dies, frames under way are lost, and the other side sees the connection break.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from lamina.client.interface import EngineClient
from lamina.client.remote import EngineHost, RemoteEngine
from lamina.messages.engine_messages import Command, Event, pack_commands, pack_events, unpack_commands, unpack_events
from lamina.messages.engine_request import EngineRequest


class Time(Protocol):
    """As `virtual_time.Time`, as far as it is used."""

    now: float

    def at(self, second: float, do: Callable[..., None], *arguments: Any) -> None: ...
    def after(self, seconds: float, do: Callable[..., None], *arguments: Any) -> None: ...


class Process(Protocol):
    """As `virtual_time.Process`, as far as it is used."""

    alive: bool
    frozen_until: float


class _Later:
    """A call that is made later, unless it is cancelled."""

    def __init__(self, time: Time, seconds: float, call: Callable[[], object]) -> None:
        self._call: Callable[[], object] | None = call
        time.after(seconds, self._due)

    def cancel(self) -> None:
        self._call = None

    def _due(self) -> None:
        if self._call is not None:
            self._call()


class NoWire:
    """Nobody waits for it: `SimulatedClient` sends commands itself, and is given events."""

    def ask(self, commands: Sequence[Command]) -> None:
        raise AssertionError("commands go out by SimulatedClient.flush")

    def events(self) -> Sequence[Event]:
        raise AssertionError("events come in by SimulatedClient.arrived")


class SimulatedClient(RemoteEngine):
    """A `RemoteEngine` whose two threads are calls of its owner."""

    def __init__(self, time: Time, patience: float) -> None:
        super().__init__(NoWire(), lambda: time.now, patience=patience, holds=True, later=partial(_Later, time))

    def _begin(self, wire: object) -> None:
        self._halted = False

    def waiting(self) -> list[Command]:
        """The commands to be sent, taken out."""
        commands = []
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                commands.append(command)
        return commands

    def arrived(self, events: Sequence[Event]) -> None:
        """What the engine has sent."""
        for event in events:
            self._take(event)

    def parted(self, why: str) -> None:
        """The connection broke."""
        self._part(why)


class _Direction:
    """Frames one way: each takes `delay` seconds, and none overtakes another. A `receiver` that is dead takes none, one
    that stands still takes them afterwards."""

    def __init__(
        self, time: Time, delay: Callable[[], float], take: Callable[[bytes], None], receiver: Process | None = None
    ) -> None:
        self._time, self._delay, self._take, self._receiver = time, delay, take, receiver
        self._last = 0.0
        self.cut = False

    def send(self, packed: bytes) -> None:
        self._last = max(self._last, self._time.now + self._delay())
        self._time.at(self._last, self._arrive, packed)

    def _arrive(self, packed: bytes) -> None:
        receiver = self._receiver
        if self.cut or (receiver is not None and not receiver.alive):
            return
        if receiver is not None and self._time.now < receiver.frozen_until:
            self._time.at(receiver.frozen_until, self._arrive, packed)
            return
        self._take(packed)


class _Connection:
    """A client's connection to one engine."""

    def __init__(
        self, link: ServerLink, engine: EngineClient, process: Process, time: Time, delay: Callable[[], float]
    ) -> None:
        self._host = EngineHost(engine, self.put, lambda: time.now)
        self._time = time
        self._events: list[Event] = []
        self._to_engine = _Direction(time, delay, lambda packed: self._host.ask(unpack_commands(packed)), process)
        self._to_client = _Direction(time, delay, lambda packed: link.client.arrived(unpack_events(packed)))

    def put(self, event: Event) -> None:
        """An event of the host, on the engine's thread. Those of one batch leave together."""
        self._events.append(event)
        if len(self._events) == 1:
            self._time.after(0.0, self._flush)

    def ask(self, commands: Sequence[Command]) -> None:
        for packed in pack_commands(commands):
            self._to_engine.send(packed)

    def _flush(self) -> None:
        if self._to_client.cut:
            return
        self._host.report()
        events, self._events = self._events, []
        self._to_client.send(pack_events(events))

    def end(self, engine_lives: bool) -> None:
        """The connection breaks. An engine that lives sees it, and ends the client's requests."""
        self._to_engine.cut = self._to_client.cut = True
        if engine_lives:
            self._host.abandon()


class ServerLink:
    """An HTTP process before an engine that may come and go. `delay` gives each frame's seconds on its way; requests
    wait `patience` seconds for another engine."""

    def __init__(self, time: Time, delay: Callable[[], float], patience: float) -> None:
        self._time, self._delay, self._patience = time, delay, patience
        self._connection: _Connection | None = None
        self._engine: tuple[EngineClient, Process] | None = None
        self._open()

    def _open(self) -> None:
        self.client = SimulatedClient(self._time, self._patience)
        self.client.parted("no engine yet")

    def submit(self, request: EngineRequest) -> None:
        """As `Engine.submit`; where no engine is there the request waits."""
        self.client.submit(request)
        self._send()

    def abort(self, request: EngineRequest, sample: int | None = None) -> None:
        """As `Engine.abort`."""
        self.client.abort(request, sample)
        self._send()

    def engine_up(self, engine: EngineClient, process: Process) -> None:
        """There is an engine, with which the client goes on; one that has given up is replaced."""
        if not self.client.rejoin(NoWire()):
            self._open()
            self.client.rejoin(NoWire())
        self._engine = engine, process
        self._connection = _Connection(self, engine, process, self._time, self._delay)
        self._send()

    def engine_down(self) -> None:
        """The engine's process has died."""
        self._engine = None
        self._break(engine_lives=False)
        self.client.parted("the engine's process is gone")

    def reset(self) -> None:
        """The connection breaks while both processes live; the client connects again at once."""
        engine = self._engine
        if engine is None:
            return
        self._break(engine_lives=True)
        self.client.parted("the connection broke")
        self.engine_up(*engine)

    def client_restarts(self) -> None:
        """The HTTP process dies and another takes its place: its requests are gone, and their clients with them."""
        self._break(engine_lives=self._engine is not None)
        self._open()
        if self._engine is not None:
            self.engine_up(*self._engine)

    def _break(self, engine_lives: bool) -> None:
        if self._connection is not None:
            self._connection.end(engine_lives)
            self._connection = None

    def _send(self) -> None:
        if self._connection is not None and (commands := self.client.waiting()):
            self._connection.ask(commands)
