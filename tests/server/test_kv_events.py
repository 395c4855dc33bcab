"""Events of the prefix cache over ZeroMQ, as a router's subscriber reads them."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest

from lamina.errors import InvalidRequest
from lamina.kv.prefix_nodes import BlocksCleared, BlocksRemoved, BlocksStored
from lamina.server.processes import kv_events
from lamina.server.processes.kv_events import KvEventPublisher
from lamina.server.settings import ServerSettings

zmq = pytest.importorskip("zmq")

STORED = BlocksStored((1 << 63, 7), None, (5, 6, 7, 8), 2, "")
PATIENCE = 5000  # ms


def free_ports() -> int:
    """A port that is free, with the next one."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
        return port


class Subscriber:
    """One that listens to a port, and may ask for replay at another."""

    def __init__(self, context: Any, port: int, topic: bytes = b"") -> None:
        self.socket = context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.SUBSCRIBE, topic)
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def next(self) -> tuple[bytes, int, list[dict[str, Any]]]:
        assert self.socket.poll(PATIENCE), "no message came"
        topic, number, payload = self.socket.recv_multipart()
        at, events, rank = msgpack.unpackb(payload)
        assert isinstance(at, float)
        assert rank == 0
        return topic, int.from_bytes(number, "big"), events


class Sockets:
    """Sockets that are closed once the test has ended."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.made: list[Any] = []

    def socket(self, kind: int) -> Any:
        self.made.append(self.context.socket(kind))
        return self.made[-1]


@pytest.fixture
def context() -> Iterator[Sockets]:
    sockets = Sockets()
    yield sockets
    sockets.context.destroy(linger=0)


def test_each_model_has_its_port_and_numbers_and_events_are_vllms(context: Any) -> None:
    port = free_ports()
    publisher = KvEventPublisher(f"tcp://127.0.0.1:{port}", None, ("a", "org/b"), "10.0.0.7")
    try:
        first, second = Subscriber(context, port), Subscriber(context, port + 1, b"kv@10.0.0.7@org/b")
        joined(publisher, "a", first)
        joined(publisher, "org/b", second)
        publisher.sink("a")(STORED)
        assert first.next()[2] == [
            {
                "type": "BlockStored", "block_hashes": [1 << 63, 7], "parent_block_hash": None,
                "token_ids": [5, 6, 7, 8], "block_size": 2, "lora_id": None, "medium": "CPU", "lora_name": None,
                "extra_keys": [None, None],
            }
        ]  # fmt: skip
        publisher.sink("a")(BlocksRemoved((7,)))
        topic, number, events = first.next()
        assert topic == b"kv@10.0.0.7@a"
        assert events == [{"type": "BlockRemoved", "block_hashes": [7], "medium": "CPU"}]
        publisher.sink("a")(BlocksCleared())
        assert first.next()[1:] == (number + 1, [{"type": "AllBlocksCleared"}])
    finally:
        publisher.close()


def joined(publisher: KvEventPublisher, model: str, subscriber: Subscriber) -> None:
    """Publish until a subscriber gets it: a subscription takes a moment."""
    while not subscriber.socket.poll(20):
        publisher.sink(model)(BlocksCleared())
    while subscriber.socket.poll(50):
        subscriber.socket.recv_multipart()


def test_what_was_missed_is_replayed_within_bounds(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "KEPT", 3)
    monkeypatch.setattr(kv_events, "_TOGETHER", 1)
    port = free_ports()
    publisher = KvEventPublisher(f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}", ("a",), "n")
    try:
        for _ in range(5):
            publisher.sink("a")(BlocksCleared())
        while publisher._streams["a"].number < 5:  # on a thread of its own
            time.sleep(0.01)
        asking = context.socket(zmq.DEALER)
        asking.connect(f"tcp://127.0.0.1:{port + 1}")
        for nonsense in ([b"x"], [b"", b"too short"], [b"", b"1" * 1000]):
            asking.send_multipart(nonsense)
        other = context.socket(zmq.DEALER)  # the last one was too large: that connection is closed
        other.connect(f"tcp://127.0.0.1:{port + 1}")
        other.send_multipart([b"", (3).to_bytes(8, "big")])
        numbers = []
        while not numbers or numbers[-1] >= 0:
            assert other.poll(PATIENCE)
            _, number, payload = other.recv_multipart()
            numbers.append(int.from_bytes(number, "big", signed=True))
        assert numbers == [3, 4, -1]
        assert payload == b""
    finally:
        publisher.close()


def test_a_replay_waits_for_its_client_and_gives_it_up(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request put all that is kept into memory once more: ten clients that read nothing took 620 MB."""
    monkeypatch.setattr(kv_events, "_STALLED_S", 0.3)
    port = free_ports()
    publisher = KvEventPublisher(f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}", ("a",), "n")
    try:
        stream = publisher._streams["a"]
        stream.kept.extend((number, b"x" * 200_000) for number in range(300))
        idle, reading = (context.socket(zmq.DEALER) for _ in range(2))
        for each in (idle, reading):
            each.setsockopt(zmq.RCVHWM, 1)
            each.connect(f"tcp://127.0.0.1:{port + 1}")
            for _ in range(3):
                each.send_multipart([b"", bytes(8)])
        numbers = [-2]
        while numbers[-1] != -1:
            assert reading.poll(PATIENCE)
            numbers.append(int.from_bytes(reading.recv_multipart()[1], "big", signed=True))
        assert numbers[1:301] == list(range(300))
        end = time.monotonic() + PATIENCE / 1000
        while stream.replays and time.monotonic() < end:
            time.sleep(0.05)
        assert not stream.replays
        received = 0
        while idle.poll(200):
            idle.recv_multipart()
            received += 1
        assert received < 300
    finally:
        publisher.close()


