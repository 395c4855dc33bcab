"""The link between the HTTP process and the engine's, over a real Unix socket in one process."""

from __future__ import annotations

import contextlib
import gc
import queue
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from engine_rig import Rig, collect
from real_workers import until
from unobserved import Unobserved

from lamina.client.remote import RemoteEngine
from lamina.errors import EngineError
from lamina.kv.request import Request
from lamina.messages.engine_messages import Abort, RequestOutputs, pack_events, unpack_events
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.messages.request_codec import encode_request
from lamina.models.resolve import resolve
from lamina.sampling_params import SamplingParams
from lamina.server.frontend import EngineUnavailable, Frontend, Served
from lamina.server.processes import http_main
from lamina.server.processes.child_protocol import Connected
from lamina.server.processes.engine_link import EngineLink, EngineListener, SocketWire, frame, payload
from lamina_protocols.channels.sockets import connect_unix
from lamina_protocols.errors import ProtocolError
from lamina_workers.decoder.model import Decoder

SECRET = secrets.token_bytes(32)


@pytest.fixture
def rig(decoder: Decoder) -> Iterator[Rig]:
    rig = Rig(decoder)
    yield rig
    rig.close()


@pytest.fixture
def path(rig: Rig, tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "engine.sock")
    listener = EngineListener(path, SECRET, rig.engine, time.monotonic)
    yield path
    listener.close()


@pytest.fixture
def connect(path: str) -> Iterator[Callable[[str], RemoteEngine]]:
    wires = []

    def connected(name: str) -> RemoteEngine:
        wires.append(SocketWire(path, SECRET, name))
        return RemoteEngine(wires[-1], time.monotonic)

    yield connected
    for wire in wires:
        wire.close()


Connect = Callable[[str], RemoteEngine]


def ask(engine: RemoteEngine, prompt: tuple[int, ...], max_tokens: int, name: str, **sampling: Any) -> Any:
    inbox: queue.SimpleQueue[list[EngineOutput]] = queue.SimpleQueue()
    params = SamplingParams(max_tokens=max_tokens, **sampling).with_defaults({})
    request = Request(name, prompt, max_tokens, n=params.n, salt=("tenant", "a"))
    engine.submit(EngineRequest(request, params, seed=2**64 - 1, sink=lambda _, outputs: inbox.put(outputs)))
    return inbox


def test_tokens_are_those_of_the_engine_itself(rig: Rig, connect: Connect) -> None:
    engine = connect("a")
    prompts = [tuple(range(at, at + 40)) for at in range(3)]
    expected = rig.generate(prompts, max_tokens=12)
    inboxes = [ask(engine, prompt, 12, str(at)) for at, prompt in enumerate(prompts)]
    assert [collect(inbox) for inbox in inboxes] == expected
    biased = collect(ask(engine, prompts[0], 3, "biased", logit_bias={7: 100.0}, logprobs=2))
    assert biased == [[7, 7, 7]]


def test_a_client_that_is_gone_leaves_nothing_behind(rig: Rig, path: str, connect: Connect) -> None:
    wire = SocketWire(path, SECRET, "a")
    engine = RemoteEngine(wire, time.monotonic)
    inbox = ask(engine, (1, 2, 3), 2000, "long")
    inbox.get(timeout=30)
    wire.close()
    until(lambda: not rig.engine._registry.requests, 5)
    with pytest.raises(EngineError):
        collect(inbox)
    assert not engine.alive
    assert len(collect(ask(connect("b"), (1, 2, 3), 4, "long"))[0]) == 4


def test_an_engine_that_stops_is_told_to_its_clients(rig: Rig, connect: Connect) -> None:
    engine = connect("a")
    inbox = ask(engine, (1, 2, 3), 2000, "long")
    inbox.get(timeout=30)
    rig.engine.close()
    with pytest.raises(EngineError, match="stopped"):
        collect(inbox)
    assert engine.join(5.0)


def test_strangers_and_half_clients_are_let_go(path: str, connect: Connect) -> None:
    with pytest.raises(EngineError, match="secret"):
        SocketWire(path, bytes(32), "a")
    channels = []
    for first, second in ((("commands", "x"), ("commands", "x")), (("events",), ("events", "y"))):
        for said in (first, second):
            channels.append(connect_unix(path, SECRET, 5.0))
            channels[-1].send(frame(msgpack.packb(said)))
    channels.append(connect_unix(path, SECRET, 5.0))
    channels[-1].send(frame(msgpack.packb(["no", "direction", "at", "all"])))
    assert len(collect(ask(connect("b"), (1, 2, 3), 4, "1"))[0]) == 4
    for channel in channels:
        channel.close()


