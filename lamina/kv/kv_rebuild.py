"""The lost parts of sequences are computed again, and no more than that (`KvRebuild`). Pure.

Each sequence that can be rebuilt in part gets substitutes for its lost shares. Its next rows compute the missing
positions again, and only the substitutes store them. A spare is such a substitute that has most of them already. Of
sequences with a common beginning the first is computed, and the others' shares are forked off it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lamina.errors import EngineError
from lamina.kv.kv_shares import GONE, Layout, Pages, Share
from lamina.kv.pages import PageRuns
from lamina.kv.placement import Placement
from lamina.kv.prefix_cache import PrefixCache
from lamina.kv.prefix_nodes import Node, common_length
from lamina.kv.request import Rebuild, ScheduledSequence, SchedulerConfig
from lamina.kv.spares import ReadBack, ReadBacks, Spare, Spares

_Beginning = tuple[int, str, tuple[int, ...], int, int, tuple[int, ...]]


class KvRebuild:
    """Decides which holder takes over a lost share, and when a sequence's next row can be planned."""

    def __init__(self, config: SchedulerConfig, placement: Placement, runs: PageRuns, spares: Spares) -> None:
        self._config = config
        self._runs = runs
        self._spares = spares
        self.reads = ReadBacks(placement, runs, spares)
        self._placement = placement

    def take_over(self, holder: int, kept: Iterable[ScheduledSequence], prefixes: PrefixCache, free: Pages) -> int:
        """Have replicas take the place of what a lost holder had of these idle sequences and of prefixes, or have it
        read back to holders with these free pages. What sequences lack then is computed again, and prefixes that lack
        something are dropped. Returns how many tokens of sequences need not be computed."""
        for read in self.reads.unreadable():
            self.not_read(read)
        tokens = self._promote(holder, kept, free)
        for node in prefixes:
            self._promote_prefix(node, holder, free)
        prefixes.clear({holder, GONE})
        return tokens

    def _promote(self, holder: int, sequences: Iterable[ScheduledSequence], free: Pages) -> int:
        tokens = 0
        for sequence in sequences:
            self._wait_no_more(sequence)
            from_position: dict[Share, int] = {}
            awaited: list[Share] = []
            for lost in [share for share in sequence.layout if share.holder == holder]:
                spare = self._spares.replica(sequence.handle or 0, lost)
                if spare is not None:
                    share = self._spares.promote(sequence, lost, spare, 1)
                    sequence.runs[share].hi = 0  # it grows from now on
                    from_position[share] = spare.stored
                elif (read := self.reads.begin(sequence, lost, free)) is not None:
                    from_position[read.share] = read.end
                    awaited.append(read.share)
            if from_position:
                sequence.stored = 0
                self._plan_recompute(sequence, from_position, tuple(awaited))
                tokens += sequence.computed if sequence.rebuild is None else sequence.rebuild.at
        return tokens

    def _promote_prefix(self, node: Node, holder: int, free: Pages) -> None:
        """Have spares take over all that a lost holder had of a prefix, or nothing."""
        lost = [share for share in node.layout if share.holder == holder]
        substitutes: dict[Share, Spare | Share | None] = {}
        for share in lost:
            end = min(node.length, share.hi)
            if share.lo >= end:  # it has nothing there yet
                substitutes[share] = self._placement.substitute(share, free)
                continue
            spare = self._spares.replica(node.handle or 0, share) or self._spares.parity(node, share)
            substitutes[share] = spare if spare is not None and spare.stored >= end else None
        if not lost or node.read or None in substitutes.values():
            return
        for share, taker in substitutes.items():
            if isinstance(taker, Share):
                self._spares.reopen(node, share, taker, min(node.users, 1))
            elif taker is not None and taker.of == (share,):
                self._spares.promote(node, share, taker, min(node.users, 1))
            elif (read := self.reads.begin(node, share, free)) is not None:
                node.read += (read.share,)

    def lost(self, holder: int, kept: Iterable[ScheduledSequence], free: Pages) -> tuple[int, list[ScheduledSequence]]:
        """Have the shares of these idle sequences at a lost holder taken over, by holders with `free` pages.

        Returns how many tokens are computed again, and the sequences that cannot be rebuilt in part.
        """
        sources: dict[_Beginning, ScheduledSequence] = {}
        hopeless: list[ScheduledSequence] = []
        tokens = 0
        for sequence in kept:
            pages = self._begin(sequence, holder, free, sources)
            if pages is None:
                hopeless.append(sequence)
                continue
            free -= pages
            if sequence.rebuild is not None:
                tokens += sequence.rebuild.end - max(sequence.rebuild.at, sequence.rebuild.length)
        return tokens, hopeless

    def recorded(self, sequence: ScheduledSequence) -> None:
        """A rebuild row of a sequence is complete. Raises EngineError where nothing was to be rebuilt."""
        rebuild = sequence.rebuild
        if rebuild is None:
            raise EngineError(f"request {sequence.request.id} was rebuilt without need")
        rebuild.at = rebuild.planned
        if rebuild.at >= rebuild.end:
            sequence.rebuild = None

    def _begin(
        self, sequence: ScheduledSequence, holder: int, free: Pages, sources: dict[_Beginning, ScheduledSequence]
    ) -> Pages | None:
        """Have one sequence's shares taken over. `sources` has the sequences that are computed again, by their
        beginning. Returns the pages that it takes; None where no holder has them, or the remaining shares are not
        enough to compute the lost ones."""
        if sequence.handle is None or self._config.states:  # no holder has states of earlier positions
            return None
        self._wait_no_more(sequence)
        lost = tuple(share for share in sequence.layout if share.holder == holder)
        if not lost:
            return Pages()
        if sequence.floor > min(share.lo for share in lost) or len(lost) == len(sequence.layout):  # too little is left
            return None
        source, length = self._source(sequence, lost, sources)
        substitutes = self._substitutes(sequence, lost, free, source, length)
        if substitutes is None:
            return None
        sequence.stored = 0
        survivors = tuple(share for share in sequence.layout if share.holder != holder)
        self._runs.relocate(sequence.runs, survivors, substitutes)
        sequence.layout = (*survivors, *substitutes)
        self._plan_recompute(sequence, {share: share.lo for share in substitutes})
        if source is not None and sequence.rebuild is not None:
            sequence.rebuild.source, sequence.rebuild.source_handle = source, source.handle
            sequence.rebuild.length, sequence.rebuild.lost = length, holder
        else:
            self._placement.replace(sequence.handle, holder, substitutes)
            if sequence.rebuild is not None and (key := self._beginning(sequence, sequence.rebuild.missing)):
                sources.setdefault(key, sequence)
        return self._config.pages_for(substitutes, len(sequence.tokens), length)

    def read_back(self, read: ReadBack) -> None:
        """A share is read back: its owner can be used once it lacks nothing else."""
        self.reads.ended(read)
        owner = read.owner
        if isinstance(owner, Node):
            owner.read = tuple(share for share in owner.read if share != read.share)
        elif owner.rebuild is not None:
            owner.rebuild.read = tuple(share for share in owner.rebuild.read if share != read.share)
            self._rewrites(owner)
            if not owner.rebuild.read and owner.rebuild.at >= owner.rebuild.end:
                owner.rebuild = None

    def not_read(self, read: ReadBack) -> None:
        """A share cannot be read back. A sequence's is computed again; a prefix lacks it, so that it is GONE."""
        self.reads.ended(read)
        self.reads.give_up(read)
        owner = read.owner
        if isinstance(owner, Node):
            lost = replace(read.share, holder=GONE)
            owner.layout = tuple(lost if share == read.share else share for share in owner.layout)
        elif owner.rebuild is not None:
            owner.rebuild.read = tuple(share for share in owner.rebuild.read if share != read.share)
            owner.stored = 0
            self._plan_recompute(owner, {read.share: read.at})

    def ready(self, sequence: ScheduledSequence) -> bool:
        """Whether a sequence's next row can be planned: not while it waits for the rebuild of its source, or shares are
        read back."""
        rebuild = sequence.rebuild
        if rebuild is not None and rebuild.read:
            return False
        if rebuild is None or rebuild.source is None or sequence.handle is None:
            return True
        source = rebuild.source
        same_source = source.handle is not None and source.handle == rebuild.source_handle
        if not same_source or rebuild.missing[0] not in source.layout or source.computed < rebuild.length:
            self._wait_no_more(sequence)
            return True
        if source.rebuild is not None and source.rebuild.at < rebuild.length:
            return False
        self._placement.replace(sequence.handle, rebuild.lost, rebuild.missing, source.handle, rebuild.length)
        shared = {share: source.runs[share] for share in rebuild.missing}
        self._runs.relocate(sequence.runs, [share for share in sequence.layout if share not in shared])
        sequence.runs |= self._runs.fork(shared, rebuild.length)
        rebuild.source = None
        rebuild.at = rebuild.planned = rebuild.length
        if rebuild.at >= rebuild.end:
            sequence.rebuild = None
        return True

    def _wait_no_more(self, sequence: ScheduledSequence) -> None:
        rebuild = sequence.rebuild
        if rebuild is not None and rebuild.source is not None and sequence.handle is not None:
            rebuild.source = None
            self._placement.replace(sequence.handle, rebuild.lost, rebuild.missing)

    def _source(
        self, sequence: ScheduledSequence, lost: Layout, sources: dict[_Beginning, ScheduledSequence]
    ) -> tuple[ScheduledSequence | None, int]:
        """The sequence off which the lost share can be forked, and how many tokens of it; whole pages."""
        unbounded = self._config.unbounded(sequence.request.policy)
        key = self._beginning(sequence, lost) if sequence.rebuild is None and unbounded else None
        source = sources.get(key) if key is not None else None
        if source is None or source.rebuild is None:
            return None, 0
        length = min(common_length(source.tokens, sequence.tokens), source.rebuild.end, sequence.computed)
        return source, length - length % self._config.page_size

    def _beginning(self, sequence: ScheduledSequence, lost: Layout) -> _Beginning | None:
        """What sequences have in common of which one can be forked off the other: pool, policy, heads and range of a
        share, and the tokens up to the end of its first page. None where that page is not full, or not one share alone
        is lost."""
        if len(lost) != 1:
            return None
        (share,) = lost
        first = share.lo + self._config.page_size
        if min(sequence.computed, share.hi) < first:
            return None
        return share.pool, share.policy, share.heads, share.lo, share.hi, tuple(sequence.tokens[:first])

    def _substitutes(
        self, sequence: ScheduledSequence, lost: Layout, free: Pages, source: ScheduledSequence | None, length: int
    ) -> Layout | None:
        if source is not None and source.rebuild is not None:
            substitutes: list[Share] = list(source.rebuild.missing)
        else:
            candidates = [self._placement.substitute(share, free) for share in lost]
            substitutes = [share for share in candidates if share is not None]
        needed = self._config.pages_for(tuple(substitutes), len(sequence.tokens), length)
        return tuple(substitutes) if len(substitutes) == len(lost) and free.covers(needed) else None

    def _plan_recompute(
        self, sequence: ScheduledSequence, from_position: dict[Share, int], awaited: Layout = ()
    ) -> None:
        """Have each share computed again from its position on. Shares of an earlier loss go on where they are. The
        sequence also waits until the shares `awaited` are read back."""
        earlier = sequence.rebuild
        starts = {} if earlier is None else dict.fromkeys(earlier.missing, earlier.at)
        starts |= from_position
        starts = {share: max(share.lo, start) for share, start in starts.items() if share in sequence.layout}
        starts = {share: start for share, start in starts.items() if start < min(share.hi, sequence.computed)}
        sequence.rebuild = None
        if starts:
            start, end = min(starts.values()), min(sequence.computed, max(share.hi for share in starts))
            sequence.rebuild = Rebuild(tuple(starts), start, end, start)
            self._rewrites(sequence)
        reads = (*(share for share in (earlier.read if earlier else ()) if share in sequence.layout), *awaited)
        if reads:
            end = sequence.computed  # nothing to compute
            sequence.rebuild = sequence.rebuild or Rebuild((), end, end, end)
            sequence.rebuild.read = reads

    def _rewrites(self, sequence: ScheduledSequence) -> None:
        """What the next row of a rebuild stores is the sequence's own afterwards, also where a share has it already,
        perhaps together with others."""
        rebuild = sequence.rebuild
        if rebuild is not None and rebuild.missing:
            leaves = {share: sequence.runs[share] for share in rebuild.missing if share in sequence.runs}
            self._runs.rewrite(leaves, rebuild.at)
