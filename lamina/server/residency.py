"""Which models are loaded, decided from who uses them and who waits: pure, without clocks or threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TURN = 5.0
"""Seconds that a request waits while all loaded models are in use; then one of them takes no new requests, and is
unloaded once those under way have ended. Less would swap models back and forth, more would keep others out."""


@dataclass(frozen=True, slots=True)
class ModelUse:
    """One model at one moment. `place`: it has memory ("in"), is giving it back ("leaving"), or has none ("out");
    `settled`: it is in, and loaded. `users` requests have it, the last one left at `used`; it came in at `begun`;
    a request waits for it since `wanted`. Times are seconds of one clock."""

    name: str
    place: Literal["in", "leaving", "out"]
    settled: bool = True
    users: int = 0
    used: float = 0.0
    begun: float = 0.0
    wanted: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to happen: models to load, models to unload, and `closed` ones, whose new requests wait."""

    load: tuple[str, ...] = ()
    unload: tuple[str, ...] = ()
    closed: frozenset[str] = frozenset()


def decide(uses: Sequence[ModelUse], max_loaded: int, idle_unload: float | None, now: float) -> Decision:
    """The model that is waited for longest comes first. Room is made of models that nobody uses, the least recently
    used one first. Where all are used and the wait is longer than `TURN`, it is made of the model that was loaded first
    and has been there as long, once it is free."""
    wanted = sorted((use for use in uses if use.place == "out" and use.wanted is not None), key=_since)
    room = max_loaded - sum(use.place != "out" for use in uses)
    load, rest = wanted[: max(0, room)], wanted[max(0, room) :]
    missing = len(rest) - sum(use.place == "leaving" for use in uses)
    settled = [use for use in uses if use.place == "in" and use.settled]
    unload: list[ModelUse] = []
    closed: list[ModelUse] = []
    if missing > 0:
        overdue = sum(now - _since(use) >= TURN for use in rest)
        had_turn = [use for use in settled if now - use.begun >= TURN]
        closed = sorted(had_turn, key=lambda use: use.begun)[: min(missing, overdue)]
        idle = [use for use in settled if not use.users and (use.wanted is None or use in closed)]
        unload = sorted(idle, key=lambda use: use.used)[:missing]
    if idle_unload is not None:
        unload += [
            use
            for use in settled
            if use not in unload and not use.users and use.wanted is None and now - use.used >= idle_unload
        ]
    return Decision(
        tuple(use.name for use in load), tuple(use.name for use in unload), frozenset(use.name for use in closed)
    )


def _since(use: ModelUse) -> float:
    return use.wanted if use.wanted is not None else float("inf")
