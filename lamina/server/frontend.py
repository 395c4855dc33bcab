"""The engine as the HTTP process sees it: its state, and the requests under way."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, TypeAlias

from lamina.client.call import AsyncOutputs, Call
from lamina.client.input_processor import InputProcessor
from lamina.client.interface import Delivery, EngineClient
from lamina.completions import Completion, TokenEvent
from lamina.config import EngineConfig
from lamina.errors import EngineError, LaminaError
from lamina.messages.engine_request import EngineRequest
from lamina.messages.snapshot import Snapshot
from lamina.text.tokenizer import Tokenizer
from lamina.version import __version__

State = Literal["loading", "ready", "halted", "draining", "dead", "unloaded"]

STATES: Mapping[State, str] = {
    "loading": "the engine is not ready yet",
    "ready": "the engine serves",
    "halted": "the engine waits for an attention worker or a model worker",
    "draining": "the server is about to end",
    "dead": "the engine is dead",
    "unloaded": "the model is not loaded; a request for it loads it",
}
"""What everybody may know of a state: nothing of files, hosts or causes."""

_SNAPSHOT_AGE = 0.2  # seconds for which a snapshot is used again
_TOGETHER = 512  # tokens and likely ones that are handed on together: more pile up where a client reads slowly
_FEW = 64  # outputs that are read at once where a thread would cost more than they do

Reading: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Awaits what some work returns that may take long for the event loop."""


class EngineUnavailable(EngineError):
    """The engine is loading, or dead."""


class DeadlineExceeded(LaminaError):
    """A request took longer than it may."""


