"""uvicorn's HTTP protocol with three additions: limits on a request's head and trailers, in bytes and seconds; whole
responses even if bytes that are no HTTP follow the request; normal answers to requests for a protocol upgrade.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lamina.server.http.errors import ApiError

MAX_HEAD = 64 << 10  # bytes of request line and headers; also of chunk headers and trailers around pieces of a body
HEAD_TIMEOUT = 20.0  # seconds from the connection, or from a head's first byte, until its last
BODY_TIMEOUT = 60.0  # seconds without a byte of a body that has begun

_OF_THE_UPGRADE = (b"upgrade", b"connection", b"http2-settings")


class LimitedProtocol(HttpToolsProtocol):
    """Answers a head that is too large with 431, and one that takes too long with 408, in OpenAI's shape, and closes.

    Trailers are read and dropped: as headers they would bypass the checks of the head. A request for an upgrade, such
    as Java's and curl's clients send for HTTP/2, is answered like one without it.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._bare = 0  # bytes of the head that is arriving, or since the last piece of a body
        self._in_body = False
        self._upgrading = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._arm(HEAD_TIMEOUT)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._in_body and not self._bare:
            data = data.lstrip(b"\r\n")  # RFC 9112, 2.2: old clients send it after a request
            if not data:
                return
        self._unset_keepalive_if_required()
        self._bare += len(data)
        # A body may arrive together with its head, so only bytes without the end of a head count against the limit.
        if not self._in_body:
            if self._bare > MAX_HEAD and b"\r\n\r\n" not in data[: MAX_HEAD + 4]:
                self._refuse(431, f"the headers have more than {MAX_HEAD} bytes")
                return
            if self._timer is None and not self._answering:
                self._arm(HEAD_TIMEOUT)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(400, "this is no HTTP request")
        else:
            if self._in_body and self._bare > MAX_HEAD:
                self._refuse(431, f"there are more than {MAX_HEAD} bytes between two pieces of the body")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._upgrading = True  # the parser stops here, and leaves the body unread
            return
        self._bare, self._in_body = 0, True
        self._arm(BODY_TIMEOUT)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._bare = 0
        self._arm(BODY_TIMEOUT)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        self._bare, self._in_body = 0, False
        self._disarm()
        super().on_message_complete()

    @property
    def _answering(self) -> bool:
        """Whether a request has arrived completely and its response has not been sent completely."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _go_on_without(self, rest: bytes) -> None:
        """Parse the head again without its request for an upgrade, and then what follows it."""
        self._upgrading, self._bare = False, 0
        kept = [name + b": " + value for name, value in self.headers if name not in _OF_THE_UPGRADE]
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        line = b" ".join([method, self.url, b"HTTP/" + version])
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([line, *kept, b"", b""]) + rest)

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        self._refuse(408, "the request took too long to arrive")

    def _refuse(self, status: int, message: str) -> None:
        """Answer and close. If another response is under way, read no more and close after it."""
        self._disarm()
        if self.transport.is_closing():
            return
        if self._answering:
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = ApiError(status, message).body
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()
