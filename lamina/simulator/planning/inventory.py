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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lamina.errors import InvalidRequest
from lamina.simulator.costs import hardware
from lamina.simulator.costs.cost_model import FULL, KvPolicy
from lamina.simulator.costs.hardware import Catalogue, Device, Efficiency, Link
from lamina.simulator.costs.tables import known_keys, read_tables, tables_of, text, whole

UNDEPLOYABLE = ("disaggregated",)
SYSTEMS = ("colocated", "chunked", "disaggregated", "lamina", "lamina-cpu")
"""Whole prompts and chunked ones on the same devices, prompts on other devices, attention on other accelerators, and
attention on CPU hosts."""
MAX_COUNT = 1024
MAX_ENTRIES = 64
_MAX_TEXT = 2000
_KEYS = ("systems", "links", "have", "policy", "device", "link")


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
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The source of each policy's shares, by its name."""
    only_deployable: bool = False
    """Whether candidates that no engine here is are left out."""

    def __post_init__(self) -> None:
        for name, given in (("have", self.have), ("policy", self.policies), ("systems", self.systems)):
            if not 1 <= len(given) <= MAX_ENTRIES:
                raise InvalidRequest(f"{name} has {len(given)} entries; allowed are 1 to {MAX_ENTRIES}")
        for have in self.have:
            whole(f"count of {have.device.name}", have.count, 1, MAX_COUNT)
        _unequal("have", [have.device.name.lower() for have in self.have])
        _unequal("policy", [policy.name for policy in self.policies])
        if wrong := [system for system in self.systems if system not in SYSTEMS]:
            raise InvalidRequest(f"systems has {wrong[0]!r:.80}; allowed are {', '.join(SYSTEMS)}")
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
    """Eight H100, eight H20 and four CPU hosts of the catalogue, joined as in the Lamina paper. Assumed, as an
    example: two machines of eight are the smallest in which clouds rent such devices."""
    counts = (("h100", 8), ("h20", 8), ("epyc-genoa", 4))
    return Inventory(
        have=tuple(Have(catalogue.device(name), count) for name, count in counts),
        links=(catalogue.link("fhbn-400g"),),
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
    known = catalogue or hardware.load()
    return read_tables(path, lambda data: _from_tables(data, known))


def _from_tables(data: Mapping[str, Any], catalogue: Catalogue) -> Inventory:
    known_keys(data, _KEYS, "the file")
    parts = {kind: data[kind] for kind in ("device", "link") if kind in data}
    for table in tables_of(data, "device", MAX_ENTRIES):
        if "count" in table:
            raise InvalidRequest(
                "[[device]] has the key 'count'; how many there are says a table [[have]], with device and count"
            )
    known = hardware.extended(catalogue, parts) if parts else catalogue
    have = tuple(_have(table, known) for table in tables_of(data, "have", MAX_ENTRIES))
    if not have:  # a file of calibrate-hardware: this machine
        have = tuple(Have(known.device(table["name"]), 1) for table in tables_of(data, "device", MAX_ENTRIES))
    if not have:
        raise InvalidRequest("it has no [[have]]; needed is at least one, with device and count")
    policies, sources = [], {}
    for table in tables_of(data, "policy", MAX_ENTRIES):
        policy = _policy(table)
        policies.append(policy)
        sources[policy.name] = text(f"source of policy {policy.name!r}", table.get("source", ""), _MAX_TEXT)
    names = _texts(data, "links") or ([] if "have" in data else [table["name"] for table in tables_of(data, "link")])
    _unequal("links", [name.lower() for name in names])
    return Inventory(
        have=have,
        links=tuple(known.link(name) for name in names),
        systems=tuple(_texts(data, "systems")) if "systems" in data else SYSTEMS,
        policies=tuple(policies) or (FULL,),
        sources=sources,
    )


def _have(table: Mapping[str, Any], known: Catalogue) -> Have:
    known_keys(table, ("device", "count", "price"), "[[have]]")
    device = known.device(text("device of [[have]]", table.get("device"), _MAX_TEXT))
    if "price" in table:
        device = replace(device, price=table["price"])  # which checks it
    return Have(device, whole(f"count of {device.name}", table.get("count"), 1, MAX_COUNT))


def _policy(table: Mapping[str, Any]) -> KvPolicy:
    known_keys(table, ("name", "read", "held", "window", "source"), "[[policy]]")
    name = text("name of [[policy]]", table.get("name"), _MAX_TEXT)
    return KvPolicy(name, table.get("read", 1.0), table.get("held", 1.0), table.get("window"))


def _texts(data: Mapping[str, Any], key: str) -> list[str]:
    """A list of names; one may stand alone."""
    given = data.get(key, [])
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or len(names) > MAX_ENTRIES or not all(isinstance(name, str) for name in names):
        raise InvalidRequest(f"{key} is {given!r:.80}; allowed are up to {MAX_ENTRIES} names in a list")
    return names


def _unequal(what: str, names: list[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(f"{what} has {name!r:.80} twice; allowed is once")
