"""Layers that a worker answers without Python, for engines that break every rule: what is said and stored is what
Python says and stores, and whoever else is there goes on."""

from __future__ import annotations

import dataclasses
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from dense_holders import CONFIG, D
from exchange_peers import EXCHANGES, Served, exchanged, frame, served, sockets
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_protocols.channels.channels import ChannelClosed
from lamina_protocols.channels.sockets import SocketChannel
from lamina_protocols.frames import codec
from lamina_protocols.messages.messages import (
    Announced,
    Announcement,
    Attended,
    Close,
    Exchange,
    Fault,
    Fetch,
    Fresh,
    Open,
    Query,
    Row,
    Survey,
)
from lamina_workers.attention_worker.attention_worker import AttentionWorker

HELD = dataclasses.replace(CONFIG, kv_memory=1 << 22)
LENGTHS = {1: 3, 2: 5}  # tokens of each part before the first decode batch
QUERIES, KEYS = 6 * len(LENGTHS), 2 * len(LENGTHS)


def numbers(seed: int, n: int, dtype: torch.dtype = torch.float32, d: int = D) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def opened() -> list[Any]:
    """Messages that store the parts' first tokens."""
    rows = tuple(Row(handle, 0, n, None, True) for handle, n in LENGTHS.items())
    announcement = Announcement(1, 1, 0, tuple(Open(handle, 0, (0, 1), 0, 100) for handle in LENGTHS), rows)
    n = 2 * sum(LENGTHS.values())
    return [announcement, *(Fresh(1, 1, layer, numbers(layer, n), numbers(9 + layer, n)) for layer in (0, 1))]


def decode(epoch: int = 1, batch: int = 2, step: int = 0, handles: Sequence[int] = (1, 2)) -> Announcement:
    """The parts' tokens number `step` after their first ones."""
    at = {handle: LENGTHS[handle] + step for handle in handles}
    return Announcement(epoch, batch, 2, (), tuple(Row(h, n, 1, (0, n + 1), True) for h, n in at.items()))


def layer(number: int, epoch: int = 1, batch: int = 2, parts: int = 2, **changes: Any) -> Exchange:
    seed = 100 * batch + 10 * number
    q, k, v = numbers(seed, 6 * parts), numbers(seed + 1, 2 * parts), numbers(seed + 2, 2 * parts)
    return dataclasses.replace(Exchange(epoch, batch, number, q, k, v), **changes)


