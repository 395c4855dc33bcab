"""TOML files by strict schemas: pydantic models, and dataclasses whose fields are checked by their types.

A schema says which keys a table has and of which types and bounds their values are; nothing is converted, so 2.0 is no
integer and true no number. What is wrong is an InvalidRequest that names the place, the value and what is allowed.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lamina.errors import InvalidRequest
from lamina.system.text_files import read_toml

MAX_BYTES = 1 << 20
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
_T = TypeVar("_T")


class Table(BaseModel):
    """A table of a TOML file: no key but its fields. Dataclasses in its fields are as strict."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def read_tables(path: str | Path, parse: Callable[[dict[str, Any]], _T]) -> _T:
    """What `parse` makes of a TOML file of at most `MAX_BYTES`. Raises InvalidRequest, which names the file."""
    try:
        return parse(read_toml(path, MAX_BYTES))
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error}") from error
    except (ValueError, OverflowError) as error:  # an integer too long to print, or to be a float
        raise InvalidRequest(f"{path}: it holds what cannot be shown: {error}") from error


def validated(schema: type[_T], data: Mapping[str, Any], where: str = "") -> _T:
    """The tables as a `Table` or dataclass. `where`: what errors call the place of `data`; "": the file."""
    try:
        # As JSON, since a list is no tuple and a table no dataclass where Python's own values are strictly checked.
        return TypeAdapter(schema).validate_json(json.dumps(data, default=_date), strict=True)
    except ValidationError as error:
        raise InvalidRequest(_words(schema, dict(error.errors(include_url=False)[0]), where)) from error


def _date(value: Any) -> dict[str, str]:
    return {"date": str(value)}  # TOML has dates; no schema here does


def _words(schema: type, error: Mapping[str, Any], where: str) -> str:
    steps, kind = list(error["loc"]), error["type"]
    if kind == "missing":
        return f"{_place(where, steps[:-1])} has no {steps[-1]}; it is needed"
    if kind in _UNKNOWN_KEY:
        allowed = ", ".join(_keys(schema, steps[:-1]))
        return f"{_place(where, steps[:-1])} has the key {steps[-1]!r:.80}; allowed are {allowed}"
    if kind == "value_error":
        reason = error["ctx"]["error"]
        return f"{_place(where, steps)}: {reason}" if where or steps else str(reason)
    allowed = error["msg"].replace("Input should be", "allowed is").replace("a valid dictionary", "a table")
    return f"{_place(where, steps)} is {error['input']!r:.80}; {allowed}"


def _place(where: str, steps: list[str | int]) -> str:
    """A place in a file in words, such as `shape.groups[0].top_k`."""
    path = where
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path or "it"


def _keys(schema: Any, steps: list[str | int]) -> list[str]:
    """The keys that the table at a place may have."""
    for step in steps:
        schema = _plain(schema)
        if isinstance(step, int):
            schema = get_args(schema)[0]
        elif is_dataclass(schema) or (isinstance(schema, type) and issubclass(schema, BaseModel)):
            schema = get_type_hints(schema)[step]
    schema = _plain(schema)
    if is_dataclass(schema):
        return [item.name for item in fields(schema)]
    return list(schema.model_fields) if isinstance(schema, type) and issubclass(schema, BaseModel) else []


def _plain(hint: Any) -> Any:
    """A type without bounds and without None."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if get_origin(hint) in (types.UnionType, Union):
        return _plain(next(part for part in get_args(hint) if part is not type(None)))
    return hint
