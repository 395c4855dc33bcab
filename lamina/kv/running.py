"""The sequences with KV: the pages they take, and the pages they may still need.

Sequences are opened and closed here, and what they share is entered in the prefix cache.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from lamina.errors import EngineError
from lamina.kv.kv_shares import NO_PAGES, Handover, Layout, Pages, Place, Share
from lamina.kv.page_ledger import PageLedger
from lamina.kv.pages import PageRun, PageRuns
from lamina.kv.placement import Placement
from lamina.kv.prefix_cache import PrefixCache
from lamina.kv.prefix_nodes import Node, tree_of
from lamina.kv.request import PlannedRow, RetainedKv, ScheduledSequence, SchedulerConfig
from lamina.kv.spares import Spares

Order = tuple[int, int, int]
_COPIED_TOKENS = 1024  # at a time, at most


@dataclass(slots=True)
class Counters:
    """Counts since the start. `reused_tokens` came from a fork instead of a prefill; `rebuilt_tokens` were computed
    again because a holder was lost. `looked_up_tokens` are those of prompts admitted for the first time, `found_tokens`
    those of them that the prefix cache had."""

    admitted: int = 0
    preempted: int = 0
    evicted: int = 0
    reused_tokens: int = 0
    rebuilt_tokens: int = 0
    looked_up_tokens: int = 0
    found_tokens: int = 0


class RunningSequences:
    """`sequences` are the sequences with KV, by order; only this class changes the list. `wake` is called with each
    sequence that need not wait for a prefix any more.

    `prefix_cache` stays empty where the config has none, `spares` without redundancy.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        placement: Placement,
        ledger: PageLedger,
        wake: Callable[[ScheduledSequence], None],
    ) -> None:
        self.sequences: list[ScheduledSequence] = []
        self.counters = Counters()
        self.runs = PageRuns(config.page_size, config.held)
        self.spares = Spares(config, placement, self.runs)
        self.prefix_cache = PrefixCache(config, self.runs, self._fork, self._evicted, wake)
        self._config = config
        self._placement = placement
        self._ledger = ledger

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[ScheduledSequence]:
        return iter(self.sequences)

    # Opening and closing.

    def open(
        self,
        sequence: ScheduledSequence,
        layout: Layout,
        source: Node | ScheduledSequence | None = None,
        length: int = 0,
    ) -> None:
        """Open a sequence in the holders: as a fork of the source's first `length` tokens where there is a source."""
        if source is None or source.handle is None:
            sequence.handle, sequence.runs = self._placement.open(layout), self.runs.open(layout)
        else:
            policy = sequence.request.policy
            sequence.handle = self._fork(source.handle, length, policy)
            sequence.runs = self.runs.fork(source.runs, length, policy=policy)
            sequence.floor = length if self._config.states else source.floor
            sequence.forked, sequence.records = {length}, (length, length)
            sequence.copies = length % self._config.page_size > 0
        sequence.layout = layout
        sequence.exact = len(sequence.tokens) - 1 if _exact(source, length) else 0  # the last one is decoded, perhaps
        sequence.computed = sequence.planned = length
        if sequence.preemptions == 0:
            sequence.reused = length
        insort(self.sequences, sequence, key=order_of)
        self.counters.admitted += 1
        self.counters.reused_tokens += length
        if self._config.prefix_cache:
            self.prefix_cache.enter(sequence)
        node = self.prefix_cache.held_by(source) if isinstance(source, ScheduledSequence) else source
        if node is not None:
            self.prefix_cache.hold(sequence, node, length)

    def fork(self, sequence: ScheduledSequence, source: ScheduledSequence, length: int) -> None:
        """Open a sequence as the first `length` tokens of `source`, which shares them from now on."""
        self.open(sequence, source.layout, source, length)
        source.copies = source.copies or sequence.copies
        source.forked.add(length)

    def adopt(self, sequence: ScheduledSequence, kept: RetainedKv, there: Container[Place]) -> None:
        """Take up a sequence that holders have already. Shares in pools that are not `there` count once they are
        opened elsewhere. Which pages other sequences share is not known, so none counts as its own."""
        present_shares = tuple(share for share in kept.layout if share.at in there)
        self._ledger.took(
            self._config.held(present_shares, 0, kept.computed, kept.floor)
            + self._config.records(present_shares, self._config.record_pages)
        )
        sequence.handle, sequence.layout, sequence.floor = kept.handle, kept.layout, kept.floor
        sequence.runs = self.runs.open(kept.layout, kept.computed, kept.floor)
        sequence.computed = sequence.planned = kept.computed
        sequence.forked, sequence.records = {kept.computed}, (kept.computed, kept.computed)
        sequence.copies = kept.computed % self._config.page_size > 0
        insort(self.sequences, sequence, key=order_of)

    def close(self, sequence: ScheduledSequence) -> None:
        """Take a sequence's KV away. Raises EngineError where it has none."""
        if sequence.handle is None:
            raise EngineError(f"request {sequence.request.id} was closed twice")
        self._leave_cache(sequence)
        self.drop_local_copy(sequence)
        self.spares.close(sequence.handle)
        self._placement.close(sequence.handle, self.own_pages(sequence, sequence.layout))
        del self.sequences[bisect_left(self.sequences, sequence.order, key=order_of)]
        sequence.handle = sequence.rebuild = None
        self.runs.relocate(sequence.runs)
        sequence.layout, sequence.forked = (), set()
        sequence.computed = sequence.planned = sequence.floor = sequence.stored = 0
        sequence.copies, sequence.drafts = False, ()
        sequence.records, sequence.keeps_inputs = (0, 0), False

    def cut(self, sequence: ScheduledSequence, length: int) -> None:
        """Keep the first `length` tokens of an idle sequence, not fewer than its floor. The rest is computed again, at
        all holders alike."""
        sequence.computed = sequence.planned = length
        sequence.stored, sequence.drafts = 0, ()
        sequence.copies = True
        sequence.records = sequence.records if sequence.records[1] <= length else (0, 0)
        sequence.rebuild = None
        self.spares.cut(sequence.handle or 0, length)

    def drop_local_copy(self, sequence: ScheduledSequence) -> None:
        """Close a sequence's local copy, if it has one. No plan in flight may read it."""
        if sequence.local_copy:
            self._placement.close_parts(sequence.local_copy, self._copied(sequence))
            sequence.local_copy = ()

    def raise_floor(self, row: PlannedRow, floor: int) -> None:
        """Holders have accepted a row, or may have: its sequence has this floor, and so have the shares that let go of
        pages by it, which store it."""
        sequence, end = row.sequence, row.start + row.count
        sequence.floor = max(sequence.floor, floor)
        missing = sequence.rebuild.missing if row.rebuild and sequence.rebuild is not None else sequence.layout
        for share, leaf in sequence.runs.items() if floor else ():
            if row.start < share.hi and share.lo < end and share in missing:
                leaf.floor = max(leaf.floor, floor)

    def rewritten(self, sequence: ScheduledSequence, start: int) -> None:
        """Holders have accepted a row that writes a sequence's tokens from `start` on, into pages of its own."""
        self.runs.rewrite(sequence.runs, start)
        sequence.copies = False

    def retire(self, sequence: ScheduledSequence) -> None:
        """Close a sequence that has ended and is idle; the prefix cache keeps what others may share."""
        if self._config.prefix_cache and sequence.sound and sequence.rebuild is None:
            self.prefix_cache.keep(sequence)
        self.close(sequence)

    # Their tenants and holders.

    def tokens_by_tenant(self) -> Counter[str]:
        """The tokens of each tenant's sequences with KV."""
        tokens: Counter[str] = Counter()
        for sequence in self.sequences:
            tokens[sequence.request.tenant] += len(sequence.tokens)
        return tokens

    def kept_by(self, holders: Container[int]) -> list[ScheduledSequence]:
        """The sequences of which one of these holders keeps a share, by order."""
        return [s for s in self.sequences if any(share.holder in holders for share in s.layout)]

    def keeps_at(self, sequence: ScheduledSequence, at: Container[Place]) -> bool:
        """Whether a sequence may have pages in one of these pools. Where its next row begins it may: a batch that
        failed has left some."""
        rebuild = sequence.rebuild
        missing, rebuilt = (rebuild.missing, rebuild.planned) if rebuild is not None else ((), 0)
        return any(
            share.at in at and share.lo <= (rebuilt if share in missing else sequence.planned)
            for share in sequence.layout
        )

    def movable(self, sequence: ScheduledSequence) -> bool:
        """Whether a sequence's KV is whole."""
        return sequence.handle is not None and sequence.rebuild is None

    def moved(self, sequence: ScheduledSequence, layout: Layout, starts: Mapping[Share, int]) -> None:
        """The KV of a movable, idle sequence is in this layout now; new shares have no pages of other sequences.
        `starts`: where the last row begins by which a new share has stored its KV."""
        self._leave_cache(sequence)
        self.drop_local_copy(sequence)
        old_shares = [share for share in layout if share in sequence.runs]
        self.runs.relocate(sequence.runs, old_shares, tuple(share for share in layout if share not in old_shares))
        for share, start in starts.items():
            sequence.runs[share].floor = start
        sequence.layout, sequence.stored, sequence.keeps_inputs = layout, 0, False
        self.spares.keep(sequence.handle or 0, layout)
        sequence.copies = sequence.copies and bool(old_shares)
        sequence.forked = sequence.forked if old_shares else set()

    def grow(self, sequence: ScheduledSequence, handovers: Sequence[Handover]) -> None:
        """Have shares of a sequence grow elsewhere, from above all that is planned on."""
        if sequence.handle is None or sequence.rebuild is not None:
            raise EngineError(f"request {sequence.request.id} cannot grow elsewhere now")
        self._placement.grow(sequence.handle, handovers)
        self.runs.grow(sequence.runs, handovers)
        others = [share for share in sequence.layout if all(share != handover.share for handover in handovers)]
        ended = {handover.share: handover.ended for handover in handovers if handover.ended is not None}
        sequence.layout = (*others, *ended.values(), *(handover.taker for handover in handovers))
        self.spares.ended(sequence.handle, ended, sequence.layout)

    # Pages.

    def pages(self, sequence: ScheduledSequence) -> Pages:
        """Pages that a sequence has, those included that it shares with others."""
        records = len(set(sequence.records) - {0}) + sequence.keeps_inputs
        pages = self._config.records(sequence.layout, records)
        return sum((self._pages_beyond(sequence, share, 0) for share in sequence.layout), pages)

    def _copied(self, sequence: ScheduledSequence) -> Pages:
        """The least pages of its local copy, once every plan is answered."""
        size = sequence.copied - sequence.local_copy[0].share.lo  # its pages begin anywhere
        shares = tuple(replace(part.share, lo=0) for part in sequence.local_copy)
        return self._config.held(shares, 0, size, size, size)

    def own_pages(self, sequence: ScheduledSequence, layout: Layout) -> Pages:
        """Pages that a sequence has in these of its shares, and certainly shares with none."""
        pages = self._config.records(layout, sequence.own_records) if self._config.states else Pages()
        for share in layout:
            pages += self._pages_beyond(sequence, share, sequence.runs[share].lo)
        return pages

    def _pages_beyond(self, sequence: ScheduledSequence, share: Share, first: int) -> Pages:
        """Pages that a sequence has in one of its shares of the positions from `first` on."""
        rebuild = sequence.rebuild
        if rebuild is not None and share in rebuild.read:
            return NO_PAGES
        if rebuild is not None and share in rebuild.missing:
            return self._config.held((share,), first, rebuild.at, rebuild.at)
        return self._config.held((share,), first, sequence.computed, sequence.runs[share].floor)

    @property
    def giving_way(self) -> Pages:
        """Pages of spares, of unused prefixes and of local copies."""
        copied = (self._copied(sequence) for sequence in self.sequences if sequence.local_copy)
        return sum(copied, self.prefix_cache.evictable)

    def evict(self, at: Set[Place]) -> bool:
        """Close a spare in one of these pools, or else the least recently used prefix there. False where there is
        none."""
        return self.spares.give_up(at) or self.prefix_cache.evict(at)

    def headroom(self) -> Pages:
        """Pages left for new sequences. The running ones keep what their known tokens need, and a page set each."""
        config = self._config
        room = self._ledger.unpromised() + self.giving_way
        alike: dict[int, list[ScheduledSequence]] = {}  # by layout: placement makes equal ones once
        for sequence in self.sequences if config.states else ():
            room -= config.records(sequence.layout, config.record_pages - sequence.own_records)
        for sequence in self.sequences:
            alike.setdefault(id(sequence.layout), []).append(sequence)
            length, planned = len(sequence.tokens), sequence.planned
            if length - planned > 1:
                room -= config.pages_for(sequence.layout, length) - config.pages_for(sequence.layout, planned)
            if sequence.rebuild is not None:
                room -= config.held(sequence.rebuild.missing, sequence.rebuild.planned, sequence.rebuild.end, 0)
                room -= config.held(sequence.rebuild.read, 0, sequence.rebuild.planned, 0)
        for sequences in alike.values():
            layout = sequences[0].layout
            if all(share.lo == 0 and share.hi >= config.max_model_len for share in layout):
                room -= config.page_set(layout, 0) * len(sequences)
                continue
            for sequence in sequences:
                room -= config.page_set(layout, len(sequence.tokens))
        return room

    def most(self) -> Pages:
        """The most pages that can be taken, batches under way and failed ones included: each sequence may have all its
        known tokens there, drafts, and a copy of a page. Pages of unknown owners count for each sequence. What a
        policy lets go is counted until it must have been freed: a row or a copy later, and never in a share whose range
        is full."""
        pages = self._ledger.moving + self.spares.doubtful
        leaves = {leaf for sequence in self.sequences for leaf in sequence.runs.values()}
        prefixes = (leaf for node in self.prefix_cache for leaf in node.runs.values())
        for run in {run for leaf in (*leaves, *prefixes, *self.spares.leaves) for run in leaf.path()} - leaves:
            pages += self._most(run, run.hi, run.floor)
        pages += self.prefix_cache.snapshots
        for sequence in self.sequences:
            length = len(sequence.tokens) + self._config.max_drafts
            floor = sequence.floor if sequence.rebuild is None else 0
            pages += self._config.page_set(sequence.layout, sequence.computed)
            pages += self._config.records(sequence.layout, self._config.record_pages)
            for leaf in sequence.runs.values():
                pages += self._most(leaf, length, floor)
            for share in (part.share for part in sequence.local_copy):
                pages += self._config.page_set((share,), share.lo) * -((share.lo - length) // self._config.page_size)
        return pages

    def _most(self, run: PageRun, end: int, floor: int) -> Pages:
        share = run.share
        freed_to = max(0, floor - max(_COPIED_TOKENS, self._config.max_batch_tokens)) if floor < share.hi else 0
        return self._config.held((share,), run.lo if run.parent else share.lo, end, 0, freed_to)

    def needed(self, sequence: ScheduledSequence, layout: Layout, node: Node | None, length: int) -> Pages:
        """Spare pages that a sequence needs: for all its known tokens, the first `length` of which it shares with
        `node`, and a page set to grow."""
        config, known_length = self._config, len(sequence.tokens)
        shared = length - length % config.page_size
        needed = config.pages_for(layout, known_length, shared) + config.page_set(layout, known_length)
        return needed if node is None else needed + self.prefix_cache.unused_pages(node)

    def _leave_cache(self, sequence: ScheduledSequence) -> None:
        self.prefix_cache.discard(sequence)
        self.prefix_cache.release(sequence)

    def _fork(self, parent: int, length: int, policy: str | None = None) -> int:
        handle = self._placement.fork(parent, length, policy)
        self.spares.forked(parent, handle, length, policy)
        return handle

    def _evicted(self, handle: int, freed: Pages) -> None:
        self.counters.evicted += 1
        self.spares.close(handle)
        self._placement.close(handle, freed)

    def check_integrity(self) -> None:
        """Raise EngineError if handles, lengths, the prefix tree and the ledger contradict each other."""
        handles = [sequence.handle for sequence in self.sequences if sequence.handle is not None]
        self._placement.check_integrity(
            [*handles, *self.prefix_cache.check_integrity(self.sequences, self.spares.leaves)]
        )
        for sequence in self.sequences:
            name = f"sample {sequence.sample} of request {sequence.request.id}"
            if not 0 <= sequence.computed < len(sequence.tokens) or sequence.floor > sequence.computed:
                raise EngineError(f"{name}: {sequence.floor=} {sequence.computed=} {len(sequence.tokens)=}")
            if sequence.finish_reason is not None and not sequence.in_flight:
                raise EngineError(f"{name} has ended, but keeps its KV")


def _exact(source: Node | ScheduledSequence | None, length: int) -> bool:
    """Whether the first `length` tokens of a source have KV that no choice of a policy has changed."""
    if isinstance(source, ScheduledSequence):
        return source.exact >= length
    return source is None or tree_of(source)[1] is None


def order_of(sequence: ScheduledSequence) -> Order:
    return sequence.order