@pytest.mark.fault("F23")
def test_a_client_that_subscribes_without_end_is_cut_off(context: Any) -> None:
    """libzmq keeps whatever a client subscribes to: 100,000 topics of 48 bytes took 200 MB."""
    port = free_ports()
    publisher = KvEventPublisher(f"tcp://127.0.0.1:{port}", None, ("a",), "n")
    try:
        first = Subscriber(context, port)
        joined(publisher, "a", first)
        hostile = context.socket(zmq.SUB)
        hostile.setsockopt(zmq.RECONNECT_IVL, -1)
        ends = hostile.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        context.made.append(ends)
        hostile.connect(f"tcp://127.0.0.1:{port}")
        for number in range(kv_events._SUBSCRIPTIONS - 1):
            hostile.setsockopt(zmq.SUBSCRIBE, number.to_bytes(48, "big"))
        assert not ends.poll(100)
        for number in range(1000, 1010):
            hostile.setsockopt(zmq.SUBSCRIBE, number.to_bytes(48, "big"))
        assert ends.poll(PATIENCE), "it was not cut off"
        publisher.sink("a")(STORED)
        assert first.next()[2]
    finally:
        publisher.close()


@pytest.mark.fault("F23")
def test_each_connection_may_subscribe_as_often_as_any() -> None:
    """What one address had subscribed to counted for its next connection too, which was cut off."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        stream, source = kv_events._Stream(b"t", server.getsockname()[1], None, None), 0
        for _ in range(3):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # free at once
                client.bind(("127.0.0.1", source))
                source = client.getsockname()[1]
                client.connect(server.getsockname())
                client.setblocking(False)
                with server.accept()[0] as connection:
                    for _ in range(kv_events._SUBSCRIPTIONS):
                        stream._count(connection)
                    with pytest.raises(BlockingIOError):
                        client.recv(1)
                    stream._count(connection)
                    assert client.recv(1) == b""
        assert len(stream.subscriptions) <= 2


def test_an_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(InvalidRequest, match=f"cannot listen at {address}"):
            KvEventPublisher(address, None, ("a",), "n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_events": "127.0.0.1:5557"}, "kv_events is '127.0.0.1:5557'; allowed is tcp://HOST:PORT"),
        ({"kv_events": "tcp://h:65536"}, "kv_events is"),
        ({"kv_events": "tcp://h:65535", "others": ("b",)}, "the port from 1 to 65534"),
        ({"kv_events_replay": "tcp://*:1"}, "beside kv_events"),
        ({"kv_events_name": "a"}, "kv_events_name is 'a'; allowed is one beside kv_events"),
        ({"kv_events": "tcp://*:1", "kv_events_name": "a@b"}, "kv_events_name is 'a@b'"),
    ],
)
def test_settings_that_are_wrong_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message.replace("*", r"\*")):
        ServerSettings(model="a", **given)
