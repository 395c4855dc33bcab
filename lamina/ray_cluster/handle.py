"""An engine on a Ray cluster for the process that starts, uses and ends it.

Only plain data crosses: requests, tokens, small files of the model. All actors end with the process that started them.

A `HeadWatch` writes to the log when the cluster's head cannot be reached. Requests need no head: messages go from
process to process. But after a while without a head Ray ends each of its processes, and this program, with no more than
a line in its own logs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lamina.client.input_processor import InputProcessor
from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.ray_cluster.actor import MODEL_FILES, file_hashes
from lamina.ray_cluster.connection import (
    NAMESPACE,
    TIMEOUT,
    check_reachable,
    connect,
    head_address,
    ray_module,
    require_authentication,
)
from lamina.ray_cluster.owner import STOPPING, EngineOwner, result
from lamina.system.progress import Progress
from lamina_protocols.channels.channels import split_address

if TYPE_CHECKING:
    from lamina.client.remote import RemoteEngine
    from lamina.kv.request import SchedulerConfig
    from lamina.messages.engine_request import EngineRequest
    from lamina.text.tokenizer import Tokenizer
    from lamina_workers.model_config.config import ModelConfig

logger = logging.getLogger("lamina")

LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # Ray's variable, of each node and of the program
_LIMIT_S = 60.0  # Ray's own default
_LOOK_S = 3.0

_POLL = 0.2  # seconds
_PATIENCE = 86400.0  # seconds that requests wait for another engine; its owner ends them where there will be none


@dataclass(frozen=True, slots=True)
class ClusterRuntime:
    """The `lamina.launch.builder.Runtime` of an engine on a cluster."""

    model_path: Path
    model: ModelConfig
    tokenizer: Tokenizer
    limits: SchedulerConfig
    possible: int
    inputs: InputProcessor
    engine: RemoteEngine
    progress: Progress | None
    owner: EngineOwner
    files: TemporaryDirectory[str] | None
    own_connection: bool
    watch: HeadWatch
    unfinished: tuple[EngineRequest, ...] = ()

    def stop(self) -> None:
        """End the engine, its actors and, where it was made here, the connection to the cluster."""
        self.engine.close()
        self.engine.join(STOPPING)
        self.watch.close()
        _end(self.owner, self.own_connection)
        self.engine.give_up("the engine has stopped")
        self.tokenizer.close()
        if self.files is not None:
            self.files.cleanup()


def start_on_cluster(name: str | Path, config: EngineConfig, progress: Progress | None = None) -> ClusterRuntime:
    """Start an engine and its attention workers on the cluster `config.cluster`, and load a model there.

    The model's weights are fetched where the engine runs, not here. Raises the errors of
    `lamina.launch.builder.start`, and EngineError where there is no cluster, or it has too few resources, runs another
    version, or lets everybody in and `config` does not say that this is wanted.
    """
    from lamina.client.remote import RemoteEngine

    own_connection = connect(config.cluster or "auto")
    owner = EngineOwner(str(name), config)
    engine = None
    try:
        if not config.insecure:
            require_authentication()
        engine = RemoteEngine(owner.place(), time.monotonic, progress, _PATIENCE, holds=True)
        owner.attach(engine)
        return _runtime(owner, engine, owner.load(progress), progress, own_connection)
    except BaseException:  # Ctrl-C included: no caller will end them
        _end(owner, own_connection)
        if engine is not None:
            engine.give_up("the engine did not start")
        raise


def _runtime(
    owner: EngineOwner, engine: RemoteEngine, facts: Mapping[str, Any], progress: Progress | None, own_connection: bool
) -> ClusterRuntime:
    """A runtime with the files that text needs: the engine's own where this process has the same, else copies."""
    from lamina.text.tokenizer import Tokenizer, read_json
    from lamina_workers.converted.models import model_config

    folder, copies, head = Path(facts["folder"]), None, head_address()
    if file_hashes(folder) != facts["files"]:
        copies = TemporaryDirectory(prefix="lamina-")
        folder = Path(copies.name)
        contents = owner.files()
        for name in MODEL_FILES:
            if name in contents:
                (folder / name).write_bytes(contents[name])
    model, tokenizer = model_config(folder), Tokenizer(folder)
    generation_config = read_json(folder / "generation_config.json")
    return ClusterRuntime(
        model_path=folder,
        model=model,
        tokenizer=tokenizer,
        limits=facts["limits"],
        possible=facts["possible"],
        inputs=InputProcessor(
            tokenizer, facts["limits"].max_model_len, facts["possible"], model.vocab_size, generation_config
        ),
        engine=engine,
        progress=progress,
        owner=owner,
        files=copies,
        own_connection=own_connection,
        watch=HeadWatch(head, partial(check_reachable, *split_address(head))),
    )


