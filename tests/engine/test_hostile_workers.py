"""An engine and a worker that lies in every field of every message: the engine lives, the other workers stay, their
streams go on with the same text, and the liar alone is lost."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from engine_rig import Rig
from exchange_peers import exchanged
from lies import BYTES, SILENT, lies_about, some
from lying_workers import Farm, LyingServer, port_to, server_of
from real_workers import until

from lamina.kv.placement import Holder
from lamina.messages.engine_messages import RequestOutputs, pack_events
from lamina.sampling_params import SamplingParams
from lamina_protocols.channels import control
from lamina_protocols.errors import LaminaError
from lamina_protocols.frames import codec
from lamina_protocols.frames.frames import read_prefix
from lamina_protocols.messages.messages import Announced, Usage
from lamina_workers.decoder.model import Decoder

pytestmark = pytest.mark.real  # some minutes

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]
PATIENCE = 1.5  # seconds that the engine waits for a worker's answer


class Stream(threading.Thread):
    """A stream that lasts: one request after another with the same text. `longest`: seconds between two tokens.

    A request that begins beside a liar has KV at the liar and may fail with it, so none begins between `hold` and
    `release`."""

    def __init__(self, rig: Rig, expected: list[int]) -> None:
        super().__init__(daemon=True)
        self.wrong: list[Any] = []
        self.longest = 0.0
        self.ended = False
        self._rig = rig
        self.expected = expected
        self._beginning = threading.Lock()
        self._begun = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended:
            said: list[int] = []
            with self._beginning:
                request = SamplingParams(max_tokens=len(self.expected)).with_defaults({})
                _, inbox = self._rig.submit(PROMPT[::-1], request)
                last = time.monotonic()
                going = self._hear(inbox, said)  # with its first token a request has its workers
                self._begun.set()
            while going and len(said) < len(self.expected):
                going = self._hear(inbox, said)
                now = time.monotonic()
                self.longest, last = max(self.longest, now - last), now
            if not going:
                return
            if said != self.expected:
                self.wrong.append(said)

    def hold(self) -> None:
        """A request has begun, and no other begins."""
        self._begun.clear()
        assert self._begun.wait(60), "the stream has stopped"
        self._beginning.acquire()

    def release(self) -> None:
        self._beginning.release()

    def _hear(self, inbox: queue.SimpleQueue[Any], said: list[int]) -> bool:
        """Add the next tokens to `said`; False if the request has failed."""
        for output in inbox.get(timeout=60):
            if output.error is not None:
                self.wrong.append(output.error)
                return False
            said.append(output.token)
        return True


class Scene:
    """An engine with two honest workers, a stream at these, and a place for a liar."""

    def __init__(self, decoder: Decoder, farm: Farm, **options: Any) -> None:
        self.rig = Rig(decoder, shard="heads", weights=(1, 1), pages=400, port=farm)
        worker: Any = self.rig.engine._worker
        worker._patience = worker._merge._patience = PATIENCE
        self.farm = farm
        self.over = "local"
        self.liar, self._address = server_of(self.rig.holder, "liar", LyingServer)
        farm.callback(self.liar.stop, 0)
        self._options = options
        self._joined = 0
        (self.expected,) = self.rig.generate([PROMPT], max_tokens=4)[0]
        (long,) = self.rig.generate([PROMPT[::-1]], max_tokens=200)[0]
        self.stream = Stream(self.rig, long)

    def join(self) -> Any:
        """The liar joins the engine, beside a request of the stream that has no KV there."""
        self._joined += 1
        self.stream.hold()
        try:
            port = port_to(self._address, f"liar-{self._joined}", self.rig.holder, lost_after=PATIENCE, **self._options)
            self.rig.engine.join(port, Holder((self.rig.pages,), 1, name=port.name))
        except LaminaError:
            self.stream.release()
            raise
        return port

    def leave(self, port: Any) -> None:
        self.rig.engine.leave(port.name)
        self.stream.release()

    def told(self) -> Any:
        """What a request is told that is kept by all three: its tokens, or its error."""
        try:
            return self.rig.generate([PROMPT], max_tokens=4)[0][0]
        except Exception as error:  # noqa: BLE001  # whatever a client is told
            return error

    def lied(self, name: str, port: Any) -> list[str]:
        """The liar has done what it could: what it has cost others."""
        said = self.told()
        self.leave(port)
        costs = []
        if not self.rig.engine.alive:
            raise AssertionError(f"{name}: the engine has ended")
        if any(each.closed for each in self.farm.ports):
            raise AssertionError(f"{name}: an honest worker is lost")
        if self.stream.wrong:
            costs.append(f"{name}: another stream: {self.stream.wrong}")
            self.stream = Stream(self.rig, self.stream.expected)
        if (now := self.told()) != self.expected:
            costs.append(f"{name}: afterwards: {now}")
        if not isinstance(said, Exception) and len(said) != 4:
            costs.append(f"{name}: {said}")
        return costs

    def close(self) -> None:
        self.stream.ended = True
        self.stream.join(60)
        self.rig.close()


@pytest.fixture
def scene(request: pytest.FixtureRequest, decoder: Decoder) -> Iterator[Scene]:
    """Over a local channel, where a test asks for no other: what a frame says is the same over each of them, and the
    handshake and heartbeats go over gRPC in any case."""
    over = getattr(request, "param", "local")
    options = {} if over == "local" else {"local_channel": False}
    with exchanged("compiled"), Farm() as farm:
        made = Scene(decoder, farm, **options)
        made.over = over
        yield made
        made.close()


every_channel = pytest.mark.parametrize("scene", ["local", "grpc"], indirect=True)


def answers(scene: Scene) -> dict[int, bytes]:
    """An honest answer of each kind."""
    seen: dict[int, bytes] = {}

    def note(frame: bytes) -> None:
        seen.setdefault(read_prefix(frame).tag, frame)

    scene.liar.bend = note
    port = scene.join()
    assert scene.told() == scene.expected
    scene.leave(port)
    return seen


def waits(name: str) -> bool:
    """Whether a lie is an answer to another batch, which costs the whole deadline; one of each kind is enough."""
    field, _, value = name.replace("=", ":").partition(":")
    return field in ("epoch", "batch") and value.isdecimal() and value != "7"


@pytest.mark.fault("F07")
@every_channel
def test_no_answer_of_a_worker_costs_more_than_that_worker(scene):
    """One reply with impossible dimensions ended the engine, and with it every request."""
    seen = answers(scene)
    assert set(seen) == {2, 5}
    costs = []
    for tag in seen:
        names = [name for name, _ in lies_about(seen[tag])]
        chosen = some(list(range(len(names))), 40 if scene.over == "local" else 3)
        for number, name in ((number, names[number]) for number in chosen):
            if name in SILENT | {"a fault"} or waits(name):  # these have tests of their own
                continue

            def bend(frame: bytes, tag: int = tag, number: int = number) -> bytes | None:
                if read_prefix(frame).tag != tag:
                    return None
                return next((lie for at, (_, lie) in enumerate(lies_about(frame)) if at == number), None)

            scene.liar.bend = bend
            kind = codec._MESSAGES[tag].__name__ if tag in codec._MESSAGES else "Attended"
            costs += scene.lied(f"{kind} {name}", scene.join())
    assert not costs, "\n".join(costs)


@pytest.mark.fault("F04")
@every_channel
@pytest.mark.parametrize("silence", ["nothing", "half a frame", "half a prefix", "half a frame late", "does not read"])
def test_a_silent_worker_stops_the_others_for_its_deadline_and_no_longer(scene, silence):
    """A deadline began anew with each frame, sending had none, and letting a silent worker go took two seconds more."""
    port = scene.join()
    assert scene.told() == scene.expected
    scene.stream.longest = 0.0
    release = threading.Event()
    if silence == "does not read":
        scene.liar._leases.loop._do(lambda: release.wait(30))
    else:
        scene.liar.bend = lambda frame: silent(silence, frame)
    began = time.monotonic()
    said = scene.told()
    assert time.monotonic() - began < 20
    release.set()
    assert port.closed
    assert said == scene.expected
    assert not scene.lied(silence, port)
    assert scene.stream.longest < PATIENCE + 8.0  # on a busy machine too


def silent(how: str, frame: bytes) -> bytes:
    """What is sent of a frame, and then no more."""
    if how == "half a frame late":
        time.sleep(PATIENCE - 0.3)
        return frame[: len(frame) // 2]
    return BYTES[how](frame)


def test_a_worker_that_ends_every_batch_is_let_go(scene):
    """Faults were blamed on requests, whoever told them: a worker that told nothing else ended all, then the engine."""
    seen = answers(scene)
    for tag in seen:

        def bend(frame: bytes, tag: int = tag) -> bytes | None:
            lies = lies_about(frame)
            return next(lie for name, lie in lies if name == "a fault") if read_prefix(frame).tag == tag else None

        scene.liar.bend = bend
        port = scene.join()
        until(lambda port=port: scene.told() == scene.expected and port.closed, 30)
        costs = scene.lied("faults", port)
        assert not [cost for cost in costs if "afterwards" in cost]


@pytest.mark.fault("F07")
@pytest.mark.parametrize("accepts", [False, True])
@pytest.mark.parametrize("free", [None, 0, 1 << 40])
def test_a_worker_that_says_it_is_full_is_let_go(scene, free, accepts):
    """It was believed, whatever its pages: what was kept there was preempted, and ended, for ever. One that accepts is
    only not believed."""
    port = scene.join()
    assert scene.told() == scene.expected
    scene.stream.longest = 0.0
    scene.liar.bend = lambda frame: full(frame, free, accepts)
    for _ in range(5):
        assert scene.told() == scene.expected
    assert port.closed != accepts
    assert not scene.lied(f"full, {free} pages, {accepts}", port)
    assert scene.stream.longest < 8.0  # on a busy machine too
    assert scene.rig.scheduler.counters.preempted == 0


def full(frame: bytes, free: int | None, accepts: bool) -> bytes | None:
    """An answer to an announcement that says, besides, that so many pages are free; a refusal unless it `accepts`."""
    message = codec.decode(bytearray(frame))
    if not isinstance(message, Announced):
        return None
    if free is not None:
        message = dataclasses.replace(message, free_pages=(free,))
    if not accepts:
        message = dataclasses.replace(message, accepted=False, floors=(), usages=(), reason="full")
    return b"".join(codec.encode(message))


def test_what_a_worker_makes_up_of_its_savings_can_be_sent_to_clients(scene):
    """The sum of eight such numbers of one request was too large for a message, which ended the link to all clients."""
    most = (1 << 62) - 1
    lie = Usage(most, most, 2.0**62, most, 2.0**62, most, 1, most, 2.0**62)

    def bend(frame: bytes) -> bytes | None:
        message = codec.decode(bytearray(frame))
        if not isinstance(message, Announced) or not message.floors:
            return None
        return b"".join(codec.encode(dataclasses.replace(message, usages=(lie,) * len(message.floors))))

    port = scene.join()
    scene.liar.bend = bend
    request, inbox = scene.rig.submit(PROMPT, SamplingParams(max_tokens=4, n=8, ignore_eos=True).with_defaults({}))
    ended = 0
    while ended < 8:
        ended += sum(output.finish_reason is not None for output in inbox.get(timeout=60))
    assert request.spared.read > 1 << 64
    pack_events([RequestOutputs(request.id, [], None, 0, 0, request.spared, 0, 0)])
    assert not scene.lied("savings", port)


@pytest.mark.fault("F22")
def test_no_handshake_of_a_worker_costs_more_than_that_worker(scene):
    """A worker that said it takes no frames, or a lease below 0, ended the engine or kept one of its cores."""
    lies = {
        "kv_memory": (0, 1, 1 << 61),
        "threads": (0, 1 << 61),
        "lease": (0.0, -1.0, 1e300),
        "max_frame": (0, 1, 100, 1 << 61),
        "name": ("", "x" * 100_000, "\n\0"),
        "local": (None, control.LocalOffer("/tmp/lamina-nobody/data", bytes(32)), control.LocalOffer("\0", bytes(32))),
        "tcp": (control.TcpOffer(1, bytes(32)),),
        "resumed": (True,),
        "page_layout": ("", "x" * 100_000),
    }
    scene.liar.bend = lambda frame: None
    for field, values in lies.items():
        for value in values:
            scene.liar.says = lambda said, field=field, value=value: (
                dataclasses.replace(said, **{field: value}) if isinstance(said, control.Welcome) else said
            )
            try:
                port = scene.join()
            except LaminaError:
                continue
            assert not scene.lied(f"{field}={str(value)[:40]}", port)


@pytest.mark.parametrize("state", ["ended", "draining", "", "x" * 100_000])
def test_no_heartbeat_of_a_worker_costs_more_than_that_worker(scene, state):
    scene.liar.says = lambda said: control.Alive(state) if isinstance(said, control.Alive) else said
    port = scene.join()
    for _ in range(10):
        scene.told()
    assert not scene.lied(state, port)
