"""The port to a worker elsewhere: how it is lost, in which time, what it falls back to, and which offers it takes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_servers import WAYS, connected, one_batch, process, running, until
from evaluate.fault_injection.proxy import Proxy, Toxic
from transports import OneStream, serving

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import ChannelClosed
from lamina_protocols.channels.grpc_client import GrpcChannel, WorkerClient, WorkerRefused, WorkerUnreachable
from lamina_protocols.channels.sockets import is_here
from lamina_protocols.channels.versions import PREVIOUS, PROTOCOL_VERSION
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames import codec
from lamina_protocols.messages.messages import Announced, Announcement, Fresh
from lamina_workers.errors import HolderLost
from lamina_workers.ports import remote
from lamina_workers.ports.data_channel import check_local

ANNOUNCEMENT = Announcement(1, 1, 0, (), ())


class Scripted(OneStream):
    """A worker that welcomes everybody, and whose heartbeats and offers the test decides."""

    def __init__(self) -> None:
        super().__init__()
        self.state = "serving"
        self.delay = 0.0
        self.over = threading.Event()  # ends delays
        self.local: control.LocalOffer | None = None

    def hello(self, hello: control.Hello, remaining: float) -> control.Welcome:
        return control.Welcome("scripted", 1, 1, 0.6, 1 << 20, self.local, None, False, "")

    def heartbeat(self, heartbeat: control.Heartbeat) -> control.Alive:
        self.over.wait(self.delay)
        return control.Alive(self.state)


@contextlib.contextmanager
def scripted(**changes) -> Iterator:
    worker = Scripted()
    with serving(worker, None) as address, connected(address, **{"local_channel": False, **changes}) as port:
        yield worker, port, worker.channels.get(timeout=5)


@pytest.mark.fault("F22")
def test_a_worker_that_refuses_every_version_is_greeted_twice():
    """It was greeted for ever, a million times in five seconds where it answered fast."""
    asked: list[int] = []

    class Refusing(Scripted):
        def hello(self, hello: control.Hello, remaining: float) -> control.Welcome:
            asked.append(hello.protocol)
            if len(asked) > 9:
                raise ProtocolError("it is greeted again and again")
            raise ProtocolError(f"protocol version: the engine has {PROTOCOL_VERSION}, this worker {PREVIOUS}; allowed")

    refused = pytest.raises(WorkerRefused, match=f"this worker {PREVIOUS}")
    with serving(Refusing(), None) as address, refused, connected(address):
        pass
    assert asked == [PROTOCOL_VERSION, PREVIOUS]


@pytest.mark.fault("F06")
@pytest.mark.parametrize("way", ["local", "grpc", "tcp"])
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
        worker.over.set()


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


@pytest.mark.parametrize(("linger", "delay"), [(0.0, 0.0), (30.0, 0.0), (30.0, 30.0)])
def test_close_waits_for_no_worker(monkeypatch, linger, delay):
    """To close the port of a worker that did not answer took its caller, the engine's thread, two seconds; also where a
    heartbeat is under way."""
    monkeypatch.setattr(remote, "_GOODBYE_S", 20.0)
    asked, answer = threading.Event(), threading.Event()
    with scripted(linger=linger, lost_after=40.0) as (worker, port, _):
        worker.delay = delay
        time.sleep(0.5 if delay else 0.0)  # a heartbeat comes every 0.1 s
        worker.goodbye = lambda goodbye: [asked.set(), answer.wait(20), control.Alive("ended")][-1]
        began = time.monotonic()
        port.close()
        assert time.monotonic() - began < 10
        assert asked.wait(10)
        with pytest.raises(HolderLost, match="closed on this side"):
            port.receive(5)
        answer.set()
        worker.over.set()
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
@pytest.mark.parametrize("way", ["local", "grpc", "tcp"])
def test_a_worker_that_does_not_read_is_lost_in_time(way):
    """A worker that answered heartbeats and did not read its channel stopped the engine's thread for ever."""
    with running() as (server, address), connected(address, **WAYS[way], lost_after=1.0) as port:
        release = threading.Event()
        server._leases.loop._do(lambda: release.wait(60))
        large = Fresh(1, 1, 0, *torch.empty(2, 1 << 18, 4))
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
    empty = Fresh(1, 1, 0, *torch.empty(2, 0, 4))
    for frame, said in (([b"\1" * 30], "frame starts with"), (codec.encode(empty), "it sent a Fresh")):
        with scripted() as (_, port, far):
            far.send(frame)
            with pytest.raises(HolderLost, match=said):
                port.receive(5)


def test_a_local_channel_that_cannot_be_reached_falls_back_to_grpc(tmp_path):
    worker = Scripted()
    worker.local = control.LocalOffer(str(tmp_path / "nobody"), bytes(32))
    with serving(worker, None) as address, connected(address) as port:
        assert port.channel_kind == "grpc"


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


# Lines that break in one direction only, or change bits.


