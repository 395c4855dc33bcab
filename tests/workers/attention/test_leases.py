"""Seats of one engine at an attention worker: shares, several channels, what outlives them, what takes it up again."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from typing import Any

import pytest
import torch
from attention_servers import ASKED, FULL, KV_MEMORY, LAYERS, PAGES, WAYS, connected, hello, open_port, running, until
from transports import pair

from lamina_protocols.channels.channels import ChannelClosed
from lamina_protocols.channels.grpc_client import WorkerBusy, WorkerRefused
from lamina_protocols.channels.waiting import Waiter
from lamina_protocols.frames import codec
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import (
    MAX_PARTS,
    Announced,
    Announcement,
    Attended,
    Close,
    Fault,
    Fetch,
    Fork,
    Fresh,
    Open,
    PartHeld,
    Query,
    Row,
    Survey,
    Surveyed,
)
from lamina_workers.attention_server import session
from lamina_workers.attention_server.loop import ComputeLoop
from lamina_workers.attention_server.session import EngineSeat, Session
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.errors import HolderFault, HolderLost
from lamina_workers.ports.port import AttentionPort, LocalAttention, survey
from lamina_workers.ports.remote import RemoteAttention

ENGINE = "0123456789abcdef" * 2
HALF = {"engine": ENGINE, "seat_share": (1, 2)}
KEPT = {"engine": ENGINE, "linger": 30.0}


class Sender:
    """Stores tokens of one part, step by step, and checks each answer against a worker of its own in this process."""

    def __init__(self, port: AttentionPort, seed: int, handle: int = 1, first: int = 0) -> None:
        self.port = port
        self.handle = handle
        self.length = 0
        self.batch = 0
        self.epoch = 1
        self.first = first
        self.generator = torch.Generator().manual_seed(seed)
        self.twin = LocalAttention(AttentionWorker(HolderConfig(LAYERS, 16, "float32", 64 * KV_MEMORY)))

    def both(self, request: Any, port: AttentionPort | None = None) -> Any:
        """The reply of the port to a request that has one, which must be that of the worker here."""
        self.twin.send(request)
        (port or self.port).send(request)
        if isinstance(request, Fresh):
            return None
        mine, theirs = self.twin.receive(), (port or self.port).receive(10)
        if isinstance(mine, Attended):
            assert isinstance(theirs, Attended), theirs
            assert torch.equal(mine.out, theirs.out)
            assert torch.equal(mine.lse, theirs.lse)
        else:
            assert type(mine) is type(theirs), theirs
        return theirs

    def announce(self, count: int, reads: bool = True) -> Announced:
        self.batch += 1
        opens = () if self.length else (Open(self.handle, 0, (0, 1), 0, 1000),)
        row = Row(self.handle, self.length, count, (0, self.length) if self.length and reads else None, True)
        reply = self.both(Announcement(self.epoch, self.batch, self.first, opens, (row,)))
        self.first += len(opens)
        self.length += count
        return reply

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def fresh(self, layer: int, count: int) -> Fresh:
        return Fresh(self.epoch, self.batch, layer, self.random(2 * count, 16), self.random(2 * count, 32))

    def step(self, count: int = 1, port: AttentionPort | None = None) -> None:
        """One batch; its layers go to `port` where that is another than the announcement's."""
        reads = bool(self.length)
        assert self.announce(count).accepted
        for layer in range(len(LAYERS)):
            if reads:
                self.both(Query(self.epoch, self.batch, layer, self.random(6 * count, 16)), port)
            self.both(self.fresh(layer, count), port)
        if port is not None:  # what it has stored last has come before the next announcement, on another channel, can
            self.both(Fetch(self.epoch, self.batch, 0, self.handle, 0, 0), port)


def broken(port: RemoteAttention) -> None:
    """Let a port vanish as that of a killed process does: no goodbye, no heartbeat."""
    port._end("it vanished")
    port._client.close()


