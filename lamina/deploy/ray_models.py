"""Model workers beyond 0 as Ray actors: placed by `lamina_model`, watched, started again when they die.

They belong to the process of model worker 0, and end with it. Each connects to that over TLS with a secret of its own;
that and a certificate are all that Ray carries. Knows actors; knows nothing of what they compute.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lamina.deploy.local_models import OnEnded, process_name
from lamina.deploy.ray_attention import environment
from lamina.deploy.ray_connection import MODEL, TIMEOUT, explain, ray_module, shortage
from lamina.deploy.worker_events import Backoff, State, WorkerStatus
from lamina_protocols.channels import Credentials
from lamina_workers.devices.openmp import share_cores
from lamina_workers.process.credentials import create_credentials

logger = logging.getLogger("lamina")

_POLL = 0.2  # seconds


class ModelActor:
    """The process of one model worker."""

    def __init__(self) -> None:
        share_cores()  # before anything imports torch

    def process(self) -> int:
        """Its process id."""
        return os.getpid()

    def serve(self, model: str, connect: str, secret: bytes, name: str, threads: int | None, ca: bytes) -> None:
        """Until model worker 0, which listens at `connect`, lets it go. This call fails when the process dies: that is
        how its end is noticed. `model` is looked up on this node, `ca` the certificate that model worker 0 must show.
        """
        from lamina.models.resolve import resolve
        from lamina.system.machine import this_machine
        from lamina_workers.model_main import serve

        folder = resolve(model, None)
        with TemporaryDirectory(prefix="lamina-") as tls:
            (Path(tls) / "ca.pem").write_bytes(ca)
            serve(
                connect,
                secret,
                name,
                threads=threads or this_machine().cores,
                folder=str(folder),
                address=str(ray_module().util.get_node_ip_address()),
                tls_dir=tls,
            )


@dataclass(eq=False)
class _Place:
    """Room for one rank: the actor that is there, or when the next one starts (None: never)."""

    rank: int
    backoff: Backoff = field(default_factory=Backoff)
    actor: Any = None
    serving: Any = None  # the call that waits for its end
    asked: Any = None  # the one that waits for its process id
    process: int | None = None
    deadline: float = 0.0  # when it must have said that
    why: str = ""  # it was killed
    due: float | None = 0.0
    restarts: int = 0

    @property
    def name(self) -> str:
        return process_name(self.rank, self.restarts)


class RayModelWorkers:
    """`model_members.ModelWorkerProcesses`: ranks 1 to `count` - 1 as actors, for an engine in an actor.

    Model worker 0 is to listen at `host` with `credentials`. `model` is what it is called on each node, `threads` None
    one a core.
    """

    def __init__(self, count: int, *, model: str, threads: int | None) -> None:
        self._model = model
        self._threads = threads
        self._places = [_Place(rank) for rank in range(1, count)]
        self._lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lamina-model-members", daemon=True)
        host = str(ray_module().util.get_node_ip_address())
        self.host: str | None = host
        self.credentials: Credentials | None = (made := create_credentials([host]))
        self._ca = made.ca

    def start(self, address: str, invite: Callable[[int, str], bytes], on_ended: OnEnded) -> None:
        self._address, self._invite, self._on_ended = address, invite, on_ended
        self._thread.start()

    def lost(self, name: str) -> None:
        self._lost.put(name)

    def status(self) -> tuple[WorkerStatus, ...]:
        return tuple(
            WorkerStatus(place.name, None, self._state(place), place.restarts, place.process) for place in self._places
        )

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    @staticmethod
    def _state(place: _Place) -> State:
        if place.actor is None:
            return "given up" if place.due is None else "lost"
        return "starting" if place.process is None else "up"

    # The watching thread.

    def _watch(self) -> None:
        ray = ray_module()
        try:
            while not self._closed.is_set():
                self._start_due(ray)
                while not self._lost.empty():
                    self._kill(ray, self._lost.get())
                self._step(ray)
        except Exception as error:  # whoever waits must hear of it
            logger.exception("the model workers are no longer watched")
            for place in self._places:
                place.due = None
                self._on_ended(place.rank, place.name, f"it is no longer watched: {error}", True)
        finally:
            if ray.is_initialized():
                for place in self._places:
                    if place.actor is not None:
                        ray.kill(place.actor)
            for place in self._places:
                place.actor, place.due = None, None

    def _start_due(self, ray: Any) -> None:
        now = time.monotonic()
        for place in self._places:
            if place.actor is not None or place.due is None or place.due > now:
                continue
            secret = self._invite(place.rank, place.name)
            place.process, place.why, place.deadline = None, "", now + TIMEOUT
            place.actor = (
                ray.remote(ModelActor)
                .options(
                    resources={MODEL: 1},
                    num_cpus=0,
                    max_concurrency=2,
                    runtime_env={"env_vars": environment(self._threads)},
                )
                .remote()
            )
            place.asked = place.actor.process.remote()
            place.serving = place.actor.serve.remote(
                self._model, self._address, secret, place.name, self._threads, self._ca
            )

    def _kill(self, ray: Any, name: str) -> None:
        for place in self._places:
            if place.actor is not None and place.name == name:
                place.why = "model worker 0 has given it up"
                ray.kill(place.actor)

    def _step(self, ray: Any) -> None:
        """Take what has happened within a moment."""
        waiting = [call for place in self._places for call in (place.serving, place.asked) if call is not None]
        ready = set(ray.wait(waiting, timeout=_POLL)[0]) if waiting else set()
        if not waiting:
            self._closed.wait(_POLL)
        for place in self._places:
            if place.asked is not None and not place.why and time.monotonic() > place.deadline:
                place.why = f"it did not start within {TIMEOUT:g} s: {shortage(MODEL, 1)}"
                ray.kill(place.actor)
            if place.serving in ready:
                self._ended(ray, place)
            elif place.asked in ready:
                asked, place.asked = place.asked, None
                with contextlib.suppress(ray.exceptions.RayError):  # it has died: the other call says so
                    place.process = ray.get(asked)

    def _ended(self, ray: Any, place: _Place) -> None:
        try:
            ray.get(place.serving)
            how = "it was let go"
        except ray.exceptions.RayError as error:
            how = place.why or explain(error)
        ray.kill(place.actor)
        place.actor = place.serving = place.asked = place.process = None
        name, now = place.name, time.monotonic()
        delay = place.backoff.delay(now)
        place.due = None if delay is None else now + delay
        place.restarts += 1
        then = "too often: it stays down" if delay is None else f"it starts again in {delay:g} s"
        logger.warning("%s ended, %s; %s", name, how, then)
        self._on_ended(place.rank, name, how, delay is None)
