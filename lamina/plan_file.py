"""The part of a plan file (`lamina plan --out`) that an engine needs: the model, the engine's keywords, the replicas.

    version = 1
    model = "llama-3-70b"       # what to load: a name, or a path
    replicas = 1
    [engine]                    # keywords of `EngineConfig`, for one replica

The other tables are the simulator's (`lamina.simulator.planning.plan_file`). Of those, `[system]`, `[shape]` and
`[[device]]` are read here as far as they decide whether an engine can be what was planned, and where it differs.
Everything wrong is an InvalidRequest that names the value and what is allowed; nothing in a file is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lamina.config import MAX_LANES, EngineConfig
from lamina.errors import InvalidRequest
from lamina.system.toml_models import Table, read_tables, validated

VERSION = 1
ENGINE_KEYS = (
    "dtype", "kv_memory", "kv_local", "kv_dtype", "page_size", "max_model_len", "max_batch_tokens", "max_num_seqs",
    "threads", "prefix_cache", "policy", "attention_workers", "autoscale", "shard", "redundancy", "cluster", "lanes",
    "query_first", "local_share", "model_workers", "model_parallel", "device", "attention_device", "sequence_tokens",
    "weights", "quantize", "speculate", "num_speculative_tokens",
)  # fmt: skip
"""Keywords that a plan may set. Credentials, channels and folders belong to the deployment."""
COMPUTES = {"cpu": "cpu", "gpu": "cuda"}
"""The engine's name of each kind of device."""
MAX_REPLICAS, MAX_TEXT = 1 << 20, 4000

Kind = Literal["colocated", "disaggregated", "offloaded"]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    name: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSystem:
    """What decides of a planned system whether an engine can be it. `devices`: first those of the dense layers, last
    those of attention."""

    name: str
    kind: Kind
    devices: tuple[PlannedDevice, ...]
    weight_bytes: float
    """Of one weight."""
    packed: bool
    """Whether the weights stay in few bits."""
    kv_heads: int = 1
    model_count: int = 1
    attention_count: int = 1
    model_replicas: int = 1
    lanes: int = 1
    local_share: float = 0.0
    shard: str = "heads"

    def undeployable(self) -> str:
        """Why no engine here is that system, in words; "" where one is."""
        if self.kind == "disaggregated":
            return "the engine computes prompts and decodes in one place"
        for device in self.devices:
            if device.kind not in COMPUTES:
                return (
                    f"no kernels here run on {device.name}, of kind {device.kind}; allowed are {' and '.join(COMPUTES)}"
                )
        if self.kind == "colocated":
            return ""
        ranks, replicas = self.model_count, self.model_replicas
        if ranks > 1 and replicas > 1:
            return (
                f"each layer is cut among {ranks} devices and there are {replicas} replicas; an engine does one of both"
            )
        if ranks > 1 and self.lanes > 1:
            return f"{self.lanes} lanes where {ranks} devices share each layer, which add up one batch at a time"
        if self.lanes > (limit := replicas + 1 if replicas > 1 else MAX_LANES):
            return f"{self.lanes} lanes; {replicas} replicas have {limit} at most"
        if (share := self.local_share) and (workers := ranks * replicas) > 1:
            return f"{share:.0%} of the KV with one of {workers} model workers; with several it is all elsewhere"
        if self.shard == "heads" and self.attention_count > 1 and self.kv_heads == 1:
            return "the model's one KV head cannot be cut by heads"
        return ""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One replica's engine. `engine` has keywords of `EngineConfig`."""

    model: str
    engine: Mapping[str, Any]
    system: PlannedSystem
    replicas: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or len(self.model) > MAX_TEXT:
            raise InvalidRequest(f"model is {self.model!r:.80}; allowed is a text of up to {MAX_TEXT} characters")
        if type(self.replicas) is not int or not 1 <= self.replicas <= MAX_REPLICAS:
            raise InvalidRequest(
                f"replicas is {self.replicas!r:.80}; allowed are whole numbers from 1 to {MAX_REPLICAS}"
            )
        _check_engine(self.engine)

    def keywords(self, **overrides: Any) -> dict[str, Any]:
        """Keywords for `LLM`: the plan's, with others over them. Raises InvalidRequest where no engine can do it."""
        if reason := self.system.undeployable():
            raise InvalidRequest(f"the plan is for {self.system.name}, which no engine here can run: {reason}")
        return {**self.engine, **overrides}

    def remarks(self) -> list[str]:
        """Where the engine differs from what was planned, in words."""
        remarks, dense = [], self.system.devices[0]
        if self.replicas > 1:
            remarks.append(f"the plan has {self.replicas} replicas; this is one of them")
        if self.system.packed and dense.kind != "cpu":
            remarks.append(f"weights stay packed on CPUs alone, so an engine on {dense.name} computes with 16 bits")
        if not self.system.packed and self.system.weight_bytes < 2:
            remarks.append("weights of 8 bits are read from no checkpoint here, so an engine needs one with 16 bits")
        return remarks


