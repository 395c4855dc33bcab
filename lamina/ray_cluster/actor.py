"""The engine of a cluster: the process of model worker 0 as a Ray actor.

The attention workers belong to the process that started this actor, and outlive it; that process sends their addresses.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamina.client.remote import SWITCH_INTERVAL, EngineHost, disclaim_later, fetch
from lamina.config import EngineConfig
from lamina.deploy.relayed_attention import Drained, RelayedWorkers, Wish
from lamina.deploy.worker_events import WorkerAddress, WorkerStatus
from lamina.errors import EngineError, LaminaError
from lamina.journal.journal import NAME, Run
from lamina.messages.engine_messages import Event, Logged, Stopped, pack_events, unpack_commands
from lamina.models.cache import hash_file
from lamina.ray_cluster.connection import ray_module
from lamina.ray_cluster.models import RayModelWorkers
from lamina.system.private_folder import sweep
from lamina.system.progress import Progressed
from lamina_workers.devices.openmp import share_cores

logger = logging.getLogger("lamina")

_POLL = 0.5  # seconds
_RUN = "lamina-run-"  # begin of the names of journals of runs that no later engine goes on from
_LEFT = 86400.0  # seconds after which the journal of a run that was killed is deleted
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)  # the files of a model that text needs


class EngineActor:
    """The process of model worker 0, where the engine lives. Each method is one call through Ray.

    Its events are for the engine's client, and its wishes for the owner of the attention workers.
    """

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event | Wish] = queue.SimpleQueue()
        self._attention: RelayedWorkers | None = None
        self._model_workers: RayModelWorkers | None = None  # beyond this one
        self._runtime: Any = None
        self._host: Any = None
        self._model = ""
        self._journal = Path()
        self._ended = False  # it has been asked to end
        self._update = threading.Lock()
        self._last_update = 0
        self._slots: tuple[tuple[WorkerAddress | None, WorkerStatus], ...] = ()
        share_cores()  # before anything imports torch
        sys.setswitchinterval(SWITCH_INTERVAL)
        logger.addHandler(_Forward(self._events))
        logger.setLevel(logging.INFO)

    def where(self) -> tuple[str, str, int]:
        ray = ray_module()
        return ray.get_runtime_context().get_node_id(), str(ray.util.get_node_ip_address()), os.getpid()

    def start(self, model: str, config: EngineConfig, workers: bool, run: Run, journal: str) -> dict[str, Any]:
        """Load the model and, with `workers`, connect to the attention workers once `update_workers` has brought some.
        Returns the model's folder, the SHA-256 of its small files, the scheduler's limits, and the longest sequence
        that there is room for.

        `run` identifies the engine; its unfinished requests go on where its `journal` is on this node. The run's folder
        is in the folder that the config names, which is on every node, else in a temporary one.
        """
        from lamina.launch.builder import start

        self._model = model
        parent = Path(config.journal or tempfile.gettempdir())
        sweep(parent, _RUN, NAME, time.time() - _LEFT)
        self._journal = parent / f"{_RUN}{journal}"
        config = dataclasses.replace(config, journal=self._journal)
        with self._update:
            if workers and self._attention is None:
                self._attention = RelayedWorkers(self._events.put)
            if self._attention is not None:
                self._attention.optional = config.first_workers == 0
        if config.model_workers > 1:
            self._model_workers = RayModelWorkers(config.model_workers, model=model, threads=config.threads)
        self._runtime = start(model, config, self._report, self._attention, run, self._model_workers)
        self._host = EngineHost(self._runtime.engine, self._events.put, time.monotonic)
        if self._ended:
            self.stop()
            raise EngineError("the engine was ended while it started")
        disclaim_later(self._runtime.engine.disclaim)
        folder = self._runtime.model_path
        limits, possible = self._runtime.limits, self._runtime.possible
        return {"folder": str(folder), "files": file_hashes(folder), "limits": limits, "possible": possible}

    def update_workers(
        self, number: int, slots: Sequence[tuple[WorkerAddress | None, WorkerStatus]], workers: Sequence[WorkerAddress]
    ) -> None:
        """Set the slots for attention workers, and the workers that the engine may use. Calls may overtake one another:
        an older `number` than the last has no effect."""
        with self._update:
            if number <= self._last_update:
                return
            self._last_update, self._slots = number, tuple(slots)
            self._attention = self._attention or RelayedWorkers(self._events.put)
            self._attention.update(workers)

    def files(self) -> dict[str, bytes]:
        folder = self._runtime.model_path
        return {name: (folder / name).read_bytes() for name in MODEL_FILES if (folder / name).is_file()}

    def ask(self, commands: bytes) -> None:
        self._host.ask(unpack_commands(commands))

    def events(self) -> tuple[bytes, list[Wish]]:
        """The next events, packed, and the next wishes; waits for one of either."""
        while not (fetched := fetch(self._events, _POLL)):
            if self._host is not None:
                if not self._runtime.engine.alive:
                    fetched = [Stopped("the engine has stopped")]
                    break
                self._host.report()
        wishes = [event for event in fetched if isinstance(event, Wish)]
        return pack_events(event for event in fetched if not isinstance(event, Wish)), wishes

    def status(self) -> dict[str, Any]:
        """The model, this process, whether its engine is alive, the other model workers, and every attention worker
        with its own status."""
        from lamina_protocols.channels.grpc_client import WorkerClient

        rows = []
        for worker, status in self._slots:
            row = dataclasses.asdict(status)
            if worker is not None:
                try:
                    with WorkerClient(worker.address, worker.credentials) as client:
                        row |= {"worker": dataclasses.asdict(client.status())}
                except LaminaError as error:
                    row |= {"error": str(error)}
            rows.append(row)
        alive = self._runtime is not None and self._runtime.engine.alive
        model_workers = () if self._model_workers is None else self._model_workers.status()
        return {
            "model": self._model,
            "process": os.getpid(),
            "alive": alive,
            "model_workers": [dataclasses.asdict(status) for status in model_workers],
            "workers": rows,
        }

    def drain(self, worker: str) -> None:
        """Move a worker's KV to the others, and use it no more."""
        self._runtime.drain(worker)
        self._events.put(Drained(worker))

    def stop(self) -> None:
        """End the engine, for good; unfinished requests end with an EngineError."""
        self._ended = True
        if self._runtime is not None:
            self._runtime.stop()
            shutil.rmtree(self._journal, ignore_errors=True)

    def _report(self, what: str, done: int, total: int | None) -> None:
        self._events.put(Progressed(what.encode(errors="backslashreplace").decode(), done, total))


class _Forward(logging.Handler):
    """Sends log records to the process that uses the engine."""

    def __init__(self, events: queue.SimpleQueue[Event | Wish]) -> None:
        super().__init__(logging.INFO)
        self._forwarded = events

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record).encode(errors="backslashreplace").decode()  # a path may hold what is no Unicode
        self._forwarded.put(Logged(record.levelno, text))


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of a model's small files, by name."""
    return {name: hash_file(folder / name) for name in MODEL_FILES if (folder / name).is_file()}