REQUEST = encode_request(Request("x", (1,), 1))


@pytest.mark.parametrize(
    "command",
    [
        (0, {"id": "x"}, {}, 0, None),
        (0, REQUEST, {"temper": 1}, 0, None),
        (0, REQUEST | {"unheard": 1}, {}, 0, None),
        (0, REQUEST, {}, -1, None),
        (0, REQUEST, {}, 0, (((1,), 2),)),
        (0,),
        (1, "x"),
        (1, "x", None, "tired"),
        (9,),
        7,
    ],
)
def test_a_command_that_makes_no_sense_ends_that_client_alone(rig: Rig, path: str, command: Any) -> None:
    wire = SocketWire(path, SECRET, "a")
    wire._commands.send(frame(msgpack.packb([command])))
    with pytest.raises(EngineError):
        read_to_the_end(wire)
    wire.close()
    assert rig.generate([(1, 2, 3)], max_tokens=2)


def read_to_the_end(wire: SocketWire) -> None:
    while True:
        wire.events()


def test_an_engine_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be reached"):
        SocketWire(str(tmp_path / "none.sock"), SECRET, "a")


@pytest.mark.fault("F09")
def test_commands_that_together_are_too_large_for_a_frame_are_sent(rig: Rig, path: str) -> None:
    wire = SocketWire(path, SECRET, "a")
    wire.ask([Abort("x" * (1 << 20), None, "abort")] * 80)
    engine = RemoteEngine(wire, time.monotonic)
    assert len(collect(ask(engine, (1, 2, 3), 4, "1"))[0]) == 4
    wire.close()


def test_the_http_process_loads_neither_torch_nor_ray() -> None:
    code = "import sys, lamina.server.processes.http_main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "grpc", "numba"}.intersection(loaded)


class Followed(Frontend):
    """A frontend that notes what it is told."""

    def __init__(self) -> None:
        super().__init__(Unobserved())
        self.news: list[str] = []

    def ready(self, served: Served, restarts: int = 0) -> None:
        super().ready(served, restarts)
        self.news.append(f"ready {restarts}")

    def lost(self, why: str) -> None:
        super().lost(why)
        self.news.append("lost")


@pytest.mark.data
def test_a_link_is_made_as_soon_as_it_can_be_and_made_again(rig: Rig, tmp_path: Path) -> None:
    frontend, path = Followed(), str(tmp_path / "engine.sock")
    link = EngineLink(frontend, SECRET, lambda: frontend.news.append("connected"))
    facts = {"socket": path, "folder": str(resolve("smollm2-135m")), "context": 64, "possible": 64, "vocab_size": 64}
    link.ready(facts | {"restarts": 2})
    until(lambda: "lost" in frontend.news)  # nobody is there yet
    listener = EngineListener(path, SECRET, rig.engine, time.monotonic)
    until(lambda: frontend.news[-2:] == ["ready 2", "connected"])
    assert link._wire is not None
    link._wire.close()  # it breaks, while the engine lives
    until(lambda: frontend.news.count("connected") == 2)
    assert len(collect(ask(frontend.served.engine, (1, 2, 3), 4, "1"))[0]) == 4  # type: ignore[arg-type]
    link.dead("gone")
    with pytest.raises(EngineUnavailable, match="gone"):
        frontend.served  # noqa: B018  # it raises
    until(lambda: link._wire is None)
    listener.close()


def test_what_a_loaded_model_made_is_never_collected() -> None:
    """A full collection among the requests of a busy server stopped its event loop for 0.1 s."""
    sent: list[object] = []
    gc.collect()
    before = gc.get_freeze_count()
    http_main._connected(SimpleNamespace(send=sent.append), "m")  # type: ignore[arg-type]
    assert sent == [Connected("m")]
    assert gc.get_freeze_count() > before


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_frame_are_a_protocol_error(seed: int) -> None:
    outputs = RequestOutputs("1", ((0, 5, None, 0.5),), None, 0, 0, (), 0, 0)
    data = bytearray(b"".join(frame(pack_events([outputs]))))
    assert unpack_events(payload(memoryview(data))) == (outputs,)
    chance = random.Random(seed)
    data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    with contextlib.suppress(ProtocolError):
        unpack_events(payload(memoryview(data)))
    for cut in (0, 5, len(data) - 1):
        with pytest.raises(ProtocolError):
            payload(memoryview(data[:cut]))
