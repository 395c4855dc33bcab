"""The HTTP side of a benchmark (`Client`): one server with OpenAI's API, requests, and when the parts of their answers
came.

It uses aiohttp. The server is not trusted: lines, bodies and times are bounded, redirects are not followed.

`Answer` follows one streamed answer as its bytes come: when its chunks came, how it ended or failed. `EventStream` cuts
server-sent events out of the bytes, and `parse` reads the content of one. These are pure: the caller gives the times.

A client that measures shares its cores with the server it measures. So a chunk that is plainly a piece of text is never
parsed: four searches in its bytes recognise it (`plainly_text`). Any other chunk is parsed as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from lamina.errors import EngineError, InvalidRequest, ProtocolError
from lamina.measure.bench.measures import Outcome
from lamina.measure.bench.workloads import ENDPOINTS

MAX_BODY = 16 << 20
"""Bytes of an answer that is no stream."""
_ASK = 30.0  # seconds for questions before the run
_IDLE = 2.0  # seconds that a connection is kept: less than servers do, so that none closes as it is used again


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

    async def __aexit__(self, *_: object) -> None:
        if self._opened is not None:
            await self._opened.close()

    async def models(self) -> dict[str, int | None]:
        """The models of the server, each with its context in tokens where the server reports it. Raises EngineError
        where it does not answer."""
        answer = await self._ask("GET", "/v1/models")
        listed = answer.get("data")
        if not isinstance(listed, list):
            raise EngineError(f"{self.base_url}/v1/models has no list of models")
        entries = [entry for entry in listed[:1000] if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        return {entry["id"]: _count(entry.get("max_model_len")) or None for entry in entries}

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
        self,
        endpoint: str,
        body: bytes,
        *,
        due: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
        planned: int = 0,
        asked: int = 0,
    ) -> Outcome:
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
            due,
            sent,
            ended,
            answer.chunks,
            planned,
            asked,
            **asdict(answer.usage),
            finish=answer.finish,
            error=answer.error,
            detail=answer.detail,
        )

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


MAX_STREAM = 1 << 28
"""Bytes of one stream."""
MAX_CHUNKS = 1 << 22


class Answer:
    """`chunks`: when each chunk with text came; `ended`: when the last event did. `error` names a failure, `detail` has
    its words. After `done` further bytes are ignored."""

    def __init__(self, sent: float) -> None:
        self.chunks = array("d")
        self.ended = sent
        self.finish = ""
        self.usage = Usage()
        self.error = ""
        self.detail = ""
        self.done = False
        self._stream = EventStream()
        self._length = 0
        self._silent: float | None = None  # the first chunk without text: all tokens of an answer may be special ones

    def take(self, data: bytes, at: float) -> None:
        """Bytes that came at a time. Raises ProtocolError where they are no stream of a completion, or too many."""
        self._length += len(data)
        if self._length > MAX_STREAM or len(self.chunks) > MAX_CHUNKS:
            raise ProtocolError(f"the stream has more than {MAX_STREAM} bytes or {MAX_CHUNKS} chunks")
        if self.done:
            return
        for payload in self._stream.feed(data):
            if plainly_text(payload):
                self.chunks.append(at)
                self.ended = at
            elif payload == DONE or self._ends(payload, at):
                self.done = True
                return

    def close(self) -> None:
        """The stream has ended."""
        if self.error:
            return
        if not self.done and not self.finish:
            self.fail("ended early", "the stream ended without a finish_reason or [DONE]")
        elif not self.chunks and self._silent is not None:
            self.chunks.append(self._silent)
        elif not self.chunks:
            self.fail("no tokens", "the stream had no text")

    def fail(self, error: str, detail: str) -> None:
        self.error, self.detail = error, detail[:300]

    def _ends(self, payload: bytes, at: float) -> bool:
        """Whether nothing counts after this event."""
        chunk = parse(payload)
        if chunk.error:
            self.fail("error in the stream", chunk.error)
            return True
        if chunk.text:
            self.chunks.append(at)
        elif chunk.output and self._silent is None:
            self._silent = at
        self.finish, self.usage, self.ended = chunk.finish or self.finish, chunk.usage or self.usage, at
        return False


MAX_LINE = 1 << 18
"""Bytes of one line. A chunk of one token has some hundred; with 20 log probabilities some thousand."""
DONE = b"[DONE]"
MAX_COUNT = 1 << 31
_MESSAGE = 200  # characters of an error that are kept


class EventStream:
    """Cuts bytes into the payloads of `data:` lines. OpenAI's events have one each; other lines are left out."""

    def __init__(self, most: int = MAX_LINE) -> None:
        self._limit = most
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
        if self._length > self._limit:
            raise ProtocolError(f"a line of the stream has more than {self._limit} bytes")
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
    place = payload.find(_KEYS[0])
    key = _KEYS[0]
    if place < 0:
        key = _KEYS[1]
        place = payload.find(key)
        if place < 0:
            return False
    place += len(key)
    if payload[place : place + 1] == b" ":
        place += 1
    if payload[place : place + 1] != b'"' or payload[place + 1 : place + 2] == b'"':
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
    is_role = any(isinstance(part, dict) and "role" in part for part in delta)
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
    place = payload.find(key)
    return place < 0 or payload[place + len(key) :].lstrip()[:4] == b"null"


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < MAX_COUNT else None
