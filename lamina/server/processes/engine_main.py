"""The engine of a server as a process: `python -m lamina.server.processes.engine_main`, started by the supervisor.

It receives the model to load and the attention workers to use; it sends the progress of loading, and that it serves. It
ends when its stdin closes, when it is told to, and when the engine stops. torch is imported after the environment that
OpenMP reads is set.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from lamina.client.remote import SWITCH_INTERVAL, disclaim_later
from lamina.config import EngineConfig
from lamina.deploy.relayed_attention import Drained, RelayedWorkers
from lamina.errors import EngineError, LaminaError
from lamina.server.processes.child_protocol import (
    TO_ENGINE,
    DrainWorker,
    Failed,
    Possible,
    Prepare,
    Ready,
    StartEngine,
    Stop,
    SupervisorPipe,
    ToEngine,
    Workers,
    begin,
)
from lamina.system.progress import Progress, Progressed
from lamina_workers.devices.openmp import SPIN_COUNT, SPIN_COUNT_BESIDE_CLIENTS, share_cores

if TYPE_CHECKING:
    from lamina.engine.engine import Engine
    from lamina.launch.builder import Runtime
    from lamina.ray_cluster.handle import ClusterRuntime

logger = logging.getLogger("lamina")


def main() -> int:
    """The exit status: 0 where the supervisor wanted it to end, 1 where the engine did not start or has stopped."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    supervisor, messages = begin("engine", TO_ENGINE)
    logging.getLogger("lamina.choices").setLevel(logging.INFO)  # whatever the log level
    order = next(messages, None)
    if not isinstance(order, (Prepare, StartEngine)):
        return 0  # the supervisor is gone
    share_cores(SPIN_COUNT if order.needs_workers else SPIN_COUNT_BESIDE_CLIENTS)
    if isinstance(order, Prepare):
        _prepare()
        order = next(messages, None)
    if not isinstance(order, StartEngine):
        return 0  # the supervisor does not need this process
    workers = RelayedWorkers(supervisor.send, optional=not order.needs_workers) if order.waits else None
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    stop = threading.Event()
    threading.Thread(
        target=_listen, args=(messages, workers, stop, ended), name="lamina-supervisor", daemon=True
    ).start()
    threading.Thread(
        target=_serve, args=(supervisor, order, workers, stop, ended), name="lamina-serve", daemon=True
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


def _listen(
    messages: Iterator[ToEngine], workers: RelayedWorkers | None, stop: threading.Event, ended: queue.SimpleQueue[int]
) -> None:
    for message in messages:
        if isinstance(message, Stop):
            stop.set()
        elif isinstance(message, Workers) and workers is not None:
            workers.update(message.workers)
        elif isinstance(message, DrainWorker) and workers is not None:
            workers.drains.put(message.name)
    ended.put(0)


def _serve(
    supervisor: SupervisorPipe,
    order: StartEngine,
    workers: RelayedWorkers | None,
    stop: threading.Event,
    ended: queue.SimpleQueue[int],
) -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        supervisor.send(Progressed(what, done, total))

    try:
        from lamina.server.frontend import fingerprint
        from lamina.server.processes.engine_link import EngineListener

        settings = EngineConfig(**order.config)
        runtime = _start(order.model, settings, progress, workers)
        EngineListener(order.socket, bytes.fromhex(order.secret), runtime.engine, time.monotonic)
        facts = _facts(runtime) | {"patience": settings.recovery_timeout}
        facts["fingerprint"] = fingerprint(order.model, settings)
    except BaseException as error:  # of any kind, torch's own too: the supervisor must not wait for ever
        if not isinstance(error, LaminaError):
            logger.exception("the engine did not start")
        supervisor.send(Failed(type(error).__name__, " ".join(str(error).split()) or type(error).__name__))
        ended.put(1)
        return
    supervisor.send(Ready(facts))
    if (inputs := getattr(runtime, "inputs", None)) is not None:  # on a cluster they are elsewhere
        inputs.grammars.load()  # while the HTTP process loads its own: later it would hold up more requests
    if (disclaim := getattr(runtime.engine, "disclaim", None)) is not None:
        disclaim_later(disclaim)
    possible = runtime.possible
    while runtime.engine.alive:
        if inputs is not None and inputs.possible != possible:  # an attention worker has joined, or is gone for good
            possible = inputs.possible
            supervisor.send(Possible(possible))
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
        supervisor.send(Drained(name))

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
