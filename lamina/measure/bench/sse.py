"""Server-sent events out of bytes as they come, and the content of an event. Pure.

A client that measures shares its cores with the server it measures, so a chunk that is plainly a piece of text is never
parsed: four searches in its bytes recognise it. Any other chunk is parsed as JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lamina.errors import ProtocolError

MAX_LINE = 1 << 18
"""Bytes of one line. A chunk of one token has some hundred; with 20 log probabilities some thousand."""
DONE = b"[DONE]"
MAX_COUNT = 1 << 31
_MESSAGE = 200  # characters of an error that are kept


class EventStream:
    """Cuts bytes into the payloads of `data:` lines. OpenAI's events have one each; other lines are left out."""

    def __init__(self, most: int = MAX_LINE) -> None:
        self._most = most
        self._parts: list[bytes] = []  # of a line whose end has not come
        self._length = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that `data` completes. Raises ProtocolError where a line is too long."""
        if b"\n" not in data:
            self._keep(data)
            return []
        if self._parts:
            data = b"".join([*self._parts, data])
            self._parts, self._length = [], 0
        lines = data.split(b"\n")
        if last := lines.pop():
            self._keep(last)
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]

    def _keep(self, data: bytes) -> None:
        self._length += len(data)
        if self._length > self._most:
            raise ProtocolError(f"a line of the stream has more than {self._most} bytes")
        self._parts.append(data)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of the server; None where it reports none."""

    prompt: int | None = None
    output: int | None = None
    cached: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """The content of one event of a stream. `text`: it carries a piece of an answer; `output`: it belongs to an answer,
    with or without text; `error`: the server's message."""

    text: bool = False
    output: bool = False
    finish: str = ""
    usage: Usage | None = None
    error: str = ""


_KEYS = (b'"content":', b'"text":')


def plainly_text(payload: bytes) -> bool:
    """Whether a payload is certainly one with text, no end, no usage and no error. False means: parse it.

    Quotes within JSON's strings are escaped, so that a key found in the bytes is one. What is left unseen is a payload
    that is malformed between its braces.
    """
    at = payload.find(_KEYS[0])
    key = _KEYS[0]
    if at < 0:
        key = _KEYS[1]
        at = payload.find(key)
        if at < 0:
            return False
    at += len(key)
    if payload[at : at + 1] == b" ":
        at += 1
    if payload[at : at + 1] != b'"' or payload[at + 1 : at + 2] == b'"':
        return False
    return (
        payload[:1] == b"{"
        and payload[-1:] == b"}"
        and b'"choices"' in payload
        and _is_null(payload, b'"finish_reason":')
        and _is_null(payload, b'"usage":')
        and b'"error"' not in payload
    )


def parse(payload: bytes) -> Chunk:
    """The event of a payload. Raises ProtocolError where it is no JSON object, or not one of a stream of
    completions."""
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError) as fault:
        raise ProtocolError(f"an event is not JSON: {payload[:80]!r}") from fault
    if not isinstance(fields, dict):
        raise ProtocolError(f"an event is {payload[:80]!r}; expected an object")
    if (error := fields.get("error")) is not None:
        return Chunk(error=message(error))
    if fields.get("object") == "error":  # as vLLM once shaped them
        return Chunk(error=message(fields))
    choices = fields.get("choices")
    usage = read_usage(fields.get("usage"))
    if choices == [] or (choices is None and usage is not None):  # Azure begins with one that has neither
        return Chunk(usage=usage)
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ProtocolError(f"an event has neither choices nor usage: {payload[:80]!r}")
    finish = next((word for choice in choices if isinstance(word := choice.get("finish_reason"), str)), "")
    delta = [choice.get("delta") for choice in choices]
    is_role = any(isinstance(each, dict) and "role" in each for each in delta)
    return Chunk(any(map(_has_text, choices)), bool(choices) and not is_role, finish[:40], usage)


def read_usage(fields: Any) -> Usage | None:
    """OpenAI's `usage`; None where there is none. A count that is no count is one the server did not give."""
    if not isinstance(fields, dict):
        return None
    details = fields.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(_count(fields.get("prompt_tokens")), _count(fields.get("completion_tokens")), _count(cached))


def message(error: Any) -> str:
    """The words of an error as OpenAI or others shape it, on one line, never empty."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error.get("error") or error
    if isinstance(error, dict):
        error = error.get("message") or error
    return " ".join(str(error).split())[:_MESSAGE] or "no message"


def _has_text(choice: dict[str, Any]) -> bool:
    if isinstance(text := choice.get("text"), str) and text:
        return True
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return False
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))


def _is_null(payload: bytes, key: bytes) -> bool:
    at = payload.find(key)
    return at < 0 or payload[at + len(key) :].lstrip()[:4] == b"null"


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < MAX_COUNT else None