@pytest.mark.parametrize("way", ["local", "grpc", "tcp"])
def test_two_seats_serve_two_senders_at_once(way):
    with (
        running() as (server, address),
        connected(address, **HALF, **WAYS[way]) as one,
        connected(address, **HALF, **WAYS[way], seat=1) as two,
    ):
        assert (one.capacity, two.capacity) == (KV_MEMORY // 2, KV_MEMORY // 2)
        assert not one.resumed
        assert not two.resumed
        failures = []

        def send(port: RemoteAttention, seed: int) -> None:
            try:
                sender = Sender(port, seed)
                sender.step(5)
                for _ in range(20):
                    sender.step()
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=send, args=args) for args in ((one, 1), (two, 2))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not failures
        status = server.status()
        assert (status.seats, status.channels, status.lingering, status.engine) == (2, 2, 0, ENGINE[:8])
        assert (status.total_pages, status.parts, status.batches) == (PAGES, 2, 42)
        assert status.free_pages == PAGES - 2 * (4 + 2)  # 25 tokens each, of which one layer sees the last 7


@pytest.mark.parametrize("way", ["local", "grpc", "tcp"])
def test_two_channels_lead_to_one_seat(way):
    """Batches' messages come interleaved from both, and each answer goes to the channel on which it was asked for."""
    with (
        running() as (server, address),
        connected(address, engine=ENGINE, **WAYS[way]) as one,
        connected(address, engine=ENGINE, **WAYS[way]) as two,
    ):
        assert (one.resumed, two.resumed, two.capacity) == (False, True, KV_MEMORY)
        sender = Sender(one, 3)
        sender.step(4)
        for port in (two, one, two):
            sender.step(1, port)
        # Two batches of two parts at once, their layers crossing.
        other = Sender(one, 4, handle=2, first=sender.first)
        other.batch, other.twin = sender.batch, sender.twin
        other.announce(3)
        sender.batch = other.batch
        sender.announce(1)
        for layer in range(2):
            sender.both(Query(1, sender.batch, layer, sender.random(6, 16)), two)
            other.both(other.fresh(layer, 3), one)
            sender.both(sender.fresh(layer, 1), two)
        assert server.status().parts == 2


def test_what_had_no_answer_is_told_where_its_batch_goes_on_or_where_its_keys_are_needed():
    wrong = torch.zeros(1, 16)
    with running() as (_, address), connected(address, engine=ENGINE) as one, connected(address, engine=ENGINE) as two:
        for handle, batch in ((1, 1), (2, 2)):
            one.send(
                Announcement(1, batch, handle - 1, (Open(handle, 0, (0, 1), 0, 99),), (Row(handle, 0, 1, None, True),))
            )
            assert isinstance(one.receive(10), Announced)
        two.send(Fresh(1, 2, 0, wrong, torch.zeros(1, 32)))
        one.send(Fresh(1, 1, 0, torch.zeros(3, 16), torch.zeros(3, 32)))
        two.send(Query(1, 2, 0, wrong))
        told = two.receive(10)
        assert isinstance(told, Fault)
        assert (told.batch, "fresh vectors of batch 2" in told.reason) == (2, True)
        until(lambda: one.status().bytes_in == one.bytes_sent + two.bytes_sent)  # that of batch 1 has come
        one.send(Announcement(1, 3, 2, (), (Row(1, 1, 1, (0, 1), True),)))
        told = one.receive(10)
        assert isinstance(told, Announced)
        assert (told.accepted, told.starts) == (False, (0,))
        one.send(Announcement(1, 4, 2, (), ()))
        assert isinstance(one.receive(10), Announced)


# What outlives its engine.


