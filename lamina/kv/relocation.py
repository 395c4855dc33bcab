"""Where KV goes after holders have come or are to leave: growth, moves that pay, and draining. Pure.

Growth is the positions that running sequences will still get. A sequence need not grow where it began. From the next
page border above all that is planned, another holder of the same heads can take over: no byte moves, and the old
holder's pages are read as before. So a holder that joins is of use at once, one that is drained gets nothing more, and
a sequence at a full holder goes on at another one.

After a holder has joined, KV moves where a step then waits less for the holder that reads most. A step takes as long as
the holder with the most KV to read. What a sequence has at that one moves to the one that reads least, where the steps
that it will still take pay for the copy. Each move brings the two closer and never past each other, so moves come to an
end and none is taken back.

Sequences with KV at draining holders move too. Where that is not possible, one of them is computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from lamina.kv.kv_shares import Handover, Layout, Pages, Place, Share, under
from lamina.kv.page_ledger import PageLedger
from lamina.kv.placement import Placement
from lamina.kv.request import ScheduledSequence, SchedulerConfig
from lamina.kv.running import RunningSequences

MIN_GROWTH = 64  # tokens that a sequence must still be able to get for a part more to pay
MAX_RANGES = 8  # of the same heads; each is a row more in every batch
_MAX_CELLS = 256  # kinds of shares whose pages a position are remembered
_MIN_PAGES = 16  # of each layer and head, that a holder must have for a sequence that another one has no room for


class GrowingShare(NamedTuple):
    """A share whose growth can go elsewhere: what its sequence gets from position `at` on, `pages` at most."""

    sequence: ScheduledSequence
    share: Share
    at: int
    pages: int


class Growth:
    """Decides for the running sequences, and has them grow elsewhere.

    Not for what must be in one place: states, keys among which an index chooses, KV of which a policy chooses. A pool
    of which all layers have windows keeps its place too, since it does not grow. The local tier takes or leaves whole
    sequences (`StepTuner`), and a sequence that is being rebuilt grows where it is.
    """

    def __init__(
        self, config: SchedulerConfig, placement: Placement, ledger: PageLedger, running: RunningSequences
    ) -> None:
        self._config = config
        self._placement = placement
        self._ledger = ledger
        self._running = running
        self._cells: dict[tuple[int, tuple[int, ...], str], int] = {}

    def joined(self, numbers: Collection[int]) -> int:
        """Holders have joined: they get growth until all have about the same part of their pages left at the end.
        Returns how many sequences grow there."""
        growing = [candidate for s in self._running for candidate in self._growing(s) if self._pays(candidate)]
        pages, free = self._placement.pages, dict(self._room())
        for candidate in growing:
            free[candidate.share.at] = free.get(candidate.share.at, 0) - candidate.pages
        growing.sort(key=lambda candidate: -candidate.pages)
        hosts: dict[tuple[int, int], list[int]] = {}  # by pool and head
        moves: dict[ScheduledSequence, list[tuple[GrowingShare, int]]] = {}
        for candidate in growing:
            place, pool = candidate.share.at, candidate.share.pool
            key = pool, candidate.share.heads[0]
            if key not in hosts:
                hosts[key] = [number for number in self._placement.hosts(candidate.share) if number in numbers]
            best = max(hosts[key], key=lambda host: free.get((host, pool), 0) / pages[host, pool], default=place[0])
            best_place = best, pool
            if (
                best != place[0]
                and (free.get(best_place, 0) - candidate.pages) * pages[place] >= free[place] * pages[best_place]
            ):
                free[place] += candidate.pages
                free[best_place] = free.get(best_place, 0) - candidate.pages
                moves.setdefault(candidate.sequence, []).append((candidate, best))
        for handovers in moves.values():
            self._grow(handovers)
        return len(moves)

    def leave(self, numbers: Container[int]) -> int:
        """Holders are to be let go: they get no growth any more. Returns how many sequences grow elsewhere now."""
        free, count = dict(self._room()), 0
        for sequence in self._running:
            handovers = []
            for candidate in self._growing(sequence):
                hosts = self._placement.hosts(candidate.share) if candidate.share.holder in numbers else []
                if hosts and candidate.pages:
                    best = max(hosts, key=lambda host: free.get((host, candidate.share.pool), 0))
                    free[best, candidate.share.pool] = free.get((best, candidate.share.pool), 0) - candidate.pages
                    handovers.append((candidate, best))
            if handovers:
                self._grow(handovers)
                count += 1
        return count

    def elsewhere(self, sequence: ScheduledSequence, short: Set[Place]) -> bool:
        """Have an idle sequence go on at holders with room, as far as those of these pools have none for its next
        tokens. False where that is not possible."""
        growing = [
            candidate
            for candidate in self._growing(sequence)
            if candidate.share.at in short
            and candidate.share.lo <= candidate.at == sequence.next
            and _divisible(candidate)
        ]
        if {candidate.share.at for candidate in growing} != short:
            return False
        room, handovers = self._running.headroom(), []
        for candidate in growing:
            needed = min(
                candidate.pages,
                _MIN_PAGES * self._config.page_set((candidate.share,), candidate.at).get(candidate.share.at, 0),
            )
            hosts = [host for host in self._placement.hosts(candidate.share) if host != candidate.share.holder]
            best = max(hosts, key=lambda host: room.get((host, candidate.share.pool), 0), default=-1)
            if room.get((best, candidate.share.pool), 0) < needed or not needed:
                return False
            room -= Pages({(best, candidate.share.pool): needed})
            handovers.append((candidate, best))
        self._grow(handovers)
        return True

    def _room(self) -> Pages:
        """The pages that holders have left, with those of spares, unused prefixes and local copies."""
        return self._ledger.unpromised() + self._running.giving_way

    def _growing(self, sequence: ScheduledSequence) -> list[GrowingShare]:
        """The shares of a sequence whose growth can go elsewhere."""
        if sequence.rebuild is not None or sequence.finish_reason is not None:
            return []
        size, growing = self._config.page_size, []
        position = -(-max(sequence.planned, sequence.stored) // size) * size
        for share in sequence.layout:
            if share.hi > position and (cells := self._cells_of(share)) and self._placement.grows(share):
                pages = -(-(min(share.hi, sequence.longest) - max(share.lo, position)) // size)
                growing.append(GrowingShare(sequence, share, position, cells * max(0, pages)))
        return growing

    def _cells_of(self, share: Share) -> int:
        """How many pages a share takes of each position, at most; 0 where its keys must be in one place."""
        key = share.pool, share.heads, share.policy
        cells = self._cells.get(key)
        if cells is None:
            groups, chooses = self._config.groups(share.policy)[share.pool], self._config.policy(share.policy).chooses
            grows = not chooses and any(group.policy is None for group in groups)
            if len(self._cells) >= _MAX_CELLS:
                self._cells.clear()
            cells = self._cells[key] = sum(group.cells(share.heads) for group in groups) if grows else 0
        return cells

    @staticmethod
    def _pays(growing: GrowingShare) -> bool:
        """Whether a sequence will get enough tokens for a part more."""
        return growing.pages > 0 and growing.sequence.longest - growing.at >= MIN_GROWTH and _divisible(growing)

    def _grow(self, moves: Sequence[tuple[GrowingShare, int]]) -> None:
        """Have shares of one sequence grow at these holders."""
        self._running.grow(moves[0][0].sequence, [_handover(growing, host) for growing, host in moves])


def _handover(growing: GrowingShare, to: int) -> Handover:
    share, position = growing.share, growing.at
    taker = Share(to, share.heads, max(position, share.lo), share.hi, share.pool, share.policy)
    if share.lo >= position:
        return Handover(share, None, taker)
    return Handover(share, Share(share.holder, share.heads, share.lo, position, share.pool, share.policy), taker)


def _divisible(growing: GrowingShare) -> bool:
    """Whether its heads may have one range more, if that is needed."""
    share, layout = growing.share, growing.sequence.layout
    ranges = sum(other.pool == share.pool and other.heads[0] in share.heads for other in layout)
    return ranges < MAX_RANGES or share.lo >= growing.at


MIN_TOKENS = 128  # that a sequence must still be able to get: a copy of a page takes as long as about 60 reads of it
_MIN_DIFFERENCE = 0.25  # of what the busiest holder reads, that the other one must read less


class KeptShare(NamedTuple):
    """What a sequence has of a share: so many pages, which each of its steps reads."""

    sequence: ScheduledSequence
    share: Share
    pages: int


class Balancing(NamedTuple):
    """Have a share of a sequence move to another holder."""

    sequence: ScheduledSequence
    share: Share
    to: int


def kept_shares(config: SchedulerConfig, sequences: Iterable[ScheduledSequence]) -> list[KeptShare]:
    """What these sequences have, of pools without states."""
    usages = []
    for sequence in sequences:
        for share in sequence.layout:
            if share.pool not in config.states:
                pages = config.held((share,), 0, sequence.computed, sequence.floor).get(share.at, 0)
                usages.append(KeptShare(sequence, share, pages))
    return usages


def next_move(every: Sequence[KeptShare], weights: Mapping[int, int], placement: Placement) -> Balancing | None:
    """The move that pays most; None where none pays. `weights` are those of the holders: one with a larger weight reads
    as much more in the same time."""
    read: Counter[int] = Counter()
    for usage in every:
        read[usage.share.holder] += usage.pages
    best: tuple[float, Balancing] | None = None
    for sequence, share, pages in every:
        source = share.holder
        if (
            not pages
            or source not in weights
            or not sequence.decodes
            or sequence.longest - sequence.computed < MIN_TOKENS
        ):
            continue
        for target in placement.hosts(share):
            before, after = read[source] / weights[source], (read[target] + pages) / weights[target]
            uneven = read[target] / weights[target] <= (1 - _MIN_DIFFERENCE) * before
            if target != source and uneven and after <= before - pages / weights[source]:
                gain = before - after
                if best is None or gain * pages > best[0]:
                    best = gain * pages, Balancing(sequence, share, target)
    return None if best is None else best[1]


def elsewhere(placement: Placement, layout: Layout, free: Pages) -> list[Layout]:
    """Layouts without draining holders, the best first: their shares at the holders with the most of these free pages
    and the others where they are, or all in the local pools."""
    draining = placement.draining
    others = [placement.substitute(share, free) if share.holder in draining else share for share in layout]
    layout_shares = tuple(share for share in others if share is not None)
    layouts = (
        layout_shares if len(layout_shares) == len(layout) else (),
        under(placement.layout(0, local=True), layout[0].policy),
    )
    return [candidate for candidate in layouts if candidate]


def to_preempt(
    kept: Iterable[ScheduledSequence], moving: Container[ScheduledSequence], stuck: Sequence[ScheduledSequence]
) -> ScheduledSequence | None:
    """Which of the sequences `kept` at draining holders gives its KV back: the youngest idle one of those that are
    `stuck`, without room elsewhere. None while one of them still moves: its end may give room."""
    if any(sequence in moving for sequence in kept):
        return None
    return next((sequence for sequence in reversed(stuck) if not sequence.in_flight), None)
