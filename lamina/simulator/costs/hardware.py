"""Devices and the links between them: what they can do at best, what share of that is reached, and what they cost.

Numbers with their sources are in `hardware.toml` beside this file; users add their own in the same form:

    [[device]]
    name = "my-gpu"             # needed, as kind, flops, memory, bandwidth and price are; see `Device`
    [device.sources]            # where each number is from
    [device.efficiency]         # see efficiency.py; curves are lists of [x, y]
    dense = [[1, 0.5], [256, 0.8]]
    [device.efficiency.sources]
    [[link]]                    # see `Link`
    [link.sources]
    [[engine]]                  # an Efficiency that was measured of an engine, by its name
    [engine.sources]

All units are SI: bytes, seconds, FLOP, watts; prices are US dollars an hour. What is wrong is an InvalidRequest that
names the file, the entry, the value and what is allowed.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from lamina.errors import InvalidRequest
from lamina.simulator.costs.bounds import MAX_ENTRIES
from lamina.simulator.costs.efficiency import ROOFLINE, Curve, Efficiency, at, check
from lamina.simulator.costs.shapes import ModelShape
from lamina.system.text_files import toml_value
from lamina.system.toml_models import Table, read_tables, validated

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "KINDS", "ROOFLINE", "TYPICAL", "Catalogue", "Curve", "Device", "Efficiency", "Link", "at", "connection", "dumps",
    "extended", "load", "loads", "with_efficiency",
]  # fmt: skip

TYPICAL = {"small": "vllm", "dense": "vllm", "sparse": "trtllm"}
"""The engine whose efficiency devices without measurements are given, by the kind of model: the one whose
numbers miss the others' cells least (scripts/simulate_engines.py). This project's own engine is not among those that
were measured on GPUs."""
_T = TypeVar("_T")
KINDS = ("gpu", "tpu", "npu", "cpu")
_BUILT_IN = ("roofline", "typical")
"""Names of efficiencies that no engine may have."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,79}")


