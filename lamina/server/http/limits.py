"""Limits of requests' bodies, checked before memory or time is spent on them: bytes, also of all bodies together, JSON
values, depth.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Receive

from lamina.server.http.errors import ApiError, overloaded, shown

MAX_DEPTH = 100  # of nested lists and objects
MAX_VALUES = 1_000_000
MAX_STRINGS = 500_000
MAX_CONTAINERS = 100_000  # lists and objects: each takes some hundred bytes, however small its text is
MAX_BODIES = 16 << 20  # bytes of all bodies that arrive or wait to be parsed
SMALL = 16 << 10  # bytes up to which a body is taken however much memory the others have
BODY_SECONDS = 60.0  # in which a body must arrive

_DRAIN_SECONDS = 1.0
_PIECE = 1 << 16  # bytes
_BRACKETS = re.compile(rb"[\[\]{}]")
_STRING = re.compile(rb'"[^"]*"?')  # without escapes. No alternatives inside: they would take memory per character


class ClientGone(Exception):
    """The client has closed its connection, so no response is needed."""


@dataclass(eq=False, slots=True)
class _Body:
    """A body that arrives. `counted`: how many of its bytes count, `given_up`: another body got their room."""

    task: asyncio.Task[None] | None = None
    data: bytearray = field(default_factory=bytearray)
    counted: int = 0
    given_up: bool = False


class BodyMemory:
    """The memory for the bodies of all requests: `most` bytes. A body that exceeds it takes the place of the largest
    one that has not come completely, whose request gets status 429."""

    def __init__(self, most: int = MAX_BODIES) -> None:
        self._capacity = most
        self._used = 0
        self._arriving: set[_Body] = set()

    @asynccontextmanager
    async def body(
        self, receive: Receive, headers: Mapping[str, str], most: int, seconds: float = BODY_SECONDS
    ) -> AsyncIterator[bytearray]:
        """A request's body, which counts until the context ends. Raises ApiError where it has more than `most` bytes,
        takes over `seconds` or finds no memory; ClientGone."""
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            if "expect" not in headers:
                await _drain(receive)
            raise _too_large(most)
        body = _Body()
        try:
            await self._arrive(body, receive, most, seconds)
            yield body.data
        finally:
            self._used -= body.counted

    async def _arrive(self, body: _Body, receive: Receive, most: int, seconds: float) -> None:
        body.task = asyncio.ensure_future(self._read(body, receive, most))
        self._arriving.add(body)
        try:
            await asyncio.wait_for(body.task, seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise ApiError(
                408, f"the request's body did not come within {seconds:g} seconds", headers={"Connection": "close"}
            ) from None
        except asyncio.CancelledError:
            if not body.given_up:
                raise
            raise self._no_memory() from None
        finally:
            self._arriving.discard(body)

    async def _read(self, body: _Body, receive: Receive, most: int) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body.data += message.get("body", b"")
            if len(body.data) > most:
                await _drain(receive)
                raise _too_large(most)
            if len(body.data) > SMALL:
                self._count(body)
            if not message.get("more_body", False):
                return

    def _count(self, body: _Body) -> None:
        self._used += len(body.data) - body.counted
        body.counted = len(body.data)
        while self._used > self._capacity:
            largest = max(self._arriving, key=lambda each: each.counted)
            self._used -= largest.counted
            largest.counted, largest.given_up = 0, True
            largest.data.clear()
            self._arriving.discard(largest)
            if largest is body:
                raise self._no_memory()
            if largest.task is not None:
                largest.task.cancel()

    def _no_memory(self) -> ApiError:
        error = overloaded(f"bodies that have not come completely have more than {self._capacity} bytes together")
        error.headers["Connection"] = "close"
        return error


def check_media_type(content_type: str) -> None:
    """Raises ApiError unless it is JSON in UTF-8, which pages of other origins cannot send without a CORS preflight."""
    kind, _, parameters = content_type.lower().partition(";")
    charset = parameters.replace(" ", "").replace('"', "")
    if kind.strip() != "application/json" or charset not in ("", "charset=utf-8"):
        value = f"is {shown(content_type)}" if content_type else "is missing"
        raise ApiError(415, f"Content-Type {value}; allowed is application/json, in UTF-8")


def parse_object(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object in a body; a bytearray is empty afterwards. Raises ApiError for all but plain JSON within the
    limits."""
    if not body or body.isspace():
        raise ApiError(400, "the body is empty; a JSON object is needed")
    if body.startswith(b"\xef\xbb\xbf"):
        raise ApiError(400, "the body begins with a byte order mark; JSON in UTF-8 without one is needed")
    _check_structure(body)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is no UTF-8 at byte {error.start}; JSON in UTF-8 is needed") from None
    if isinstance(body, bytearray):
        body.clear()  # it may have megabytes, and `text` has them too
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_number, parse_int=_integer
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is no JSON: {error.msg.lower()} at {where}") from None
    except ValueError:  # Python's own limit for integers
        raise ApiError(400, "the body has an integer of thousands of digits; allowed are 64 bits") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a {type(value).__name__}; a JSON object is needed")
    return value


def _check_structure(body: bytes | bytearray) -> None:
    """Refuse a body with too many values or too much depth, before any value is created."""
    if len(body) <= MAX_DEPTH:
        return
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH and body.count(b",") <= MAX_VALUES:
        return
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    if bare.count(b'"') > 2 * MAX_STRINGS:
        raise ApiError(400, f"the body has more than {MAX_STRINGS} strings, which are allowed")
    bare = _without_strings(bare)
    opened = bare.count(b"[") + bare.count(b"{")
    if opened + bare.count(b",") > MAX_VALUES:
        raise ApiError(400, f"the body has more than {MAX_VALUES} values, which are allowed")
    if opened > MAX_CONTAINERS:
        raise ApiError(400, f"the body has more than {MAX_CONTAINERS} lists and objects, which are allowed")
    if opened <= MAX_DEPTH:
        return
    depth = 0
    for bracket in _BRACKETS.finditer(bare):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise _too_deep()


def _without_strings(text: bytes | bytearray) -> bytes:
    """JSON without its strings; `text` has no escapes. Piece by piece: `re` keeps all that is between two matches."""
    bare, begin = bytearray(), 0
    while begin < len(text):
        end = begin + _PIECE
        if text.count(b'"', begin, end) % 2:  # a string goes on beyond the piece
            end = text.find(b'"', end) + 1 or len(text)
        bare += _STRING.sub(b"", text[begin:end])
        begin = end
    return bytes(bare)


def _too_deep() -> ApiError:
    return ApiError(400, f"the body nests lists and objects more than {MAX_DEPTH} deep, which is the limit")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names: set[str] = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise ApiError(400, f"the body has the field {shown(twice)} twice in one object", twice[:80])
    return value


def _constant(name: str) -> float:
    raise ApiError(400, f"the body has {name}, which is no JSON; allowed are finite numbers")


def _integer(text: str) -> int:
    """As json itself reads it, which would let no other thread run until it has read a million of them."""
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ApiError(400, f"the body has the number {shown(text)}; allowed are finite numbers of 64 bits")
    return value


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most} bytes, which are allowed", headers={"Connection": "close"})


async def _drain(receive: Receive) -> None:
    """Discard what still arrives, for a moment: many clients read no response before they have sent everything."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _DRAIN_SECONDS
    while (seconds := end - loop.time()) > 0:
        try:
            message = await asyncio.wait_for(receive(), seconds)
        except (TimeoutError, asyncio.TimeoutError):
            return
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
