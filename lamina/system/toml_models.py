"""TOML files by strict schemas: pydantic models, and dataclasses whose fields are checked by their types.

A schema says which keys a table has and of which types and bounds their values are; nothing is converted, so 2.0 is no
integer and true no number. What is wrong is an InvalidRequest that names the place, the value and what is allowed.
"""

from __future__ import annotations

import functools
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
_WORDS = {
    "Input should be": "allowed is",
    "a valid string": "a text",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "a valid dictionary": "a table",
    "an object": "a table",
    "greater than or equal to": "a number of at least",
    "less than or equal to": "a number of at most",
}
"""What pydantic calls things, and what this project does."""
_T = TypeVar("_T")
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Table(BaseModel):
    """A table of a TOML file: no key but its fields. Dataclasses in its fields are as strict."""

    model_config = _STRICT


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
    # As JSON: where Python's own values are checked strictly, a list is no tuple and a table no dataclass.
    text = json.dumps([data], default=_date)
    adapter = _adapter(schema)  # type: ignore[arg-type]  # a type can be hashed
    try:
        tables: tuple[_T] = adapter.validate_json(text, strict=True)
    except ValidationError as error:
        faults = sorted(error.errors(include_url=False), key=_is_not_misspelt)
        raise InvalidRequest(_words(schema, data, faults[0], where)) from error
    return tables[0]


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    table: Any = tuple[schema]  # in a tuple, since a dataclass alone has no config
    return TypeAdapter(table, config=_STRICT)


def _date(value: Any) -> dict[str, str]:
    return {"date": str(value)}  # TOML has dates; no schema here does


def _is_not_misspelt(fault: Any) -> bool:
    """Sorts unknown keys first: a key that is misspelt is missing, too."""
    return fault["type"] not in _UNKNOWN_KEY


def _words(schema: type, data: Any, error: Any, where: str) -> str:
    steps, kind = list(error["loc"])[1:], error["type"]
    if kind == "missing" and isinstance(steps[-1], int):
        return f"{_place(data, steps[:-1], where)} is {error['input']!r:.80}; its item {steps[-1]} is needed"
    if kind == "missing":
        return f"{_place(data, steps[:-1], where)} has no {steps[-1]}; it is needed"
    if kind in _UNKNOWN_KEY:
        allowed = ", ".join(_keys(schema, steps[:-1]))
        return f"{_place(data, steps[:-1], where)} has the key {steps[-1]!r:.80}; allowed are {allowed}"
    if kind == "value_error":
        reason = error["ctx"]["error"]
        return f"{_place(data, steps, where)}: {reason}" if where or steps else str(reason)
    allowed = error["msg"]
    for pydantic_words, words in _WORDS.items():
        allowed = allowed.replace(pydantic_words, words)
    return f"{_place(data, steps, where)} is {error['input']!r:.80}; {allowed}"


def _place(data: Any, steps: list[str | int], where: str) -> str:
    """A place in a file in words, such as `shape.groups[0].top_k` or `device 'h100'.price`."""
    path = where
    for step in steps:
        try:
            data = data[step]
        except (LookupError, TypeError):  # a step that is pydantic's, not the file's
            data = None
        name = data.get("name") if isinstance(step, int) and isinstance(data, Mapping) else None
        if isinstance(step, str):
            path += f".{step}" if path else step
        else:
            path += f" {name!r:.80}" if isinstance(name, str) else f"[{step}]"
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
