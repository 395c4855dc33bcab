"""How the fields of a dataclass are packed into a msgpack array, and unpacked with checks.

`pack` trusts its input; `unpack` trusts nothing, and raises ProtocolError for a wrong type or range.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack

from lamina_protocols.errors import ProtocolError

_MAX_INT = 1 << 62


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def shown(value: object) -> str:
    """A value for an error message, in time and length that do not grow with it."""
    return _REPR.repr(value)[:160]


class Field(NamedTuple):
    """How one field is packed and unpacked. `unpack` raises ProtocolError for a wrong type."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


def unpack_int(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_INT:
        raise ProtocolError(f"expected an integer from 0 to 2^62, got {shown(value)}")
    return value


def unpack_float(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ProtocolError(f"expected a finite number, got {shown(value)}")
    return float(value)


def unpack_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ProtocolError(f"expected true or false, got {shown(value)}")
    return value


def unpack_text(value: Any) -> str:
    if type(value) is not str:
        raise ProtocolError(f"expected text, got {shown(value)}")
    return value


def unpack_bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise ProtocolError(f"expected bytes, got {shown(value)}")
    return value


def unpack_ints(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple:
        raise ProtocolError(f"expected a list of integers, got {shown(value)}")
    return tuple(unpack_int(item) for item in value)


def unpack_texts(value: Any) -> tuple[str, ...]:
    if type(value) is not tuple:
        raise ProtocolError(f"expected a list of texts, got {shown(value)}")
    return tuple(unpack_text(item) for item in value)


def unpack_range(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    ends = unpack_ints(value)
    if len(ends) != 2 or ends[0] > ends[1]:
        raise ProtocolError(f"expected a range [lo, hi], got {shown(ends)}")
    return ends[0], ends[1]


INT = Field(int, unpack_int)
FLOAT = Field(float, unpack_float)
BOOL = Field(bool, unpack_bool)
TEXT = Field(str, unpack_text)
BYTES = Field(bytes, unpack_bytes)
INTS = Field(tuple, unpack_ints)
TEXTS = Field(tuple, unpack_texts)
RANGE = Field(lambda value: value, unpack_range)


def optional(field: Field) -> Field:
    """The field, or None."""
    return Field(
        lambda value: None if value is None else field.pack(value),
        lambda value: None if value is None else field.unpack(value),
    )


class Record(NamedTuple):
    """A dataclass and its fields, in the order of its constructor."""

    cls: type
    fields: dict[str, Field]

    def pack(self, value: Any) -> list[Any]:
        return [field.pack(getattr(value, name)) for name, field in self.fields.items()]

    def unpack(self, values: Any) -> Any:
        if type(values) is not tuple or len(values) != len(self.fields):
            raise ProtocolError(f"{self.cls.__name__} has {len(self.fields)} fields, got {shown(values)}")
        return self.cls(*(field.unpack(value) for field, value in zip(self.fields.values(), values, strict=True)))


def record(rec: Record) -> Field:
    """One dataclass inside another."""
    return Field(rec.pack, rec.unpack)


def list_of(rec: Record, most: int | None = None) -> Field:
    """A list of these records, `most` at most."""

    def unpack(values: Any) -> tuple[Any, ...]:
        if type(values) is not tuple:
            raise ProtocolError(f"expected a list of {rec.cls.__name__}, got {shown(values)}")
        if most is not None and len(values) > most:
            raise ProtocolError(f"{len(values)} of {rec.cls.__name__}, allowed: {most}")
        return tuple(rec.unpack(value) for value in values)

    return Field(lambda values: [rec.pack(value) for value in values], unpack)


def one_of(records: tuple[Record, ...]) -> Field:
    """A list whose items are any of `records`, each with the record's index in front."""
    index = {rec.cls: i for i, rec in enumerate(records)}

    def pack(values: Any) -> list[Any]:
        return [[index[type(value)], *records[index[type(value)]].pack(value)] for value in values]

    def unpack(values: Any) -> tuple[Any, ...]:
        if type(values) is not tuple or not all(type(value) is tuple and value for value in values):
            raise ProtocolError(f"expected a list of tagged records, got {shown(values)}")
        for value in values:
            if type(value[0]) is not int or not 0 <= value[0] < len(records):
                raise ProtocolError(f"unknown record {shown(value[0])}, allowed: 0 to {len(records) - 1}")
        return tuple(records[value[0]].unpack(value[1:]) for value in values)

    return Field(pack, unpack)


def unpack_array(data: bytes | memoryview) -> tuple[Any, ...]:
    """The msgpack array in `data`, nested arrays as tuples. Raises ProtocolError for maps and impossible lengths."""
    try:
        fields = msgpack.unpackb(data, use_list=False, raw=False, max_array_len=len(data), max_map_len=0)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"header is no msgpack of arrays: {error!r:.200}") from error
    if type(fields) is not tuple:
        raise ProtocolError(f"header is {type(fields).__name__}, not an array")
    return fields
