"""Plan files: one way to serve a model, what it is predicted to yield, and the engine that serves it, as TOML.

    version = 1
    model = "llama-3-70b"       # what to load: a name, or a path
    replicas = 1
    [predicted]                 # by the event loop or by the closed form; seconds, requests and dollars
    [trace]                     # what it was planned for
    [slo]                       # seconds
    [engine]                    # keywords of `EngineConfig`, for one replica
    [system]                    # `lamina.simulator.costs.systems`, by kind
    [shape]                     # the model's, as the simulator sees it
    [[device]]                  # and [[link]]: what the system names, as in `hardware.toml`

The file stands alone: nothing in it refers to another, unless the model is a path. Everything wrong is an
InvalidRequest that names the file, the value and what is allowed; nothing in a file is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.simulator.costs import hardware
from lamina.simulator.costs.hardware import Device, Link
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System
from lamina.simulator.costs.tables import from_table, text, to_table, whole
from lamina.simulator.event_loop.simulate import Slo
from lamina.system.text_files import read_toml, toml_value, write_text

VERSION = 1
MAX_BYTES = 1 << 20
KINDS: Mapping[str, type[Colocated | Disaggregated | Offloaded]] = {
    "colocated": Colocated,
    "disaggregated": Disaggregated,
    "offloaded": Offloaded,
}
ENGINE_KEYS = (
    "dtype", "kv_memory", "kv_dtype", "page_size", "max_model_len", "max_batch_tokens", "threads", "prefix_cache",
    "policy", "attention_workers", "shard", "cluster", "lanes", "local_share", "model_workers", "model_parallel",
)  # fmt: skip
"""Keywords that a plan may set. Credentials and channels belong to the deployment."""
_TABLES = ("predicted", "trace", "slo", "engine", "system", "shape", "device", "link")
_KEYS = ("version", "model", "replicas", *_TABLES)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What all replicas together are predicted to yield: rates a second, times in seconds, prices in dollars."""

    source: str
    """The part of the simulator that predicts."""
    requests_per_second: float
    tokens_per_second: float
    """Of output."""
    tpot: float
    ttft: float
    slo_share: float
    """Of requests that are within the SLO."""
    batch: float
    """Sequences in decode, in one replica."""
    dollars_per_hour: float
    dollars_per_million: float
    """Of output tokens."""


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What was planned for: means of tokens, requests a second (0: as many as are served), and of how many requests."""

    name: str
    requests: int
    rate: float
    prompt: float
    output: float
    context: float
    """Tokens of KV of a sequence in decode."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to serve a model. `engine` has keywords of `EngineConfig`, for one of `replicas`."""

    model: str
    system: System
    predicted: Prediction
    trace: TraceSummary
    slo: Slo
    replicas: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text("model", self.model)
        whole("replicas", self.replicas, 1, 1 << 20)
        check_engine(self.engine)

    def keywords(self, **overrides: Any) -> dict[str, Any]:
        """Keywords for `LLM`: the plan's, with others over them. Raises InvalidRequest where no engine can do it."""
        if isinstance(self.system, Disaggregated):
            raise InvalidRequest(
                f"the plan is for {self.system.name}; the engine computes prompts and decodes in one place, so allowed "
                "are plans of kind colocated and offloaded"
            )
        return {**self.engine, **overrides}

    def remarks(self) -> list[str]:
        """Where the engine differs from what was planned, in words."""
        return [f"the plan has {self.replicas} replicas; this deploys one of them"] if self.replicas > 1 else []


def engine_keywords(system: System, longest: int) -> dict[str, Any]:
    """The keywords of `EngineConfig` that deploy one instance of a system. `longest`: tokens of the longest request."""
    if not isinstance(system, (Colocated, Offloaded)):
        return {}
    shares = system.kv_tokens * system.policy.held * system.model.kv_bytes_per_token(system.kv_element)
    found: dict[str, Any] = {"max_batch_tokens": min(system.max_batch_tokens, max(1024, longest), 1 << 20)}
    holders = 1
    if isinstance(system, Offloaded):
        holders = system.workers or system.attention_count
        found |= {"attention_workers": holders, "shard": system.shard, "local_share": 0.0}
        if system.devices[0][1] == 1:  # ranks have one batch under way
            found["lanes"] = system.lanes
        if all(device.network > 0 for device, _ in system.devices):  # one without a network is where the other is
            found["cluster"] = "auto"
    if (ranks := system.devices[0][1]) > 1:
        found |= {"model_workers": ranks, "model_parallel": "tensor"}
    found["kv_memory"] = int(shares / holders)
    if system.policy.name != "full":
        found["policy"] = system.policy.name
    return found


