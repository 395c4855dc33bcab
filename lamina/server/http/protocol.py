"""uvicorn's HTTP protocol with bounds: on the methods, on a request's head, trailers and body in bytes and seconds, and
on the connections of a server. A request for a protocol upgrade gets a normal answer.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from lamina.server.http.errors import ApiError

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")  # all others are refused at the first line
MAX_HEAD = 32 << 10  # bytes of request line and headers; also of chunk headers and trailers around pieces of a body
MAX_HEADERS = 128
MAX_PIPELINED = 16  # requests that wait on one connection for the answers before theirs
MAX_AHEAD = 64 << 10  # bytes of such requests; reading goes on beside them, else nobody would see that a client leaves
HEAD_TIMEOUT = 20.0  # seconds from the connection, or from a head's first byte, until its last
BODY_TIMEOUT = 60.0  # seconds from a head until its body's last byte
WRITE_TIMEOUT = 60.0  # seconds between two looks at what waits for a client, which must read some of it in between
LINGER = 1.0  # seconds for which bytes that nobody needs are read and dropped, so that the client can read its answer

_OF_THE_UPGRADE = (b"upgrade", b"connection", b"http2-settings")
_ROOM = 8  # where all connections are taken, one of so many that wait for their clients is closed


class _Refused(Exception):
    """The parser is to stop: the request is answered with `error`."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(str(error))
        self.error = error


