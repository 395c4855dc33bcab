"""The engine of a server as a process: `python -m lamina.server.processes.engine_main`, started by the supervisor.

Hears what model to load and which attention workers are there; says how loading goes, and where it serves. Ends when
its stdin closes, and when the engine stops. torch is imported only after the environment that OpenMP reads is set.

heard   ["engine", model, config, socket, secret, waits for members]   ["members", [[name, address, token, capacity]]]
        ["joined", member]   ["left", name]
said    ["progress", what, done, total]   ["ready", facts]   ["failed", kind, why]   ["lost", name]
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lamina.config import EngineConfig
from lamina.deploy.relayed_attention import RelayedWorkers
from lamina.deploy.worker_events import WorkerAddress
from lamina.errors import LaminaError
from lamina.server.processes.child_protocol import Mouth, begin
from lamina.system.progress import Progress
from lamina_protocols.channels import Credentials
from lamina_workers.devices.openmp import SPIN_COUNT, SPIN_COUNT_BESIDE_CLIENTS, share_cores

if TYPE_CHECKING:
    from lamina.launch.builder import Runtime
    from lamina.ray_engine.handle import ClusterRuntime

logger = logging.getLogger("lamina")

_CLAIM = 10.0  # seconds after a start in which clients come back for what an engine before began
_SWITCH = 1e-4  # seconds: the threads that talk to clients must not keep the step loop from the interpreter for 5 ms


def _member(fields: Sequence[Any]) -> WorkerAddress:
    name, address, token, capacity = fields
    return WorkerAddress(name, address, Credentials(token=token), capacity)


def main() -> int:
    """The exit status: 0 where the supervisor let it go, 1 where the engine did not start or has stopped."""
    sys.setswitchinterval(_SWITCH)
    mouth, lines = begin("engine")
    _, model, config, path, secret, waits = next(lines, ["", "", {}, "", "", False])
    share_cores(SPIN_COUNT if waits else SPIN_COUNT_BESIDE_CLIENTS)
    members = RelayedWorkers(lambda name: mouth.say("lost", name)) if waits else None
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines, members, ended), name="lamina-supervisor", daemon=True).start()
    threading.Thread(
        target=_serve, args=(mouth, model, config, path, secret, members, ended), name="lamina-serve", daemon=True
    ).start()
    status = ended.get()
    os._exit(status)  # threads of torch, grpc or Ray may be anywhere; all that must be closed was


def _listen(lines: Any, members: RelayedWorkers | None, ended: queue.SimpleQueue[int]) -> None:
    for word, *items in lines:
        if members is not None:
            _tell(members, word, *items)
    ended.put(0)


def _tell(members: RelayedWorkers, word: str, *items: Any) -> None:
    """Take a line of the supervisor's."""
    if word == "members":
        members.there([_member(fields) for fields in items[0]])
    elif word == "joined":
        members.joined(_member(items[0]))
    elif word == "left":
        members.left(items[0])


def _serve(
    mouth: Mouth,
    model: str,
    config: Mapping[str, Any],
    path: str,
    secret: str,
    members: RelayedWorkers | None,
    ended: queue.SimpleQueue[int],
) -> None:
    def progress(what: str, done: int, total: int | None) -> None:
        mouth.say("progress", what, done, total)

    try:
        from lamina.server.processes.link import EngineListener

        settings = EngineConfig(**config)
        runtime = _start(model, settings, progress, members)
        EngineListener(path, bytes.fromhex(secret), runtime.engine, time.monotonic)
        facts = _facts(runtime) | {"patience": settings.recovery_timeout}
    except BaseException as error:  # whatever it is, torch's own errors too: nobody may wait for ever
        if not isinstance(error, LaminaError):
            logger.exception("the engine did not start")
        mouth.say("failed", type(error).__name__, " ".join(str(error).split()) or type(error).__name__)
        ended.put(1)
        return
    mouth.say("ready", facts)
    if (disclaim := getattr(runtime.engine, "disclaim", None)) is not None:
        claim = threading.Timer(_CLAIM, disclaim)  # whoever has not come back for a request by then will not
        claim.daemon = True
        claim.start()
    while runtime.engine.alive:
        time.sleep(0.2)
    time.sleep(1.0)  # whoever waits for outputs is told first
    ended.put(1)


def _facts(runtime: Runtime | ClusterRuntime) -> dict[str, Any]:
    """What the HTTP process must know of a model."""
    return {
        "folder": str(runtime.model_path),
        "context": runtime.limits.max_model_len,
        "possible": runtime.possible,
        "vocab_size": runtime.model.vocab_size,
    }


def _start(
    model: str, config: EngineConfig, progress: Progress, members: RelayedWorkers | None
) -> Runtime | ClusterRuntime:
    if config.cluster is not None:
        from lamina.ray_engine.handle import start_on_cluster

        return start_on_cluster(model, config, progress)
    from lamina.launch.builder import start

    return start(model, config, progress, members)


if __name__ == "__main__":
    sys.exit(main())
