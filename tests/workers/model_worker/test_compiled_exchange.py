"""A layer's exchange by compiled code, against a peer that breaks every rule: what Python says of it, compiled code
says in the same words, and the other holder's answers stay in step."""

from __future__ import annotations

import dataclasses
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_servers import process, until
from dense_holders import CONFIG, HEADS, D, Holder, Model, route
from exchange_peers import EXCHANGES, Peer, exchanged, frame, hello, port_over, served, sockets
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import crossing

from lamina_protocols.channels.control import FAREWELL
from lamina_protocols.channels.sockets import SocketChannel
from lamina_protocols.errors import LaminaError
from lamina_protocols.messages.messages import Announced, Announcement, Attended, Fault, Fresh, Open, Reply, Row
from lamina_protocols.messages.routes import Route, Span
from lamina_workers.errors import HolderLost
from lamina_workers.model_worker.attention_merge import AttentionMerge
from lamina_workers.model_worker.interface import Waiting, result
from lamina_workers.model_worker.layer_slices import Waits
from lamina_workers.ports.port import Replies
from lamina_workers.ports.remote import RemoteAttention, SeatOptions, connect

SPANS = (Span(20, 1), Span(7, 1), Span(33, 1))
OLD, BATCH, NEXT, OTHER = 1, 5, 6, 7
EPOCH = 2


def by_heads(spans: Sequence[Span]) -> list[list[Route]]:
    """Decode: each holder stores the token of its heads and attends it with the rest."""
    return [[route(i, span, [head], (0, span.start + 1)) for i, span in enumerate(spans)] for head in (0, 1)]


class Pair:
    """A model and two holders behind sockets, by heads. The second one's answers are bent, in one layer of batch 5."""

    def __init__(
        self, transport: str, bend: Callable[[Attended], Sequence[Any]], layer: int = 0, patience: float = 20.0
    ):
        self.model = Model(SPANS, sinks=True)
        self.routes = by_heads(SPANS)
        self.merge = AttentionMerge(CONFIG, patience=patience)
        self._bend, self._layer = bend, layer
        self._transport = transport
        self.lost = False  # whether the second holder was, before it was mended
        self.peers: list[Peer] = []
        self.ports: list[RemoteAttention] = []
        self.replies = [self._holder(0, lambda reply: [frame(reply)]), self._holder(1, self._bent)]

    def _holder(self, number: int, bend: Callable[[Reply], Sequence[Any]]) -> Replies:
        near, far = sockets(self._transport)
        self.peers.append(Peer(far, Holder(self.model, self.routes[number]), bend))
        port = port_over(SocketChannel(near, False), CONFIG, "ab"[number])
        port.due = 1  # another batch was asked about before
        self.ports.append(port)
        replies = Replies(port)
        for batch in (BATCH, NEXT, OTHER):
            replies.expect(EPOCH, batch)
        return replies

    def _bent(self, reply: Reply) -> Sequence[Any]:
        if isinstance(reply, Attended) and (reply.batch, reply.layer) == (BATCH, self._layer):
            return self._bend(reply)
        return [frame(reply)]

    def run(self, batch: int = BATCH, suspends: bool = False) -> torch.Tensor:
        routes = dict(zip(self.replies, self.routes, strict=True))
        try:
            return result(self.merge.run(self.model.forward(), EPOCH, batch, self.model.spans, routes, suspends))
        finally:
            for replies in self.replies:
                replies.forget(batch)

    def mend(self) -> None:
        """The second holder is gone; another one is there."""
        self.lost = self.ports[1].closed
        self.ports[1].close()
        self.replies[1] = self._holder(1, lambda reply: [frame(reply)])

    def close(self) -> None:
        for port in self.ports:
            port.close()
        for peer in self.peers:
            peer.close()


@dataclasses.dataclass
class Bent:
    """What a holder answers in place of `reply`."""

    reply: Attended

    @property
    def bytes(self) -> bytes:
        return frame(self.reply)

    def but(self, **changes: Any) -> bytes:
        return frame(dataclasses.replace(self.reply, **changes))

    def seconds(self, value: float) -> bytes:
        """With any number of seconds, which no codec would write."""
        return self.bytes[:60] + struct.pack("<f", value) + self.bytes[64:]

    def head(self, at: int, value: bytes) -> bytes:
        return self.bytes[:at] + value + self.bytes[at + len(value) :]


