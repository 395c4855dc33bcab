"""The gRPC service: who may call, what errors become, deadlines, and frames beyond the message limit."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
import torch
from transports import OneStream, made_credentials, pair, serving

from lamina_protocols.channels import control, grpc_server
from lamina_protocols.channels.channels import ChannelClosed, Credentials
from lamina_protocols.channels.grpc_client import GrpcChannel, WorkerClient, WorkerRefused, WorkerUnreachable
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames import codec
from lamina_protocols.frames.frames import Prefix, pack_prefix
from lamina_protocols.messages.messages import Query
from lamina_workers.process.credentials import create_credentials

QUERY = Query(1, 2, 3, torch.randn(4, 16))


class Slow(OneStream):
    def heartbeat(self, heartbeat: control.Heartbeat) -> control.Alive:
        time.sleep(0.5)
        return control.Alive("serving")

    def goodbye(self, goodbye: control.Goodbye) -> control.Alive:
        raise ProtocolError("not now, says the worker")


@pytest.mark.fault("F20")
@pytest.mark.parametrize("token", ["", "wrong", "right-but-longer", "Bearer right"])
def test_without_the_token_every_call_is_refused_streams_too(token):
    with serving(OneStream(), None, token="right") as address:
        with WorkerClient(address, Credentials(token=token)) as client:
            for call in (lambda: client.heartbeat("s", 5), client.status):
                with pytest.raises(WorkerRefused, match=r"token .*UNAUTHENTICATED"):
                    call()
            stream = client.stream("s" * 32, 1 << 20)
            with pytest.raises(ChannelClosed, match=r"token .*UNAUTHENTICATED"):
                stream.receive(5)
            stream.close()
        with WorkerClient(address, Credentials(token="right")) as client:
            assert client.heartbeat("s", 5).state == "serving"


@contextlib.contextmanager
def half_calls(address: str, count: int, method: str, token: str = "") -> Iterator[list[grpc.Call]]:
    """Calls that have begun, and whose message does not come."""
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(60)
        yield from ()

    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address) as channel:
        try:
            yield [channel.stream_unary(method).future(nothing(), metadata=metadata) for _ in range(count)]
        finally:
            over.set()


@pytest.mark.fault("F20")
@pytest.mark.parametrize(
    "method", ["/lamina.Attention/Hello", "/grpc.health.v1.Health/Check", "/lamina.Attention/Batch"]
)
def test_half_a_call_of_a_stranger_keeps_no_thread(method):
    """Each call of a stranger whose message did not come kept a thread of the server: a hundred cut the engine off."""
    with serving(OneStream(), None, token="right") as address, half_calls(address, 12, method) as calls:
        for call in calls:
            error = call.exception(10)  # it is answered although nothing was sent
            assert error is None or error.code() is grpc.StatusCode.UNAUTHENTICATED
        with WorkerClient(address, Credentials(token="right")) as client:
            assert client.heartbeat("s", 10).state == "serving"


def test_half_a_call_with_the_token_ends_in_time(monkeypatch):
    """A call whose message did not come was waited for as long as its connection lived."""
    monkeypatch.setattr(grpc_server, "_MESSAGE_S", 1.0)
    with (
        serving(OneStream(), None, token="right") as address,
        half_calls(address, 8, "/lamina.Attention/Status", "right") as calls,
    ):
        assert all(call.exception(20) is not None for call in calls)
        with WorkerClient(address, Credentials(token="right")) as client:
            assert client.heartbeat("s", 10).state == "serving"


def test_a_connection_has_no_more_than_some_calls_at_once():
    """One connection could have any number of calls under way."""
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(60)
        yield from ()

    with serving(OneStream(), None, threads=64) as address, grpc.insecure_channel(address) as channel:
        batch = channel.stream_stream("/lamina.Attention/Batch")
        calls = [batch(nothing()) for _ in range(grpc_server._MOST_CALLS)]
        heartbeat = channel.unary_unary("/lamina.Attention/Heartbeat")
        waits = heartbeat.future(control.pack(control.Heartbeat("s")))
        with pytest.raises(grpc.FutureTimeoutError):
            waits.result(1.0)
        over.set()
        calls[0].cancel()
        assert waits.result(10)


@pytest.mark.fault("F20")
def test_the_token_is_found_behind_others():
    with serving(OneStream(), None, token="right") as address, grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/lamina.Attention/Heartbeat")
        metadata = (("authorization", "Bearer wrong"), ("x", "y"), ("authorization", "Bearer right"))
        data = call(control.pack(control.Heartbeat("s")), metadata=metadata, timeout=5)
        assert control.unpack(control.Alive, data).state == "serving"


def test_errors_tell_their_kind_and_nothing_from_inside(caplog):
    with serving(Slow(), None) as address, WorkerClient(address) as client:
        with pytest.raises(WorkerRefused, match=r"not now, says the worker .*FAILED_PRECONDITION"):
            client.goodbye(control.Goodbye("e", 0, "s"), 5)
        with pytest.raises(WorkerRefused) as refused:
            client.status()
        assert "RuntimeError" in str(refused.value)
        assert "secret" not in str(refused.value)
        assert "Traceback" not in str(refused.value)
    assert "a secret of the server" in caplog.text


@pytest.mark.fault("F06")
def test_calls_end_at_their_deadline():
    late = pytest.raises(WorkerUnreachable, match="DEADLINE_EXCEEDED")  # the answer would come after 0.5 s
    with serving(Slow(), None) as address, WorkerClient(address) as client, late:
        client.heartbeat("s", 0.1)


def test_nobody_there():
    with WorkerClient("127.0.0.1:1") as client, pytest.raises(WorkerUnreachable, match=r"127.0.0.1:1: .*UNAVAILABLE"):
        client.status(5)


def test_what_is_no_control_message_is_refused():
    with serving(OneStream(), None) as address, grpc.insecure_channel(address) as channel:
        for body in (b"", b"\xdd\xff\xff\xff\xff", b"\x91" * 5000, b"\x90"):
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary("/lamina.Attention/Hello")(body, timeout=5)
            assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        reply = channel.unary_unary("/lamina.Attention/Heartbeat")(control.pack(control.Heartbeat("s")), timeout=5)
        assert reply


@pytest.mark.fault("F20")
def test_tls_takes_a_client_of_its_ca_and_no_other():
    made = made_credentials()
    with serving(OneStream(), made) as address:
        for credentials in (Credentials(), Credentials(ca=create_credentials(["127.0.0.1"]).ca)):
            with WorkerClient(address, credentials) as client, pytest.raises(WorkerUnreachable):
                client.heartbeat("s", 2)
        with WorkerClient(address, Credentials(ca=made.ca)) as client:
            assert client.heartbeat("s", 5).state == "serving"


@pytest.mark.fault("F20")
def test_a_certificate_for_another_host_is_refused():
    made = create_credentials(["192.0.2.1", "worker.example"])
    with serving(OneStream(), made) as address:
        client = WorkerClient(address, Credentials(ca=made.ca))
        with client, pytest.raises(WorkerUnreachable):
            client.heartbeat("s", 2)


@pytest.mark.fault("F09")
@pytest.mark.parametrize("size", [(1 << 20) - 200, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_frames_around_the_message_limit(size):
    """`pair` limits messages to 1 MiB; the header of this message takes less than 100 bytes."""
    message = Query(1, 2, 3, torch.randint(-128, 127, (size, 1), dtype=torch.int8))
    with pair("grpc+sum") as (near, far):
        near.send(codec.encode(message))
        near.send(codec.encode(QUERY))
        back = codec.decode(far.receive(10))
        assert isinstance(back, Query)
        assert torch.equal(back.q, message.q)
        assert codec.decode(far.receive(10)).layer == QUERY.layer


class Loop:
    """A channel whose stream is a list."""

    def __init__(self, *messages: bytes, checksummed: bool = False) -> None:
        self.channel = GrpcChannel(checksummed, max_frame=1 << 20)
        self.channel.start(messages, lambda: None)


def frame() -> bytes:
    return b"".join(codec.encode(QUERY))


@pytest.mark.fault("F07")
@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ((b"short",), "shorter than its prefix"),
        ((frame() + b"x",), r"\d+ bytes for a frame of"),
        ((frame()[:50], frame()), r"\d+ bytes for a frame of"),
        ((frame()[:50], b""), r"\d+ bytes for a frame of"),
        ((pack_prefix(Prefix(3, 0, 1 << 25)),), "takes up to 1048576"),
    ],
)
def test_malformed_streams_are_refused(messages, error):
    channel = Loop(*messages).channel
    with pytest.raises(ProtocolError, match=error):
        channel.receive(5)
    with pytest.raises(ProtocolError, match=error):
        channel.receive(5)
    channel.close()


@pytest.mark.fault("F07")
def test_a_stream_that_ends_inside_a_frame():
    channel = Loop(frame()[:50]).channel
    with pytest.raises(ChannelClosed, match="inside a frame"):
        channel.receive(5)
    channel.close()


def test_a_channel_may_be_closed_while_it_starts(monkeypatch):
    channel = GrpcChannel(False)
    cancelled = threading.Event()

    class Slow(threading.Thread):
        def start(self) -> None:
            channel.close()
            super().start()

    with monkeypatch.context() as changed:
        changed.setattr(threading, "Thread", Slow)
        channel.start(iter([b"late"]), cancelled.set)
    assert cancelled.is_set()
    with pytest.raises(ChannelClosed, match="closed on this side"):
        channel.receive(1)
    channel.close()


def test_who_does_not_read_is_not_sent_more_than_a_bound():
    channel = GrpcChannel(False)
    sent = []

    def send():
        with contextlib.suppress(ChannelClosed):
            for _ in range(1000):
                channel.send([frame()])
                sent.append(1)

    thread = threading.Thread(target=send)
    thread.start()
    time.sleep(0.3)
    assert len(sent) == 64
    channel.close()
    thread.join(5)
    assert not thread.is_alive()
    assert len(sent) == 64


def test_a_close_while_the_stream_starts_does_not_overtake_the_last_message(monkeypatch) -> None:
    """The first frame came, was answered and ended the session before `start` had returned: the reason was cut off."""
    cancelled: list[bool] = []
    closed = threading.Event()
    channel = GrpcChannel(False)

    def incoming() -> Iterator[bytes]:
        def end() -> None:
            channel.post([b"the reason"])
            channel.close()

        ending = threading.Thread(target=end)
        ending.start()
        ending.join(10.0)
        closed.set()
        yield from ()

    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        begin(thread)
        if thread.name == "lamina-stream":
            closed.wait(10.0)

    monkeypatch.setattr(threading.Thread, "start", start)
    channel.start(incoming(), lambda: cancelled.append(True), serves=True)
    assert closed.is_set()
    assert not cancelled
    assert b"the reason" in b"".join(channel.outgoing())
    assert not cancelled
