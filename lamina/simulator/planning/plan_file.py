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

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lamina.errors import InvalidRequest
from lamina.plan_file import VERSION, EnginePlan
from lamina.simulator.costs import hardware
from lamina.simulator.costs.hardware import Catalogue, Device, Link
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System
from lamina.simulator.costs.tables import known_keys, number_within, read_tables, text, whole
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.deployment import planned_system
from lamina.system.text_files import toml_value, write_text

KINDS: Mapping[str, type[System]] = {
    "colocated": Colocated,
    "disaggregated": Disaggregated,
    "offloaded": Offloaded,
}
_MAX_ITEMS, _MAX_NUMBER, _MAX_LAYERS, _MAX_PARAMETERS = 1024, 1e18, 1 << 16, 10**18
_T = TypeVar("_T")
_TABLES = ("predicted", "trace", "slo", "engine", "system", "shape", "device", "link")
_KEYS = ("version", "model", "replicas", *_TABLES)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What all replicas together are predicted to yield: rates a second, times in seconds, prices in dollars."""

    source: str
    """The part of the simulator that predicts."""
    requests_per_second: float
    tokens_per_second: float
    """Output tokens."""
    tpot: float
    ttft: float
    slo_share: float
    """The share of the requests that is within the SLO."""
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
        _ = self.one_replica  # checks the model's name, the replicas and the keywords

    @property
    def one_replica(self) -> EnginePlan:
        """The part of the plan that an engine needs."""
        return EnginePlan(self.model, self.engine, planned_system(self.system), self.replicas)


def read(path: str | Path) -> Plan:
    """The plan in a file, checked. Raises InvalidRequest."""
    return read_tables(path, _from_toml)


def write(path: str | Path, plan: Plan) -> None:
    """Write a plan file: all of it, or nothing. Raises InvalidRequest where that cannot be done."""
    write_text(path, dumps(plan))


def dumps(plan: Plan) -> str:
    """The file's text: `read` gives back an equal plan."""
    kind = next(name for name, known in KINDS.items() if isinstance(plan.system, known))
    system = {"kind": kind, **_to_table(plan.system, leave_out=("model",))}
    top = {"version": VERSION, "model": plan.model, "replicas": plan.replicas}
    tables = {
        "predicted": _to_table(plan.predicted),
        "trace": _to_table(plan.trace),
        "slo": _to_table(plan.slo),
        "engine": plan.engine,
        "system": system,
        "shape": _to_table(plan.system.model),
    }
    lines = [f"{name} = {toml_value(value)}" for name, value in top.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n\n" + hardware.dumps(*_parts(plan.system))


def _from_toml(data: Mapping[str, Any]) -> Plan:
    if (version := data.get("version")) != VERSION or type(version) is not int:
        raise InvalidRequest(f"version is {version!r:.80}; allowed is {VERSION}")
    known_keys(data, _KEYS, "it")
    if missing := [name for name in ("model", "predicted", "trace", "engine", "system", "shape") if name not in data]:
        raise InvalidRequest(f"it has no {missing[0]}; needed are model, predicted, trace, engine, system and shape")
    parts = {kind: data[kind] for kind in ("device", "link") if kind in data}
    catalogue = hardware.extended(hardware.NOTHING, parts)
    shape = _from_table(ModelShape, data["shape"], "shape", catalogue)
    table = data["system"]
    if not isinstance(table, Mapping) or not isinstance(kind := table.get("kind"), str) or kind not in KINDS:
        raise InvalidRequest(f"system is {table!r:.80}; allowed is a table whose kind is {', '.join(KINDS)}")
    rest = {name: value for name, value in table.items() if name != "kind"}
    engine = data["engine"]
    if not isinstance(engine, Mapping):
        raise InvalidRequest(f"engine is {engine!r:.80}; allowed is a table")
    return Plan(
        model=text("model", data["model"]),
        system=_from_table(KINDS[kind], rest, "system", catalogue, model=shape),
        predicted=_from_table(Prediction, data["predicted"], "predicted", catalogue),
        trace=_from_table(TraceSummary, data["trace"], "trace", catalogue),
        slo=_from_table(Slo, data.get("slo", {}), "slo", catalogue),
        replicas=data.get("replicas", 1),
        engine=dict(engine),
    )


def _parts(system: System) -> tuple[list[Device], list[Link]]:
    """The devices and links of a system. Raises InvalidRequest where two of a kind have one name."""
    devices: dict[str, Device] = {}
    for device, _ in system.devices:
        if devices.setdefault(device.name, device) != device:
            raise InvalidRequest(f"two devices are called {device.name!r}; allowed is one of a name in a plan")
    links: dict[str, Link] = {}
    for part in (system, system.decode) if isinstance(system, Disaggregated) else (system,):
        if not isinstance(part, Colocated) and links.setdefault(part.link.name, part.link) != part.link:
            raise InvalidRequest(f"two links are called {part.link.name!r}; allowed is one of a name in a plan")
    return list(devices.values()), list(links.values())


def _to_table(part: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """A dataclass as a table: what has its default is left out, devices and links are names."""
    table: dict[str, Any] = {}
    for item in fields(part):
        value = getattr(part, item.name)
        if item.name not in leave_out and value is not None and value != item.default:
            table[item.name] = _plain(value, leave_out)
    return table


def _plain(value: Any, leave_out: tuple[str, ...]) -> Any:
    if isinstance(value, (Device, Link)):
        return value.name
    if is_dataclass(value):
        return _to_table(value, leave_out)
    if isinstance(value, tuple):
        return [_plain(each, leave_out) for each in value]
    return value


def _from_table(kind: type[_T], table: Any, where: str, catalogue: Catalogue, **given: Any) -> _T:
    """A dataclass from a table. Its fields of the names in `given` have those values, inner ones too, and the table
    doesn't. Raises InvalidRequest, which names the key, the value and what is allowed."""
    if not isinstance(table, Mapping):
        raise InvalidRequest(f"{where} is {table!r:.80}; allowed is a table")
    hints = get_type_hints(kind)
    items = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]  # a dataclass, whatever its type
    known = [name for name in items if name not in given]
    known_keys(table, known, where)
    made = {name: value for name, value in given.items() if name in items}
    for name in known:
        item = items[name]
        if name in table:
            made[name] = _read(hints[name], table[name], f"{where}.{name}", catalogue, given)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise InvalidRequest(f"{where} has no {name}; it is needed")
    try:
        found = kind(**made)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error}") from error
    if isinstance(found, ModelShape):
        _check_shape(found, where)
    return found