NOISE = random.Random(5).randbytes(300)
HARMLESS: dict[str, Callable[[Bent], list[Any]]] = {
    "as it is": lambda x: [x.bytes],
    "a byte at a time": lambda x: [bytes([byte]) for byte in x.bytes],
    "cut in the prefix": lambda x: [x.bytes[:9], 0.03, x.bytes[9:]],
    "cut in the header": lambda x: [x.bytes[:63], 0.03, x.bytes[63:]],
    "cut behind the header": lambda x: [x.bytes[:64], 0.03, x.bytes[64:]],
    "cut in the tensors": lambda x: [x.bytes[:200], 0.03, x.bytes[200:-1], 0.03, x.bytes[-1:]],
    "behind another batch's": lambda x: [frame(Announced(EPOCH, OTHER, True, (3,), (0,) * 3)), x.bytes],
    "behind an unknown batch's": lambda x: [x.but(batch=77), x.bytes],
    "behind an old epoch's": lambda x: [x.but(epoch=OLD), x.bytes],
    "behind another batch's fault": lambda x: [frame(Fault(EPOCH, 77, "long ago")), x.bytes],
}
SILENT = {
    "nothing",
    "half a prefix",
    "half a header",
    "half a frame",
    "all but a byte",
    "a little noise",
    "an old epoch",
    "another batch",
}
"""Those of FATAL that only the deadline ends: it must be short, but longer than a busy machine lets a peer wait."""
FATAL: dict[str, Callable[[Bent], list[Any]]] = {
    "nothing": lambda x: [],
    "half a prefix": lambda x: [x.bytes[:7]],
    "half a header": lambda x: [x.bytes[:40]],
    "half a frame": lambda x: [x.bytes[:200]],
    "all but a byte": lambda x: [x.bytes[:-1]],
    "the end": lambda x: [None],
    "half a prefix and the end": lambda x: [x.bytes[:7], None],
    "half a header and the end": lambda x: [x.bytes[:40], None],
    "half a frame and the end": lambda x: [x.bytes[:200], None],
    "another batch": lambda x: [x.but(batch=NEXT)],
    "an old epoch": lambda x: [x.but(epoch=OLD)],
    "another layer": lambda x: [x.but(layer=1 - x.reply.layer)],
    "a layer beyond all": lambda x: [x.but(layer=99)],
    "too few vectors": lambda x: [x.but(out=x.reply.out[1:], lse=x.reply.lse[1:])],
    "too many vectors": lambda x: [x.but(out=x.reply.out.repeat(2, 1), lse=x.reply.lse.repeat(2))],
    "no vectors": lambda x: [x.but(out=x.reply.out[:0], lse=x.reply.lse[:0])],
    "wider vectors": lambda x: [x.but(out=x.reply.out.repeat(1, 2))],
    "another size, the same header": lambda x: [x.head(16, struct.pack("<I", 45))],
    "more than fits": lambda x: [x.head(12, struct.pack("<IQ", 44, 1 << 40))],
    "counts beside the size": lambda x: [x.head(36, struct.pack("<I", 7))],
    "keys that it has not": lambda x: [x.head(40, struct.pack("<I", 7))],
    "an unknown dtype": lambda x: [x.head(48, b"\x09")],
    "NaN seconds": lambda x: [x.seconds(float("nan"))],
    "endless seconds": lambda x: [x.seconds(float("inf"))],
    "seconds below zero": lambda x: [x.seconds(-1.0)],
    "another version": lambda x: [x.head(4, b"\xff\xff")],
    "noise": lambda x: [NOISE],
    "a little noise": lambda x: [NOISE[:10]],
    "noise behind half a frame": lambda x: [x.bytes[:100], NOISE, None],
    "a fault": lambda x: [frame(Fault(EPOCH, BATCH, "no such part"))],
    "a farewell": lambda x: [frame(Fault(*FAREWELL, "it is over"))],
    "a request": lambda x: [frame(Fresh(EPOCH, BATCH, 0, torch.zeros(3, D), torch.zeros(3, D)))],
    "an announcement's answer": lambda x: [frame(Announced(EPOCH, BATCH, True, (3,), (0,) * 3))],
}


