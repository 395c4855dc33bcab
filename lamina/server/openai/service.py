"""What the routes share: a request's body is read and checked, its time limit kept, and its prompts submitted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from lamina.completions import Completion, TokenEvent
from lamina.errors import LaminaError
from lamina.messages.engine_request import EngineRequest
from lamina.server.frontend import DeadlineExceeded, Frontend, Generation, Served
from lamina.server.http.errors import ApiError, overloaded, refused, shown, translated
from lamina.server.http.gate import REQUEST_ID, TENANT, Metrics
from lamina.server.http.limits import MAX_BODIES, BodyMemory, check_media_type, parse_object
from lamina.server.openai.schemas import ChatRequest, CompletionRequest, TokenizeRequest, read
from lamina.server.settings import ServerSettings

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

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
    """What the routes of one server work with. `close` ends its threads."""

    def __init__(self, frontend: Frontend, settings: ServerSettings, metrics: Metrics) -> None:
        self.frontend = frontend
        self.settings = settings
        self.metrics = metrics
        self._pool = ThreadPoolExecutor(_THREADS, "lamina-requests")
        self._parsing = ThreadPoolExecutor(1, "lamina-bodies")  # large ones: two together would need twice the memory
        self._bodies = BodyMemory(max(MAX_BODIES, 2 * settings.max_body))
        self._preparing = 0

    def close(self) -> None:
        """Let the threads end, without waiting for them."""
        for pool in (self._pool, self._parsing):
            pool.shutdown(wait=False, cancel_futures=True)

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

    async def _on_thread(
        self, pool: ThreadPoolExecutor, context: RequestContext, work: Callable[..., T], *arguments: Any
    ) -> T:
        if self._preparing >= self.settings.max_requests:
            raise overloaded(f"{self._preparing} requests are being read; come back in a moment")
        self._preparing += 1
        try:
            future = asyncio.get_running_loop().run_in_executor(pool, work, *arguments)
            return await asyncio.wait_for(future, context.left())
        except (TimeoutError, asyncio.TimeoutError):
            raise DeadlineExceeded(f"the request took longer than its {context.timeout:g} seconds") from None
        finally:
            self._preparing -= 1

    def served(self, prompts: int, n: int) -> Served:
        """The loaded model, if there is room for `n` samples per prompt. Raises EngineUnavailable, ApiError."""
        served = self.frontend.served
        most, active = self.settings.max_requests, self.frontend.active
        if prompts * n > most:
            raise ApiError(
                400,
                f"prompt has {prompts} prompts and n is {n}, which makes {prompts * n} samples; allowed are {most}",
                "n" if prompts == 1 else "prompt",
            )
        if active + prompts * n > most:
            raise overloaded(f"{active} of {most} samples are under way; come back in a moment")
        return served

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

    def _begin(self, requests: Sequence[EngineRequest], context: RequestContext, streamed: bool) -> Generation:
        """Submit requests, if there is still room. The result must be entered at once."""
        self.served(len(requests), requests[0].request.n)
        return self.frontend.begin(requests, context.left(), streamed, context.timeout)

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
