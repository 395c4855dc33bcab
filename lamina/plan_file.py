"""The part of a plan file (`lamina plan --out`) that an engine needs: the model, the engine's keywords, the replicas.

    version = 2
    model = "llama-3-70b"       # what to load: a name, or a path
    replicas = 1
    undeployable = ""           # why no engine is what was planned; "" where one is
    differences = []            # how the engine differs from what was planned
    [engine]                    # keywords of `EngineConfig`, for one replica

The other tables are the simulator's (`lamina.simulator.planning.plan_file`). Everything wrong is an InvalidRequest that
names the value and what is allowed; nothing in a file is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.system.toml_models import Table, read_tables, validated

VERSION = 2
ENGINE_KEYS = (
    "dtype", "kv_memory", "kv_local", "kv_dtype", "page_size", "max_model_len", "max_batch_tokens", "max_num_seqs",
    "threads", "prefix_cache", "policy", "attention_workers", "autoscale", "shard", "redundancy", "cluster", "lanes",
    "query_first", "local_share", "model_workers", "model_parallel", "device", "attention_device", "sequence_tokens",
    "weights", "quantize", "speculate", "num_speculative_tokens",
)  # fmt: skip
"""Keywords that a plan may set. Credentials, channels and folders belong to the deployment."""
MAX_REPLICAS, MAX_TEXT = 1 << 20, 4000


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One replica's engine. `engine` has keywords of `EngineConfig`; the other fields are those of the file."""

    model: str
    engine: Mapping[str, Any]
    replicas: int = 1
    undeployable: str = ""
    differences: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, text in [("model", self.model), ("undeployable", self.undeployable)]:
            if not isinstance(text, str) or len(text) > MAX_TEXT:
                raise InvalidRequest(f"{name} is {text!r:.80}; allowed is a text of up to {MAX_TEXT} characters")
        if type(self.replicas) is not int or not 1 <= self.replicas <= MAX_REPLICAS:
            raise InvalidRequest(
                f"replicas is {self.replicas!r:.80}; allowed are whole numbers from 1 to {MAX_REPLICAS}"
            )
        _check_engine(self.engine)

    def keywords(self, **overrides: Any) -> dict[str, Any]:
        """Keywords for `LLM`: the plan's, with others over them. Raises InvalidRequest where no engine can do it."""
        if self.undeployable:
            raise InvalidRequest(f"no engine here can run what was planned: {self.undeployable}")
        return {**self.engine, **overrides}

    def remarks(self) -> list[str]:
        """Where the engine differs from what was planned, in words."""
        replicas = [f"the plan has {self.replicas} replicas; this is one of them"] if self.replicas > 1 else []
        return [*replicas, *self.differences]


def read(path: str | Path) -> EnginePlan:
    """The engine's part of a plan file. Raises InvalidRequest, which names the file."""
    return read_tables(path, _from_tables)


class _File(Table):
    version: Literal[2]
    model: str
    replicas: int = 1
    undeployable: str = ""
    differences: tuple[str, ...] = ()
    engine: dict[str, Any]
    system: dict[str, Any]
    shape: dict[str, Any]
    predicted: dict[str, Any]
    trace: dict[str, Any]
    slo: dict[str, Any] | None = None
    device: tuple[dict[str, Any], ...] = ()
    link: tuple[dict[str, Any], ...] = ()


def check_version(data: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for another version, which has other keys."""
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise InvalidRequest(f"version is {data.get('version')!r:.80}; allowed is {VERSION}")


def _from_tables(data: Mapping[str, Any]) -> EnginePlan:
    check_version(data)
    file = validated(_File, data)
    return EnginePlan(file.model, file.engine, file.replicas, file.undeployable, file.differences)


def _check_engine(engine: Mapping[str, Any]) -> None:
    """Raise InvalidRequest unless these are keywords that a plan may set, with values that an engine takes."""
    if unknown := [name for name in engine if name not in ENGINE_KEYS]:
        raise InvalidRequest(f"engine has the key {unknown[0]!r:.80}; allowed are {', '.join(ENGINE_KEYS)}")
    workers = engine.get("attention_workers", 0)
    if type(workers) is not int:
        raise InvalidRequest(f"engine.attention_workers is {workers!r:.80}; allowed is a whole number")
    if engine.get("cluster") not in (None, "auto"):  # a file may not send its reader's requests anywhere
        raise InvalidRequest(f'engine.cluster is {engine["cluster"]!r:.80}; allowed is "auto", or none')
    try:
        EngineConfig(**engine)
    except InvalidRequest as error:
        raise InvalidRequest(f"engine: {error}") from error