def outcome(
    transport: str, bend: Callable[[Bent], Sequence[Any]], layer: int, suspends: bool, patience: float = 20.0
) -> tuple[str, str]:
    """How a batch ends: "" or the error and its words. Afterwards the holder that did no harm goes on."""
    pair = Pair(transport, lambda reply: bend(Bent(reply)), layer, patience)
    try:
        try:
            torch.testing.assert_close(pair.run(suspends=suspends), pair.model.dense(), atol=2e-5, rtol=1e-5)
            ended = "", ""
        except LaminaError as error:
            ended = type(error).__name__, str(error)
            gone = isinstance(error, HolderLost)
            pair.mend()
        if ended[0]:
            assert pair.lost == gone
        assert not pair.ports[0].closed
        torch.testing.assert_close(pair.run(NEXT), pair.model.dense(), atol=2e-5, rtol=1e-5)
        return ended
    finally:
        pair.close()


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Reply]:
    """The replies that Python has read."""
    read: list[Reply] = []
    plain = RemoteAttention.receive

    def receive(self: RemoteAttention, timeout: float | None = None) -> Reply:
        read.append(plain(self, timeout))
        return read[-1]

    monkeypatch.setattr(RemoteAttention, "receive", receive)
    return read


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("suspends", [False, True])
def test_a_batch_is_exchanged_without_python(transport: str, suspends: bool, received: list[Reply]) -> None:
    with exchanged("compiled"):
        assert outcome(transport, lambda x: [x.bytes], 0, suspends) == ("", "")
    assert received == []


@crossing(way=EXCHANGES, transport=("unix", "tcp"), suspends=(False, True), bend=tuple(HARMLESS))
def test_pieces_and_what_belongs_to_others_change_nothing(way: str, transport: str, suspends: bool, bend: str) -> None:
    with exchanged(way):
        assert outcome(transport, HARMLESS[bend], 1, suspends) == ("", "")


@pytest.mark.parametrize(("transport", "suspends"), [("unix", False), ("tcp", True)])
@pytest.mark.parametrize("bend", FATAL)
def test_what_a_holder_must_not_answer_is_told_in_the_same_words(transport: str, suspends: bool, bend: str) -> None:
    ends, patience = {}, 0.5 if bend in SILENT else 20.0
    for way in EXCHANGES:
        with exchanged(way):
            ends[way] = outcome(transport, FATAL[bend], 1, suspends, patience)
    assert ends["compiled"] == ends["python"]
    assert ends["compiled"][0] in ("HolderLost", "HolderFault")


_cut = st.integers(0, 10**6)
_byte = st.tuples(_cut, st.integers(0, 255))


@st.composite
def _spoilt(draw: st.DrawFn) -> Callable[[Bent], list[Any]]:
    """Some frames, whole or in part, some of whose bytes are others, in pieces; then the end."""
    kinds = draw(st.lists(st.sampled_from(["answer", "answer", "next", "fault", "noise"]), min_size=1, max_size=3))
    spoilt = draw(st.lists(_byte, max_size=3))
    cuts = draw(st.lists(_cut, max_size=4))
    length = draw(st.one_of(st.none(), _cut))

    def bend(x: Bent) -> list[Any]:
        made = {"answer": x.bytes, "next": x.but(layer=x.reply.layer + 1), "noise": NOISE[:77]}
        data = bytearray(b"".join(made.get(kind) or frame(Fault(EPOCH, BATCH, "no")) for kind in kinds))
        for at, byte in spoilt:
            data[at % len(data) if at % 3 else at % min(64, len(data))] = byte
        if length is not None:
            del data[length % len(data) :]
        places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
        return [bytes(data[lo:hi]) for lo, hi in pairwise(places)] + [None]

    return bend


@settings(max_examples=60)
@given(bend=_spoilt(), layer=st.integers(0, 1), suspends=st.booleans())
def test_any_bytes_end_as_they_do_in_python(bend: Callable[[Bent], list[Any]], layer: int, suspends: bool) -> None:
    ends = []
    for way in EXCHANGES:
        with exchanged(way):
            pair = Pair("unix", lambda reply: bend(Bent(reply)), layer, patience=20.0)
            try:
                ends.append(("", pair.run(suspends=suspends).nan_to_num(1e9).tolist()))
            except LaminaError as error:
                ends.append((type(error).__name__, str(error)))
            finally:
                pair.close()
    assert ends[0] == ends[1]


def test_no_frame_of_a_batch_leaves_where_a_holder_is_gone_before_its_first_layer() -> None:
    """The memory of the other holder's frame was sent as it was, and its answer was taken for one too many: that holder
    was let go too."""
    with exchanged("compiled"):
        pair = Pair("unix", lambda reply: [frame(reply)])
        try:
            pair.ports[1].channel.close()
            with pytest.raises(HolderLost):
                pair.run()
            pair.ports[0].send(Announcement(EPOCH + 1, NEXT, 0, (), ()))
            assert isinstance(pair.ports[0].receive(20), Announced)
        finally:
            pair.close()


# Errors that come while a batch is suspended.


def suspended(pair: Pair, batch: int) -> Iterator[Waiting]:
    routes = dict(zip(pair.replies, pair.routes, strict=True))
    return pair.merge.run(pair.model.forward(), EPOCH, batch, pair.model.spans, routes, True)


