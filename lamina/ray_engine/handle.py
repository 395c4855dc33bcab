"""An engine on a Ray cluster as its users see it: started, used, and ended by the process that asked for it.

Only plain data crosses: requests, tokens, small files of the model. Everything that is started here ends with the
process that started it. Knows actors; knows nothing of models and attention.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lamina.client.input_processor import InputProcessor
from lamina.config import EngineConfig
from lamina.deploy.ray_connection import NAMESPACE, TIMEOUT, connect, ray_module
from lamina.errors import InvalidRequest
from lamina.ray_engine.actor import MODEL_FILES, file_hashes
from lamina.ray_engine.owner import STOPPING, EngineOwner, result
from lamina.system.progress import Progress

if TYPE_CHECKING:
    from lamina.client.remote_client import RemoteEngine
    from lamina.messages.engine_request import EngineRequest
    from lamina.scheduling.request import SchedulerConfig
    from lamina.text.tokenizer import Tokenizer
    from lamina_workers.decoder.config import ModelConfig

_POLL = 0.2  # seconds
_PATIENCE = 86400.0  # seconds that requests wait for another engine; its owner says before if there will be none


@dataclass(frozen=True, slots=True)
class ClusterRuntime:
    """What `lamina.launch.builder.Runtime` is, for an engine on a cluster."""

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
    unfinished: tuple[EngineRequest, ...] = ()

    def stop(self) -> None:
        """End the engine, its actors and, where it was made for them, the connection to the cluster."""
        self.engine.close()
        self.engine.join(STOPPING)
        _end(self.owner, self.own_connection)
        self.engine.give_up("the engine has stopped")
        self.tokenizer.close()
        if self.files is not None:
            self.files.cleanup()


def start_on_cluster(name: str | Path, config: EngineConfig, progress: Progress | None = None) -> ClusterRuntime:
    """Start an engine and its attention workers on the cluster `config.cluster`, and load a model there.

    The model's weights are fetched where the engine runs, not here. Raises what `lamina.launch.builder.start` raises,
    and EngineError where the cluster is not there, has too little, or runs another version.
    """
    from lamina.client.remote_client import RemoteEngine

    own = connect(config.cluster or "auto")
    owner = EngineOwner(str(name), config)
    engine = None
    try:
        engine = RemoteEngine(owner.place(), time.monotonic, progress, _PATIENCE, holds=True)
        owner.uses(engine)
        return _runtime(owner, engine, owner.load(progress), progress, own)
    except BaseException:  # Ctrl-C too: nobody is there any more to end them
        _end(owner, own)
        if engine is not None:
            engine.give_up("the engine did not start")
        raise


def _runtime(
    owner: EngineOwner, engine: RemoteEngine, facts: Mapping[str, Any], progress: Progress | None, own: bool
) -> ClusterRuntime:
    """Everything that text needs, from the engine's folder where this process finds the same one, else from copies."""
    from lamina.text.tokenizer import Tokenizer, read_json
    from lamina_workers.decoder.config import ModelConfig

    folder, copies = Path(facts["folder"]), None
    if file_hashes(folder) != facts["files"]:
        copies = TemporaryDirectory(prefix="lamina-")
        folder = Path(copies.name)
        contents = owner.files()
        for name in MODEL_FILES:
            if name in contents:
                (folder / name).write_bytes(contents[name])
    model, tokenizer = ModelConfig.from_folder(folder), Tokenizer(folder)
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
        own_connection=own,
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
    """End every engine, with its workers. Their names.

    Each is asked to stop, and the process that owns it ends the rest; where that does not, it is done here.
    """
    ended = engines(ray)
    for actor in ended.values():
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(actor.stop.remote(), timeout=STOPPING)
    deadline = time.monotonic() + STOPPING
    while (left := [name for name in _names(ray) if name.partition("/")[0] in ended]) and time.monotonic() < deadline:
        time.sleep(_POLL)
    for name in left:
        with contextlib.suppress(ValueError):  # it has ended meanwhile
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
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
    result(engines(ray)[users[0]].drain.remote(name))
    return users[0]


def _names(ray: Any) -> list[str]:
    """Of the actors of all engines, those of their workers after theirs."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(entry["name"] for entry in named if entry["namespace"] == NAMESPACE)
