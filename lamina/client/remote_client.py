"""An engine in another process: requests go out as plain data, outputs come back in batches.

`RemoteEngine` stands where clients expect an `Engine`; `EngineHost` stands before the real one. Between them a `Wire`
carries commands and events, which hold numbers, text, tuples and dicts only. Where the wire breaks and another engine
may come, requests wait, and go on over the next wire from the last token that was received. Knows no Ray, no model and
no text.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lamina.client.interface import Event, Wire
from lamina.completions import FinishReason
from lamina.errors import EngineError
from lamina.messages.engine_request import EngineOutput, EngineRequest, KvSavings
from lamina.messages.request_codec import (
    Command,
    decode_output,
    encode_resumed,
    encode_ticket,
)
from lamina.messages.snapshot import Snapshot
from lamina.system.progress import Progress

logger = logging.getLogger("lamina")


@dataclasses.dataclass(slots=True)
class _Open:
    """A request that has not ended: since when the engine has it, what came of each of its samples, which of them have
    ended, and what was aborted of it."""

    ticket: EngineRequest
    start: float
    tokens: list[list[int]]
    ended: set[int] = dataclasses.field(default_factory=set)
    aborts: list[tuple[int | None, FinishReason]] = dataclasses.field(default_factory=list)
    resumed: bool = False  # another engine has begun it

    def received(self) -> tuple[tuple[tuple[int, ...], bool], ...]:
        return tuple((tuple(tokens), sample in self.ended) for sample, tokens in enumerate(self.tokens))


class RemoteEngine:
    """The engine's stand-in among its clients. `progress` and the logger "lamina" get what happens over there.

    One thread sends, so that an abort never overtakes its request; another receives, and calls the sinks. Once the wire
    is broken nothing new is taken, and what has not ended waits `patience` seconds for `rejoin` before it fails. With
    `holds` what is new waits with it, as if nothing had happened.
    """

    def __init__(
        self,
        wire: Wire,
        clock: Callable[[], float],
        progress: Progress | None = None,
        patience: float = 0.0,
        holds: bool = False,
    ) -> None:
        self._clock = clock
        self._progress = progress
        self._patience = patience
        self._holds = holds
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._open: dict[str, _Open] = {}
        self._asked: dict[int, Callable[[Snapshot], None]] = {}  # who waits for which snapshot
        self._last_asked = 0
        self._door = threading.Lock()
        self._why = ""  # it stopped; empty while it runs
        self._parted = ""  # why there is no wire, while another may come
        self._timer: threading.Timer | None = None
        self._over = threading.Event()
        self._threads: tuple[threading.Thread, ...] = ()
        self._begin(wire)

    def _begin(self, wire: Wire) -> None:
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
    def stopped(self) -> bool:
        """Whether it will never serve again."""
        return bool(self._why)

    def submit(self, ticket: EngineRequest) -> None:
        with self._door:
            if not self.alive:
                raise EngineError(self._why or self._parted)
            if ticket.received is None:
                self._open[ticket.request.id] = _Open(ticket, self._clock(), [[] for _ in range(ticket.request.n)])
                if not self._parted:  # else `rejoin` asks for it
                    self._commands.put(encode_ticket(ticket))
                return
            tokens = [list(tokens) for tokens, _ in ticket.received]
            ended = {sample for sample, (_, ended) in enumerate(ticket.received) if ended}
            self._open[ticket.request.id] = entry = _Open(ticket, self._clock(), tokens, ended)
            if not self._parted:
                self._commands.put(encode_resumed(entry.ticket, entry.received()))

    def abort(self, ticket: EngineRequest, sample: int | None = None, reason: FinishReason = "abort") -> None:
        request_id = ticket.request.id
        with self._door:
            entry = self._open.get(request_id)
            if entry is not None:
                entry.aborts.append((sample, reason))
            if not self._parted:
                self._commands.put(("abort", request_id, sample, reason))
                return
            if entry is None:
                return
            ends = [at for at in range(ticket.request.n) if at not in entry.ended and sample in (None, at)]
            entry.ended.update(ends)
            if len(entry.ended) == ticket.request.n:  # nobody needs to come back for it
                del self._open[request_id]
        _tell(ticket.sink, ticket, [EngineOutput(at, None, reason, at=self._clock()) for at in ends])

    def rejoin(self, wire: Wire) -> bool:
        """Go on over another wire, the one before being closed: what has not ended is asked for again, from where it
        was received to. Whether it could: not once it has stopped."""
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
                self._commands.put(encode_resumed(entry.ticket, entry.received()))
                for sample, reason in entry.aborts:
                    self._commands.put(("abort", request_id, sample, reason))
            self._begin(wire)
        return True

    def snapshot(self, sink: Callable[[Snapshot], None]) -> None:
        with self._door:
            if self._why or self._parted:
                return
            self._last_asked += 1
            self._asked[self._last_asked] = sink
            self._commands.put(("snapshot", self._last_asked))

    def close(self) -> None:
        if self._parted:
            self._stop("the engine is gone, and was not waited for")
            return
        self._commands.put(("close",))

    def join(self, timeout: float) -> bool:
        """Wait until the engine has stopped and every request has its end; whether that was within the seconds."""
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
        except Exception as error:  # whatever it is, nobody may wait for ever
            logger.exception("the outputs of the engine could not be read")
            self._stop(f"its outputs could not be read: {error!r}")
        commands.put(None)

    def _take(self, kind: str, *fields: Any) -> None:
        if kind == "outputs":
            self._outputs(*fields)
        elif kind == "prefilled":
            request_id, done, total = fields
            if (entry := self._open.get(request_id)) is not None:
                _tell(entry.ticket.prefilled, done, total)
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
        entry = self._open.get(request_id)
        if entry is None:  # its client could not take its outputs
            return
        ticket = entry.ticket
        if not entry.resumed or ticket.scheduled is None:
            ticket.scheduled = None if scheduled is None else entry.start + scheduled
            ticket.cached_tokens = cached
        ticket.preemptions, ticket.spared = preempted, KvSavings(*spared)
        decoded = [decode_output(output, entry.start) for output in outputs]
        for output in decoded:
            if output.token is not None:
                entry.tokens[output.sample].append(output.token)
        entry.ended.update(output.sample for output in decoded if output.finish_reason is not None)
        if len(entry.ended) == ticket.request.n or any(output.error is not None for output in decoded):
            self._open.pop(request_id, None)
        if not _tell(ticket.sink, ticket, decoded):
            self._open.pop(request_id, None)
            self.abort(ticket)

    def _part(self, why: str) -> None:
        """There is no wire any more."""
        if not self._patience:
            self._stop(why)
            return
        with self._door:
            if self._why or self._parted:
                return
            self._parted = why
            self._asked.clear()
            self._timer = threading.Timer(self._patience, self._give_up, (why,))
            self._timer.daemon = True
            self._timer.start()

    def give_up(self, why: str) -> None:
        """No other engine will come. For whoever would else `rejoin`."""
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
            unfinished = [entry.ticket for entry in self._open.values()]
            self._open.clear()
            self._asked.clear()
            if self._timer is not None:
                self._timer.cancel()
        for ticket in unfinished:
            _tell(ticket.sink, ticket, [EngineOutput(0, None, error=EngineError(why))])
        self._over.set()


def _tell(client: Callable[..., None], *news: Any) -> bool:
    """Whether a client took it: what one does wrong is no reason to stop for the others."""
    try:
        client(*news)
    except Exception:  # it may be anything
        logger.exception("a client could not take what the engine sent it")
        return False
    return True


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
