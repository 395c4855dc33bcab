"""Both ends of a layer's exchange without a server around them: a port over any channel, whose other end is a scripted
peer, or the loop of a real attention worker. And the switch between compiled code and Python."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attention_servers
import pytest
import torch
from dense_holders import Holder
from transports import pair

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import Channel, ChannelClosed
from lamina_protocols.channels.sockets import SocketChannel
from lamina_protocols.channels.versions import FEATURES
from lamina_protocols.frames import codec
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Reply
from lamina_workers.attention_server.loop import ComputeLoop
from lamina_workers.attention_server.session import EngineSeat, Session
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.ports import direct
from lamina_workers.ports.port import LocalAttention
from lamina_workers.ports.remote import RemoteAttention

EXCHANGES = ("compiled", "python")
SMALL = 4096  # bytes of a socket's buffers that are small


@contextlib.contextmanager
def exchanged(way: str) -> Iterator[None]:
    """In this process layers are exchanged by compiled code, or by Python, meanwhile."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(direct.SWITCH, way)
            direct.enabled.cache_clear()
            yield
    finally:
        direct.enabled.cache_clear()


def sockets(transport: str = "unix", small: bool = False) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, "unix" or "tcp", with little room in their buffers where they are `small`."""
    if transport == "unix":
        ends = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            near = socket.socket()
            if small:
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    near.setsockopt(socket.SOL_SOCKET, option, SMALL)
                    listening.setsockopt(socket.SOL_SOCKET, option, SMALL)
            near.connect(listening.getsockname())
            ends = near, listening.accept()[0]
        for end in ends:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for end in ends:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF) if small else ():
            end.setsockopt(socket.SOL_SOCKET, option, SMALL)
    return ends


class Client:
    """A control channel that always answers, and says what the test decides."""

    address = "nowhere:1"

    def __init__(self) -> None:
        self.state = "serving"

    def heartbeat(self, session: str, timeout: float) -> control.Alive:
        return control.Alive(self.state)

    def goodbye(self, goodbye: control.Goodbye, timeout: float) -> None:
        pass

    def close(self) -> None:
        pass


def hello(config: HolderConfig, seat: int = 0) -> control.Hello:
    """What asks for a seat of such KV."""
    kept = {"kv_dtype": config.dtype, "page_size": config.page_size, "layers": config.layers}
    return attention_servers.hello(session=secrets.token_hex(16), data_channel="tcp", seat=seat, **kept)


def port_over(
    channel: Channel, config: HolderConfig, name: str = "b", page_layout: str = "", lease: float = 30.0
) -> RemoteAttention:
    """A port to whoever has the other end of a channel. Its heartbeats come six times a lease."""
    welcome = control.Welcome(name, 0, 1, lease, 1 << 28, None, None, False, page_layout, features=tuple(FEATURES))
    return RemoteAttention(name, Client(), hello(config), welcome, channel, "local", 10.0)  # type: ignore[arg-type]


class Peer(threading.Thread):
    """Answers over a channel as a dense holder does, but for what `bend` makes of each answer: bytes to send, None for
    the end of the stream, numbers for pauses in seconds."""

    def __init__(self, end: socket.socket, holder: Holder, bend: Callable[[Reply], Sequence[Any]]) -> None:
        super().__init__(daemon=True)
        self._end = end
        self._channel = SocketChannel(end, False)
        self._holder = holder
        self._bend = bend
        self.start()

    def run(self) -> None:
        with contextlib.suppress(ChannelClosed, OSError):
            while True:
                self._holder.send(codec.decode(self._channel.receive()))  # type: ignore[arg-type]  # a request
                while self._holder.replies:
                    for piece in self._bend(self._holder.replies.popleft()):
                        self._do(piece)

    def _do(self, piece: Any) -> None:
        if piece is None:
            self._end.shutdown(socket.SHUT_WR)
        elif isinstance(piece, float):
            time.sleep(piece)
        else:
            self._channel.send([piece])

    def close(self) -> None:
        self._channel.close()
        self.join(10)


def frame(message: Any) -> bytes:
    """A message as it travels."""
    return b"".join(codec.encode(message))


class _Given(EngineSeat):
    """A seat with a worker that was made before."""

    def __init__(self, config: HolderConfig, worker: AttentionWorker | None, compute_dtype: str) -> None:
        asked = dataclasses.replace(hello(config), compute_dtype=compute_dtype)
        super().__init__(asked, config.kv_memory, time.monotonic)
        self._given = worker

    def build(self, threads: int, name: str, device: torch.device, layers: Any) -> None:
        if self._given is None:
            super().build(threads, name, device, layers)
            return
        self._layers, self._worker = layers, self._given
        self._port = LocalAttention(self._given, name)
        self.counters = self._given.counters


class Served:
    """An attention worker on a thread of its own, which serves any number of channels to one seat."""

    def __init__(
        self, config: HolderConfig, worker: AttentionWorker | None = None, compute_dtype: str = "float32"
    ) -> None:
        self.over: queue.SimpleQueue[tuple[Session, str]] = queue.SimpleQueue()
        self.failed: list[str] = []
        self._channels: list[Channel] = []
        self.loop = ComputeLoop(
            1, "w", torch.device("cpu"), self._over, lambda seat, why: self.failed.append(why), lambda seat: None
        )
        self.seat = _Given(config, worker, compute_dtype)
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()
        self.loop.build(self.seat)
        self.seat.built.result(30)

    def add(self, channel: Channel) -> Session:
        """Serve one channel more."""
        session = Session(secrets.token_hex(16), self.seat, b"", 30.0, time.monotonic)
        session.attach(channel, "local")
        self._channels.append(channel)
        self.seat.sessions[session.id] = session
        self.loop.serve(session)
        return session

    def _over(self, session: Session, why: str) -> None:
        session.ended = why
        self.seat.sessions.pop(session.id, None)
        if session.channel is not None:
            session.channel.close()
        self.over.put((session, why))

    def close(self) -> None:
        for session in list(self.seat.sessions.values()):
            self.loop.drop(session)
        self.loop.stop()
        self._thread.join(20)
        for channel in self._channels:
            channel.close()
        if self._thread.is_alive():
            raise RuntimeError("the worker's thread does not end")


@contextlib.contextmanager
def served(config: HolderConfig) -> Iterator[Served]:
    serving = Served(config)
    try:
        yield serving
    finally:
        serving.close()


@dataclasses.dataclass
class Joined:
    """One holder of a rig behind a channel."""

    port: RemoteAttention
    worker: AttentionWorker
    served: Served
    near: Channel
    far: Channel
    leaving: bool = False  # whether it was killed, or is let go
    ended: bool = False

    def kill(self) -> None:
        """The worker is gone, with all that it keeps."""
        self.far.close()


class Joints:
    """Makes the ports of an engine's rig: each worker behind a channel of a transport of `transports`."""

    def __init__(self, transport: str = "local", compute_dtype: str = "float32") -> None:
        self._transport = transport
        self._compute_dtype = compute_dtype
        self._stack = contextlib.ExitStack()
        self.made: list[Joined] = []

    def __call__(self, worker: AttentionWorker) -> RemoteAttention:
        near, far = self._stack.enter_context(pair(self._transport))
        serving = Served(worker.config, worker, self._compute_dtype)
        serving.add(far)
        port = port_over(near, worker.config, f"worker-{len(self.made) + 1}", worker.page_layout)
        self.made.append(Joined(port, worker, serving, near, far))
        return port

    def __enter__(self) -> Joints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every worker's thread."""
        for each in self.made:
            each.port.close()
            if not each.ended:
                each.served.close()
            each.ended = True
        self._stack.close()
