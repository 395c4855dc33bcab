"""Holders come, go, and hand over what they keep, between batches. Keeps worker, scheduler and placement in step.

Knows nothing of requests and clients; whoever calls must have no batch under way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lamina.engine.kv_migration import KvMigration
from lamina.errors import InvalidRequest
from lamina.scheduling.kv_shares import Layout, Pages, Share
from lamina.scheduling.placement import Holder, Placement
from lamina.scheduling.request import ScheduledSequence
from lamina.scheduling.scheduler import Scheduler
from lamina_protocols.channels import Credentials
from lamina_protocols.messages import Announced, Fork, Surveyed
from lamina_protocols.routes import HolderBatch
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.interface import Seat, Workers
from lamina_workers.parallel.peers import Peer
from lamina_workers.ports.port import AttentionPort

logger = logging.getLogger("lamina")


def seated(seat: Seat) -> Holder:
    """A rank's seat at an attention worker, as placement sees it."""
    holder = Holder(seat.pages, seat.weight, rank=seat.rank)
    if seat.kept is not None:
        holder.keeps(seat.kept)
    return holder


class Holders:
    """The holders of one engine, by number and by name."""

    def __init__(
        self,
        worker: Workers[Peer],
        scheduler: Scheduler,
        placement: Placement,
        names: dict[int, str],
        scratch: frozenset[int],
        mover: KvMigration,
    ) -> None:
        self._mover = mover
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

    @property
    def halted(self) -> bool:
        """Whether nothing can be computed before somebody joins or comes back."""
        return self.empty or bool(self.missing)

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks of model workers that are gone, and not back yet."""
        return self._worker.missing

    def answered(self, shares: Mapping[int, HolderBatch], answers: Mapping[int, Announced]) -> Pages:
        """Holders have answered an announcement: those that accept have what it told them. Returns the pages that they
        have left, of those that the scheduler knows."""
        for number, answer in answers.items():
            if answer.accepted:
                self._placement.holders[number].accepted(shares[number])
        return Pages({number: answer.free_pages for number, answer in answers.items() if number not in self._scratch})

    def ask_for_room(self, numbers: Iterable[int]) -> None:
        """Have holders apply what waits for them, and say how many pages they have left."""
        shares = {number: self._placement.holders[number].outgoing() for number in numbers}
        try:
            _, answers = self._worker.announce_now(shares)
        except HolderFault as fault:  # it is met again, and seen to, by the first batch
            logger.warning("%s", fault)
            return
        self._scheduler.told(self.answered(shares, answers))

    def join(self, port: AttentionPort, holder: Holder, credentials: Credentials | None = None) -> None:
        """One attention worker more, with a holder for each rank; new sequences use it. `credentials` are for the other
        ranks, which connect to it too. Raises HolderFault where one of them cannot."""
        first = self._last + 1
        holders = [holder, *map(seated, self._worker.join(first, port, credentials))]
        for number, joining in enumerate(holders, first):
            self.names[number] = port.name
            self._placement.joined(number, joining)
            self._scheduler.joined(number, joining.pages)
        self._last += len(holders)
        pages = sum(joining.pages for joining in holders)
        logger.info("attention worker %s joined with %d KV pages", port.name, pages)

    def numbers(self, name: str) -> list[int]:
        """The holders of that name, one a rank. Raises InvalidRequest where there is none."""
        if found := [number for number, known in self.names.items() if known == name]:
            return found
        known = ", ".join(dict.fromkeys(self.names.values()))
        raise InvalidRequest(f"no attention worker is called {name!r:.80}; there are {known}")

    def companions(self, numbers: Sequence[int]) -> list[int]:
        """Those holders, and all others at the same attention workers."""
        names = {self.names[number] for number in numbers}
        return [number for number, name in self.names.items() if name in names]

    def emptied(self, numbers: Sequence[int]) -> None:
        """These pools in the process of a model worker that was started again have nothing of what they had."""
        whole = 0
        for number in numbers:
            self._placement.emptied(number)
            if number not in self._scratch:
                whole += self._scheduler.emptied(number, self._placement.holders[number].pages)
        if whole:
            logger.warning("%d tokens of KV that a model worker kept itself are computed again", whole)

    def torn(self, kept: Mapping[int, Surveyed]) -> list[int]:
        """Of these holders, those that lack some of a sequence in some layer: what a model worker was
        sending when it died may never have arrived."""
        sequences = {sequence.handle: sequence for sequence in self._scheduler.sequences}
        torn = []
        for number, surveyed in kept.items():
            held = {part.handle: part.held for part in surveyed.parts}
            for operation in self._placement.holders[number].waiting(surveyed.next_operation):
                if isinstance(operation, Fork):  # not told yet, so nothing of it can be missing that its parent has
                    held[operation.handle] = min(operation.length, held.get(operation.parent, 0))
            for handle, parts in self._placement.kept_by(number).items():
                if (sequence := sequences.get(handle)) is None:
                    continue
                for part in parts:
                    rebuild, share = sequence.rebuild, part.share
                    due = rebuild.at if rebuild is not None and share in rebuild.missing else sequence.computed
                    if held.get(part.handle, share.lo) < min(due, share.hi):
                        torn.append(number)
        return list(dict.fromkeys(torn))

    def lose(self, numbers: Sequence[int]) -> int:
        """These holders are gone. What they kept is opened elsewhere; returns how many tokens are computed again for
        it, beside sequences that begin anew."""
        lost = dict.fromkeys(self.names[number] for number in numbers)
        for number in numbers:
            self._worker.leave(number)
            self._placement.lost(number)
            del self.names[number]
        for name in lost:
            logger.warning("attention worker %s is lost", name)
        rebuilt = whole = 0
        for number in numbers:
            again, anew = self._scheduler.lost(number)
            rebuilt, whole = rebuilt + again, whole + anew
        left = ", ".join(dict.fromkeys(self.names.values())) or ("whoever joins" if self.empty else "this machine")
        logger.warning("on %s: %d tokens of lost KV are computed again, %d from the start", left, rebuilt, whole)
        return rebuilt

    def drain(self, name: str) -> int:
        """Move all that an attention worker keeps to the others, then let it go. Returns how many tokens' KV moved.

        What finds no room elsewhere is computed again when there is some. Raises InvalidRequest for the last one and
        for an unknown name, HolderFault where it cannot be done.
        """
        numbers = self.numbers(name)
        if set(self._placement.capacity) <= set(numbers):
            raise InvalidRequest(f"{name} is the only attention worker: there is nobody to move its KV to")
        holders = [self._placement.holders[number] for number in numbers]
        for holder in holders:
            holder.draining = True
        try:
            moved = max([self._empty(number) for number in numbers])  # each rank moves its heads of the same tokens
        except HolderFault:
            for holder in holders:
                holder.draining = False  # nothing is lost, and it keeps what has not moved
            raise
        for number in numbers:
            self._worker.leave(number)
            self._placement.lost(number)
            self._scheduler.left(number)
            del self.names[number]
        logger.info("attention worker %s is drained: %d tokens moved", name, moved)
        return moved

    def _empty(self, number: int) -> int:
        self._scheduler.forget_prefixes()
        self._flush()
        moved = sum(self._move_sequence(sequence, number) for sequence in self._scheduler.kept_by(number))
        self._flush()
        return moved

    def _move_sequence(self, sequence: ScheduledSequence, number: int) -> int:
        """How many tokens of it moved: 0 where the others have no room, and it will be computed again."""
        gone = [share for share in sequence.layout if share.holder == number]
        for layout in self._without(sequence, number):
            if self._mover.move_now(sequence, layout):
                return sum(max(0, min(sequence.computed, share.hi) - share.lo) for share in gone)
        self._scheduler.preempt(sequence)
        return 0

    def _without(self, sequence: ScheduledSequence, number: int) -> Iterator[Layout]:
        """Where it could be instead: what was there at one of the others, or all of it here."""
        layout: list[Share] = []
        for share in sequence.layout:
            other = self._placement.substitute(share, self._scheduler.room()) if share.holder == number else share
            if other is not None:
                layout.append(other)
        if len(layout) == len(sequence.layout):
            yield tuple(layout)
        if here := self._placement.layout(sequence.longest, local=True):
            yield here

    def _flush(self) -> None:
        """Have every operation that waits applied: closes free the room that is moved into."""
        while (plan := self._scheduler.plan_operations()) is not None or self._placement.pending:
            shares: dict[int, HolderBatch] = (
                self._placement.place(plan) if plan is not None else self._placement.outgoing()
            )
            try:
                _, answers = self._worker.announce_now(shares)
            except HolderFault:
                if plan is not None:
                    self._scheduler.drop(plan)
                raise
            free = self.answered(shares, answers)
            if refusal := next((answer for answer in answers.values() if not answer.accepted), None):
                raise HolderFault(f"operations were refused: {refusal.reason}")
            if plan is not None:
                self._scheduler.accepted(plan, free, ())
