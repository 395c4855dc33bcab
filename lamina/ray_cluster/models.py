"""Model workers 1 and up as Ray actors, placed by the resource `lamina_model`.

They end with the process of model worker 0. Each connects to it over TLS with a secret of its own; Ray carries nothing
but that and a certificate.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lamina.deploy.supervision import ModelSupervisor, Slot, Worker
from lamina.ray_cluster.attention import environment
from lamina.ray_cluster.connection import MODEL, TIMEOUT, explain, ray_module, shortage
from lamina_protocols.channels.versions import PROTOCOL_VERSION, VARIABLE
from lamina_workers.devices.openmp import share_cores
from lamina_workers.process.credentials import create_credentials

_POLL = 0.2  # seconds


class ModelActor:
    """The process of one model worker."""

    def __init__(self) -> None:
        share_cores()  # before anything imports torch

    def process(self) -> int:
        return os.getpid()

    def serve(self, model: str, connect: str, secret: bytes, name: str, threads: int | None, ca: bytes) -> None:
        """Returns when model worker 0, which listens at `connect`, has no more use for it. The call fails when the
        process dies: this is how its end is noticed. `model` is resolved on this node; `ca` is the certificate that
        model worker 0 must show.
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


@dataclass(eq=False, kw_only=True)
class _RayModelWorker(Worker):
    actor: Any
    serving: Any  # the call that waits for its end
    process: Any  # the call that waits for its process id; None once that has come
    why: str = ""  # it was killed


class RayModelWorkers(ModelSupervisor[_RayModelWorker]):
    """Model workers 1 to `count` - 1 as actors, for an engine in an actor.

    Model worker 0 is to listen at `host` with `credentials`. `model` is the name to resolve on each node. `threads`
    None: one a core.
    """

    def __init__(self, count: int, *, model: str, threads: int | None) -> None:
        super().__init__(count)
        self._model = model
        self._threads = threads
        self.host = str(ray_module().util.get_node_ip_address())
        self.credentials = create_credentials([self.host])
        self._ca = self.credentials.ca

    def _launch(self, slot: Slot[_RayModelWorker]) -> _RayModelWorker:
        secret = self._invite(slot.number, slot.name)
        slot.deadline = self._clock() + TIMEOUT
        actor = (
            ray_module()
            .remote(ModelActor)
            .options(
                resources={MODEL: 1},
                num_cpus=0,
                max_concurrency=2,
                runtime_env={"env_vars": environment(self._threads) | {VARIABLE: str(PROTOCOL_VERSION)}},
            )
            .remote()
        )
        return _RayModelWorker(
            actor=actor,
            process=actor.process.remote(),
            serving=actor.serve.remote(self._model, self._address, secret, slot.name, self._threads, self._ca),
        )

    def _watch(self) -> None:
        """Take what happens within a moment."""
        ray = ray_module()
        workers = [(slot, slot.worker) for slot in self._slots if slot.worker is not None]
        waiting = [call for _, worker in workers for call in (worker.serving, worker.process) if call is not None]
        ready = set(ray.wait(waiting, timeout=_POLL)[0]) if waiting else set()
        self._take(0.0 if waiting else _POLL)
        for slot, worker in workers:
            if worker.serving in ready:
                self._serving_ended(slot, worker)
            elif worker.process in ready:
                process_call, worker.process, slot.deadline = worker.process, None, None
                with contextlib.suppress(ray.exceptions.RayError):  # it has died, which the other call reports
                    worker.pid = ray.get(process_call)
                    worker.up = True

    def _serving_ended(self, slot: Slot[_RayModelWorker], worker: _RayModelWorker) -> None:
        ray = ray_module()
        try:
            ray.get(worker.serving)
            how = "it was let go"
        except ray.exceptions.RayError as error:
            how = worker.why or explain(error)
        ray.kill(worker.actor)
        self._ended(slot, how)

    def _overdue(self, slot: Slot[_RayModelWorker], worker: _RayModelWorker) -> None:
        worker.why = worker.why or f"it did not start within {TIMEOUT:g} s: {shortage(MODEL, 1)}"
        self._kill(worker)

    def _kill(self, worker: _RayModelWorker) -> None:
        worker.why = worker.why or "model worker 0 has given it up"
        ray_module().kill(worker.actor)

    def _end(self, workers: Sequence[_RayModelWorker]) -> None:
        ray = ray_module()
        if ray.is_initialized():
            for worker in workers:
                ray.kill(worker.actor)
