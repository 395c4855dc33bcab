"""An engine in another process: requests go out as plain data, outputs come back in batches.

Clients use `RemoteEngine` in the place of an `Engine`; `EngineHost` is beside the real one. Between them a `Wire`
carries commands and events, which hold numbers, text, tuples and dicts only. If the wire breaks and another engine may
come, requests wait, and go on over the next wire from the last token that was received.

The engine's end of a connection to a client in another process.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from lamina.client.interface import EngineClient, Event, Wire
from lamina.completions import FinishReason
from lamina.errors import EngineError, LaminaError
from lamina.kv.prefix_nodes import PrefixEvent, PrefixSink
from lamina.messages.engine_request import EngineOutput, EngineRequest, KvSavings
from lamina.messages.request_codec import (
    Command,
    decode_output,
    decode_request,
    encode_output,
    encode_request,
    encode_resumed,
)
from lamina.messages.snapshot import Snapshot
from lamina.system.progress import Progress
from lamina.system.timers import Cancellable, later

logger = logging.getLogger("lamina")


@dataclasses.dataclass(slots=True)
class _Open:
    """A request that has not ended. `tokens` are those received, by sample; `ended` are the samples that have ended."""

    request: EngineRequest
    start: float  # when the engine got it
    tokens: list[list[int]]
    ended: set[int] = dataclasses.field(default_factory=set)
    aborts: list[tuple[int | None, FinishReason]] = dataclasses.field(default_factory=list)
    resumed: bool = False  # a previous engine began it

    def received(self) -> tuple[tuple[tuple[int, ...], bool], ...]:
        return tuple((tuple(tokens), sample in self.ended) for sample, tokens in enumerate(self.tokens))


class RemoteEngine:
    """The client of an engine in another process. `progress` and the logger "lamina" get the engine's progress and log.

    One thread sends, so that an abort never overtakes its request; another receives, and calls the sinks. Once the wire
    is broken, new requests are refused, and the running ones wait `patience` seconds for `rejoin` before they fail.
    With `holds` new requests are taken, and wait too. `later` makes a call after some seconds of the clock.
    """

    def __init__(
        self,
        wire: Wire,
        clock: Callable[[], float],
        progress: Progress | None = None,
        patience: float = 0.0,
        holds: bool = False,
        later: Callable[[float, Callable[[], object]], Cancellable] = later,
    ) -> None:
        self._clock = clock
        self._later = later
        self._progress = progress
        self._patience = patience
        self._holds = holds
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._open: dict[str, _Open] = {}
        self._asked: dict[int, Callable[[Snapshot], None]] = {}  # sinks of snapshots, by the number of the question
        self._last_asked = 0
        self._prefix_sink: PrefixSink | None = None
        self._door = threading.Lock()
        self._why = ""  # why the engine stopped; empty while it runs
        self._parted = ""  # why the wire broke, while another may come
        self._halted = False
        self._timer: Cancellable | None = None
        self._over = threading.Event()
        self._threads: tuple[threading.Thread, ...] = ()
        self._begin(wire)

    def _begin(self, wire: Wire) -> None:
        self._halted = False
        self._threads = tuple(
            threading.Thread(target=work, args=(wire, self._commands), name=name, daemon=True)
            for work, name in ((self._send, "lamina-requests"), (self._receive, "lamina-outputs"))
        )
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return not self._why and (self._holds or not self._parted)

    @property
    def halted(self) -> bool:
        return self._halted

    @property
    def stopped(self) -> bool:
        """Whether the engine has stopped for good."""
        return bool(self._why)

    def submit(self, request: EngineRequest) -> None:
        with self._door:
            if not self.alive:
                raise EngineError(self._why or self._parted)
            received = request.received
            known = (((), False),) * request.params.n if received is None else received
            ended = {sample for sample, (_, over) in enumerate(known) if over}
            self._open[request.id] = _Open(request, self._clock(), [list(tokens) for tokens, _ in known], ended)
            if not self._parted:  # else `rejoin` submits it
                self._commands.put(encode_request(request) if received is None else encode_resumed(request, received))

    def abort(self, request: EngineRequest, sample: int | None = None, reason: FinishReason = "abort") -> None:
        with self._door:
            entry = self._open.get(request.id)
            if entry is not None:
                entry.aborts.append((sample, reason))
            if not self._parted:
                self._commands.put(("abort", request.id, sample, reason))
                return
            if entry is None:
                return
            ends = [at for at in range(request.params.n) if at not in entry.ended and sample in (None, at)]
            entry.ended.update(ends)
            if len(entry.ended) == request.params.n:  # the next engine need not go on with it
                del self._open[request.id]
        _notify(request.sink, request, [EngineOutput(at, None, reason, at=self._clock()) for at in ends])

    def rejoin(self, wire: Wire) -> bool:
        """Go on over another wire, once the previous one is closed: submit again what has not ended, from the last
        token that was received. False where the engine has stopped for good."""
        for thread in self._threads:
            thread.join()
        with self._door:
            if self._why:
                return False
            if self._timer is not None:
                self._timer.cancel()
            self._commands = queue.SimpleQueue()
            self._parted = ""
            for request_id, entry in self._open.items():
                entry.start, entry.resumed = self._clock(), True
                self._commands.put(encode_resumed(entry.request, entry.received()))
                for sample, reason in entry.aborts:
                    self._commands.put(("abort", request_id, sample, reason))
            if self._prefix_sink is not None:
                self._commands.put(("prefix events",))
            self._begin(wire)
        return True

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        with self._door:
            if self._why or self._parted:
                return
            self._last_asked += 1
            self._asked[self._last_asked] = sink
            self._commands.put(("snapshot", self._last_asked))

    def prefix_events(self, sink: PrefixSink) -> None:
        with self._door:
            self._prefix_sink = sink
            if not self._parted:  # else `rejoin` asks
                self._commands.put(("prefix events",))

    def close(self) -> None:
        if self._parted:
            self._stop("the engine is gone, and was not waited for")
            return
        self._commands.put(("close",))

    def join(self, timeout: float) -> bool:
        """Wait until the engine has stopped and every request has ended. False after `timeout` seconds."""
        return self._over.wait(timeout)

    def _send(self, wire: Wire, commands: queue.SimpleQueue[Command | None]) -> None:
        while (command := commands.get()) is not None:
            together = [command]
            while not commands.empty():
                if (command := commands.get()) is None:
                    return
                together.append(command)
            try:
                wire.ask(together)
            except EngineError as error:
                self._part(str(error))
                return

    def _receive(self, wire: Wire, commands: queue.SimpleQueue[Command | None]) -> None:
        try:
            while not self._why:
                for event in wire.events():
                    self._take(*event)
        except EngineError as error:
            self._part(str(error))
        except Exception as error:  # whatever it is, no client may wait for ever
            logger.exception("the outputs of the engine could not be read")
            self._stop(f"its outputs could not be read: {error!r}")
        commands.put(None)

    def _take(self, kind: str, *fields: Any) -> None:
        if kind == "outputs":
            self._outputs(*fields)
        elif kind == "prefilled":
            request_id, done, total = fields
            if (entry := self._open.get(request_id)) is not None:
                _notify(entry.request.prefilled, done, total)
        elif kind == "progress":
            if self._progress is not None:
                _notify(self._progress, *fields)
        elif kind == "snapshot":
            number, plain = fields
            if (sink := self._asked.pop(number, None)) is not None:
                _notify(sink, Snapshot.from_dict(plain))
        elif kind == "prefix":
            if self._prefix_sink is not None:
                _notify(self._prefix_sink, *fields)
        elif kind == "halted":
            (self._halted,) = fields
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
        savings: Sequence[float],
        drafts: Sequence[int],
    ) -> None:
        entry = self._open.get(request_id)
        if entry is None:  # its client could not take its outputs
            return
        request = entry.request
        if not entry.resumed or request.scheduled is None:
            request.scheduled = None if scheduled is None else entry.start + scheduled
            request.cached_tokens = cached
        request.preemptions, request.spared = preempted, KvSavings(*savings)
        request.drafted, request.accepted = drafts
        decoded = [decode_output(output, entry.start) for output in outputs]
        # A sample that was aborted while there was no engine has ended here, and the next one ends it once more.
        decoded = [each for each in decoded if each.sample not in entry.ended or each.error is not None]
        for output in decoded:
            if output.token is not None:
                entry.tokens[output.sample].append(output.token)
        entry.ended.update(output.sample for output in decoded if output.finish_reason is not None)
        if len(entry.ended) == request.params.n or any(output.error is not None for output in decoded):
            self._open.pop(request_id, None)
        if not _notify(request.sink, request, decoded):
            self._open.pop(request_id, None)
            self.abort(request)

    def _part(self, why: str) -> None:
        """The wire is broken."""
        if not self._patience:
            self._stop(why)
            return
        with self._door:
            if self._why or self._parted:
                return
            self._parted = why
            self._asked.clear()
            self._timer = self._later(self._patience, partial(self._give_up, why))

    def give_up(self, why: str) -> None:
        """No other engine will come: fail what waits for `rejoin`. For the thread that would call `rejoin`."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        if self._parted:
            self._stop(why)

    def _give_up(self, why: str) -> None:
        if self._parted:
            self._stop(f"{why}; no other engine came for {self._patience:g} s")

    def _stop(self, why: str) -> None:
        with self._door:
            if self._why:
                return
            self._why = why
            unfinished = [entry.request for entry in self._open.values()]
            self._open.clear()
            self._asked.clear()
            if self._timer is not None:
                self._timer.cancel()
        for request in unfinished:
            _notify(request.sink, request, [EngineOutput(0, None, error=EngineError(why))])
        self._over.set()


def _notify(callback: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a client's callback returned: its error must not stop the outputs of other clients."""
    try:
        callback(*arguments)
    except Exception:  # it may be anything
        logger.exception("a client could not take what the engine sent it")
        return False
    return True


def fetch(events: queue.SimpleQueue[Event], timeout: float, collect: float = 0.0) -> list[Event]:
    """All events that are there; waits up to `timeout` seconds for the first, and gives none if none comes. Then it
    waits `collect` seconds more: to take each event on its own would interrupt the thread that puts them there."""
    try:
        fetched = [events.get(timeout=timeout)]
    except queue.Empty:
        return []
    if collect:
        time.sleep(collect)
    while not events.empty():
        fetched.append(events.get())
    return fetched


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
