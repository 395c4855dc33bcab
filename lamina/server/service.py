"""What the routes share: a request's body is read and checked, its time limit kept, and its prompts submitted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from lamina.completions import Completion, TokenEvent
from lamina.errors import LaminaError
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.server.chat.chat_input import ChatInput
from lamina.server.chat.preparing import PreparedChat, prepared
from lamina.server.chat.sampling import blaming
from lamina.server.frontend import DeadlineExceeded, Generation, Reading, Served
from lamina.server.http.errors import ApiError, overloaded, refused, shown, translated
from lamina.server.http.fields import read
from lamina.server.http.gate import AT_END, REQUEST_ID, Metrics
from lamina.server.http.limits import MAX_BODIES, BodyMemory, check_media_type, parse_object
from lamina.server.http.sse import while_connected
from lamina.server.models import Models, ServedModel
from lamina.server.preparation import PreparationPool
from lamina.server.settings import TENANT, ServerSettings
from lamina.server.shares import KeyShares

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

MAX_PARAMETERS = 64 << 20
"""Bytes of the sampling parameters (schemas, grammars, stop strings) and of the log probabilities of prompts of all
requests under way or waiting, and of what routes keep for their answers. The HTTP process and the engine's have the
former, once a prompt."""

MAX_WAITING = 32 << 20
"""Bytes of the bodies of requests that wait for their model. Others arrive meanwhile, whose models are loaded."""

GRACE = 5.0  # seconds beyond a request's time limit, to send the error that it took too long

PING = 10.0  # seconds without a token after which a stream says that it is still there

_LARGE = 1 << 16  # bytes from which a body is parsed on a thread, not on the event loop
_SHOWN = 10  # names of models in an error
_THREADS = 4  # to parse, render templates and tokenise


@dataclass(slots=True)
class RequestContext:
    """The id, tenant and time limit of one HTTP request, and the model that it is for, the first one until
    `Service.read` knows it. `timeout` in seconds; `end` is a time of the event loop's clock."""

    id: str
    tenant: str
    timeout: float
    end: float
    model: ServedModel

    @property
    def served(self) -> Served:
        """The loaded model. Raises EngineUnavailable."""
        return self.model.frontend.served

    def left(self) -> float:
        """The seconds left. Raises DeadlineExceeded where there are none."""
        seconds = self.end - asyncio.get_running_loop().time()
        if seconds <= 0:
            raise DeadlineExceeded(f"the request took longer than its {self.timeout:g} seconds")
        return seconds


class Writer(Protocol):
    """Writes the frames of one stream."""

    def events(self, events: Sequence[TokenEvent]) -> bytes:
        """The frames of events; perhaps none."""

    def end(self, completions: Sequence[Completion]) -> bytes:
        """The last frames: the ends of samples without a last token, and the usage."""