@pytest.mark.parametrize("way", ["local", "grpc"])
def test_kv_outlives_a_vanished_engine_and_the_next_goes_on_where_it_was(way):
    with running() as (server, address):
        port = open_port(address, **ASKED, **KEPT, **WAYS[way])
        sender = Sender(port, 5)
        sender.step(20)
        sender.step()
        until(lambda: port.status().bytes_in == port.bytes_sent)
        broken(port)
        until(lambda: server.status().lingering == 1)
        assert server.status().linger_left > 20
        assert server.status().session
        with connected(address, **KEPT, **WAYS[way]) as again:
            assert again.resumed
            found = survey(again, 10)
            assert (found.last_epoch, found.next_operation, found.more) == (1, 1, 0)
            assert found.parts == (PartHeld(1, 0, (0, 1), 0, 1000, 21, 0),)
            assert server.status().lingering == 0
            sender.port, sender.epoch = again, found.last_epoch + 1
            for _ in range(3):
                sender.step()
        until(lambda: not server.status().session)
        assert server.status().total_pages == 0


def test_what_a_dying_engine_did_not_store_in_every_layer_is_not_held():
    with running() as (server, address):
        port = open_port(address, **ASKED, **KEPT)
        sender = Sender(port, 6)
        sender.step(7)
        sender.announce(3)
        sender.both(sender.fresh(0, 3))
        until(lambda: port.status().bytes_in == port.bytes_sent)
        broken(port)
        until(lambda: server.status().lingering == 1)
        with connected(address, **KEPT) as again:
            found = survey(again, 10)
            assert [(part.handle, part.held) for part in found.parts] == [(1, 7)]
            again.send(Fresh(1, sender.batch, 1, torch.zeros(6, 16), torch.zeros(6, 32)))  # of the dropped batch
            told = _announced(again, Announcement(1, 99, found.next_operation, (), ()))  # of who was thought dead
            assert isinstance(told, Fault)
            assert "others have taken over what is kept here, from epoch 2 on" in told.reason
            sender.port, sender.epoch, sender.length = again, 2, 7
            sender.step(2)
            assert [part.held for part in survey(again, 10).parts] == [9]


@pytest.mark.fault("F04")
@pytest.mark.parametrize("epoch", [2, 100, 101])
def test_from_a_survey_on_who_was_here_before_is_refused_whatever_epoch_it_begins(epoch):
    """An announcement on its way over a channel that was given up came after the survey, and was applied: the engine
    had begun to number its operations where the survey ended (seed 853642093022)."""
    with running() as (_, address), connected(address, **KEPT) as old:
        sender = Sender(old, 8)
        sender.step(7)
        with connected(address, **KEPT) as new:
            found = survey(new, 10, past=100)
            with pytest.raises(HolderLost, match="session 1 of place 0 announces, session 2 has taken over"):
                _announced(old, Announcement(epoch, 9, found.next_operation, (Close(1),), ()))
            assert survey(new, 10) == dataclasses.replace(found, epoch=0)
            told = _announced(new, Announcement(100, 9, found.next_operation, (Close(1),), ()))
            assert isinstance(told, Fault)
            assert "others have taken over what is kept here, from epoch 101 on" in told.reason
            sender.port, sender.epoch = new, 101
            sender.step(2)


def _announced(port: AttentionPort, announcement: Announcement) -> Any:
    port.send(announcement)
    return port.receive(10)


@pytest.mark.fault("F13")
def test_the_linger_ends_and_the_pages_are_free_for_another():
    with running() as (server, address):
        port = open_port(address, **ASKED, engine=ENGINE, linger=0.4)
        Sender(port, 7).step(5)
        broken(port)
        until(lambda: server.status().lingering == 1)
        with pytest.raises(
            WorkerBusy,
            match=r"it keeps the KV of engine 01234567, which has been away for \d\.\d seconds, for 0\.\d seconds more",
        ):
            open_port(address, **{**ASKED, "timeout": 0.05})
        until(lambda: not server.status().session)
        status = server.status()
        assert (status.parts, status.total_pages, status.engine, status.seats) == (0, 0, "", 0)
        with connected(address) as next_one:
            assert not next_one.resumed
            Sender(next_one, 8).step(2)


