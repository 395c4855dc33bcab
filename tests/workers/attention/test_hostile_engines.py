"""A worker and an engine that lies in every field of every message: its session ends, or it is told what is wrong; the
worker lives, and another seat's work goes on with the same numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_servers import ASKED, KV_MEMORY, LAYERS, connected, hello, open_port, process, running
from lies import SILENT, lies_about, some
from test_leases import ENGINE, HALF, Sender

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import ChannelClosed
from lamina_protocols.channels.grpc_client import WorkerClient, WorkerRefused
from lamina_protocols.frames import codec
from lamina_protocols.frames.frames import Prefix, pack_prefix
from lamina_protocols.messages import messages as m
from lamina_protocols.messages.messages import FetchSample, Sample
from lamina_workers.ports.remote import RemoteAttention

pytestmark = pytest.mark.real  # some minutes

ROWS = (m.Row(1, 0, 3, None, True), m.Row(2, 0, 2, (0, 2), True))
BEGIN = m.Announcement(3, 5, 0, (m.Open(1, 0, (0, 1), 0, 100), m.Open(2, 0, (0,), 0, 100)), ROWS)
K, V, Q = torch.randn(8, 16), torch.randn(8, 32), torch.randn(6, 16)
PAGE = torch.zeros(3, 16 * (16 + 32) * 4, dtype=torch.uint8)
REQUESTS: dict[str, tuple[Sequence[m.Request], m.Request]] = {
    "announcement": ((), BEGIN),
    "a later announcement": (
        (BEGIN,),
        m.Announcement(3, 6, 2, (m.Fork(3, 1, 2), m.Close(2)), (m.Row(1, 0, 1, None, True),)),
    ),
    "exchange": ((BEGIN,), m.Exchange(3, 5, 0, Q, K, V)),
    "query": ((BEGIN,), m.Query(3, 5, 0, Q)),
    "fresh": ((BEGIN,), m.Fresh(3, 5, 0, K, V)),
    "fresh pages": ((BEGIN,), m.FreshPages(3, 5, 0, 0, 1, PAGE)),
    "fetch": ((BEGIN,), m.Fetch(3, 5, 0, 1, 0, 0)),
    "fetch pages": ((BEGIN,), m.FetchPages(3, 5, 0, 1, 1, 0, 0)),
    "sample": ((BEGIN,), Sample(3, 5, 0, 1, (0,), (0, 2), Q[:4].bfloat16())),
    "fetch sample": ((BEGIN,), FetchSample(3, 5, 0, 1, 0, 9)),
    "survey": ((BEGIN,), m.Survey(3, 1, 0)),
}


@contextlib.contextmanager
def hostile(address: str, **way: Any) -> Iterator[RemoteAttention]:
    port = open_port(address, **{**ASKED, **HALF, **way}, seat=1, linger=30.0)
    try:
        yield port
    finally:
        port.close()
        port.parted()


def drained(port: RemoteAttention) -> bool:
    """Read answers until that to the last survey. Whether the session lives."""
    try:
        port._channel.send(codec.encode(m.Survey(1 << 60, 77)))
        while True:
            reply = codec.decode(port._channel.receive(10))
            if isinstance(reply, m.Surveyed) and reply.batch == 77:
                return True
            if isinstance(reply, m.Fault) and (reply.epoch, reply.batch) == control.FAREWELL:
                return False
    except ChannelClosed:
        return False


@pytest.mark.fault("F07")
@pytest.mark.parametrize(
    ("kind", "way"),
    # Over gRPC only lies about whole frames are told, which are the same for each kind: one of headers, one of layers.
    [*((kind, "local") for kind in REQUESTS), ("announcement", "grpc"), ("exchange", "grpc")],
)
def test_no_message_of_an_engine_costs_more_than_its_session(kind, way, caplog):
    """A frame with impossible dimensions raised an error that nobody foresaw, which ended the seat and its KV."""
    before, request = REQUESTS[kind]
    frame = b"".join(codec.encode(request))
    options: dict[str, Any] = {} if way == "local" else {"local_channel": False}
    lies = list(lies_about(frame))
    lies = some(lies, 30) if way == "local" else lies[:14]  # what a frame says is the same over every channel
    with running(kv_memory=40 * KV_MEMORY) as (server, address), connected(address, **HALF) as near:
        honest = Sender(near, 3)
        for number, (name, lie) in enumerate(lies):
            with hostile(address, **options) as port:
                for each in before:
                    port.send(each)
                    port.receive(10)
                if lie:
                    port._channel.send([lie])
                if name not in SILENT and not drained(port):
                    assert server.status().seats == 2, name  # its KV is kept
            if number % 8 == 0:
                honest.step()
            unforeseen = [record for record in caplog.records if record.exc_info]
            assert not unforeseen, (name, unforeseen[0].getMessage(), unforeseen[0].exc_info)
        honest.step(3)


@pytest.mark.fault("F22")
def test_what_a_handshake_claims_is_refused_or_harmless(caplog):
    """A layer of 2^31 heads kept the worker's one thread that computes busy for hours, before it was refused."""
    whole = hello(engine=ENGINE, seat=1, share=(1, 2))
    lies: dict[type, tuple[Any, ...]] = {
        int: (0, 3, 1 << 31, 1 << 61),
        str: ("", "x" * 5000, "\n\0\x1b[2J", "0" * 64),
        float: (-1.0, 1e300),
        bool: (True, False),
        tuple: ((), (0,), (1, 0), (1 << 61, 1 << 61), (-1, 2)),
    }
    with running(kv_memory=40 * KV_MEMORY) as (_, address), connected(address, **HALF) as near:
        honest = Sender(near, 4)
        with WorkerClient(address) as client:
            for each in dataclasses.fields(whole):
                for lie in lies[type(getattr(whole, each.name))]:
                    changed = dataclasses.replace(whole, **{each.name: lie if each.name != "layers" else ()})
                    with contextlib.suppress(WorkerRefused):
                        client.hello(changed, 10)
                        client.goodbye(control.Goodbye(changed.engine, changed.seat, changed.session), 10)
                    honest.step()
            for each in dataclasses.fields(LAYERS[0]):
                for lie in (0, 1, 7, 1 << 31, 1 << 61, None, -1.0, 1e300, "x", ("nonsense",) * 2):
                    layer = dataclasses.replace(LAYERS[0], **{each.name: lie})
                    with contextlib.suppress(Exception):  # some of it cannot be written down
                        client.hello(dataclasses.replace(whole, layers=(layer,)), 10)
                        client.goodbye(control.Goodbye(ENGINE, 1, whole.session), 10)
            honest.step()
    assert not [record for record in caplog.records if record.exc_info]


