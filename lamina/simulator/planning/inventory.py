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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lamina.errors import InvalidRequest
from lamina.simulator.costs import hardware
from lamina.simulator.costs.cost_model import FULL, KvPolicy
from lamina.simulator.costs.hardware import ROOFLINE, Catalogue, Device, Efficiency, Link
from lamina.simulator.costs.tables import text, whole
from lamina.system.text_files import read_toml

SYSTEMS = ("colocated", "chunked", "disaggregated", "lamina", "lamina-cpu")
"""Whole prompts and chunked ones on the same devices, prompts on other devices, attention on other accelerators, and
attention on CPU hosts."""
MAX_BYTES = 1 << 20
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
    """By policy, where its shares are from."""

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


def with_efficiency(inventory: Inventory, efficiency: Efficiency) -> Inventory:
    """The inventory with that efficiency for devices without measurements."""
    return replace(
        inventory,
        have=tuple(
            replace(have, device=replace(have.device, efficiency=efficiency))
            if have.device.efficiency == ROOFLINE
            else have
            for have in inventory.have
        ),
    )


def read(path: str | Path, catalogue: Catalogue | None = None) -> Inventory:
    """The inventory in a file, over the catalogue's devices and links (default: the packaged ones). Raises
    InvalidRequest, which names the file, the value and what is allowed."""
    try:
        return from_tables(read_toml(path, MAX_BYTES), catalogue or hardware.load())
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error}") from error
    except (ValueError, OverflowError) as error:  # an integer too long to print, or to be a float
        raise InvalidRequest(f"{path} holds what cannot be shown: {error}") from error


def from_tables(data: Mapping[str, Any], catalogue: Catalogue) -> Inventory:
    """The inventory that a TOML file's tables describe. Raises InvalidRequest."""
    _known(data, _KEYS, "the file")
    known = extended(catalogue, data)
    have = tuple(_have(table, known) for table in hardware.tables_of(data, "have", MAX_ENTRIES))
    if not have:
        raise InvalidRequest("it has no [[have]]; needed is at least one, with device and count")
    policies, sources = [], {}
    for table in hardware.tables_of(data, "policy", MAX_ENTRIES):
        _known(table, ("name", "read", "held", "window", "source"), "[[policy]]")
        policy = _policy(table)
        policies.append(policy)
        sources[policy.name] = text(f"source of policy {policy.name!r}", table.get("source", ""), _MAX_TEXT)
    names = _texts(data, "links")
    _unequal("links", [name.lower() for name in names])
    return Inventory(
        have=have,
        links=tuple(known.link(name) for name in names),
        systems=tuple(_texts(data, "systems")) if "systems" in data else SYSTEMS,
        policies=tuple(policies) or (FULL,),
        sources=sources,
    )


def extended(catalogue: Catalogue, data: Mapping[str, Any]) -> Catalogue:
    """The catalogue with the tables `device` and `link` of a TOML file added to it. Raises InvalidRequest."""
    tables = {kind: data[kind] for kind in ("device", "link") if kind in data}
    if not tables:
        return catalogue
    more = hardware.from_tables(tables)
    return replace(catalogue, devices={**catalogue.devices, **more.devices}, links={**catalogue.links, **more.links})


def _have(table: Mapping[str, Any], known: Catalogue) -> Have:
    _known(table, ("device", "count", "price"), "[[have]]")
    device = known.device(text("device of [[have]]", table.get("device"), _MAX_TEXT))
    if "price" in table:
        device = replace(device, price=table["price"])  # which checks it
    return Have(device, whole(f"count of {device.name}", table.get("count"), 1, MAX_COUNT))


def _policy(table: Mapping[str, Any]) -> KvPolicy:
    name = text("name of [[policy]]", table.get("name"), _MAX_TEXT)
    shares = {}
    for key in ("read", "held"):
        value = table.get(key, 1.0)
        if type(value) not in (int, float):
            raise InvalidRequest(f"{key} of policy {name!r} is {value!r:.80}; allowed is a number above 0 to 1")
        shares[key] = float(value)
    window = table.get("window")
    if window is not None:
        whole(f"window of policy {name!r}", window, 1, 1 << 24)
    return KvPolicy(name, shares["read"], shares["held"], window)


def _texts(data: Mapping[str, Any], key: str) -> list[str]:
    """A list of names; one may stand alone."""
    given = data.get(key, [])
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or len(names) > MAX_ENTRIES or not all(isinstance(name, str) for name in names):
        raise InvalidRequest(f"{key} is {given!r:.80}; allowed are up to {MAX_ENTRIES} names in a list")
    return names


def _known(table: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    allowed = tuple(allowed)
    if unknown := [name for name in table if name not in allowed]:
        raise InvalidRequest(f"{where} has the key {unknown[0]!r:.80}; allowed are {', '.join(allowed)}")


def _unequal(what: str, names: list[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(f"{what} has {name!r:.80} twice; allowed is once")
