"""The engine of a cluster: the process of model worker 0 as a Ray actor. What it does is asked for through Ray.

The attention workers belong to whoever started this actor and outlive it: it is told which are there. Knows models and
engines by their constructors; knows not who placed it, nor when it is started again.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.client.remote_host import SWITCH_INTERVAL, EngineHost, disclaim_later
from lamina.config import EngineConfig
from lamina.deploy.ray_connection import ray_module
from lamina.deploy.ray_models import RayModelWorkers
from lamina.deploy.relayed_attention import RelayedWorkers
from lamina.deploy.worker_events import WorkerAddress, WorkerStatus
from lamina.errors import EngineError, LaminaError
from lamina.journal.journal import Run, run_folder, sweep
from lamina.models.cache import hash_file
from lamina_workers.devices.openmp import share_cores

if TYPE_CHECKING:
    from lamina.client.interface import Event
    from lamina.messages.request_codec import Command

logger = logging.getLogger("lamina")

_POLL = 0.5  # seconds
_LEFT = 86400.0  # seconds after which the journal of a run that was killed is deleted
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)  # all that text needs of a model


class EngineActor:
    """The process of model worker 0, where the engine lives. Each method is one call through Ray.

    Among its events are, beside those of `remote_engine`, ("lost", worker) and ("drained", worker).
    """

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._members: RelayedWorkers | None = None
        self._others: RayModelWorkers | None = None  # model workers beyond this one
        self._runtime: Any = None
        self._host: Any = None
        self._model = ""
        self._journal = Path()
        self._ended = False  # somebody wants it to end
        self._telling = threading.Lock()
        self._told = 0
        self._workers: tuple[tuple[WorkerAddress | None, WorkerStatus], ...] = ()
        share_cores()  # before anything imports torch
        sys.setswitchinterval(SWITCH_INTERVAL)
        logger.addHandler(_Forward(self._events))
        logger.setLevel(logging.INFO)

    def where(self) -> tuple[str, str, int]:
        """The id of its node and its address, its process id."""
        ray = ray_module()
        return ray.get_runtime_context().get_node_id(), str(ray.util.get_node_ip_address()), os.getpid()

    def start(self, model: str, config: EngineConfig, workers: bool, run: Run, journal: str) -> dict[str, Any]:
        """Load the model and, with `workers`, connect to the attention workers, once `there` has told of some. The
        model's folder, the SHA-256 of its small files, the scheduler's limits, and the longest sequence that they
        leave room for.

        `run` is which engine this is; what is unfinished of it goes on where its `journal` is on this node. Where the
        config names a folder, that is on every node, and the run's folder is in it; else it is a temporary one.
        """
        from lamina.launch.builder import start

        self._model = model
        parent = Path(config.journal or tempfile.gettempdir())
        sweep(parent, time.time() - _LEFT)
        self._journal = run_folder(parent, journal)
        config = dataclasses.replace(config, journal=self._journal)
        with self._telling:
            if workers and self._members is None:
                self._members = self._make_members()
        if config.model_workers > 1:
            self._others = RayModelWorkers(config.model_workers, model=model, threads=config.threads)
        self._runtime = start(model, config, self._report, self._members, run, self._others)
        self._host = EngineHost(self._runtime.engine, self._events, time.monotonic)
        if self._ended:
            self.stop()
            raise EngineError("the engine was ended while it started")
        disclaim_later(self._runtime.engine.disclaim)
        folder = self._runtime.model_path
        limits, possible = self._runtime.limits, self._runtime.possible
        return {"folder": str(folder), "files": file_hashes(folder), "limits": limits, "possible": possible}

    def there(
        self, number: int, workers: Sequence[tuple[WorkerAddress | None, WorkerStatus]], drained: Collection[str]
    ) -> None:
        """The places for attention workers and who is there now; drained ones are used no more, by no engine. Calls may
        overtake one another: an older `number` than the last changes nothing."""
        with self._telling:
            if number <= self._told:
                return
            self._told, self._workers = number, tuple(workers)
            self._members = self._members or self._make_members()
            members = [member for member, _ in workers if member is not None]
            self._members.there([member for member in members if member.name not in drained])

    def files(self) -> dict[str, bytes]:
        """The model's small files by name."""
        folder = self._runtime.model_path
        return {name: (folder / name).read_bytes() for name in MODEL_FILES if (folder / name).is_file()}

    def ask(self, commands: Sequence[Command]) -> None:
        self._host.ask(commands)

    def events(self) -> Sequence[Event]:
        from lamina.client.remote_client import fetch

        while not (fetched := fetch(self._events, _POLL)):
            if self._host is not None and not self._runtime.engine.alive:
                return [("stopped", "the engine has stopped")]
        return fetched

    def status(self) -> dict[str, Any]:
        """The model, this process, whether its engine is alive, the other model workers, and every attention worker:
        where it is, what it says itself."""
        from lamina_protocols.service import WorkerClient

        workers = []
        for member, status in self._workers:
            row = dataclasses.asdict(status)
            if member is not None:
                try:
                    with WorkerClient(member.address, member.credentials) as client:
                        row |= {"worker": dataclasses.asdict(client.status())}
                except LaminaError as error:
                    row |= {"error": str(error)}
            workers.append(row)
        alive = self._runtime is not None and self._runtime.engine.alive
        others = () if self._others is None else self._others.status()
        return {
            "model": self._model,
            "process": os.getpid(),
            "alive": alive,
            "model_workers": [dataclasses.asdict(status) for status in others],
            "workers": workers,
        }

    def drain(self, worker: str) -> None:
        """Move a worker's KV to the others, and use it no more."""
        self._runtime.drain(worker)
        self._events.put(("drained", worker))

    def stop(self) -> None:
        """End the engine, for good; unfinished requests end with an EngineError."""
        self._ended = True
        if self._runtime is not None:
            self._runtime.stop()
            shutil.rmtree(self._journal, ignore_errors=True)

    def _make_members(self) -> RelayedWorkers:
        return RelayedWorkers(lambda name: self._events.put(("lost", name)))

    def _report(self, what: str, done: int, total: int | None) -> None:
        self._events.put(("progress", what, done, total))


class _Forward(logging.Handler):
    """Sends what is logged here to whoever uses the engine."""

    def __init__(self, events: queue.SimpleQueue[Event]) -> None:
        super().__init__(logging.INFO)
        self._forwarded = events

    def emit(self, record: logging.LogRecord) -> None:
        self._forwarded.put(("log", record.levelno, self.format(record)))


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of a model's small files, by name."""
    return {name: hash_file(folder / name) for name in MODEL_FILES if (folder / name).is_file()}
