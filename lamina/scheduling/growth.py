"""Where the growth of running sequences goes: the positions that they will still get. Pure.

A sequence need not grow where it began. From the next page border above all that is planned, another holder of the same
heads can take over: no byte moves, and the old holder's pages are read as before. So a holder that joins is of use at
once, one that is drained gets nothing more, and a sequence at a full holder goes on at another one.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence, Set
from typing import NamedTuple

from lamina.scheduling.kv_shares import Handover, Layouts, Pages, Place, Share
from lamina.scheduling.page_ledger import PageLedger
from lamina.scheduling.request import ScheduledSequence, SchedulerConfig
from lamina.scheduling.running import RunningSequences

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
