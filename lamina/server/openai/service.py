"""What the routes share: a request's body is read and checked, its time limit kept, and its prompts submitted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from lamina.completions import Completion, TokenEvent
from lamina.errors import LaminaError
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.server.frontend import DeadlineExceeded, Frontend, Generation, Served
from lamina.server.http.errors import ApiError, overloaded, refused, shown, translated
from lamina.server.http.gate import REQUEST_ID, Metrics
from lamina.server.http.limits import MAX_BODIES, BodyMemory, check_media_type, parse_object
from lamina.server.openai.schemas import ChatRequest, CompletionRequest, TokenizeRequest, read
from lamina.server.preparation import PreparationPool
from lamina.server.settings import TENANT, ServerSettings
from lamina.server.shares import KeyShares

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

MAX_PARAMETERS = 64 << 20
"""Bytes of the sampling parameters (schemas, grammars, stop strings) of all requests under way or waiting. The HTTP
process and the engine's have them, once a prompt."""

GRACE = 5.0  # seconds beyond a request's time limit, to send the error that it took too long

_LARGE = 1 << 16  # bytes from which a body is parsed on a thread, not on the event loop
_FIELDS = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys() | TokenizeRequest.model_fields.keys()
_THREADS = 4  # to parse, render templates and tokenise


@dataclass(frozen=True, slots=True)
class RequestContext:
    """The id, tenant and time limit of one HTTP request. `timeout` in seconds; `end` is a time of the event loop's
    clock."""

    id: str
    tenant: str
    timeout: float
    end: float

    def left(self) -> float:
        """The seconds left. Raises DeadlineExceeded where there are none."""
        left = self.end - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineExceeded(f"the request took longer than its {self.timeout:g} seconds")
        return left


class Writer(Protocol):
    """Writes the frames of one stream."""

    def events(self, events: Sequence[TokenEvent]) -> bytes:
        """The frames of events; perhaps none."""

    def end(self, completions: Sequence[Completion]) -> bytes:
        """The last frames: the ends of samples without a last token, and the usage."""