def _check_shape(shape: ModelShape, where: str) -> None:
    """Raise InvalidRequest for numbers that the cost model cannot divide by or take powers of."""
    whole(f"{where}.layers", shape.layers, 1, _MAX_LAYERS)
    whole(f"{where}.hidden", shape.hidden, 1)
    whole(f"{where}.parameters", shape.parameters, 1, _MAX_PARAMETERS)
    number_within(f"{where}.element", shape.element, 0.1, 8)
    for at, group in enumerate(shape.groups):
        whole(f"{where}.groups[{at}].top_k", group.top_k, 0, group.experts)


def _has_keys(kind: Any, table: Any) -> bool:
    """Whether all keys of a table are fields of a dataclass."""
    return isinstance(table, Mapping) and set(table) <= {item.name for item in fields(kind)}


def _read(hint: Any, value: Any, where: str, catalogue: Catalogue, given: Mapping[str, Any]) -> Any:
    if get_origin(hint) in (types.UnionType, Union):  # None is what a file leaves out
        several = [each for each in get_args(hint) if each is not type(None)]
        hint = next((each for each in several if is_dataclass(each) and _has_keys(each, value)), several[0])
    if hint is Device:
        return catalogue.device(text(where, value))
    if hint is Link:
        return catalogue.link(text(where, value))
    if is_dataclass(hint):
        return _from_table(hint, value, where, catalogue, **given)  # type: ignore[arg-type]  # a type, not an instance
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or len(value) > _MAX_ITEMS:
            raise InvalidRequest(f"{where} is {value!r:.80}; allowed is a list of up to {_MAX_ITEMS}")
        inner = get_args(hint)[0]
        return tuple(_read(inner, each, f"{where}[{at}]", catalogue, given) for at, each in enumerate(value))
    if hint is str:
        return text(where, value)
    if hint is bool:
        if type(value) is not bool:
            raise InvalidRequest(f"{where} is {value!r:.80}; allowed are true and false")
        return value
    return whole(where, value) if hint is int else number_within(where, value, 0, _MAX_NUMBER)