def read(path: str | Path) -> EnginePlan:
    """The engine's part of a plan file. Raises InvalidRequest, which names the file."""
    return read_tables(path, _from_tables)


class _Device(Table, extra="ignore"):
    name: str
    kind: str


class _Group(Table, extra="ignore"):
    kv_heads: Annotated[int, Field(ge=0)]


class _Shape(Table, extra="ignore"):
    groups: list[_Group]
    element: float = 2.0
    packing: dict[str, Any] | None = None


class _Prefill(Table, extra="ignore"):
    device: str


class _System(Table, extra="ignore"):
    kind: Kind
    label: str = ""
    device: str | None = None
    model_device: str | None = None
    attention_device: str | None = None
    prefill: _Prefill | None = None
    model_count: Count = 1
    attention_count: Count = 1
    model_replicas: Count = 1
    lanes: Count = 1
    local_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    shard: str = "heads"


class _File(Table):
    version: Literal[1]
    model: str
    replicas: int = 1
    engine: dict[str, Any]
    system: _System
    shape: _Shape
    device: tuple[_Device, ...] = ()
    predicted: dict[str, Any]
    trace: dict[str, Any]
    slo: dict[str, Any] | None = None
    link: tuple[dict[str, Any], ...] = ()


def _from_tables(data: Mapping[str, Any]) -> EnginePlan:
    if type(data.get("version")) is not int or data["version"] != VERSION:  # first: other versions have other keys
        raise InvalidRequest(f"version is {data.get('version')!r:.80}; allowed is {VERSION}")
    file = validated(_File, data)
    return EnginePlan(file.model, file.engine, _system(file), file.replicas)


def _system(file: _File) -> PlannedSystem:
    """The system of a file. Raises InvalidRequest for a device that the file does not describe."""
    system, shape = file.system, file.shape
    if system.kind == "offloaded":
        places = [("system.model_device", system.model_device), ("system.attention_device", system.attention_device)]
    elif system.kind == "colocated":
        places = [("system.device", system.device)]
    else:
        places = [("system.prefill.device", system.prefill.device if system.prefill else None)]
    devices = {device.name.lower(): device for device in file.device}
    planned = []
    for place, name in places:
        if name is None or (device := devices.get(name.lower())) is None:
            raise InvalidRequest(f"{place} is {name!r:.80}; allowed are {', '.join(devices) or 'none'}")
        planned.append(PlannedDevice(device.name, device.kind))
    return PlannedSystem(
        name=system.label or f"a system of the kind {system.kind!r}",
        kind=system.kind,
        devices=tuple(planned),
        weight_bytes=shape.element,
        packed=shape.packing is not None,
        kv_heads=min((group.kv_heads for group in shape.groups if group.kv_heads), default=1),
        model_count=system.model_count,
        attention_count=system.attention_count,
        model_replicas=system.model_replicas,
        lanes=system.lanes,
        local_share=system.local_share,
        shard=system.shard,
    )


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