class Line:
    """An engine's end of one channel."""

    def __init__(self, worker: Served, transport: str, max_frame: int) -> None:
        near, far = sockets(transport)
        self._socket = near
        self._channel = SocketChannel(near, False)
        worker.add(SocketChannel(far, False, max_frame))

    def tell(self, data: bytes) -> None:
        self._channel.send([data])

    def end(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def hear(self, timeout: float = 20.0) -> Any:
        return codec.decode(self._channel.receive(timeout))

    def close(self) -> None:
        self._channel.close()


def plain(reply: Any) -> tuple[Any, ...]:
    """A reply as what can be compared; the seconds that it took are left out."""
    fields = {field.name: getattr(reply, field.name) for field in dataclasses.fields(reply)}
    fields.pop("seconds", None)
    return type(reply).__name__, *(x.tolist() if isinstance(x, torch.Tensor) else x for x in fields.values())


class Talk:
    """What an engine tells over its lines, and what it is answered."""

    def __init__(self, worker: Served, transport: str = "unix", lines: int = 2, max_frame: int = 1 << 28) -> None:
        self.worker = worker
        self.lines = [Line(worker, transport, max_frame) for _ in range(lines)]
        self.heard: list[Any] = []

    def say(self, *messages: Any, over: int = 0, hears: int | None = None) -> None:
        """Tell messages or bytes, and hear as many replies as are due."""
        for message in messages:
            self.lines[over].tell(message if isinstance(message, bytes) else frame(message))
        due = sum(isinstance(m, (Announcement, Exchange, Query, Fetch, Survey)) for m in messages)
        self.hear(due if hears is None else hears, over)

    def hear(self, n: int, over: int = 0) -> None:
        for _ in range(n):
            try:
                self.heard.append((over, *plain(self.lines[over].hear())))
            except ChannelClosed:
                self.heard.append((over, "closed"))

    def held(self) -> None:
        """What the worker keeps, and counts."""
        worker = self.worker.seat.worker
        for part in LENGTHS:
            for number in (0, 1):
                self.say(Fetch(3, 9, number, part, 0, LENGTHS[part]), over=-1)
        self.heard.append(worker and dataclasses.astuple(worker.counters))

    def close(self) -> None:
        for line in self.lines:
            line.close()


def cut(message: Any, *places: int) -> Iterator[bytes]:
    data = frame(message)
    for lo, hi in zip((0, *places), (*places, len(data)), strict=True):
        yield data[lo:hi]


def in_pieces(talk: Talk, message: Any, *places: int, over: int = 0) -> None:
    for piece in cut(message, *places):
        talk.say(piece, over=over)
        time.sleep(0.02)
    talk.hear(1, over)


def batch(*messages: Any) -> Callable[[Talk], None]:
    """A decode batch is announced, and these messages follow, one after the other. What is no request ends it: the
    worker says why, and closes the channel."""

    def tell(talk: Talk) -> None:
        talk.say(decode())
        for message in messages:
            talk.say(message, hears=2 if isinstance(message, (bytes, Fault)) else None)

    return tell


def at_once(talk: Talk) -> None:
    talk.say(decode())
    talk.say(frame(layer(0)) + frame(layer(1)), hears=2)


def byte_by_byte(talk: Talk) -> None:
    talk.say(decode())
    for number in (0, 1):
        talk.say(*(bytes([byte]) for byte in frame(layer(number))), hears=1)


def pieces(*places: int) -> Callable[[Talk], None]:
    def tell(talk: Talk) -> None:
        talk.say(decode())
        in_pieces(talk, layer(0), *places)
        in_pieces(talk, layer(1), *places)

    return tell


def spoilt(at: int, value: bytes) -> Callable[[Talk], None]:
    """The first layer's header says something else."""

    def tell(talk: Talk) -> None:
        talk.say(decode())
        data = frame(layer(0))
        talk.say(data[:at] + value + data[at + len(value) :], hears=2)

    return tell


def half(talk: Talk) -> None:
    talk.say(decode())
    talk.say(frame(layer(0))[:200], hears=0)
    talk.lines[0].end()
    talk.hear(2)


def new_epoch(talk: Talk) -> None:
    """It has a batch of the same number. The old one's layers are refused."""
    talk.say(decode(), layer(0), decode(epoch=2))
    talk.say(layer(1), layer(0), layer(0, epoch=2), layer(1, epoch=2))


def again(talk: Talk) -> None:
    """An announcement that came already, and one of an old epoch with the number of the batch in flight."""
    talk.say(decode(), decode(), layer(0))
    talk.say(decode(epoch=2), decode(epoch=1), layer(0), layer(0, epoch=2), layer(1, epoch=2))


def superseded(over: int) -> Callable[[Talk], None]:
    """The next batch is announced too early, perhaps over another channel."""

    def tell(talk: Talk) -> None:
        talk.say(decode(), layer(0))
        talk.say(decode(batch=3, step=0), over=over)
        talk.say(layer(1))
        talk.say(layer(0, batch=3), layer(1, batch=3), over=over)

    return tell


def two_batches(talk: Talk) -> None:
    talk.say(decode(handles=[1]), decode(batch=3, handles=[2]))
    for number in (0, 1):
        talk.say(layer(number, parts=1), layer(number, batch=3, parts=1))


def two_lines(talk: Talk) -> None:
    """Announced over one, asked over the other, by turns."""
    talk.say(decode())
    talk.say(layer(0), over=1)
    talk.say(layer(1), over=0)
    talk.say(decode(batch=3, step=1), over=1)
    talk.say(layer(0, batch=3), over=0)
    talk.say(layer(1, batch=3), over=1)


def both_halves(number: int) -> Callable[[Talk], None]:
    """One layer's frame comes over two channels at once."""

    def tell(talk: Talk) -> None:
        talk.say(decode(), *(layer(n) for n in range(number)))
        first, rest = cut(layer(number), 300)
        for over in (0, 1):
            talk.say(first, over=over)
        time.sleep(0.02)
        for over in (0, 1):
            talk.say(rest, over=over, hears=1)

    return tell


EARLY = Fresh(1, 2, 0, numbers(7, KEYS), numbers(8, KEYS))
BAD = Fresh(1, 2, 0, numbers(7, KEYS - 1), numbers(8, KEYS - 1))
ASKED = Query(1, 2, 0, numbers(6, QUERIES))
TALKS: dict[str, Callable[[Talk], None]] = {
    "layer by layer": batch(layer(0), layer(1)),
    "both layers at once": at_once,
    "a byte at a time": byte_by_byte,
    "cut in the header": pieces(9, 40),
    "cut in the tensors": pieces(64, 200, 700),
    "the second layer first": batch(layer(1), layer(0)),
    "a layer twice": batch(layer(0), layer(0), layer(1), layer(1)),
    "a layer beyond all": batch(layer(7), layer(0), layer(1)),
    "too few queries": batch(layer(0, q=numbers(1, QUERIES - 1)), layer(0), layer(1)),
    "too many queries": batch(layer(0, q=numbers(1, QUERIES + 1)), layer(0), layer(1)),
    "no queries": batch(layer(0, q=numbers(1, 0)), layer(1)),
    "too few keys": batch(layer(0, k=numbers(1, KEYS - 1), v=numbers(2, KEYS - 1)), layer(1)),
    "too many keys": batch(layer(0, k=numbers(1, 2 * KEYS), v=numbers(2, 2 * KEYS)), layer(1)),
    "wider values": batch(layer(0, v=numbers(2, KEYS, d=2 * D)), layer(1)),
    "queries of another dtype": batch(layer(0, q=numbers(1, QUERIES, torch.bfloat16)), layer(1)),
    "keys of another dtype": batch(
        layer(0, k=numbers(1, KEYS, torch.float16), v=numbers(2, KEYS, torch.float16)), layer(1)
    ),
    "another batch": batch(layer(0, batch=5), layer(0), layer(1)),
    "another epoch": batch(layer(0, epoch=2), layer(0), layer(1)),
    "queries alone, then keys": batch(ASKED, EARLY, layer(1)),
    "keys alone, then queries": batch(EARLY, ASKED, layer(1)),
    "keys that fail, then the next layer": batch(BAD, layer(1), layer(0)),
    "keys that fail, then the same layer": batch(BAD, layer(0), layer(1)),
    "a fetch between the layers": batch(layer(0), Fetch(1, 2, 0, 1, 0, 4), layer(1)),
    "a survey between the layers": batch(layer(0), Survey(1, 2, 0), layer(1)),
    "a part closed between the layers": batch(layer(0), Announcement(1, 3, 2, (Close(2),), ()), layer(1)),
    "operations alone between the layers": batch(layer(0), Announcement(1, 3, 2, (), ()), layer(1)),
    "a reply": batch(layer(0), Fault(1, 2, "no")),
    "a new epoch with the same number": new_epoch,
    "announced again": again,
    "superseded": superseded(0),
    "superseded over another channel": superseded(1),
    "two batches by turns": two_batches,
    "two channels by turns": two_lines,
    "the first layer over two channels at once": both_halves(0),
    "the last layer over two channels at once": both_halves(1),
    "half a frame and the end": half,
    "seconds that a request has not": spoilt(60, struct.pack("<f", 1.0)),
    "NaN seconds": spoilt(60, struct.pack("<f", float("nan"))),
    "counts beside the size": spoilt(36, struct.pack("<I", 7)),
    "more bytes than any frame has": spoilt(12, struct.pack("<Q", 1 << 50)),
    "another version": spoilt(4, b"\xff\xff"),
    "noise": batch(layer(0), random.Random(3).randbytes(300)),
}


def told(way: str, talks: Callable[[Talk], None], transport: str, **options: int) -> list[Any]:
    """All that an engine is answered in a talk, then what is held; another engine's channel is served to the end."""
    with exchanged(way), served(HELD) as worker:
        talk = Talk(worker, transport, **options)
        try:
            talk.say(*opened())
            talks(talk)
            talk.lines.append(Line(worker, transport, 1 << 28))
            talk.held()
            talk.say(decode(epoch=4, batch=1), layer(0, 4, 1), layer(1, 4, 1), over=-1)
            assert worker.failed == []
            return talk.heard
        finally:
            talk.close()


@pytest.mark.parametrize(("talk", "transport"), [(talk, ("unix", "tcp")[n % 2]) for n, talk in enumerate(TALKS)])
def test_an_engine_is_answered_as_by_python(talk: str, transport: str) -> None:
    compiled, python = (told(way, TALKS[talk], transport) for way in EXCHANGES)
    assert compiled == python


@pytest.mark.parametrize("way", EXCHANGES)
def test_a_slowed_worker_sleeps_for_what_each_layer_reads(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, sleep = sum(LENGTHS.values()) + len(LENGTHS), 0.02
    monkeypatch.setattr(AttentionWorker, "read_delay", sleep / read * 1e6)
    with exchanged(way), served(HELD) as worker:
        talk = Talk(worker)
        talk.say(*opened(), decode())
        for number in (0, 1):
            talk.lines[0].tell(frame(layer(number)))
            assert talk.lines[0].hear().seconds >= sleep
        talk.close()


@pytest.mark.parametrize("delay", [0.0, 100.0])
def test_layers_are_answered_without_python(delay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionWorker, "read_delay", delay)
    seen: list[type] = []
    handle = AttentionWorker.handle

    def handles(self: AttentionWorker, request: Any) -> Any:
        seen.append(type(request))
        return handle(self, request)

    monkeypatch.setattr(AttentionWorker, "handle", handles)
    told("compiled", batch(layer(0), layer(1), decode(batch=3, step=1), layer(0, batch=3), layer(1, batch=3)), "unix")
    assert Exchange not in seen
    assert seen.count(Announcement) == 4


# What an engine may make a worker keep.


def many_batches(talk: Talk) -> None:
    parts = range(10, 50)
    opens = tuple(Open(part, 0, (0, 1), 0, 16) for part in parts)
    talk.say(Announcement(1, 2, 2, opens, ()))
    for number, part in enumerate(parts, 3):
        talk.say(Announcement(1, number, 42, (), (Row(part, 0, 1, (0, 1), True),)))
        assert len(talk.worker.seat._served) <= 16
    for at in (0, 1):
        for number in range(3, 43):
            talk.say(layer(at, batch=number, parts=1))


def test_batches_that_an_engine_leaves_open_are_bounded() -> None:
    compiled, python = (told(way, many_batches, "unix") for way in EXCHANGES)
    assert compiled == python


def large_row(talk: Talk) -> None:
    """Its frame is larger than the channel takes."""
    talk.say(Announcement(1, 2, 2, (), (Row(1, 3, 20, (0, 3), False),)))
    talk.say(Query(1, 2, 0, numbers(1, 6 * 20)), hears=2)


def huge_row(talk: Talk) -> None:
    """Its queries would fill all memory, if anybody sent them."""
    talk.say(Announcement(1, 2, 2, (), (Row(1, 3, 1 << 20, (0, 3), False),)))
    talk.say(Query(1, 2, 0, numbers(1, 6)))


@pytest.mark.parametrize(("talk", "max_frame"), [(large_row, 1 << 12), (huge_row, 1 << 28)])
def test_frames_that_are_announced_take_no_more_memory_than_a_channel_would(
    talk: Callable[[Talk], None], max_frame: int
) -> None:
    compiled, python = (told(way, talk, "unix", max_frame=max_frame) for way in EXCHANGES)
    assert compiled == python


# Any bytes at all.


@st.composite
def _anything(draw: st.DrawFn) -> list[tuple[int, bytes]]:
    """Messages of a few batches in any order, over two channels, some of their bytes others, cut anywhere."""
    some = [decode(), decode(batch=3, step=1), decode(2, 1), layer(0), layer(1), layer(0, 1, 3), layer(1, 1, 3),
            layer(0, 2, 1), layer(1, 2, 1), EARLY, ASKED, BAD, Survey(1, 2, 0), Fetch(1, 2, 0, 1, 0, 2),
            Announcement(1, 4, 2, (Close(1),), ())]  # fmt: skip
    told = []
    for message in draw(st.lists(st.sampled_from(some), min_size=1, max_size=10)):
        data = bytearray(frame(message))
        for at, byte in draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=2)):
            if draw(st.booleans()):
                data[at % min(len(data), 64 if at % 2 else 10**6)] = byte
        over, place = draw(st.integers(0, 1)), draw(st.integers(0, len(data)))
        if draw(st.booleans()):
            told += [(over, bytes(data[:place])), (over, bytes(data[place:]))]
        else:
            told.append((over, bytes(data)))
    return told


