"""What may be used to serve a model: devices and how many, links, systems, KV policies. A TOML file says so:

systems = ["colocated", "chunked", "disaggregated", "lamina", "lamina-cpu"]   # which to consider; default: all
links = ["fhbn-400g"]       # between tiers, by name
[[have]]
device = "H100"             # of the catalogue, or of a [[device]] below
count = 8
price = 11.06               # dollars an hour; default: the catalogue's
[[policy]]                  # default: everything is read and held
name = "streaming(sink=64, recent=1024)"    # as the engine knows it
read = 0.3                  # shares of the KV bytes, above 0 to 1
held = 0.3
window = 4096               # no more tokens than so many; default: no bound
source = "measured by ..."  # where the shares are from
[[device]]                  # and [[link]]: more of them, as `hardware.toml` has them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

from lamina.errors import InvalidRequest
from lamina.simulator.costs import hardware
from lamina.simulator.costs.bounds import whole
from lamina.simulator.costs.cost_model import FULL, KvPolicy
from lamina.simulator.costs.hardware import Catalogue, Device, Efficiency, Link
from lamina.system.toml_models import Table, read_tables, validated

UNDEPLOYABLE = ("disaggregated",)
SYSTEMS = ("colocated", "chunked", "disaggregated", "lamina", "lamina-cpu")
"""Whole prompts and chunked ones on the same devices, prompts on other devices, attention on other accelerators, and
attention on CPU hosts."""
MAX_COUNT, MAX_ENTRIES = 1024, 64
_MAX_TEXT = 2000


@dataclass(frozen=True, slots=True)
class Have:
    """Up to `count` of a device, at the device's price."""

    device: Device
    count: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a planner may choose from. Raises InvalidRequest where there is nothing to choose."""

    have: tuple[Have, ...]
    links: tuple[Link, ...] = ()
    systems: tuple[str, ...] = SYSTEMS
    policies: tuple[KvPolicy, ...] = (FULL,)
    only_deployable: bool = False
    """Whether candidates that no engine here is are left out."""

    def __post_init__(self) -> None:
        for name, entries in (("have", self.have), ("policy", self.policies), ("systems", self.systems)):
            if not 1 <= len(entries) <= MAX_ENTRIES:
                raise InvalidRequest(f"{name} has {len(entries)} entries; allowed are 1 to {MAX_ENTRIES}")
        for have in self.have:
            whole(f"count of {have.device.name}", have.count, 1, MAX_COUNT)
        _unequal("have", [have.device.name.lower() for have in self.have])
        _unequal("policy", [policy.name for policy in self.policies])
        if unknown := [system for system in self.systems if system not in SYSTEMS]:
            raise InvalidRequest(f"systems has {unknown[0]!r:.80}; allowed are {', '.join(SYSTEMS)}")
        _unequal("systems", list(self.systems))
        if not self.links and not {"chunked", "colocated"} & {*self.systems}:
            raise InvalidRequest(
                f"links is empty, and systems are {', '.join(self.systems)}, which need one; allowed are links by "
                "name, or systems in one place: colocated, chunked"
            )

    def count(self, device: Device) -> int:
        """How many there are of a device."""
        return next((have.count for have in self.have if have.device == device), 0)


def default(catalogue: Catalogue) -> Inventory:
    """Machines of eight H100, H200 and H20 of the catalogue and four CPU hosts, joined as in the Lamina paper. Assumed,
    as an example: the smallest that clouds rent, of what engines were measured on, and what the paper attends with."""
    counts = (("h100", 8), ("h200", 8), ("h20", 8), ("epyc-genoa", 4))
    return Inventory(
        have=tuple(Have(catalogue.device(name), count) for name, count in counts), links=(catalogue.link("fhbn-400g"),)
    )


def deployable(inventory: Inventory) -> Inventory:
    """The inventory for systems that an engine here is. Raises InvalidRequest where that leaves none."""
    systems = tuple(system for system in inventory.systems if system not in UNDEPLOYABLE)
    if not systems:
        raise InvalidRequest(
            f"systems are {', '.join(inventory.systems)}, which no engine here deploys; --any plans with them"
        )
    return replace(inventory, systems=systems, only_deployable=True)


def with_efficiency(inventory: Inventory, efficiency: Efficiency) -> Inventory:
    """The inventory with that efficiency for devices without measurements."""
    return replace(
        inventory, have=tuple(replace(have, device=have.device.measured_or(efficiency)) for have in inventory.have)
    )


def read(path: str | Path, catalogue: Catalogue | None = None) -> Inventory:
    """The inventory in a file, over the catalogue's devices and links (default: the packaged ones). Raises
    InvalidRequest, which names the file, the value and what is allowed."""
    return read_tables(path, lambda data: _from_tables(data, catalogue or hardware.load()))


def _one_or_several(names: Any) -> Any:
    return [names] if isinstance(names, str) else names


_Text = Annotated[str, Field(max_length=_MAX_TEXT)]
_Names = Annotated[list[str], Field(max_length=MAX_ENTRIES), BeforeValidator(_one_or_several)]
_T = TypeVar("_T")
_Tables = Annotated[tuple[_T, ...], Field(max_length=MAX_ENTRIES)]


class _Have(Table):
    device: _Text
    count: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    price: float | None = None


class _Policy(Table):
    name: _Text
    read: float = 1.0
    held: float = 1.0
    window: int | None = None
    source: _Text = ""


class _File(Table):
    systems: _Names = Field(default_factory=lambda: list(SYSTEMS))
    links: _Names = Field(default_factory=list)
    have: _Tables[_Have] = ()
    policy: _Tables[_Policy] = ()
    device: _Tables[dict[str, Any]] = ()
    link: tuple[dict[str, Any], ...] = ()


def _from_tables(data: Mapping[str, Any], catalogue: Catalogue) -> Inventory:
    file = validated(_File, data)
    if any("count" in table for table in file.device):
        raise InvalidRequest(
            "[[device]] has the key 'count'; how many there are says a table [[have]], with device and count"
        )
    parts = {kind: data[kind] for kind in ("device", "link") if kind in data}
    catalogue = hardware.extended(catalogue, parts) if parts else catalogue
    have = tuple(_have(table, catalogue) for table in file.have)
    if not have:  # a file of calibrate-hardware: this machine
        have = tuple(Have(catalogue.device(table["name"]), 1) for table in file.device)
    if not have:
        raise InvalidRequest("it has no [[have]]; needed is at least one, with device and count")
    links = file.links or ([] if "have" in data else [table["name"] for table in file.link])
    _unequal("links", [name.lower() for name in links])
    return Inventory(
        have=have,
        links=tuple(catalogue.link(name) for name in links),
        systems=tuple(file.systems),
        policies=tuple(KvPolicy(table.name, table.read, table.held, table.window) for table in file.policy) or (FULL,),
    )


def _have(table: _Have, catalogue: Catalogue) -> Have:
    device = catalogue.device(table.device)
    if table.price is not None:
        sources = {name: text for name, text in device.sources.items() if name != "price"}
        device = replace(device, price=table.price, sources=sources)  # which checks it
    return Have(device, table.count)


def _unequal(what: str, names: list[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(f"{what} has {name!r:.80} twice; allowed is once")
