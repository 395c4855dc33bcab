"""Copies KV to spares in the gaps between batches, catches up where there is nothing else to do, and reads back what is
lost.

Which spares there should be, and what they lack, is decided by `lamina.kv.spares`; here is when and how fast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from lamina.engine.kv_migration import CHUNK, Copying, CopyPace, KvCopies
from lamina.engine.observers import BatchDone
from lamina.errors import EngineError
from lamina.kv.kv_shares import GONE, Layout, Pages, Part
from lamina.kv.prefix_nodes import Node
from lamina.kv.request import ScheduledSequence
from lamina.kv.spares import ReadBack, SpareCopy
from lamina.scheduling.control_plane import ControlPlane
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.interface import Waiting, Workers
from lamina_workers.parallel.peers import Peer

if TYPE_CHECKING:
    from lamina.engine.holders import HolderChange

logger = logging.getLogger("lamina")

SHARE = 0.04  # of the time, that copying may take while batches run
_SAVED = 0.02  # seconds of it that can be saved up
_READING = 0.25  # seconds that reading back may take between two batches: sequences wait for it
BEHIND = 64  # tokens that a spare of a running sequence may lack before it gets them: few copies, and little to repeat
_KEPT_FREE = 16  # the part of each pool that spares do not take: else they come and go with each page


class SpareKeeper:
    """Keeps the spares of one engine up to date, where it is `on`: the config has redundancy.

    Everything is called between two batches. `step` raises HolderFault where a holder is gone.
    """

    def __init__(self, worker: Workers[Peer], control: ControlPlane, clock: Callable[[], float]) -> None:
        self._worker = worker
        self._control = control
        self._spares = control.spares
        self._rebuilds = control.scheduler.rebuilds
        self._reads = self._rebuilds.reads
        self._copies = KvCopies(worker, control)
        self._clock = clock
        self.on = bool(control.scheduler.config.redundancy)
        self._since: float | None = None  # when a holder was lost, until the spares are there again
        self._due = False  # whether something may lack a spare
        self._last = clock()
        self._seconds = 0.0  # that copying may take by now
        self._work: SpareCopy | ReadBack | None = None  # under way, up to position `_end`
        self._end = 0
        self._run: Copying | None = None
        self._waiting: Waiting | None = None

    @property
    def busy(self) -> bool:
        """Whether there is something to copy."""
        return self.on and (self._due or self._run is not None or bool(self._reads))

    def batch_done(self, done: BatchDone) -> None:
        self._due = True

    def holders_changed(self, change: HolderChange) -> None:
        self._due = True
        if self.on and change.kind == "lost":
            self._since = self._clock()

    @property
    def share(self) -> float:
        """The share of the KV at attention workers that has all its spares; 0 where there is none."""
        counts = [self._spares.covered(owner, tokens) for owner, tokens in self._owners()] if self.on else []
        covered, total = (sum(column) for column in zip((0, 0), *counts, strict=True))
        return covered / total if total else 0.0

    def step(self, waits: bool) -> bool:
        """Copy for a small part of the time that has passed; what was lost is read back at once. With `waits` there is
        nothing else to do. Returns whether some was to be read back, so that sequences may go on."""
        now = self._clock()
        self._seconds = min(_SAVED, self._seconds + SHARE * (now - self._last))
        self._last = now
        reads = bool(self._reads)
        if not self.busy or (self._seconds <= 0 and not waits and not reads):
            return False
        seconds = _READING if reads else _SAVED if waits else self._seconds
        pace = CopyPace(self._clock, seconds, waits)
        while not pace.over and (self._run is not None or self._begin(waits)):
            if not self._goes_on(pace):
                break
        self._last = self._clock()
        self._seconds -= 0.0 if waits or reads else self._last - now
        return reads

    def abandon(self) -> None:
        """Give up the copy under way: another epoch begins. It is begun again."""
        run, work, self._run = self._run, self._work, None
        self._work = self._waiting = None
        if run is not None:
            run.close()
            self._due = True
        if isinstance(work, SpareCopy):
            self._spares.abandoned(work)

    def _begin(self, idle: bool) -> bool:
        """Begin the next copy. False where nothing is to be read back or lacks a spare, or there is no room for it."""
        if (read := self._reads.next()) is not None:
            return self._begin_reading(read)
        copy = self._next(idle)
        self._due = copy is not None
        if copy is None:
            if self._since is not None:
                after, self._since = self._clock() - self._since, None
                logger.info("%.0f%% of the KV has its copies again, %.1f s after a loss", 100 * self.share, after)
            return False
        sources = self._parts(copy.handle, copy.spare.of)
        rows, on_taken = (copy.lo, copy.hi, copy.lo), partial(self._spares.took, copy)
        self._spares.begins(copy)
        self._work, self._end = copy, copy.hi
        if len(sources) != len(copy.spare.of):
            raise EngineError(f"of the shares {copy.spare.of} {len(sources)} have parts")
        if len(sources) > 1:
            self._run = self._copies.combine(sources, copy.spare.part, rows, on_taken)
        else:
            self._run = self._copies.copy(sources, (copy.spare.part,), rows, 0, 0, on_taken)
        return True

    def _begin_reading(self, read: ReadBack) -> bool:
        """Read the next pages of a lost share from the parity and the others of its group."""
        self._end = min(read.end, read.at + CHUNK)
        fits = read.at >= read.end or self._make_room(read)
        if not fits or read.part is None or not self._reads.readable(read):
            self._not_read(read)
        elif read.at >= read.end:
            self._rebuilds.read_back(read)
        else:
            others = self._parts(read.handle, tuple(share for share in read.spare.of if share != read.share))
            rows, on_taken = (read.at, self._end, read.at), partial(self._reads.took, read, self._end)
            self._work, self._run = read, self._copies.combine((*others, read.spare.part), read.part, rows, on_taken)
        return True

    def _parts(self, handle: int, shares: Layout) -> tuple[Part, ...]:
        return tuple(part for part in self._control.placement.parts(handle) if part.share in shares)

    def _make_room(self, read: ReadBack) -> bool:
        """Whether there is room for what is to be read, now that spares and prefixes have gone as far as they must."""
        scheduler = self._control.scheduler
        needed = scheduler.config.held((read.share,), read.at, read.end, 0)
        while not (free := scheduler.ledger.unpromised()).covers(needed):
            if not scheduler.running.evict(free.short_of(needed)):
                return False
        return True

    def _not_read(self, read: ReadBack) -> None:
        self._rebuilds.not_read(read)
        self._control.scheduler.running.prefix_cache.clear({GONE})

    def _goes_on(self, pace: CopyPace) -> bool:
        """Go on with the copy under way, if there is one. False where it waits, or time is over."""
        work, run = self._work, self._run
        if run is None or work is None:
            return True
        if not self._stands(work):
            self.abandon()
            return True
        try:
            while isinstance(work, ReadBack) or pace.lets(self._waiting):  # resumed early, a run waits for its answer
                self._waiting = next(run)
                if pace.over:
                    return False
            return False
        except StopIteration as stop:
            self._work = self._run = self._waiting = None
            return self._ended(work, stop.value)
        except HolderFault as fault:
            self.abandon()
            self._due = False  # not again before the next batch
            if self._worker.missing or self._worker.lost():
                raise
            logger.debug("KV could not be copied: %s", fault)
            if isinstance(work, ReadBack):
                self._not_read(work)
        return True

    def _stands(self, work: SpareCopy | ReadBack) -> bool:
        if isinstance(work, ReadBack):
            return self._reads.next() is work and self._reads.readable(work)
        return self._spares.stands(work)

    def _ended(self, work: SpareCopy | ReadBack, fits: bool) -> bool:
        """A copy has come to its end; without room at its holder nothing was copied. Whether another one may begin."""
        if not fits:
            self._due = False  # the books were wrong: not again before the next batch
            if isinstance(work, ReadBack):
                self._not_read(work)
            else:
                self._spares.refused(work)
            return isinstance(work, ReadBack)
        if isinstance(work, ReadBack):
            work.at = self._end
        else:
            self._spares.copied(work)
        return True

    def _next(self, idle: bool) -> SpareCopy | None:
        room, length = self._room(), self._control.scheduler.config.page_size
        for owner, tokens in self._owners():
            least = length if idle or isinstance(owner, Node) else BEHIND
            copy = self._spares.next_copy(owner, tokens, least, CHUNK, room, lambda: (o for o, _ in self._owners()))
            if copy is not None:
                return copy
        return None

    def _owners(self) -> Iterator[tuple[ScheduledSequence | Node, int]]:
        """The sequences and cached prefixes whose KV is whole, with their numbers of tokens."""
        running = self._control.scheduler.running
        for sequence in running:
            if running.movable(sequence):
                yield sequence, sequence.computed
        for node in running.prefix_cache:
            if not node.read:
                yield node, node.length

    def _room(self) -> Pages:
        """The pages that spares may take: nobody is promised them, and some stay free."""
        running = self._control.scheduler.running
        reserve = Pages({place: pages // _KEPT_FREE for place, pages in self._control.placement.pages.items()})
        return running.headroom() - running.giving_way - reserve