@pytest.mark.parametrize("way", EXCHANGES)
def test_a_fault_that_another_batch_reads_is_raised_when_its_own_goes_on(way: str) -> None:
    """Both wait; the run of the second reads the first one's fault off the channel."""
    told = threading.Event()

    def bend(reply: Attended) -> list[Any]:
        told.wait(10)
        return [frame(Fault(EPOCH, BATCH, "no such part"))]

    with exchanged(way):
        pair = Pair("unix", bend, 0, patience=20.0)
        try:
            first, second = suspended(pair, BATCH), suspended(pair, NEXT)
            waiting = next(first)
            while waiting.over():  # the other holder's answer
                waiting = next(first)
            next(second)
            told.set()
            torch.testing.assert_close(result(second), pair.model.dense(), atol=2e-5, rtol=1e-5)
            began = time.monotonic()
            assert waiting.over()
            assert waiting.over()  # to ask changes nothing
            with pytest.raises(LaminaError, match="b: no such part"):
                result(first)
            assert time.monotonic() - began < 10
        finally:
            pair.close()


@pytest.mark.parametrize("way", EXCHANGES)
def test_a_suspended_batch_says_which_holder_it_waits_for(way: str) -> None:
    """Once the first one had answered, it still named that one: whatever watched its channel slept for ten seconds
    while the second one's answer lay there."""
    told = threading.Event()

    def bend(reply: Attended) -> list[Any]:
        told.wait(20)
        return [frame(reply)]

    with exchanged(way):
        pair = Pair("unix", bend, 0, patience=60.0)
        waits = Waits()
        try:
            run = suspended(pair, BATCH)
            waiting = next(run)
            while waiting.replies is not pair.replies[1]:
                until(waiting.over)
                waiting = next(run)
            assert not waiting.over()
            told.set()
            assert waits.until_any([waiting], 20.0)
            torch.testing.assert_close(result(run), pair.model.dense(), atol=2e-5, rtol=1e-5)
        finally:
            told.set()
            pair.close()


@pytest.mark.parametrize("way", EXCHANGES)
def test_a_suspended_batch_does_not_wait_for_half_a_frame(way: str) -> None:
    with exchanged(way):
        pair = Pair("unix", lambda reply: [frame(reply)[:30]], 0, patience=20.0)
        try:
            run = suspended(pair, BATCH)
            waiting = next(run)
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline:
                began = time.monotonic()
                if waiting.over():
                    waiting = next(run)
                assert time.monotonic() - began < 10
                time.sleep(0.01)
            run.close()
        finally:
            pair.close()


# Time.


def test_a_silent_holder_is_lost_at_its_deadline_where_the_one_before_it_answers_late() -> None:
    """A suspended batch waited for each holder anew: a silent one had its time again after every slow answer."""
    told = threading.Event()

    def late(reply: Reply) -> list[Any]:
        told.wait(20)
        return [frame(reply)]

    with exchanged("compiled"):
        pair = Pair("unix", lambda reply: [], 0, patience=0.3)
        pair.peers[0]._bend = late
        try:
            run = suspended(pair, BATCH)
            waiting = next(run)
            assert waiting.replies is pair.replies[0]
            time.sleep(0.4)  # past the deadline of both
            told.set()
            assert select.select([pair.ports[0].channel.watch(lambda: None)], [], [], 20.0)[0]
            assert waiting.over()
            with pytest.raises(HolderLost, match=r"attention worker b .*no reply within 0\.3 seconds"):
                next(run)
            assert not pair.ports[0].closed
        finally:
            told.set()
            pair.close()


@pytest.mark.parametrize("way", EXCHANGES)
@pytest.mark.parametrize("how", ["close", "heartbeat"])
def test_a_call_that_waits_ends_when_another_thread_closes_the_port(way: str, how: str) -> None:
    with exchanged(way):
        pair = Pair("unix", lambda reply: [frame(reply)[:100]], 0, patience=60.0)
        port = pair.ports[1]
        try:
            if how == "heartbeat":
                port = port_over(port.channel, CONFIG, "b", lease=1.0)
                pair.ports.append(port)
                pair.replies[1] = Replies(port)
                pair.replies[1].expect(EPOCH, BATCH)
                threading.Timer(0.2, lambda: setattr(port._client, "state", "ended")).start()
            else:
                threading.Timer(0.2, port.close).start()
            began = time.monotonic()
            said = "closed on this side" if how == "close" else "the worker has ended the session"
            with pytest.raises(HolderLost, match=said):
                pair.run()
            assert time.monotonic() - began < 20
        finally:
            pair.close()


