#!/usr/bin/env python3
"""What an exchange with another process costs: bare echoes, frames and messages over each channel, the codec.

    python scripts/bench/transport.py [--exchanges 600]

Two processes on this host. The bare echo has no frames; "frames" sends the same bytes through a channel; "messages"
makes them of a `Query` on one side, and an `Attended` of the same size on the other, with the codec at all four ends.
They are measured in turns, so that other work of the machine falls on all.
"""

from __future__ import annotations

import argparse
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lamina.system.machine import this_machine
from lamina_protocols.channels import control
from lamina_protocols.channels.channels import Channel, ChannelClosed
from lamina_protocols.channels.grpc_client import GrpcChannel, WorkerClient
from lamina_protocols.channels.grpc_core import grpc
from lamina_protocols.channels.grpc_server import handlers, server_options
from lamina_protocols.channels.sockets import Listener, connect_tcp, connect_unix, listen_tcp, listen_unix
from lamina_protocols.frames import codec
from lamina_protocols.frames.frames import Prefix, pack_prefix, read_prefix
from lamina_protocols.messages.messages import Attended, Fresh, Query

SIZES = (1 << 10, 16 << 10, 256 << 10)
SECRET = bytes(32)
WIDTH = 64  # float32 numbers in a row of q
MESSAGE = 4 << 20
ROUNDS = 12
TAG = read_prefix(codec.encode(Query(0, 0, 0, torch.zeros(1, 1)))[0]).tag

Exchange = Callable[[], object]


# The other process.


def echo_messages(channel: Channel) -> None:
    """Answer each query with its own numbers, as a worker would that computes nothing, and any other frame as it is."""
    try:
        while True:
            frame = channel.receive()
            if read_prefix(frame).tag != TAG:
                channel.send([frame])
                continue
            query = codec.decode(frame)
            channel.send(codec.encode(Attended(query.epoch, query.batch, query.layer, query.q, query.q[:, 0])))
    except ChannelClosed:
        channel.close()


def echo_bytes(sock: socket.socket, size: int) -> None:
    buffer = memoryview(bytearray(size))
    while receive_all(sock, buffer):
        sock.sendall(buffer)


def receive_all(sock: socket.socket, buffer: memoryview) -> bool:
    done = 0
    while done < len(buffer):
        count = sock.recv_into(buffer[done:])
        if not count:
            return False
        done += count
    return True


class EchoService:
    """Gives every stream to a thread of its own, as the server gives it to the thread that computes."""

    def attach(self, session: str, channel: GrpcChannel) -> None:
        threading.Thread(target=echo_messages, args=(channel,), daemon=True).start()

    def hello(self, hello: control.Hello, remaining: float) -> control.Welcome:
        raise NotImplementedError

    def heartbeat(self, heartbeat: control.Heartbeat) -> control.Alive:
        raise NotImplementedError

    def status(self) -> control.WorkerStatus:
        raise NotImplementedError

    def drain(self) -> control.WorkerStatus:
        raise NotImplementedError


def same(data: bytes) -> bytes:
    return data


def echo_stream(incoming: Iterator[bytes], _: object) -> Iterator[bytes]:
    yield from incoming