class Service:
    """What the routes of one server work with. `fields`: the names of requests' fields, which errors may blame.
    `samples`: what each key may have under way. `close` ends the threads."""

    def __init__(
        self, models: Models, settings: ServerSettings, metrics: Metrics, fields: Collection[str] = ()
    ) -> None:
        self.models = models
        self.settings = settings
        self.metrics = metrics
        self._fields = fields
        self._bodies = BodyMemory(max(MAX_BODIES, 2 * settings.max_body))
        keys, requests = settings.tenants, settings.max_requests
        self.samples = KeyShares(requests, keys)
        self._parameters = KeyShares(MAX_PARAMETERS, keys)
        self._waiting = KeyShares(requests, keys)  # requests that wait for their model
        self._waiting_bytes = KeyShares(max(MAX_WAITING, 2 * settings.max_body), keys)  # of their bodies
        self._pool = PreparationPool("lamina-requests", _THREADS, requests, keys)
        # One thread each: two large bodies would need twice the memory, and grammars are compiled one at a time.
        self._parsing = PreparationPool("lamina-bodies", 1, requests, keys)
        self._compiling = PreparationPool("lamina-grammars", 1, requests, keys)
        # Answers wait for no prompt of others, and small ones for no large one of another key.
        self._answering = PreparationPool("lamina-answers", _THREADS, requests, keys)

    def close(self) -> None:
        """Let the threads end, without waiting for them."""
        for pool in (self._pool, self._parsing, self._compiling, self._answering):
            pool.close()

    def context(self, request: Request) -> RequestContext:
        timeout = self.settings.request_timeout
        if (text := request.headers.get("x-request-timeout")) is not None:
            timeout = min(timeout, _seconds(text))
        end = asyncio.get_running_loop().time() + timeout
        return RequestContext(request.scope[REQUEST_ID], request.scope[TENANT], timeout, end, self.models.first)

    async def read(self, request: Request, model: type[M], context: RequestContext) -> M:
        """A request's fields, checked as far as possible without the model, which is loaded then."""
        check_media_type(request.headers.get("content-type", ""))
        async with self._bodies.body(request.receive, request.headers, self.settings.max_body) as body:
            size = len(body)
            if size < _LARGE:
                name, fields = self._read(body, model)
            else:
                name, fields = await self._on_thread(self._parsing, context, self._read, body, model)
        await self.load(request, name, context, size)
        return fields

    def _read(self, body: bytearray, model: type[M]) -> tuple[str, M]:
        fields = parse_object(body)
        name = fields.get("model")
        served_name = self.settings.named(name if isinstance(name, str) else None)
        if served_name is None:
            raise self.unknown_model(str(name))
        return served_name, read(model, fields)

    async def load(self, request: Request, name: str, context: RequestContext, size: int = 0) -> None:
        """Set the request's model, once it is loaded; it stays until the response has ended. The request's body had
        `size` bytes. Raises EngineUnavailable where it cannot be loaded, DeadlineExceeded, ClientGone, and ApiError
        where too many requests wait."""
        key = context.tenant
        if not self._waiting.fits(key) or not self._waiting_bytes.fits(key, size):
            raise overloaded(f"{self._waiting.held(key)} requests wait for models; come back in a moment")
        with self._waiting.taken(key), self._waiting_bytes.taken(key, size):
            taking = self._take(request, name, context)
            if self.models.on_demand:
                await while_connected(request.receive, taking, context.timeout + GRACE)
            else:
                await taking

    async def _take(self, request: Request, name: str, context: RequestContext) -> None:
        context.model = await self.models.take(name, context.left())
        request.scope[AT_END].append(partial(self.models.give, context.model))  # before anything can cancel this

    def unknown_model(self, name: str) -> ApiError:
        """Status 404: there is no such model."""
        names = [repr(name) for name in self.settings.models]
        served = f"{names[0]} is" if len(names) == 1 else f"{', '.join(names[:_SHOWN])} are"
        return ApiError(404, f"the model {shown(name)} is not served here; {served}", "model", "model_not_found")

    async def prepare(self, context: RequestContext, work: Callable[..., T], *arguments: Any) -> T:
        """The result of `work(*arguments)`, which runs on a thread and within the request's time limit."""
        return await self._on_thread(self._pool, context, work, *arguments)

    async def answer(self, context: RequestContext, work: Callable[..., T], *arguments: Any) -> T:
        """The same of work that reads or writes a whole answer: a model writes what a client wants it to, in any
        length."""
        return await self._on_thread(self._answering, context, work, *arguments)

    async def prepare_chat(
        self, context: RequestContext, served: Served, read: Callable[[], ChatInput]
    ) -> PreparedChat:
        """A chat with all checks done, before anything is submitted. `read` reads it from a request, on a thread."""

        def work() -> PreparedChat:
            chat = read()
            return prepared(chat, served, self.salt(context, chat.cache_salt))

        prepared_chat = await self.prepare(context, work)
        with blaming(prepared_chat.structure_field):
            await self.compile(context, served, prepared_chat.params)
        return prepared_chat

    async def compile(self, context: RequestContext, served: Served, params: SamplingParams) -> None:
        """Compile the schema or grammar of a request that has one."""
        if params.constrained:
            await self._on_thread(self._compiling, context, served.inputs.compile, params)

    async def _on_thread(
        self, pool: PreparationPool, context: RequestContext, work: Callable[..., T], *arguments: Any
    ) -> T:
        seconds = context.left()
        try:
            return await asyncio.wait_for(pool.run(context.tenant, partial(work, *arguments)), seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise DeadlineExceeded(f"the request took longer than its {context.timeout:g} seconds") from None

    def served(self, context: RequestContext, prompts: int, n: int) -> Served:
        """The loaded model, if the request's key has room for `n` samples per prompt. Raises EngineUnavailable,
        ApiError."""
        served = context.served
        limit = self.samples.most
        if prompts * n > limit:
            raise ApiError(
                400,
                f"prompt has {prompts} prompts and n is {n}, which makes {prompts * n} samples; allowed are {limit}",
                "n" if prompts == 1 else "prompt",
            )
        if not self.samples.fits(context.tenant, prompts * n):
            count = self.samples.held(context.tenant)
            what = f"{count} of {limit} samples are under way, and there is no room for {prompts * n} more"
            raise overloaded(f"{what}; come back in a moment")
        return served

    def check_priority(self, context: RequestContext, priority: int | None) -> None:
        """Raises ApiError where a request would go before those of other keys, and its key may not."""
        if priority is not None and priority < 0 and not self.settings.is_operator(context.tenant):
            raise refused("priority", priority, "0 or more, but for keys of the operator")

    async def whole(
        self,
        requests: Sequence[EngineRequest],
        context: RequestContext,
        work: Callable[[list[Completion]], T],
        kept: int = 0,
        token: int = 0,
    ) -> T:
        """What `work`, on a thread, makes of the completions of requests, once all of them have ended. `kept`: bytes
        that the route keeps meanwhile, `token`: that it makes of each token. Raises ApiError where the latter find no
        room."""
        reading = partial(self.answer, context)
        with self.growing(context.tenant) as grow:
            async with self._begin(requests, context, reading, kept) as generation:
                async for events in generation:
                    grow(token * len(events))
                return await self.answer(context, lambda: work(generation.completions()))

    @contextmanager
    def growing(self, key: str) -> Iterator[Callable[[int], None]]:
        """Counts bytes for a key as an answer grows, until it is written."""
        size, shares = 0, self._parameters

        def grow(more: int) -> None:
            nonlocal size
            if size + more > shares.most:
                raise ApiError(400, f"the answer has more than {shares.most} bytes, which are allowed")
            if not shares.fits(key, more):
                raise overloaded("answers under way leave no room; come back in a moment")
            shares.take(key, more)
            size += more

        try:
            yield grow
        finally:
            shares.give(key, size)

    async def pooled(self, requests: Sequence[EngineRequest], context: RequestContext) -> list[tuple[float, ...]]:
        """The sums of hidden states that requests ask for, once all of them have ended."""
        async with self._begin(requests, context, partial(self.answer, context), 0) as generation:
            async for _ in generation:
                pass
            return generation.pooled()

    async def frames(
        self,
        requests: Sequence[EngineRequest],
        context: RequestContext,
        writer: Writer,
        begin: bytes = b"",
        ping: bytes = b"",
        kept: int = 0,
        token: int = 0,
    ) -> AsyncGenerator[bytes, None]:
        """Whole frames of server-sent events, as they come: `begin` once the requests are submitted, `ping` whenever
        nothing came for a while. `kept`: bytes that the route keeps meanwhile, `token`: that it keeps of each token."""
        with self.growing(context.tenant) as grow:
            async with self._begin(requests, context, None, kept) as generation:
                if begin:
                    yield begin
                async for events in _with_pauses(generation) if ping else generation:
                    grow(token * len(events))
                    if frames := writer.events(events) if events else ping:
                        yield frames
                completions = generation.completions()
            yield writer.end(completions)

    @asynccontextmanager
    async def _begin(
        self, requests: Sequence[EngineRequest], context: RequestContext, reading: Reading | None, kept: int
    ) -> AsyncIterator[Generation]:
        """Submit requests as their key's, if there is still room."""
        frontend = context.model.frontend
        n, key = requests[0].request.n, context.tenant
        self.served(context, len(requests), n)
        size = self._parameter_size(requests, key, kept)
        with self.samples.taken(key, len(requests) * n), self._parameters.taken(key, size):
            try:
                for request in requests:
                    request.request = replace(request.request, tenant=key)
                    frontend.owners[request.id] = key
                async with frontend.begin(requests, context.left(), reading, context.timeout) as generation:
                    yield generation
            finally:
                for request in requests:
                    frontend.owners.pop(request.id, None)

    def _parameter_size(self, requests: Sequence[EngineRequest], key: str, kept: int) -> int:
        """The bytes of the sampling parameters of requests, of what is reported of their prompts and what is kept
        beside them, if there is room for them. Raises ApiError."""
        size, room = sum(request.size for request in requests) + kept, self._parameters.most
        if size > room:
            raise ApiError(
                400,
                f"prompt has {len(requests)} prompts and n is {requests[0].request.n}, with {size} bytes of schemas, "
                f"grammars, stop strings, logit_bias and log probabilities of prompts; allowed are {room} bytes in all",
                "prompt",
            )
        if not self._parameters.fits(key, size):
            raise overloaded("the schemas and prompts of requests under way leave no room; come back in a moment")
        return size

    def translate(self, error: LaminaError) -> ApiError:
        return translated(error, self._fields, all(model.frontend.state != "dead" for model in self.models))

    def salt(self, context: RequestContext, cache_salt: str | None) -> tuple[str, str]:
        """The salt of a request: requests with different salts share no cached prefix."""
        return (context.tenant, cache_salt or "")


async def _with_pauses(generation: Generation) -> AsyncGenerator[list[TokenEvent], None]:
    """The lists of events, and an empty one whenever nothing came for a while."""
    while True:
        coming = asyncio.ensure_future(anext(generation))
        try:
            while not (await asyncio.wait({coming}, timeout=PING))[0]:
                yield []
            yield coming.result()
        except StopAsyncIteration:
            return
        finally:
            coming.cancel()


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise refused("X-Request-Timeout", text, "a number of seconds above 0")
    return seconds
