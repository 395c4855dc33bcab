"""Every channel carries the same frames, takes big ones both ways at once, and ends when it is told to."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import ssl
import sys
import tempfile
import threading
import time
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from evaluate.fault_injection.proxy import FlipAt, Proxy
from transports import SECRET, TRANSPORTS, made_credentials, pair

from lamina_protocols.channels.channels import ChannelClosed, Credentials, checksum, client_context, server_context
from lamina_protocols.channels.sockets import Listener, SocketChannel, connect_tcp, listen_tcp
from lamina_protocols.channels.waiting import Waiter
from lamina_protocols.errors import CorruptFrame, ProtocolError
from lamina_protocols.frames import codec, frames
from lamina_protocols.frames.frames import Prefix, blank_frame, pack_prefix, read_prefix
from lamina_protocols.messages import messages as m
from lamina_protocols.messages.messages import FetchedSample, FetchSample, Sample

LAYER = m.Exchange(1, 2, 3, torch.randn(7, 16), torch.randn(5, 16), torch.randn(5, 32))
OPEN = m.Open(1, 0, (0, 1), 0, 1000)
MESSAGES = (
    m.Announcement(1, 2, 0, (OPEN, m.Close(3)), (m.Row(1, 0, 9, None, True),)),
    m.Announced(1, 2, True, (17,), (0,), ""),
    m.Query(1, 2, 3, LAYER.q.bfloat16()),
    m.Fresh(1, 2, 3, LAYER.k, LAYER.v),
    m.Fresh(1, 2, 3, LAYER.k[:0], LAYER.v[:0]),
    LAYER,
    m.Attended(1, 2, 3, LAYER.q, LAYER.q[:, 0]),
    m.Fault(1, 2, "wrong"),
    Sample(1, 2, 3, 4, (0, 2), (16, 32), torch.randn(8, 16).bfloat16()),
    FetchSample(1, 2, 3, 4, 0, 32),
    FetchedSample(1, 2, 3, (), (), torch.empty(0, 0)),
)


def sized(n: int) -> m.Fresh:
    """A message of about 2 n bytes, which starts and ends with known numbers."""
    k = torch.arange(n // 32 * 8, dtype=torch.float32).view(-1, 8)
    return m.Fresh(1, 2, 3, k, -k)


def same(a: m.Message, b: m.Message) -> bool:
    whole = [b"".join(codec.encode(message)) for message in (a, b)]
    return type(a) is type(b) and whole[0] == whole[1]


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    return request.param


def test_messages_arrive_as_they_were_sent(transport):
    with pair(transport) as (near, far):
        for sender, receiver in ((near, far), (far, near)):
            for message in MESSAGES:
                sender.send(codec.encode(message))
            for message in MESSAGES:
                assert same(codec.decode(receiver.receive(10)), message)
        assert near.bytes_sent == near.bytes_received == far.bytes_sent == far.bytes_received
        trailer = 4 * len(MESSAGES) if transport.endswith("+sum") else 0
        assert near.bytes_sent == trailer + sum(len(b"".join(codec.encode(message))) for message in MESSAGES)


def test_tensors_of_a_received_frame_can_be_written_and_are_aligned(transport):
    with pair(transport) as (near, far):
        near.send(codec.encode(LAYER))
        back = codec.decode(far.receive(10))
        assert isinstance(back, m.Exchange)
        for tensor in (back.q, back.k, back.v):
            assert tensor.data_ptr() % 64 == 0
            tensor.add_(1)
        assert torch.equal(back.q, LAYER.q + 1)


def test_big_frames_both_ways_at_once_do_not_wait_for_each_other(transport):
    """Both ends send 24 MB before either receives: more than any socket buffers."""
    message = sized(12 << 20)
    with pair(transport) as (near, far):
        failures = []

        def exchange(channel):
            try:
                for _ in range(2):
                    channel.send(codec.encode(message))
                failures.extend("changed" for _ in range(2) if not same(codec.decode(channel.receive(30)), message))
            except Exception as error:  # noqa: BLE001
                failures.append(error)

        threads = [threading.Thread(target=exchange, args=(end,)) for end in (near, far)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures
        assert not any(thread.is_alive() for thread in threads)


def test_a_receive_that_waits_raises_when_this_side_closes(transport):
    with pair(transport) as (near, _):
        raised: list[Exception] = []

        def wait():
            try:
                near.receive()
            except Exception as error:  # noqa: BLE001
                raised.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        near.close()
        thread.join(5)
        assert [type(error) for error in raised] == [ChannelClosed]
        with pytest.raises(ChannelClosed, match="closed on this side"):
            near.send([b"x"])
        with pytest.raises(ChannelClosed, match="closed on this side"):
            near.receive(0)
        assert near.ready()


def test_what_the_other_side_closed_still_gives_what_it_sent(transport):
    with pair(transport) as (near, far):
        near.send(codec.encode(LAYER))
        assert same(codec.decode(far.receive(10)), LAYER)
        near.send(codec.encode(LAYER))
        time.sleep(0.2)
        near.close()
        assert same(codec.decode(far.receive(10)), LAYER)
        with pytest.raises(ChannelClosed):
            far.receive(10)


def test_ready_and_timeout(transport):
    with pair(transport) as (near, far):
        assert not far.ready()
        for seconds in (0, 0.05):
            with pytest.raises(TimeoutError, match="no frame within"):
                far.receive(seconds)
        near.send(codec.encode(LAYER))
        until(far.ready)
        assert same(codec.decode(far.receive(0)), LAYER)
        assert not far.ready()


@pytest.mark.fault("F09")
def test_a_frame_that_is_too_large_is_refused_by_who_sends_it(transport):
    error = r"frame of \d+ bytes, the other side takes up to 1000"
    with pair(transport, max_frame=1000) as (near, _), pytest.raises(ProtocolError, match=error):
        near.send(codec.encode(sized(1000)))


def until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Sockets, byte by byte.


@pytest.fixture
def wire():
    """A raw socket, and the channel at its other end, which expects checksums."""
    raw, other = socket.socketpair()
    channel = SocketChannel(other, True, 1 << 20)
    with raw:
        yield raw, channel
    channel.close()


def checksummed(message: m.Message) -> bytes:
    buffers = codec.encode(message)
    return b"".join([*buffers, checksum(buffers)])


@pytest.mark.fault("F07")
def test_a_frame_in_slices_of_one_byte(wire):
    raw, channel = wire
    for byte in checksummed(LAYER):
        assert not channel.ready()
        raw.send(bytes([byte]))
    assert channel.ready()
    assert same(codec.decode(channel.receive(0)), LAYER)


@pytest.mark.fault("F08")
def test_a_changed_bit_is_noticed_wherever_it_is(wire):
    good = checksummed(LAYER)
    for position in range(20, len(good), 97):
        raw, other = socket.socketpair()
        changed = bytearray(good)
        changed[position] ^= 4
        channel = SocketChannel(other, True)
        with raw:
            raw.sendall(changed)
            assert channel.ready()
            for _ in range(2):
                with pytest.raises(CorruptFrame, match="checksum"):
                    channel.receive(5)
        channel.close()


@pytest.mark.fault("F07")
def test_a_stream_that_ends_inside_a_frame(wire):
    raw, channel = wire
    raw.sendall(checksummed(LAYER)[:100])
    raw.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelClosed, match="inside a frame"):
        channel.receive(5)


@pytest.mark.fault("F09")
@pytest.mark.parametrize(
    ("prefix", "error"),
    [
        (b"GET / HTTP/1.1\r\n\r\n  ", "starts with"),
        (pack_prefix(Prefix(3, 0, 1 << 60)), "too large"),
        (pack_prefix(Prefix(3, 1 << 31, 0)), "too large"),
        (pack_prefix(Prefix(3, 8, 1 << 20)), r"takes up to 1048576"),
    ],
)
def test_a_lying_prefix_is_refused_before_memory_is_taken(wire, prefix, error):
    raw, channel = wire
    raw.sendall(prefix)
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(ProtocolError, match=error):
        channel.receive(5)
    assert time.monotonic() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.fault("F12")
def test_a_frame_that_no_memory_is_there_for_is_refused(wire, monkeypatch):
    def none(*_: object) -> None:
        raise MemoryError

    raw, channel = wire
    with monkeypatch.context() as changed:
        changed.setattr(frames, "np", SimpleNamespace(empty=none, uint8=None))
        raw.sendall(pack_prefix(Prefix(3, 8, 1000)))
        with pytest.raises(ProtocolError, match="no memory for a frame of 1032 bytes"):
            channel.receive(5)
    assert channel.ready()
    with pytest.raises(ProtocolError, match="no memory"):
        channel.receive(5)


@pytest.mark.fault("F09")
def test_a_claimed_frame_takes_pages_only_as_its_bytes_arrive():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    memory = blank_frame(Prefix(3, 100, 1 << 29))
    assert len(memory) == 20 + 100 + (1 << 29)
    assert resident() - before < 16 << 20


def test_prefixes_come_back():
    assert read_prefix(pack_prefix(Prefix(9, 5, 7)) + bytes(12)) == Prefix(9, 5, 7)
    assert Prefix(9, 5, 7).frame == 32
    with pytest.raises(ProtocolError, match="shorter than its prefix"):
        read_prefix(b"LMNA")


def test_only_the_secret_opens_a_channel():
    arrived: list[SocketChannel] = []
    listener = Listener(listen_tcp("127.0.0.1", 0), SECRET.__eq__, lambda channel, _: arrived.append(channel))
    try:
        with pytest.raises(ChannelClosed, match="secret"):
            connect_tcp("127.0.0.1", listener.port, bytes(32), 5)
        with socket.create_connection(("127.0.0.1", listener.port)) as silent:
            connect_tcp("127.0.0.1", listener.port, SECRET, 5).close()  # a silent stranger holds up nobody
            silent.send(b"x")
        until(lambda: arrived)
        assert len(arrived) == 1
    finally:
        listener.close()
        for channel in arrived:
            channel.close()
    with pytest.raises(ChannelClosed, match="no data channel"):
        connect_tcp("127.0.0.1", listener_port_of_nobody(), SECRET, 1)


def listener_port_of_nobody() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.fault("F20")
def test_tls_takes_no_stranger_and_no_plaintext():
    made = made_credentials()
    arrived: list[SocketChannel] = []
    listener = Listener(
        listen_tcp("127.0.0.1", 0),
        SECRET.__eq__,
        lambda channel, _: arrived.append(channel),
        server_context(made, True),
    )
    try:
        with pytest.raises(ChannelClosed):
            connect_tcp("127.0.0.1", listener.port, SECRET, 5)
        from lamina_workers.process.credentials import create_credentials

        with pytest.raises(ChannelClosed, match=r"TLS with .*certificate verify failed"):
            connect_tcp("127.0.0.1", listener.port, SECRET, 5, client_context(create_credentials(["127.0.0.1"])))
        without = client_context(type(made)(ca=made.ca))
        with pytest.raises(ChannelClosed):
            connect_tcp("127.0.0.1", listener.port, SECRET, 5, without)
        assert not arrived
        connect_tcp("127.0.0.1", listener.port, SECRET, 5, client_context(made)).close()
        until(lambda: arrived)
    finally:
        listener.close()
        for channel in arrived:
            channel.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are no files in memory")
def test_a_private_key_is_in_no_file_on_a_disk(tmp_path, monkeypatch):
    """Each context wrote its key to a file in the temporary folder, though the docs said that none is on a disk."""
    made = made_credentials()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    server_context(made, True)
    client_context(made)


def test_tls_contexts_take_nothing_older():
    assert server_context(made_credentials(), False).minimum_version is ssl.TLSVersion.TLSv1_3
    assert client_context(made_credentials()).minimum_version is ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize("at", [0, 1, 20, -1])
def test_both_ends_of_tls_notice_a_changed_bit(at):
    """OpenSSL 3.2 and later say "record layer failure" of it, which was taken for a loss as any other."""
    made = made_credentials()
    arrived: queue.SimpleQueue[SocketChannel] = queue.SimpleQueue()
    listener = Listener(
        listen_tcp("127.0.0.1", 0), SECRET.__eq__, lambda channel, _: arrived.put(channel), server_context(made, True)
    )
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        proxy = stack.enter_context(Proxy(f"127.0.0.1:{listener.port}"))
        near = connect_tcp("127.0.0.1", int(proxy.address.split(":")[1]), SECRET, 10, client_context(made))
        far = arrived.get(timeout=10)
        stack.callback(near.close)
        stack.callback(far.close)
        near.send(codec.encode(LAYER))
        assert same(codec.decode(far.receive(10)), LAYER)
        proxy.toxic = FlipAt(way="to", at=at)
        near.send(codec.encode(LAYER))
        for end in (far, near):
            with pytest.raises(CorruptFrame, match="bits have changed"):
                end.receive(10)


@pytest.mark.fault("F20")
@pytest.mark.parametrize("tls", [False, True])
def test_silent_strangers_keep_nobody_away(tls):
    """Sixteen connections that said nothing were all that a listener had room for: it closed every further one."""
    made = made_credentials()
    arrived: queue.SimpleQueue[SocketChannel] = queue.SimpleQueue()
    context = server_context(made, False) if tls else None
    listener = Listener(listen_tcp("127.0.0.1", 0), SECRET.__eq__, lambda channel, _: arrived.put(channel), context)
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        strangers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", listener.port), 10)) for _ in range(150)
        ]
        near = client_context(Credentials(ca=made.ca)) if tls else None
        for _ in range(3):
            channel = connect_tcp("127.0.0.1", listener.port, SECRET, 10, near)
            stack.callback(channel.close)
            stack.callback(arrived.get(timeout=10).close)
        strangers[0].settimeout(10)
        assert not strangers[0].recv(1)  # the oldest has made room


def test_the_address_with_most_silent_connections_makes_room():
    """One stranger's connections took the room of everybody."""
    listener = Listener(listen_tcp("127.0.0.1", 0), SECRET.__eq__, lambda channel, _: channel.close())
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        for number in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", listener.port), 10))
            if number == 100:
                first = stack.enter_context(
                    socket.create_connection(("127.0.0.1", listener.port), 10, source_address=("127.0.0.2", 0))
                )
        first.sendall(SECRET + b"\0")
        first.settimeout(10)
        assert first.recv(1) == b"\1"


def test_the_end_of_a_waiter_closes_its_pipe() -> None:
    waiter = Waiter()
    pipe = waiter._woken, waiter._waking
    identities = [os.fstat(descriptor).st_ino for descriptor in pipe]
    del waiter
    for descriptor, identity in zip(pipe, identities, strict=True):
        with contextlib.suppress(OSError):  # it is closed
            assert os.fstat(descriptor).st_ino != identity
