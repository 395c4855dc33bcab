"""Drains of attention workers: each is a mark at the worker's holders, which the mover follows.

A marked holder gets no new sequence. What it keeps moves to other holders while all sequences go on, and the worker is
let go once its holders are empty. Everything is called between two batches.
"""

from __future__ import annotations

import logging
from collections.abc import Set
from concurrent.futures import Future
from typing import NamedTuple

from lamina.engine.holders import HolderChange, Holders
from lamina.engine.kv_migration import AT_ONCE, KvMigration
from lamina.errors import EngineError, InvalidRequest
from lamina.kv.relocation import elsewhere, to_preempt
from lamina.kv.request import ScheduledSequence
from lamina.scheduling.control_plane import ControlPlane

logger = logging.getLogger("lamina")

_EVICTED = 32  # cached prefixes that are given up between two steps, at most


class _Drain(NamedTuple):
    """A drain under way of these holders. `copied`: the tokens that all moves had copied before it."""

    numbers: tuple[int, ...]
    done: Future[int]
    copied: int


class Drains:
    """The drains under way, by the attention worker's name."""

    def __init__(self, control: ControlPlane, holders: Holders, migration: KvMigration) -> None:
        self._control = control
        self._holders = holders
        self._migration = migration
        self._drains: dict[str, _Drain] = {}
        self._refused: set[str] = set()  # the workers that are about to end and could not be drained

    @property
    def under_way(self) -> bool:
        """Whether a worker is drained."""
        return bool(self._drains)

    def begin(self, name: str, done: Future[int]) -> None:
        """Have an attention worker go once its KV is elsewhere. The result is how many tokens moves have copied
        meanwhile.

        It is InvalidRequest for an unknown name, for one that is drained already and for the last one that is not, and
        EngineError where the worker is lost, no other is left, or a move fails; then the worker stays.
        """
        if not done.set_running_or_notify_cancel():
            return
        if why := self._refusal(name):
            done.set_exception(InvalidRequest(why))
            return
        numbers = tuple(self._holders.numbers(name))
        self._drains[name] = _Drain(numbers, done, self._migration.tokens)
        self._migration.abandon(set(numbers))
        self._control.drain(numbers)

    def leaving(self, name: str) -> None:
        """An attention worker is about to end, and asks, with each heartbeat, that its KV be moved: it is drained as
        soon as that is possible."""
        if not self._holders.numbers(name) or name in self._drains:  # it is gone by now, or about to be
            return
        if not (why := self._refusal(name)):
            logger.info("attention worker %s is about to end: its KV moves to the others", name)
            self.begin(name, Future())
        elif name not in self._refused:
            self._refused.add(name)
            logger.warning("attention worker %s is about to end with its KV: %s", name, why)

    def _refusal(self, name: str) -> str:
        """Why a worker cannot be drained; "" where it can."""
        numbers = self._holders.numbers(name)
        if not numbers:
            known = ", ".join(dict.fromkeys(self._holders.names.values()))
            return f"no attention worker is called {name!r:.80}; there are {known}"
        if name in self._drains:
            return f"{name} is being drained already"
        if {number for number, _ in self._control.placement.capacity} <= set(numbers):
            return f"{name} is the only attention worker: there is none to move its KV to"
        return ""

    def step(self, in_flight: Set[int]) -> None:
        """Begin moves, and let the workers go that are empty. Batches under way concern the holders `in_flight`."""
        if not self._drains:
            return
        self._vacate()
        for name, drain in list(self._drains.items()):
            if self._control.vacated(drain.numbers) and in_flight.isdisjoint(drain.numbers):
                self._holders.let_go(drain.numbers)
                del self._drains[name]
                moved = self._migration.tokens - drain.copied
                logger.info("attention worker %s is drained: %d tokens were copied meanwhile", name, moved)
                drain.done.set_result(moved)

    def give_up(self, why: Exception) -> None:
        """Every drain ends with an error: a move has failed, or the engine stops. The workers stay."""
        for name in list(self._drains):
            self._fail(name, why)

    def holders_changed(self, change: HolderChange) -> None:
        """After a loss: drains of lost workers end with an error, and those of workers that are needed again."""
        self._refused.difference_update(change.names)
        if change.kind != "lost":
            return
        for name, drain in list(self._drains.items()):
            if name in change.names:
                self._fail(name, "it is lost")
            elif not self._control.placement.draining.issuperset(drain.numbers):
                self._fail(name, "no other attention worker is left")

    def _fail(self, name: str, why: object) -> None:
        drain = self._drains.pop(name)
        self._control.stay(drain.numbers)
        drain.done.set_exception(EngineError(f"{name} could not be drained: {why}"))

    def _vacate(self) -> None:
        """Begin moves away from draining holders. Where none is possible any more, one sequence gives its KV back, and
        is computed again elsewhere."""
        scheduler, draining = self._control.scheduler, self._control.placement.draining
        cache, kept = scheduler.running.prefix_cache, scheduler.running.kept_by(draining)
        for _ in range(_EVICTED):
            cache.evict(self._control.placement.places(draining))
        moving, stuck = self._migration.under_way, list[ScheduledSequence]()
        for sequence in kept:
            if len(self._migration.under_way) >= AT_ONCE:
                return
            if sequence.decodes and sequence not in moving and not self._begin(sequence):
                stuck.append(sequence)
        victim = to_preempt(kept, self._migration.under_way, stuck)
        if victim is not None:
            scheduler.admission.preempt(victim)

    def _begin(self, sequence: ScheduledSequence) -> bool:
        """Have a sequence move to where there is room. False where there is none, nor any after batches under way."""
        scheduler = self._control.scheduler
        room = scheduler.ledger.unpromised() + scheduler.running.prefix_cache.evictable
        layouts = elsewhere(self._control.placement, sequence.layout, room)
        there = {share.at for layout in layouts for share in layout}
        return any(self._migration.begin(sequence, layout) for layout in layouts) or scheduler.copies.in_use(there)
