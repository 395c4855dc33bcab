"""An attention worker of the simulated cluster: the real server, seats, leases and pages, without threads and sockets.

Its machine outlives its process. What comes is handled one message after another, each after the time that it takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from network import Connection, Line
from virtual_time import Process, Time

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import Channel, ChannelClosed
from lamina_protocols.errors import LaminaError
from lamina_workers.attention_server.attention_server import AttentionServer, ServerConfig
from lamina_workers.attention_server.loop import ComputeLoop
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.errors import KVError

MESSAGE_S = 20e-6  # that a message takes
TOLD_TO_FAIL = "the scenario has told it to fail"


class _Channels:
    """As a `Waiter`, for one that never waits."""

    def __init__(self) -> None:
        self.channels: list[Channel] = []

    def add(self, channel: Channel) -> None:
        self.channels.append(channel)

    def remove(self, channel: Channel) -> None:
        self.channels.remove(channel)

    def wake(self) -> None:
        pass

    def wait(self) -> list[Channel]:
        return [channel for channel in self.channels if self._ready(channel)]

    @staticmethod
    def _ready(channel: Channel) -> bool:
        try:
            return channel.flush() and channel.ready()
        except ChannelClosed:
            return True


class SteppedLoop(ComputeLoop):
    """The loop of an attention server, a turn at a time; what it is asked for it does at once."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._waiter.close()
        self._waiter: Any = _Channels()

    def _do(self, job: Callable[[], None]) -> None:
        job()

    def turn(self) -> None:
        """Serve one message of each channel that has one."""
        for channel in self._waiter.wait():
            if channel in self._sessions:
                self._serve(channel)

    @property
    def waiting(self) -> bool:
        """Whether a channel has a message, or has ended."""
        return bool(self._waiter.wait())


def _fail_once(worker: Any, when: str) -> None:
    real = {"handle": worker.handle, "settle": worker.settle}
    name = "settle" if when == "settle" else "handle"

    def fails(*arguments: Any) -> Any:
        if when == "settle" and worker.unsettled is None:
            return None
        vars(worker).pop(name)
        if when == "after":
            real[name](*arguments)
        raise KVError(TOLD_TO_FAIL)

    vars(worker)[name] = fails


class AttentionHost:
    """The machine of one attention worker: `start` a process on it, `kill` it. `server` is that of the last process."""

    def __init__(
        self,
        number: int,
        time: Time,
        line: Line,
        kv_memory: int,
        lease: float,
        failed: Callable[[Any, Exception], None],
        old: bool = False,
    ) -> None:
        self.number = number
        self.old = old  # of the previous version
        self.line = line
        self.up = False  # whether the machine is there
        self.slow = (1.0, 0.0)  # factor, until when
        self.starts = 0
        self.process: Process
        self.server: AttentionServer
        self._time = time
        self._failed = failed
        self._config = ServerConfig(f"attention-{number}", kv_memory, local_channel=False, lease=lease)
        self._turns = 0  # the turn that is due, if any

    @property
    def alive(self) -> bool:
        return self.up and self.process.alive

    @property
    def loop(self) -> SteppedLoop:
        loop: SteppedLoop = self.server._leases.loop  # type: ignore[assignment]  # it was made with it
        return loop

    @property
    def workers(self) -> list[AttentionWorker]:
        """Those of all seats."""
        seats = self.server._leases._seats.values() if self.alive else ()
        return [seat.worker for seat in seats if seat.worker is not None]

    def start(self) -> None:
        """A process starts, and serves."""
        self.starts += 1
        self.up = True
        self.process = Process(self._time, f"attention-{self.number}.{self.starts}", self._failed)
        self.server = AttentionServer(self._config, self.process.monotonic, SteppedLoop)
        self._due = False
        self._busy_until = 0.0
        self._time.after(0.0, self._tend, self.process)

    def kill(self, silent: bool) -> None:
        """The process is gone; where that is `silent`, its machine too, and nobody is told."""
        self.process.kill()
        self.up = not silent
        for connection in self.line.connections:
            if connection.worker.owner is self.process and not silent:
                connection.worker.died()

    def connect(self, engine: Process, session: str) -> Connection:
        """A data channel to a session."""
        process = self.process
        connection = Connection(self.line, self._time, engine, process, lambda: self._arrived(process))
        connection.engine.opens(self._attach, connection, session)
        return connection

    def _attach(self, connection: Connection, session: str) -> None:
        if not self.alive or connection.worker.owner is not self.process:
            if self.up:
                connection.worker.died()
            return
        try:
            self.server.attach(session, connection.worker)  # type: ignore[arg-type]  # it has what a channel needs
        except LaminaError:
            connection.worker.close()
        self._arrived(self.process)

    def call(self, name: str, data: bytes, remaining: float) -> bytes:
        """A call of the service."""
        server = self.server
        if name == "hello":
            welcome = server.hello(control.unpack(control.Hello, data), remaining)
            return control.pack(replace(welcome, features=()) if self.old else welcome)
        if name == "heartbeat":
            return control.pack(server.heartbeat(control.unpack(control.Heartbeat, data)))
        answer = control.pack(server.goodbye(control.unpack(control.Goodbye, data)))
        self._part()
        return answer

    def fail_once(self, when: str) -> None:
        """Have its workers fail: before or after they handle the next message, or as they store what the last left."""
        for worker in self.workers:
            _fail_once(worker, when)

    # What goes on by itself.

    def _arrived(self, process: Process) -> None:
        if process is self.process and process.alive and not self._due:
            self._due = True
            factor, until = self.slow
            now = self._time.now
            begins = max(now, self._busy_until, process.frozen_until)
            self._busy_until = begins + MESSAGE_S * (factor if now < until else 1.0)
            self._time.at(self._busy_until, self._turn, process)

    def _turn(self, process: Process) -> None:
        if not process.alive or process is not self.process:
            return
        if self._time.now < process.frozen_until:
            self._time.at(process.frozen_until, self._turn, process)
            return
        self._due = False
        self.loop.turn()
        self._part()
        if self.loop.waiting:
            self._arrived(process)

    def _tend(self, process: Process) -> None:
        """The thread of the leases."""
        if not process.alive or process is not self.process:
            return
        if self._time.now < process.frozen_until:
            self._time.at(process.frozen_until, self._tend, process)
            return
        pause = self.server._leases.tend()
        self._part()
        self._time.after(pause, self._tend, process)

    def _part(self) -> None:
        """Close the channels of sessions that have ended."""
        over = self.server._over
        while not over.empty():
            session = over.get()
            if session is not None:
                with contextlib.suppress(LaminaError):
                    self.server._part(session)
