"""Attention workers as Ray actors: placed by `lamina_attention`, watched, started again by Ray.

Each gets a certificate for its node's address and a token, made for this one run: they are all that Ray carries between
engine and worker, tensors take the direct way. Knows actors; knows nothing of models and attention.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from lamina.deploy.ray_connection import ATTENTION, NAMESPACE, TIMEOUT, explain, ray_module, require
from lamina.deploy.worker_events import (
    WAITING,
    Backoff,
    MembershipEvents,
    OnJoined,
    OnLeft,
    State,
    WorkerAddress,
    WorkerStatus,
    incarnation,
)
from lamina.errors import EngineError
from lamina.system.progress import Progress
from lamina_protocols.channels import Credentials
from lamina_workers.devices.openmp import share_cores
from lamina_workers.process.credentials import create_credentials

logger = logging.getLogger("lamina")

_POLL = 0.5  # seconds
_GRACE = 2.0  # seconds for workers to let go of their sessions
_NOBODY = Credentials()


class AttentionActor:
    """The process of one attention worker. It serves once it has been given credentials for its node's address."""

    def __init__(self, name: str, kv_memory: int | None, threads: int | None, device: str) -> None:
        self._name = name
        self._kv_memory = kv_memory
        self._threads = threads
        self._device = device
        self._server: Any = None
        self._address = ""
        share_cores()  # before anything imports torch

    def host(self) -> str:
        """The address of its node."""
        return str(ray_module().util.get_node_ip_address())

    def serve(self, gpu: int, ca: bytes, cert: bytes, key: bytes, token: str) -> tuple[str, int, int]:
        """Its "host:port", its KV memory in bytes, its process id. The second time nothing changes. `gpu` is its own
        where the device is "cuda"."""
        from lamina.system.machine import this_machine
        from lamina_protocols.channels import Credentials
        from lamina_workers.attention_server.attention_server import AttentionServer, ServerConfig

        machine = this_machine()
        if self._kv_memory is None:
            self._kv_memory = max(1 << 28, machine.memory_available // (2 * _workers_here()))
        if self._server is None:
            host = self.host()
            self._server = AttentionServer(
                ServerConfig(
                    name=self._name,
                    listen=f"[{host}]:0" if ":" in host else f"{host}:0",
                    kv_memory=self._kv_memory,
                    threads=self._threads or machine.cores,
                    device=f"cuda:{gpu}" if self._device == "cuda" else self._device,
                    credentials=Credentials(ca, cert, key, token),
                )
            )
            self._address = self._server.start()
        return self._address, self._kv_memory, os.getpid()

    def run(self) -> None:
        """Until the server stops. This call fails when the process dies: that is how its end is noticed."""
        self._server.wait()

    def stop(self) -> None:
        """Let go of the session politely."""
        if self._server is not None:
            self._server.stop(1.0)


def _workers_here() -> int:
    """How many attention workers this process's node is meant for."""
    ray = ray_module()
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["NodeID"] == here]
    return max(1, *(int(node["Resources"].get(ATTENTION, 1)) for node in nodes))


@dataclass(eq=False)
class _Place:
    """One attention actor. `running` and `arriving` are calls that wait for its end and for where it listens."""

    name: str
    actor: Any
    backoff: Backoff = field(default_factory=Backoff)
    member: WorkerAddress | None = None
    running: Any = None
    arriving: Any = None
    host: str = ""
    gpu: int = 0
    credentials: Credentials = _NOBODY
    process: int | None = None
    restarts: int = 0
    given_up: bool = False  # the engine does not want it any more: nobody is told of its end
    dead: bool = False
    why: str = ""  # it is dead


