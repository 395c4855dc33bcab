"""An engine in another process: commands go out, events come back, over a `Wire`.

Clients use `RemoteEngine` in the place of an `Engine`. `EngineHost` is the other end, beside the real engine. If the
wire breaks and another engine may come, requests wait, and go on over the next wire from the last token that was
received.
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
from typing import Any, TypeVar

from lamina.client.interface import EngineClient, Wire
from lamina.completions import FinishReason
from lamina.errors import EngineError, LaminaError
from lamina.kv.prefix_nodes import PrefixEvent, PrefixSink
from lamina.messages.engine_messages import (
    Abort,
    CloseEngine,
    Command,
    Event,
    FollowPrefixes,
    Halted,
    Logged,
    Prefilled,
    PrefixChanged,
    RequestOutputs,
    SnapshotTaken,
    Stopped,
    Submit,
    TakeSnapshot,
)
from lamina.messages.engine_request import NOTHING_SPARED, EngineOutput, EngineRequest, KvSavings, Received
from lamina.messages.request_codec import decode_output, encode_output
from lamina.messages.snapshot import Snapshot
from lamina.system.progress import Progress, Progressed
from lamina.system.timers import Cancellable, later

logger = logging.getLogger("lamina")

_Event = TypeVar("_Event")


@dataclasses.dataclass(slots=True)
class _Open:
    """A request that has not ended. `tokens` are those received, by sample; `ended` are the samples that have ended."""

    request: EngineRequest
    start: float  # when the engine got it
    tokens: list[list[int]]
    ended: set[int] = dataclasses.field(default_factory=set)
    aborts: list[tuple[int | None, FinishReason]] = dataclasses.field(default_factory=list)
    resumed: bool = False  # a previous engine began it

    def received(self) -> tuple[Received, ...]:
        return tuple(Received(tuple(tokens), sample in self.ended) for sample, tokens in enumerate(self.tokens))


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
        self._snapshot_sinks: dict[int, Callable[[Snapshot], None]] = {}  # by the number of the question
        self._last_snapshot = 0
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

    def submit(self, request: EngineRequest) -> None:
        with self._door:
            if not self.alive:
                raise EngineError(self._why or self._parted)
            samples = (Received(),) * request.params.n if request.received is None else request.received
            ended = {index for index, (_, over) in enumerate(samples) if over}
            self._open[request.id] = _Open(request, self._clock(), [list(tokens) for tokens, _ in samples], ended)
            if not self._parted:  # else `rejoin` submits it
                self._commands.put(Submit(request.request, request.params, request.seed, request.received))

    def abort(self, request: EngineRequest, sample: int | None = None, reason: FinishReason = "abort") -> None:
        with self._door:
            entry = self._open.get(request.id)
            if entry is not None:
                entry.aborts.append((sample, reason))
            if not self._parted:
                self._commands.put(Abort(request.id, sample, reason))
                return
            if entry is None:
                return
            ends = [index for index in range(request.params.n) if index not in entry.ended and sample in (None, index)]
            entry.ended.update(ends)
            if len(entry.ended) == request.params.n:  # the next engine need not go on with it
                del self._open[request.id]
        _notify(request.sink, request, [EngineOutput(index, None, reason, at=self._clock()) for index in ends])

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
            for entry in self._open.values():
                request = entry.request
                entry.start, entry.resumed = self._clock(), True
                self._commands.put(Submit(request.request, request.params, request.seed, entry.received()))
                for sample, reason in entry.aborts:
                    self._commands.put(Abort(request.id, sample, reason))
            if self._prefix_sink is not None:
                self._commands.put(FollowPrefixes())
            self._begin(wire)
        return True

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        with self._door:
            if self._why or self._parted:
                return
            self._last_snapshot += 1
            self._snapshot_sinks[self._last_snapshot] = sink
            self._commands.put(TakeSnapshot(self._last_snapshot))

    def prefix_events(self, sink: PrefixSink) -> None:
        with self._door:
            self._prefix_sink = sink
            if not self._parted:  # else `rejoin` asks
                self._commands.put(FollowPrefixes())

    def close(self) -> None:
        if self._parted:
            self._stop("the engine is gone, and was not waited for")
            return
        self._commands.put(CloseEngine())

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
                    self._take(event)
        except EngineError as error:
            self._part(str(error))
        except Exception as error:  # whatever it is, no client may wait for ever
            logger.exception("the outputs of the engine could not be read")
            self._stop(f"its outputs could not be read: {error!r}")
        commands.put(None)

    def _take(self, event: Event) -> None:
        match event:
            case RequestOutputs():
                self._outputs(event)
            case Prefilled():
                if (entry := self._open.get(event.id)) is not None:
                    _notify(entry.request.prefilled, event.done, event.total)
            case Progressed():
                if self._progress is not None:
                    _notify(self._progress, event.what, event.done, event.total)
            case SnapshotTaken():
                if (sink := self._snapshot_sinks.pop(event.number, None)) is not None:
                    _notify(sink, event.snapshot)
            case PrefixChanged():
                if self._prefix_sink is not None:
                    _notify(self._prefix_sink, event.event)
            case Halted():
                self._halted = event.halted
            case Logged():
                logger.log(event.level, event.text)
            case Stopped():
                self._stop(event.why)

    def _outputs(self, event: RequestOutputs) -> None:
        entry = self._open.get(event.id)
        if entry is None:  # its client could not take its outputs
            return
        request = entry.request
        if not entry.resumed or request.scheduled is None:
            request.scheduled = None if event.scheduled is None else entry.start + event.scheduled
            request.cached_tokens = event.cached_tokens
        request.preemptions = event.preemptions
        request.spared = KvSavings(*event.spared) if event.spared else NOTHING_SPARED
        request.drafted, request.accepted = event.drafted, event.accepted
        decoded = [decode_output(output, entry.start) for output in event.outputs]
        # A sample that was aborted while there was no engine has ended here, and the next one ends it once more.
        decoded = [output for output in decoded if output.sample not in entry.ended or output.error is not None]
        for output in decoded:
            if output.token is not None:
                entry.tokens[output.sample].append(output.token)
        entry.ended.update(output.sample for output in decoded if output.finish_reason is not None)
        if len(entry.ended) == request.params.n or any(output.error is not None for output in decoded):
            self._open.pop(event.id, None)
        if not _notify(request.sink, request, decoded):
            self._open.pop(event.id, None)
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
            self._snapshot_sinks.clear()
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
            self._snapshot_sinks.clear()
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


def fetch(events: queue.SimpleQueue[_Event], timeout: float, collect: float = 0.0) -> list[_Event]:
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
"""Seconds for `sys.setswitchinterval`. With the default, other threads could keep the interpreter from an engine's step
loop, or a server's event loop, for 5 ms at a time."""

