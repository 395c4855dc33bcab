"""Engines and workers of versions 7 and 8 beside each other: what 7 lacks is not used, and the rest goes on."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgpack
import pytest
from attention_servers import ASKED, KV_MEMORY, WAYS, connected, one_batch, open_port, running
from real_workers import worker_process

from lamina_protocols.channels import control
from lamina_protocols.channels.grpc_client import WorkerClient, WorkerRefused
from lamina_protocols.channels.versions import BOUND, FEATURES, PREVIOUS, PREVIOUS_RELEASE, PROTOCOL_VERSION
from lamina_workers.ports.remote import Edges

SEVEN = Path(__file__).parents[2] / "support" / "version_seven.py"


def test_sides_of_this_version_share_all_features() -> None:
    with running() as (_, address), connected(address) as port:
        assert port.features == FEATURES


@pytest.mark.fault("F31")
@pytest.mark.real
@pytest.mark.parametrize("way", WAYS)
def test_an_engine_uses_a_worker_of_the_previous_version_without_what_that_lacks(way: str) -> None:
    with worker_process("--kv-memory", str(KV_MEMORY), script=SEVEN) as worker:
        address = worker.address
        with WorkerClient(address) as client, pytest.raises(WorkerRefused, match="this worker 7"):
            client.hello(greeting(address), 10)
        with connected(address, **WAYS[way], timeout=60.0) as port:
            assert port.features == frozenset()
            one_batch(port)


def greeting(address: str, **changes: Any) -> control.Hello:
    """What this version says first."""
    said: list[control.Hello] = []

    class Listening(WorkerClient):
        def hello(self, hello: control.Hello, timeout: float) -> control.Welcome:
            said.append(hello)
            raise WorkerRefused("heard")

    with contextlib.suppress(WorkerRefused):
        open_port(address, edges=Edges(client=Listening), **ASKED)
    return said[0]


@pytest.mark.fault("F31")
def test_a_worker_answers_an_engine_of_the_previous_version_as_that_understands() -> None:
    with running() as (server, address), WorkerClient(address) as client:
        old = control.as_previous(greeting(address))
        assert (old.protocol, old.version) == (PREVIOUS, PREVIOUS_RELEASE)
        welcome = server.hello(control.unpack(control.Hello, control.pack(old)), 10)
        assert len(msgpack.unpackb(control.pack(welcome))) == 9
        client.goodbye(control.Goodbye(old.engine, old.seat, old.session), 5)


def test_a_worker_answers_an_engine_of_the_next_version_with_what_both_have() -> None:
    with running() as (server, address):
        hello = greeting(address)
        fields = [PROTOCOL_VERSION + 1, *msgpack.unpackb(control.pack(hello))[1:]]
        fields[-1] = [BOUND, "telepathy"]
        newer = control.unpack(control.Hello, msgpack.packb([*fields, "a field of then"]))
        assert server.hello(newer, 10).features == (BOUND,)
