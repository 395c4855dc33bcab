"""Where the growth of running sequences goes: the positions that they will still get. Pure.

A sequence need not grow where it began. From the next page border above all that is planned, another holder of the same
heads can take over: no byte moves, and the old holder's pages are read as before. So a holder that joins is of use at
once, one that is drained gets nothing more, and a sequence at a full holder goes on at another one.

Which KV is worth moving after a holder has joined, so that a step waits less for the holder that reads most. Pure.

A step takes as long as the holder with the most KV to read. What a sequence has at that one moves to the one that reads
least, where the steps that it will still take pay for the copy. Each move brings the two closer and never past each
other, so moves come to an end and none is taken back.

Where the sequences go that have KV at draining holders, and which of them is computed again instead. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from lamina.kv.kv_shares import Handover, Layout, Layouts, Pages, Place, Share, under
from lamina.kv.page_ledger import PageLedger
from lamina.kv.placement import Placement
from lamina.kv.request import ScheduledSequence, SchedulerConfig
from lamina.kv.running import RunningSequences

WORTH = 64  # tokens that a sequence must still be able to get for a part more to pay
MOST_RANGES = 8  # of the same heads; each is a row more in every batch
_KNOWN = 256  # kinds of shares of which it is known how many pages they take
_ROOM = 16  # pages of each layer and head that a holder must have for a sequence that another one has no room for


class Growing(NamedTuple):
    """A share whose growth can go elsewhere: what its sequence gets from position `at` on, `pages` at most."""

    sequence: ScheduledSequence
    share: Share
    at: int
    pages: int


class Growth:
    """Decides for the running sequences, and has them grow elsewhere.

    Not for what must be in one place: states, keys among which an index chooses, KV of which a policy chooses or
    evicts. A pool of which all layers have windows keeps its place too, since it does not grow. The local tier takes or
    leaves whole sequences (`StepTuner`), and a sequence that is being rebuilt grows where it is.
    """

    def __init__(
        self, config: SchedulerConfig, layouts: Layouts, ledger: PageLedger, running: RunningSequences
    ) -> None:
        self._config = config
        self._layouts = layouts
        self._ledger = ledger
        self._running = running
        self._cells: dict[tuple[int, tuple[int, ...], str], int] = {}

    def joined(self, numbers: Collection[int]) -> int:
        """Holders have joined: they get growth until all have about the same part of their pages left at the end.
        Returns how many sequences grow there."""
        growing = [each for s in self._running for each in self._growing(s) if self._pays(each)]
        pages, left = self._layouts.pages, dict(self._room())
        for each in growing:
            left[each.share.at] = left.get(each.share.at, 0) - each.pages
        growing.sort(key=lambda each: -each.pages)
        hosts: dict[tuple[int, int], list[int]] = {}  # by pool and head
        moves: dict[ScheduledSequence, list[tuple[Growing, int]]] = {}
        for each in growing:
            at, pool = each.share.at, each.share.pool
            key = pool, each.share.heads[0]
            if key not in hosts:
                hosts[key] = [number for number in self._layouts.hosts(each.share) if number in numbers]
            best = max(hosts[key], key=lambda to: left.get((to, pool), 0) / pages[to, pool], default=at[0])
            there = best, pool
            if best != at[0] and (left.get(there, 0) - each.pages) * pages[at] >= left[at] * pages[there]:
                left[at] += each.pages
                left[there] = left.get(there, 0) - each.pages
                moves.setdefault(each.sequence, []).append((each, best))
        for taken in moves.values():
            self._grow(taken)
        return len(moves)

    def leave(self, numbers: Container[int]) -> int:
        """Holders are to be let go: they get no growth any more. Returns how many sequences grow elsewhere now."""
        left, count = dict(self._room()), 0
        for sequence in self._running:
            taken = []
            for each in self._growing(sequence):
                hosts = self._layouts.hosts(each.share) if each.share.holder in numbers else []
                if hosts and each.pages:
                    best = max(hosts, key=lambda to: left.get((to, each.share.pool), 0))
                    left[best, each.share.pool] = left.get((best, each.share.pool), 0) - each.pages
                    taken.append((each, best))
            if taken:
                self._grow(taken)
                count += 1
        return count

    def elsewhere(self, sequence: ScheduledSequence, short: Set[Place]) -> bool:
        """Have an idle sequence go on at holders with room, as far as those of these pools have none for its next
        tokens. False where that is not possible."""
        growing = [
            each
            for each in self._growing(sequence)
            if each.share.at in short and each.share.lo <= each.at == sequence.next and _divisible(each)
        ]
        if {each.share.at for each in growing} != short:
            return False
        room, taken = self._running.headroom(), []
        for each in growing:
            needed = min(each.pages, _ROOM * self._config.page_set((each.share,), each.at).get(each.share.at, 0))
            hosts = [to for to in self._layouts.hosts(each.share) if to != each.share.holder]
            best = max(hosts, key=lambda to: room.get((to, each.share.pool), 0), default=-1)
            if room.get((best, each.share.pool), 0) < needed or not needed:
                return False
            room -= Pages({(best, each.share.pool): needed})
            taken.append((each, best))
        self._grow(taken)
        return True

    def _room(self) -> Pages:
        """The pages that holders have left, with those that nobody needs."""
        return self._ledger.unpromised() + self._running.giving_way

    def _growing(self, sequence: ScheduledSequence) -> list[Growing]:
        """The shares of a sequence whose growth can go elsewhere."""
        if sequence.rebuild is not None or sequence.finish_reason is not None:
            return []
        size, growing = self._config.page_size, []
        at = -(-max(sequence.planned, sequence.stored) // size) * size
        for share in sequence.layout:
            if share.hi > at and (cells := self._cells_of(share)) and self._layouts.grows(share):
                pages = -(-(min(share.hi, sequence.longest) - max(share.lo, at)) // size)
                growing.append(Growing(sequence, share, at, cells * max(0, pages)))
        return growing

    def _cells_of(self, share: Share) -> int:
        """How many pages a share takes of each position, at most; 0 where its keys must be in one place."""
        key = share.pool, share.heads, share.policy
        cells = self._cells.get(key)
        if cells is None:
            groups, chooses = self._config.groups(share.policy)[share.pool], self._config.policy(share.policy).chooses
            grows = not chooses and any(group.policy is None for group in groups)
            if len(self._cells) >= _KNOWN:
                self._cells.clear()
            cells = self._cells[key] = sum(group.cells(share.heads) for group in groups) if grows else 0
        return cells

    @staticmethod
    def _pays(each: Growing) -> bool:
        """Whether a sequence will get enough tokens for a part more."""
        return each.pages > 0 and each.sequence.longest - each.at >= WORTH and _divisible(each)

    def _grow(self, taken: Sequence[tuple[Growing, int]]) -> None:
        """Have shares of one sequence grow at these holders."""
        self._running.grow(taken[0][0].sequence, [_handover(each, to) for each, to in taken])


def _handover(growing: Growing, to: int) -> Handover:
    share, at = growing.share, growing.at
    taker = Share(to, share.heads, max(at, share.lo), share.hi, share.pool, share.policy)
    if share.lo >= at:
        return Handover(share, None, taker)
    return Handover(share, Share(share.holder, share.heads, share.lo, at, share.pool, share.policy), taker)


def _divisible(each: Growing) -> bool:
    """Whether its heads may have one range more, if that is needed."""
    share, layout = each.share, each.sequence.layout
    alike = sum(other.pool == share.pool and other.heads[0] in share.heads for other in layout)
    return alike < MOST_RANGES or share.lo >= each.at


PAYS = (
    128  # tokens that a sequence must still be able to get: copying a page takes as long as reading it about 60 times
)
_UNEVEN = 0.25  # of what the busiest holder reads, that the other one must read less


class Kept(NamedTuple):
    """What a sequence has of a share: so many pages, which each of its steps reads."""

    sequence: ScheduledSequence
    share: Share
    pages: int


class Balancing(NamedTuple):
    """Have a share of a sequence move to another holder."""

    sequence: ScheduledSequence
    share: Share
    to: int


def kept(config: SchedulerConfig, sequences: Iterable[ScheduledSequence]) -> list[Kept]:
    """What these sequences have, of pools without states."""
    found = []
    for sequence in sequences:
        for share in sequence.layout:
            if share.pool not in config.states:
                pages = config.held((share,), 0, sequence.computed, sequence.floor).get(share.at, 0)
                found.append(Kept(sequence, share, pages))
    return found


def next_move(every: Sequence[Kept], weights: Mapping[int, int], layouts: Layouts) -> Balancing | None:
    """The move that pays most; None where none pays. `weights` are those of the holders: one with a larger weight reads
    as much more in the same time."""
    read: Counter[int] = Counter()
    for each in every:
        read[each.share.holder] += each.pages
    best: tuple[float, Balancing] | None = None
    for sequence, share, pages in every:
        here = share.holder
        if not pages or here not in weights or not sequence.decodes or sequence.longest - sequence.computed < PAYS:
            continue
        for to in layouts.hosts(share):
            before, after = read[here] / weights[here], (read[to] + pages) / weights[to]
            uneven = read[to] / weights[to] <= (1 - _UNEVEN) * before
            if to != here and uneven and after <= before - pages / weights[here]:
                gain = before - after
                if best is None or gain * pages > best[0]:
                    best = gain * pages, Balancing(sequence, share, to)
    return None if best is None else best[1]


def elsewhere(placement: Placement, layout: Layout, free: Pages) -> list[Layout]:
    """Layouts without draining holders, the best first: their shares at the holders with the most of these free pages
    and the others where they are, or all in the local pools."""
    draining = placement.draining
    others = [placement.substitute(share, free) if share.holder in draining else share for share in layout]
    found = tuple(share for share in others if share is not None)
    layouts = found if len(found) == len(layout) else (), under(placement.layout(0, local=True), layout[0].policy)
    return [each for each in layouts if each]


def to_preempt(
    kept: Iterable[ScheduledSequence], moving: Container[ScheduledSequence], stuck: Sequence[ScheduledSequence]
) -> ScheduledSequence | None:
    """Which of the sequences `kept` at draining holders gives its KV back: the youngest idle one of those that are
    `stuck`, without room elsewhere. None while one of them still moves: its end may give room."""
    if any(sequence in moving for sequence in kept):
        return None
    return next((sequence for sequence in reversed(stuck) if not sequence.in_flight), None)