def test_claims_of_frames_take_no_memory():
    """What a frame claims is no memory before it has come, however many claim it."""
    with process() as child:
        address = child.stdout.readline().split()[1]
        status = Path(f"/proc/{child.pid}/status")
        with contextlib.ExitStack() as stack:
            ports = [
                stack.enter_context(hostile(address, **({} if at % 2 else {"local_channel": False})))
                for at in range(24)
            ]
            before = _resident(status)
            for port in ports:
                port._channel.send([pack_prefix(Prefix(2, 1 << 19, 1 << 30)) + bytes(1000)])
            near = stack.enter_context(connected(address, **HALF))
            Sender(near, 5).step(3)
            assert _resident(status) < before + (64 << 20)


def test_frames_that_arrive_slowly_are_bounded_together():
    """Each of 64 sessions could let a worker keep 1 GiB of a frame that never ended."""
    with running(kv_memory=40 * KV_MEMORY, max_frame=8 << 20) as (server, address), contextlib.ExitStack() as stack:
        ports = [
            stack.enter_context(hostile(address, **({} if at % 2 else {"local_channel": False}))) for at in range(6)
        ]
        near = stack.enter_context(connected(address, **HALF))
        honest = Sender(near, 6)
        for port in ports:
            port._channel.send([pack_prefix(Prefix(2, 1000, 7 << 20)) + bytes(1000)])
        deadline = time.monotonic() + 20
        while sum(session.seat.number == 1 for session in server._leases._sessions.values()) > 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        honest.step(3)
        for port in ports:  # what is over is not counted any more
            port.close()
            port.parted()
        with hostile(address) as port:
            port._channel.send([pack_prefix(Prefix(2, 1000, 7 << 20)), bytes(1000 + (7 << 20))])
            fault = codec.decode(port._channel.receive(10))
            assert isinstance(fault, m.Fault)
            assert "no msgpack" in fault.reason  # it was read
        honest.step(3)


def _resident(status: Path) -> int:
    """Bytes of memory that a process has."""
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) << 10
