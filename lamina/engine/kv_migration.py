"""Moves the KV of sequences between holders, page by page, while the sequences go on (`KvMigration`).

A sequence decodes at its old holders until its KV is at the new ones too. Then it is switched over while it is idle.
The last tokens are waited for at that point, and so are states, since each token changes them.

`KvCopies` makes the copies: from parts of a sequence to other parts of it, or to parts of another sequence with the
same tokens. A copy is a run. It is suspended while it waits for a holder, and it goes on between two batches, for a
part of a step's time. Everything here is called between two batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial

from lamina.kv.kv_shares import NO_PAGES, Layout, Pages, Part, Share
from lamina.kv.request import ScheduledSequence
from lamina.scheduling.control_plane import ControlPlane
from lamina_protocols.messages.messages import Row
from lamina_protocols.messages.routes import HolderBatch, Route
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.interface import Waiting, Workers, result
from lamina_workers.model_worker.kv_copy import Move
from lamina_workers.parallel.peers import Peer


def nothing() -> None:
    """The `taken` of a copy whose pages were counted before."""


CHUNK = 512  # tokens that are copied at a time, at most

Copying = Generator[Waiting, None, bool]
"""A copy under way; it returns whether there was room. Raises HolderFault. A copy that is dropped must be closed before
the next epoch begins."""


class KvCopies:
    """Makes copies, and counts the pages that they take."""

    def __init__(self, worker: Workers[Peer], control: ControlPlane) -> None:
        self._worker = worker
        self._placement = control.placement
        self._scheduler = control.scheduler

    def copy(
        self,
        old: Sequence[Part],
        new: Sequence[Part],
        rows: tuple[int, int, int],
        floor: int,
        prompt: int,
        taken: Callable[[], None] = nothing,
    ) -> Copying:
        """Copy what the old parts have of positions [lo, hi), which no edge of a part divides, to `new` parts that are
        opened already. rows: lo, hi, and where the rows that store it begin. The parts are of a sequence of that floor,
        whose prompt has so many tokens. `taken` is called once the holders have taken the pages."""
        lo, hi, _ = rows
        prompt = prompt if self._placement.samples else 0
        return self._run(_moves(old, new, lo, hi, self._scheduler.config.page_size), new, rows, floor, prompt, taken)

    def combine(self, old: Sequence[Part], new: Part, rows: tuple[int, int, int], taken: Callable[[], None]) -> Copying:
        """As `copy`, of whole pages: the new part gets the XOR of those of the old ones, head by head in their order;
        zeros stand for heads that one has not."""
        lo, hi, _ = rows
        return self._run(_combined(old, new, lo, hi), (new,), rows, 0, 0, taken)

    def _run(
        self,
        every: Iterable[Move],
        new: Sequence[Part],
        rows: tuple[int, int, int],
        floor: int,
        prompt: int,
        taken: Callable[[], None],
    ) -> Copying:
        lo, hi, stored = rows
        config, holders = self._scheduler.config, self._placement.holders
        alike: dict[tuple[int, int], list[Move]] = {}  # by rank and pool
        for move in every:
            alike.setdefault((holders[move.to].rank, move.pool), []).append(move)
        for last, moves in enumerate(alike.values(), 1 - len(alike)):
            routes: dict[int, list[Route]] = {}
            for part in new:
                if any(move.target == part.handle for move in moves):
                    row = Row(part.handle, stored, hi - stored, None, True, prompt=prompt)
                    route = Route(0, part.share.heads, row, (stored, hi), part.share.pool)
                    routes.setdefault(part.share.holder, []).append(route)
            for move in moves:
                if holders[move.origin].outbox:  # it may not have the part yet
                    routes.setdefault(move.origin, [])
            batches = {number: holders[number].outgoing(tuple(rows)) for number, rows in routes.items()}
            fresh = tuple(part.share for part in new if any(move.target == part.handle for move in moves))
            takes = config.held(fresh, lo, hi, 0, floor) + config.records(fresh)
            accepted = partial(self._accepted, batches, takes, nothing if last else taken)
            if not (yield from self._worker.copy(moves, batches, accepted)):
                return False
        return True

    def _accepted(self, batches: Mapping[int, HolderBatch], takes: Pages, taken: Callable[[], None]) -> None:
        """Holders have taken these pages, as their next answers say, too."""
        for number, batch in batches.items():
            takes -= Pages.of(number, self._placement.holders[number].accepted(batch))
        self._scheduler.ledger.took(takes)
        taken()


class CopyPace:
    """Lets a run go on between two batches: until `deadline` by the clock, and no longer than answers are there.

    With `waits` there is nothing else to do: the first answer is waited for.
    """

    def __init__(self, clock: Callable[[], float], seconds: float, waits: bool) -> None:
        self._clock = clock
        self._deadline = clock() + seconds
        self._waits = waits

    @property
    def over(self) -> bool:
        """Whether nothing more is to be begun."""
        return self._clock() > self._deadline

    def lets(self, waiting: Waiting | None) -> bool:
        """Whether a run goes on that is suspended on this; None: on nothing. At least one step of it is always
        allowed where the answer is there."""
        if waiting is None or waiting.over():
            return True
        waits, self._waits = self._waits, False
        return waits


def edge(parts: Iterable[Part], at: int, stop: int) -> int:
    """`stop`, or an edge of a part between `at` and `stop`: no copy crosses one."""
    edges = [edge for part in parts for edge in (part.share.lo, part.share.hi)]
    return min([stop, *(edge for edge in edges if edge > at)])


def _combined(old: Iterable[Part], target: Part, lo: int, hi: int) -> Iterable[Move]:
    """The moves that XOR the old parts' positions [lo, hi), whole pages, into another part."""
    for source in old:
        heads = min(len(source.share.heads), len(target.share.heads))
        yield Move(
            source.share.holder,
            source.handle,
            target.share.holder,
            target.handle,
            lo,
            hi,
            heads,
            len(source.share.heads),
            0,
            len(target.share.heads),
            0,
            True,
            target.share.pool,
            True,
        )


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


