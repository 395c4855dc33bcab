"""Attention workers as Ray actors: placed by the resource `lamina_attention`, started again by Ray.

Each makes itself a certificate for its node's address, whose key never leaves it, and a token. Ray carries nothing but
the certificate and the token between engine and worker; tensors take the direct way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lamina.deploy.supervision import AttentionSupervisor, Slot, Worker
from lamina.deploy.worker_events import WAITING, WorkerAddress
from lamina.ray_cluster.connection import ATTENTION, NAMESPACE, TIMEOUT, explain, ray_module, request_nodes, require
from lamina.system.child_process import KEY_VARIABLE
from lamina.system.progress import Progress
from lamina_protocols.channels.channels import Credentials, join_address
from lamina_protocols.messages.layers import ColdTier
from lamina_workers.devices.openmp import share_cores
from lamina_workers.process.credentials import create_credentials

logger = logging.getLogger("lamina")

_POLL = 0.5  # seconds
_GRACE = 2.0  # seconds for workers to let go of their sessions
_NONE = Credentials()


class AttentionActor:
    """The process of one attention worker."""

    def __init__(
        self,
        name: str,
        kv_memory: int | None,
        threads: int | None,
        device: str,
        kv_cold: str | None,
        kv_resident: int | None,
    ) -> None:
        self._name = name
        self._kv_memory = kv_memory
        self._kv_cold, self._kv_resident = kv_cold, kv_resident
        self._threads = threads
        self._device = device
        self._server: Any = None
        self._address = ""
        self._credentials = _NONE
        share_cores()  # before anything imports torch

    def host(self) -> str:
        return str(ray_module().util.get_node_ip_address())

    def serve(self, gpu: int) -> tuple[str, int, int, Credentials]:
        """Start its server. Returns its "host:port", its KV memory in bytes, its process id, and what a client needs: a
        CA and a token. No effect the second time. `gpu` is the index of its GPU where the device is "cuda"."""
        from lamina.system.machine import this_machine
        from lamina_workers.attention_server.attention_server import AttentionServer, ServerConfig

        machine = this_machine()
        node_share = max(1 << 28, machine.memory_available // (2 * _workers_here()))
        if self._kv_memory is None:
            self._kv_memory = node_share
        if self._server is None:
            host = self.host()
            self._credentials = create_credentials([host])
            self._server = AttentionServer(
                ServerConfig(
                    name=self._name,
                    listen=join_address(host, 0),
                    kv_memory=self._kv_memory,
                    threads=self._threads or machine.cores,
                    device=f"cuda:{gpu}" if self._device == "cuda" else self._device,
                    credentials=self._credentials,
                    cold=ColdTier.of(self._kv_cold, self._kv_resident or node_share, self._kv_memory),
                )
            )
            self._address = self._server.start()
        client_credentials = Credentials(ca=self._credentials.ca, token=self._credentials.token)
        return self._address, self._kv_memory, os.getpid(), client_credentials

    def run(self) -> None:
        """Returns when the server stops. The call fails when the process dies: this is how its end is noticed."""
        self._server.wait()

    def stop(self) -> None:
        """Stop the server; the engine's session ends with a message."""
        if self._server is not None:
            self._server.stop(1.0)


def _workers_here() -> int:
    """How many attention workers this process's node is meant for."""
    ray = ray_module()
    node_id = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["NodeID"] == node_id]
    return max(1, *(int(node["Resources"].get(ATTENTION, 1)) for node in nodes))


@dataclass(eq=False, kw_only=True)
class _RayAttentionWorker(Worker):
    """One process of an attention actor. `running` and `arriving` are calls that wait for its end and for where it
    listens."""

    actor: Any
    running: Any = None
    arriving: Any = None
    host: str = ""
    gpu: int = 0


