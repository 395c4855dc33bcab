"""Errors in OpenAI's shape, {"error": {"message", "type", "param", "code"}}, with a status for each error class
(`ApiError`). Anthropic's clients get them in Anthropic's shape.

`json_response` and `json_text` make an answer that is JSON as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from starlette.responses import Response

from lamina.errors import ContextTooLong, EngineError, InvalidRequest, LaminaError, ModelFileError, PolicyError
from lamina.server.frontend import DeadlineExceeded, EngineUnavailable

MESSAGES = "/v1/messages"
"""The path of Anthropic's clients, and the beginning of others."""
RETRY_AFTER = 1  # seconds after which a client may try again

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
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
    """An error response: its HTTP status and its fields. `param` names the field that is wrong, if one is."""

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
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def anthropic(self) -> dict[str, Any]:
        kind = _ANTHROPIC.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(self)}}

    def body(self, path: str = "") -> bytes:
        """The body as JSON, in the shape that clients of a path expect."""
        theirs = path == MESSAGES or path.startswith(f"{MESSAGES}/")
        return json.dumps(self.anthropic if theirs else self.content).encode()


def overloaded(message: str) -> ApiError:
    """Status 429: the client may try again in a moment."""
    return ApiError(429, message, headers={"Retry-After": str(RETRY_AFTER)})


def refused(param: str, value: object, allowed: str) -> ApiError:
    """Status 400: a field has a value that is not allowed."""
    return ApiError(400, f"{param} is {shown(value)}; allowed is {allowed}", param)


def shown(value: object) -> str:
    """A value as text for an error message, always short."""
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
    """The response for an error. `fields` are the names of a request's fields; the first one that the message contains
    becomes `param`. `ready`: whether the engine still serves requests."""
    message = str(error)
    match error:
        case ApiError():
            return error
        case ContextTooLong():
            return ApiError(400, message, "prompt", "context_length_exceeded")
        case InvalidRequest():
            return ApiError(400, message, _named(message, fields))
        case PolicyError():
            return ApiError(400, message, "policy")
        case ModelFileError():  # of a chat template: the client's messages made it fail, or the model has none
            return ApiError(400, message, "messages", "chat_template_error")
        case DeadlineExceeded():
            return ApiError(504, message)
        case EngineUnavailable():
            return ApiError(503, message, headers={"Retry-After": str(RETRY_AFTER)})
        case EngineError() if not ready:
            return ApiError(503, f"the engine has stopped: {message}", headers={"Retry-After": str(RETRY_AFTER)})
    return ApiError(500, message)


def _named(message: str, fields: Collection[str]) -> str | None:
    """The first of the fields that a message contains."""
    return next((word for word in re.findall(r"[a-z_]+", message[:200]) if word in fields), None)


def json_response(content: Any) -> Response:
    """A response with JSON in ASCII: text of requests and models may have half a surrogate pair, which UTF-8 cannot
    hold."""
    return json_text(json.dumps(content, separators=(",", ":")))


def json_text(content: str) -> Response:
    """What is JSON already, as a response."""
    return json_pieces([content])


def json_pieces(pieces: Iterable[str]) -> Response:
    """JSON in pieces, as a response: a long one stands only once in memory."""
    body = bytearray()
    for piece in pieces:
        body += piece.encode()
    return Response(memoryview(body), media_type="application/json")
