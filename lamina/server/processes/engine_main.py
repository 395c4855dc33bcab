"""The engine of a server as a process: `python -m lamina.server.processes.engine_main`, started by the supervisor.

It receives the model to load and the attention workers to use; it sends the progress of loading, and that it serves. It
ends when its stdin closes, when it is told to, and when the engine stops. torch is imported after the environment that
OpenMP reads is set.

received   ["prepare", needs workers], perhaps, first
           ["engine", model, config, socket, secret, waits for workers, needs some]
           ["workers", [[name, address, token, capacity, CA, place]]]   ["drain", name]   ["stop"]
sent       ["progress", what, done, total]   ["ready", facts]   ["failed", kind, why]   ["lost", name]
           ["possible", tokens of one sequence]   ["drained", name]   ["grow", workers]   ["retire", name]
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import astuple
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from lamina.client.remote import SWITCH_INTERVAL, disclaim_later
from lamina.config import EngineConfig
from lamina.deploy.relayed_attention import RelayedWorkers, Wish
from lamina.errors import EngineError, LaminaError
from lamina.server.processes.child_protocol import SupervisorPipe, begin, unpack_worker
from lamina.system.progress import Progress
from lamina_workers.devices.openmp import SPIN_COUNT, SPIN_COUNT_BESIDE_CLIENTS, share_cores

if TYPE_CHECKING:
    from lamina.engine.engine import Engine
    from lamina.launch.builder import Runtime
    from lamina.ray_cluster.handle import ClusterRuntime

logger = logging.getLogger("lamina")


def main() -> int:
    """The exit status: 0 where the supervisor wanted it to end, 1 where the engine did not start or has stopped."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    supervisor, messages = begin("engine")
    logging.getLogger("lamina.choices").setLevel(logging.INFO)  # whatever the log level
    nothing = ["", "", {}, "", "", False, False]
    first = next(messages, nothing)
    share_cores(SPIN_COUNT if first[-1] else SPIN_COUNT_BESIDE_CLIENTS)
    if first[0] == "prepare":
        _prepare()
        first = next(messages, nothing)
    _, model, config, path, secret, waits, needs = first
    if not model:
        return 0  # the supervisor does not need this process
    workers = RelayedWorkers(partial(_tell, supervisor), optional=not needs) if waits else None
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    stop = threading.Event()
    threading.Thread(
        target=_listen, args=(messages, workers, stop, ended), name="lamina-supervisor", daemon=True
    ).start()
    threading.Thread(
        target=_serve,
        args=(supervisor, model, config, path, secret, workers, stop, ended),
        name="lamina-serve",
        daemon=True,
    ).start()
    status = ended.get()
    os._exit(status)  # threads of torch, grpc or Ray may be anywhere; all that must be closed is closed


def _prepare() -> None:
    """Import what any model needs, and have the first kernel loaded: most of the time that a start takes."""
    from lamina.launch import builder  # noqa: F401
    from lamina.server.processes import engine_link  # noqa: F401
    from lamina_kernels.compile.launch import load_each
    from lamina_kernels.exchange.exchange_loop import exchange_kernel

    for _ in load_each((exchange_kernel,)):
        pass


def _tell(supervisor: SupervisorPipe, wish: Wish) -> None:
    supervisor.send(type(wish).__name__.lower(), *astuple(wish))


def _listen(
    messages: Any, workers: RelayedWorkers | None, stop: threading.Event, ended: queue.SimpleQueue[int]
) -> None:
    for word, *items in messages:
        if word == "stop":
            stop.set()
        elif workers is None:
            continue
        elif word == "workers":
            workers.update([unpack_worker(fields) for fields in items[0]])
        elif word == "drain":
            workers.drains.put(items[0])
    ended.put(0)


def _serve(
    supervisor: SupervisorPipe,
    model: str,
    config: Mapping[str, Any],
    path: str,
    secret: str,
    workers: RelayedWorkers | None,
    stop: threading.Event,
    ended: queue.SimpleQueue[int],
) -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        supervisor.send("progress", what, done, total)

    try:
        from lamina.server.processes.engine_link import EngineListener

        settings = EngineConfig(**config)
        runtime = _start(model, settings, progress, workers)
        EngineListener(path, bytes.fromhex(secret), runtime.engine, time.monotonic)
        facts = _facts(runtime) | {"patience": settings.recovery_timeout}
    except BaseException as error:  # of any kind, torch's own too: the supervisor must not wait for ever
        if not isinstance(error, LaminaError):
            logger.exception("the engine did not start")
        supervisor.send("failed", type(error).__name__, " ".join(str(error).split()) or type(error).__name__)
        ended.put(1)
        return
    supervisor.send("ready", facts)
    if (inputs := getattr(runtime, "inputs", None)) is not None:  # on a cluster they are elsewhere
        inputs.grammars.load()  # while the HTTP process loads its own: later it would hold up more requests
    if (disclaim := getattr(runtime.engine, "disclaim", None)) is not None:
        disclaim_later(disclaim)
    possible = runtime.possible
    while runtime.engine.alive:
        if inputs is not None and inputs.possible != possible:  # an attention worker has joined, or is gone for good
            possible = inputs.possible
            supervisor.send("possible", possible)
        while workers is not None and not workers.drains.empty():
            _drain(cast("Runtime", runtime).engine, workers.drains.get_nowait(), supervisor)
        if stop.wait(0.2):
            runtime.stop()  # in order: attention workers are free for the next engine
            ended.put(0)
            return
    time.sleep(1.0)  # clients that wait for outputs get the error first
    ended.put(1)


def _drain(engine: Engine, name: str, supervisor: SupervisorPipe) -> None:
    """Have a worker's KV move elsewhere, and say when that is over, whatever came of it."""

    def over(done: Future[int]) -> None:
        if (error := done.exception()) is not None:
            logger.warning("%s", error)
        supervisor.send("drained", name)

    with suppress(EngineError):  # it has stopped
        engine.drain(name).add_done_callback(over)


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
        from lamina.ray_cluster.handle import start_on_cluster

        return start_on_cluster(model, config, progress)
    from lamina.launch.builder import start

    return start(model, config, progress, workers)


if __name__ == "__main__":
    sys.exit(main())
