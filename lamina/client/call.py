"""One call of a client: its prompts, submitted to an engine, and the outputs that come back.

`Call` is the one body of the blocking, the streaming and the asynchronous methods of `LLM`. `EmbeddingCall` is the same
for calls whose answers are embeddings. `AsyncOutputs` brings the outputs from the engine's thread to an asyncio event
loop.
"""

from __future__ import annotations

import asyncio
import os
import queue
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

from lamina.client.input_processor import InputProcessor, Prompts, check_dimensions, embedding
from lamina.client.interface import Delivery
from lamina.client.output_processor import OutputProcessor
from lamina.completions import Completion, Embedding, Interrupted, TokenEvent
from lamina.messages.engine_request import EngineOutput, EngineRequest, ignore_outputs
from lamina.system.child_process import check_process
from lamina.system.progress import Progress

if TYPE_CHECKING:
    from lamina.client.interface import EngineClient
    from lamina.text.tokenizer import Tokenizer

_LONG_PREFILL = 2048  # tokens of all prompts from which progress is reported
_TOGETHER = 512  # outputs of a request that are delivered at once, where those of a whole sample need not be


class Serving(Protocol):
    """What a call needs of a running model."""

    @property
    def engine(self) -> EngineClient: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def progress(self) -> Progress | None: ...


class Call:
    """The prompts of one call. It is used once, in one of four ways, which submit the requests:

    `result()` blocks; `await` is the same for event loops. Both give one completion if the call is for `one` prompt,
    else a list. `for` and `async for` give the events as they come. However these are left, what has not ended is
    aborted. A request that failed raises its error. Ctrl-C in `result()` raises Interrupted.

    `submit`, `take` and `abort` are for callers that wait in their own way. The call keeps its `owner` alive until it
    is over. In a process that is forked meanwhile each raises EngineError, and aborts nothing.
    """

    def __init__(
        self, serving: Serving, requests: Sequence[EngineRequest], one: bool = False, owner: object = None
    ) -> None:
        self._engine = engine = serving.engine
        self._process = os.getpid()
        self._progress = serving.progress
        self._requests = requests
        self._one = one
        self._owner = owner
        self._open = len(requests)
        self._put: Callable[[Delivery], None]
        self._streamed = True
        self._buffers: dict[str, list[EngineOutput]] = {request.id: [] for request in requests}
        self._processors = {
            request.id: OutputProcessor(index, request, serving.tokenizer, partial(_stop, engine, request))
            for index, request in enumerate(requests)
        }

    def result(self) -> Completion | list[Completion]:
        outputs: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.submit(outputs.put, streamed=False)
        try:
            while not self.done:
                self._check_process()
                self.take(outputs.get())
        except KeyboardInterrupt as interrupt:
            while not outputs.empty():
                self.take(outputs.get())
            raise Interrupted(self.finished()) from interrupt
        finally:
            self.abort()
        return self._result()

    def __iter__(self) -> Iterator[TokenEvent]:
        outputs: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.submit(outputs.put, streamed=True)
        try:
            while not self.done:
                self._check_process()
                yield from self.take(outputs.get())
        finally:
            self.abort()

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self._events(streamed=True)

    def __await__(self) -> Generator[Any, None, Completion | list[Completion]]:
        return self._awaited().__await__()

    async def _awaited(self) -> Completion | list[Completion]:
        async for _ in self._events(streamed=False):
            pass
        return self._result()

    async def _events(self, streamed: bool) -> AsyncIterator[TokenEvent]:
        outputs = AsyncOutputs()
        self.submit(outputs.put, streamed)
        try:
            while not self.done:
                self._check_process()
                for event in self.take(await outputs.get()):
                    yield event
        finally:
            self.abort()

    def _result(self) -> Completion | list[Completion]:
        return self.completions()[0] if self._one else self.completions()

    def submit(self, put: Callable[[Delivery], None], streamed: bool) -> None:
        """Submit all requests. `put` gets what the engine delivers, on the engine's thread, and must not block.

        Outputs are held back until there are many or a sample has ended, unless they are `streamed` or stop strings
        must be found: to wake the caller for each token would take a core from the engine.
        """
        self._check_process()
        self._put, self._streamed = put, streamed
        now = time.monotonic()
        for request in self._requests:
            request.submitted = now
            request.sink = self._deliver if streamed or request.params.stop else self._hold
        if self._progress is not None:
            _follow_prefill(self._requests, self._progress)
        try:
            for request in self._requests:
                self._engine.submit(request)
        except BaseException:
            self.abort()
            raise

    @property
    def done(self) -> bool:
        """Whether every prompt has all of its completion."""
        return self._open == 0

    def take(self, delivery: Delivery) -> list[TokenEvent]:
        """The events of one delivery, with log probabilities where they are streamed: else the completions have them.
        Raises the request's error where it failed."""
        request, outputs = delivery
        processor = self._processors[request.id]
        was_done = processor.done
        events = list(processor.take(outputs, self._streamed))
        self._open -= processor.done and not was_done
        return events

    def completions(self) -> list[Completion]:
        """All completions as they stand, in the order of the prompts."""
        return [processor.completion() for processor in self._processors.values()]

    def pooled(self) -> list[tuple[float, ...]]:
        """The sums of hidden states, in the order of the prompts, where these were asked for."""
        return [processor.pooled for processor in self._processors.values()]

    def finished(self) -> list[Completion | None]:
        """Like `completions`, but None where a prompt has not ended."""
        return [self.completion(request) if self.ended(request) else None for request in self._requests]

    def completion(self, request: EngineRequest) -> Completion:
        """A prompt's completion as it stands."""
        return self._processors[request.id].completion()

    def ended(self, request: EngineRequest) -> bool:
        """Whether a prompt has all of its completion."""
        return self._processors[request.id].done

    def abort(self) -> None:
        """The call is over: end what has not ended."""
        self._owner = None
        if self._process != os.getpid():  # it goes on where it was made
            return
        for request in self._requests:
            # Else call and request would keep each other, and all outputs, until a garbage collection.
            request.sink = ignore_outputs
            if not self._processors[request.id].done:
                self._engine.abort(request)

    def _check_process(self) -> None:
        check_process(self._process, "this call")

    def _deliver(self, request: EngineRequest, outputs: list[EngineOutput]) -> None:
        self._put((request, outputs))

    def _hold(self, request: EngineRequest, outputs: list[EngineOutput]) -> None:
        buffer = self._buffers[request.id]
        buffer += outputs
        over = any(output.finish_reason is not None or output.error is not None for output in outputs)
        if over or len(buffer) >= _TOGETHER:
            self._buffers[request.id] = []
            self._deliver(request, buffer)