def _end(owner: EngineOwner, own_connection: bool) -> None:
    owner.stop()
    if own_connection:
        ray_module().shutdown()


# Engines of other programs, for the command line.


def engines(ray: Any) -> dict[str, Any]:
    """The actors of all engines on the connected cluster, by name."""
    return {name: ray.get_actor(name, namespace=NAMESPACE) for name in _names(ray) if "/" not in name}


def engine_status(ray: Any) -> dict[str, dict[str, Any]]:
    """`EngineActor.status` of every engine, by name."""
    calls = {name: actor.status.remote() for name, actor in engines(ray).items()}
    return {name: ray.get(call, timeout=TIMEOUT) for name, call in calls.items()}


def end_engines(ray: Any) -> list[str]:
    """End every engine, with its workers. Returns the names of the engines.

    Each is asked to stop, and the process that owns it ends the rest; what is left after a while is killed here.
    """
    ended = engines(ray)
    for actor in ended.values():
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(actor.stop.remote(), timeout=STOPPING)
    deadline = time.monotonic() + STOPPING
    while (names := [name for name in _names(ray) if name.partition("/")[0] in ended]) and time.monotonic() < deadline:
        time.sleep(_POLL)
    for name in names:
        with contextlib.suppress(ValueError):  # it has ended meanwhile
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    return list(ended)


def drain(ray: Any, worker: str) -> str:
    """Have the engine that uses this worker move its KV away. Returns the engine's name. Raises InvalidRequest where
    no engine has the worker, or several have one of that name."""
    engine, _, name = worker.rpartition("/")
    workers = {
        engine_name: [row["name"] for row in status["workers"]] for engine_name, status in engine_status(ray).items()
    }
    users = [user for user, names in workers.items() if name in names and engine in ("", user)]
    if len(users) != 1:
        allowed = ", ".join(f"{user}/{row}" for user, names in workers.items() for row in names)
        raise InvalidRequest(f"worker is {worker!r}; allowed are {allowed or 'none: no engine runs here'}")
    result(engines(ray)[users[0]].drain.remote(name))
    return users[0]


def _names(ray: Any) -> list[str]:
    """The names of all actors: each engine's before those of its workers."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(entry["name"] for entry in named if entry["namespace"] == NAMESPACE)


class HeadWatch:
    """Looks until `close`. `reach` raises OSError where the head at `address` does not answer; `clock` in seconds."""

    def __init__(
        self,
        address: str,
        reach: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        pause: float = _LOOK_S,
    ) -> None:
        self._address, self._reach, self._clock, self._pause = address, reach, clock, pause
        self._lost_at: float | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="lamina-ray-head", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self._pause):
            self.look()

    def look(self) -> None:
        """Ask once, and say what is new."""
        try:
            self._reach()
        except OSError as error:
            if self._lost_at is None:
                self._lost_at = self._clock()
                logger.error(
                    "Ray's head at %s does not answer (%s): requests go on, and nothing can be started or started "
                    "again. Without this head, or one with its state, Ray ends its processes after %s s, this program "
                    "too; %s says how long, where nodes and this program are started",
                    self._address,
                    error,
                    os.environ.get(LIMIT, f"{_LIMIT_S:g}"),
                    LIMIT,
                )
            return
        if self._lost_at is not None:
            away = self._clock() - self._lost_at
            self._lost_at = None
            logger.warning("Ray's head at %s answers again, after %.0f s", self._address, away)
