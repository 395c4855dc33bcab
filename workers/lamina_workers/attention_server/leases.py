"""The engine that an attention worker serves, one at a time: its seats, their sessions, and how long KV is kept.

Any thread may call. All computing is left to a `ComputeLoop`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING

from lamina_protocols.channels import control
from lamina_protocols.channels.channels import Channel
from lamina_protocols.channels.grpc_client import Busy
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import ColdTier
from lamina_workers.attention_server.loop import ComputeLoop
from lamina_workers.attention_server.session import EngineSeat, Session, Traffic
from lamina_workers.attention_worker.batch import Counters
from lamina_workers.kv_pages.cold_file import check_folder

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("lamina")

MAX_SEATS = 64
MAX_SESSIONS = 64


class Leases:
    """The seats share `kv_memory` bytes, of which `cold` says where pages go that are not read for a while. A session
    lives for `lease` seconds without a sign of life.

    `closing` gets each session that has ended, to close its channel; it must not wait. Raises KVError for a folder that
    takes no KV.
    """

    def __init__(
        self,
        name: str,
        kv_memory: int,
        threads: int,
        device: torch.device,
        lease: float,
        clock: Callable[[], float],
        closing: Callable[[Session], None],
        cold: ColdTier | None = None,
        loop: type[ComputeLoop] = ComputeLoop,
    ) -> None:
        if cold is not None:
            check_folder(cold.folder, device.type)
        self.draining = False
        self.loop = loop(threads, name, device, self.end, self._fail, self._freed)
        self._name = name
        self._kv_memory = kv_memory
        self._cold = cold
        self._lease = lease
        self._clock = clock
        self._closing = closing
        self._lock = threading.RLock()
        self._engine = ""
        self._served_since = 0.0
        self._seats: dict[int, EngineSeat] = {}
        self._sessions: dict[str, Session] = {}
        self._totals = Counters()
        self._traffic = Traffic()

    def admit(self, hello: control.Hello, secret: bytes) -> tuple[Session, bool]:
        """A session at the seat that `hello` asks for, and whether the seat was there already.

        Raises Busy for another engine, ProtocolError for a seat that does not fit the worker or differs from the one
        that is there.
        """
        with self._lock:
            ours = hello.engine == self._engine
            seat = self._seats.get(hello.seat) if ours else None
            if self.draining and seat is None:
                raise ProtocolError(f"worker {self._name} is draining and takes no new session")
            if self._seats and not ours:
                raise Busy(self._occupied())
            if hello.session in self._sessions or len(self._sessions) >= MAX_SESSIONS:
                raise ProtocolError(f"{len(self._sessions)} sessions, allowed: {MAX_SESSIONS}, with different ids")
            resumed = seat is not None
            if seat is None:
                seat = self._new_seat(hello)
            else:
                seat.check(hello)
                seat.linger = max(hello.linger, seat.linger) if seat.sessions else hello.linger
            session = Session(hello.session, seat, secret, self._lease, self._clock)
            seat.sessions[session.id] = self._sessions[session.id] = session
        return session, resumed

    def attach(self, session: Session, channel: Channel, kind: str) -> None:
        """Serve the session over that channel. Raises ProtocolError where it has one, or has ended."""
        with self._lock:
            session.attach(channel, kind)
        logger.info("session %.8s: place %d over %s", session.id, session.seat.number, kind)
        self.loop.serve(session)

    def session(self, id_: str) -> Session | None:
        """The session of that id, if it lives."""
        return self._sessions.get(id_)

    def opened_by(self, secret: bytes) -> Session | None:
        """The session of that secret, if it lives."""
        with self._lock:
            return next((session for session in self._sessions.values() if session.knows(secret)), None)

    def live(self) -> bool:
        """Whether there is a session."""
        return bool(self._sessions)

    def end(self, session: Session, reason: str, in_order: bool = False) -> None:
        """End the session; a second call does nothing. With a seat's last session its KV is freed where the engine left
        `in_order`, or did not ask for it to be kept."""
        seat = session.seat
        with self._lock:
            if session.ended:
                return
            session.ended = reason
            del seat.sessions[session.id], self._sessions[session.id]
            self.loop.drop(session)
            if not seat.sessions and not seat.ended:
                seat.away_since = self._clock()
                if in_order or not seat.linger or not seat.built.done():
                    self._end_seat(seat, reason)
        logger.info("session %.8s ended: %s", session.id, reason)
        self._closing(session)

    def goodbye(self, goodbye: control.Goodbye) -> None:
        """An engine ends a session in order, or frees what is kept of a seat without sessions."""
        with self._lock:
            seat = self._seats.get(goodbye.seat) if goodbye.engine == self._engine else None
            if seat is None:
                return
            session = seat.sessions.get(goodbye.session)
            if session is not None:
                self.end(session, "the engine has left", in_order=True)
            elif not seat.sessions:
                self._end_seat(seat, "the engine has left")

    def end_all(self, reason: str) -> None:
        """End every session, and free all KV."""
        with self._lock:
            for seat in list(self._seats.values()):
                self._end_seat(seat, reason)

    def tend(self) -> float:
        """End overdue sessions, and seats to which no engine has come back. Returns the seconds until the next call."""
        pause = min(1.0, self._lease / 10)
        with self._lock:
            for session in list(self._sessions.values()):
                if session.overdue():
                    self.end(session, f"no sign of life for {self._lease:g} seconds")
            for seat in self._lingering():
                seconds_left = seat.away_since + seat.linger - self._clock()
                if seconds_left <= 0:
                    self._end_seat(seat, f"its engine has been away for {seat.linger:g} seconds")
                else:
                    pause = min(pause, seconds_left)
        return pause

    def status(self, version: str, uptime: float) -> control.WorkerStatus:
        """What the worker holds, and what it has done since the start."""
        with self._lock:
            seats, sessions, lingering = list(self._seats.values()), list(self._sessions.values()), self._lingering()
            counters = [self._totals, *(seat.counters for seat in seats)]
            traffic = Traffic()
            for counts in (self._traffic, *(x.traffic for x in seats), *(x.traffic for x in sessions)):
                traffic.add(counts)
            pools = [pool for seat in seats if (worker := seat.worker) is not None for pool in worker.pools]
            parts = [part for pool in pools for part in pool.parts().values()]
            now = self._clock()
            return control.WorkerStatus(
                name=self._name,
                version=version,
                model=seats[0].model if seats else "",
                session=bool(seats),
                session_age=now - self._served_since if seats else 0.0,
                engine=self._engine[:8],
                seats=len(seats),
                channels=sum(session.channel is not None for session in sessions),
                lingering=len(lingering),
                linger_left=max(0.0, min((seat.away_since + seat.linger - now for seat in lingering), default=0.0)),
                draining=self.draining,
                channel=", ".join(sorted({session.channel_kind for session in sessions} - {""})),
                kv_memory=self._kv_memory,
                parts=len(parts),
                heads=tuple(sorted({head for part in parts for head in part.heads})),
                lo=min((part.lo for part in parts), default=0),
                hi=max((part.held for part in parts), default=0),
                free_pages=sum(pool.free_pages for pool in pools),
                total_pages=sum(pool.n_pages for pool in pools),
                batches=sum(x.batches for x in counters),
                queries=sum(x.queries for x in counters),
                stored=sum(x.vectors_stored for x in counters),
                bytes_in=traffic.bytes_in,
                bytes_out=traffic.bytes_out,
                busy=traffic.busy,
                uptime=uptime,
            )

    # Under the lock.

    def _new_seat(self, hello: control.Hello) -> EngineSeat:
        leased = sum((Fraction(*seat.share) for seat in self._seats.values()), Fraction(0))
        share = Fraction(*hello.share)
        if leased + share > 1:
            raise ProtocolError(
                f"place {hello.seat} asks for {share} of the KV memory of worker {self._name}, its other "
                f"{len(self._seats)} places have {leased}; allowed: {1 - leased}"
            )
        seat = EngineSeat(hello, int(self._kv_memory * share), self._clock, self._cold)
        if not self._seats:
            self._engine, self._served_since = hello.engine, self._clock()
        self._seats[hello.seat] = seat
        self.loop.build(seat)
        return seat

    def _end_seat(self, seat: EngineSeat, reason: str) -> None:
        if seat.ended:
            return
        seat.ended = reason
        del self._seats[seat.number]
        if not self._seats:
            self._engine = ""
        for session in list(seat.sessions.values()):
            self.end(session, reason)
        logger.info("place %d is free: %s", seat.number, reason)
        self.loop.free(seat)

    def _lingering(self) -> list[EngineSeat]:
        return [seat for seat in self._seats.values() if not seat.sessions]

    def _occupied(self) -> str:
        now, engine = self._clock(), f"engine {self._engine:.8}"
        if self._sessions:
            return f"worker {self._name} is busy with {engine}, served for {now - self._served_since:.1f} seconds"
        away = now - max(seat.away_since for seat in self._seats.values())
        seconds_left = max(seat.away_since + seat.linger for seat in self._seats.values()) - now
        return (
            f"worker {self._name} is busy: it keeps the KV of {engine}, which has been away for {away:.1f} seconds, "
            f"for {max(0.0, seconds_left):.1f} seconds more"
        )

    # Called by the loop.

    def _fail(self, seat: EngineSeat, reason: str) -> None:
        with self._lock:
            self._end_seat(seat, reason)

    def _freed(self, seat: EngineSeat) -> None:
        with self._lock:
            done = seat.counters
            self._totals.batches += done.batches
            self._totals.queries += done.queries
            self._totals.vectors_stored += done.vectors_stored
            self._traffic.add(seat.traffic)
