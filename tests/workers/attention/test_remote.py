"""The port to a worker elsewhere: how it is lost, in which time, and what it falls back to."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from attention_servers import ASKED, WAYS, connected, one_batch, open_port, process, running, until
from transports import OneStream, serving

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import AddressError
from lamina_protocols.channels.grpc_client import GrpcChannel, WorkerRefused
from lamina_protocols.frames import codec
from lamina_protocols.messages.messages import Announced, Announcement, Fresh
from lamina_workers.errors import HolderLost
from lamina_workers.ports import remote

ANNOUNCEMENT = Announcement(1, 1, 0, (), ())


class Scripted(OneStream):
    """A worker that welcomes everybody, and whose heartbeats and offers the test decides."""

    def __init__(self) -> None:
        super().__init__()
        self.state = "serving"
        self.delay = 0.0
        self.local: control.LocalOffer | None = None

    def hello(self, hello: control.Hello, remaining: float) -> control.Welcome:
        return control.Welcome("scripted", 1, 1, 0.6, 1 << 20, self.local, None, False, "")

    def heartbeat(self, heartbeat: control.Heartbeat) -> control.Alive:
        time.sleep(self.delay)
        return control.Alive(self.state)


@contextlib.contextmanager
def scripted(**changes) -> Iterator:
    worker = Scripted()
    with serving(worker, None) as address, connected(address, **{"local_channel": False, **changes}) as port:
        yield worker, port, worker.channels.get(timeout=5)


@pytest.mark.fault("F06")
@pytest.mark.parametrize("way", WAYS)
def test_no_reply_in_time_means_lost_for_good(way):
    with running() as (_, address), connected(address, **WAYS[way]) as port:
        assert not port.ready()
        began = time.monotonic()
        with pytest.raises(HolderLost, match=r"attention worker a at .* is lost: no reply within 0.2 seconds"):
            port.receive(0.2)
        assert 0.2 <= time.monotonic() - began < 4
        assert port.closed
        assert port.ready()
        for call in (lambda: port.receive(), lambda: port.send(ANNOUNCEMENT)):
            with pytest.raises(HolderLost, match="no reply within"):
                call()


def test_ready_tells_when_a_reply_is_there():
    with running() as (_, address):
        for way in WAYS.values():
            with connected(address, **way) as port:
                port.send(ANNOUNCEMENT)
                until(port.ready)
                assert isinstance(port.receive(0), Announced)
                assert not port.ready()


@pytest.mark.fault("F06")
def test_heartbeats_that_fail_wake_who_waits():
    with scripted(lost_after=0.5) as (worker, port, _):
        worker.delay = 10.0
        began = time.monotonic()
        with pytest.raises(HolderLost, match=r"no heartbeat for \d\.\d seconds"):
            port.receive()
        assert 0.4 < time.monotonic() - began < 2
        worker.delay = 0.0


def test_a_worker_that_ended_the_session_is_lost():
    with scripted() as (worker, port, _):
        worker.state = "ended"
        with pytest.raises(HolderLost, match="the worker has ended the session"):
            port.receive(5)


def test_close_wakes_who_waits():
    with scripted() as (_, port, _far):
        threading.Timer(0.2, port.close).start()
        with pytest.raises(HolderLost, match="closed on this side"):
            port.receive(5)


@pytest.mark.parametrize("linger", [0.0, 30.0])
def test_close_waits_for_no_worker(monkeypatch, linger):
    """To close the port of a worker that did not answer took its caller, the engine's thread, two seconds."""
    monkeypatch.setattr(remote, "_GOODBYE_S", 20.0)
    asked, answer = threading.Event(), threading.Event()
    with scripted(linger=linger) as (worker, port, _):
        worker.goodbye = lambda goodbye: [asked.set(), answer.wait(20), control.Alive("ended")][-1]
        began = time.monotonic()
        port.close()
        assert time.monotonic() - began < 10
        assert asked.wait(10)
        with pytest.raises(HolderLost, match="closed on this side"):
            port.receive(5)
        answer.set()
        port.parted()


def test_where_no_thread_can_be_started_any_more_goodbye_is_said_even_so(monkeypatch):
    asked, start = threading.Event(), threading.Thread.start

    def ending(thread: threading.Thread) -> None:
        if thread.name == "lamina-closing":
            raise RuntimeError("can't create new thread at interpreter shutdown")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", ending)
    with scripted() as (worker, port, _):
        worker.goodbye = lambda goodbye: [asked.set(), control.Alive("ended")][-1]
        port.close()
        assert asked.is_set()
        port.parted()