AT_ONCE = 4  # moves under way, at most
_LAST = 64  # tokens, for which an idle sequence is kept out of the next batch: else there would always be one more


@dataclass(eq=False, slots=True)
class _Migrating:
    """A sequence that moves from the layout `before`: `new` parts of KV and of `states` replace `old` ones; those of KV
    have its tokens below position `at`, and are getting those below `due`; pages are `taken` up to there. `starts` has
    for each share where the last copy to it begins.

    `run` is suspended on `waiting`; None: until the next batch."""

    sequence: ScheduledSequence
    handle: int
    before: Layout
    layout: Layout
    old: tuple[Part, ...]
    new: tuple[Part, ...]
    states: tuple[Part, ...]
    at: int = 0
    due: int = 0
    taken: int = 0
    starts: dict[Share, int] = field(default_factory=dict)
    run: Generator[Waiting | None, None, None] = field(init=False)
    waiting: Waiting | None = None

    @property
    def stands(self) -> bool:
        """Whether the sequence is still where it was when the move began."""
        sequence = self.sequence
        return sequence.handle == self.handle and sequence.layout is self.before and sequence.rebuild is None

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.new + self.states

    @property
    def fresh(self) -> Layout:
        return tuple(part.share for part in self.parts)


class KvMigration:
    """Moves sequences, one after the other. `tokens` counts copied tokens, and `sequences` the moves that are complete.

    Raises HolderFault where a holder fails. Then every move is given up, and the sequences are where they were.
    """

    def __init__(self, worker: Workers[Peer], control: ControlPlane, clock: Callable[[], float]) -> None:
        self.tokens = self.sequences = 0
        self._copies = KvCopies(worker, control)
        self._placement = control.placement
        self._scheduler = control.scheduler
        self._clock = clock
        self._queue: deque[_Migrating] = deque()

    @property
    def under_way(self) -> Mapping[ScheduledSequence, Layout]:
        """The sequences that are moving, each with its new layout."""
        return {moving.sequence: moving.layout for moving in self._queue}

    def begin(self, sequence: ScheduledSequence, layout: Layout) -> bool:
        """Have a sequence move to another layout. False where its KV is not whole, or where there is no room: now, or
        for all that it will have. Unused cached prefixes and local copies make room."""
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
        moving = _Migrating(sequence, sequence.handle, sequence.layout, layout, old, new, states, first, first, first)
        moving.run = self._move(moving)
        self._queue.append(moving)
        self._promise()
        return True

    def step(self, seconds: float, waits: bool = False) -> None:
        """Copy for about `seconds`, as far as answers are there, and switch over the sequences that are copied and
        idle. With `waits` there is nothing else to do, so an answer is waited for."""
        pace = CopyPace(self._clock, seconds, waits)
        for _ in range(len(self._queue)):
            moving = self._queue[0]
            if self._goes_on(moving, pace):
                self._queue.popleft()
                self._promise()
            elif moving.waiting is not None:
                return  # one copy at a time
            else:
                self._queue.rotate(-1)
            if pace.over:
                return

    def abandon(self, at: Set[int] | None = None) -> None:
        """Give up all moves, or those to holders `at`: the sequences stay where they are."""
        moves, self._queue = self._queue, deque()
        for moving in moves:
            if at is None or any(share.holder in at for share in moving.fresh):
                self._drop(moving)
            else:
                self._queue.append(moving)
        self._promise()

    def _goes_on(self, moving: _Migrating, pace: CopyPace) -> bool:
        """Go on with a move. Whether it has ended, complete or not."""
        if not moving.stands:
            self._drop(moving)
            return True
        try:
            while pace.lets(moving.waiting):
                moving.waiting = next(moving.run)
                if moving.waiting is None or pace.over:
                    break
        except StopIteration:
            return True
        except HolderFault:
            self.abandon()
            raise
        return False

    def _move(self, moving: _Migrating) -> Generator[Waiting | None, None, None]:
        """All of one move, which goes on as long as the sequence is where it was."""
        sequence, size = moving.sequence, self._scheduler.config.page_size
        last = max((part.share.hi for part in moving.new), default=0)
        while True:
            complete = sequence.computed >= last  # nothing more comes to what moves
            if not (complete or sequence.in_flight) and sequence.computed - moving.at <= max(_LAST, size):
                break
            end = min(sequence.computed, last, moving.at + CHUNK)
            end -= 0 if complete else end % size  # whole pages go faster, and the last one may be being written
            if end > moving.at:
                if not (yield from self._some(moving, end)):
                    return
            elif complete and not sequence.in_flight:
                break
            else:
                yield None
        # From here on nothing else runs.
        while moving.at < (end := min(sequence.computed, last)):
            if not result(self._some(moving, end)):
                return
        if not self._states_copied(moving):
            return
        freed = self._scheduler.running.own_pages(sequence, tuple(part.share for part in moving.old))
        self._placement.moved(moving.handle, moving.old, moving.parts, freed)
        self._scheduler.running.moved(sequence, moving.layout, moving.starts)
        self.sequences += 1

    def _some(self, moving: _Migrating, end: int) -> Copying:
        """Copy the tokens up to `end`, or up to an edge of a part before it."""
        moving.due = edge(moving.old + moving.new, moving.at, end)
        self._promise()
        rows = moving.at, moving.due, moving.at
        fits = yield from self._copy(moving, moving.new, rows, partial(self._taken, moving))
        if fits:
            self.tokens += moving.due - moving.at
            moving.starts |= {
                part.share: moving.at for part in moving.new if part.share.lo < moving.due and moving.at < part.share.hi
            }
            moving.at = moving.due
        return fits

    def _taken(self, moving: _Migrating) -> None:
        moving.taken = moving.due
        self._promise()

    def _states_copied(self, moving: _Migrating) -> bool:
        """Copy the states of an idle sequence, at the positions where its old parts have them: so the new ones take as
        much. The tokens behind them, of which only inputs are kept, are computed again. False where there was no room,
        or a failed row lies between, and the move is given up."""
        sequence, stored = moving.sequence, 0
        if moving.states and sequence.records[1] < sequence.computed:
            if sequence.records[1] < max(1, sequence.floor):
                self._give_up(moving)
                return False
            self._scheduler.running.cut(sequence, sequence.records[1])
        for position in sorted(set(sequence.records) - {0}) if moving.states else ():
            if not result(self._copy(moving, moving.states, (0, position, stored))):
                return False
            stored = position
        return True

    def _copy(
        self, moving: _Migrating, new: tuple[Part, ...], rows: tuple[int, int, int], taken: Callable[[], None] = nothing
    ) -> Copying:
        """As `KvCopies.copy`. A move without room is given up."""
        floor, prompt = moving.sequence.floor, len(moving.sequence.tokens)
        fits = yield from self._copies.copy(moving.old, new, rows, floor, prompt, taken)
        if not fits:
            self._give_up(moving)
        return fits

    def _make_room(self, needed: Pages) -> bool:
        """Whether there is room for these pages, now that prefixes and copies are gone as far as they must be."""
        ledger, running = self._scheduler.ledger, self._scheduler.running
        if not (ledger.unpromised() + running.giving_way).covers(needed):
            return False
        while not (free := ledger.unpromised()).covers(needed):
            short = free.short_of(needed)
            if not running.evict(short) and not self._scheduler.copies.give_back(short):
                return False
        return True

    def _drop(self, moving: _Migrating) -> None:
        moving.run.close()
        self._give_up(moving)

    def _give_up(self, moving: _Migrating) -> None:
        """Close the parts that were to be."""
        freed = self._scheduler.config.held(moving.fresh, 0, moving.at, 0, moving.at)
        self._placement.close_parts(moving.parts, freed)

    def _promise(self) -> None:
        """Note in the ledger the pages that moves have taken, and will still take."""
        config, promised, moving_pages = self._scheduler.config, NO_PAGES, NO_PAGES
        for moving in self._queue:
            fresh = moving.fresh
            promised += config.pages_for(fresh, len(moving.sequence.tokens))
            promised -= config.held(fresh, 0, moving.taken, 0, moving.sequence.floor)
            moving_pages += config.held(fresh, 0, moving.due, 0)
        self._scheduler.ledger.promised, self._scheduler.ledger.moving = promised, moving_pages