class RayAttentionWorkers:
    """`count` attention workers as Ray actors, one for each `lamina_attention` of a node.

    `kv_memory` in bytes for each, None: half of its node's free memory, shared among the node's workers. `threads`
    None: one a core. `device` "cuda": a GPU each of its node's. Ray starts dead ones again, on another node where it
    must, and ends all with this process. With `engine` each actor has a name: that of the engine, a slash, its own.
    """

    def __init__(
        self, count: int, *, kv_memory: int | None, threads: int | None, device: str = "cpu", engine: str = ""
    ) -> None:
        self._device = device
        self._engine = engine
        self._count = count
        self._kv_memory = kv_memory
        self._threads = threads
        self._places: list[_Place] = []
        self._news = MembershipEvents()
        self._lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.RLock()  # held while they come up, and while they are ended
        self._started = False  # who comes from now on is news
        self._thread = threading.Thread(target=self._watch, name="lamina-members", daemon=True)

    def start(self, progress: Progress | None = None) -> tuple[WorkerAddress, ...]:
        require({ATTENTION: self._count})
        ray = ray_module()
        options: dict[str, Any] = {
            "resources": {ATTENTION: 1},
            "num_cpus": 0,
            "max_restarts": -1,
            "max_concurrency": 4,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": environment(self._threads)},
        }
        with self._lock:
            try:
                for index in range(self._count):
                    name = f"attention-{index}"
                    known = {"name": f"{self._engine}/{name}", "namespace": NAMESPACE} if self._engine else {}
                    actor = ray.remote(AttentionActor).options(**options, **known)
                    self._places.append(_Place(name, actor.remote(name, self._kv_memory, self._threads, self._device)))
                self._await_all(progress)
            except BaseException:
                self.close()
                raise
            self._started = True
            self._thread.start()
            return tuple(place.member for place in self._places if place.member is not None)

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        self._news.listen(on_joined, on_left)

    def lost(self, name: str) -> None:
        self._lost.put(name)

    def status(self) -> tuple[WorkerStatus, ...]:
        return tuple(status for _, status in self.described())

    def described(self) -> tuple[tuple[WorkerAddress | None, WorkerStatus], ...]:
        """The status of every place, and the worker that is there, if one is."""
        described = []
        for place in tuple(self._places):
            member = place.member
            name, address = (place.name, None) if member is None else (member.name, member.address)
            described.append((member, WorkerStatus(name, address, _state(place), place.restarts, place.process)))
        return tuple(described)

    def close(self) -> None:
        ray = ray_module()
        self._closed.set()
        with self._lock:
            if self._thread.is_alive() and self._thread is not threading.current_thread():
                self._thread.join()
            if not ray.is_initialized():
                return
            stopping = [place.actor.stop.remote() for place in self._places if not place.dead]
            if stopping:
                ray.wait(stopping, num_returns=len(stopping), timeout=_GRACE)
            for place in self._places:
                ray.kill(place.actor)
            self._places.clear()

    def _await_all(self, progress: Progress | None) -> None:
        deadline, told = time.monotonic() + TIMEOUT, -1
        while (up := sum(place.member is not None for place in self._places)) < self._count:
            if progress is not None and up != told:
                progress(WAITING, up, self._count)
                told = up
            if time.monotonic() >= deadline:
                missing = ", ".join(place.name for place in self._places if place.member is None)
                raise EngineError(f"{missing} did not start within {TIMEOUT:g} s; see Ray's logs of workers")
            if self._closed.is_set():
                raise EngineError("closed while the attention workers were starting")
            self._step()
            if dead := [f"{place.name} cannot live: {place.why}" for place in self._places if place.dead]:
                raise EngineError(dead[0])
        if progress is not None:
            progress(WAITING, self._count, self._count)

    # The watching thread, after `start`.

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                while not self._lost.empty():
                    self._end_lost(self._lost.get())
                self._step()
                self._news.deliver()
            except Exception:  # Ray's own connection may be gone; the engine still serves with the workers it has
                logger.exception("cannot watch the attention workers")
                self._closed.wait(5.0)

    def _step(self) -> None:
        """Take what has happened within half a second."""
        ray = ray_module()
        for place in self._places:
            if place.member is None and place.arriving is None and not place.dead:
                place.host = ""
                place.arriving = place.actor.host.remote()
        waiting = [call for place in self._places for call in (place.running, place.arriving) if call is not None]
        ready = set(ray.wait(waiting, timeout=_POLL)[0]) if waiting else set()
        if not waiting:
            self._closed.wait(_POLL)
        for place in self._places:
            if place.running in ready:
                self._left(place)
            elif place.arriving in ready:
                self._arrive(place)

    def _arrive(self, place: _Place) -> None:
        """First it says where it is, then it gets credentials for that address and says where it listens."""
        ray = ray_module()
        call, place.arriving = place.arriving, None
        try:
            answer = ray.get(call)
        except ray.exceptions.ActorUnavailableError:  # it is being started again
            self._closed.wait(_POLL)
            return
        except ray.exceptions.RayError as error:
            place.dead, place.why = True, explain(error)
            logger.error("%s cannot live: %s", place.name, place.why)
            return
        if not place.host:
            taken = {other.gpu for other in self._places if other is not place and other.host == answer}
            place.host, place.gpu = answer, next(gpu for gpu in range(self._count) if gpu not in taken)
            place.credentials = create_credentials([answer])
            place.arriving = place.actor.serve.remote(place.gpu, *dataclasses.astuple(place.credentials))
            return
        address, kv_memory, place.process = answer
        client = Credentials(ca=place.credentials.ca, token=place.credentials.token)
        place.member = WorkerAddress(incarnation(place.name, place.restarts), address, client, kv_memory)
        place.running = place.actor.run.remote()
        logger.info("%s: at %s", place.member.name, address)
        if self._started:
            self._news.joined(place.member)

    def _left(self, place: _Place) -> None:
        ray = ray_module()
        call, member = place.running, place.member
        place.running = place.member = None
        try:
            ray.get(call)
            why = "its server stopped"
        except ray.exceptions.RayError as error:
            why = explain(error)
        if member is not None and not place.given_up:
            self._news.left(member.name)
        place.given_up = False
        place.restarts += 1
        if place.backoff.delay(time.monotonic()) is None:
            place.dead = True
            ray.kill(place.actor)
        then = "too often: it stays down" if place.dead else "Ray starts it again"
        logger.warning("%s ended: %s; %s", place.name if member is None else member.name, why, then)

    def _end_lost(self, name: str) -> None:
        ray = ray_module()
        for place in self._places:
            if place.member is not None and place.member.name == name:
                place.given_up = True
                ray.kill(place.actor, no_restart=False)


def _state(place: _Place) -> State:
    if place.member is not None:
        return "up"
    return "given up" if place.dead else "starting"


def environment(threads: int | None) -> dict[str, str]:
    """What a process of ours wants to be set before it starts: Ray must hide no GPU, and OpenMP has so many threads."""
    shown = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return shown if threads is None else shown | {"OMP_NUM_THREADS": str(threads)}