_CLAIM = 10.0  # seconds after an engine's start


class EngineHost:
    """Does a client's commands at `engine`, and gives `send` the events that follow, on any thread. A request with a
    schema or grammar is submitted on a thread of its own, where that is compiled: all others go on meanwhile."""

    def __init__(self, engine: EngineClient, send: Callable[[Event], None], clock: Callable[[], float]) -> None:
        self._engine = engine
        self._send = send
        self._clock = clock
        self._open: dict[str, tuple[EngineRequest, set[int]]] = {}  # by id, with the samples that have ended
        self._halted = False  # what the client knows
        self._abandoned = False
        self._compiling = ThreadPoolExecutor(1, "lamina-grammars")
        self._late: set[str] = set()  # ids of the requests that `_compiling` is still to submit

    def ask(self, commands: Sequence[Command]) -> None:
        """Do commands, in order. For one thread at a time."""
        for command in commands:
            match command:
                case Submit():
                    self._submit(command)
                case Abort():
                    self._abort(command)
                case TakeSnapshot():
                    self._snapshot(command.number)
                case FollowPrefixes():
                    self._engine.prefix_events(self._prefix_event)
                case CloseEngine():
                    self._engine.close()

    def report(self) -> None:
        """Notify the client where the engine is halted now, or goes on. For the thread that sends events."""
        if (halted := self._engine.halted) != self._halted:
            self._halted = halted
            self._send(Halted(halted))

    def abandon(self) -> None:
        """The client is gone: end all that has not ended."""
        self._abandoned = True
        self._abandon()
        if self._late:
            self._compiling.submit(self._abandon)
        self._compiling.shutdown(wait=False)

    def _abandon(self) -> None:
        for request, _ in list(self._open.values()):
            self._engine.abort(request)

    def _prefix_event(self, event: PrefixEvent) -> bool:
        if not self._abandoned:
            self._send(PrefixChanged(event))
        return not self._abandoned

    def _snapshot(self, number: int) -> None:
        self._engine.snapshot(lambda snapshot: self._send(SnapshotTaken(number, snapshot)))

    def _abort(self, command: Abort) -> None:
        if (entry := self._open.get(command.id)) is None:
            return
        abort = partial(self._engine.abort, entry[0], command.sample, command.reason)
        if command.id in self._late:
            self._compiling.submit(abort)
        else:
            abort()

    def _submit(self, command: Submit) -> None:
        request = EngineRequest(command.request, command.params, command.seed, received=command.received)
        if request.received is not None and len(request.received) != request.params.n:
            raise EngineError(f"{len(request.received)} samples were received of {request.params.n}")
        ended = {index for index, sample in enumerate(request.received or ()) if sample.ended}
        request.submitted = self._clock()
        request.sink = self._deliver
        request.prefilled = lambda done, total: self._send(Prefilled(request.id, done, total))
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
        self._send(
            RequestOutputs(
                request_id,
                [encode_output(output, start) for output in outputs],
                None if request.scheduled is None else request.scheduled - start,
                request.cached_tokens,
                request.preemptions,
                () if request.spared is NOTHING_SPARED else request.spared,
                request.drafted,
                request.accepted,
            )
        )


def disclaim_later(disclaim: Callable[[], None]) -> None:
    """Call an engine's `disclaim` 10 s after its start: clients resume requests of the previous engine before that."""
    later(_CLAIM, disclaim)