def _named(kind: str, name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(f"the name of a {kind} is {name!r:.80}; allowed are 1 to 80 letters, digits and ._+- ")
    return name


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or one socket of a host that computes on its CPU; `kind` is one of `KINDS`.

    `flops` are dense ones of 16-bit floats, `flops_8bit` of 8-bit ones (0: as 16-bit); `interconnect` is each way, to
    its neighbours in one machine, `network` out of the machine; 0 stands for none. `power` 0: not published. `unpack`:
    packed weights a second that become 16 bits before many tokens are multiplied with them; 0: they are multiplied as
    they are. `sources` says for each number where it is from.
    """

    name: str
    kind: str
    flops: float
    memory: float
    bandwidth: float
    price: float
    flops_8bit: float = 0.0
    power: float = 0.0
    interconnect: float = 0.0
    network: float = 0.0
    unpack: float = 0.0
    efficiency: Efficiency = ROOFLINE
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        where = f"device {_named('device', self.name)!r}"
        if self.kind not in KINDS:
            raise InvalidRequest(f"{where}: kind is {self.kind!r:.80}; allowed are {', '.join(KINDS)}")
        if not isinstance(self.efficiency, Efficiency):
            raise InvalidRequest(f"{where}: efficiency is {self.efficiency!r:.80}; allowed is an Efficiency")
        check(self, where)

    @property
    def priced(self) -> str:
        """The year of its price, and whether that is assumed; "" where the price is a file's own."""
        source = self.sources.get("price", "")
        years = re.findall(r"\((\d{4})\)", source)
        return f" ({', '.join([*years, *['assumed'] * source.startswith('assumed')])})" if source else ""

    def measured_or(self, efficiency: Efficiency) -> Device:
        """The device, with that efficiency if it is a bare roofline, which means that it was not measured."""
        return replace(self, efficiency=efficiency) if self.efficiency == ROOFLINE else self


@dataclass(frozen=True, slots=True)
class Link:
    """What carries queries to attention workers. `round_trip`: seconds of a small message there and back;
    `bandwidth`: bytes a second that one model worker's side reaches each way."""

    name: str
    bandwidth: float
    round_trip: float
    worker_time: float = 0.0
    """Seconds a layer that each attention worker beyond the first adds, where they share one machine."""
    row_time: float = 0.0
    """Seconds a sequence, layer and worker, beside its bytes: encoding, waking, merging."""
    query_first_time: float = 0.0
    """Seconds a layer that it takes besides to send q before k and v: one message more, and at the model worker the
    attention of the rows' own tokens and a merge. 0: not measured."""
    announce_time: float = 0.0
    """Seconds a step until all workers have accepted its batch, beyond what that takes in one process. 0: not
    measured."""
    announce_row_time: float = 0.0
    """The part of that which grows with the batch: seconds a sequence, step and worker."""
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check(self, f"link {_named('link', self.name)!r}")


def connection(link: Link, *ends: Device) -> float:
    """Bytes a second of one connection: no more than either end's network card has."""
    return min([link.bandwidth, *(device.network for device in ends if device.network)])


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Devices, links and engines' efficiencies by name, in lower case."""

    devices: Mapping[str, Device]
    links: Mapping[str, Link]
    engines: Mapping[str, Efficiency] = field(default_factory=dict)

    def device(self, name: str) -> Device:
        """The device of that name, in any case. Raises InvalidRequest, which lists what is known."""
        return _entry("device", self.devices, name)

    def link(self, name: str) -> Link:
        """The link of that name, in any case. Raises InvalidRequest, which lists what is known."""
        return _entry("link", self.links, name)

    def efficiency(self, name: str, model: ModelShape) -> Efficiency:
        """The efficiency of that name: an engine's, `roofline`, or `typical`, which is by the kind of model. Raises
        InvalidRequest, which lists them."""
        typical = self.engines.get(TYPICAL[model.kind], ROOFLINE)
        efficiencies = {"roofline": ROOFLINE, "typical": typical, **self.engines}
        if (efficiency := efficiencies.get(str(name).lower())) is None:
            raise InvalidRequest(f"efficiency is {name!r:.80}; allowed are {', '.join(efficiencies)}")
        return efficiency

    def said_of(self, name: str, model: ModelShape) -> str:
        """What devices without measurements reach by the efficiency of that name, in words. Raises InvalidRequest."""
        efficiency = self.efficiency(name, model)
        if efficiency == ROOFLINE:
            return "devices without measurements reach their best, all the time: an upper bound"
        engine = next(engine for engine, measured in self.engines.items() if efficiency == measured)
        if _packaged().engines.get(engine) != efficiency:
            return f"devices without measurements reach what {engine} of the hardware file says"
        return (
            f"devices without measurements reach what {engine} reached of H100 and H200 (hardware.toml has the "
            "numbers); this project's own engine was not measured on GPUs"
        )


def _entry(kind: str, entries: Mapping[str, _T], name: str) -> _T:
    if (entry := entries.get(str(name).lower())) is None:
        raise InvalidRequest(f"unknown {kind} {name!r:.80}; known are {', '.join(entries) or 'none'}")
    return entry


NOTHING = Catalogue({}, {})


def load(path: str | Path | None = None) -> Catalogue:
    """The packaged catalogue; with `path`, that file's entries are added to it, or replace those of the same name.

    Raises InvalidRequest, which names the file.
    """
    packaged = _packaged()
    return packaged if path is None else read_tables(path, lambda data: extended(packaged, data))


def loads(text: str) -> Catalogue:
    """The catalogue of this TOML alone, as `dumps` writes it. Raises InvalidRequest for its values."""
    return extended(NOTHING, tomllib.loads(text))


def extended(catalogue: Catalogue, data: Mapping[str, Any]) -> Catalogue:
    """The catalogue with the tables `device`, `link` and `engine` of a TOML file, which are added or replace
    those of the same name. Raises InvalidRequest."""
    if not data:
        raise InvalidRequest("it is empty; allowed are [[device]], [[link]] and [[engine]]")
    file = validated(_File, data)
    devices = _by_name("device", file.device)
    links = _by_name("link", file.link)
    engines = {
        name: validated(Efficiency, table.model_extra or {}, f"engine {table.name!r}")
        for name, table in _by_name("engine", file.engine).items()
    }
    if reserved := [name for name in engines if name in _BUILT_IN]:
        raise InvalidRequest(
            f"engine {reserved[0]!r} has a name that is taken; allowed are others than {', '.join(_BUILT_IN)}"
        )
    return Catalogue({**catalogue.devices, **devices}, {**catalogue.links, **links}, {**catalogue.engines, **engines})


def with_efficiency(catalogue: Catalogue, efficiency: Efficiency) -> Catalogue:
    """The catalogue with an efficiency for devices without measurements."""
    devices = {name: device.measured_or(efficiency) for name, device in catalogue.devices.items()}
    return replace(catalogue, devices=devices)


def dumps(
    devices: Iterable[Device], links: Iterable[Link] = (), engines: Mapping[str, Efficiency] | None = None
) -> str:
    """TOML that `load` and `loads` read back as the same; what has its default is left out."""
    parts = []
    for device in devices:
        parts += ["[[device]]", *_lines(device), *_sources("device", device.sources)]
        if device.efficiency != ROOFLINE:
            efficiency = device.efficiency
            parts += ["[device.efficiency]", *_lines(efficiency), *_sources("device.efficiency", efficiency.sources)]
        parts.append("")
    for link in links:
        parts += ["[[link]]", *_lines(link), *_sources("link", link.sources), ""]
    for name, engine in (engines or {}).items():
        parts += ["[[engine]]", f"name = {toml_value(name)}", *_lines(engine), *_sources("engine", engine.sources), ""]
    return "\n".join(parts).rstrip("\n") + "\n"


@functools.cache
def _packaged() -> Catalogue:
    return loads(resources.files("lamina.simulator.costs").joinpath("hardware.toml").read_text(encoding="utf-8"))


class _Engine(Table, extra="allow"):
    """The fields of an `Efficiency`, and a name."""

    name: str


_Tables = Annotated[tuple[_T, ...], Field(max_length=MAX_ENTRIES)]


class _File(Table):
    device: _Tables[Device] = ()
    link: _Tables[Link] = ()
    engine: _Tables[_Engine] = ()


def _by_name(kind: str, entries: Iterable[_T]) -> dict[str, _T]:
    """Entries of a file by their names in lower case."""
    named: dict[str, _T] = {}
    for entry in entries:
        name: str = _named(kind, entry.name)  # type: ignore[attr-defined]  # each kind has one
        if name.lower() in named:
            raise InvalidRequest(f"{kind} {name!r} is there twice; allowed is once in a file")
        named[name.lower()] = entry
    return named


def _lines(entry: Efficiency | Device | Link) -> list[str]:
    return [
        f"{item.name} = {_written(getattr(entry, item.name))}"
        for item in fields(entry)
        if item.name not in ("efficiency", "sources") and getattr(entry, item.name) != item.default
    ]


def _sources(heading: str, sources: Mapping[str, str]) -> list[str]:
    return (
        [f"[{heading}.sources]", *(f"{name} = {toml_value(text)}" for name, text in sources.items())] if sources else []
    )


def _written(value: str | float | Curve) -> str:
    return toml_value(value if isinstance(value, (str, tuple)) else float(value))  # numpy's numbers print otherwise