def check_engine(engine: Mapping[str, Any]) -> None:
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


def read(path: str | Path) -> Plan:
    """The plan in a file, checked. Raises InvalidRequest."""
    try:
        return _from_toml(read_toml(path, MAX_BYTES))
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error}") from error
    except (ValueError, OverflowError) as error:  # an integer too long to print, or to be a float
        raise InvalidRequest(f"{path} holds what cannot be shown: {error}") from error


def write(path: str | Path, plan: Plan) -> None:
    """Write a plan file: all of it, or nothing. Raises InvalidRequest where that cannot be done."""
    write_text(path, dumps(plan))


def dumps(plan: Plan) -> str:
    """The file's text: `read` gives back an equal plan."""
    kind = next(name for name, known in KINDS.items() if isinstance(plan.system, known))
    system = {"kind": kind, **to_table(plan.system, leave_out=("model",))}
    devices, links = _parts(plan.system)
    top = {"version": VERSION, "model": plan.model, "replicas": plan.replicas}
    tables = {
        "predicted": to_table(plan.predicted),
        "trace": to_table(plan.trace),
        "slo": to_table(plan.slo),
        "engine": plan.engine,
        "system": system,
        "shape": to_table(plan.system.model),
    }
    lines = [f"{name} = {toml_value(value)}" for name, value in top.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n\n" + hardware.dumps(devices.values(), links.values())


def _from_toml(data: Mapping[str, Any]) -> Plan:
    if (version := data.get("version")) != VERSION or type(version) is not int:
        raise InvalidRequest(f"version is {version!r:.80}; allowed is {VERSION}")
    if unknown := [name for name in data if name not in _KEYS]:
        raise InvalidRequest(f"it has the key {unknown[0]!r:.80}; allowed are {', '.join(_KEYS)}")
    if missing := [name for name in ("model", "predicted", "trace", "engine", "system", "shape") if name not in data]:
        raise InvalidRequest(f"it has no {missing[0]}; needed are model, predicted, trace, engine, system and shape")
    parts = {kind: data[kind] for kind in ("device", "link") if kind in data}
    catalogue = hardware.from_tables(parts)
    shape = from_table(ModelShape, data["shape"], "shape", catalogue)
    table = data["system"]
    if not isinstance(table, Mapping) or not isinstance(kind := table.get("kind"), str) or kind not in KINDS:
        raise InvalidRequest(f"system is {table!r:.80}; allowed is a table whose kind is {', '.join(KINDS)}")
    rest = {name: value for name, value in table.items() if name != "kind"}
    engine = data["engine"]
    if not isinstance(engine, Mapping):
        raise InvalidRequest(f"engine is {engine!r:.80}; allowed is a table")
    return Plan(
        model=text("model", data["model"]),
        system=from_table(KINDS[kind], rest, "system", catalogue, model=shape),
        predicted=from_table(Prediction, data["predicted"], "predicted", catalogue),
        trace=from_table(TraceSummary, data["trace"], "trace", catalogue),
        slo=from_table(Slo, data.get("slo", {}), "slo", catalogue),
        replicas=data.get("replicas", 1),
        engine=dict(engine),
    )


def _parts(system: Any) -> tuple[dict[str, Device], dict[str, Link]]:
    """The devices and links of a system, and of systems in it, by name."""
    devices: dict[str, Device] = {}
    links: dict[str, Link] = {}
    for item in fields(system):
        value = getattr(system, item.name)
        if isinstance(value, Device):
            _add(devices, value)
        elif isinstance(value, Link):
            links[value.name] = value
        elif isinstance(value, Colocated):
            for device in _parts(value)[0].values():
                _add(devices, device)
    return devices, links


def _add(devices: dict[str, Device], device: Device) -> None:
    if devices.setdefault(device.name, device) != device:
        raise InvalidRequest(f"two devices are called {device.name!r}; allowed is one of a name in a plan")
