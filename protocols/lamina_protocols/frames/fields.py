"""How a dataclass is packed into a msgpack array of its fields, and unpacked with checks, both by its annotations.

`pack` trusts its input; `unpack` trusts nothing, and raises ProtocolError for a wrong type or range.

An annotation is `int` (0 to 2^62), `float` (finite), `bool`, `str`, `bytes`, `Literal`, `tuple[T, ...]`,
`tuple[int, int]` (a range, low end first), `Mapping[int, T]`, a dataclass or NamedTuple, a union of these, or
`T | None`. With `Annotated[T, check]`, `check` gets each value that has come, and raises ProtocolError for one that is
not allowed. With `Annotated[T, Field(pack, unpack)]` these two pack and unpack T, whatever it is. A field that is
`Annotated[T, Since(N)]` stands last, has a default, and may be missing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgpack

from lamina_protocols.errors import ProtocolError

_MAX_INT = 1 << 62
_TORCH = SimpleNamespace(Tensor=type("Tensor", (), {}))  # stands for torch, which this file need not load


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


def as_it_is(kind: type, name: str) -> Field:
    """Values that msgpack, or JSON, has of themselves; `name`: what an error calls them."""

    def unpack(value: Any) -> Any:
        if type(value) is not kind:
            raise ProtocolError(f"expected {name}, got {shown(value)}")
        return value

    return Field(kind, unpack)


def unpack_ints(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple:
        raise ProtocolError(f"expected a list of integers, got {shown(value)}")
    return tuple(unpack_int(item) for item in value)


def unpack_range(value: Any) -> tuple[int, int]:
    ends = unpack_ints(value)
    if len(ends) != 2 or ends[0] > ends[1]:
        raise ProtocolError(f"expected a range [lo, hi], got {shown(ends)}")
    return ends[0], ends[1]


class Since(NamedTuple):
    """Marks a field that an older version than this one does not know. It is not sent while it has its default, so a
    side that lacks it can be sent the rest; only to others may it have another value."""

    version: int


class Record(NamedTuple):
    """A dataclass and its fields, in the order of its constructor. `later`: the last ones that came with a later
    version, in reverse, each with its default."""

    cls: type
    fields: dict[str, Field]
    later: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, noun: type) -> Record:
        """The record of a dataclass or NamedTuple, by its annotations; those of tensors are left out."""
        hints = get_type_hints(noun, localns={"torch": _TORCH}, include_extras=True)
        sent = {name: hint for name, hint in hints.items() if hint is not _TORCH.Tensor}
        later = [name for name, hint in sent.items() if any(isinstance(mark, Since) for mark in get_args(hint)[1:])]
        if later != list(sent)[len(sent) - len(later) :]:
            raise TypeError(f"{noun.__name__}: a field comes after {', '.join(later)}, which came later")
        defaults = {field.name: field.default for field in dataclasses.fields(noun)} if later else {}
        return cls(
            noun,
            {name: field_of(hint) for name, hint in sent.items()},
            tuple((name, defaults[name]) for name in reversed(later)),
        )

    def pack(self, value: Any) -> list[Any]:
        packed = [field.pack(getattr(value, name)) for name, field in self.fields.items()]
        for name, default in self.later:
            if getattr(value, name) != default:
                break
            packed.pop()
        return packed

    def unpack(self, values: Any) -> Any:
        return self.cls(**self.values(values))

    def values(self, values: Any) -> dict[str, Any]:
        """The unpacked fields that have come, by name."""
        if type(values) is not tuple or not len(self.fields) - len(self.later) <= len(values) <= len(self.fields):
            raise ProtocolError(f"{self.cls.__name__} has {len(self.fields)} fields, got {shown(values)}")
        return {name: field.unpack(value) for (name, field), value in zip(self.fields.items(), values, strict=False)}


_FIELDS: dict[Any, Field] = {
    int: Field(int, unpack_int),
    float: Field(float, unpack_float),
    bool: as_it_is(bool, "true or false"),
    str: as_it_is(str, "text"),
    bytes: as_it_is(bytes, "bytes"),
    tuple[int, ...]: Field(tuple, unpack_ints),
    tuple[int, int]: Field(tuple, unpack_range),
}


@functools.cache
def field_of(kind: Any) -> Field:
    """The field of an annotation, see the file's docstring. Raises TypeError for one that cannot be sent."""
    if kind in _FIELDS:
        return _FIELDS[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        by_hand = next((mark for mark in args[1:] if isinstance(mark, Field)), None)
        field = by_hand or field_of(args[0])
        for mark in args[1:]:
            field = field if isinstance(mark, (Field, Since)) else _checked(field, mark)
        return field
    if origin is Literal:
        return _choice(args)
    if origin is tuple and args[1:] == (Ellipsis,):
        return _list_of(field_of(args[0]))
    if origin is Mapping and args[0] is int:
        return _by_number(field_of(args[1]))
    if origin in (Union, UnionType) and args[1:] == (NoneType,):
        return _optional(field_of(args[0]))
    if origin in (Union, UnionType):
        return _one_of(args)
    if not hasattr(kind, "__annotations__"):
        raise TypeError(f"a field of type {kind} cannot be sent")
    record = Record.of(kind)
    return Field(record.pack, record.unpack)


def _checked(field: Field, check: Callable[[Any], None]) -> Field:
    def unpack(value: Any) -> Any:
        unpacked = field.unpack(value)
        check(unpacked)
        return unpacked

    return Field(field.pack, unpack)


def _optional(field: Field) -> Field:
    return Field(
        lambda value: None if value is None else field.pack(value),
        lambda value: None if value is None else field.unpack(value),
    )


def _list_of(field: Field) -> Field:
    def unpack(values: Any) -> tuple[Any, ...]:
        if type(values) is not tuple:
            raise ProtocolError(f"expected a list, got {shown(values)}")
        return tuple(field.unpack(value) for value in values)

    return Field(lambda values: [field.pack(value) for value in values], unpack)


def _by_number(field: Field) -> Field:
    """A mapping, as pairs."""

    def unpack(pairs: Any) -> dict[int, Any]:
        if type(pairs) is not tuple or not all(type(pair) is tuple and len(pair) == 2 for pair in pairs):
            raise ProtocolError(f"expected pairs of a number and what it stands for, got {shown(pairs)}")
        return {unpack_int(number): field.unpack(value) for number, value in pairs}

    return Field(lambda mapping: [[number, field.pack(value)] for number, value in mapping.items()], unpack)


def _choice(allowed: tuple[Any, ...]) -> Field:
    def unpack(value: Any) -> Any:
        if value not in allowed:
            raise ProtocolError(f"got {shown(value)}, allowed: {', '.join(map(str, allowed))}")
        return value

    return Field(lambda value: value, unpack)


def _one_of(kinds: Sequence[Any]) -> Field:
    """Any of these dataclasses and NamedTuples, with its index in front of its fields."""
    classes = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]
    fields = [field_of(kind) for kind in kinds]
    indexes = {cls: index for index, cls in enumerate(classes)}
    if len(indexes) < len(classes):
        raise TypeError(f"{', '.join(cls.__name__ for cls in classes)}: one is there twice")

    def pack(value: Any) -> list[Any]:
        index = indexes[type(value)]
        return [index, *fields[index].pack(value)]

    def unpack(value: Any) -> Any:
        if type(value) is not tuple or not value:
            raise ProtocolError(f"expected a tagged record, got {shown(value)}")
        index = value[0]
        if type(index) is not int or not 0 <= index < len(fields):
            names = ", ".join(f"{number} {cls.__name__}" for cls, number in indexes.items())
            raise ProtocolError(f"unknown record {shown(index)}, allowed: {names}")
        return fields[index].unpack(value[1:])

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
