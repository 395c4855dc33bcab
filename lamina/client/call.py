"""One call under way: its prompts, submitted, and what becomes of them.

Knows how outputs get from the engine's thread to the caller's; knows nothing of arguments, and waits for nothing: that
is what blocking and asynchronous callers do each in their way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from lamina.client.output_processor import OutputProcessor
from lamina.completions import Completion, TokenEvent
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.system.progress import Progress

if TYPE_CHECKING:
    from lamina.client.interface import EngineClient
    from lamina.text.tokenizer import Tokenizer

Item: TypeAlias = tuple[EngineRequest, list[EngineOutput]]
_LONG_PREFILL = 2048  # tokens from which progress is told


class Serving(Protocol):
    """What a job needs of whatever runs a model."""

    @property
    def engine(self) -> EngineClient: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def progress(self) -> Progress | None: ...


class Call:
    """The prompts of one call, submitted. What the engine delivers comes through `inbox`; one thread takes it.

    Unless it is `streamed`, or stop strings must be looked for, outputs are held back until a sample has ended: waking
    the caller for each token would take a core from the engine.
    """

    def __init__(self, runtime: Serving, tickets: Sequence[EngineRequest], inbox: Any, streamed: bool) -> None:
        self.inbox = inbox
        self._held: dict[str, list[EngineOutput]] = {ticket.request.id: [] for ticket in tickets}
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
            ticket.request.id: OutputProcessor(index, ticket, runtime.tokenizer, self._stopper(ticket))
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

    def _deliver(self, ticket: EngineRequest, outputs: list[EngineOutput]) -> None:
        self.inbox.put((ticket, outputs))

    def _hold(self, ticket: EngineRequest, outputs: list[EngineOutput]) -> None:
        held = self._held[ticket.request.id]
        held += outputs
        if any(output.finish_reason is not None or output.error is not None for output in outputs):
            self._held[ticket.request.id] = []
            self._deliver(ticket, held)

    def _stopper(self, ticket: EngineRequest) -> Callable[[int], None]:
        return lambda sample: self._engine.abort(ticket, sample, "stop")


def _follow_prefill(tickets: Sequence[EngineRequest], progress: Progress) -> None:
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
