"""One call under way: its prompts, submitted, and what becomes of them.

Knows how outputs get from the engine's thread to the caller's; knows nothing of arguments, and waits for nothing: that
is what blocking and asynchronous callers do each in their way.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias
from weakref import WeakKeyDictionary

from lamina.completions import Completion, TokenEvent
from lamina.messages.engine_request import Output, Ticket
from lamina.outputs import Answer
from lamina.system.progress import Progress

if TYPE_CHECKING:
    from lamina.remote_engine import EngineClient
    from lamina.text.tokenizer import Tokenizer

Item: TypeAlias = tuple[Ticket, list[Output]]
_LONG_PREFILL = 2048  # tokens from which progress is told


class Serving(Protocol):
    """What a job needs of whatever runs a model."""

    @property
    def engine(self) -> EngineClient: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def progress(self) -> Progress | None: ...


class Job:
    """The prompts of one call, submitted. What the engine delivers comes through `inbox`; one thread takes it.

    Unless it is `streamed`, or stop strings must be looked for, outputs are held back until a sample has ended: waking
    the caller for each token would take a core from the engine.
    """

    def __init__(self, runtime: Serving, tickets: Sequence[Ticket], inbox: Any, streamed: bool) -> None:
        self.inbox = inbox
        self._held: dict[str, list[Output]] = {ticket.request.id: [] for ticket in tickets}
        self._engine = runtime.engine
        self._tickets = tickets
        self._open = len(tickets)
        now = time.monotonic()
        for ticket in tickets:
            ticket.submitted = now
            ticket.sink = self._deliver if streamed or ticket.params.stop else self._hold
        if runtime.progress is not None:
            _follow_prefill(tickets, runtime.progress)
        self._answers = {
            ticket.request.id: Answer(index, ticket, runtime.tokenizer, self._stopper(ticket))
            for index, ticket in enumerate(tickets)
        }
        try:
            for ticket in tickets:
                self._engine.submit(ticket)
        except BaseException:
            self.abort()
            raise

    @property
    def done(self) -> bool:
        """Whether every prompt is answered."""
        return self._open == 0

    def take(self, item: Item) -> list[TokenEvent]:
        """The events of one delivery. Raises the request's error where it failed."""
        ticket, outputs = item
        answer = self._answers[ticket.request.id]
        was_done = answer.done
        events = list(answer.take(outputs))
        self._open -= answer.done and not was_done
        return events

    def completions(self) -> list[Completion]:
        """All completions, in the order of the prompts."""
        return [answer.completion() for answer in self._answers.values()]

    def finished(self) -> list[Completion | None]:
        """Like `completions`, None where a prompt is not yet answered."""
        return [answer.completion() if answer.done else None for answer in self._answers.values()]

    def abort(self) -> None:
        """End what has not ended."""
        for ticket in self._tickets:
            if not self._answers[ticket.request.id].done:
                self._engine.abort(ticket)

    def _deliver(self, ticket: Ticket, outputs: list[Output]) -> None:
        self.inbox.put((ticket, outputs))

    def _hold(self, ticket: Ticket, outputs: list[Output]) -> None:
        held = self._held[ticket.request.id]
        held += outputs
        if any(output.finish_reason is not None or output.error is not None for output in outputs):
            self._held[ticket.request.id] = []
            self._deliver(ticket, held)

    def _stopper(self, ticket: Ticket) -> Callable[[int], None]:
        return lambda sample: self._engine.abort(ticket, sample, "stop")


class LoopQueue:
    """A queue of the running event loop that other threads fill. One task takes from it.

    `seconds`: from now on, after which `get` raises asyncio.TimeoutError; whoever gives them must `close` it.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._waker = _Waker.of(self._loop)
        self._items: deque[Item] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._late = False
        self._timer = None if seconds is None else self._loop.call_later(max(0.0, seconds), self._expire)

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._waker.wake(self)

    async def get(self) -> Item:
        while not self._items and not self._late:
            self._waiting = self._loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        if not self._items:
            raise asyncio.TimeoutError
        return self._items.popleft()

    def get_nowait(self) -> Item | None:
        return self._items.popleft() if self._items else None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def look(self) -> None:
        """There may be something: wake who waits. For the event loop's thread."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _expire(self) -> None:
        self._late = True
        self.look()


class _Waker:
    """Wakes an event loop once for all queues that are filled in a row: a batch fills one for each of its requests."""

    _known: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, _Waker]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._filled: deque[LoopQueue] = deque()
        self._called = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _Waker:
        """The one of that loop. For the loop's thread."""
        waker = cls._known.get(loop)
        if waker is None:
            waker = cls._known[loop] = cls(loop)
        return waker

    def wake(self, queue: LoopQueue) -> None:
        self._filled.append(queue)
        if not self._called and (loop := self._loop()) is not None:
            self._called = True
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._called = False  # first, so that whoever fills one from now on calls again
        while self._filled:
            self._filled.popleft().look()


def _follow_prefill(tickets: Sequence[Ticket], progress: Progress) -> None:
    """Tell `progress` how many of all prompts' tokens are computed, where there are many."""
    total = sum(len(ticket.request.prompt) for ticket in tickets)
    done: dict[str, int] = {}

    def follower(request_id: str) -> Callable[[int, int], None]:
        def prefilled(computed: int, _length: int) -> None:
            done[request_id] = max(computed, done.get(request_id, 0))  # a preempted one computes again
            progress("reading the prompt", sum(done.values()), total)

        return prefilled

    if total > _LONG_PREFILL:
        for ticket in tickets:
            ticket.prefilled = follower(ticket.request.id)
