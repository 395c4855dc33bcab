"""Moves the KV of sequences between holders, page by page, while the sequences go on.

A sequence decodes at its old holders until all of its KV is at the new ones too; then it is switched over while it is
idle. States are copied then, since each token changes them. Everything is called between two batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

from lamina.scheduling.control_plane import ControlPlane
from lamina.scheduling.kv_shares import NO_PAGES, Layout, Pages, Part
from lamina.scheduling.request import ScheduledSequence
from lamina_protocols.messages import Row
from lamina_protocols.routes import Route
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.interface import Workers
from lamina_workers.model_worker.kv_copy import Move
from lamina_workers.parallel.peers import Peer

AT_ONCE = 4  # moves under way, at most
CHUNK = 1024  # tokens that are copied at a time, at most
_FIRST_CHUNK = 128  # before it is known how long copying takes


@dataclass(eq=False, slots=True)
class _Migrating:
    """A sequence that moves: `new` parts of KV and of `states` replace `old` ones; those of KV have its tokens below
    position `at`."""

    sequence: ScheduledSequence
    handle: int
    layout: Layout
    old: tuple[Part, ...]
    new: tuple[Part, ...]
    states: tuple[Part, ...]
    at: int = 0

    @property
    def stands(self) -> bool:
        """Whether the sequence is still where it was when the move began."""
        return self.sequence.handle == self.handle and self.sequence.rebuild is None

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts that are to be."""
        return self.new + self.states

    @property
    def fresh(self) -> Layout:
        """Their shares."""
        return tuple(part.share for part in self.parts)


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
        """Have a sequence move to another layout. False where its KV is not whole, or where there is no room: now, or
        for all that it will have. Cached prefixes that nobody uses and local copies make room."""
        config, length = self._scheduler.config, len(sequence.tokens)
        if sequence.handle is None or not self._scheduler.running.movable(sequence):
            return False
        fresh = tuple(share for share in layout if share not in sequence.layout)
        needed = config.pages_for(fresh, length) + config.page_set(fresh, length)
        capacity = self._placement.capacity
        if not capacity.covers(config.pages_for(layout, sequence.longest)) or not self._make_room(needed):
            return False
        old = tuple(part for part in self._placement.parts(sequence.handle) if part.share not in layout)
        parts = self._placement.open_beside(fresh)
        new = tuple(part for part in parts if part.share.pool not in config.states)
        states = tuple(part for part in parts if part.share.pool in config.states)
        first = min((part.share.lo for part in new), default=0)
        self._queue.append(_Migrating(sequence, sequence.handle, layout, old, new, states, first))
        self._promise()
        return True

    def step(self, seconds: float) -> None:
        """Copy for about `seconds`, and switch over the sequences that are copied and idle."""
        allowance = int(self._rate * seconds) if self._rate else _FIRST_CHUNK
        allowance = max(allowance, self._scheduler.config.page_size)  # at least a page
        deadline = self._clock() + seconds
        for _ in range(len(self._queue)):
            moving = self._queue[0]
            before = moving.at
            if self._advance(moving, allowance, deadline):
                self._queue.popleft()
                self._promise()
            else:
                self._queue.rotate(-1)
            allowance -= moving.at - before
            if allowance <= 0 or self._clock() > deadline:
                return

    def abandon(self, at: Set[int] | None = None) -> None:
        """Give up all moves, or those to holders `at`: the sequences stay where they are."""
        moves, self._queue = self._queue, deque()
        for moving in moves:
            if at is None or any(share.holder in at for share in moving.fresh):
                self._give_up(moving)
            else:
                self._queue.append(moving)
        self._promise()

    def _advance(self, moving: _Migrating, most: int, deadline: float) -> bool:
        """Copy at most `most` further tokens, and begin no copy after the deadline. Whether the move has ended,
        complete or not."""
        sequence = moving.sequence
        if not moving.stands:
            self._give_up(moving)
            return True
        due = end = min(sequence.computed, max((part.share.hi for part in moving.new), default=0))
        if sequence.in_flight:  # its last page is being written
            end -= end % self._scheduler.config.page_size
        if end - moving.at > most:  # whole pages go faster
            end = moving.at + most
            end -= end % self._scheduler.config.page_size
        while moving.at < end:
            stop = self._edge(moving, min(end, moving.at + CHUNK))
            before = self.seconds
            if not self._copied(moving, moving.new, moving.at, stop, moving.at):
                return True
            self._rate = (stop - moving.at) / max(self.seconds - before, 1e-9)
            self.tokens += stop - moving.at
            moving.at = stop
            self._promise()
            if self._clock() > deadline:
                break
        if moving.at < due or sequence.in_flight or not self._scheduler.running.movable(sequence):
            return False
        if moving.states and not self._states_copied(moving):
            return True
        freed = self._scheduler.running.own_pages(sequence, tuple(part.share for part in moving.old))
        self._placement.moved(moving.handle, moving.old, moving.parts, freed)
        self._scheduler.running.moved(sequence, moving.layout)
        self.sequences += 1
        return True

    def _make_room(self, needed: Pages) -> bool:
        """Whether there is room for these pages, now that prefixes and copies are gone as far as they must be."""
        ledger, running = self._scheduler.ledger, self._scheduler.running
        if not (ledger.unpromised() + running.giving_way).covers(needed):
            return False
        while not (left := ledger.unpromised()).covers(needed):
            short = left.short_of(needed)
            if not running.prefix_cache.evict(short) and not self._scheduler.copies.give_back(short):
                return False
        return True

    def _give_up(self, moving: _Migrating) -> None:
        """Close the parts that were to be."""
        freed = self._scheduler.config.held(moving.fresh, 0, moving.at, 0, moving.at)
        self._placement.close_parts(moving.parts, freed)

    @staticmethod
    def _edge(moving: _Migrating, stop: int) -> int:
        """`stop`, or an edge of a part before it: no copy crosses one."""
        edges = [edge for part in (*moving.old, *moving.new) for edge in (part.share.lo, part.share.hi)]
        return min([stop, *(edge for edge in edges if edge > moving.at)])

    def _states_copied(self, moving: _Migrating) -> bool:
        """Copy the states of an idle sequence, at the two positions where its old parts have them: so the new ones take
        as much. False where there was no room, and the move is given up."""
        sequence, stored = moving.sequence, 0
        for position in sorted({sequence.floor, sequence.computed} - {0}):
            if not self._copied(moving, moving.states, 0, position, stored):
                return False
            stored = position
        return True

    def _copied(self, moving: _Migrating, new: tuple[Part, ...], lo: int, hi: int, stored: int) -> bool:
        """As `_copy`. A move without room is given up; where a holder fails, all are."""
        begun = self._clock()
        try:
            fits = self._copy(moving, new, lo, hi, stored)
        except HolderFault:
            self.abandon()
            raise
        self.seconds += self._clock() - begun
        if not fits:
            self._give_up(moving)
        return fits

    def _copy(self, moving: _Migrating, new: tuple[Part, ...], lo: int, hi: int, stored: int) -> bool:
        """Whether `new` parts had room for what the old ones have of positions [lo, hi), in rows from `stored` on."""
        size = self._scheduler.config.page_size
        prompt = len(moving.sequence.tokens) if self._placement.samples else 0
        alike: dict[tuple[int, int], list[Move]] = {}  # by rank and pool
        for move in _moves(moving.old, new, lo, hi, size):
            alike.setdefault((self._placement.holders[move.to].rank, move.pool), []).append(move)
        for moves in alike.values():
            routes: dict[int, list[Route]] = {}
            for part in new:
                if any(move.target == part.handle for move in moves):
                    row = Row(part.handle, stored, hi - stored, None, True, prompt=prompt)
                    route = Route(0, part.share.heads, row, (stored, hi), part.share.pool)
                    routes.setdefault(part.share.holder, []).append(route)
            holders = self._placement.holders
            for move in moves:
                if holders[move.origin].outbox:  # it may not have the part yet
                    routes.setdefault(move.origin, [])
            batches = {number: holders[number].outgoing(tuple(rows)) for number, rows in routes.items()}
            if not self._worker.copy(moves, batches):
                return False
            for number, batch in batches.items():
                self._scheduler.ledger.took(NO_PAGES - Pages.of(number, holders[number].accepted(batch)))
        fresh, config = tuple(part.share for part in new), self._scheduler.config
        self._scheduler.ledger.took(config.held(fresh, lo, hi, 0, moving.sequence.floor) + config.records(fresh))
        return True

    def _promise(self) -> None:
        """Note in the ledger the pages that moves have taken, and will still take."""
        config, promised, taken = self._scheduler.config, NO_PAGES, NO_PAGES
        for moving in self._queue:
            fresh = moving.fresh
            promised += config.pages_for(fresh, len(moving.sequence.tokens))
            promised -= config.held(fresh, 0, moving.at, 0, moving.sequence.floor)
            taken += config.held(fresh, 0, moving.at, 0)
        self._scheduler.ledger.promised, self._scheduler.ledger.moving = promised, taken


def _moves(old: Iterable[Part], new: Iterable[Part], lo: int, hi: int, page_size: int) -> Iterable[Move]:
    """The copies by which the new parts get positions [lo, hi), which no edge of a part divides."""
    olds = [part for part in old if part.share.lo <= lo and hi <= part.share.hi]
    for target in new:
        if not (target.share.lo <= lo and hi <= target.share.hi):
            continue
        for source in (part for part in olds if part.share.pool == target.share.pool):
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
                    pool=target.share.pool,
                    paged=(lo - source.share.lo) % page_size == (lo - target.share.lo) % page_size == 0,
                )
