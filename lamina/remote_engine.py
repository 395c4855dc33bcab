"""An engine in another process: requests go out as plain data, outputs come back in batches.

`RemoteEngine` stands where clients expect an `Engine`; `EngineHost` stands before the real one. Between them a `Wire`
carries commands and events, which hold numbers, text, tuples and dicts only. Knows no Ray, no model and no text.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from lamina.errors import EngineError, InvalidRequest, LaminaError
from lamina.model_cache import Progress
from lamina.request import Request
from lamina.snapshot import Snapshot
from lamina.ticket import Output, Spared, Ticket
from lamina.types import FinishReason, SamplingParams
from lamina_workers.logprobs import RowLogprobs

logger = logging.getLogger("lamina")

Command: TypeAlias = tuple[Any, ...]
"""("submit", fields of the request, fields of the params, seed) | ("abort", id, sample, reason) |
("snapshot", number) | ("close",)."""

Event: TypeAlias = tuple[Any, ...]
"""("outputs", id, outputs, scheduled, cached tokens, preemptions, spared) | ("prefilled", id, done, total) |
("progress", what, done, total) | ("snapshot", number, fields) | ("log", level, text) | ("stopped", why). Times are
seconds since the submission, but for those of snapshots."""

_ERRORS: dict[str, type[LaminaError]] = {"InvalidRequest": InvalidRequest, "EngineError": EngineError}


class EngineClient(Protocol):
    """What clients use of an engine, wherever it runs. For any thread."""

    @property
    def alive(self) -> bool:
        """Whether requests are served."""

    def submit(self, ticket: Ticket) -> None:
        """Queue a request. Raises EngineError where the engine has stopped."""

    def abort(self, ticket: Ticket, sample: int | None = None, reason: FinishReason = "abort") -> None:
        """End a request, or one sample of it. Harmless where it has ended."""

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        """Have `sink` told, soon and on some thread, what the engine is doing; perhaps never where it has stopped."""

    def close(self) -> None:
        """Stop soon; unfinished requests end with an EngineError."""


class Wire(Protocol):
    """The way to an `EngineHost`. Either method raises EngineError once nobody is there."""

    def ask(self, commands: Sequence[Command]) -> None:
        """Have commands done, in order; returns when they are."""

    def events(self) -> Sequence[Event]:
        """The next events, in order; waits for one."""


class RemoteEngine:
    """The engine's stand-in among its clients. `progress` and the logger "lamina" get what happens over there.

    One thread sends, so that an abort never overtakes its request; another receives, and calls the sinks.
    """

    def __init__(self, wire: Wire, clock: Callable[[], float], progress: Progress | None = None) -> None:
        self._wire = wire
        self._clock = clock
        self._progress = progress
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._open: dict[str, tuple[Ticket, float, set[int]]] = {}  # by request: ticket, start, samples that ended
        self._asked: dict[int, Callable[[Snapshot], None]] = {}  # who waits for which snapshot
        self._last_asked = 0
        self._door = threading.Lock()
        self._why = ""  # it stopped; empty while it runs
        self._sender = threading.Thread(target=self._send, name="lamina-requests", daemon=True)
        self._receiver = threading.Thread(target=self._receive, name="lamina-outputs", daemon=True)
        self._sender.start()
        self._receiver.start()

    @property
    def alive(self) -> bool:
        return not self._why

    def submit(self, ticket: Ticket) -> None:
        with self._door:
            if self._why:
                raise EngineError(self._why)
            self._open[ticket.request.id] = (ticket, self._clock(), set())
            self._commands.put(encode_ticket(ticket))

    def abort(self, ticket: Ticket, sample: int | None = None, reason: FinishReason = "abort") -> None:
        self._commands.put(("abort", ticket.request.id, sample, reason))

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        with self._door:
            if self._why:
                return
            self._last_asked += 1
            self._asked[self._last_asked] = sink
            self._commands.put(("snapshot", self._last_asked))

    def close(self) -> None:
        self._commands.put(("close",))

    def join(self, timeout: float) -> bool:
        """Wait until the engine has stopped and every request has its end; whether that was within the seconds."""
        self._receiver.join(timeout)
        return not self._receiver.is_alive()

    def _send(self) -> None:
        while (command := self._commands.get()) is not None:
            commands = [command]
            while not self._commands.empty():
                if (command := self._commands.get()) is None:
                    return
                commands.append(command)
            try:
                self._wire.ask(commands)
            except EngineError as error:
                self._stop(str(error))
                return

    def _receive(self) -> None:
        try:
            while not self._why:
                for event in self._wire.events():
                    self._take(*event)
        except EngineError as error:
            self._stop(str(error))
        except Exception as error:  # whatever it is, nobody may wait for ever
            logger.exception("the outputs of the engine could not be read")
            self._stop(f"its outputs could not be read: {error!r}")
        self._commands.put(None)

    def _take(self, kind: str, *fields: Any) -> None:
        if kind == "outputs":
            self._outputs(*fields)
        elif kind == "prefilled":
            request_id, done, total = fields
            if request_id in self._open:
                _tell(self._open[request_id][0].prefilled, done, total)
        elif kind == "progress":
            if self._progress is not None:
                _tell(self._progress, *fields)
        elif kind == "snapshot":
            number, plain = fields
            if (sink := self._asked.pop(number, None)) is not None:
                _tell(sink, Snapshot.from_dict(plain))
        elif kind == "log":
            logger.log(*fields)
        elif kind == "stopped":
            self._stop(*fields)

    def _outputs(
        self,
        request_id: str,
        outputs: Sequence[tuple[Any, ...]],
        scheduled: float | None,
        cached: int,
        preempted: int,
        spared: Sequence[float],
    ) -> None:
        if request_id not in self._open:  # its client could not take its outputs
            return
        ticket, start, ended = self._open[request_id]
        ticket.scheduled = None if scheduled is None else start + scheduled
        ticket.cached_tokens, ticket.preemptions, ticket.spared = cached, preempted, Spared(*spared)
        decoded = [decode_output(output, start) for output in outputs]
        ended.update(output.sample for output in decoded if output.finish_reason is not None)
        if len(ended) == ticket.request.n or any(output.error is not None for output in decoded):
            del self._open[request_id]
        if not _tell(ticket.sink, ticket, decoded):
            self._open.pop(request_id, None)
            self.abort(ticket)

    def _stop(self, why: str) -> None:
        with self._door:
            if self._why:
                return
            self._why = why
            unfinished = [ticket for ticket, _, _ in self._open.values()]
            self._open.clear()
            self._asked.clear()
        for ticket in unfinished:
            _tell(ticket.sink, ticket, [Output(0, None, error=EngineError(why))])


def _tell(client: Callable[..., None], *news: Any) -> bool:
    """Whether a client took it: what one does wrong is no reason to stop for the others."""
    try:
        client(*news)
    except Exception:  # it may be anything
        logger.exception("a client could not take what the engine sent it")
        return False
    return True


class EngineHost:
    """The far end: does commands at `engine`, and puts what becomes of them into `events`."""

    def __init__(self, engine: EngineClient, events: queue.SimpleQueue[Event], clock: Callable[[], float]) -> None:
        self._engine = engine
        self._events = events
        self._clock = clock
        self._open: dict[str, tuple[Ticket, set[int]]] = {}  # by request: its ticket, and the samples that ended

    def ask(self, commands: Sequence[Command]) -> None:
        """Do what is asked, in order. For one thread at a time."""
        for kind, *fields in commands:
            if kind == "submit":
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

    def _submit(self, request: dict[str, Any], params: dict[str, Any], seed: int) -> None:
        ticket = decode_ticket(request, params, seed)
        ticket.submitted = self._clock()
        ticket.sink = self._deliver
        ticket.prefilled = lambda done, total: self._events.put(("prefilled", ticket.request.id, done, total))
        self._open[ticket.request.id] = (ticket, set())
        try:
            self._engine.submit(ticket)
        except LaminaError as error:
            self._deliver(ticket, [Output(0, None, error=error)])

    def _deliver(self, ticket: Ticket, outputs: list[Output]) -> None:
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


def fetch(events: queue.SimpleQueue[Event], timeout: float, collect: float = 0.0) -> list[Event]:
    """All that is there; waits for the first so many seconds, and gives none where none came. After the first it
    waits `collect` seconds more: to take each on its own would interrupt who is putting them there."""
    try:
        fetched = [events.get(timeout=timeout)]
    except queue.Empty:
        return []
    if collect:
        time.sleep(collect)
    while not events.empty():
        fetched.append(events.get())
    return fetched


def encode_ticket(ticket: Ticket) -> Command:
    """A submission as plain data."""
    request = {field.name: getattr(ticket.request, field.name) for field in dataclasses.fields(Request)}
    params = {field.name: getattr(ticket.params, field.name) for field in dataclasses.fields(SamplingParams)}
    request["stop_token_ids"] = tuple(request["stop_token_ids"])
    params["logit_bias"] = dict(params["logit_bias"])
    return ("submit", request, params, ticket.seed)


def decode_ticket(request: dict[str, Any], params: dict[str, Any], seed: int) -> Ticket:
    """The ticket of `encode_ticket`'s fields, without a sink."""
    fields = request | {"stop_token_ids": frozenset(request["stop_token_ids"])}
    return Ticket(Request(**fields), SamplingParams(**params), seed)


def encode_output(output: Output, start: float) -> tuple[Any, ...]:
    """An output as plain data, its time as seconds since `start`."""
    logprobs = None if output.logprobs is None else (output.logprobs.chosen, tuple(output.logprobs.top))
    error = None if output.error is None else (type(output.error).__name__, str(output.error))
    return (output.sample, output.token, output.finish_reason, logprobs, error, output.at - start)


def decode_output(fields: tuple[Any, ...], start: float) -> Output:
    """The output of `encode_output`, on a clock on which its request was submitted at `start`."""
    sample, token, reason, logprobs, error, at = fields
    return Output(
        sample=sample,
        token=token,
        finish_reason=reason,
        logprobs=None if logprobs is None else RowLogprobs(logprobs[0], logprobs[1]),
        error=None if error is None else _ERRORS.get(error[0], EngineError)(error[1]),
        at=start + at,
    )
