"""An engine on a Ray cluster: in an actor placed by `lamina_model`, used from the process that asked for it.

Only plain data crosses: requests, tokens, small files of the model. Everything that is started here ends with the
process that started it. Knows actors; knows nothing of models and attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lamina.cluster import ATTENTION, MODEL, NAMESPACE, TIMEOUT, connect, explain, ray_module, require
from lamina.config import EngineConfig, parse_size
from lamina.errors import EngineError, InvalidRequest, LaminaError
from lamina.intake import Intake
from lamina.model_cache import Progress, hash_file
from lamina.ray_members import RayCluster, environment
from lamina_workers.openmp import share_cores

if TYPE_CHECKING:
    from lamina.remote_engine import Command, Event, RemoteEngine
    from lamina.request import SchedulerConfig
    from lamina.tokenizer import Tokenizer
    from lamina_workers.model_config import ModelConfig

logger = logging.getLogger("lamina")

_POLL = 0.5  # seconds
_SWITCH = (
    1e-4  # seconds; by default Ray's threads could keep the step loop from the interpreter lock for 5 ms at a time
)
_STOPPING = 10.0  # seconds for the engine's last batch
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class EngineActor:
    """The process of model worker 0, where the engine lives. Each method is one call through Ray."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._members: RayCluster | None = None
        self._runtime: Any = None
        self._host: Any = None
        self._name = ""
        share_cores()  # before anything imports torch
        sys.setswitchinterval(_SWITCH)
        logger.addHandler(_Forward(self._events))
        logger.setLevel(logging.INFO)

    def start(self, name: str, config: EngineConfig, workers: int) -> dict[str, Any]:
        """Load the model and bring the attention workers up. The model's folder, the SHA-256 of its small files,
        the scheduler's limits, and the longest sequence that they leave room for."""
        from lamina.remote_engine import EngineHost
        from lamina.runtime import start

        memory = None if config.kv_memory is None else parse_size("kv_memory", config.kv_memory)
        self._name = name
        if workers:
            self._members = RayCluster(workers, kv_memory=memory, threads=config.threads)
        self._runtime = start(name, config, self._report, self._members)
        self._host = EngineHost(self._runtime.engine, self._events, time.monotonic)
        folder = self._runtime.model_path
        limits, possible = self._runtime.limits, self._runtime.possible
        return {"folder": str(folder), "files": _hashes(folder), "limits": limits, "possible": possible}

    def files(self) -> dict[str, bytes]:
        """The model's small files by name: all that text needs."""
        folder = self._runtime.model_path
        return {name: (folder / name).read_bytes() for name in _MODEL_FILES if (folder / name).is_file()}

    def ask(self, commands: Sequence[Command]) -> None:
        self._host.ask(commands)

    def events(self) -> Sequence[Event]:
        from lamina.remote_engine import fetch

        while not (fetched := fetch(self._events, _POLL)):
            if self._host is not None and not self._runtime.engine.alive:
                return [("stopped", "the engine has stopped")]
        return fetched

    def status(self) -> dict[str, Any]:
        """The model, this process, whether its engine is alive, and every worker: where it is, what it says itself."""
        from lamina_protocols.service import WorkerClient

        workers = []
        for member, status in self._members.described() if self._members is not None else ():
            row = {**dataclasses.asdict(status)}
            if member is not None:
                try:
                    with WorkerClient(member.address, member.credentials) as client:
                        row |= {"worker": dataclasses.asdict(client.status())}
                except LaminaError as error:
                    row |= {"error": str(error)}
            workers.append(row)
        alive = self._runtime is not None and self._runtime.engine.alive
        return {"model": self._name, "process": os.getpid(), "alive": alive, "workers": workers}

    def drain(self, worker: str) -> None:
        """Move a worker's KV to the others, and use it no more."""
        self._runtime.drain(worker)

    def stop(self) -> None:
        """End the engine and its workers; unfinished requests end with an EngineError."""
        if self._runtime is not None:
            self._runtime.stop()
        if self._members is not None:
            self._members.close()

    def _report(self, what: str, done: int, total: int | None) -> None:
        self._events.put(("progress", what, done, total))


class _Forward(logging.Handler):
    """Sends what is logged here to whoever uses the engine."""

    def __init__(self, events: queue.SimpleQueue[Event]) -> None:
        super().__init__(logging.INFO)
        self._forwarded = events

    def emit(self, record: logging.LogRecord) -> None:
        self._forwarded.put(("log", record.levelno, self.format(record)))


