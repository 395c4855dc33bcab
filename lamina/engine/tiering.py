"""Keeps the share of KV that is attended beside the model where `balance` wants it: measures, and has sequences moved.

Knows balance, mover, scheduler and placement, and the times of batches. Without holders on both sides it does nothing
but let the mover go on.
"""

from __future__ import annotations

from collections.abc import Callable

from lamina.engine.kv_migration import KvMigration
from lamina.scheduling.local_share import Batch, LocalShare, to_move
from lamina.scheduling.placement import Placement
from lamina.scheduling.request import Plan, ScheduledSequence
from lamina.scheduling.scheduler import Scheduler
from lamina_workers.ports.timing import Times

AT_ONCE = 4  # moves that wait or are under way
PAUSE = 0.5  # of a step, that copying may take between two of them
WORTH = 16  # tokens that a sequence must have before it for a move to pay


class TierController:
    """The two tiers of one engine: holders here, and attention workers."""

    def __init__(
        self,
        balance: LocalShare,
        mover: KvMigration,
        scheduler: Scheduler,
        placement: Placement,
        clock: Callable[[], float],
    ) -> None:
        self.balance = balance
        self._mover = mover
        self._scheduler = scheduler
        self._placement = placement
        self._clock = clock
        self._last: float | None = None  # when the decode batch before was over
        self._step = 0.01  # seconds of one, lately
        self._parts: list[Batch] = []  # of the batches that are a step of all lanes together
        self._moving = False  # since the last decode batch
        placement.local_share = balance.share

    @property
    def busy(self) -> bool:
        """Whether sequences are moving."""
        return bool(self._mover.under_way)

    @property
    def settled(self) -> bool:
        """Whether nothing is being tried or moved: what is measured elsewhere is not disturbed."""
        return not self._placement.tiers or (self.balance.settled and not self.busy)

    @property
    def all_local(self) -> bool:
        """Whether nobody remote is asked, so that there is nobody to wait for."""
        return (
            self._placement.tiers
            and self._scheduler.running > 0
            and all(self._placement.is_local(sequence.layout) for sequence in self._scheduler.sequences)
        )

    @property
    def local_share(self) -> float:
        """Of the tokens of sequences with KV, those here."""
        local = total = 0
        for sequence in self._scheduler.sequences:
            local += len(sequence.tokens) if self._placement.is_local(sequence.layout) else 0
            total += len(sequence.tokens)
        return local / total if total else self.balance.share

    def step(self) -> None:
        """Between two batches: begin moves that are wanted, and go on with those under way. Raises HolderFault."""
        if self._placement.tiers:
            self._placement.local_share = self.balance.share
            self._choose()
        if self.busy:
            self._moving = True
            self._mover.step(PAUSE * self._step)

    def abandon(self) -> None:
        """Whatever was under way is given up, moves too."""
        self._mover.abandon()
        self._interrupted()

    def changed(self) -> None:
        """Holders have come or gone."""
        self.balance.reset()
        self._interrupted()

    def completed(self, plan: Plan, times: Times, lanes: int, trying: bool) -> None:
        """A batch is computed, and not recorded yet. `trying`: a number of lanes is being tried, so that nothing can
        be learned about anything else."""
        now = self._clock()
        last, self._last = self._last, now
        if trying or last is None or not self._placement.tiers or any(row.count > 1 for row in plan.rows):
            self._interrupted()
            self._last = now
            return
        local = remote = 0
        for row in plan.rows:
            if self._placement.is_local(row.sequence.layout):
                local += row.start + 1
            else:
                remote += row.start + 1
        self._parts.append(
            Batch(
                local, remote, times.local, times.remote, times.answered, times.waited, now - last,
                self._scheduler.running, lanes,
            )
        )  # fmt: skip
        if len(self._parts) < lanes:
            return
        whole = Batch(
            sum(part.local_tokens for part in self._parts),
            sum(part.remote_tokens for part in self._parts),
            sum(part.local_seconds for part in self._parts),
            sum(part.remote_seconds for part in self._parts),
            sum(part.answered for part in self._parts),
            sum(part.waited for part in self._parts),
            sum(part.seconds for part in self._parts),
            self._scheduler.running,
            lanes,
        )
        self._parts.clear()
        if not self._moving:
            self._step = whole.seconds / lanes
        self.balance.completed(whole, self._moving or self.busy)
        self._moving = False

    def _interrupted(self) -> None:
        self.balance.interrupted()
        self._last = None
        self._parts.clear()

    def _choose(self) -> None:
        """Begin moves towards the share that is wanted, as far as there is room."""
        under_way = self._mover.under_way
        if len(under_way) >= AT_ONCE:
            return
        local = total = 0
        here: list[ScheduledSequence] = []
        there: list[ScheduledSequence] = []
        for sequence in self._scheduler.sequences:
            tokens = len(sequence.tokens)
            is_local = self._placement.is_local(under_way.get(sequence, sequence.layout))
            total += tokens
            local += tokens if is_local else 0
            if self._can_move(sequence) and sequence not in under_way:
                (here if is_local else there).append(sequence)
        off = self.balance.share * total - local
        candidates = there if off > 0 else here
        chosen = to_move([len(sequence.tokens) for sequence in candidates], abs(off), AT_ONCE - len(under_way))
        for at in chosen:
            sequence = candidates[at]
            layout = self._placement.layout(sequence.longest, local=off > 0)
            capacity = self._placement.capacity
            if layout and capacity.covers(self._scheduler.config.pages_for(layout, sequence.longest)):
                self._mover.begin(sequence, layout)

    @staticmethod
    def _can_move(sequence: ScheduledSequence) -> bool:
        """Whether it decodes, and will for a while."""
        if sequence.finish_reason is not None or sequence.rebuild is not None:
            return False
        decodes = sequence.computed >= len(sequence.request.prompt)
        return decodes and sequence.longest - sequence.computed >= WORTH
