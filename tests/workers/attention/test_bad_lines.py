"""A port whose line is broken in one direction only, or changes bits: lost in time, with nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from attention_servers import WAYS, connected, one_batch, running, until
from evaluate.fault_injection.proxy import Proxy, Toxic

from lamina_protocols.channels.grpc_client import WorkerClient, WorkerUnreachable
from lamina_protocols.frames import codec
from lamina_protocols.messages.messages import Announced, Announcement
from lamina_workers.errors import HolderLost

ANNOUNCEMENT = Announcement(1, 1, 0, (), ())


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


def spoilt(channel: Any, send: Callable[[list[bytes]], None]) -> None:
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
            spoilt(port.channel, port.channel.send)
        else:
            (session,) = server._leases._sessions.values()
            spoilt(session.channel, session.channel.post)
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