@pytest.mark.fault("F06")
@pytest.mark.parametrize("way", ["to", "from"])
def test_a_black_hole_in_one_direction_is_noticed_at_both_ends(way):
    """The engine loses the port in time. The worker frees the KV: where it hears nothing any more by the lease, where
    it is heard by nobody as the connection ends. No thread is left."""
    with running(lease=1.0) as (server, address), Proxy(address) as proxy:
        before = threading.active_count()
        with connected(proxy.address, local_channel=False, lost_after=0.5) as port:
            one_batch(port)
            assert server.status().parts == 1
            proxy.toxic = Toxic(black_hole=True, way=way)
            began = time.monotonic()
            with pytest.raises(HolderLost, match="no heartbeat for"):
                port.receive()
            assert 0.4 < time.monotonic() - began < 3
            if way == "to":
                proxy.reset()  # by now the network would have given the connection up
        until(lambda: not server.status().session, 10)
        assert server.status().parts == 0
        until(lambda: threading.active_count() <= before + 2, 10)  # of gRPC's own


def send_spoilt(channel: Any, send: Callable[[list[bytes]], None]) -> None:
    """Send a frame whose checksum does not agree."""
    trailer, channel._trailer = channel._trailer, 0
    send([b"".join(codec.encode(ANNOUNCEMENT)), b"\0\0\0\0"])
    channel._trailer = trailer


@pytest.mark.fault("F08")
@pytest.mark.parametrize("way", ["grpc+sum", "tcp+sum"])
@pytest.mark.parametrize("to_worker", [True, False])
def test_a_frame_with_changed_bits_is_told_from_other_losses(way, to_worker):
    with running() as (server, address), connected(address, **WAYS[way]) as port:
        corrupt: list[str] = []
        port.on_corrupt = lambda: corrupt.append("")
        port.send(ANNOUNCEMENT)
        assert isinstance(port.receive(5), Announced)
        if to_worker:
            send_spoilt(port.channel, port.channel.send)
        else:
            (session,) = server._leases._sessions.values()
            send_spoilt(session.channel, session.channel.post)
            session.channel.flush()
        ended = "it ended the session: " if to_worker else ""
        with pytest.raises(HolderLost, match=rf"{ended}the checksum of a frame of \d+ bytes does not agree"):
            port.receive(5)
        assert corrupt == [""]


@pytest.mark.fault("F08")
def test_an_answer_without_a_message_is_none(monkeypatch):
    """A changed bit made gRPC answer None, an error that ended the heartbeats of that port for good."""
    with running() as (_, address), WorkerClient(address) as client:
        monkeypatch.setitem(client._calls, "Heartbeat", lambda *what, **how: None)
        with pytest.raises(WorkerUnreachable, match=r"Heartbeat at .*: an answer without a message"):
            client.heartbeat("0" * 32, 1.0)


# The data channel that a worker offers: Unix sockets of this host alone, and no other's.

SECRET = bytes(32)


@pytest.mark.fault("F22")
@pytest.mark.parametrize("where", ["another folder", "a folder for all", "another name", "through a link"])
def test_a_worker_cannot_have_the_engine_write_to_a_socket_of_its_choice(tmp_path, where):
    """A worker elsewhere named any Unix socket of the engine's host, and the engine sent it what the worker chose."""
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        path = {
            "another folder": tmp_path / "data",
            "a folder for all": Path(folder, "data"),
            "another name": Path(folder, "docker.sock"),
            "through a link": Path(f"{folder}-link", "data"),
        }[where]
        if where == "a folder for all":
            os.chmod(folder, 0o755)
        if where == "through a link":
            path.parent.symlink_to(folder)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen()
            listening.setblocking(False)
            worker = Scripted()
            worker.local = control.LocalOffer(str(path), SECRET)
            with serving(worker, None) as address, connected(address, timeout=2.0) as port:
                assert port.channel_kind == "grpc"
            if where == "through a link":
                path.parent.unlink()
            with pytest.raises(BlockingIOError):
                listening.accept()


def test_what_a_worker_of_this_user_makes_is_taken():
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        check_local(f"{folder}/data", "127.0.0.1")
        with pytest.raises(ChannelClosed, match=r"offered from another host, 192\.0\.2\.1"):
            check_local(f"{folder}/data", "192.0.2.1")


@pytest.mark.parametrize(
    "path", ["", "data", "/tmp/lamina-/../data", "/tmp/lamina-x\0/data", "/" + "x" * 5000, "\ud800"]
)
def test_paths_that_are_none(path):
    with pytest.raises(ChannelClosed, match="local channel"):
        check_local(path, "127.0.0.1")


def test_which_addresses_are_here():
    assert is_here("127.0.0.1")
    assert is_here("::1")
    assert is_here("localhost")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:  # without a network there is nothing else
            return
        assert is_here(probe.getsockname()[0])
    for host in ("192.0.2.1", "2001:db8::1", "no such name", "\ud800", "x" * 300):
        assert not is_here(host)


@pytest.mark.parametrize("size", [0, 31, 33, 4106])
def test_a_secret_has_its_size(size):
    """The engine sent a secret of any length, so up to a megabyte of the worker's choice."""
    welcome = control.Welcome("w", 1, 1, 1.0, 1, control.LocalOffer("/tmp/x", bytes(size)), None, False, "")
    with pytest.raises(ProtocolError, match=f"a secret of {size} bytes, it has 32"):
        control.unpack(control.Welcome, control.pack(welcome))


@pytest.mark.parametrize("port", [0, 65536, 1 << 40])
def test_a_port_is_one(port):
    """A port beyond 65535 was an OverflowError, which nobody caught."""
    welcome = control.Welcome("w", 1, 1, 1.0, 1, None, control.TcpOffer(port, SECRET), False, "")
    with pytest.raises(ProtocolError, match=f"port {port}, allowed"):
        control.unpack(control.Welcome, control.pack(welcome))
