"""Limits of one request's body, checked before memory or time is spent on it: bytes, JSON values, depth."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.types import Receive

from lamina.server.http.errors import ApiError, shown

MAX_DEPTH = 100  # of nested lists and objects
MAX_VALUES = 1_000_000
MAX_STRINGS = 500_000
BODY_SECONDS = 60.0  # in which a body must arrive

_DRAIN_SECONDS = 1.0
_BRACKETS = re.compile(rb"[\[\]{}]")
_STRING = re.compile(rb'"[^"]*"?')  # without escapes. No alternatives inside: they would take memory per character


class ClientGone(Exception):
    """The client has closed its connection, so no response is needed."""


async def read_body(receive: Receive, headers: Mapping[str, str], most: int, seconds: float = BODY_SECONDS) -> bytes:
    """A request's body. Raises ApiError where it has more than `most` bytes or takes over `seconds`, ClientGone."""
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        if "expect" not in headers:
            await _drain(receive)
        raise _too_large(most)
    try:
        return await asyncio.wait_for(_read(receive, most), seconds)
    except (TimeoutError, asyncio.TimeoutError):
        raise ApiError(
            408, f"the request's body did not come within {seconds:g} seconds", headers={"Connection": "close"}
        ) from None


def check_media_type(content_type: str) -> None:
    """Raises ApiError unless it is JSON in UTF-8, which pages of other origins cannot send without a CORS preflight."""
    kind, _, parameters = content_type.lower().partition(";")
    charset = parameters.replace(" ", "").replace('"', "")
    if kind.strip() != "application/json" or charset not in ("", "charset=utf-8"):
        given = f"is {shown(content_type)}" if content_type else "is missing"
        raise ApiError(415, f"Content-Type {given}; allowed is application/json, in UTF-8")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError for anything but plain JSON within the limits."""
    if not body.strip():
        raise ApiError(400, "the body is empty; a JSON object is needed")
    if body.startswith(b"\xef\xbb\xbf"):
        raise ApiError(400, "the body begins with a byte order mark; JSON in UTF-8 without one is needed")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is no UTF-8 at byte {error.start}; JSON in UTF-8 is needed") from None
    _check_structure(body)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_number)
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


def _check_structure(body: bytes) -> None:
    """Refuse a body with too many values or too much depth, before any value is created."""
    if len(body) <= MAX_DEPTH:
        return
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH and body.count(b",") <= MAX_VALUES:
        return
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') > 2 * MAX_STRINGS:
        raise ApiError(400, f"the body has more than {MAX_STRINGS} strings, which are allowed")
    bare = _STRING.sub(b"", bare)
    opened = bare.count(b"[") + bare.count(b"{")
    if opened + bare.count(b",") > MAX_VALUES:
        raise ApiError(400, f"the body has more than {MAX_VALUES} values, which are allowed")
    if opened <= MAX_DEPTH:
        return
    depth = 0
    for bracket in _BRACKETS.finditer(bare):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise _too_deep()


def _too_deep() -> ApiError:
    return ApiError(400, f"the body nests lists and objects more than {MAX_DEPTH} deep, which is the limit")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ApiError(400, f"the body has the field {shown(twice)} twice in one object", twice[:80])
    return value


def _constant(name: str) -> float:
    raise ApiError(400, f"the body has {name}, which is no JSON; allowed are finite numbers")


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ApiError(400, f"the body has the number {shown(text)}; allowed are finite numbers of 64 bits")
    return value


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most} bytes, which are allowed", headers={"Connection": "close"})


async def _read(receive: Receive, most: int) -> bytes:
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        size += len(piece)
        if size > most:
            await _drain(receive)
            raise _too_large(most)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _drain(receive: Receive) -> None:
    """Discard what still arrives, for a moment: many clients read no response before they have sent everything."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _DRAIN_SECONDS
    while (left := end - loop.time()) > 0:
        try:
            message = await asyncio.wait_for(receive(), left)
        except (TimeoutError, asyncio.TimeoutError):
            return
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
