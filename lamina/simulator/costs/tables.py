"""Values out of TOML files, checked: each function gives what it was given, or raises InvalidRequest, which names the
value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lamina.errors import InvalidRequest
from lamina.system.text_files import read_toml

MAX_BYTES = 1 << 20
_MAX_ENTRIES, _MAX_TEXT, _MAX_INTEGER = 4096, 4000, 1 << 62
_T = TypeVar("_T")


def read_tables(path: str | Path, parse: Callable[[dict[str, Any]], _T]) -> _T:
    """What `parse` makes of a TOML file of at most `MAX_BYTES`. Raises InvalidRequest, which names the file."""
    try:
        return parse(read_toml(path, MAX_BYTES))
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error}") from error
    except (ValueError, OverflowError) as error:  # an integer too long to print, or to be a float
        raise InvalidRequest(f"{path}: it holds what cannot be shown: {error}") from error


def tables_of(data: Mapping[str, Any], kind: str, most: int = _MAX_ENTRIES) -> list[dict[str, Any]]:
    """The tables [[kind]] of a TOML file, at most so many."""
    tables = data.get(kind, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InvalidRequest(f"{kind} is {tables!r:.80}; allowed are tables, written [[{kind}]]")
    if len(tables) > most:
        raise InvalidRequest(f"there are {len(tables)} tables [[{kind}]]; allowed are {most}")
    return tables


def known_keys(table: Mapping[str, Any], allowed: Collection[str], where: str) -> None:
    """Raise InvalidRequest for a key that is not allowed."""
    if unknown := [name for name in table if name not in allowed]:
        raise InvalidRequest(f"{where} has the key {unknown[0]!r:.80}; allowed are {', '.join(allowed)}")


def text(where: str, value: Any, most: int = _MAX_TEXT) -> str:
    """The value, if it is a text of a bounded length."""
    if not isinstance(value, str) or len(value) > most:
        raise InvalidRequest(f"{where} is {value!r:.80}; allowed is a text of up to {most} characters")
    return value


def whole(where: str, value: Any, least: int = 0, most: int = _MAX_INTEGER) -> int:
    """The value, if it is a whole number within bounds."""
    if type(value) is not int or not least <= value <= most:
        raise InvalidRequest(f"{where} is {value!r:.80}; allowed are whole numbers from {least} to {most}")
    return value


def number_within(what: str, value: Any, low: float, high: float) -> float:
    """The value, if it is a number in [low, high]."""
    # NaN compares false with everything, and true and false are no numbers.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{what} is {value!r:.80}; allowed is a number from {low:g} to {high:g}")
    return float(value)
