"""What model worker 0 and those beyond it say to each other: bytes that nobody vouches for, and channels that end."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import struct
import threading
import time
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transports import pair

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import Channel, ChannelClosed
from lamina_protocols.channels.sockets import connect_unix
from lamina_protocols.channels.versions import FEATURES, HEARTBEAT, PREVIOUS, PREVIOUS_RELEASE, PROTOCOL_VERSION
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames.bounds import MAX_HEADER
from lamina_protocols.frames.frames import LAYOUT
from lamina_protocols.messages import messages as m
from lamina_protocols.messages.layers import ColdTier, HolderConfig, LayerSpec
from lamina_protocols.messages.routes import HolderBatch, Route, Span
from lamina_workers.decoder.logprobs import PromptTokens
from lamina_workers.decoder.sampler import RowSampling
from lamina_workers.errors import HolderFault, HolderLost, RankLost
from lamina_workers.model_worker.interface import BatchWork, Waiting
from lamina_workers.model_worker.kv_copy import Move
from lamina_workers.parallel import peer_messages
from lamina_workers.parallel.peer_worker import PeerWorker
from lamina_workers.parallel.peers import UNIX, Peer, PeerListener, beats_secret
from lamina_workers.parallel.tensor_parallel import TensorParallelWorkers

HOLDER = HolderConfig(
    (LayerSpec(0, 4, 2, 16, 16, 0.25, policies=("full", "full")),), 16, "float32", 1 << 20, cold=ColdTier("/d", 0.5)
)
BEGIN = peer_messages.Begin(
    1, 2, "/a/folder", "abc", "", "float32", True, "int8", "cpu", "cpu", False, 1, HOLDER, 10.0,
    "ab" * 16, 60.0, True, "grpc",
    10.0, 3,
)  # fmt: skip
SHARE = HolderBatch(
    7,
    (m.Open(1, 0, (0, 1), 0, 512), m.Fork(2, 1, 33), m.Close(1)),
    (Route(0, (0, 1), m.Row(2, 33, 4, (0, 33), True), (33, 37)), Route(1, (1,), m.Row(3, 0, 1, None, True), (0, 0))),
)
ANNOUNCED = m.Announced(2, 5, True, (90,), (0, 3), usages=(m.Usage(1, 2, 0.5, 3, 0.1, 4, 5, 3, 0.25),))
WORK = BatchWork(
    (Span(33, 4), Span(0, 1)), (37, 1), (5, 6, 7, 8, 2**40), (3, 4), (RowSampling(), RowSampling()),
    (PromptTokens(0, 33, 3, (6, 7, 8), 2), PromptTokens(4, 0, 1)),
)  # fmt: skip
MESSAGES: list[Any] = [
    peer_messages.Hello("model-1", 3, "1.2"),
    peer_messages.Progress("loading", 1, 20),
    peer_messages.Ready("cpu"),
    peer_messages.Failed("DeviceError", "no GPU"),
    peer_messages.Joined(4, 1 << 30, True),
    peer_messages.Answers(5, {4: ANNOUNCED, 6: dataclasses.replace(ANNOUNCED, accepted=False, reason="no room")}),
    peer_messages.Copied(5, False),
    peer_messages.SeatSurveyed(4, m.Surveyed(0, 1, 9, 12, (m.PartHeld(3, 0, (0,), 0, 512, 77, 16),))),
    peer_messages.LeftGroup(),
    peer_messages.JoinedGroup(3, "nobody came"),
    peer_messages.Beat(),
    peer_messages.BatchFailed(5, "it is gone", (4, 6), True),
    BEGIN,
    peer_messages.Join(4, "attention-0", "h:1", 1, 1, 3, b"ca", b"cert", b"key", "token"),
    peer_messages.Leave(4),
    peer_messages.Announce(5, True, {4: SHARE, 6: HolderBatch(0, (), ())}),
    peer_messages.Drop(5),
    peer_messages.Copy(5, (Move(*range(len(Move._fields) - 3), True, 1, True),), {4: SHARE}),
    peer_messages.BeginEpoch(8),
    peer_messages.SurveySeat(4),
    peer_messages.LeaveGroup(),
    peer_messages.JoinGroup(3, "/tmp/x/group", "127.0.0.1", 0, 30.0),
    peer_messages.Stop(),
]


def frame(message: Any) -> bytearray:
    return bytearray(b"".join(peer_messages.encode(message)))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_message_comes_back_as_it_was(message: Any) -> None:
    assert peer_messages.decode(frame(message)) == message


def test_work_comes_back_without_its_sampling() -> None:
    command = peer_messages.decode(frame(peer_messages.execute(5, WORK)))
    assert isinstance(command, peer_messages.Execute)
    assert command.batch == 5
    assert peer_messages.work_of(command) == dataclasses.replace(WORK, sampling=())


def test_logits_come_back_to_the_bit() -> None:
    logits = torch.randn(3, 101)
    back = peer_messages.decode(frame(peer_messages.Chosen(5, 0.5, 0.25, (7,), logits)))
    assert isinstance(back, peer_messages.Chosen)
    assert torch.equal(back.logits, logits)


@pytest.mark.parametrize(
    "change",
    [
        {"spans": (Span(33, 4),)},
        {"spans": (Span(33, 4), Span(0, 2))},
        {"prompts": (37,)},
        {"token_ids": (5, 6, 7, 8)},
        {"sampled": (-1,)},
        {"sampled": (5,)},
        {"scored": (PromptTokens(2, 0, 4),)},
        {"scored": (PromptTokens(0, 0, 3, (1, 2)),)},
    ],
    ids=str,
)
def test_work_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    command = dataclasses.replace(peer_messages.execute(5, WORK), **change)
    with pytest.raises(ProtocolError):
        peer_messages.work_of(typing.cast(peer_messages.Execute, peer_messages.decode(frame(command))))


def test_secrets_are_not_shown() -> None:
    shown = repr(peer_messages.Join(1, "a", "h:1", key=b"a private key", token="a token"))
    assert "a private key" not in shown
    assert "a token" not in shown


def test_too_large_a_message_is_refused_by_who_sends_it() -> None:
    routes = tuple(Route(at, (0,), m.Row(at, 2**40, 1, (0, 2**40), True), (0, 0)) for at in range(MAX_HEADER // 16))
    with pytest.raises(ProtocolError, match="Announce too large"):
        peer_messages.encode(peer_messages.Announce(1, True, {1: HolderBatch(0, (), routes)}))


@given(st.sampled_from([frame(message) for message in MESSAGES]), st.data())
def test_any_changed_byte_is_a_message_or_refused(good: bytearray, data: st.DataObject) -> None:
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        peer_messages.decode(bad)


@given(st.integers(95, 140), st.binary(max_size=200), st.binary(max_size=64))
def test_any_bytes_are_a_message_or_refused(tag: int, header: bytes, payload: bytes) -> None:
    prefix = struct.pack("<4sHHIQ", b"LMNA", LAYOUT, tag, len(header), len(payload))
    with contextlib.suppress(ProtocolError):
        peer_messages.decode(bytearray(prefix + header + payload))


@given(st.sampled_from([frame(message) for message in MESSAGES]), st.data())
def test_a_cut_frame_is_refused(good: bytearray, data: st.DataObject) -> None:
    with pytest.raises(ProtocolError):
        peer_messages.decode(good[: data.draw(st.integers(0, len(good) - 1))])


# Channels.


class Rig:
    """A listener, and processes of it that a test plays."""

    def __init__(self, lost_after: float = 10.0) -> None:
        self.ready: queue.SimpleQueue[Peer] = queue.SimpleQueue()
        self.failed: queue.SimpleQueue[tuple[int, peer_messages.Failed]] = queue.SimpleQueue()
        self.given_up: list[str] = []
        self.progress: list[tuple[int, str, int, int]] = []
        self.channels: list[Channel] = []
        self.listener = PeerListener(
            lambda rank: dataclasses.replace(BEGIN, rank=rank, lost_after=lost_after),
            self.ready.put,
            lambda rank, said: self.failed.put((rank, said)),
            self.given_up.append,
            lambda *done: self.progress.append(done),
        )

    def connect(self, secret: bytes) -> Channel:
        channel = connect_unix(self.listener.address.removeprefix(UNIX), secret, 5.0)
        self.channels.append(channel)
        return channel

    def peer(self, rank: int = 1, name: str = "model-1") -> tuple[Peer, Channel]:
        """One that is ready, and its own end."""
        channel = self.connect(self.listener.invite(rank, name))
        greet(channel, name)
        assert peer_messages.receive(channel, 5.0) == dataclasses.replace(BEGIN, rank=rank)
        peer_messages.send(channel, peer_messages.Ready("cpu"))
        return self.ready.get(timeout=5.0), channel


def greet(channel: Channel, name: str, protocol: int = PROTOCOL_VERSION) -> None:
    peer_messages.send(channel, peer_messages.Hello(name, protocol, control.package_version()))


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    for channel in rig.channels:
        channel.close()
    rig.listener.close()


def test_who_is_invited_loads_and_becomes_ready(rig: Rig) -> None:
    channel = rig.connect(rig.listener.invite(3, "model-3"))
    greet(channel, "model-3")
    begin = peer_messages.receive(channel, 5.0)
    assert isinstance(begin, peer_messages.Begin)
    assert begin.rank == 3
    peer_messages.send(channel, peer_messages.Progress("loading", 1, 2))
    peer_messages.send(channel, peer_messages.Ready("cuda:3"))
    peer = rig.ready.get(timeout=5.0)
    assert (peer.rank, peer.name, peer.said.device, peer.closed) == (3, "model-3", "cuda:3", False)
    assert rig.progress == [(3, "loading", 1, 2)]


def test_a_secret_is_good_once_and_only_the_right_one(rig: Rig) -> None:
    secret = rig.listener.invite(1, "model-1")
    with pytest.raises(ChannelClosed):
        rig.connect(bytes(32))
    greet(rig.connect(secret), "model-1")
    time.sleep(0.1)
    with pytest.raises(ChannelClosed):
        rig.connect(secret)
    revoked = rig.listener.invite(1, "model-1.1")
    rig.listener.revoke("model-1.1")
    with pytest.raises(ChannelClosed):
        rig.connect(revoked)


@pytest.mark.parametrize(
    ("hello", "why"),
    [(("model-2",), "expected the Hello of model-1"), (("model-1", PROTOCOL_VERSION - 2), "protocol version")],
)
def test_who_is_somebody_else_does_not_begin(rig: Rig, hello: tuple[Any, ...], why: str) -> None:
    channel = rig.connect(rig.listener.invite(1, "model-1"))
    greet(channel, *hello)
    rank, said = rig.failed.get(timeout=5.0)
    assert rank == 1
    assert why in said.reason
    with pytest.raises(ChannelClosed):
        peer_messages.receive(channel, 5.0)


def test_a_model_worker_of_the_previous_version_begins_without_what_it_lacks(rig: Rig) -> None:
    channel = rig.connect(rig.listener.invite(1, "model-1"))
    peer_messages.send(channel, peer_messages.Hello("model-1", PREVIOUS, PREVIOUS_RELEASE))
    begin = peer_messages.receive(channel, 5.0)
    assert isinstance(begin, peer_messages.Begin)
    assert begin.features == ()


def test_a_model_worker_greets_its_first_as_that_understands() -> None:
    said = [PeerWorker(Channel, "model-1", protocol=version)._hello() for version in (PREVIOUS, PROTOCOL_VERSION)]  # type: ignore[arg-type]
    assert said[0] == peer_messages.Hello("model-1", PREVIOUS, PREVIOUS_RELEASE)
    assert (said[1].protocol, set(said[1].features)) == (PROTOCOL_VERSION, FEATURES)


def test_who_cannot_load_says_why_and_who_ends_says_nothing(rig: Rig) -> None:
    channel = rig.connect(rig.listener.invite(1, "model-1"))
    greet(channel, "model-1")
    peer_messages.receive(channel, 5.0)
    peer_messages.send(channel, peer_messages.Failed("DeviceError", "device is 'cuda:7'"))
    assert rig.failed.get(timeout=5.0) == (1, peer_messages.Failed("DeviceError", "device is 'cuda:7'"))
    again = rig.connect(rig.listener.invite(1, "model-1.1"))
    greet(again, "model-1.1")
    peer_messages.receive(again, 5.0)
    again.close()
    rank, said = rig.failed.get(timeout=5.0)
    assert (rank, said.kind) == (1, "")


def test_reports_are_sorted_by_batch(rig: Rig) -> None:
    peer, channel = rig.peer()
    for batch in (1, 2):
        peer.expect(batch)
    peer_messages.send(channel, peer_messages.Copied(2, True))
    peer_messages.send(channel, peer_messages.Copied(7, True))  # nobody waits for that
    peer_messages.send(channel, peer_messages.Answers(1, {}))
    assert peer.take(peer_messages.Answers, 1, 5.0) == peer_messages.Answers(1, {})
    assert peer.ready(2)
    assert peer.take(peer_messages.Copied, 2, 5.0).room


def test_a_fault_names_its_batch(rig: Rig) -> None:
    peer, channel = rig.peer()
    peer.expect(1)
    peer_messages.send(channel, peer_messages.BatchFailed(1, "no such part", ()))
    with pytest.raises(HolderFault, match="model worker 1: no such part"):
        peer.take(peer_messages.Answers, 1, 5.0)
    peer_messages.send(channel, peer_messages.BatchFailed(1, "attention-0 is lost", (4,)))
    with pytest.raises(HolderLost):
        peer.take(peer_messages.Answers, 1, 5.0)
    assert peer.lost == {4}
    peer.forget()
    peer_messages.send(channel, peer_messages.BatchFailed(1, "an older batch", ()))
    peer_messages.send(channel, peer_messages.BatchFailed(1, "other ranks", (), alone=True))
    peer_messages.send(channel, peer_messages.LeftGroup())
    assert peer.ask(peer_messages.LeaveGroup(), peer_messages.LeftGroup, 5.0) == peer_messages.LeftGroup()
    assert not peer.closed


@pytest.mark.parametrize(
    "says",
    [
        lambda channel: channel.close(),
        lambda channel: peer_messages.send(channel, peer_messages.Copied(1, True)),
        lambda channel: channel.send([b"no frame at all, but long enough to be one"]),
        lambda channel: None,
    ],
    ids=["closes", "answers something else", "no frame", "nothing"],
)
def test_who_does_not_answer_is_given_up(rig: Rig, says: Callable[[Channel], None]) -> None:
    peer, channel = rig.peer()
    peer.expect(1)
    says(channel)
    with pytest.raises(RankLost, match=r"model worker 1 \(model-1\) is lost"):
        peer.take(peer_messages.Answers, 1, 0.3)
    assert peer.closed
    assert rig.given_up == ["model-1"]
    with pytest.raises(RankLost):
        peer.tell(peer_messages.Stop())
    assert rig.given_up == ["model-1"]


WIDE = peer_messages.Slice(1, 0, False, torch.zeros(1 << 22), torch.empty(0))  # more than any buffer takes


@pytest.mark.fault("F04")
def test_who_does_not_read_a_command_is_given_up(rig: Rig) -> None:
    """The engine's thread waited without an end for room in the socket's buffer."""
    peer, _ = rig.peer()
    with pytest.raises(RankLost, match=r"a frame was not read within 0\.3 seconds"):
        peer.tell(WIDE, 0.3)
    assert peer.closed
    assert rig.given_up == ["model-1"]


@pytest.mark.fault("F04")
@pytest.mark.parametrize("waits", ["tells", "takes"])
def test_whose_heartbeats_cease_is_given_up_and_wakes_who_waits_for_it(waits: str) -> None:
    rig = Rig(lost_after=1.0)
    try:
        secret = rig.listener.invite(1, "model-1")
        with pytest.raises(ChannelClosed):  # no process of that name has come
            rig.connect(beats_secret(secret))
        channel = rig.connect(secret)
        greet(channel, "model-1")
        peer_messages.receive(channel, 5.0)
        peer_messages.send(channel, peer_messages.Ready("cpu"))
        peer = rig.ready.get(timeout=5.0)
        beats = rig.connect(beats_secret(secret))
        for _ in range(4):
            peer_messages.send(beats, peer_messages.Beat())
            time.sleep(0.3)
        assert not peer.closed
        with pytest.raises(ChannelClosed):
            rig.connect(beats_secret(secret))
        peer.expect(1)
        with pytest.raises(RankLost, match="no heartbeat for 1 s"):
            peer.tell(WIDE, 60.0) if waits == "tells" else peer.take(peer_messages.Answers, 1, 60.0)
        assert rig.given_up == ["model-1"]
    finally:
        for channel in rig.channels:
            channel.close()
        rig.listener.close()


@pytest.mark.fault("F04")
def test_a_model_worker_beats_over_a_second_channel_from_when_it_is_ready() -> None:
    """And wakes whatever waits for model worker 0, where that is gone without a word."""
    begin = dataclasses.replace(BEGIN, ranks=2, lost_after=0.4, features=(HEARTBEAT,))
    load: Any = lambda begin, folder, progress: types.SimpleNamespace(device="cpu")  # noqa: E731
    with pair("local") as (ours, theirs), pair("local") as (sends, beats):
        worker = PeerWorker(ours, "model-1", load=load, beats=lambda: sends)

        def serve() -> None:
            with contextlib.suppress(ChannelClosed):
                worker.serve()

        thread = threading.Thread(target=serve)
        thread.start()
        peer_messages.receive(theirs, 5.0)
        assert not beats.ready()
        peer_messages.send(theirs, begin)
        assert peer_messages.receive(theirs, 5.0) == peer_messages.Ready("cpu")
        assert [peer_messages.receive(beats, 5.0) for _ in range(3)] == [peer_messages.Beat()] * 3
        beats.close()
        thread.join(5.0)
        assert not thread.is_alive()


def test_whose_process_has_ended_is_lost_and_does_not_hold_up_who_waits(rig: Rig) -> None:
    peer, _ = rig.peer()
    peer.expect(1)
    threading.Timer(0.1, rig.listener.revoke, ["model-1"]).start()
    with pytest.raises(RankLost, match="its process has ended"):
        peer.take(peer_messages.Answers, 1, 10.0)


def test_close_tells_all_to_stop_and_waits_for_them(rig: Rig) -> None:
    _, channel = rig.peer()
    heard: list[Any] = []

    def play() -> None:
        heard.append(peer_messages.receive(channel, 5.0))
        channel.close()

    thread = threading.Thread(target=play)
    thread.start()
    rig.listener.close()
    thread.join()
    assert heard == [peer_messages.Stop()]
    assert not rig.listener.folder.exists()


class Holder:
    """Replies to batches over a channel, and knows no message."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def ready(self, batch: int) -> bool:
        return self.channel.ready()


