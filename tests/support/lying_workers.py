"""An attention worker that lies: a real one, whose answers are bent as a test decides, over real sockets and gRPC."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import Channel
from lamina_protocols.channels.grpc_client import GrpcChannel
from lamina_protocols.channels.sockets import SocketChannel
from lamina_protocols.messages.layers import HolderConfig
from lamina_workers.attention_server.attention_server import AttentionServer, ServerConfig
from lamina_workers.ports.data_channel import ChannelOptions
from lamina_workers.ports.remote import RemoteAttention, connect

Bend = Callable[[bytes], bytes | None]


class BentChannel:
    """A channel whose posted frames are replaced by what `bend` makes of them; None: sent as they are."""

    def __init__(self, channel: Channel, bend: Bend) -> None:
        self._channel = channel
        self._bend = bend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def post(self, buffers: Sequence[bytes | memoryview]) -> None:
        frame = b"".join(buffers)
        bent = self._bend(frame)
        if bent is None:
            self._channel.post([frame])
        elif isinstance(self._channel, SocketChannel):
            self._channel._unsent.append(memoryview(bent))
            self._channel.flush()
        elif isinstance(self._channel, GrpcChannel):
            for at in range(0, len(bent), 1 << 20):
                self._channel._out.put(bent[at : at + (1 << 20)])


class LyingServer(AttentionServer):
    """`bend` gets each answer over the data channel, `says` the answers of the handshake and to heartbeats."""

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config)
        self.bend: Bend = lambda frame: None
        self.says: Callable[[Any], Any] = lambda message: message
        attach = self._leases.attach

        def bent(session: Any, channel: Channel, kind: str) -> None:
            attach(session, BentChannel(channel, lambda frame: self.bend(frame)), kind)  # type: ignore[arg-type]

        self._leases.attach = bent  # type: ignore[method-assign]

    def hello(self, hello: control.Hello, remaining: float) -> control.Welcome:
        welcome: control.Welcome = self.says(super().hello(hello, remaining))
        return welcome

    def heartbeat(self, heartbeat: control.Heartbeat) -> control.Alive:
        alive: control.Alive = self.says(super().heartbeat(heartbeat))
        return alive


def server_of(holder: HolderConfig, name: str, kind: type[AttentionServer] = AttentionServer) -> tuple[Any, str]:
    """A worker with room for that holder, and its address."""
    server = kind(ServerConfig(name=name, kv_memory=holder.kv_memory))
    return server, server.start()


def port_to(address: str, name: str, holder: HolderConfig, **options: Any) -> RemoteAttention:
    channel = ChannelOptions(**{"timeout": 10.0, **options})
    return connect(address, name, holder, "float32", "m", channel=channel)


class Farm(contextlib.ExitStack):
    """Makes the ports of a rig: each to a worker of its own, over a real channel."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = options
        self.ports: list[RemoteAttention] = []

    def __call__(self, worker: Any) -> RemoteAttention:
        name = f"worker-{len(self.ports) + 1}"
        server, address = server_of(worker.config, name)
        self.callback(server.stop, 0)
        self.ports.append(port_to(address, name, worker.config, **self._options))
        self.callback(self.ports[-1].close)
        return self.ports[-1]