def _stop(engine: EngineClient, request: EngineRequest, sample: int) -> None:
    engine.abort(request, sample, "stop")


def _follow_prefill(requests: Sequence[EngineRequest], progress: Progress) -> None:
    """Report to `progress` how many tokens of all prompts are computed, where there are many."""
    total = sum(len(request.request.prompt) for request in requests)
    done: dict[str, int] = {}

    def follower(request_id: str) -> Callable[[int, int], None]:
        def prefilled(computed: int, _length: int) -> None:
            done[request_id] = max(computed, done.get(request_id, 0))  # a preempted request computes again
            progress("reading the prompt", sum(done.values()), total)

        return prefilled

    if total > _LONG_PREFILL:
        for request in requests:
            request.prefilled = follower(request.id)


class EmbeddingCall:
    """The inputs of one call, checked. It is used once: `result()` blocks, `await` is the same for event loops. Both
    give one embedding if the call is for one input, else a list."""

    def __init__(
        self,
        serving: Serving,
        processor: InputProcessor,
        inputs: Prompts,
        pooling: str,
        dimensions: int | None,
        normalize: bool,
        priority: int,
        owner: object = None,
    ) -> None:
        self._size, self._normalize = check_dimensions(dimensions), normalize
        prepared = processor.prompts(inputs)
        self._one = prepared.one
        self._requests = processor.embeddings(prepared.prompts, pooling, priority)
        self._call = Call(serving, self._requests, prepared.one, owner)

    def result(self) -> Embedding | list[Embedding]:
        self._call.result()
        return self._result()

    def __await__(self) -> Generator[Any, None, Embedding | list[Embedding]]:
        yield from self._call.__await__()
        return self._result()

    def _result(self) -> Embedding | list[Embedding]:
        embeddings = [
            Embedding(embedding(request, pooled, self._size, self._normalize), len(request.request.prompt))
            for request, pooled in zip(self._requests, self._call.pooled(), strict=True)
        ]
        return embeddings[0] if self._one else embeddings


class AsyncOutputs:
    """A queue of the running event loop that other threads fill. One task takes from it.

    `get` raises asyncio.TimeoutError once `seconds` have passed since the queue was made and it is empty. A queue with
    `seconds` must be closed.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._waker = _Waker.of(self._loop)
        self._items: deque[Delivery] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._late = False
        self._timer = None if seconds is None else self._loop.call_later(max(0.0, seconds), self._expire)

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Delivery) -> None:
        self._items.append(item)
        self._waker.wake_for(self)

    async def get(self) -> Delivery:
        while not self._items and not self._late:
            self._waiting = self._loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        if not self._items:
            raise asyncio.TimeoutError
        return self._items.popleft()

    def get_nowait(self) -> Delivery | None:
        return self._items.popleft() if self._items else None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def wake(self) -> None:
        """Wake the task that waits in `get`, if there is one. For the event loop's thread."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _expire(self) -> None:
        self._late = True
        self.wake()


class _Waker:
    """Wakes an event loop once for all queues that are filled in a row: a batch fills one for each of its requests."""

    _known: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, _Waker]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        # Weak, or a loop that ends before it runs what was called would keep its queues, their requests and the engine.
        self._filled: deque[weakref.ref[AsyncOutputs]] = deque()
        self._called = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _Waker:
        """The waker of that loop. For the loop's thread."""
        waker = cls._known.get(loop)
        if waker is None:
            waker = cls._known[loop] = cls(loop)
        return waker

    def wake_for(self, queue: AsyncOutputs) -> None:
        """Wake the loop because `queue` was filled. For any thread."""
        self._filled.append(weakref.ref(queue))
        if not self._called and (loop := self._loop()) is not None:
            self._called = True
            with suppress(RuntimeError):  # the loop was closed, so no task waits
                loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._called = False  # first, so that a thread that fills a queue from now on calls again
        while self._filled:
            queue = self._filled.popleft()()
            if queue is not None:
                queue.wake()
