"""Typed, bounded reads of a JSON object that is not trusted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lamina_workers.errors import ModelFileError


class Keys:
    """Typed, bounded reads of one JSON object. null means absent, as in transformers; true is no integer."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._raw = {key: value for key, value in {**defaults, **raw}.items() if value is not None}

    def given(self, name: str) -> bool:
        return name in self._raw

    def get(self, name: str) -> Any:
        return self._raw.get(name)

    def table(self, name: str) -> Mapping[str, Any]:
        """A nested object; empty where the key is absent."""
        value = self._raw.get(name, {})
        if type(value) is not dict:
            raise ModelFileError(f"{name} is {value!r:.80}, expected an object")
        return value

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._value(name, default)
        if type(value) is not int or not low <= value <= high:
            raise ModelFileError(f"{name} is {value!r:.80}, expected an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._value(name, default)
        if type(value) not in (int, float) or not low <= value <= high:  # NaN fails every comparison
            raise ModelFileError(f"{name} is {value!r:.80}, expected a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if type(value) is not bool:
            raise ModelFileError(f"{name} is {value!r:.80}, expected true or false")
        return value

    def holds(self, fact: bool | str) -> bool:
        """A family's fact, or else the flag of the name that it gives; false where that is absent."""
        return fact if isinstance(fact, bool) else self.flag(fact, False)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if type(value) is not str:
            raise ModelFileError(f"{name} is {value!r:.80}, expected a string")
        return value

    def items(self, name: str, allowed: Collection[Any], length: int | None = None) -> tuple[Any, ...]:
        """A list of `allowed` values, of which the first `length` are returned (None: all)."""
        value = self._value(name, [])
        if type(value) is not list or not all(type(item) in (int, str) and item in allowed for item in value):
            raise ModelFileError(f"{name} is {value!r:.80}, expected a list of {_listing(allowed)}")
        if length is not None and len(value) < length:
            raise ModelFileError(f"{name} has {len(value)} entries, expected {length}, one a layer")
        return tuple(value[:length])

    def numbers(self, name: str, low: float, high: float, length: int) -> tuple[float, ...]:
        """A list of `length` numbers."""
        value = self._value(name, None)
        if type(value) is not list or len(value) != length:
            raise ModelFileError(f"{name} is {value!r:.80}, expected a list of {length} numbers")
        return tuple(Keys({name: item}, {}).number(name, low, high) for item in value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id or a list of them; none where the key is absent."""
        value = self._value(name, [])
        ids = value if type(value) is list else [value]
        if not all(type(item) is int and 0 <= item < 1 << 31 for item in ids):
            raise ModelFileError(f"{name} is {value!r:.80}, expected token ids from 0 to {(1 << 31) - 1}")
        return tuple(ids)

    def _value(self, name: str, default: Any) -> Any:
        value = self._raw.get(name, default)
        if value is None:
            raise ModelFileError(f"{name} is missing from the model's config")
        return value


def _listing(allowed: Collection[Any]) -> str:
    if isinstance(allowed, range):
        return f"integers from {allowed.start} to {allowed.stop - 1}"
    return ", ".join(repr(item) for item in allowed)
