"""uvicorn's HTTP protocol with limits that it lacks: how large a request's head may be, and how long it may take.

Knows bytes and time of one connection; knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 << 10  # bytes of request line and headers
HEAD_TIMEOUT = 20.0  # seconds from the connection, or from a head's first byte, until its last
BODY_TIMEOUT = 60.0  # seconds without a byte of a body that has begun

_TOO_LARGE = "431 Request Header Fields Too Large"
_TOO_SLOW = "408 Request Timeout"
_MALFORMED = "400 Bad Request"


class LimitedProtocol(HttpToolsProtocol):
    """Answers a head that is too large with 431 and one that takes too long with 408, in OpenAI's shape, and closes."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._head = 0  # bytes of the head that is arriving
        self._in_body = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._arm(HEAD_TIMEOUT)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_body:
            self._arm(BODY_TIMEOUT)
        else:
            if self._timer is None:
                self._arm(HEAD_TIMEOUT)
            self._head += len(data)
            # A body may come with its head; a head may not be larger than what comes before its end is seen.
            if self._head > MAX_HEAD and b"\r\n\r\n" not in data[: MAX_HEAD + 4]:
                self._refuse(_TOO_LARGE, f"the headers have more than {MAX_HEAD} bytes")
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._head, self._in_body = 0, True
        self._arm(BODY_TIMEOUT)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        self._disarm()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(_MALFORMED, "this is no HTTP request")

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse(_TOO_SLOW, "the request took too long to arrive")

    def _refuse(self, status: str, message: str) -> None:
        """Answer, unless another answer is under way, and close."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = f'{{"error":{{"message":"{message}","type":"invalid_request_error","param":null,"code":null}}}}'
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
        self.transport.close()
