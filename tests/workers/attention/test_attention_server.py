"""An attention worker that others reach: what it answers over every channel, whom it refuses, when it lets go."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import signal
import socket
import stat
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import msgpack
import pytest
import torch
from attention_servers import (
    ASKED,
    FULL,
    KV_MEMORY,
    PAGES,
    WAYS,
    connected,
    hello,
    one_batch,
    open_port,
    process,
    running,
    until,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from transports import made_credentials

from lamina_protocols.channels import control, sockets
from lamina_protocols.channels.channels import ChannelClosed, Credentials
from lamina_protocols.channels.grpc_client import WorkerClient, WorkerRefused, WorkerUnreachable
from lamina_protocols.channels.sockets import SocketChannel, connect_tcp, connect_unix
from lamina_protocols.channels.versions import BOUND, FEATURES, PREVIOUS, PREVIOUS_RELEASE, PROTOCOL_VERSION
from lamina_protocols.frames import codec
from lamina_protocols.messages.layers import HolderConfig, Index, LayerSpec
from lamina_protocols.messages.messages import Announced, Announcement, Close, Fault, Open
from lamina_workers.attention_server import session
from lamina_workers.attention_server.attention_server import AttentionServer, ServerConfig, ServerError
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.errors import HolderLost
from lamina_workers.process.credentials import create_credentials, make_credentials


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_it_attends_over_every_channel(way, tls):
    made = made_credentials() if tls else Credentials()
    with running(credentials=made) as (_, address):
        near = Credentials(ca=made.ca, token=made.token)
        with connected(address, credentials=near, **WAYS[way]) as port:
            assert port.channel_kind == way.partition("+")[0]
            assert (port.capacity, port.worker_name, port.closed) == (KV_MEMORY, "w", False)
            one_batch(port)
            status = port.status()
            assert (status.session, status.channel, status.model) == (True, port.channel_kind, "tiny")
            assert (status.parts, status.heads, status.lo, status.hi) == (1, (0, 1), 0, 4)
            assert (status.free_pages, status.total_pages) == (PAGES - 4, PAGES)
            assert status.batches == 2
            until(lambda: port.status().queries == 6)
            until(lambda: port.status().bytes_in == port.bytes_sent)
            until(lambda: port.status().bytes_out == port.bytes_received)
        assert port.closed
        with pytest.raises(HolderLost):
            port.send(Announcement(1, 3, 1, (), ()))


# The handshake.


@pytest.mark.fault("F19")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": 99}, r"protocol version: the engine has 99, this worker \d+"),
        ({"compute_dtype": "float8"}, "compute dtype 'float8', this worker knows float32"),
        ({"kv_dtype": "float8"}, "KV dtype 'float8', allowed: float32"),
        ({"page_size": 7}, "cannot keep such KV"),
        ({"layers": ()}, "0 layers, allowed: 1 to"),
        ({"layers": (FULL,) * 5000}, "5000 layers, allowed: 1 to 4096"),
        (
            {"layers": tuple(dataclasses.replace(FULL, kv_layer=n, d_v=n + 1) for n in range(65))},
            "layers of 65 shapes, allowed: up to 64",
        ),
        ({"layers": (FULL, dataclasses.replace(FULL, d_k=32))}, "layer 1 reads the KV of layer 0; allowed"),
        ({"layers": (FULL, dataclasses.replace(FULL, kv_layer=1, kind="abacus"))}, "layer 1 is of kind 'abacus'"),
        ({"layers": (dataclasses.replace(FULL, decays=(-1.0,)),)}, "1 decays; allowed"),
        ({"layers": (dataclasses.replace(FULL, index=Index(16, 1, 16, 1 << 20)),)}, r"layer 0 with .*; allowed: up to"),
        (
            {"layers": (dataclasses.replace(FULL, window=9, index=Index(16, 1, 16, 2)),)},
            "layer 0 has an index and a window of 9; allowed",
        ),
        ({"layers": (dataclasses.replace(FULL, key_heads=1, conv=4),)}, "what only another kind has; allowed"),
        ({"layers": (dataclasses.replace(FULL, kind="mamba2", window=9),)}, "what only another kind has; allowed"),
        ({"session": "short"}, "session id of 5 characters"),
        ({"data_channel": "smoke"}, "'smoke', this worker knows grpc, tcp"),
        ({"layers": tuple(dataclasses.replace(FULL, kv_layer=n) for n in range(90))}, "the least is"),
    ],
)
def test_what_cannot_be_is_refused_and_the_worker_lives(changes, said):
    with running() as (_, address):
        with WorkerClient(address) as client, pytest.raises(WorkerRefused, match=said):
            client.hello(hello(**changes), 10)
        with connected(address) as port:
            one_batch(port)


def test_sides_of_this_version_share_all_features() -> None:
    with running() as (_, address), connected(address) as port:
        assert port.features == FEATURES


@pytest.mark.fault("F31")
def test_a_worker_answers_an_engine_of_the_previous_version_as_that_understands() -> None:
    with running() as (server, address), WorkerClient(address) as client:
        old = control.as_previous(hello(features=tuple(sorted(FEATURES))))
        assert (old.protocol, old.version) == (PREVIOUS, PREVIOUS_RELEASE)
        welcome = server.hello(control.unpack(control.Hello, control.pack(old)), 10)
        assert len(msgpack.unpackb(control.pack(welcome))) == 9
        client.goodbye(control.Goodbye(old.engine, old.seat, old.session), 5)


def test_a_worker_answers_an_engine_of_the_next_version_with_what_both_have() -> None:
    with running() as (server, _):
        said = hello(features=tuple(sorted(FEATURES)))
        fields = [PROTOCOL_VERSION + 1, *msgpack.unpackb(control.pack(said))[1:]]
        fields[-1] = [BOUND, "telepathy"]
        newer = control.unpack(control.Hello, msgpack.packb([*fields, 0, [], "a field of then"]))
        assert server.hello(newer, 10).features == (BOUND,)


@pytest.mark.fault("F20")
def test_tokens_and_certificates_of_others_are_refused_and_the_worker_lives():
    made = made_credentials()
    with running(credentials=made, mutual_tls=True) as (_, address):
        for credentials, kind, said in (
            (dataclasses.replace(made, token="wrong"), WorkerRefused, "the token is wrong"),
            (dataclasses.replace(made, token=""), WorkerRefused, "a token is needed"),
            (dataclasses.replace(made, ca=create_credentials(["127.0.0.1"]).ca), WorkerUnreachable, "Hello at"),
            (dataclasses.replace(made, cert=b"", key=b""), WorkerUnreachable, "Hello at"),
            (Credentials(token=made.token), WorkerUnreachable, "Hello at"),
        ):
            with pytest.raises(kind, match=said):
                open_port(address, **{**ASKED, "timeout": 3.0}, credentials=credentials)
        for way in WAYS.values():
            with connected(address, credentials=made, **way) as port:
                one_batch(port)


@pytest.mark.fault("F21")
def test_strangers_are_not_served():
    made = made_credentials()
    for changes in ({}, {"credentials": dataclasses.replace(made, token="")}, {"credentials": Credentials(token="t")}):
        with pytest.raises(ServerError, match=r"0.0.0.0:0 without (TLS|a token|TLS and a token) .*--insecure"):
            AttentionServer(ServerConfig("w", KV_MEMORY, listen="0.0.0.0:0", **changes))
    AttentionServer(ServerConfig("w", KV_MEMORY, listen="0.0.0.0:0", credentials=made))
    AttentionServer(ServerConfig("w", KV_MEMORY, listen="0.0.0.0:0", insecure=True))
    with pytest.raises(ServerError, match="mutual TLS needs a CA"):
        AttentionServer(ServerConfig("w", KV_MEMORY, mutual_tls=True))


@pytest.mark.fault("F28")
def test_an_address_in_use_is_said():
    with running() as (_, address), pytest.raises(ServerError, match=f"cannot listen on {address}"):
        AttentionServer(ServerConfig("w", KV_MEMORY, listen=address)).start()


# Sessions.


def test_one_session_at_a_time():
    with running() as (_, address):
        with (
            connected(address),
            pytest.raises(WorkerRefused, match=r"busy with engine [0-9a-f]{8}, served for \d+\.\d seconds"),
        ):
            open_port(address, **ASKED | {"timeout": 0.3})
        with connected(address) as port:
            one_batch(port)


@pytest.mark.fault("F13")
def test_kv_is_freed_when_the_stream_ends(monkeypatch):
    made = []
    real = session.attention_worker

    def recorded(*args):
        worker = real(*args)
        made.append(weakref.ref(worker))
        return worker

    monkeypatch.setattr(session, "attention_worker", recorded)
    with running() as (server, address):
        for way in WAYS.values():
            with connected(address, **way) as port:
                one_batch(port)
                assert made[-1]() is not None
            until(lambda: made[-1]() is None)
            assert server.status().total_pages == 0
        until(lambda: server.status().queries == 6 * len(WAYS))


@pytest.mark.fault("F13")
@pytest.mark.real
def test_the_lease_frees_a_vanished_engine_and_not_a_silent_one():
    with running(lease=0.6) as (server, address):
        with connected(address) as port:  # its heartbeats come every 0.1 s
            time.sleep(1.2)
            one_batch(port)
        with WorkerClient(address) as client:
            client.hello(hello(session="t" * 32), 10)  # and never a channel, nor a heartbeat
            assert server.status().session
            with pytest.raises(WorkerRefused, match="busy"):
                open_port(address, **ASKED | {"timeout": 0.3})
            until(lambda: not server.status().session, 3)
            assert client.heartbeat("t" * 32, 5).state == "ended"
            welcome = client.hello(hello(session="u" * 32), 10)
            assert welcome.local is not None
            channel = connect_unix(welcome.local.path, welcome.local.secret, 5)
            with pytest.raises(Exception, match="closed by the other side"):
                channel.receive(5)
            channel.close()
        with connected(address) as port:
            one_batch(port)


def test_a_secret_opens_one_channel_in_a_private_folder():
    with running() as (_, address), WorkerClient(address) as client:
        welcome = client.hello(hello(), 10)
        assert welcome.local is not None
        folder = Path(welcome.local.path).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with pytest.raises(Exception, match="secret"):
            connect_unix(welcome.local.path, bytes(32), 5)
        channel = connect_unix(welcome.local.path, welcome.local.secret, 5)
        with pytest.raises(Exception, match=r"secret|no local channel"):
            connect_unix(welcome.local.path, welcome.local.secret, 5)
        until(lambda: not folder.exists())
        stream = client.stream("s" * 32, 1 << 20)
        with pytest.raises(Exception, match="has a data channel already"):
            stream.receive(5)
        stream.close()
        other = client.stream("x" * 32, 1 << 20)
        with pytest.raises(Exception, match="no such session"):
            other.receive(5)
        other.close()
        channel.send(codec.encode(Announcement(1, 1, 0, (Open(1, 0, (0,), 0, 9), Close(1)), ())))
        assert isinstance(codec.decode(channel.receive(5)), Announced)
        channel.close()


@pytest.mark.parametrize("way", ["local", "tcp"])
def test_of_connections_that_show_a_secret_at_once_one_is_welcome(way, monkeypatch):
    """A second one was welcome, and closed then, until the first one's channel was attached."""
    tune = sockets._tune
    monkeypatch.setattr(sockets, "_tune", lambda sock: time.sleep(0.1) or tune(sock))
    with running() as (_, address), WorkerClient(address) as client:
        welcome = client.hello(hello(data_channel="tcp"), 10)

        def connect(_: int) -> SocketChannel | None:
            with contextlib.suppress(ChannelClosed):
                if way == "local":
                    return connect_unix(welcome.local.path, welcome.local.secret, 5)
                return connect_tcp("127.0.0.1", welcome.tcp.port, welcome.tcp.secret, 5)
            return None

        with ThreadPoolExecutor(16) as threads:
            opened = [each for each in threads.map(connect, range(16)) if each is not None]
        (channel,) = opened
        channel.send(codec.encode(Announcement(1, 1, 0, (Open(1, 0, (0,), 0, 9), Close(1)), ())))
        assert isinstance(codec.decode(channel.receive(5)), Announced)
        channel.close()


