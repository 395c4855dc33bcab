"""The engine of a server as a process: `python -m lamina.server.processes.engine_main`, started by the supervisor.

It receives the model to load and the attention workers to use; it sends the progress of loading, and that it serves. It
ends when its stdin closes, and when the engine stops. torch is imported after the environment that OpenMP reads is set.

received   ["engine", model, config, socket, secret, waits for workers]
           ["workers", [[name, address, token, capacity]]]   ["joined", worker]   ["left", name]
sent       ["progress", what, done, total]   ["ready", facts]   ["failed", kind, why]   ["lost", name]
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lamina.client.remote_host import SWITCH_INTERVAL, disclaim_later
from lamina.config import EngineConfig
from lamina.deploy.relayed_attention import RelayedWorkers
from lamina.errors import LaminaError
from lamina.server.processes.child_protocol import SupervisorPipe, begin, unpack_worker
from lamina.system.progress import Progress
from lamina_workers.devices.openmp import SPIN_COUNT, SPIN_COUNT_BESIDE_CLIENTS, share_cores

if TYPE_CHECKING:
    from lamina.launch.builder import Runtime
    from lamina.ray_engine.handle import ClusterRuntime

logger = logging.getLogger("lamina")


def main() -> int:
    """The exit status: 0 where the supervisor closed stdin, 1 where the engine did not start or has stopped."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    supervisor, messages = begin("engine")
    _, model, config, path, secret, waits = next(messages, ["", "", {}, "", "", False])
    share_cores(SPIN_COUNT if waits else SPIN_COUNT_BESIDE_CLIENTS)
    workers = RelayedWorkers(lambda name: supervisor.send("lost", name)) if waits else None
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(messages, workers, ended), name="lamina-supervisor", daemon=True).start()
    threading.Thread(
        target=_serve, args=(supervisor, model, config, path, secret, workers, ended), name="lamina-serve", daemon=True
    ).start()
    status = ended.get()
    os._exit(status)  # threads of torch, grpc or Ray may be anywhere; all that must be closed is closed


def _listen(messages: Any, workers: RelayedWorkers | None, ended: queue.SimpleQueue[int]) -> None:
    for word, *items in messages:
        if workers is None:
            continue
        if word == "workers":
            workers.there([unpack_worker(fields) for fields in items[0]])
        elif word == "joined":
            workers.joined(unpack_worker(items[0]))
        elif word == "left":
            workers.left(items[0])
    ended.put(0)


def _serve(
    supervisor: SupervisorPipe,
    model: str,
    config: Mapping[str, Any],
    path: str,
    secret: str,
    workers: RelayedWorkers | None,
    ended: queue.SimpleQueue[int],
) -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        supervisor.send("progress", what, done, total)

    try:
        from lamina.server.processes.link import EngineListener

        settings = EngineConfig(**config)
        runtime = _start(model, settings, progress, workers)
        if (inputs := getattr(runtime, "inputs", None)) is not None:  # on a cluster they are elsewhere
            inputs.grammars.load()  # before the first request comes: later it would hold up others
        EngineListener(path, bytes.fromhex(secret), runtime.engine, time.monotonic)
        facts = _facts(runtime) | {"patience": settings.recovery_timeout}
    except BaseException as error:  # of any kind, torch's own too: the supervisor must not wait for ever
        if not isinstance(error, LaminaError):
            logger.exception("the engine did not start")
        supervisor.send("failed", type(error).__name__, " ".join(str(error).split()) or type(error).__name__)
        ended.put(1)
        return
    supervisor.send("ready", facts)
    if (disclaim := getattr(runtime.engine, "disclaim", None)) is not None:
        disclaim_later(disclaim)
    while runtime.engine.alive:
        time.sleep(0.2)
    time.sleep(1.0)  # clients that wait for outputs get the error first
    ended.put(1)


def _facts(runtime: Runtime | ClusterRuntime) -> dict[str, Any]:
    """What the HTTP process needs to know of a loaded model."""
    return {
        "folder": str(runtime.model_path),
        "context": runtime.limits.max_model_len,
        "possible": runtime.possible,
        "vocab_size": runtime.model.vocab_size,
    }


def _start(
    model: str, config: EngineConfig, progress: Progress, workers: RelayedWorkers | None
) -> Runtime | ClusterRuntime:
    if config.cluster is not None:
        from lamina.ray_engine.handle import start_on_cluster

        return start_on_cluster(model, config, progress)
    from lamina.launch.builder import start

    return start(model, config, progress, workers)


if __name__ == "__main__":
    sys.exit(main())
