"""Frozen dataclasses as TOML tables, and back: checked by their fields' types, every number bounded.

Devices and links stand in their own tables and are named where they are used.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lamina.errors import InvalidRequest
from lamina.simulator.costs.hardware import Catalogue, Device, Link

MAX_ITEMS = 1024
_MAX_TEXT = 4000
_MAX_INTEGER, _MAX_NUMBER = 1 << 62, 1e18
_T = TypeVar("_T")


def to_table(part: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
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
        return to_table(value, leave_out)
    if isinstance(value, tuple):
        return [_plain(each, leave_out) for each in value]
    return value


def from_table(kind: type[_T], table: Any, where: str, catalogue: Catalogue, **given: Any) -> _T:
    """A dataclass from a table. Its fields of the names in `given` have those values, inner ones too, and the table
    doesn't. Raises InvalidRequest, which names the key, the value and what is allowed."""
    if not isinstance(table, Mapping):
        raise InvalidRequest(f"{where} is {table!r:.80}; allowed is a table")
    hints = get_type_hints(kind)
    items = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]  # a dataclass, whatever its type
    known = [name for name in items if name not in given]
    if unknown := [name for name in table if name not in known]:
        raise InvalidRequest(f"{where} has the key {unknown[0]!r:.80}; allowed are {', '.join(known)}")
    made = {name: value for name, value in given.items() if name in items}
    for name in known:
        item = items[name]
        if name in table:
            made[name] = _read(hints[name], table[name], f"{where}.{name}", catalogue, given)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise InvalidRequest(f"{where} has no {name}; it is needed")
    try:
        return kind(**made)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error}") from error


def _read(hint: Any, value: Any, where: str, catalogue: Catalogue, given: Mapping[str, Any]) -> Any:
    if get_origin(hint) in (types.UnionType, Union):  # of one type with None, which a file says by leaving it out
        hint = next(each for each in get_args(hint) if each is not type(None))
    if hint is Device:
        return catalogue.device(text(where, value))
    if hint is Link:
        return catalogue.link(text(where, value))
    if is_dataclass(hint):
        return from_table(hint, value, where, catalogue, **given)  # type: ignore[arg-type]  # a type, not an instance
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise InvalidRequest(f"{where} is {value!r:.80}; allowed is a list of up to {MAX_ITEMS}")
        inner = get_args(hint)[0]
        return tuple(_read(inner, each, f"{where}[{at}]", catalogue, given) for at, each in enumerate(value))
    if hint is str:
        return text(where, value)
    if hint is bool:
        if type(value) is not bool:
            raise InvalidRequest(f"{where} is {value!r:.80}; allowed are true and false")
        return value
    return whole(where, value) if hint is int else number(where, value)


def text(where: str, value: Any, most: int = _MAX_TEXT) -> str:
    """The value, if it is a text of a bounded length. Raises InvalidRequest."""
    if not isinstance(value, str) or len(value) > most:
        raise InvalidRequest(f"{where} is {value!r:.80}; allowed is a text of up to {most} characters")
    return value


def whole(where: str, value: Any, least: int = 0, most: int = _MAX_INTEGER) -> int:
    """The value, if it is a whole number within bounds. Raises InvalidRequest."""
    if type(value) is not int or not least <= value <= most:
        raise InvalidRequest(f"{where} is {value!r:.80}; allowed are whole numbers from {least} to {most}")
    return value


def number(where: str, value: Any) -> float:
    """The value, if it is a number, finite and not negative. Raises InvalidRequest."""
    if type(value) not in (int, float) or not 0 <= value <= _MAX_NUMBER or math.isnan(value):
        raise InvalidRequest(f"{where} is {value!r:.80}; allowed are numbers from 0 to {_MAX_NUMBER:g}")
    return float(value)
