"""Keeps the share of KV that is attended beside the model where `LocalShare` wants it: measures, and moves sequences.

Without holders on both sides it does nothing but let moves go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lamina.engine.kv_migration import KvMigration
from lamina.engine.observers import BatchDone
from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.local_share import Batch, to_move, whole_step
from lamina.scheduling.request import ScheduledSequence

if TYPE_CHECKING:
    from lamina.engine.holders import HolderChange

AT_ONCE = 4  # moves that wait or are under way
PAUSE = 0.5  # of a step, that copying may take between two of them
WORTH = 16  # tokens that a sequence must have before it for a move to pay


class TierController:
    """The two tiers of one engine: the local pools, and attention workers."""

    def __init__(self, control: ControlPlane, migration: KvMigration, clock: Callable[[], float]) -> None:
        self._control = control
        self._lanes = control.lanes
        self._migration = migration
        self._scheduler = control.scheduler
        self._placement = control.placement
        self._clock = clock
        self._last: float | None = None  # when the decode batch before was over
        self._step = 0.01  # seconds of one, lately
        self._parts: list[Batch] = []  # of the batches that are a step of all lanes together
        self._moving = False  # since the last decode batch
        self._placement.local_share = self._control.local_share.share

    @property
    def busy(self) -> bool:
        """Whether sequences are moving."""
        return bool(self._migration.under_way)

    @property
    def settled(self) -> bool:
        """Whether nothing is being tried or moved: what is measured elsewhere is not disturbed."""
        return not self._placement.tiers or (self._control.local_share.settled and not self.busy)

    @property
    def _all_local(self) -> bool:
        """Whether no attention worker is asked, so that there is none to wait for."""
        return (
            self._placement.tiers
            and len(self._scheduler.running) > 0
            and all(self._placement.is_local(sequence.layout) for sequence in self._scheduler.running)
        )

    @property
    def local_share(self) -> float:
        """Of the tokens of sequences with KV, those here."""
        local = total = 0
        for sequence in self._scheduler.running:
            local += len(sequence.tokens) if self._placement.is_local(sequence.layout) else 0
            total += len(sequence.tokens)
        return local / total if total else self._control.local_share.share

    def step(self) -> None:
        """Between two batches: begin moves that are wanted, and go on with those under way. Raises HolderFault."""
        if self._placement.tiers:
            self._placement.local_share = self._control.local_share.share
            self._choose()
        if self.busy:
            self._moving = True
            self._migration.step(PAUSE * self._step)

    def abandon(self) -> None:
        """Give up moves, and what was being measured."""
        self._migration.abandon()
        self._interrupted()

    def holders_changed(self, change: HolderChange) -> None:
        """What was measured of other holders is forgotten."""
        self._control.local_share.reset()
        self._interrupted()

    def batch_done(self, done: BatchDone) -> None:
        """Learn from a decode batch, and decide how many lanes the next ones have."""
        self._measure(done)
        if self._all_local:
            self._lanes.alone()
        else:
            mixed = done.prefill or not self.settled
            self._lanes.completed(done.sampled, done.requests, mixed, done.now, done.attended)

    def _measure(self, done: BatchDone) -> None:
        last, self._last = self._last, done.now
        if self._lanes.trying or last is None or not self._placement.tiers or done.prefill:
            self._interrupted()
            self._last = done.now
            return
        times, lanes = done.times, self._lanes.count
        self._parts.append(
            Batch(
                done.local_tokens, done.remote_tokens, times.local, times.remote, times.answered, times.waited,
                done.now - last, done.running, lanes,
            )
        )  # fmt: skip
        if len(self._parts) < lanes:
            return
        whole = whole_step(self._parts)
        self._parts.clear()
        if not self._moving:
            self._step = whole.seconds / lanes
        self._control.local_share.completed(whole, self._moving or self.busy)
        self._moving = False

    def _interrupted(self) -> None:
        self._control.local_share.interrupted()
        self._last = None
        self._parts.clear()

    def _choose(self) -> None:
        """Begin moves towards the share that is wanted, as far as there is room."""
        under_way = self._migration.under_way
        if len(under_way) >= AT_ONCE:
            return
        local = total = 0
        here: list[ScheduledSequence] = []
        there: list[ScheduledSequence] = []
        for sequence in self._scheduler.running:
            tokens = len(sequence.tokens)
            is_local = self._placement.is_local(under_way.get(sequence, sequence.layout))
            total += tokens
            local += tokens if is_local else 0
            if self._can_move(sequence) and sequence not in under_way:
                (here if is_local else there).append(sequence)
        off = self._control.local_share.share * total - local
        candidates = there if off > 0 else here
        chosen = to_move([len(sequence.tokens) for sequence in candidates], abs(off), AT_ONCE - len(under_way))
        for at in chosen:
            sequence = candidates[at]
            layout = self._placement.layout(sequence.longest, local=off > 0)
            capacity = self._placement.capacity
            if layout and capacity.covers(self._scheduler.config.pages_for(layout, sequence.longest)):
                self._migration.begin(sequence, layout)

    @staticmethod
    def _can_move(sequence: ScheduledSequence) -> bool:
        """Whether it decodes, and will for a while."""
        if sequence.finish_reason is not None or sequence.rebuild is not None:
            return False
        decodes = sequence.computed >= len(sequence.request.prompt)
        return decodes and sequence.longest - sequence.computed >= WORTH
