"""What has happened to an engine and its holders, for the built-in page: a short list, found by comparing looks.

Nothing looks by itself. So an event has two times: it happened after `since`, the look before, and not later than `at`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lamina.messages.snapshot import Snapshot

MOST = 64
"""Events kept; older ones are forgotten."""

What = Literal["lost", "joined", "dead", "halted", "restarted"]

ENGINE = "engine"
AWAY: tuple[What, ...] = ("lost", "dead", "halted")
"""What lasts until something is back."""


@dataclass(slots=True)
class Event:
    """`subject` is a holder's name, or "engine". `back`, where it is lost, dead or halted: when it was seen again.
    `tokens`: KV of so many tokens was computed again since. Times are in seconds since 1970."""

    subject: str
    what: What
    since: float
    at: float
    why: str = ""
    tokens: int = 0
    back: float | None = None


class Events:
    """`clock` gives seconds since 1970. The first look compares with a server that has just started."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._events: deque[Event] = deque(maxlen=MOST)
        self._looked = clock()
        self._restarts = 0
        self._last: Snapshot | None = None

    def look(self, state: str, why: str, restarts: int, snapshot: Snapshot | None) -> list[dict[str, Any]]:
        """Compare with the last look. Returns all events as plain data, the newest first. `why` is that of a state
        other than "ready"."""
        now = self._clock()
        self._engine(state, why, restarts, now)
        if snapshot is not None and state != "dead":  # a dead engine's snapshot is an old one
            self._holders(snapshot, now)
        self._looked = now
        return [asdict(event) for event in reversed(self._events)]

    def _engine(self, state: str, why: str, restarts: int, now: float) -> None:
        died = self._open(ENGINE, "dead")
        if state == "dead" and died is None:
            self._add(ENGINE, "dead", now, why)
        elif state == "halted" and self._open(ENGINE, "halted") is None:
            self._add(ENGINE, "halted", now, why)
        elif state == "ready":
            self._came_back(ENGINE, now)
            if restarts - self._restarts > (died is not None):
                self._add(ENGINE, "restarted", now)
            self._restarts = restarts

    def _holders(self, snapshot: Snapshot, now: float) -> None:
        before = self._last if self._last is not None and self._last.began == snapshot.began else None
        self._last = snapshot
        names = {holder.name for holder in snapshot.holders}
        known = {holder.name for holder in before.holders} if before else names
        lost = [name for name in snapshot.missing if self._open(name, "lost") is None]
        away = {event.subject for event in self._events if event.what == "lost" and event.back is None}
        replaced = {name for name in away.difference(snapshot.missing) if self._came_back(name, now)}
        for name in lost:
            self._add(name, "lost", now)
        for name in sorted(names - known):
            if name not in replaced and name.rpartition(".")[0] not in replaced:  # a worker starts again as NAME.1
                self._add(name, "joined", now)
        unseen = snapshot.lost_holders - (before.lost_holders if before else 0) - len(lost)
        if unseen > 0:  # lost and back between two looks
            self._add("1 holder" if unseen == 1 else f"{unseen} holders", "lost", now).back = now
        again = snapshot.rebuilt_tokens - (before.rebuilt_tokens if before else 0)
        cause = next((event for event in reversed(self._events) if event.what in ("lost", "dead", "restarted")), None)
        if again > 0 and cause is not None:
            cause.tokens += again

    def _open(self, subject: str, what: What) -> Event | None:
        found = (event for event in self._events if (event.subject, event.what, event.back) == (subject, what, None))
        return next(found, None)

    def _came_back(self, subject: str, now: float) -> bool:
        """Whether something of that name was lost, dead or halted, and no longer is."""
        away = [event for what in AWAY if (event := self._open(subject, what)) is not None]
        for event in away:
            event.back = now
        return bool(away)

    def _add(self, subject: str, what: What, now: float, why: str = "") -> Event:
        event = Event(subject, what, self._looked, now, why)
        self._events.append(event)
        return event
