"""The HTTP side of a benchmark: one server with OpenAI's API, requests, and when the parts of their answers came.

It uses aiohttp. The server is not trusted: lines, bodies and times are bounded, redirects are not followed.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from lamina.errors import EngineError, InvalidRequest, ProtocolError
from lamina.measure.bench.answers import Answer
from lamina.measure.bench.measures import Outcome
from lamina.measure.bench.settings import ENDPOINTS
from lamina.measure.bench.sse import message, read_usage

MAX_BODY = 16 << 20
"""Bytes of an answer that is no stream."""
_ASK = 30.0  # seconds for questions before the run
_IDLE = 2.0  # seconds that a connection is kept: less than servers do, so that none closes as it is used again


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model of the server, and its context in tokens where the server reports it."""

    name: str
    context: int | None


class Client:
    """A server, and a session with it; to be used in `async with`. `timeout`: seconds that one request may take."""

    def __init__(self, base_url: str, api_key: str | None = None, timeout: float = 600.0) -> None:
        self.base_url = checked_url(base_url)
        if api_key is not None and not (0 < len(api_key) <= 4096 and api_key.isascii() and api_key.isprintable()):
            raise InvalidRequest(
                "the API key has characters that a header cannot carry; allowed are 1 to 4096 of ASCII"
            )
        if not 0.1 <= timeout <= 86400:
            raise InvalidRequest(f"timeout is {timeout!r}; allowed are 0.1 to 86400 seconds")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._opened: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE)
        self._opened = aiohttp.ClientSession(
            connector=connector,
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._opened is not None:
            await self._opened.close()

    async def models(self) -> list[ModelInfo]:
        """What the server serves. Raises EngineError where it does not answer."""
        answer = await self._ask("GET", "/v1/models")
        listed = answer.get("data")
        if not isinstance(listed, list):
            raise EngineError(f"{self.base_url}/v1/models has no list of models")
        found = []
        for each in listed[:1000]:
            if isinstance(each, dict) and isinstance(name := each.get("id"), str):
                context = each.get("max_model_len")
                found.append(ModelInfo(name, context if type(context) is int and 0 < context < 1 << 31 else None))
        return found

    async def tokenized(self, model: str, text: str) -> int:
        """How many tokens a text has, by /tokenize as vLLM and Lamina have it, or as llama.cpp has it. Raises
        EngineError where there is none."""
        try:
            answer = await self._ask("POST", "/tokenize", {"model": model, "prompt": text})
        except EngineError:
            answer = await self._ask("POST", "/tokenize", {"content": text})
        tokens = answer.get("tokens")
        count = len(tokens) if isinstance(tokens, list) else answer.get("count")
        if type(count) is not int or not 0 < count < 1 << 31:  # none: another field was read
            raise EngineError("/tokenize gave no tokens")
        return count

    async def counted(self, endpoint: str, model: str, text: str) -> int:
        """How many tokens a prompt has, by the usage of a request for one more. Raises EngineError."""
        fields = {**request_fields(endpoint, model, text, 1), "stream": False}
        usage = read_usage((await self._ask("POST", ENDPOINTS[endpoint], fields)).get("usage"))
        if usage is None or not usage.prompt:
            raise EngineError("the server reports no usage")
        return usage.prompt

    async def _ask(self, method: str, path: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
        url = self.base_url + path
        data = None if fields is None else json.dumps(fields).encode()
        wait = aiohttp.ClientTimeout(total=min(_ASK, self._timeout))
        try:
            async with self._session.request(method, url, data=data, timeout=wait, allow_redirects=False) as response:
                body = await _bounded(response)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            raise EngineError(f"{url} does not answer: {_kind(error)} ({_words(error)})") from error
        if response.status != 200:
            raise EngineError(f"{url} answers HTTP {response.status}: {_said(body)}")
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{url} answers what is not JSON: {body[:80]!r}") from error
        if not isinstance(answer, dict):
            raise EngineError(f"{url} answers {body[:80]!r}; expected an object")
        return answer

    async def send(
        self, endpoint: str, body: bytes, *, due: float = 0.0, clock: Callable[[], float] = time.perf_counter,
        planned: int = 0, asked: int = 0,
    ) -> Outcome:  # fmt: skip
        """One request with a streamed answer; `body` is JSON that asks for a stream. Never raises but when cancelled:
        what goes wrong is the outcome's error."""
        sent = clock()
        answer = Answer(sent)
        try:
            url = self.base_url + ENDPOINTS[endpoint]
            async with self._session.post(url, data=body, allow_redirects=False) as response:
                if response.status != 200:
                    answer.fail(f"HTTP {response.status}", _said(await _bounded(response)))
                elif response.content_type != "text/event-stream":
                    answer.fail("no stream", f"the answer is {response.content_type:.80}")
                else:
                    async for data in response.content.iter_any():  # to its end: the connection is used again
                        answer.take(data, clock())
                    answer.close()
        except ProtocolError as fault:
            answer.fail("malformed stream", str(fault))
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as fault:
            if answer.done:  # it was whole
                answer.close()
            else:
                answer.fail(_kind(fault), _words(fault))
        ended = clock() if answer.error else answer.ended
        return Outcome(
            due, sent, ended, answer.chunks, planned, asked, **asdict(answer.usage), finish=answer.finish,
            error=answer.error, detail=answer.detail,
        )  # fmt: skip

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            raise RuntimeError("a client that was not entered")
        return self._opened


def request_fields(endpoint: str, model: str, text: str, output: int, ignore_eos: bool = False) -> dict[str, Any]:
    """A request for so many tokens, streamed, greedy, with usage at its end."""
    fields: dict[str, Any] = {"model": model}
    if endpoint == "chat":
        # `max_tokens` is deprecated by OpenAI, and the only name that all other servers know.
        fields["messages"] = [{"role": "user", "content": text.strip()}]
    else:
        fields["prompt"] = text
    fields |= {"max_tokens": output, "temperature": 0, "stream": True}
    if ignore_eos:
        fields["ignore_eos"] = True
    return fields


def request_body(endpoint: str, model: str, text: str, output: int, ignore_eos: bool = False) -> bytes:
    """The JSON of `request_fields`, usage asked for."""
    fields = request_fields(endpoint, model, text, output, ignore_eos)
    return json.dumps({**fields, "stream_options": {"include_usage": True}}).encode()


def checked_url(text: str) -> str:
    """A server's root, without the /v1 that some write at its end. Raises InvalidRequest."""
    url = text.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 80) > 0
        fine = fine and not parts.query and not parts.fragment
        fine = fine and len(url) <= 2000 and url.isprintable() and " " not in url
    except ValueError:  # a port that is none
        fine = False
    if not fine:
        raise InvalidRequest(f"base-url is {text!r:.200}; allowed is such as http://127.0.0.1:8000")
    return url


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for data in response.content.iter_any():
        body += data
        if len(body) > MAX_BODY:
            raise ValueError(f"the answer has more than {MAX_BODY} bytes")
    return bytes(body)


def _said(body: bytes) -> str:
    """The message of an error answer."""
    try:
        return message(json.loads(body))
    except (ValueError, RecursionError):
        return message(body[:400].decode("utf-8", "replace"))


def _kind(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "cannot connect"
    if isinstance(error, (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
        return "disconnected"
    return "malformed answer" if isinstance(error, (aiohttp.ClientError, ValueError)) else "cannot connect"


def _words(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
        return os.strerror(error.os_error.errno)  # its own words have the address again, and how TLS was to be
    return " ".join(str(error).split())[:200] or type(error).__name__