class Observer(Protocol):
    """Is notified of what happens to requests. Times are in seconds, of this process's monotonic clock."""

    def first_token(self, seconds: float) -> None:
        """The first token of a prompt came `seconds` after the prompt's submission."""

    def next_tokens(self, seconds: float, count: int) -> None:
        """`count` further tokens of one sample came together, `seconds` after the previous token."""

    def ended(self, request: EngineRequest, completion: Completion, seconds: float) -> None:
        """A prompt has ended, `seconds` after its submission. `completion` has the reasons, `request` the settings."""

    def failed(self, request: EngineRequest, error: LaminaError) -> None:
        """A prompt ended with an error."""


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded model: its engine, its tokenizer, the processor of its inputs, and its `fingerprint`."""

    engine: EngineClient
    tokenizer: Tokenizer
    inputs: InputProcessor
    fingerprint: str | None = None
    progress: None = None


def fingerprint(model: str, config: EngineConfig) -> str:
    """`system_fingerprint`: the version, a hash of the model and all settings, and why equal requests may differ."""
    mark = hashlib.sha256(f"{model} {config}".encode("utf-8", "replace")).hexdigest()[:8]
    varies = "deterministic" if config.deterministic else "rounding-varies-with-cache-placement-batch"
    return f"lamina-{__version__}-{mark}-{varies}"


class Frontend:
    """One model and its engine, which may be lost and replaced, or unloaded. Any thread may call `ready`, `lost`,
    `begins` and `unloaded`, after which `changed` is called; the rest is for the event loop's thread."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.loading = ""  # how far the engine's start is, as text
        self.restarts = 0  # of the engine
        self.draining = False  # the server is about to end: new requests are refused
        self.active = 0  # samples under way or waiting
        self.owners: dict[str, str] = {}  # the tenant of each request under way, by the request's id
        self._served: Served | None = None
        self.changed: Callable[[], None] = lambda: None  # on any thread
        self._why = ""  # the engine is dead; empty while it is loading
        self._unloaded = False
        self._snapshot: tuple[float, Snapshot] | None = None
        self._asking: asyncio.Future[Snapshot] | None = None

    def ready(self, served: Served, restarts: int = 0) -> None:
        """An engine is there, after `restarts` restarts."""
        self._served, self._why, self._asking, self._unloaded = served, "", None, False
        self.restarts = restarts
        self.changed()

    def lost(self, why: str) -> None:
        """The engine is gone; a new one may follow."""
        self._served, self._why, self._asking = None, why, None  # the lost engine may never answer
        self.changed()

    def begins(self, loading: str = "") -> None:
        """An engine is being started; `loading` says how far that is."""
        self.loading = loading
        if self._unloaded:
            self._why, self._unloaded = "", False
            self.changed()

    def unloaded(self, why: str = "") -> None:
        """There is no engine, and none comes before the model is loaded. `why`: it could not be loaded."""
        self._served, self._why, self._asking, self._unloaded, self._snapshot = None, why, None, True, None
        self.changed()

    @property
    def state(self) -> State:
        """ "halted": the engine takes requests, which wait for an attention worker or a model worker."""
        served = self._served
        if served is not None:
            if not served.engine.alive:
                return "dead"
            return "draining" if self.draining else "halted" if served.engine.halted else "ready"
        return "unloaded" if self._unloaded else "dead" if self._why else "loading"

    @property
    def why(self) -> str:
        """Why there is no engine: it died, or the model could not be loaded. Empty without such a cause."""
        return self._why

    @property
    def unavailable(self) -> str:
        """Why there is no model to serve: the engine is loading or dead, or the server drains. Empty where there is."""
        if self.draining:
            return "the server is about to end"
        if self._served is not None:
            return ""
        if self._unloaded:
            return f"the model could not be loaded: {self._why}" if self._why else STATES["unloaded"]
        what = f"dead: {self._why}" if self._why else f"not ready yet{f': {self.loading}' if self.loading else ''}"
        return f"the engine is {what}"

    @property
    def served(self) -> Served:
        """The loaded model. Raises EngineUnavailable where there is none to serve."""
        served = self._served  # another thread may call `lost` meanwhile
        if served is None or self.draining:
            raise EngineUnavailable(f"{self.unavailable}; try again later")
        return served

    @property
    def max_model_len(self) -> int | None:
        """The most tokens of a prompt with its output; None where there is no model to serve."""
        try:
            return self.served.inputs.max_model_len
        except EngineUnavailable:
            return None

    def begin(
        self, requests: Sequence[EngineRequest], timeout: float, reading: Reading | None = None, of: float | None = None
    ) -> Generation:
        """Submit requests that must end within `timeout` seconds, what is left `of` their time limit. With `reading`,
        which reads long outputs, events are many at a time, which wakes the event loop less, and have no log
        probabilities. Raises EngineError."""
        return Generation(self, self.served, requests, timeout, reading, of or timeout)

    async def snapshot(self, timeout: float = 2.0) -> Snapshot | None:
        """The engine's snapshot. Where it does not answer within `timeout` seconds, the last one; None without one."""
        if self._snapshot is not None and time.monotonic() - self._snapshot[0] < _SNAPSHOT_AGE:
            return self._snapshot[1]
        try:
            asking, served = self._asking, self._served
            if (asking is None or asking.done()) and served is not None:
                asking = self._asking = self._ask(served)
            if asking is None:
                raise EngineUnavailable("there is no engine")
            snapshot = await asyncio.wait_for(asyncio.shield(asking), timeout)
            self._snapshot = time.monotonic(), snapshot
        except (TimeoutError, asyncio.TimeoutError, EngineError):
            pass
        return self._snapshot[1] if self._snapshot is not None else None

    def _ask(self, served: Served) -> asyncio.Future[Snapshot]:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Snapshot] = loop.create_future()

        def answer(snapshot: Snapshot) -> None:
            if not answered.done():
                answered.set_result(snapshot)

        def deliver(snapshot: Snapshot) -> None:
            loop.call_soon_threadsafe(answer, snapshot)

        served.engine.snapshot(deliver)
        return answered


