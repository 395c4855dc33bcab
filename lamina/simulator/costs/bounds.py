"""Bounds of numbers and texts: as types of fields that files are read into, and as functions that raise InvalidRequest,
which names the value and what is allowed."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from lamina.errors import InvalidRequest

MAX_ENTRIES, MAX_TEXT, MAX_INTEGER, MAX_NUMBER, MAX_ITEMS = 4096, 4000, 1 << 62, 1e18, 1024

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Amount = Annotated[float, Field(ge=0, le=MAX_NUMBER)]


def text(where: str, value: Any, limit: int = MAX_TEXT) -> str:
    """The value, if it is a text of a bounded length."""
    if not isinstance(value, str) or len(value) > limit:
        raise InvalidRequest(f"{where} is {value!r:.80}; allowed is a text of up to {limit} characters")
    return value


def whole(where: str, value: Any, low: int = 0, high: int = MAX_INTEGER) -> int:
    """The value, if it is a whole number within bounds."""
    if type(value) is not int or not low <= value <= high:
        raise InvalidRequest(f"{where} is {value!r:.80}; allowed are whole numbers from {low} to {high}")
    return value


def number_within(what: str, value: Any, low: float, high: float) -> float:
    """The value, if it is a number in [low, high]."""
    # NaN compares false with everything, and true and false are no numbers.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{what} is {value!r:.80}; allowed is a number from {low:g} to {high:g}")
    return float(value)