PATHS = "import sys\nsys.path[:0] = {paths!r}\n"
INTERRUPTED = """
import signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it is ignored
from test_compiled_exchange import Pair, frame
from exchange_peers import exchanged
with exchanged("{way}"):
    pair = Pair("unix", lambda reply: [frame(reply)[:100]], 0, patience=100.0)
    threading.Timer(1.0, lambda: print("waiting", flush=True)).start()
    try:
        pair.run()
    except KeyboardInterrupt:
        pair.close()  # nothing is held by who was interrupted
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("way", EXCHANGES)
def test_ctrl_c_interrupts_a_call_that_waits(way: str) -> None:
    script = PATHS.format(paths=[os.path.dirname(__file__), *filter(None, sys.path)]) + INTERRUPTED.format(way=way)
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        began = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "interrupted\n"
        assert time.monotonic() - began < 20
    finally:
        child.kill()
        child.communicate()


def state_of(process: int) -> str:
    """The letter by which the system calls a process's state."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.real
@crossing(way=EXCHANGES, blow={"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}, channel=("local", "tcp"))
def test_a_worker_that_dies_between_two_layers_is_lost_in_time(way: str, blow: signal.Signals, channel: str) -> None:
    model = Model((Span(0, 1),))
    (routes,) = [[route(0, span, (0, 1), (0, 1)) for span in model.spans]]
    with exchanged(way), process("--kv-memory", str(1 << 24)) as child:
        address = child.stdout.readline().split()[1]
        asked = hello(CONFIG)
        port = connect(address, "b", CONFIG, "float32", asked.model, SeatOptions())
        replies = Replies(port)
        replies.expect(1, 1)
        port.send(Announcement(1, 1, 0, (Open(0, 0, (0, 1), 0, 100),), (Row(0, 0, 1, (0, 1), True),)))
        assert replies.take(Announced, 1).accepted

        began = time.monotonic()
        merge = AttentionMerge(CONFIG, patience=1.0)
        whole = model.forward()

        def dying() -> Iterator[Any]:
            event = next(whole)
            try:
                while True:
                    if getattr(event, "layer", 0) == 1 and hasattr(event, "q"):
                        child.send_signal(blow)
                        until(lambda: state_of(child.pid) in "TZ")
                    event = whole.send((yield event))
            except StopIteration as stop:
                return stop.value

        with pytest.raises(HolderLost) as error:
            result(merge.run(dying(), 1, 1, model.spans, {replies: routes}, False))
        if blow is signal.SIGSTOP:
            assert "no reply within 1" in str(error.value)
        assert time.monotonic() - began < 20
        port.close()


# Sockets that are full on both sides.


@pytest.mark.parametrize("way", EXCHANGES)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_large_frames_through_little_room_do_not_wait_for_each_other(way: str, transport: str) -> None:
    """Two batches in flight: the worker sends one's answers while the model sends the other's queries."""
    spans, batches, outputs = tuple(Span(0, 1) for _ in range(400)), (1, 2), {}
    models = {batch: Model(spans, batch) for batch in batches}
    config = dataclasses.replace(CONFIG, kv_memory=1 << 25)
    with exchanged(way), served(config) as worker:
        near, far = sockets(transport, small=True)
        worker.add(SocketChannel(far, False))
        port = port_over(SocketChannel(near, False), config)
        replies, merge = Replies(port), AttentionMerge(config, patience=60.0)
        runs = []
        for batch, model in models.items():
            replies.expect(1, batch)
            rows = [route(i, span, (0, 1), (0, 1)) for i, span in enumerate(spans)]
            moved = [
                each._replace(row=dataclasses.replace(each.row, handle=1000 * batch + each.source)) for each in rows
            ]
            opens = tuple(Open(each.row.handle, 0, (0, 1), 0, 16) for each in moved)
            port.send(Announcement(1, batch, 400 * (batch - 1), opens, tuple(each.row for each in moved)))
            assert replies.take(Announced, batch, None, 30.0).accepted
            runs.append((batch, merge.run(model.forward(), 1, batch, model.spans, {replies: moved}, True)))

        def drive() -> None:
            left = dict(runs)
            while left:
                for batch, run in list(left.items()):
                    try:
                        next(run)
                    except StopIteration as stop:
                        outputs[batch] = stop.value
                        del left[batch]

        thread = threading.Thread(target=drive, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        port.close()
    for batch, model in models.items():
        torch.testing.assert_close(outputs[batch], model.dense(), atol=2e-5, rtol=1e-5)


def test_the_dense_model_has_the_shapes_that_bent_answers_count_on() -> None:
    assert HEADS * len(SPANS) // 2 == 9
