"""The engine's end of a connection to a client in another process."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from lamina.client.interface import EngineClient, Event
from lamina.errors import EngineError, LaminaError
from lamina.kv.prefix_nodes import PrefixEvent
from lamina.messages.engine_request import EngineOutput, EngineRequest
from lamina.messages.request_codec import Command, decode_request, encode_output
from lamina.system.timers import later

SWITCH_INTERVAL = 1e-4
"""Seconds for `sys.setswitchinterval`. With the default, threads that talk to clients could keep the interpreter from
the step loop for 5 ms at a time."""

_CLAIM = 10.0  # seconds after an engine's start


class EngineHost:
    """Does a client's commands at `engine`, and puts the events that follow into `events`. A request with a schema or
    grammar is submitted on a thread of its own, where that is compiled: all others go on meanwhile."""

    def __init__(self, engine: EngineClient, events: queue.SimpleQueue[Event], clock: Callable[[], float]) -> None:
        self._engine = engine
        self._events = events
        self._clock = clock
        self._open: dict[str, tuple[EngineRequest, set[int]]] = {}  # by id, with the samples that have ended
        self._halted = False  # what the client knows
        self._gone = False
        self._compiling = ThreadPoolExecutor(1, "lamina-grammars")
        self._late: set[str] = set()  # ids of the requests that `_compiling` is still to submit

    def ask(self, commands: Sequence[Command]) -> None:
        """Do commands, in order. For one thread at a time."""
        for kind, *fields in commands:
            if kind in ("submit", "resume"):
                self._submit(*fields)
            elif kind == "abort":
                request_id, sample, reason = fields
                if (entry := self._open.get(request_id)) is not None:
                    abort = partial(self._engine.abort, entry[0], sample, reason)
                    if request_id in self._late:
                        self._compiling.submit(abort)
                    else:
                        abort()
            elif kind == "snapshot":
                self._snapshot(*fields)
            elif kind == "prefix events":
                self._engine.prefix_events(self._prefix_event)
            elif kind == "close":
                self._engine.close()

    def report(self) -> None:
        """Notify the client where the engine is halted now, or goes on. For the thread that sends events."""
        if (halted := self._engine.halted) != self._halted:
            self._halted = halted
            self._events.put(("halted", halted))

    def abandon(self) -> None:
        """The client is gone: end all that has not ended."""
        self._gone = True
        self._abandon()
        if self._late:
            self._compiling.submit(self._abandon)
        self._compiling.shutdown(wait=False)

    def _abandon(self) -> None:
        for request, _ in list(self._open.values()):
            self._engine.abort(request)

    def _prefix_event(self, event: PrefixEvent) -> bool:
        """On the engine's thread."""
        if not self._gone:
            self._events.put(("prefix", event))
        return not self._gone

    def _snapshot(self, number: int) -> None:
        self._engine.snapshot(lambda snapshot: self._events.put(("snapshot", number, snapshot.as_dict())))

    def _submit(
        self,
        fields: dict[str, Any],
        params: dict[str, Any],
        seed: int,
        received: Sequence[tuple[Sequence[int], bool]] | None = None,
    ) -> None:
        request = decode_request(fields, params, seed)
        ended: set[int] = set()
        if received is not None:
            if len(received) != request.params.n:
                raise EngineError(f"{len(received)} samples were received of {request.params.n}")
            request.received = tuple((tuple(tokens), bool(over)) for tokens, over in received)
            ended = {sample for sample, (_, over) in enumerate(request.received) if over}
        request.submitted = self._clock()
        request.sink = self._deliver
        request.prefilled = lambda done, total: self._events.put(("prefilled", request.id, done, total))
        self._open[request.id] = (request, ended)
        if request.params.constrained:
            self._late.add(request.id)
            self._compiling.submit(self._to_engine, request)
        else:
            self._to_engine(request)

    def _to_engine(self, request: EngineRequest) -> None:
        try:
            self._engine.submit(request)
        except LaminaError as error:
            self._deliver(request, [EngineOutput(0, None, error=error)])
        self._late.discard(request.id)

    def _deliver(self, request: EngineRequest, outputs: list[EngineOutput]) -> None:
        request_id, start = request.id, request.submitted
        if (entry := self._open.get(request_id)) is not None:
            entry[1].update(output.sample for output in outputs if output.finish_reason is not None)
            if len(entry[1]) == request.params.n or any(output.error is not None for output in outputs):
                del self._open[request_id]
        encoded = [encode_output(output, start) for output in outputs]
        scheduled = None if request.scheduled is None else request.scheduled - start
        drafts = (request.drafted, request.accepted)
        known = (scheduled, request.cached_tokens, request.preemptions, request.spared, drafts)
        self._events.put(("outputs", request_id, encoded, *known))


def disclaim_later(disclaim: Callable[[], None]) -> None:
    """Call an engine's `disclaim` 10 s after its start: clients resume requests of the previous engine before that."""
    later(_CLAIM, disclaim)
