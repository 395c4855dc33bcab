"""Files of hardware, inventories and plans: a value of another type or out of bounds, and a key that is unknown, are
refused with the file, the key and the value, wherever they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import dop
from test_plan_file import plan_of

from lamina import plan_file as engine_plan
from lamina.errors import InvalidRequest
from lamina.simulator.costs import hardware
from lamina.simulator.costs.cost_model import KvPolicy, Speculation
from lamina.simulator.planning import inventory, plan_file
from lamina.simulator.planning.deployment import engine_keywords
from lamina.system.text_files import read_toml, toml_value

DEVICE = {
    "name": "mine",
    "kind": "gpu",
    "flops": 1e14,
    "memory": 24e9,
    "bandwidth": 1e12,
    "price": 0.5,
    "power": 300.0,
    "sources": {"flops": "a data sheet"},
    "efficiency": {"dense": [[1.0, 0.5], [256.0, 0.8]], "compute": 0.5, "step_overhead": 1e-5},
}
LINK = {"name": "wire", "bandwidth": 1e9, "round_trip": 1e-4, "row_time": 1e-6, "sources": {"bandwidth": "measured"}}
Steps = tuple[str | int, ...]


@dataclass(frozen=True)
class File:
    """A file that is right: its tables, its reader, and bounds of numbers by their places."""

    tables: Mapping[str, Any]
    read: Callable[[Path], Any]
    bounds: Mapping[Steps, tuple[float, float]]
    free: tuple[str, ...] = field(default=())
    """Tables that the reader leaves to another one."""


def _plan_tables(folder: Path) -> Mapping[str, Any]:
    system = dop(2, 4, policy=KvPolicy("auto", 0.3, 0.4, 4096), speculation=Speculation(0.7, 8, 0.5))
    plan_file.write(folder / "plan.toml", plan_of(system, engine=engine_keywords(system, 4096)))
    return read_toml(folder / "plan.toml")


HARDWARE = File(
    tables={
        "device": [DEVICE],
        "link": [LINK],
        "engine": [
            {"name": "ours", "collective": 0.5, "attention": [[1.0, 0.5]], "sources": {"collective": "measured"}}
        ],
    },
    read=hardware.load,
    bounds={
        ("device", 0, "flops"): (1, 1e18),
        ("device", 0, "memory"): (1, 1e16),
        ("device", 0, "bandwidth"): (1, 1e16),
        ("device", 0, "price"): (0, 1e6),
        ("device", 0, "efficiency", "compute"): (0, 1.5),
        ("device", 0, "efficiency", "step_overhead"): (0, 60),
        ("link", 0, "round_trip"): (0, 60),
        ("engine", 0, "collective"): (1e-6, 1.5),
    },
)
INVENTORY = File(
    tables={
        "systems": ["chunked", "lamina"],
        "links": ["fhbn-400g", "wire"],
        "have": [{"device": "h100", "count": 4, "price": 9.5}, {"device": "mine", "count": 1}],
        "policy": [{"name": "auto", "read": 0.3, "held": 0.5, "window": 1088, "source": "measured"}],
        "device": [DEVICE],
        "link": [LINK],
    },
    read=inventory.read,
    bounds={
        ("have", 0, "count"): (1, 1024),
        ("have", 0, "price"): (0, 1e6),
        ("policy", 0, "read"): (1e-6, 1),
        ("policy", 0, "held"): (1e-6, 1),
        ("policy", 0, "window"): (1, 1 << 24),
    },
)
PLAN_BOUNDS: dict[Steps, tuple[float, float]] = {
    ("version",): (2, 2),
    ("replicas",): (1, 1 << 20),
    ("system", "model_count"): (1, 1 << 24),
    ("system", "attention_count"): (1, 1 << 24),
    ("system", "policy", "read"): (1e-6, 1),
    ("system", "speculation", "acceptance"): (0, 1),
    ("system", "speculation", "tokens"): (1, 16),
    ("predicted", "tpot"): (0, 1e18),
    ("predicted", "slo_share"): (0, 1e18),
    ("trace", "requests"): (0, 1 << 62),
    ("shape", "hidden"): (1, 1 << 62),
    ("shape", "max_context"): (0, 1 << 62),
    ("shape", "groups", 0, "layers"): (1, 1 << 16),
    ("shape", "groups", 0, "kv_heads"): (0, 1 << 62),
    ("shape", "groups", 0, "top_k"): (0, 0),
    ("shape", "element"): (0.1, 8),
    ("device", 0, "price"): (0, 1e6),
    ("link", 0, "bandwidth"): (1, 1e16),
}
OF_THE_SIMULATOR = ("system", "shape", "predicted", "trace", "slo")
ENGINE_BOUNDS = {("version",): (2, 2), ("replicas",): (1, 1 << 20)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, File]:
    tables = _plan_tables(tmp_path_factory.mktemp("plans"))
    return {
        "hardware": HARDWARE,
        "inventory": INVENTORY,
        "plan": File(tables, plan_file.read, PLAN_BOUNDS, free=("engine",)),
        "engine of a plan": File(
            {**tables, **{name: {} for name in OF_THE_SIMULATOR}, "device": [], "link": []},
            engine_plan.read, ENGINE_BOUNDS, free=("engine", *OF_THE_SIMULATOR, "device", "link"),
        ),
    }  # fmt: skip


def places(tables: Any, steps: Steps = ()) -> Iterator[tuple[Steps, Any]]:
    """All values of a file, tables and lists too, with where they are."""
    items = tables.items() if isinstance(tables, Mapping) else enumerate(tables) if isinstance(tables, list) else ()
    for key, value in items:
        yield (*steps, key), value
        yield from places(value, (*steps, key))


def replaced(tables: Mapping[str, Any], steps: Steps, value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(dict(tables))
    target = changed
    for step in steps[:-1]:
        target = target[step]
    target[steps[-1]] = value
    return changed  # type: ignore[no-any-return]


def refusal(file: File, tables: Mapping[str, Any], folder: Path) -> str:
    path = folder / "file.toml"
    path.write_text("".join(f"{key} = {toml_value(value)}\n" for key, value in tables.items()), encoding="utf-8")
    with pytest.raises(InvalidRequest) as caught:
        file.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def named(steps: Steps) -> str:
    """The innermost key on the way to a value."""
    return next(step for step in reversed(steps) if isinstance(step, str))


OTHER_TYPES: dict[type, list[Any]] = {
    int: ["1", True, 2.5, [], {}],
    float: ["1", True, [], {}, float("nan"), float("inf")],
    str: [1, 2.5, True, [], {}],
    bool: [1, "true", []],
    list: [3, True, {}],
    dict: [3, "a text", True, []],
}
NAMES = ["hardware", "inventory", "plan", "engine of a plan"]
drawn = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_right_are_read(name: str, files: dict[str, File], tmp_path: Path) -> None:
    file = files[name]
    path = tmp_path / "file.toml"
    path.write_text("".join(f"{key} = {toml_value(value)}\n" for key, value in file.tables.items()))
    file.read(path)


@pytest.mark.parametrize("name", NAMES)
@drawn
@given(data=st.data())
def test_a_value_of_another_type_is_named(
    name: str, files: dict[str, File], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = files[name]
    steps, value = data.draw(
        st.sampled_from([place for place in places(file.tables) if not inside_free(file, place[0])])
    )
    other = data.draw(st.sampled_from(OTHER_TYPES[type(value)]))
    reason = refusal(file, replaced(file.tables, steps, other), tmp_path_factory.getbasetemp())
    assert named(steps) in reason
    assert not isinstance(steps[-1], str) or isinstance(other, (list, dict)) or f"{other!r}" in reason


@pytest.mark.parametrize("name", NAMES)
@drawn
@given(data=st.data())
def test_an_unknown_key_is_named(
    name: str, files: dict[str, File], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = files[name]
    tables = [steps for steps, value in places(file.tables) if isinstance(value, dict)]
    if name == "engine of a plan":
        tables = [("engine",)]
    steps = data.draw(st.sampled_from([(), *tables]))
    reason = refusal(file, replaced(file.tables, (*steps, "colour"), "green"), tmp_path_factory.getbasetemp())
    assert "'colour'; allowed are " in reason


@pytest.mark.parametrize("name", NAMES)
def test_what_is_beyond_a_bound_is_named(name: str, files: dict[str, File], tmp_path: Path) -> None:
    file = files[name]
    for steps, (low, high) in file.bounds.items():
        for beyond in (low - 1, high + 1 if isinstance(high, int) else high * 1.01 + 1):
            assert named(steps) in refusal(file, replaced(file.tables, steps, beyond), tmp_path), (steps, beyond)


def inside_free(file: File, steps: Steps) -> bool:
    return len(steps) > 1 and steps[0] in file.free