def test_a_stream_is_closed_without_waiting_for_the_other_side():
    """To close the stream of a stopped worker took half a second of the engine's thread."""
    ended = threading.Event()

    def never() -> Iterator[bytes]:
        ended.wait(20)
        yield from ()

    channel = GrpcChannel(False)
    channel.start(never(), ended.set)
    channel.close()
    assert not ended.is_set()  # nobody has waited for the other side's end
    assert ended.wait(10)  # and the stream is broken off at last


@pytest.mark.fault("F06")
@pytest.mark.parametrize("way", WAYS)
def test_a_worker_that_does_not_read_is_lost_in_time(way):
    """A worker that answered heartbeats and did not read its channel stopped the engine's thread for ever."""
    with running() as (server, address), connected(address, **WAYS[way], lost_after=1.0) as port:
        release = threading.Event()
        server._leases.loop._do(lambda: release.wait(60))
        large = Fresh(1, 1, 0, *_nothing(1 << 18))
        began = time.monotonic()
        try:
            with pytest.raises(HolderLost, match=r"not read within|closed"):
                list(map(port.send, [large] * 100))  # 800 MB
        finally:
            release.set()
        assert time.monotonic() - began < 10
        assert port.closed


@pytest.mark.fault("F07")
def test_a_reply_that_nobody_asked_for_means_lost():
    """Replies without a question were sorted in for ever: they held the engine's thread, and its memory grew."""
    with scripted() as (_, port, far):
        far.send(codec.encode(Announced(1, 1, True, (1,), ())))
        with pytest.raises(HolderLost, match="sent a Announced that nobody has asked for"):
            port.receive(5)


def test_what_is_no_reply_means_lost():
    empty = Fresh(1, 1, 0, *_nothing())
    for frame, said in (([b"\1" * 30], "frame starts with"), (codec.encode(empty), "it sent a Fresh")):
        with scripted() as (_, port, far):
            far.send(frame)
            with pytest.raises(HolderLost, match=said):
                port.receive(5)


def _nothing(rows: int = 0):
    import torch

    return torch.empty(rows, 4), torch.empty(rows, 4)


def test_a_local_channel_that_cannot_be_reached_falls_back_to_grpc(tmp_path):
    worker = Scripted()
    worker.local = control.LocalOffer(str(tmp_path / "nobody"), bytes(32))
    with serving(worker, None) as address, connected(address) as port:
        assert port.channel_kind == "grpc"


@pytest.mark.parametrize("address", ["", "host", "host:", "host:99999", ":1", "host:-1"])
def test_what_is_no_address(address):
    with pytest.raises(AddressError, match="expected HOST:PORT"):
        open_port(address, **ASKED)


@pytest.mark.fault("F01")
@pytest.mark.real
@pytest.mark.parametrize("way", ["local", "grpc", "tcp"])
def test_a_killed_worker_is_lost_at_once(way):
    with process() as child:
        address = child.stdout.readline().split()[1]
        with connected(address, **WAYS[way]) as port:
            one_batch(port)
            threading.Timer(0.2, child.kill).start()
            began = time.monotonic()
            with pytest.raises(HolderLost):
                port.receive(30)
            assert time.monotonic() - began < 2


@pytest.mark.real
def test_closing_does_not_wait_for_the_heartbeat_of_a_stopped_worker():
    with process() as child:
        address = child.stdout.readline().split()[1]
        with connected(address, lost_after=40.0) as port:  # a heartbeat may take 5 s
            one_batch(port)
            os.kill(child.pid, signal.SIGSTOP)
            try:
                time.sleep(6.0)  # one is under way
                began = time.monotonic()
                port.close()
                assert time.monotonic() - began < 3.5  # saying goodbye takes 2
            finally:
                os.kill(child.pid, signal.SIGCONT)


@pytest.mark.fault("F04")
@pytest.mark.real
def test_a_stopped_worker_is_lost_and_finds_its_session_over_when_it_returns():
    with process("--lease", "1.2") as child:
        address = child.stdout.readline().split()[1]
        with connected(address, lost_after=1.0) as port:
            one_batch(port)
            os.kill(child.pid, signal.SIGSTOP)
            try:
                with pytest.raises(HolderLost, match="no heartbeat"):
                    port.receive(30)
            finally:
                os.kill(child.pid, signal.SIGCONT)

        refusals = []

        def again() -> bool:
            try:
                with connected(address) as port:
                    one_batch(port)
            except WorkerRefused as error:
                refusals.append(str(error))
                return False
            return True

        until(again)
        assert all("busy" in refusal for refusal in refusals)