class RayAttentionWorkers(AttentionSupervisor[_RayAttentionWorker]):
    """`count` attention workers as Ray actors, one for each `lamina_attention` of a node; up to `most` where more are
    asked for. Where `most` is given, the cluster's autoscaler, if it has one, is asked for nodes.

    `kv_memory` is in bytes for each; None: half of its node's free memory, shared among the node's workers. With
    `kv_cold`, a folder of each node, `kv_resident` bytes of it stay in memory; None: as much as that. `threads`
    None: one a core. `device` "cuda": each worker has a GPU of its node. Ray starts dead actors again, on another node
    if it must, and ends all with this process. With `engine` each actor has a name: that of the engine, a slash, its
    own.
    """

    def __init__(
        self,
        count: int,
        *,
        kv_memory: int | None,
        threads: int | None,
        most: int | None = None,
        device: str = "cpu",
        engine: str = "",
        kv_cold: str | None = None,
        kv_resident: int | None = None,
    ) -> None:
        super().__init__(count, most=most)
        self._scales = most is not None
        self._device = device
        self._engine = engine
        self._kv_memory = kv_memory
        self._cold = kv_cold, kv_resident
        self._threads = threads
        self._actors: dict[str, Any] = {}

    def start(self, progress: Progress | None = None) -> tuple[WorkerAddress, ...]:
        self._request(self._count)
        require({ATTENTION: self._count})
        if progress is not None:
            progress(WAITING, 0, self._count)
        return super().start(progress)

    def _request(self, count: int) -> None:
        """Have the cluster's autoscaler keep nodes for so many workers."""
        if self._scales:
            try:
                request_nodes({ATTENTION: 1}, count)
            except Exception:  # the workers that wait for a node are asked for as well
                logger.exception("cannot ask the Ray cluster for nodes")

    def _open(self, count: int) -> None:
        super()._open(count)
        self._request(self._count)

    def _let_go(self, name: str) -> None:
        super()._let_go(name)
        self._request(self._count)

    def _dismiss(self, worker: _RayAttentionWorker) -> None:
        worker.actor.stop.remote()  # then `run` returns

    def _launch(self, slot: Slot[_RayAttentionWorker]) -> _RayAttentionWorker:
        if slot.base not in self._actors:
            self._actors[slot.base] = self._create(slot.name)
        slot.deadline = None if self._started.is_set() else self._clock() + TIMEOUT
        return _RayAttentionWorker(actor=self._actors[slot.base])

    def _create(self, name: str) -> Any:
        options: dict[str, Any] = {
            "resources": {ATTENTION: 1},
            "num_cpus": 0,
            "max_restarts": -1,
            "max_concurrency": 4,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": environment(self._threads)},
        }
        if self._engine:
            options |= {"name": f"{self._engine}/{name}", "namespace": NAMESPACE}
        actor = ray_module().remote(AttentionActor).options(**options)
        return actor.remote(name, self._kv_memory, self._threads, self._device, *self._cold)

    def _watch(self) -> None:
        try:
            self._step()
        except Exception:  # Ray's own connection may be gone; the engine still serves with the workers it has
            if not self._started.is_set():
                raise
            logger.exception("cannot watch the attention workers")
            self._closed.wait(5.0)

    def _step(self) -> None:
        """Take what happens within half a second."""
        ray = ray_module()
        workers = [(slot, slot.worker) for slot in self._slots if slot.worker is not None]
        for _, worker in workers:
            if not worker.up and worker.arriving is None:
                worker.host, worker.arriving = "", worker.actor.host.remote()
        waiting = [call for _, worker in workers for call in (worker.running, worker.arriving) if call is not None]
        ready = set(ray.wait(waiting, timeout=_POLL)[0]) if waiting else set()
        self._take(0.0 if waiting else _POLL)
        for slot, worker in workers:
            if worker.running in ready:
                self._run_ended(slot, worker)
            elif worker.arriving in ready:
                self._arrive(slot, worker)

    def _arrive(self, slot: Slot[_RayAttentionWorker], worker: _RayAttentionWorker) -> None:
        """Take an answer: first the node's address, where its GPU is chosen, then where the worker listens."""
        ray = ray_module()
        call, worker.arriving = worker.arriving, None
        try:
            answer = ray.get(call)
        except ray.exceptions.ActorUnavailableError:  # it is being started again
            self._closed.wait(_POLL)
            return
        except ray.exceptions.RayError as error:
            why = f"{slot.name} cannot live: {explain(error)}"
            logger.error("%s", why)
            slot.give_up()
            self._fail(why)
            return
        if not worker.host:
            others = [
                other_slot.worker
                for other_slot in self._slots
                if other_slot is not slot and other_slot.worker is not None
            ]
            used_gpus = {other.gpu for other in others if other.host == answer}
            worker.host, worker.gpu = answer, next(gpu for gpu in range(len(self._slots)) if gpu not in used_gpus)
            worker.arriving = worker.actor.serve.remote(worker.gpu)
            return
        address, kv_memory, worker.pid, credentials = answer
        worker.running = worker.actor.run.remote()
        self._joined(worker, WorkerAddress(slot.name, address, credentials, kv_memory, slot.base))

    def _run_ended(self, slot: Slot[_RayAttentionWorker], worker: _RayAttentionWorker) -> None:
        ray = ray_module()
        if worker.retired:
            ray.kill(self._actors.pop(slot.base))
            self._ended(slot, "")
            return
        try:
            ray.get(worker.running)
            how = "its server stopped"
        except ray.exceptions.RayError as error:
            how = explain(error)
        self._ended(slot, how)

    def _vacate(self, slot: Slot[_RayAttentionWorker]) -> str:
        super()._vacate(slot)
        slot.due = 0.0  # Ray starts it again by itself, at once
        return "Ray starts it again"

    def _overdue(self, slot: Slot[_RayAttentionWorker], worker: _RayAttentionWorker) -> None:
        missing = ", ".join(unready.name for unready in self._slots if unready.worker is None or not unready.worker.up)
        self._fail(f"{missing} did not start within {TIMEOUT:g} s; see Ray's logs of workers")

    def _kill(self, worker: _RayAttentionWorker) -> None:
        ray_module().kill(worker.actor, no_restart=worker.retired)

    def _end(self, workers: Sequence[_RayAttentionWorker]) -> None:
        ray = ray_module()
        if not ray.is_initialized():
            return
        stopping = [worker.actor.stop.remote() for worker in workers]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=_GRACE)
        for actor in self._actors.values():
            ray.kill(actor)
        self._request(0)


def environment(threads: int | None) -> dict[str, str]:
    """Variables of a Lamina process on Ray, set before it starts: Ray hides no GPU, no process needs the server's keys,
    OpenMP has so many threads."""
    variables = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", KEY_VARIABLE: ""}
    return variables if threads is None else variables | {"OMP_NUM_THREADS": str(threads)}