def test_who_parts_sleeps_until_its_batches_are_over() -> None:
    """Also where the next command has come, or model worker 0 is gone."""
    with pair("local") as (ours, theirs), pair("local") as (asked, holder):
        worker = PeerWorker(ours, "model-1")
        worker._begin = BEGIN
        worker._parts = typing.cast(Any, types.SimpleNamespace(leave_group=lambda: None))
        waiting = Waiting(Holder(asked), 1)
        run = (waiting for _ in range(1))
        next(run)
        worker._runs[1] = typing.cast(Any, run), waiting
        peer_messages.send(theirs, peer_messages.Stop())
        reply = threading.Timer(0.5, holder.send, [[bytes(peer_messages.encode(peer_messages.LeftGroup())[0])]])
        reply.start()
        begun, used = time.monotonic(), time.thread_time()
        worker._obey(peer_messages.LeaveGroup())
        assert time.monotonic() - begun > 0.4
        assert time.thread_time() - used < 0.25
        assert peer_messages.receive(theirs, 5.0) == peer_messages.LeftGroup()
        reply.join()


# What rank 0 remembers of holders that other ranks could not say enough about.


class FakePeer:
    """Rank 1: it takes up its seat, and cannot tell what is kept there."""

    rank, closed = 1, False

    def __init__(self) -> None:
        self.lost: set[int] = set()
        self.told: list[Any] = []

    def tell(self, command: Any) -> None:
        self.told.append(command)

    def answer(self, kind: type, timeout: float | None = None) -> Any:
        return peer_messages.Joined(5, 1 << 20, True)

    def ask(self, command: Any, kind: type, timeout: float | None = None) -> Any:
        if isinstance(command, peer_messages.SurveySeat):
            return peer_messages.Failed("HolderLost", "attention worker a is lost")
        return peer_messages.Joined(5, 1 << 20, True)


