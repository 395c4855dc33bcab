"""The engine's end of a connection to a client in another process."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Any

from lamina.client.interface import EngineClient, Event
from lamina.errors import EngineError, LaminaError
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.messages.request_codec import (
    Command,
    decode_ticket,
    encode_output,
)


class EngineHost:
    """The far end: does commands at `engine`, and puts what becomes of them into `events`."""

    def __init__(self, engine: EngineClient, events: queue.SimpleQueue[Event], clock: Callable[[], float]) -> None:
        self._engine = engine
        self._events = events
        self._clock = clock
        self._open: dict[str, tuple[EngineRequest, set[int]]] = {}  # by request: its ticket, and the samples that ended

    def ask(self, commands: Sequence[Command]) -> None:
        """Do what is asked, in order. For one thread at a time."""
        for kind, *fields in commands:
            if kind in ("submit", "resume"):
                self._submit(*fields)
            elif kind == "abort":
                request_id, sample, reason = fields
                if (entry := self._open.get(request_id)) is not None:
                    self._engine.abort(entry[0], sample, reason)
            elif kind == "snapshot":
                self._snapshot(*fields)
            elif kind == "close":
                self._engine.close()

    def abandon(self) -> None:
        """Whoever asked is gone: end all that has not ended."""
        for ticket, _ in list(self._open.values()):
            self._engine.abort(ticket)

    def _snapshot(self, number: int) -> None:
        self._engine.snapshot(lambda snapshot: self._events.put(("snapshot", number, snapshot.as_dict())))

    def _submit(
        self,
        request: dict[str, Any],
        params: dict[str, Any],
        seed: int,
        received: Sequence[tuple[Sequence[int], bool]] | None = None,
    ) -> None:
        ticket = decode_ticket(request, params, seed)
        ended: set[int] = set()
        if received is not None:
            if len(received) != ticket.request.n:
                raise EngineError(f"{len(received)} samples were received of {ticket.request.n}")
            ticket.received = tuple((tuple(tokens), bool(over)) for tokens, over in received)
            ended = {sample for sample, (_, over) in enumerate(ticket.received) if over}
        ticket.submitted = self._clock()
        ticket.sink = self._deliver
        ticket.prefilled = lambda done, total: self._events.put(("prefilled", ticket.request.id, done, total))
        self._open[ticket.request.id] = (ticket, ended)
        try:
            self._engine.submit(ticket)
        except LaminaError as error:
            self._deliver(ticket, [EngineOutput(0, None, error=error)])

    def _deliver(self, ticket: EngineRequest, outputs: list[EngineOutput]) -> None:
        request_id, start = ticket.request.id, ticket.submitted
        if (entry := self._open.get(request_id)) is not None:
            entry[1].update(output.sample for output in outputs if output.finish_reason is not None)
            if len(entry[1]) == ticket.request.n or any(output.error is not None for output in outputs):
                del self._open[request_id]
        encoded = [encode_output(output, start) for output in outputs]
        scheduled = None if ticket.scheduled is None else ticket.scheduled - start
        self._events.put(
            ("outputs", request_id, encoded, scheduled, ticket.cached_tokens, ticket.preemptions, ticket.spared)
        )