class Service:
    """What the routes of one server work with. `samples`: what each key may have under way. `close` ends the
    threads."""

    def __init__(self, frontend: Frontend, settings: ServerSettings, metrics: Metrics) -> None:
        self.frontend = frontend
        self.settings = settings
        self.metrics = metrics
        self._bodies = BodyMemory(max(MAX_BODIES, 2 * settings.max_body))
        keys, most = settings.tenants, settings.max_requests
        self.samples = KeyShares(most, keys)
        self._parameters = KeyShares(MAX_PARAMETERS, keys)
        self._pool = PreparationPool("lamina-requests", _THREADS, most, keys)
        # One thread each: two large bodies would need twice the memory, and grammars are compiled one at a time.
        self._parsing = PreparationPool("lamina-bodies", 1, most, keys)
        self._compiling = PreparationPool("lamina-grammars", 1, most, keys)

    def close(self) -> None:
        """Let the threads end, without waiting for them."""
        for pool in (self._pool, self._parsing, self._compiling):
            pool.close()

    def context(self, request: Request) -> RequestContext:
        """The context of a request, from its headers."""
        timeout = self.settings.request_timeout
        if (text := request.headers.get("x-request-timeout")) is not None:
            timeout = min(timeout, _seconds(text))
        end = asyncio.get_running_loop().time() + timeout
        return RequestContext(request.scope[REQUEST_ID], request.scope[TENANT], timeout, end)

    async def read(self, request: Request, model: type[M], context: RequestContext) -> M:
        """A request's fields, checked as far as possible without the model."""
        check_media_type(request.headers.get("content-type", ""))
        async with self._bodies.body(request.receive, request.headers, self.settings.max_body) as body:
            if len(body) < _LARGE:
                return self._read(body, model)
            return await self._on_thread(self._parsing, context, self._read, body, model)

    def _read(self, body: bytearray, model: type[M]) -> M:
        fields = parse_object(body)
        name = fields.get("model")
        if isinstance(name, str) and name != self.settings.model:
            raise self.unknown_model(name)
        return read(model, fields)

    def unknown_model(self, name: str) -> ApiError:
        """Status 404: there is no such model."""
        return ApiError(
            404, f"the model {shown(name)} is not served here; {self.settings.model!r} is", "model", "model_not_found"
        )

    async def prepare(self, context: RequestContext, work: Callable[..., T], *arguments: Any) -> T:
        """The result of `work(*arguments)`, which runs on a thread and within the request's time limit."""
        return await self._on_thread(self._pool, context, work, *arguments)

    async def compile(self, context: RequestContext, served: Served, params: SamplingParams) -> None:
        """Compile the schema or grammar of a request that has one."""
        if params.constrained:
            await self._on_thread(self._compiling, context, served.inputs.compile, params)

    async def _on_thread(
        self, pool: PreparationPool, context: RequestContext, work: Callable[..., T], *arguments: Any
    ) -> T:
        left = context.left()
        try:
            return await asyncio.wait_for(pool.run(context.tenant, partial(work, *arguments)), left)
        except (TimeoutError, asyncio.TimeoutError):
            raise DeadlineExceeded(f"the request took longer than its {context.timeout:g} seconds") from None

    def served(self, context: RequestContext, prompts: int, n: int) -> Served:
        """The loaded model, if the request's key has room for `n` samples per prompt. Raises EngineUnavailable,
        ApiError."""
        served = self.frontend.served
        most = self.samples.most
        if prompts * n > most:
            raise ApiError(
                400,
                f"prompt has {prompts} prompts and n is {n}, which makes {prompts * n} samples; allowed are {most}",
                "n" if prompts == 1 else "prompt",
            )
        if not self.samples.fits(context.tenant, prompts * n):
            held = self.samples.held(context.tenant)
            what = f"{held} of {most} samples are under way, and there is no room for {prompts * n} more"
            raise overloaded(f"{what}; come back in a moment")
        return served

    def check_priority(self, context: RequestContext, priority: int | None) -> None:
        """Raises ApiError where a request would go before those of other keys, and its key may not."""
        if priority is not None and priority < 0 and not self.settings.is_operator(context.tenant):
            raise refused("priority", priority, "0 or more, but for keys of the operator")

    async def whole(self, requests: Sequence[EngineRequest], context: RequestContext) -> list[Completion]:
        """The completions of requests, once all of them have ended."""
        async with self._begin(requests, context, streamed=False) as generation:
            async for _ in generation:
                pass
            return generation.completions()

    async def frames(
        self, requests: Sequence[EngineRequest], context: RequestContext, writer: Writer
    ) -> AsyncGenerator[bytes, None]:
        """Whole frames of server-sent events, as they come."""
        async with self._begin(requests, context, streamed=True) as generation:
            async for events in generation:
                if frames := writer.events(events):
                    yield frames
            completions = generation.completions()
        yield writer.end(completions)

    @asynccontextmanager
    async def _begin(
        self, requests: Sequence[EngineRequest], context: RequestContext, streamed: bool
    ) -> AsyncIterator[Generation]:
        """Submit requests as their key's, if there is still room."""
        n, shares, key = requests[0].request.n, self.samples, context.tenant
        self.served(context, len(requests), n)
        size = self._parameter_size(requests, key)
        samples = len(requests) * n
        shares.take(key, samples)
        self._parameters.take(key, size)
        try:
            for request in requests:
                request.request = replace(request.request, tenant=key)
                self.frontend.owners[request.id] = key
            async with self.frontend.begin(requests, context.left(), streamed, context.timeout) as generation:
                yield generation
        finally:
            for request in requests:
                self.frontend.owners.pop(request.id, None)
            shares.give(key, samples)
            self._parameters.give(key, size)

    def _parameter_size(self, requests: Sequence[EngineRequest], key: str) -> int:
        """The bytes of the sampling parameters of requests, if there is room for them. Raises ApiError."""
        size, most = len(requests) * requests[0].params.size, self._parameters.most
        if size > most:
            raise ApiError(
                400,
                f"prompt has {len(requests)} prompts, each with {requests[0].params.size} bytes of schemas, grammars, "
                f"stop strings and logit_bias; allowed are {most} bytes in all",
                "prompt",
            )
        if not self._parameters.fits(key, size):
            raise overloaded("the schemas and grammars of requests under way leave no room; come back in a moment")
        return size

    def translate(self, error: LaminaError) -> ApiError:
        """The response for an error."""
        return translated(error, _FIELDS, self.frontend.state != "dead")

    def salt(self, context: RequestContext, cache_salt: str | None) -> tuple[str, str]:
        """The salt of a request: requests with different salts share no cached prefix."""
        return (context.tenant, cache_salt or "")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise refused("X-Request-Timeout", text, "a number of seconds above 0")
    return seconds