class LimitedProtocol(HttpToolsProtocol):
    """Answers a request beyond the bounds with an error in OpenAI's shape, and closes.

    Trailers are read and dropped: as headers they would bypass the checks of the head. A request for an upgrade, such
    as Java's and curl's clients send for HTTP/2, is answered like one without it. A server with `limit_concurrency`
    connections closes those that have waited longest for their clients, so that another one can come.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._capacity, self.limit_concurrency = self.limit_concurrency, None  # uvicorn would refuse requests instead
        self.url = b""  # uvicorn sets it when a request begins, and errors may come before
        self._bare = 0  # bytes of the head that is arriving, or since the last piece of a body
        self._ahead = 0  # bytes since a request began to wait for the answers before its own
        self._in_body = False
        self._upgrading = False
        self._refused = False  # what still arrives is dropped
        self._since = self.loop.time()  # when this connection began to wait for its client
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._answered: RequestResponseCycle | None = None  # the request that the application answers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        capacity = self._capacity
        if capacity is not None and len(self.connections) > capacity and not self._make_room(capacity):
            self._refuse(ApiError(503, f"all {capacity} connections are taken", code="too_many_connections"))
            return
        self._arm(HEAD_TIMEOUT)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._unwatch()
        super().resume_writing()
        self.pipeline.clear()
        super().connection_lost(exc)  # which tells only the newest request
        if self._answered is not None:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def data_received(self, data: bytes) -> None:
        if not self._in_body and not self._bare:
            data = data.lstrip(b"\r\n")  # RFC 9112, 2.2: old clients send it after a request
        if self._refused or not data:
            return
        self._unset_keepalive_if_required()
        self._ahead = self._ahead + len(data) if self.pipeline else 0
        if self._ahead > MAX_AHEAD:
            self._refuse(_too_early())
            return
        self._bare += len(data)
        # A body may arrive together with its head, so only bytes without the end of a head count against the limit.
        if not self._in_body:
            if self._bare > MAX_HEAD and b"\r\n\r\n" not in data[: MAX_HEAD + 4]:
                self._refuse(ApiError(431, f"the headers have more than {MAX_HEAD} bytes"))
                return
            if self._timer is None and not self._answering:
                self._arm(HEAD_TIMEOUT)
        try:
            while data:
                data = self._parse(data)
        except httptools.HttpParserError as error:
            refusal = error.__context__
            self._refuse(refusal.error if isinstance(refusal, _Refused) else ApiError(400, "this is no HTTP request"))
            return
        if self._in_body and self._bare > MAX_HEAD:
            self._refuse(ApiError(431, f"there are more than {MAX_HEAD} bytes between two pieces of the body"))

    def _parse(self, data: bytes) -> bytes:
        """What is to be parsed next: nothing, or a head without its request for an upgrade and all that follows it."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._without_upgrade() + data[upgrade.args[0] :]
        return b""

    def on_url(self, url: bytes) -> None:
        method = self.parser.get_method().decode()
        if method not in METHODS:
            allowed = ", ".join(METHODS)
            raise _Refused(ApiError(405, f"the method is {method}; allowed are {allowed}", headers={"Allow": allowed}))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_body:
            return
        if len(self.headers) >= MAX_HEADERS:
            raise _Refused(ApiError(431, f"there are more than {MAX_HEADERS} headers, which are allowed"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._upgrading = True  # the parser stops here, and leaves the body unread
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _Refused(ApiError(429, f"{MAX_PIPELINED} requests wait on this connection, which are allowed"))
        self._unset_keepalive_if_required()
        self._bare, self._in_body = 0, True
        self._arm(BODY_TIMEOUT)
        super().on_headers_complete()
        if self.pipeline:
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        self._bare = 0
        if self.pipeline and len(self.cycle.body) + len(body) > MAX_AHEAD:
            raise _Refused(_too_early())
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        self._bare, self._in_body = 0, False
        self._disarm()
        super().on_message_complete()
        if self.cycle.response_complete:  # a body that nobody needed has come after its answer
            self._keep_alive()

    def on_response_complete(self) -> None:
        was_last = not self.pipeline
        self._since = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing() or (self._refused and was_last):
            self._close()
        elif self._in_body and self.cycle.response_complete:
            self._unset_keepalive_if_required()
            self._arm(LINGER)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():  # else the last bytes have to leave too
            self._unwatch()

    @property
    def _answering(self) -> bool:
        """Whether a request has arrived completely and its response has not been sent completely."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _without_upgrade(self) -> bytes:
        """The head without its request for an upgrade, which then cannot be one again."""
        self._upgrading, self._bare = False, 0
        headers = [name + b": " + value for name, value in self.headers if name not in _OF_THE_UPGRADE]
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        line = b" ".join([method, self.url, b"HTTP/" + version])
        self.parser = httptools.HttpRequestParser(self)
        return b"\r\n".join([line, *headers, b"", b""])

    # Time.

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _keep_alive(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _watch(self) -> None:
        """Abort once nothing of what waits for the client has left for a while. Nothing else tells that bytes leave."""
        self._unwatch()
        self._stalled = self.loop.call_later(WRITE_TIMEOUT, self._look, self.transport.get_write_buffer_size())

    def _unwatch(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _look(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch()
        else:
            self.transport.abort()

    def _late(self) -> None:
        self._timer = None
        if self.pipeline:  # an earlier answer is under way
            self._arm(BODY_TIMEOUT)
        elif self._refused or (self._in_body and self.cycle.response_complete):
            self._close()
        else:
            self._refuse(ApiError(408, "the request took too long to arrive"))

    # The end of a connection.

    def _refuse(self, error: ApiError) -> None:
        """Answer and close. Where other answers are under way, close after them; what still arrives is dropped."""
        self._disarm()
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        cycle = self.cycle
        if self._answering:
            cycle.keep_alive = False
            return
        if self.pipeline:
            self.pipeline.popleft()  # the last request, which has not come whole
            return
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self._close()
                return
        body = error.body(self.url.partition(b"?")[0].decode("latin-1"))
        head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
        head += "".join(f"{name.lower()}: {value}\r\n" for name, value in error.headers.items())
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.write_eof()
        self._arm(LINGER)

    def _close(self) -> None:
        """Close, in a while even if the client does not read what was sent to it."""
        self._disarm()
        self.transport.close()
        self._watch()

    def _make_room(self, capacity: int) -> bool:
        """Close the connections that have waited longest for their clients, where more than `capacity` stay otherwise:
        of several that come at once, the first makes room for all. False where none of them waits."""
        staying = [peer for peer in self.connections if not peer.transport.is_closing()]
        if len(staying) <= capacity:
            return True
        waiting = [peer for peer in staying if isinstance(peer, LimitedProtocol) and peer._waits]
        waiting.remove(self)
        waiting.sort(key=lambda peer: peer._since)
        for peer in waiting[: len(waiting) // _ROOM + 1]:
            peer.transport.abort()
        return bool(waiting)

    @property
    def _waits(self) -> bool:
        """Whether nothing is being answered: the connection waits for its client, or for its end."""
        cycle = self.cycle
        return not self.pipeline and (cycle is None or cycle.more_body or cycle.response_complete)


def _too_early() -> ApiError:
    return ApiError(429, f"more than {MAX_AHEAD} bytes came before the answer to an earlier request")
