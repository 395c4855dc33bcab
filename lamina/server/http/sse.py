"""Server-sent events, and work that is cancelled when its client disconnects."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lamina.errors import LaminaError
from lamina.server.http.errors import ApiError
from lamina.server.http.limits import ClientGone

logger = logging.getLogger("lamina")

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # else nginx would buffer events
]


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], seconds: float) -> T:
    """The result of `work`. Where the client disconnects, or `seconds` are over because it reads too slowly, the work
    is cancelled and ClientGone raised. To be called after the body was read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        unfinished = {future for future in (task, watch) if not future.done()}
        for future in unfinished:
            future.cancel()
        if unfinished:
            await asyncio.wait(unfinished)  # the work releases what it holds before this returns
        for future in (task, watch):
            if not future.cancelled():
                future.exception()  # retrieved, else asyncio logs it


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come; each piece of bytes is whole frames. The headers are sent with the first piece: an
    error before it has a status of its own, a later error becomes an event. The response may take `seconds`.

    `failed` writes that event, `last` is the end of every stream: by default OpenAI's for chats.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        seconds: float,
        translate: Callable[[LaminaError], ApiError],
        failed: Callable[[ApiError], bytes] | None = None,
        last: bytes = DONE,
    ) -> None:
        super().__init__()
        self._frames = frames
        self._seconds = seconds
        self._translate = translate
        self._written = failed or _failed
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        old = scope.get("http_version") == "1.0"  # which has no chunks, and servers differ in what they do instead
        with suppress(ClientGone):
            await while_connected(receive, self._send_whole(send) if old else self._send(send), self._seconds)

    async def _send(self, send: Send) -> None:
        started = False
        async with aclosing(self._to_the_end()) as pieces:
            async for piece in pieces:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self._start()})
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_whole(self, send: Send) -> None:
        async with aclosing(self._to_the_end()) as pieces:
            body = b"".join([piece async for piece in pieces])
        headers = [*self._start(), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _to_the_end(self) -> AsyncGenerator[bytes, None]:
        """The frames, then the stream's end. An error becomes a frame, unless it comes first: then it is raised."""
        started = False
        async with aclosing(self._frames) as frames:
            try:
                async for piece in frames:
                    started = True
                    yield piece
                last = self._last
            except Exception as error:  # of any kind: the client needs an end of the stream
                if not started:
                    raise
                last = self._failed(error)
        if last:
            yield last

    def _start(self) -> list[tuple[bytes, bytes]]:
        headers = [header for header in self.raw_headers if header[0] not in (b"content-length", b"content-type")]
        return [*_HEADERS, *headers]

    def _failed(self, error: Exception) -> bytes:
        if isinstance(error, LaminaError):
            response = self._translate(error)
        else:
            logger.error("a stream failed", exc_info=error)
            response = ApiError(500, "the server could not go on with this request")
        return self._written(response) + self._last


def _failed(error: ApiError) -> bytes:
    return event(error.content)


def event(content: Any, name: str | None = None) -> bytes:
    """One event with JSON data, and perhaps a name."""
    return json_event(json.dumps(content, separators=(",", ":")), name)


def json_event(written: str, name: str | None = None) -> bytes:
    """One event whose data is JSON already."""
    data = b"data: " + written.encode() + b"\n\n"
    return data if name is None else b"event: " + name.encode() + b"\n" + data