class Generation:
    """Prompts under way: an asynchronous iterator over lists of events. It is used in `async with`, which aborts what
    has not ended, however it is left.

    Iterating raises the request's error where it failed, and DeadlineExceeded.
    """

    def __init__(
        self,
        frontend: Frontend,
        served: Served,
        requests: Sequence[EngineRequest],
        timeout: float,
        reading: Reading | None,
        of: float,
    ) -> None:
        self._frontend = frontend
        self._requests = requests
        self._limit = of
        self._outputs = AsyncOutputs(timeout)
        self._failure: LaminaError | None = None  # to be raised after the events that came with it
        self._reading = reading
        self._waiting: list[TokenEvent] = []  # that are still to be handed on
        self._together = max(1, _TOGETHER // (1 + (requests[0].params.logprobs or 0)))
        self._submitted = time.monotonic()
        try:
            self._call = Call(served, requests)
            self._call.submit(self._outputs.put, reading is None)
        except BaseException:
            self._outputs.close()
            raise
        self._last: dict[tuple[int, int], float] = {}  # by prompt and sample
        self._reported: set[str] = set()  # ids of requests whose end the observer was notified of
        frontend.active += sum(request.request.n for request in requests)

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._frontend.active -= sum(request.request.n for request in self._requests)
        self._outputs.close()
        self._call.abort()
        now = time.monotonic()
        for request in self._requests:
            if request.id in self._reported:
                continue
            if isinstance(error, LaminaError):
                self._frontend.observer.failed(request, error)
            else:
                self._frontend.observer.ended(request, self._call.completion(request), now - self._submitted)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        if self._waiting:
            await asyncio.sleep(0)
            return self._slice()
        if self._failure is not None:
            raise self._failure
        while not self._call.done:
            try:
                if len(self._outputs):
                    await asyncio.sleep(0)  # the event loop has others to serve
                delivery: Delivery | None = await self._outputs.get()
            except (TimeoutError, asyncio.TimeoutError):
                raise DeadlineExceeded(f"the request took longer than its {self._limit:g} seconds") from None
            events: list[TokenEvent] = []
            ended: list[tuple[EngineRequest, Completion]] = []
            while delivery is not None:
                try:
                    events += await self._read(delivery, ended)
                except LaminaError as error:
                    if not events:
                        raise
                    self._failure = error
                    break
                delivery = None if len(events) >= self._together else self._outputs.get_nowait()
            if self._reading is None:
                self._observe_tokens(events, time.monotonic())
            for request, completion in ended:
                self._observe(request, completion)
            self._waiting = events
            if events:
                return self._slice()
        raise StopAsyncIteration

    def _slice(self) -> list[TokenEvent]:
        """The next events, as many as are handed on together: those of a batch may be many, and dear to write."""
        count = self._together if self._reading is None else len(self._waiting)
        events, self._waiting = self._waiting[:count], self._waiting[count:]
        return events

    async def _read(self, delivery: Delivery, ended: list[tuple[EngineRequest, Completion]]) -> list[TokenEvent]:
        """The events of a delivery. Where it ends its prompt, that is added to those that have `ended`."""

        def taken() -> list[TokenEvent]:
            events = self._call.take(delivery)
            if request.id not in self._reported and self._call.ended(request):
                self._reported.add(request.id)
                ended.append((request, self._call.completion(request)))
            return events

        request, outputs = delivery
        if self._reading is None or len(outputs) <= _FEW:
            return taken()
        events: list[TokenEvent] = await self._reading(taken)
        return events

    def completions(self) -> list[Completion]:
        """The completions of all prompts so far, in order."""
        return self._call.completions()

    def pooled(self) -> list[tuple[float, ...]]:
        """The sums of hidden states of all prompts, in order, where these were asked for."""
        return self._call.pooled()

    def _observe(self, request: EngineRequest, completion: Completion) -> None:
        observer = self._frontend.observer
        if self._reading is not None:  # no token was seen as it came, so the times are the engine's
            timing = completion.timing
            observer.first_token(timing.first_token)
            if timing.tokens > 1:
                observer.next_tokens(timing.total - timing.first_token, timing.tokens - 1)
        observer.ended(request, completion, time.monotonic() - self._submitted)

    def _observe_tokens(self, events: Sequence[TokenEvent], now: float) -> None:
        observer = self._frontend.observer
        counts: dict[tuple[int, int], int] = {}
        for event in events:
            key = (event.prompt_index, event.sample_index)
            counts[key] = counts.get(key, 0) + 1
        for key, count in counts.items():
            before = self._last.get(key)
            if before is None:
                if not any(prompt == key[0] for prompt, _ in self._last):
                    observer.first_token(now - self._submitted)
                count -= 1
            if count:
                observer.next_tokens(now - (before or now), count)
            self._last[key] = now