@pytest.mark.parametrize("way", ["local", "grpc"])
@pytest.mark.parametrize("frame", ["zeros", "reply"])
def test_what_is_no_request_ends_the_session_with_a_reason_and_the_worker_takes_the_next(way, frame):
    with running() as (_, address):
        with connected(address, **WAYS[way]) as port:
            port._channel.send(codec.encode(Fault(1, 1, "x")) if frame == "reply" else [bytes(40)])
            with pytest.raises(HolderLost, match=r"attention worker a at .* is lost: .*(frame starts|got a Fault)"):
                port.receive(10)
        with connected(address) as port:
            one_batch(port)


def test_draining_takes_no_new_session_and_tells_the_one_there():
    with running(lease=0.6) as (server, address):
        with connected(address) as port:
            assert health(address) == "SERVING"
            server.drain()
            assert port.status().draining
            asked: list[str] = []
            port.watch(asked.append, asked.append)
            until(lambda: len(asked) > 1)  # as long as it is there
            assert health(address) == "NOT_SERVING"
            one_batch(port)
        with pytest.raises(WorkerRefused, match="draining"):
            open_port(address, **ASKED)


def health(address: str, credentials: Credentials | None = None) -> str:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = stub.Check(health_pb2.HealthCheckRequest(service="lamina.Attention"), timeout=5)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


