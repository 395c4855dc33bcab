"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, and which status stands for what.

Knows the tree of errors and HTTP's statuses; knows no engine and no connection.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from lamina.errors import ContextTooLong, EngineError, InvalidRequest, LaminaError, ModelFileError
from lamina.server.frontend import DeadlineExceeded, EngineUnavailable

RETRY_AFTER = 1  # seconds after which one that was told to come back may do so

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "too_many_requests",
    500: "internal_error",
    503: "engine_unavailable",
    504: "timeout",
}


class ApiError(LaminaError):
    """What a client is told: a status, and what to say. `param` names the field that is wrong, if one is."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code or _CODES.get(status)
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        """The body, as plain data."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        """The body, as JSON."""
        return json.dumps(self.content).encode()


def overloaded(message: str) -> ApiError:
    """The client may come back in a moment."""
    return ApiError(429, message, headers={"Retry-After": str(RETRY_AFTER)})


def refused(param: str, value: object, allowed: str) -> ApiError:
    """A field has a value that is not allowed."""
    return ApiError(400, f"{param} is {shown(value)}; allowed is {allowed}", param)


def shown(value: object) -> str:
    """A value as errors show it: never long, whatever it is."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:60]!r}... ({len(value)} characters)"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int) and value.bit_length() > 128:  # printing a huge integer is itself an error in Python
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    return repr(value)[:80]


def translated(error: LaminaError, fields: Collection[str] = (), ready: bool = True) -> ApiError:
    """What to tell the client. `fields` are the names of the request's fields: the one that the message names first is
    `param`. `ready`: whether the engine still serves others."""
    message = str(error)
    match error:
        case ApiError():
            return error
        case ContextTooLong():
            return ApiError(400, message, "prompt", "context_length_exceeded")
        case InvalidRequest():
            return ApiError(400, message, _named(message, fields))
        case ModelFileError():  # of a chat template: what a client sent made it fail, or the model has none
            return ApiError(400, message, "messages", "chat_template_error")
        case DeadlineExceeded():
            return ApiError(504, message)
        case EngineUnavailable():
            return ApiError(503, message, headers={"Retry-After": str(RETRY_AFTER)})
        case EngineError() if not ready:
            return ApiError(503, f"the engine has stopped: {message}", headers={"Retry-After": str(RETRY_AFTER)})
    return ApiError(500, message)


def _named(message: str, fields: Collection[str]) -> str | None:
    """The field that a message is about: the first that it names."""
    return next((word for word in re.findall(r"[a-z_]+", message[:200]) if word in fields), None)