def test_a_seat_lives_while_one_channel_does():
    with running() as (server, address):
        one, two = (open_port(address, **ASKED, engine=ENGINE) for _ in range(2))
        sender = Sender(one, 9)
        sender.step(3)
        until(lambda: one.status().bytes_in == one.bytes_sent)
        one.close()
        until(lambda: server.status().channels == 1)
        sender.port = two
        sender.step()
        assert server.status().parts == 1
        two.close()
        until(lambda: not server.status().session)


@pytest.mark.parametrize("lost", [False, True])
def test_a_goodbye_frees_at_once_what_would_linger(lost):
    with running() as (server, address):
        port = open_port(address, **ASKED, **KEPT)
        Sender(port, 10).step(3)
        if lost:
            port._channel.close()
            with pytest.raises(HolderLost):
                port.receive(5)
            until(lambda: server.status().lingering == 1)
        port.close()
        port.parted()
        assert not server.status().session
        with connected(address, engine="f" * 16, timeout=10) as other:
            Sender(other, 11).step(2)


def test_one_goodbye_of_two_leaves_the_seat_to_the_other_channel():
    with running() as (server, address):
        one, two = (open_port(address, **ASKED, **KEPT) for _ in range(2))
        one.close()
        one.parted()  # its goodbye has arrived
        until(lambda: server.status().channels == 1)
        broken(two)
        until(lambda: server.status().lingering == 1)
        last = open_port(address, **ASKED, **KEPT)
        last.close()
        last.parted()
        assert not server.status().session


@pytest.mark.fault("F19")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "other"}, "model of place 0: the engine has 'other', this worker 'tiny'"),
        ({"compute_dtype": "bfloat16"}, "compute dtype of place 0: the engine has 'bfloat16', this worker 'float32'"),
        ({"kv_dtype": "bfloat16"}, "KV dtype of place 0: the engine has 'bfloat16', this worker 'float32'"),
        ({"page_size": 32}, "page size of place 0: the engine has 32, this worker 16"),
        ({"seat_share": (1, 3)}, r"share of place 0: the engine has \(1, 3\), this worker \(1, 2\)"),
        ({"layers": LAYERS[:1]}, "number of layers of place 0: the engine has 1, this worker 2"),
        (
            {"layers": (FULL, dataclasses.replace(LAYERS[1], window=9))},
            "window of layer 1 of place 0: the engine has 9, this worker 7",
        ),
    ],
)
def test_a_channel_that_asks_for_another_seat_than_is_there_is_refused_naming_both(changes, said):
    with running() as (server, address), connected(address, **HALF) as port:
        with pytest.raises(WorkerRefused, match=said):
            open_port(address, **{**ASKED, **HALF, **changes})
        until(lambda: server.status().channels == 1)
        Sender(port, 12).step(2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"engine": ENGINE, "seat": 1, "seat_share": (2, 3)},
            "place 1 asks for 2/3 of .*its other 1 places have 1/2; allowed: 1/2",
        ),
        ({"engine": "no-hex-digits-in-here"}, "engine id 'no-hex.*', allowed: 16 to 64 hexadecimal"),
        ({"engine": "abc"}, "engine id 'abc', allowed"),
        ({"seat": 64}, "place 64, allowed: 0 to 63"),
        ({"seat_share": (0, 1)}, r"share is \(0, 1\), allowed: \(part, of\)"),
        ({"seat_share": (3, 2)}, r"share is \(3, 2\), allowed"),
        ({"linger": -1.0}, "linger of -1 seconds, allowed: 0 to 86400"),
        ({"linger": 1e9}, "linger of 1e.09 seconds, allowed: 0 to 86400"),
        ({"engine": ENGINE, "seat": 1, "seat_share": (1, 65536)}, "the least is"),
    ],
)
def test_what_no_seat_can_be_is_refused_and_the_others_go_on(changes, said):
    with running() as (server, address), connected(address, **HALF) as port:
        with pytest.raises(WorkerRefused, match=said):
            open_port(address, **{**ASKED, **changes})
        assert server.status().seats == 1
        Sender(port, 13).step(2)