@pytest.mark.fault("F20")
def test_strangers_do_not_cut_an_engine_off():
    """A hundred calls without a token and without a message took all of a worker's calls: its engine lost it, and no
    other could come."""
    made = Credentials(token="t")
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(60)
        yield from ()

    with (
        running(credentials=made) as (_, address),
        connected(address, credentials=made, local_channel=False, lost_after=2.0) as port,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(over.set)
        for method in ("/lamina.Attention/Hello", "/grpc.health.v1.Health/Check"):
            for _ in range(4):
                channel = stack.enter_context(grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]))
                for _ in range(30):
                    channel.stream_unary(method).future(nothing())
        time.sleep(4.0)  # heartbeats are missed by then
        assert not port.closed
        one_batch(port)
        with connected(address, credentials=made, engine=port._goodbye.engine, seat=0) as other:
            assert other.resumed


@pytest.mark.fault("F13")
def test_a_session_whose_channel_cannot_be_opened_ends_at_once():
    """Such a session stayed until its lease was over, and the worker was busy for every other engine meanwhile."""
    with running() as (server, address):
        server._tcp._admit = lambda secret: False
        with pytest.raises(WorkerRefused, match="did not take the secret"):
            open_port(address, **ASKED, **WAYS["tcp"])
        assert not server.status().session
        with connected(address) as port:
            one_batch(port)


