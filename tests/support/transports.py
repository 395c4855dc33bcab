"""Pairs of channels over every transport, for the tests: what one end sends, the other receives."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import Channel, Credentials, client_context, server_context
from lamina_protocols.channels.grpc_client import GrpcChannel, WorkerClient
from lamina_protocols.channels.grpc_server import TokenInterceptor, handlers, health_handlers, server_credentials
from lamina_protocols.channels.grpc_server import server_options as options
from lamina_protocols.channels.sockets import Listener, connect_tcp, connect_unix, listen_tcp, listen_unix
from lamina_workers.process.credentials import create_credentials

TRANSPORTS = ("local", "tcp", "tcp+tls", "grpc", "grpc+tls", "tcp+sum", "grpc+sum")
SECRET = bytes(range(32))


@functools.cache
def made_credentials() -> Credentials:
    return create_credentials(["127.0.0.1", "localhost"])


class OneStream:
    """The least service: it takes the channel of any stream."""

    def __init__(self) -> None:
        self.channels: queue.SimpleQueue[GrpcChannel] = queue.SimpleQueue()

    def hello(self, hello: control.Hello, remaining: float) -> control.Welcome:
        return control.Welcome("one", 1, 1, 30.0, 1 << 20, None, None, False, "")

    def heartbeat(self, heartbeat: control.Heartbeat) -> control.Alive:
        return control.Alive("serving")

    def goodbye(self, goodbye: control.Goodbye) -> control.Alive:
        return control.Alive("ended")

    def status(self) -> control.WorkerStatus:
        raise RuntimeError("a secret of the server")

    serving = True

    def attach(self, session: str, channel: GrpcChannel) -> None:
        self.channels.put(channel)


@contextlib.contextmanager
def serving(
    service: OneStream, credentials: Credentials | None, token: str = "", max_message: int = 1 << 20, threads: int = 4
):
    """The address of a gRPC server with that service; with credentials it speaks TLS."""
    server = grpc.server(
        ThreadPoolExecutor(threads),
        interceptors=[TokenInterceptor(token)] if token else [],
        options=options(max_message),
    )
    server.add_generic_rpc_handlers((handlers(service, max_message, 1 << 28), health_handlers(service)))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", server_credentials(lambda: credentials, False))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0.5).wait()


@contextlib.contextmanager
def pair(transport: str, max_frame: int = 1 << 28) -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a fresh channel, the client's first."""
    kind, _, way = transport.partition("+")
    made, checksummed = made_credentials() if way == "tls" else None, way == "sum"
    with contextlib.ExitStack() as stack:
        if kind == "grpc":
            service = OneStream()
            address = stack.enter_context(serving(service, made))
            client = stack.enter_context(WorkerClient(address, Credentials(ca=made.ca) if made else None, 1 << 20))
            near: Channel = client.stream("s" * 32, max_frame, checksummed)
            far: Channel = service.channels.get(timeout=10)
        else:
            arrived: queue.SimpleQueue[Channel] = queue.SimpleQueue()
            if kind == "local":
                path = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "s")
                sock = listen_unix(path)
            else:
                sock = listen_tcp("127.0.0.1", 0)
            context = server_context(made, False) if made else None
            listener = Listener(sock, SECRET.__eq__, lambda channel, _: arrived.put(channel), context, max_frame)
            stack.callback(listener.close)
            if kind == "local":
                near = connect_unix(path, SECRET, 10, max_frame)
            else:
                context = client_context(Credentials(ca=made.ca)) if made else None
                near = connect_tcp("127.0.0.1", listener.port, SECRET, 10, context, max_frame, checksummed)
            far = arrived.get(timeout=10)
        stack.callback(far.close)
        stack.callback(near.close)
        yield near, far
