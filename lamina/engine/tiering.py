"""Keeps the share of KV in the local pools where `LocalShare` wants it: measures batches, and moves sequences.

Without both local pools and other holders it only lets moves go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lamina.engine.kv_migration import KvMigration
from lamina.engine.observers import BatchDone
from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.kv_shares import Layout
from lamina.scheduling.local_share import Batch, to_move, whole_step
from lamina.scheduling.request import ScheduledSequence

if TYPE_CHECKING:
    from lamina.engine.holders import HolderChange

AT_ONCE = 4  # moves under way, at most
PAUSE = 0.5  # of a step, that copying may take between two steps
WORTH = 16  # tokens that a sequence must still generate for a move to pay


class TierController:
    """The two tiers of one engine: the local pools, and attention workers."""

    def __init__(self, control: ControlPlane, migration: KvMigration, clock: Callable[[], float]) -> None:
        self._control = control
        self._lanes = control.lanes
        self._order = control.order
        self._migration = migration
        self._scheduler = control.scheduler
        self._placement = control.placement
        self._clock = clock
        self._last: float | None = None  # when the previous decode batch was over
        self._step = 0.01  # seconds of a recent decode batch
        self._parts: list[Batch] = []  # the batches so far of a step of all lanes together
        self._moving = False  # whether sequences moved since the last decode batch
        self._placement.local_share = self._control.local_share.share

    @property
    def busy(self) -> bool:
        """Whether sequences are moving."""
        return bool(self._migration.under_way)

    @property
    def settled(self) -> bool:
        """Whether nothing is being tried or moved, which would disturb other measurements."""
        return not self._placement.tiers or (self._control.local_share.settled and not self.busy)

    @property
    def _all_local(self) -> bool:
        """Whether every sequence is in the local pools, so that no batch waits for an attention worker."""
        local, total = self._local_tokens({})
        return self._placement.tiers and local == total > 0

    @property
    def local_share(self) -> float:
        """The share of the tokens of sequences with KV that is in the local pools."""
        local, total = self._local_tokens({})
        return local / total if total else self._control.local_share.share

    def _local_tokens(self, moving: Mapping[ScheduledSequence, Layout]) -> tuple[int, int]:
        """Tokens of sequences with KV that are in the local pools, and all; `moving` ones count where they move to."""
        return self._placement.local_tokens((moving.get(s, s.layout), len(s.tokens)) for s in self._scheduler.running)

    def step(self) -> None:
        """Between two batches: begin moves, and go on with those under way. Raises HolderFault."""
        if self._placement.tiers:
            self._placement.local_share = self._control.local_share.share
            self._choose()
        if self.busy:
            self._moving = True
            self._migration.step(PAUSE * self._step)

    def abandon(self) -> None:
        """Give up all moves, and the current measurement."""
        self._migration.abandon()
        self._order.interrupted()
        self._interrupted()

    def holders_changed(self, change: HolderChange) -> None:
        """Forget what was measured: it was of other holders."""
        self._control.local_share.reset()
        self._order.reset()
        self._interrupted()

    def batch_done(self, done: BatchDone) -> None:
        """Learn from a decode batch, and decide how many lanes the next ones have, and whether q goes first in them.

        One thing is tried at a time: the local share, then lanes, then the order."""
        self._measure(done)
        lanes, order = self._lanes, self._order
        if self._all_local:
            lanes.alone()
            order.interrupted()
            return
        mixed = done.prefill or not self.settled
        lanes.completed(done.sampled, done.running, mixed or order.trying, done.now, done.attended)
        if mixed or lanes.trying or (lanes.begun and done.running > 1):
            order.interrupted()
        else:
            order.completed(done.sampled, done.running, lanes.count, done.now)

    def _measure(self, done: BatchDone) -> None:
        last, self._last = self._last, done.now
        trying = self._lanes.trying or self._order.trying
        if trying or last is None or not self._placement.tiers or done.prefill:
            self._interrupted()
            self._last = done.now
            return
        times, lanes = done.times, self._lanes.count
        self._parts.append(
            Batch(
                done.local_tokens, done.remote_tokens, times.local, times.remote, times.answered, times.waited,
                done.now - last, done.running, lanes, self._order.fused,
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
        local, total = self._local_tokens(under_way)
        off = self._control.local_share.share * total - local
        candidates = [
            sequence
            for sequence in self._scheduler.running
            if sequence not in under_way
            and self._can_move(sequence)
            and self._placement.is_local(sequence.layout) == (off <= 0)
        ]
        chosen = to_move([len(sequence.tokens) for sequence in candidates], abs(off), AT_ONCE - len(under_way))
        for at in chosen:
            sequence = candidates[at]
            layout = self._placement.layout(sequence.longest, local=off > 0)
            capacity = self._placement.capacity
            if layout and capacity.covers(self._scheduler.config.pages_for(layout, sequence.longest)):
                self._migration.begin(sequence, layout)

    @staticmethod
    def _can_move(sequence: ScheduledSequence) -> bool:
        """Whether a sequence decodes, and goes on for a while. One in prefill has parts in prefill pools, too."""
        decodes = sequence.left == 1 and sequence.rebuild is None and sequence.finish_reason is None
        return decodes and sequence.longest - sequence.computed >= WORTH