class Port:
    name, address, channel_kind = "a", "x:1", "tcp"
    bytes_sent = bytes_received = 0
    closed = False

    def close(self) -> None:
        self.closed = True


class Own:
    epoch = 1

    def __init__(self) -> None:
        self.ports: dict[int, Any] = {}

    def join(self, number: int, port: Any) -> None:
        self.ports[number] = port

    def lost(self) -> list[int]:
        return [number for number, port in self.ports.items() if port.closed]


def workers(peer: FakePeer, own: Own) -> TensorParallelWorkers:
    group = types.SimpleNamespace(peers={1: peer}, missing=(), timeout=1.0)
    return TensorParallelWorkers(
        *typing.cast(Any, (own, types.SimpleNamespace(), group)), pools={}, heads=(1, 1), config=HOLDER
    )


def test_a_holder_that_a_rank_cannot_look_at_does_not_join() -> None:
    peer, own, port = FakePeer(), Own(), Port()
    ranks = workers(peer, own)
    with pytest.raises(HolderLost, match="attention worker a is lost"):
        ranks.join(4, typing.cast(Any, port))
    assert port.closed
    assert ranks.lost() == []
    assert any(isinstance(command, peer_messages.Leave) and command.number == 5 for command in peer.told)


def test_a_holder_that_a_rank_which_is_back_cannot_look_at_is_gone() -> None:
    peer, own = FakePeer(), Own()
    ranks = workers(peer, own)
    ranks._owner[5], ranks._joins[5] = 1, peer_messages.Join(5, "a", "x:1", 1, 1, 2, b"", b"", b"", "")
    back = ranks.returned(typing.cast(Any, peer))
    assert back.gone == [5]
