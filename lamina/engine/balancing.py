"""Moves KV to a holder that has joined, in the background and one move at a time, as far as that pays."""

from __future__ import annotations

import logging
from dataclasses import replace

from lamina.engine.kv_migration import KvMigration
from lamina.kv.relocation import kept, next_move
from lamina.scheduling.control_plane import ControlPlane

logger = logging.getLogger("lamina")

_GAPS = 4  # between batches, of which a move for balance alone uses one: nobody waits for it, and it slows all


class Balancer:
    """Idle until `begin`, and again once nothing pays any more."""

    def __init__(self, control: ControlPlane, migration: KvMigration) -> None:
        self._placement = control.placement
        self._scheduler = control.scheduler
        self._migration = migration
        self._active = False
        self._moves = self._gap = 0

    def leaves_out(self) -> bool:
        """Whether moves leave out the gap between two batches that is now: those under way are for balance alone."""
        self._gap = (self._gap + 1) % _GAPS
        return self._active and self._gap > 0 and not self._placement.draining

    def begin(self) -> None:
        """A holder has joined."""
        self._active = True

    def step(self) -> None:
        """Between two batches: begin the next move, where none is under way."""
        if not self._active or self._migration.under_way or self._placement.draining:
            return
        running = self._scheduler.running
        weights = {number: holder.weight for number, holder in self._placement.holders.items()}
        remote = [s for s in running if running.movable(s) and not self._placement.is_local(s.layout)]
        move = next_move(kept(self._scheduler.config, remote), weights, self._placement)
        if move is not None:
            taker = replace(move.share, holder=move.to)
            layout = tuple(taker if share == move.share else share for share in move.sequence.layout)
            if self._migration.begin(move.sequence, layout):
                self._moves += 1
                return
        self._active = False
        if self._moves:
            logger.info("%d moves of KV to holders that have joined: what is left would not pay", self._moves)
            self._moves = 0
