"""A server with OpenAI's API and no model: it streams words with known delays, or fails in a known way.

For the benchmark's tests; and by itself, to see what the benchmark's client costs:
`python tests/support/mock_openai_server.py --ttft 0.02 --itl 0.01`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

NAME = "mock-model"


@dataclass
class Behaviour:
    """How to answer. Times are seconds. `fails` gives for a request's number how it goes wrong, "" for well."""

    ttft: float = 0.0
    itl: float = 0.0
    tokens_a_chunk: int = 1
    usage: bool = True
    cached: int | None = None
    context: int | None = 4096
    models: bool = True
    tokenize: str = "vllm"  # or llama.cpp, or "" for none
    around: int = 1  # tokens around any prompt
    cost: Callable[[str], int] = lambda word: 1  # tokens of a word
    spaced: bool = True  # JSON with spaces after colons
    stops_after: int | None = None
    key: str | None = None
    fails: Callable[[int], str] = lambda number: ""
    requests: list[dict[str, Any]] = field(default_factory=list)

    def count(self, text: str) -> int:
        return sum(map(self.cost, text.split())) + self.around


class MockServer:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.number = 0
        self.active = 0
        self.most_active = 0
        self.given_up = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_post("/v1/completions", self.complete)
        return app

    async def models(self, request: web.Request) -> web.Response:
        if not self.behaviour.models:
            return error(404, "no such path")
        entry = {"id": NAME, "object": "model"}
        if self.behaviour.context:
            entry["max_model_len"] = self.behaviour.context
        return web.json_response({"object": "list", "data": [entry]})

    async def tokenize(self, request: web.Request) -> web.Response:
        fields = await request.json()
        if self.behaviour.tokenize == "vllm" and set(fields) == {"model", "prompt"}:
            count = self.behaviour.count(fields["prompt"])
            return web.json_response({"count": count, "tokens": [0] * count, "max_model_len": 1})
        if self.behaviour.tokenize == "llama.cpp" and "content" in fields:
            return web.json_response({"tokens": [0] * self.behaviour.count(fields["content"])})
        return error(404, "no such path")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        own, self.number = self.number, self.number + 1
        fields = await request.json()
        self.behaviour.requests.append(fields)
        if self.behaviour.key is not None and request.headers.get("Authorization") != f"Bearer {self.behaviour.key}":
            return error(401, "wrong key")
        self.active += 1
        self.most_active = max(self.active, self.most_active)
        try:
            return await self.answer(request, fields, self.behaviour.fails(own))
        except (ConnectionResetError, asyncio.CancelledError):
            self.given_up += 1
            raise
        finally:
            self.active -= 1

    async def answer(self, request: web.Request, fields: dict[str, Any], failure: str) -> web.StreamResponse:
        behaviour, is_chat = self.behaviour, "messages" in fields
        text = fields["messages"][0]["content"] if is_chat else fields["prompt"]
        tokens = min(fields["max_tokens"], behaviour.stops_after or 1 << 30)
        usage: dict[str, Any] = {"prompt_tokens": behaviour.count(text), "completion_tokens": tokens}
        if behaviour.cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": behaviour.cached}
        if failure.isdigit():
            return error(int(failure), "told to fail")
        if failure == "redirect":
            raise web.HTTPTemporaryRedirect("/v1/models")
        if failure == "not a stream" or not fields["stream"]:
            return web.json_response({"choices": [{"text": " hello"}], **({"usage": usage} if behaviour.usage else {})})
        if failure == "huge body":
            return web.Response(status=500, body=b"x" * (17 << 20))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if failure == "hang":
            await asyncio.sleep(60)
        async for event in self.events(is_chat, tokens, failure):
            await response.write(event)
            if event == b"disconnect":
                request.transport.abort()
                return response
        if failure != "no end":
            wanted = fields.get("stream_options", {}).get("include_usage")
            if wanted and behaviour.usage:
                await response.write(self.event({"choices": [], "usage": usage}))
            await response.write(b"data: [DONE]\n\n")
        if failure == "late disconnect":
            request.transport.abort()
            return response
        await response.write_eof()
        return response

    async def events(self, is_chat: bool, tokens: int, failure: str) -> AsyncIterator[bytes]:
        behaviour = self.behaviour
        await asyncio.sleep(behaviour.ttft)
        if is_chat:
            yield self.chunk({"delta": {"role": "assistant", "content": ""}})
        sent = 0
        while sent < tokens:
            if sent == min(3, tokens - 1) and failure not in ("", "late disconnect"):
                yield {
                    "malformed": b"data: {malformed}\n\n",
                    "error chunk": b'data: {"error": {"message": "the engine died"}}\n\n',
                    "disconnect": b"disconnect",
                    "no end": b": ping\n\n",
                    "no text": b"",
                }[failure]
            step = min(behaviour.tokens_a_chunk, tokens - sent)
            sent += step
            piece = "" if failure == "no text" else ' "x\\' * step
            last = {"finish_reason": "length" if sent >= tokens and failure != "no end" else None}
            yield self.chunk(({"delta": {"content": piece}} if is_chat else {"text": piece}) | last)
            if behaviour.itl and sent < tokens:
                await asyncio.sleep(behaviour.itl * step)

    def chunk(self, choice: dict[str, Any]) -> bytes:
        return self.event({"id": "1", "model": NAME, "choices": [{"index": 0, **choice}], "usage": None})

    def event(self, fields: dict[str, Any]) -> bytes:
        separators = (", ", ": ") if self.behaviour.spaced else (",", ":")
        return f"data: {json.dumps(fields, separators=separators)}\n\n".encode()


def error(status: int, words: str) -> web.Response:
    return web.json_response({"error": {"message": words, "type": "mock", "code": status}}, status=status)


@contextlib.asynccontextmanager
async def serving(behaviour: Behaviour) -> AsyncIterator[tuple[str, MockServer]]:
    """A server on this event loop: its address and itself."""
    mock = MockServer(behaviour)
    runner = web.AppRunner(mock.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}", mock
    finally:
        await runner.cleanup()


@contextlib.contextmanager
def serving_in_thread(behaviour: Behaviour) -> Iterator[tuple[str, MockServer]]:
    """A server on an event loop of its own: for commands, which have theirs."""
    loop = asyncio.new_event_loop()
    found: list[tuple[str, MockServer]] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def live() -> None:
        async with serving(behaviour) as server:
            found.append(server)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(live()))
    thread.start()
    try:
        if not ready.wait(10):
            raise TimeoutError("the mock server does not start")
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ttft", type=float, default=0.0)
    parser.add_argument("--itl", type=float, default=0.0)
    parser.add_argument("--tokens-a-chunk", type=int, default=1)
    args = parser.parse_args()
    behaviour = Behaviour(ttft=args.ttft, itl=args.itl, tokens_a_chunk=args.tokens_a_chunk)
    async with serving(behaviour) as (url, _):
        sys.stdout.write(url + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
