"""Holders come, go, and hand over what they keep, between batches. Keeps worker, scheduler and placement in step.

Knows nothing of requests and clients; whoever calls must have no batch under way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lamina.errors import InvalidRequest
from lamina.placement import Holder, Part, Placement
from lamina.request import Sequence as Sample
from lamina.scheduler import Scheduler
from lamina.shares import Pages
from lamina_protocols.messages import Row
from lamina_workers.attention_port import AttentionPort
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker import ModelWorker, Move
from lamina_workers.routes import HolderShare, Route

logger = logging.getLogger("lamina")

MOVE_TOKENS = 1024  # copied at a time


class Fleet:
    """The holders of one engine, by number and by name."""

    def __init__(
        self,
        worker: ModelWorker,
        scheduler: Scheduler,
        placement: Placement,
        names: dict[int, str],
        scratch: frozenset[int],
    ) -> None:
        self._worker = worker
        self._scheduler = scheduler
        self._placement = placement
        self.names = dict(names)
        self._scratch = scratch  # holders that have prompts only, of which the scheduler knows nothing
        self._last = max(names, default=0)

    @property
    def empty(self) -> bool:
        """Whether nobody is left to keep KV."""
        return not self._placement.capacity

    def join(self, port: AttentionPort, holder: Holder) -> int:
        """One holder more; new sequences use it. Returns its number."""
        self._last += 1
        number = self._last
        self.names[number] = port.name
        self._worker.join(number, port)
        self._placement.joined(number, holder)
        self._scheduler.joined(number, holder.pages)
        logger.info("attention worker %s joined with %d KV pages", port.name, holder.pages)
        return number

    def number(self, name: str) -> int:
        """The holder of that name. Raises InvalidRequest where there is none."""
        for number, known in self.names.items():
            if known == name:
                return number
        raise InvalidRequest(f"no attention worker is called {name!r:.80}; there are {', '.join(self.names.values())}")

    def lose(self, numbers: Sequence[int]) -> int:
        """These holders are gone. What they kept is opened elsewhere; returns how many tokens are computed again for
        it, beside sequences that begin anew."""
        for number in numbers:
            self._worker.leave(number)
            self._placement.lost(number)
            logger.warning("attention worker %s is lost", self.names.pop(number))
        rebuilt = whole = 0
        for number in numbers:
            again, anew = self._scheduler.lost(number)
            rebuilt, whole = rebuilt + again, whole + anew
        left = ", ".join(self.names.values()) or "whoever joins"
        logger.warning("on %s: %d tokens of lost KV are computed again, %d from the start", left, rebuilt, whole)
        return rebuilt

    def drain(self, number: int) -> int:
        """Move all that a holder keeps to the others, then let it go. Returns how many tokens' KV moved.

        What finds no room elsewhere is computed again when there is some. Raises InvalidRequest for the last holder.
        """
        if set(self._placement.capacity) <= {number}:
            raise InvalidRequest(
                f"{self.names[number]} is the only attention worker: there is nobody to move its KV to"
            )
        holder = self._placement.holders[number]
        holder.draining = True
        try:
            moved = self._empty(number)
        except HolderFault:
            holder.draining = False  # nothing is lost, and it keeps what has not moved
            raise
        self._worker.leave(number)
        self._placement.lost(number)
        self._scheduler.left(number)
        logger.info("attention worker %s is drained: %d tokens moved", self.names.pop(number), moved)
        return moved

    def _empty(self, number: int) -> int:
        self._scheduler.forget_prefixes()
        self._flush()
        moved = sum(self._move_sequence(sequence, number) for sequence in self._scheduler.kept_by(number))
        self._flush()
        return moved

    def _move_sequence(self, sequence: Sample, number: int) -> int:
        """How many tokens of it moved: 0 where the others have no room, and it will be computed again."""
        handle = sequence.handle
        if handle is None or sequence.rebuild is not None:  # what is not whole cannot be moved
            self._scheduler.preempt(sequence)
            return 0
        moved = 0
        for part in self._placement.kept_by(number).get(handle, []):
            target = self._placement.substitute(part.share, self._scheduler.room())
            if target is None:
                self._scheduler.preempt(sequence)
                return 0
            new = self._placement.move(part, target.holder)
            try:
                fits = self._copy(sequence, part, new)
            except HolderFault:
                self._placement.give_up(new)
                raise
            if not fits:
                self._placement.give_up(new)
                self._scheduler.preempt(sequence)
                return 0
            self._placement.moved(handle, part, new)
            self._scheduler.moved(sequence, part.share, new.share)
            moved += max(0, min(sequence.computed, part.share.hi) - part.share.lo)
        return moved

    def _copy(self, sequence: Sample, part: Part, new: Part) -> bool:
        origin, to = part.share.holder, new.share.holder
        lo, end = part.share.lo, min(sequence.computed, part.share.hi)
        for start in range(lo, end, MOVE_TOKENS):
            stop = min(start + MOVE_TOKENS, end)
            row = Row(new.handle, start, stop - start, None, True)
            share = self._placement.holders[to].outgoing((Route(0, part.share.heads, row, (start, stop)),))
            if not self._worker.copy([Move(origin, part.handle, to, new.handle, start, stop)], {to: share}):
                return False
            self._placement.holders[to].accepted(share)
        return True

    def _flush(self) -> None:
        """Have every operation that waits applied: closes free the room that is moved into."""
        while (plan := self._scheduler.plan_operations()) is not None or self._placement.pending:
            shares: dict[int, HolderShare] = (
                self._placement.place(plan) if plan is not None else self._placement.outgoing()
            )
            try:
                _, answers = self._worker.announce_now(shares)
            except HolderFault:
                if plan is not None:
                    self._scheduler.drop(plan)
                raise
            for number, share in shares.items():
                self._placement.holders[number].accepted(share)
            if plan is not None:
                free = Pages(
                    {number: reply.free_pages for number, reply in answers.items() if number not in self._scratch}
                )
                self._scheduler.accepted(plan, free, ())