def serve(folder: Path) -> None:
    """Serve every kind of echo until stdin closes; the first line out is the ports."""

    def serve_bare(sock: socket.socket) -> None:
        while True:
            accepted, _ = sock.accept()
            if accepted.family != socket.AF_UNIX:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            size = int.from_bytes(accepted.recv(8), "little")
            threading.Thread(target=echo_bytes, args=(accepted, size), daemon=True).start()

    def deliver(channel: Channel, _: bytes) -> None:
        threading.Thread(target=echo_messages, args=(channel,), daemon=True).start()

    bare_unix, bare_tcp = listen_unix(str(folder / "bare")), listen_tcp("127.0.0.1", 0)
    for sock in (bare_unix, bare_tcp):
        threading.Thread(target=serve_bare, args=(sock,), daemon=True).start()
    Listener(listen_unix(str(folder / "ours")), SECRET.__eq__, deliver)
    tcp = Listener(listen_tcp("127.0.0.1", 0), SECRET.__eq__, deliver)
    server = grpc.server(ThreadPoolExecutor(8), options=server_options(MESSAGE))
    bare = {"Echo": grpc.stream_stream_rpc_method_handler(echo_stream, same, same)}
    server.add_generic_rpc_handlers(
        (handlers(EchoService(), MESSAGE, 1 << 28), grpc.method_handlers_generic_handler("bare", bare))
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(bare_tcp.getsockname()[1], tcp.port, port, flush=True)
    sys.stdin.read()
    os._exit(0)


# This process.


def frames_over(channel: Channel, size: int) -> Exchange:
    frame = [pack_prefix(Prefix(0, 0, size)), bytes(size)]

    def exchange() -> object:
        channel.send(frame)
        return channel.receive(10)

    return exchange


def messages_over(channel: Channel, size: int) -> Exchange:
    query = Query(1, 1, 1, torch.randn(size // WIDTH // 4, WIDTH))

    def exchange() -> object:
        channel.send(codec.encode(query))
        return codec.decode(channel.receive(10))

    return exchange


def bytes_over(sock: socket.socket, size: int) -> Exchange:
    data, back = bytes(size), memoryview(bytearray(size))
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(size.to_bytes(8, "little"))

    def exchange() -> object:
        sock.sendall(data)
        return receive_all(sock, back)

    return exchange


def bytes_over_stream(channel: grpc.Channel, size: int) -> Exchange:
    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    replies = channel.stream_stream("/bare/Echo", same, same)(iter(outgoing.get, None))
    data = bytes(size)

    def exchange() -> object:
        outgoing.put(data)
        return next(replies)

    return exchange


def medians(calls: dict[str, Exchange], count: int) -> dict[str, float]:
    """Microseconds of each, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            for _ in range(count // ROUNDS):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) * 1e6 for name, taken in times.items()}


def exchanges(folder: Path, count: int) -> None:
    child = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if child.stdin is None or child.stdout is None:
        raise RuntimeError("a child without pipes")
    bare_tcp, tcp, port = map(int, child.stdout.readline().split())
    client = WorkerClient(f"127.0.0.1:{port}")
    stream = grpc.insecure_channel(f"127.0.0.1:{port}", server_options(MESSAGE))
    print("microseconds: bare, frames (of bare), messages (of bare) | Unix | TCP | gRPC stream")
    for size in SIZES:
        unix = socket.socket(socket.AF_UNIX)
        unix.connect(str(folder / "bare"))
        local = connect_unix(str(folder / "ours"), SECRET, 5)
        over_tcp = connect_tcp("127.0.0.1", tcp, SECRET, 5)
        over_grpc = client.stream("session", 1 << 28)
        kinds = {
            "Unix": (bytes_over(unix, size), frames_over(local, size), messages_over(local, size)),
            "TCP": (
                bytes_over(socket.create_connection(("127.0.0.1", bare_tcp)), size),
                frames_over(over_tcp, size),
                messages_over(over_tcp, size),
            ),
            "gRPC": (bytes_over_stream(stream, size), frames_over(over_grpc, size), messages_over(over_grpc, size)),
        }
        taken = medians({f"{kind} {i}": call for kind, calls in kinds.items() for i, call in enumerate(calls)}, count)
        columns = []
        for kind in kinds:
            bare, frames, whole = (taken[f"{kind} {i}"] for i in range(3))
            columns.append(f"{bare:.0f}, {frames:.0f} ({frames / bare:.2f}), {whole:.0f} ({whole / bare:.2f})")
        print(f"{size >> 10} KB | " + " | ".join(columns), flush=True)
    child.stdin.close()
    child.wait()


def code(messages: list[Query | Fresh | Attended]) -> tuple[float, float]:
    """Microseconds to encode messages to lists of buffers, and to decode them from one buffer each."""
    frames = [bytearray(b"".join(codec.encode(message))) for message in messages]
    taken = medians(
        {
            "encode": lambda: [codec.encode(message) for message in messages],
            "decode": lambda: [codec.decode(frame) for frame in frames],
        },
        3000,
    )
    return taken["encode"], taken["decode"]


def codecs() -> None:
    batch, kv_heads, group, d = 64, 8, 4, 128
    q, k = (torch.randn(batch * n, d).bfloat16() for n in (kv_heads * group, kv_heads))
    layer = [Query(1, 1, 1, q), Fresh(1, 1, 1, k, k), Attended(1, 1, 1, q, q[:, 0].float())]
    encode, decode = code(layer)
    print("codec, a layer's Query, Fresh and Attended (batch 64, 8 KV heads, group 4, d 128, bfloat16): ", end="")
    print(f"encode {encode:.1f} us, decode {decode:.1f} us, together {encode + decode:.1f}")
    big = Query(1, 1, 1, torch.randn(16 << 20, 4))
    frame, source, target = bytearray(big.q.nbytes + 128), bytearray(big.q.nbytes), bytearray(big.q.nbytes)

    view = memoryview(frame)

    def through() -> object:
        position = 0
        for part in codec.encode(big):
            view[position : position + len(part)] = part
            position += len(part)
        return codec.decode(view[:position])

    def copy() -> None:
        target[:] = source

    taken = medians({"codec": through, "memcpy": copy}, 30)
    print(f"256 MiB through the codec and one copy: {taken['memcpy'] / taken['codec']:.2f} of memcpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exchanges", type=int, default=600, help="of each kind and size")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.serve is not None:
        serve(args.serve)
        return
    machine = this_machine()
    print(f"{machine.processor}, {machine.cores} cores, grpcio {grpc.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        exchanges(Path(folder), args.exchanges)
    codecs()


if __name__ == "__main__":
    main()