@pytest.mark.fault("F20")
def test_health_needs_no_token():
    with running(credentials=Credentials(token="t")) as (_, address):
        assert health(address) == "SERVING"


def test_stop_ends_the_session_and_all_threads():
    before = set(threading.enumerate())
    with running() as (server, address):
        with connected(address) as port:
            server.stop(0)
            with pytest.raises(HolderLost):
                port.receive(5)
        assert server.wait(0)
    until(lambda: not {t for t in set(threading.enumerate()) - before if "grpc" not in t.name})
    gc.collect()


def test_all_torch_calls_are_made_by_one_thread(monkeypatch):
    threads = set()

    class Noting(AttentionWorker):
        def __init__(self, *args):
            threads.add(threading.get_ident())
            super().__init__(*args)

        def handle(self, request):
            threads.add(threading.get_ident())
            return super().handle(request)

        def settle(self):
            threads.add(threading.get_ident())
            super().settle()

    monkeypatch.setattr(session, "attention_worker", Noting)
    with running() as (_, address):
        for way in WAYS.values():
            with connected(address, **way) as port:
                one_batch(port)
    assert len(threads) == 1


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("policy", ["", "streaming(sink=16, recent=64)", "page_top_k(budget=0.1)"])
def test_every_kind_of_attention_is_warmed_up_once(kv_dtype, policy, caplog, monkeypatch):
    seen = []
    real = session.LocalAttention.send
    monkeypatch.setattr(
        session.LocalAttention, "send", lambda port, request: (seen.append(request), real(port, request))
    )
    layers = tuple(LayerSpec(n, 4, 2, 16, 32, 0.3, policies=(policy,) * 2 if policy else ()) for n in range(2))
    config = HolderConfig(layers, 16, kv_dtype, 1 << 20, sketches=policy.startswith("page"))
    with caplog.at_level(logging.DEBUG, logger="lamina"):
        session.warm_up(config, "float32", 1, torch.device("cpu"))
        assert len(seen) == 2 * 3
        session.warm_up(config, "float32", 1, torch.device("cpu"))  # once for each kind
    assert len(seen) == 2 * 3
    assert "could not be warmed up" not in caplog.text


# The process.


@pytest.mark.fault("F17")
@pytest.mark.real
def test_a_worker_process_serves_and_leaves_at_sigterm():
    with process("--name", "p", "--drain-timeout", "0.5") as child:
        word, address = child.stdout.readline().split()
        assert word == "listening"
        with connected(address) as port:
            assert port.channel_kind == "local"
            assert port.worker_name == "p"
            one_batch(port)
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0


@pytest.mark.real
def test_a_worker_process_ends_with_its_parents_pipe():
    with process("--die-with-parent") as child:
        address = child.stdout.readline().split()[1]
        with connected(address) as port:
            child.stdin.close()
            child.stdin = None
            assert child.wait(10) == 0
            with pytest.raises(HolderLost):
                port.receive(5)


@pytest.mark.real
def test_a_worker_process_that_cannot_serve_says_why():
    with process("--listen", "0.0.0.0:0") as child:
        _, said = child.communicate(timeout=30)
        assert child.returncode == 1
        assert "error: listening on 0.0.0.0:0 without TLS and a token" in said
        assert "Traceback" not in said


@pytest.mark.real
def test_a_worker_process_reads_its_credentials_from_files(tmp_path):
    made = make_credentials(tmp_path / "tls", ["127.0.0.1"])
    flags = ("--tls-dir", str(tmp_path / "tls"), "--token-file", str(tmp_path / "tls/token"), "--mutual-tls")
    with process(*flags) as child:
        address = child.stdout.readline().split()[1]
        with connected(address, credentials=made, local_channel=False) as port:
            one_batch(port)


def test_port_of_a_plain_socket_is_no_worker():
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.raises(WorkerUnreachable, match="Hello at"):
            open_port(f"127.0.0.1:{deaf.getsockname()[1]}", **{**ASKED, "timeout": 0.5})
