"""Which sequences move between holders, and when.

`TierController` measures decode batches for `StepTuner`, and moves sequences until the share of KV in the local pools
is as the tuner wants. Without both local pools and other holders it only measures, and lets moves go on.

`Balancer` moves KV to a holder that has joined, in the background and one move at a time, as far as that pays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

from lamina.engine.kv_migration import AT_ONCE, KvMigration
from lamina.engine.observers import BatchDone
from lamina.kv.kv_shares import Layout, under
from lamina.kv.relocation import kept_shares, next_move
from lamina.kv.request import ScheduledSequence
from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.step_tuner import MeasuredBatch

if TYPE_CHECKING:
    from lamina.engine.holders import HolderChange

logger = logging.getLogger("lamina")

_GAPS = 4  # between batches, of which a move for balance alone uses one: nobody waits for it, and it slows all

choices = logging.getLogger("lamina.choices")  # what the engine chose and why, for people; the CLI shows it

SAY_AFTER = 60.0  # seconds, at least, between two lines about choices
PAUSE = 0.25  # of a step, that copying may take between two steps
WORTH = 16  # tokens that a sequence must still generate for a move to pay


class TierController:
    """The two tiers of one engine: the local pools, and attention workers."""

    def __init__(self, control: ControlPlane, migration: KvMigration, clock: Callable[[], float]) -> None:
        self._control = control
        self._migration = migration
        self._balancer = Balancer(control, migration)
        self._scheduler = control.scheduler
        self._placement = control.placement
        self._clock = clock
        self._last: float | None = None  # when the previous decode batch was over
        self._step = 0.01  # seconds of a recent decode batch
        self._moving = False  # whether sequences moved since the last decode batch
        self._placement.local_share = self._control.tuner.share
        self._last_place: tuple[bool, bool] | None = (
            None  # of the last line: whether all was local, whether nothing was
        )
        self._last_report = 0.0

    @property
    def busy(self) -> bool:
        return bool(self._migration.under_way)

    @property
    def local_share(self) -> float:
        """The share of the tokens of sequences with KV that is in the local pools."""
        local, total = self._local_tokens({})
        return local / total if total else self._control.tuner.share

    def _local_tokens(self, moving: Mapping[ScheduledSequence, Layout]) -> tuple[int, int]:
        """Tokens of sequences with KV that are in the local pools, and all; `moving` ones count where they move to."""
        return self._placement.local_tokens((moving.get(s, s.layout), len(s.tokens)) for s in self._scheduler.running)

    def step(self, waits: bool = False) -> None:
        """Between two batches: begin moves, and go on with those under way. With `waits` there is nothing else to do.
        Raises HolderFault."""
        if self._placement.tiers:
            self._placement.local_share = self._control.tuner.share
            self._choose()
        if self._balancer.active:
            self._balancer.step()
        if self.busy and (waits or not self._balancer.leaves_out()):
            self._moving = True
            self._migration.step(PAUSE * self._step, waits)

    def abandon(self, at: Set[int] | None = None) -> None:
        """Give up all moves, or those to holders `at`, and the current measurement."""
        self._migration.abandon(at)
        self._interrupted()

    def holders_changed(self, change: HolderChange) -> None:
        """Forget what was measured: it was of other holders. To one that joins KV may move."""
        if change.kind == "joined":
            self._balancer.begin()
        self._control.tuner.reset()
        self._interrupted()

    def batch_done(self, done: BatchDone) -> None:
        """Learn from a decode batch how the next ones should run."""
        last, self._last = self._last, done.now
        if last is None or done.prefill:
            self._control.tuner.interrupted()
            return
        tuner, times, seconds = self._control.tuner, done.times, done.now - last
        moving, self._moving = self._moving or self.busy, False
        if not moving:
            self._step = seconds
        tuner.completed(
            MeasuredBatch(
                tuner.lanes,
                tuner.fused,
                done.local_tokens,
                done.remote_tokens,
                times.local,
                times.remote,
                times.answered,
                times.waited,
                seconds,
                done.sampled,
                done.running,
            ),
            moving,
        )
        self._say(done.now)

    def _say(self, now: float) -> None:
        """A line where KV has another place than the last line said."""
        tuner = self._control.tuner
        place = (tuner.share == 1, tuner.share == 0)
        due = self._last_place is None or now - self._last_report >= SAY_AFTER
        if due and tuner.settled and tuner.reason and place != self._last_place:
            self._last_place, self._last_report = place, now
            choices.info("%s", tuner.reason)

    def _interrupted(self) -> None:
        self._control.tuner.interrupted()
        self._last = None

    def _choose(self) -> None:
        """Begin moves towards the share that is wanted, as far as there is room."""
        under_way = self._migration.under_way
        if len(under_way) >= AT_ONCE:
            return
        local, total = self._local_tokens(under_way)
        off = self._control.tuner.share * total - local
        candidates = [
            sequence
            for sequence in self._scheduler.running
            if sequence not in under_way
            and sequence.decodes
            and sequence.longest - sequence.computed >= WORTH
            and self._placement.is_local(sequence.layout) == (off <= 0)
        ]
        chosen = to_move([len(sequence.tokens) for sequence in candidates], abs(off), AT_ONCE - len(under_way))
        for index in chosen:
            sequence = candidates[index]
            if layout := self._placement.layout(sequence.longest, local=off > 0):
                self._migration.begin(sequence, under(layout, sequence.request.policy))


def to_move(candidates: Sequence[int], off: float, most: int) -> list[int]:
    """Which sequences, given as numbers of tokens, should change their tier so that about `off` tokens do: at most
    `most` indices. A sequence that brings the sum hardly closer is not moved."""
    candidate_tokens, chosen = dict(enumerate(candidates)), list[int]()
    while candidate_tokens and len(chosen) < most:
        index = min(candidate_tokens, key=lambda place: abs(off - candidate_tokens[place]))
        tokens = candidate_tokens.pop(index)
        if off - abs(off - tokens) <= 0.2 * tokens:
            break
        chosen.append(index)
        off -= tokens
    return chosen


class Balancer:
    """Idle until `begin`, and again once nothing pays any more; `active` between these."""

    def __init__(self, control: ControlPlane, migration: KvMigration) -> None:
        self._placement = control.placement
        self._scheduler = control.scheduler
        self._migration = migration
        self.active = False
        self._moves = self._gap = 0

    def leaves_out(self) -> bool:
        """Whether moves leave out the gap between two batches that is now: those under way are for balance alone."""
        self._gap = (self._gap + 1) % _GAPS
        return self.active and self._gap > 0 and not self._placement.draining

    def begin(self) -> None:
        self.active = True

    def step(self) -> None:
        """Between two batches: begin the next move, where none is under way."""
        if self._migration.under_way or self._placement.draining:
            return
        running = self._scheduler.running
        weights = {number: holder.weight for number, holder in self._placement.holders.items()}
        remote = [s for s in running if running.movable(s) and not self._placement.is_local(s.layout)]
        move = next_move(kept_shares(self._scheduler.config, remote), weights, self._placement)
        if move is not None:
            taker = replace(move.share, holder=move.to)
            layout = tuple(taker if share == move.share else share for share in move.sequence.layout)
            if self._migration.begin(move.sequence, layout):
                self._moves += 1
                return
        self.active = False
        if self._moves:
            logger.info("%d moves of KV to attention workers that have joined: what is left would not pay", self._moves)
            self._moves = 0
