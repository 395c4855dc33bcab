"""Has the lost parts of sequences computed again, and no more than that. Pure.

Each sequence that can be rebuilt in part gets substitutes for its lost shares. Its next rows compute the missing
positions again, and only the substitutes store them. Of sequences with a common beginning the first is computed, and
the others' shares are forked off it.
"""

from __future__ import annotations

from collections.abc import Iterable

from lamina.errors import EngineError
from lamina.scheduling.kv_shares import Layout, Layouts, Pages, Share
from lamina.scheduling.page_runs import PageRuns
from lamina.scheduling.prefix_nodes import common_length
from lamina.scheduling.request import Rebuild, ScheduledSequence, SchedulerConfig

_Beginning = tuple[int, str, tuple[int, ...], int, int, tuple[int, ...]]


class KvRebuild:
    """Decides which holder takes over a lost share, and when a sequence's next row can be planned."""

    def __init__(self, config: SchedulerConfig, layouts: Layouts, runs: PageRuns) -> None:
        self._config = config
        self._runs = runs
        self._layouts = layouts

    def lost(self, holder: int, kept: Iterable[ScheduledSequence], spare: Pages) -> tuple[int, list[ScheduledSequence]]:
        """Have the shares of these idle sequences at a lost holder taken over, by holders with `spare` pages.

        Returns how many tokens are computed again, and the sequences that cannot be rebuilt in part.
        """
        begun: dict[_Beginning, ScheduledSequence] = {}
        hopeless: list[ScheduledSequence] = []
        tokens = 0
        for sequence in kept:
            taken = self._begin(sequence, holder, spare, begun)
            if taken is None:
                hopeless.append(sequence)
                continue
            spare -= taken
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
        self, sequence: ScheduledSequence, holder: int, spare: Pages, begun: dict[_Beginning, ScheduledSequence]
    ) -> Pages | None:
        """Have one sequence's shares taken over; `begun` has those that are computed again by their beginning. Returns
        the pages that it takes; None where no holder has them, or the remaining shares are not enough to compute the
        lost."""
        if sequence.handle is None or self._config.states:  # states of earlier positions are nowhere
            return None
        self._wait_no_more(sequence)
        lost = tuple(share for share in sequence.layout if share.holder == holder)
        if sequence.floor > min(share.lo for share in lost) or len(lost) == len(sequence.layout):  # too little is left
            return None
        source, length = self._source(sequence, lost, begun)
        substitutes = self._substitutes(sequence, lost, spare, source, length)
        if substitutes is None:
            return None
        sequence.stored = 0
        kept = tuple(share for share in sequence.layout if share.holder != holder)
        self._runs.relocate(sequence.runs, kept, substitutes)
        sequence.layout = (*kept, *substitutes)
        self._miss(sequence, substitutes)
        if source is not None and sequence.rebuild is not None:
            sequence.rebuild.source, sequence.rebuild.source_handle = source, source.handle
            sequence.rebuild.length, sequence.rebuild.lost = length, holder
        else:
            self._layouts.replace(sequence.handle, holder, substitutes)
            if sequence.rebuild is not None and (key := self._beginning(sequence, sequence.rebuild.missing)):
                begun.setdefault(key, sequence)
        return self._config.pages_for(substitutes, len(sequence.tokens), length)

    def ready(self, sequence: ScheduledSequence) -> bool:
        """Whether a sequence's next row can be planned: not while it waits for the rebuild of its source."""
        rebuild = sequence.rebuild
        if rebuild is None or rebuild.source is None or sequence.handle is None:
            return True
        source = rebuild.source
        same = source.handle is not None and source.handle == rebuild.source_handle
        if not same or rebuild.missing[0] not in source.layout or source.computed < rebuild.length:
            self._wait_no_more(sequence)
            return True
        if source.rebuild is not None and source.rebuild.at < rebuild.length:
            return False
        self._layouts.replace(sequence.handle, rebuild.lost, rebuild.missing, source.handle, rebuild.length)
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
            self._layouts.replace(sequence.handle, rebuild.lost, rebuild.missing)

    def _source(
        self, sequence: ScheduledSequence, lost: Layout, begun: dict[_Beginning, ScheduledSequence]
    ) -> tuple[ScheduledSequence | None, int]:
        """The sequence off which the lost share can be forked, and how many tokens of it; whole pages."""
        unbounded = self._config.unbounded(sequence.request.policy)
        key = self._beginning(sequence, lost) if sequence.rebuild is None and unbounded else None
        source = begun.get(key) if key is not None else None
        if source is None or source.rebuild is None:
            return None, 0
        same = min(common_length(source.tokens, sequence.tokens), source.rebuild.end, sequence.computed)
        return source, same - same % self._config.page_size

    def _beginning(self, sequence: ScheduledSequence, lost: Layout) -> _Beginning | None:
        """What sequences have in common of which one can be forked off the other: pool, policy, heads and range of a
        share, and the tokens up to the end of its first page. None where that page is not full, or more than one share
        is lost."""
        if len(lost) > 1:
            return None
        (share,) = lost
        first = share.lo + self._config.page_size
        if min(sequence.computed, share.hi) < first:
            return None
        return share.pool, share.policy, share.heads, share.lo, share.hi, tuple(sequence.tokens[:first])

    def _substitutes(
        self, sequence: ScheduledSequence, lost: Layout, spare: Pages, source: ScheduledSequence | None, length: int
    ) -> Layout | None:
        if source is not None and source.rebuild is not None:
            taken: list[Share] = list(source.rebuild.missing)
        else:
            found = [self._layouts.substitute(share, spare) for share in lost]
            taken = [share for share in found if share is not None]
        needed = self._config.pages_for(tuple(taken), len(sequence.tokens), length)
        return tuple(taken) if len(taken) == len(lost) and spare.covers(needed) else None

    def _miss(self, sequence: ScheduledSequence, substitutes: Layout) -> None:
        """The substitutes are to be computed, and the shares that were missing before."""
        missing = substitutes
        if sequence.rebuild is not None:
            missing = (*(share for share in sequence.rebuild.missing if share in sequence.layout), *substitutes)
        at = min(share.lo for share in missing)
        end = min(sequence.computed, max(share.hi for share in missing))
        sequence.rebuild = Rebuild(missing, at, end, at) if at < end else None