@pytest.mark.fault("F18")
def test_a_draining_worker_takes_no_new_seat_but_the_engine_back_that_it_serves():
    with running() as (server, address), connected(address, **HALF):
        server.drain()
        with pytest.raises(WorkerRefused, match="draining"):
            open_port(address, **ASKED, **HALF, seat=1)
        with connected(address, **HALF) as again:
            assert again.resumed


# Nobody is held up.


@pytest.mark.parametrize("way", ["local", "grpc", "tcp"])
def test_who_does_not_read_its_answers_holds_up_nobody_else(way):
    """Answers wait for a client that only sends, more than any channel takes; the other seat is served meanwhile."""
    with (
        running(kv_memory=1 << 24) as (_, address),
        connected(address, **HALF, **WAYS[way]) as deaf,
        connected(address, **HALF, **WAYS[way], seat=1) as port,
    ):
        rows = 2000  # whose answer has 1.5 MB
        for batch, row in ((1, Row(1, 0, 1, None, True)), (2, Row(1, 1, rows, (0, 1), False))):
            opens = (Open(1, 0, (0, 1), 0, 9),) if batch == 1 else ()
            assert isinstance(_announced(deaf, Announcement(1, batch, batch - 1, opens, (row,))), Announced)
            if batch == 1:
                for layer in range(2):
                    deaf.send(Fresh(1, 1, layer, torch.randn(2, 16), torch.randn(2, 32)))
        query, stopped, stuck = Query(1, 2, 0, torch.randn(6 * rows, 16)), threading.Event(), threading.Event()

        def flood() -> None:
            frame = codec.encode(query)
            with contextlib.suppress(ChannelClosed):
                while not stopped.is_set():
                    deaf._channel.post(frame)  # which never reads, as `send` would
                    tries = 0
                    while not deaf._channel.flush() and not stopped.is_set():
                        time.sleep(0.01)
                        tries += 1
                        if tries == 20:
                            stuck.set()

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            sender = Sender(port, 14)
            sender.step()
            assert stuck.wait(30)
            for _ in range(5):
                sender.step()
        finally:
            stopped.set()
            thread.join(10)
        deaf.due = 1  # nobody has counted
        deaf.receive(10)  # and what it had asked for is still there


@pytest.mark.fault("F07")
@pytest.mark.parametrize("way", ["local", "grpc", "tcp"])
def test_half_a_frame_holds_up_nobody_else(way):
    with (
        running() as (_, address),
        connected(address, **HALF, **WAYS[way]) as slow,
        connected(address, **HALF, **WAYS[way], seat=1) as port,
    ):
        frame = b"".join(codec.encode(Announcement(1, 1, 0, (), ())))
        channel = slow._channel
        if way == "grpc":
            channel._out.put(frame[:11])
        else:
            channel._socket.send(frame[:11])
        Sender(port, 15).step(3)


def test_an_error_that_nobody_foresaw_ends_that_seat_and_no_other(monkeypatch, caplog):
    with (
        running() as (server, address),
        connected(address, **HALF, linger=30.0) as bad,
        connected(address, **HALF, seat=1) as good,
    ):

        def fails(*_: object) -> None:
            raise RuntimeError("an inside matter")

        monkeypatch.setattr(server._leases._seats[0].worker, "handle", fails)
        bad.send(Announcement(1, 1, 0, (), ()))
        with pytest.raises(HolderLost, match="RuntimeError") as lost:
            bad.receive(10)
        assert "inside" not in str(lost.value)
        assert "an inside matter" in caplog.text
        until(lambda: server.status().seats == 1)
        Sender(good, 16).step(2)