@pytest.fixture(scope="module")
def shared() -> Iterator[list[Any]]:
    """A worker for many examples, and the epoch of the last one."""
    with exchanged("compiled"), served(HELD) as worker:
        yield [worker, 10]


@pytest.mark.fault("F22")
@settings(max_examples=100)
@given(told=_anything())
def test_any_bytes_harm_nobody_else(shared: list[Any], told: list[tuple[int, bytes]]) -> None:
    worker = shared[0]
    talk = Talk(worker)
    try:
        talk.say(*opened(), hears=0)
        for over, data in told:
            if data:
                try:
                    talk.say(data, over=over)
                except (ChannelClosed, OSError):  # its session is over
                    continue
        for line in talk.lines:
            line.end()
        for _ in talk.lines:  # a survey among what was told would end everybody's batches
            worker.over.get(timeout=20)
        shared[1] += 1
        epoch, parts = shared[1] << 40, (2 * shared[1] + 10**9, 2 * shared[1] + 10**9 + 1)
        line = Line(worker, "unix", 1 << 28)
        talk.lines.append(line)
        line.tell(frame(Survey(epoch - 1, 1, 0)))
        surveyed = line.hear()
        opens = tuple(Open(part, 0, (0, 1), 0, 16) for part in parts)
        closes = tuple(Close(part.handle) for part in surveyed.parts)
        rows = tuple(Row(part, 0, 1, (0, 1), True) for part in parts)
        line.tell(frame(Announcement(epoch, 1, surveyed.next_operation, (*closes, *opens), rows)))
        announced = line.hear()
        assert isinstance(announced, Announced)
        assert announced.accepted
        for number in (0, 1):
            sent = layer(number, epoch, 1)
            line.tell(frame(sent))
            attended = line.hear()
            assert isinstance(attended, Attended)
            torch.testing.assert_close(attended.out.view(2, 2, 3, D), sent.v.view(2, 2, 1, D).expand(2, 2, 3, D))
        assert worker.failed == []
        line.end()
        worker.over.get(timeout=20)
    finally:
        talk.close()
