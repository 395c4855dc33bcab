"""The network between the engine's machine and the attention workers: connections, calls, and what goes wrong.

A connection is a stream: frames come whole and in order, or it breaks. A cut delays what is sent until it is over, as
TCP does, and tells nobody. Each line has the two ways between the engine and one worker's machine.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

from virtual_time import Process, Time, Wake

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import ChannelClosed, check_size, checksum, verified
from lamina_protocols.channels.grpc_client import Busy, WorkerBusy, WorkerRefused, WorkerUnreachable
from lamina_protocols.errors import LaminaError, ProtocolError
from lamina_protocols.frames import codec
from lamina_protocols.messages.messages import answered

Direction = Literal["to worker", "to engine"]
WINDOW = 1 << 16  # bytes under way on a connection that nobody has read, above which a sender waits
MAX_FRAME = 1 << 24
SYN_S = 0.2  # between two attempts to reach a machine that does not answer


class Line:
    """Both ways between the engine's machine and a worker's."""

    def __init__(self, time: Time, rng: random.Random, latency: float) -> None:
        self._time = time
        self._rng = rng
        self._latency = latency
        self._cut: dict[str, float] = {"to worker": 0.0, "to engine": 0.0}  # until when
        self._extra = (0.0, 0.0)  # seconds more, until when
        self.flips: list[tuple[str, int]] = []  # of the next frames that go one way, the bit
        self.losses = 0  # of the next messages to the worker that have no answer
        self.connections: list[Connection] = []
        self.frames = 0

    def cut(self, way: str, until: float) -> None:
        for each in self._cut:
            if way in (each, "both"):
                self._cut[each] = max(self._cut[each], until)

    def delay(self, extra: float, until: float) -> None:
        self._extra = extra, until

    def heal(self) -> None:
        """Everything gets through from now on."""
        self._cut = dict.fromkeys(self._cut, self._time.now)
        self._extra = 0.0, 0.0
        self.flips.clear()
        self.losses = 0

    def arrival(self, way: Direction) -> float:
        """When what is sent now arrives."""
        now = self._time.now
        extra, until = self._extra
        seconds = self._latency * (0.5 + self._rng.random()) + (extra if now < until else 0.0)
        cut = self._cut[way]
        if now < cut:  # TCP waits twice as long each time before it sends again: others may overtake it after the cut
            seconds += self._rng.random() * (cut - now)
        return max(now, cut) + seconds

    def luck(self) -> bool:
        """Whether a call that came too late is handled all the same."""
        return self._rng.random() < 0.5


class Connection:
    """Two ends, of the engine and of a worker."""

    def __init__(self, line: Line, time: Time, engine: Process, worker: Process, arrived: Callable[[], None]) -> None:
        self.engine = End(line, time, engine, "to worker", lambda: None)
        self.worker = End(line, time, worker, "to engine", arrived)
        self.engine.other, self.worker.other = self.worker, self.engine
        line.connections = [each for each in line.connections if not each.over]
        line.connections.append(self)

    @property
    def over(self) -> bool:
        """Whether both sides know that it is."""
        return all(end.closed or end.ended for end in (self.engine, self.worker))

    def reset(self) -> None:
        """It breaks, with what is under way."""
        for end in (self.engine, self.worker):
            end.broken("connection reset")


class End:
    """A `Channel`: one end of a connection. `arrived` is called when it may be read, or written again."""

    other: End

    def __init__(self, line: Line, time: Time, owner: Process, way: Direction, arrived: Callable[[], None]) -> None:
        self.bytes_sent = self.bytes_received = 0
        self.closed = ""  # on this side: why
        self.ended = ""  # by the other side, or the network: why
        self.owner = owner
        self._line = line
        self._time = time
        self._way = way
        self._arrived = arrived
        self._wake = Wake(owner)
        self._watcher: Callable[[], None] = lambda: None
        self._frames: deque[bytearray | ProtocolError] = deque()
        self._unreadable = ""
        self._unread = 0  # bytes that were sent here, and not read by the other side
        self._last = 0.0  # when the last frame arrives

    # As a `Channel`.

    def send(self, buffers: Sequence[bytes | memoryview], timeout: float | None = None) -> None:
        self.owner.check()
        self._check()
        end = None if timeout is None else self._time.now + timeout
        while self._unread > WINDOW:
            left = None if end is None else end - self._time.now
            if left is not None and left <= 0:
                raise TimeoutError(f"a frame was not read within {timeout} seconds")
            self._wake.wait(left)
            self._check()
        self._transmit(buffers)

    def post(self, buffers: Sequence[bytes | memoryview]) -> None:
        self._check()
        self._transmit(buffers)

    def flush(self) -> bool:
        self._check()
        return self._unread <= WINDOW

    def receive(self, timeout: float | None = None) -> memoryview:
        self.owner.check()
        end = None if timeout is None else self._time.now + timeout
        while not self._frames:
            self._check()
            left = None if end is None else end - self._time.now
            if left is not None and left <= 0:
                raise TimeoutError(f"no frame within {timeout} seconds")
            self._wake.wait(left)
        frame = self._frames.popleft()
        if isinstance(frame, ProtocolError):
            self._unreadable = str(frame)
            self._frames.clear()
            raise frame
        self.bytes_received += len(frame)
        self.other.was_read(len(frame))
        return memoryview(frame)

    def ready(self) -> bool:
        return bool(self._frames or self.closed or self.ended or self._unreadable)

    def watch(self, wake: Callable[[], None]) -> int | None:
        self._watcher = wake
        return None

    def unseen(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self.closed = "closed on this side"
            self._frames.clear()
            self._wake.notify()
            self._part()

    # Below the interface.

    def opens(self, do: Callable[..., None], *arguments: Any) -> None:
        """Call `do` at the other side, before any frame arrives there."""
        self._last = self._line.arrival(self._way)
        self._time.at(self._last, do, *arguments)

    def _check(self) -> None:
        if why := self.closed or self._unreadable or (self.ended if not self._frames else ""):
            raise ChannelClosed(why)

    def _part(self) -> None:
        """Let the other side know that this one reads and sends no more."""
        self._last = max(self._line.arrival(self._way), self._last)
        self._time.at(self._last, self.other.broken, "closed by the other side")

    def died(self) -> None:
        """The process of this end is gone, its machine is not."""
        if not self.closed:
            self.closed = "its process is gone"
            self._part()

    def broken(self, why: str) -> None:
        """Nothing comes any more."""
        if not self.ended:
            self.ended = why
            self._news()

    def was_read(self, size: int) -> None:
        self._unread -= size
        if self._unread <= WINDOW < self._unread + size:
            self._news()

    def _news(self) -> None:
        self._wake.notify()
        self._watcher()
        self._arrived()

    def _transmit(self, buffers: Sequence[bytes | memoryview]) -> None:
        if not self.owner.alive:
            return
        size = check_size(buffers, MAX_FRAME)
        frame: bytearray | ProtocolError = bytearray().join(buffers)
        line = self._line
        if line.losses and self._way == "to worker" and not answered(codec.decode(memoryview(frame))):  # type: ignore[arg-type]
            line.losses -= 1
            return
        line.frames += 1
        self.bytes_sent += size
        self._unread += size
        for number, (way, bit) in enumerate(line.flips):
            if way in (self._way, "both") and size:
                del line.flips[number]
                frame = _flipped(frame, bit)  # type: ignore[arg-type]  # it is one frame only once
                break
        self._last = max(line.arrival(self._way), self._last)
        self._time.at(self._last, self.other.arrives, frame)

    def arrives(self, frame: bytearray | ProtocolError) -> None:
        """A frame is here."""
        if self.closed or self.ended or not self.owner.alive:
            # What is sent to a process that is gone is answered by its machine, if that is there.
            if self.closed:
                self._time.at(self._line.arrival(self._way), self.other.broken, "connection reset")
            return
        self._frames.append(frame)
        self._news()


def _flipped(frame: bytearray, bit: int) -> ProtocolError:
    """What a receiver finds in a frame with one bit flipped, behind which its checksum stands."""
    sent = frame + checksum([frame])
    bit %= 8 * len(sent)
    sent[bit // 8] ^= 1 << bit % 8
    try:
        verified(memoryview(sent), len(frame))
    except ProtocolError as error:
        return error
    raise RuntimeError("a flipped bit was not noticed")


class Client:
    """A `WorkerClient` whose calls go over a line. `call(name, data, remaining)` is made at the worker."""

    def __init__(self, address: str, line: Line, time: Time, owner: Process, worker: Callable[[], Any]) -> None:
        self.address = address
        self.line = line
        self._time = time
        self._owner = owner
        self.worker = worker  # the process that is there now, if any
        self._waiting: set[_Call] = set()
        self._closed = False

    def hello(self, hello: control.Hello, timeout: float) -> control.Welcome:
        return control.unpack(control.Welcome, self._call("hello", hello, timeout))

    def heartbeat(self, session: str, timeout: float) -> control.Alive:
        return control.unpack(control.Alive, self._call("heartbeat", control.Heartbeat(session), timeout))

    def goodbye(self, goodbye: control.Goodbye, timeout: float) -> control.Alive:
        return control.unpack(control.Alive, self._call("goodbye", goodbye, timeout))

    def close(self) -> None:
        self._closed = True
        for call in list(self._waiting):
            call.answer(WorkerUnreachable(f"{call.name} at {self.address}: closed on this side"))

    def _call(self, name: str, message: Any, timeout: float) -> bytes:
        self._owner.check()
        if self._closed:
            raise WorkerUnreachable(f"{name} at {self.address}: closed on this side")
        call = _Call(name, self._owner)
        self._waiting.add(call)
        deadline = self._time.now + timeout
        self._time.at(self.line.arrival("to worker"), self._arrives, call, control.pack(message), deadline)
        call.answered.wait(timeout)
        self._waiting.discard(call)
        if isinstance(call.result, LaminaError):
            raise call.result
        if call.result is None:
            raise WorkerUnreachable(f"{name} at {self.address}: no answer within {timeout:g} seconds")
        return call.result

    def _arrives(self, call: _Call, data: bytes, deadline: float) -> None:
        """At the worker's machine."""
        worker = self.worker()
        if worker is None:  # the machine is gone: it is tried again
            if self._time.now < deadline:
                self._time.after(SYN_S, self._arrives, call, data, deadline)
            return
        if not worker.process.alive:
            self._back(call, WorkerUnreachable(f"{call.name} at {self.address}: connection refused"))
            return
        if self._time.now < worker.process.frozen_until:
            self._time.at(worker.process.frozen_until, self._arrives, call, data, deadline)
            return
        remaining = deadline - self._time.now
        if remaining <= 0 and not self.line.luck():
            return
        try:
            self._back(call, worker.call(call.name, data, max(0.0, remaining)))
        except Busy as error:
            self._back(call, WorkerBusy(f"{call.name} at {self.address}: {error}"))
        except LaminaError as error:
            self._back(call, WorkerRefused(f"{call.name} at {self.address}: {error}"))

    def _back(self, call: _Call, result: bytes | LaminaError) -> None:
        self._time.at(self.line.arrival("to engine"), call.answer, result)


class _Call:
    def __init__(self, name: str, owner: Process) -> None:
        self.name = name
        self.answered = Wake(owner)
        self.result: bytes | LaminaError | None = None

    def answer(self, result: bytes | LaminaError) -> None:
        if self.result is None:
            self.result = result
            self.answered.set()