def test_a_channel_that_was_closed_before_it_is_read_harms_nobody():
    over: list[str] = []
    device = torch.device("cpu")
    loop = ComputeLoop(1, "w", device, lambda session, why: over.append(why), lambda *_: None, lambda _: None)
    seat = EngineSeat(hello(engine=ENGINE), KV_MEMORY, time.monotonic)
    with pair("local") as (_, gone), pair("local") as (near, far):
        for name, channel in (("a", gone), ("b", far)):
            session = Session(name * 32, seat, b"", 30.0, time.monotonic)
            session.attach(channel, "local")
            if channel is gone:
                channel.close()
                loop.serve(session)
                loop.drop(session)
            else:
                loop.build(seat)
                loop.serve(session)
        thread = threading.Thread(target=loop.run)
        thread.start()
        near.send(codec.encode(Survey(0, 1)))
        assert isinstance(codec.decode(near.receive(10)), Surveyed)
        loop.stop()
        thread.join(10)
    assert not over


def test_the_lease_does_not_run_while_a_worker_is_made(monkeypatch):
    real = session.attention_worker

    def slow(*args: Any) -> AttentionWorker:
        time.sleep(0.8)
        return real(*args)

    monkeypatch.setattr(session, "attention_worker", slow)
    with running(lease=0.3) as (_, address), connected(address) as port:
        Sender(port, 17).step(3)


# Surveys.


def local() -> LocalAttention:
    return LocalAttention(AttentionWorker(HolderConfig(LAYERS, 16, "float32", KV_MEMORY)))


def test_a_survey_of_nothing():
    assert survey(local()) == Surveyed(0, 1, 0, 0, ())


