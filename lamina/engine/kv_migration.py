"""Moves the KV of sequences between holders, page by page, while the sequences go on.

A sequence decodes at its old holders until all of its KV is at the new ones too; then it is switched over while it is
idle. Everything is called between two batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.kv_shares import NO_PAGES, Layout
from lamina.scheduling.placement import Part
from lamina.scheduling.request import ScheduledSequence
from lamina_protocols.messages import Row
from lamina_protocols.routes import Route
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.interface import Workers
from lamina_workers.model_worker.kv_copy import Move
from lamina_workers.parallel.peers import Peer

CHUNK = 1024  # tokens that are copied at a time, at most
_FIRST_CHUNK = 128  # before it is known how long copying takes


@dataclass(eq=False, slots=True)
class _Migrating:
    """A sequence that moves: `new` parts replace `old` ones, and have its tokens below position `at`."""

    sequence: ScheduledSequence
    handle: int
    layout: Layout
    old: tuple[Part, ...]
    new: tuple[Part, ...]
    at: int = 0

    @property
    def stands(self) -> bool:
        """Whether the sequence is still where it was when the move began."""
        return self.sequence.handle == self.handle and self.sequence.rebuild is None


class KvMigration:
    """Moves sequences, one after the other. `tokens` counts copied tokens, `seconds` the time of their copies, and
    `sequences` the moves that are complete.

    Raises HolderFault where a holder fails. Then every move is given up, and the sequences are where they were.
    """

    def __init__(self, worker: Workers[Peer], control: ControlPlane, clock: Callable[[], float]) -> None:
        self.tokens = self.sequences = 0
        self.seconds = 0.0
        self._worker = worker
        self._placement = control.placement
        self._scheduler = control.scheduler
        self._clock = clock
        self._queue: deque[_Migrating] = deque()
        self._rate = 0.0  # tokens a second, as last measured

    @property
    def under_way(self) -> Mapping[ScheduledSequence, Layout]:
        """The sequences that are moving, each with its new layout."""
        return {moving.sequence: moving.layout for moving in self._queue}

    def begin(self, sequence: ScheduledSequence, layout: Layout) -> bool:
        """Have a sequence move to another layout. False where its KV is not whole, or there is no room."""
        if sequence.handle is None or not self._scheduler.running.movable(sequence):
            return False
        config, length = self._scheduler.config, len(sequence.tokens)
        fresh = tuple(share for share in layout if share not in sequence.layout)
        needed = config.pages_for(fresh, length) + config.page_set(fresh, length)
        if not self._scheduler.ledger.unpromised().covers(needed):
            return False
        old = tuple(part for part in self._placement.parts(sequence.handle) if part.share not in layout)
        new = self._placement.open_beside(fresh)
        self._queue.append(_Migrating(sequence, sequence.handle, layout, old, new, min(share.lo for share in fresh)))
        self._promise()
        return True

    def step(self, seconds: float) -> None:
        """Copy for about `seconds`, and switch over the sequences that are copied and idle."""
        allowance = int(self._rate * seconds) if self._rate else _FIRST_CHUNK
        allowance = max(allowance, self._scheduler.config.page_size)  # at least a page
        for _ in range(len(self._queue)):
            moving = self._queue[0]
            before = moving.at
            if self._advance(moving, allowance, self._clock() + seconds):
                self._queue.popleft()
                self._promise()
            else:
                self._queue.rotate(-1)
            allowance -= moving.at - before
            if allowance <= 0:
                return

    def move_now(self, sequence: ScheduledSequence, layout: Layout) -> bool:
        """Move an idle sequence at once. False where there is no room; then it is where it was."""
        if not self.begin(sequence, layout):
            return False
        if not self._advance(self._queue[-1], len(sequence.tokens)):
            self._placement.give_up(self._queue[-1].new)
        self._queue.pop()
        self._promise()
        return sequence.layout == layout

    def abandon(self) -> None:
        """Give up all moves: the sequences stay where they are."""
        for moving in self._queue:
            self._placement.give_up(moving.new)
        self._queue.clear()
        self._promise()

    def _advance(self, moving: _Migrating, most: int, deadline: float = float("inf")) -> bool:
        """Copy at most `most` further tokens, and begin no copy after the deadline. Whether the move has ended,
        complete or not."""
        sequence = moving.sequence
        if not moving.stands:
            self._placement.give_up(moving.new)
            return True
        due = end = min(sequence.computed, max(part.share.hi for part in moving.new))
        if sequence.in_flight:  # its last page is being written
            end -= end % self._scheduler.config.page_size
        if end - moving.at > most:  # whole pages go faster
            end = moving.at + most
            end -= end % self._scheduler.config.page_size
        while moving.at < end:
            stop = self._edge(moving, min(end, moving.at + CHUNK))
            begun = self._clock()
            try:
                fits = self._copy(moving, moving.at, stop)
            except HolderFault:
                self.abandon()
                raise
            if not fits:
                self._placement.give_up(moving.new)
                return True
            took = self._clock() - begun
            self._rate = (stop - moving.at) / max(took, 1e-9)
            self.tokens, self.seconds = self.tokens + stop - moving.at, self.seconds + took
            moving.at = stop
            self._promise()
            if self._clock() > deadline:
                break
        if moving.at < due or sequence.in_flight or not self._scheduler.running.movable(sequence):
            return False
        self._placement.moved(moving.handle, moving.old, moving.new)
        self._scheduler.running.moved(sequence, moving.layout)
        self.sequences += 1
        return True

    @staticmethod
    def _edge(moving: _Migrating, stop: int) -> int:
        """`stop`, or an edge of a part before it: no copy crosses one."""
        edges = [edge for part in (*moving.old, *moving.new) for edge in (part.share.lo, part.share.hi)]
        return min([stop, *(edge for edge in edges if edge > moving.at)])

    def _copy(self, moving: _Migrating, lo: int, hi: int) -> bool:
        """Whether there was room for positions [lo, hi)."""
        size = self._scheduler.config.page_size
        ranks: dict[int, list[Move]] = {}
        for move in _moves(moving.old, moving.new, lo, hi, size):
            ranks.setdefault(self._placement.holders[move.to].rank, []).append(move)
        for of_rank in ranks.values():
            routes: dict[int, list[Route]] = {}
            for part in moving.new:
                if any(move.target == part.handle for move in of_rank):
                    row = Row(part.handle, lo, hi - lo, None, True)
                    routes.setdefault(part.share.holder, []).append(Route(0, part.share.heads, row, (lo, hi)))
            holders = self._placement.holders
            batches = {number: holders[number].outgoing(tuple(rows)) for number, rows in routes.items()}
            if not self._worker.copy(of_rank, batches):
                return False
            for number, batch in batches.items():
                holders[number].accepted(batch)
        fresh = tuple(part.share for part in moving.new)
        self._scheduler.ledger.took(self._scheduler.config.held(fresh, lo, hi, 0, moving.sequence.floor))
        return True

    def _promise(self) -> None:
        """Note in the ledger the pages that moves will still take."""
        config, promised = self._scheduler.config, NO_PAGES
        for moving in self._queue:
            fresh = tuple(part.share for part in moving.new)
            promised += config.pages_for(fresh, len(moving.sequence.tokens))
            promised -= config.held(fresh, 0, moving.at, 0, moving.sequence.floor)
        self._scheduler.ledger.promised = promised


def _moves(old: Iterable[Part], new: Iterable[Part], lo: int, hi: int, page_size: int) -> Iterable[Move]:
    """The copies by which the new parts get positions [lo, hi), which no edge of a part divides."""
    olds = [part for part in old if part.share.lo <= lo and hi <= part.share.hi]
    for target in new:
        if not (target.share.lo <= lo and hi <= target.share.hi):
            continue
        for source in olds:
            heads = [head for head in source.share.heads if head in target.share.heads]
            if heads:
                yield Move(
                    origin=source.share.holder,
                    source=source.handle,
                    to=target.share.holder,
                    target=target.handle,
                    lo=lo,
                    hi=hi,
                    heads=len(heads),
                    source_heads=len(source.share.heads),
                    source_first=source.share.heads.index(heads[0]),
                    target_heads=len(target.share.heads),
                    target_first=target.share.heads.index(heads[0]),
                    paged=(lo - source.share.lo) % page_size == (lo - target.share.lo) % page_size == 0,
                )
