"""Plan files: one way to serve a model, what it is predicted to yield, and the engine that serves it, as TOML.

    version = 2
    model = "llama-3-70b"       # what to load: a name, or a path
    replicas = 1
    undeployable = ""           # and differences = []: what `lamina.plan_file` says of the engine
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
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from lamina.errors import InvalidRequest
from lamina.plan_file import VERSION, EnginePlan, check_version
from lamina.simulator.costs import hardware
from lamina.simulator.costs.bounds import Amount, Count, Text, whole
from lamina.simulator.costs.cost_model import draft_model
from lamina.simulator.costs.hardware import Device, Link
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.deployment import differences, undeployable
from lamina.system.text_files import toml_value, write_text
from lamina.system.toml_models import Table, read_tables, validated

KINDS: Mapping[str, type[System]] = {"colocated": Colocated, "disaggregated": Disaggregated, "offloaded": Offloaded}
_MAX_LAYERS, _MAX_PARAMETERS = 1 << 16, 10**18
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What all replicas together are predicted to yield: rates a second, times in seconds, prices in dollars."""

    source: Text
    """The part of the simulator that predicts."""
    requests_per_second: Amount
    tokens_per_second: Amount
    """Output tokens."""
    tpot: Amount
    ttft: Amount
    slo_share: Amount
    """The share of the requests that is within the SLO."""
    batch: Amount
    """Sequences in decode, in one replica."""
    dollars_per_hour: Amount
    dollars_per_million: Amount
    """Of output tokens."""


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What was planned for: means of tokens, requests a second (0: as many as are served), and of how many requests."""

    name: Text
    requests: Count
    rate: Amount
    prompt: Amount
    output: Amount
    context: Amount
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
        self.one_replica()  # raises InvalidRequest for a name, replicas or keywords that no engine has

    def one_replica(self) -> EnginePlan:
        """The part of the plan that an engine needs."""
        reason = undeployable(self.system)
        return EnginePlan(self.model, self.engine, self.replicas, reason, differences(self.system))


def read(path: str | Path) -> Plan:
    """The plan in a file, checked. Raises InvalidRequest."""
    return read_tables(path, _from_toml)


def write(path: str | Path, plan: Plan) -> None:
    """Write a plan file: all of it, or nothing. Raises InvalidRequest where that cannot be done."""
    write_text(path, dumps(plan))


def dumps(plan: Plan) -> str:
    """The file's text: `read` gives back an equal plan."""
    kind = next(name for name, system_type in KINDS.items() if isinstance(plan.system, system_type))
    system = {"kind": kind, **_to_table(plan.system, leave_out=("model",))}
    engine = plan.one_replica()
    top = {"version": VERSION, "model": plan.model, "replicas": plan.replicas}
    top |= {"undeployable": engine.undeployable, "differences": list(engine.differences)}
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


class _File(Table):
    version: Literal[2]
    model: Text
    replicas: int = 1
    undeployable: str = ""
    differences: tuple[str, ...] = ()
    predicted: Prediction
    trace: TraceSummary
    slo: Slo = Slo()
    engine: dict[str, Any]
    system: dict[str, Any]
    shape: ModelShape
    device: tuple[dict[str, Any], ...] = ()
    link: tuple[dict[str, Any], ...] = ()


def _from_toml(data: Mapping[str, Any]) -> Plan:
    check_version(data)
    file = validated(_File, data)
    _check_shape(file.shape, "shape")
    return Plan(
        model=file.model,
        system=_read_system(data),
        predicted=file.predicted,
        trace=file.trace,
        slo=file.slo,
        replicas=file.replicas,
        engine=file.engine,
    )


def _read_system(data: Mapping[str, Any]) -> System:
    """The system of a plan's tables. Raises InvalidRequest."""
    for name in ("system", "shape"):  # a date passes for a table
        if not isinstance(data[name], Mapping):
            raise InvalidRequest(f"{name} is {data[name]!r:.80}; allowed is a table")
    parts = {kind: data[kind] for kind in ("device", "link") if kind in data}
    hardware.extended(hardware.NOTHING, parts)  # raises where they are wrong
    named = {kind: {table["name"].lower(): table for table in tables} for kind, tables in parts.items()}
    table = dict(data["system"])
    kind = table.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InvalidRequest(f"system has the kind {kind!r:.80}; allowed are {', '.join(KINDS)}")
    if kind != "disaggregated":
        return _instance(KINDS[kind], table, "system", data["shape"], named)
    sides: dict[str, Any] = {}
    for name in ("prefill", "decode"):
        side = table.pop(name, None)
        if not isinstance(side, Mapping):
            raise InvalidRequest(f"system.{name} is {side!r:.80}; allowed is a table, which is needed")
        instance = Offloaded if name == "decode" and "model_device" in side else Colocated
        sides[name] = _instance(instance, side, f"system.{name}", data["shape"], named)
    other_fields = validated(_Between, _complete(table, "system", named), "system")
    return Disaggregated(**sides, link=other_fields.link, label=other_fields.label)


class _Between(Table):
    """What a disaggregated system has beside its two instances."""

    link: Link
    label: Text = ""


def _instance(
    kind: type[_T], table: Mapping[str, Any], where: str, shape: Any, named: Mapping[str, Mapping[str, Any]]
) -> _T:
    """A system on one set of devices, with the model of the file."""
    if "model" in table:
        raise InvalidRequest(f"{where} has the key 'model'; the model's numbers are in [shape]")
    system = validated(kind, _complete({**table, "model": shape}, where, named), where)
    if (draft := draft_model(system.speculation)) is not None:  # type: ignore[attr-defined]  # both kinds have it
        _check_shape(draft, f"{where}.speculation.draft")
    return system


def _complete(table: Mapping[str, Any], where: str, named: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A table with the devices and links in place of their names."""
    complete = dict(table)
    for key in ("device", "model_device", "attention_device", "link"):
        if key in table:
            kind = "link" if key == "link" else "device"
            tables, name = named.get(kind, {}), table[key]
            if not isinstance(name, str) or name.lower() not in tables:
                raise InvalidRequest(
                    f"{where}.{key}: unknown {kind} {name!r:.80}; known are {', '.join(tables) or 'none'}"
                )
            complete[key] = tables[name.lower()]
    return complete


def _check_shape(shape: ModelShape, where: str) -> None:
    """Raise InvalidRequest for sums that the cost model cannot divide by or take powers of."""
    whole(f"{where}.layers", shape.layers, 1, _MAX_LAYERS)
    whole(f"{where}.parameters", shape.parameters, 1, _MAX_PARAMETERS)
    for index, group in enumerate(shape.groups):
        whole(f"{where}.groups[{index}].top_k", group.top_k, 0, group.experts)


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
        return [_plain(item, leave_out) for item in value]
    return value