def test_a_survey_tells_all_parts_in_pages():
    port = local()
    opens = tuple(Open(handle, 0, (handle % 2,), handle, handle + 9) for handle in range(3 * MAX_PARTS // 2, 0, -1))
    assert isinstance(_announced(port, Announcement(4, 1, 0, opens, ())), Announced)
    port.send(Survey(0, 1))
    first = port.receive()
    assert isinstance(first, Surveyed)
    assert (len(first.parts), first.more, first.parts[0].handle) == (MAX_PARTS, MAX_PARTS // 2, 1)
    codec.decode(bytearray(b"".join(codec.encode(first))))
    found = survey(port)
    assert [part.handle for part in found.parts] == list(range(1, 3 * MAX_PARTS // 2 + 1))
    assert found.parts[6] == PartHeld(7, 0, (1,), 7, 16, 7, 0)
    assert (found.last_epoch, found.next_operation, found.more) == (4, len(opens), 0)


def test_a_survey_drops_what_is_in_flight_and_forks_hold_no_more_than_was_stored():
    port = local()
    sender = Sender(port, 17)
    sender.step(20)
    sender.announce(2)
    port.send(sender.fresh(1, 2))
    operations = (Fork(2, 1, 20), Fork(3, 1, 22), Close(3), Fork(4, 1, 22))
    assert isinstance(_announced(port, Announcement(1, 3, 1, operations, ())), Announced)
    held = {part.handle: part.held for part in survey(port).parts}
    assert held == {1: 20, 2: 20, 4: 20}
    port.send(Query(1, 2, 0, torch.zeros(6, 16)))
    told = port.receive()
    assert isinstance(told, Fault)
    assert "not in flight" in told.reason


def test_a_floor_is_told_where_a_window_let_pages_go():
    narrow = tuple(dataclasses.replace(layer, window=7) for layer in LAYERS)
    port = LocalAttention(AttentionWorker(HolderConfig(narrow, 16, "float32", KV_MEMORY)))
    port.send(Announcement(1, 1, 0, (Open(1, 0, (0, 1), 0, 99),), (Row(1, 0, 64, None, True),)))
    port.receive()
    for layer in range(2):
        port.send(Fresh(1, 1, layer, torch.zeros(128, 16), torch.zeros(128, 32)))
    announced = _announced(port, Announcement(1, 2, 1, (), (Row(1, 64, 1, (0, 64), True),)))
    (part,) = survey(port).parts
    assert (part.held, part.floor) == (64, announced.floors[0])
    assert part.floor > 0


def test_a_survey_is_answered_in_few_messages():
    """A worker that told one part at a time was asked 262,144 times, each with its deadline, before an engine began."""
    asked: list[Survey] = []

    class Talkative(LocalAttention):
        def receive(self, timeout: float | None = None) -> Any:
            asked.append(super().receive(timeout))
            return Surveyed(0, 1, 0, 0, (PartHeld(len(asked), 0, (0,), 0, 9, 9, 0),), more=len(asked) < 9)

    port = Talkative(AttentionWorker(HolderConfig(LAYERS, 16, "float32", KV_MEMORY)))
    with pytest.raises(HolderLost, match="a survey was asked for"):
        survey(port)
    assert len(asked) == 1


def test_a_survey_of_parts_of_many_heads_is_told_in_as_many_answers_as_its_frames_need():
    wide = LayerSpec(kv_layer=0, heads=1000, kv_heads=1000, d_k=16, d_v=16, scale=1.0)
    port = LocalAttention(AttentionWorker(HolderConfig((wide,), 16, "float32", 1 << 22)))
    opens = tuple(Open(handle, 0, tuple(range(1000)), 0, 16) for handle in range(1, 121))
    port.send(Announcement(1, 1, 0, opens, ()))
    assert isinstance(port.receive(), Announced)
    assert [part.handle for part in survey(port).parts] == list(range(1, 121))


def test_a_survey_that_fails_says_so():
    class Faulty(LocalAttention):
        def receive(self, timeout: float | None = None) -> Any:
            return Fault(0, 1, "out of order")

    class Odd(LocalAttention):
        def receive(self, timeout: float | None = None) -> Any:
            return Announced(0, 1, True, (1,), ())

    worker = AttentionWorker(HolderConfig(LAYERS, 16, "float32", KV_MEMORY))
    with pytest.raises(HolderFault, match="out of order"):
        survey(Faulty(worker))
    with pytest.raises(HolderLost, match="a survey was asked for, got Announced"):
        survey(Odd(worker))


# Waiting for many channels.


@pytest.mark.parametrize("transport", ["local", "tcp", "tcp+tls", "grpc", "tcp+sum"])
def test_a_waiter_finds_what_has_come_and_is_woken(transport):
    with pair(transport) as (near, far), pair("local") as (other, quiet):
        waiter = Waiter()
        for channel in (far, quiet):
            waiter.add(channel)
        message = Announcement(1, 1, 0, (), ())
        for _ in range(3):
            near.send(codec.encode(message))
        for _ in range(3):  # those behind the first may have been read along with it
            while not (ready := waiter.wait()):
                pass
            assert ready == [far]
            assert codec.decode(far.receive(0)) == message
        threading.Timer(0.05, waiter.wake).start()
        while waiter.wait():
            raise AssertionError("nothing has come")
        other.close()
        while not (ready := waiter.wait()):
            pass
        assert ready == [quiet]
        waiter.remove(quiet)
        waiter.remove(quiet)
        near.send(codec.encode(message))
        while not (ready := waiter.wait()):
            pass
        assert ready == [far]
        waiter.remove(far)
        waiter.close()
        waiter.wake()


@pytest.mark.parametrize("transport", ["local", "tcp", "tcp+tls", "grpc", "tcp+sum"])
def test_what_is_posted_waits_for_no_reader_and_arrives_whole(transport):
    big = Fresh(1, 2, 3, torch.randn(1 << 18, 4), torch.randn(1 << 18, 4))  # 8 MiB
    pieces = 12
    with pair(transport) as (near, far):
        waiter = Waiter()
        waiter.add(far)
        for _ in range(pieces):
            far.post(codec.encode(big))
        big.k.zero_()  # what was posted is the channel's
        assert not far.flush()
        near.send(codec.encode(Announcement(1, 1, 0, (), ())))
        got = []
        reader = threading.Thread(target=lambda: got.extend(codec.decode(near.receive(30)) for _ in range(pieces)))
        reader.start()
        while not waiter.wait():
            pass
        assert far.flush()
        far.receive(0)
        reader.join(30)
        assert len(got) == pieces
        assert all(torch.equal(message.v, big.v) and message.k.any() for message in got)
        waiter.close()