class _RayWire:
    """The way to the engine's actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def ask(self, commands: Sequence[Command]) -> None:
        self._call(self._actor.ask, list(commands))

    def events(self) -> Sequence[Event]:
        fetched: Sequence[Event] = self._call(self._actor.events)
        return fetched

    def _call(self, method: Any, *arguments: Any) -> Any:
        ray = ray_module()
        if not ray.is_initialized():  # a call would start a cluster of its own
            raise EngineError("the connection to the Ray cluster is closed")
        try:
            return ray.get(method.remote(*arguments))
        except ray.exceptions.RayError as error:
            raise EngineError(f"the engine's process is gone: {explain(error)}") from error


@dataclass(frozen=True, slots=True)
class ClusterRuntime:
    """What `lamina.runtime.Runtime` is, for an engine on a cluster."""

    model_path: Path
    model: ModelConfig
    generation_config: Mapping[str, Any]
    tokenizer: Tokenizer
    limits: SchedulerConfig
    possible: int
    intake: Intake
    engine: RemoteEngine
    progress: Progress | None
    actor: Any
    files: TemporaryDirectory[str] | None
    own_connection: bool

    def stop(self) -> None:
        """End the engine, its actors and, where it was made for them, the connection to the cluster."""
        self.engine.close()
        self.engine.join(_STOPPING)
        _end(self.actor, self.own_connection)
        self.tokenizer.close()
        if self.files is not None:
            self.files.cleanup()


def start_on_cluster(name: str | Path, config: EngineConfig, progress: Progress | None = None) -> ClusterRuntime:
    """Start an engine and its attention workers on the cluster `config.cluster`, and load a model there.

    The model's weights are fetched where the engine runs, not here. Raises what `lamina.runtime.start` raises, and
    EngineError where the cluster is not there, has too little, or runs another version.
    """
    from lamina.remote_engine import RemoteEngine

    workers = config.attention_workers if isinstance(config.attention_workers, int) else 0  # the config refuses both
    own = connect(config.cluster or "auto")
    ray = ray_module()
    actor, engine = None, None
    try:
        require({MODEL: 1, ATTENTION: workers} if workers else {MODEL: 1})
        actor = (
            ray.remote(EngineActor)
            .options(
                name=f"engine-{secrets.token_hex(2)}",
                namespace=NAMESPACE,
                resources={MODEL: 1},
                num_cpus=0,
                max_concurrency=16,
                enable_task_events=False,  # one for each batch of outputs, which nobody reads
                runtime_env={"env_vars": environment(config.threads)},
            )
            .remote()
        )
        engine = RemoteEngine(_RayWire(actor), time.monotonic, progress)
        facts = _result(actor.start.remote(str(name), config, workers))
        return _runtime(actor, engine, facts, progress, own)
    except BaseException:  # Ctrl-C too: nobody is there any more to end them
        _end(actor, own)
        if engine is not None:
            engine.join(_STOPPING)
        raise


def _runtime(
    actor: Any, engine: RemoteEngine, facts: Mapping[str, Any], progress: Progress | None, own: bool
) -> ClusterRuntime:
    """Everything that text needs, from the engine's folder where this process finds the same one, else from copies."""
    from lamina.tokenizer import Tokenizer, read_json
    from lamina_workers.model_config import ModelConfig

    folder, copies = Path(facts["folder"]), None
    if _hashes(folder) != facts["files"]:
        copies = TemporaryDirectory(prefix="lamina-")
        folder = Path(copies.name)
        contents = _result(actor.files.remote())
        for name in _MODEL_FILES:
            if name in contents:
                (folder / name).write_bytes(contents[name])
    model, tokenizer = ModelConfig.from_folder(folder), Tokenizer(folder)
    generation_config = read_json(folder / "generation_config.json")
    return ClusterRuntime(
        model_path=folder,
        model=model,
        generation_config=generation_config,
        tokenizer=tokenizer,
        limits=facts["limits"],
        possible=facts["possible"],
        intake=Intake(tokenizer, facts["limits"].max_model_len, facts["possible"], model.vocab_size, generation_config),
        engine=engine,
        progress=progress,
        actor=actor,
        files=copies,
        own_connection=own,
    )


def _result(call: Any) -> Any:
    """What a call to the engine's actor returns. Raises what it raised there, or EngineError."""
    ray = ray_module()
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LaminaError):
            raise error.cause from error
        raise EngineError(f"the engine did not start: {explain(error)}") from error
    except ray.exceptions.RayError as error:
        raise EngineError(f"the engine did not start: {explain(error)}") from error


def _end(actor: Any, own_connection: bool) -> None:
    ray = ray_module()
    if not ray.is_initialized():  # Python is ending, and Ray went first: the cluster ends what was ours
        return
    if actor is not None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(actor.stop.remote(), timeout=_STOPPING)
        ray.kill(actor)
    if own_connection:
        ray.shutdown()


def _hashes(folder: Path) -> dict[str, str]:
    return {name: hash_file(folder / name) for name in _MODEL_FILES if (folder / name).is_file()}


# Engines of other programs, for the command line.


def engines(ray: Any) -> dict[str, Any]:
    """The actors of all engines on the connected cluster, by name."""
    named = ray.util.list_named_actors(all_namespaces=True)
    names = sorted(entry["name"] for entry in named if entry["namespace"] == NAMESPACE)
    return {name: ray.get_actor(name, namespace=NAMESPACE) for name in names}


def engine_status(ray: Any) -> dict[str, dict[str, Any]]:
    """`EngineActor.status` of every engine, by name."""
    calls = {name: actor.status.remote() for name, actor in engines(ray).items()}
    return {name: ray.get(call, timeout=TIMEOUT) for name, call in calls.items()}


def end_engines(ray: Any) -> list[str]:
    """End every engine, with its workers. Their names."""
    ended = engines(ray)
    for actor in ended.values():
        _end(actor, own_connection=False)
    return list(ended)


def drain(ray: Any, worker: str) -> str:
    """Have the engine that uses this worker move its KV away. The engine's name; raises InvalidRequest."""
    engine, _, name = worker.rpartition("/")
    known = {
        engine_name: [row["name"] for row in status["workers"]] for engine_name, status in engine_status(ray).items()
    }
    users = [each for each, names in known.items() if name in names and engine in ("", each)]
    if len(users) != 1:
        allowed = ", ".join(f"{each}/{row}" for each, names in known.items() for row in names)
        raise InvalidRequest(f"worker is {worker!r}; allowed are {allowed or 'none: no engine runs here'}")
    _result(engines(ray)[users[0]].drain.remote(name))
    return users[0]
