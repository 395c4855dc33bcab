"""The sequences with KV: the pages they take, the pages they may still need, and what the prefix cache shares of them.

They are opened and closed in the ledger here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from lamina.errors import EngineError
from lamina.scheduling.kv_shares import NO_PAGES, Layout, Pages
from lamina.scheduling.page_ledger import PageLedger
from lamina.scheduling.prefix_cache import Match, PrefixCache
from lamina.scheduling.prefix_nodes import Node
from lamina.scheduling.request import RetainedKv, ScheduledSequence, SchedulerConfig

Order = tuple[int, int, int]


@dataclass(slots=True)
class Counters:
    """What happened since the start. `reused_tokens` came from a fork instead of a prefill, `rebuilt_tokens` were
    computed again for a lost holder's sake. Of `looked_up_tokens`, of prompts admitted for the first time, the prefix
    tree had `found_tokens`."""

    admitted: int = 0
    preempted: int = 0
    evicted: int = 0
    reused_tokens: int = 0
    rebuilt_tokens: int = 0
    looked_up_tokens: int = 0
    found_tokens: int = 0


class RunningSequences:
    """`sequences` are the sequences with KV, by order; only this class changes the list. `wake` is called with each
    sequence that waited for a prefix and need not wait any more."""

    def __init__(self, config: SchedulerConfig, ledger: PageLedger, wake: Callable[[ScheduledSequence], None]) -> None:
        self.sequences: list[ScheduledSequence] = []
        self.counters = Counters()
        self.tree: PrefixCache | None = None
        self._config = config
        self._ledger = ledger
        if config.prefix_cache:
            self.tree = PrefixCache(config.page_size, config.held, ledger.fork, self._evicted, wake)

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
        """Open it in the holders, as a fork of the source's first `length` tokens where there is one."""
        if source is None or source.handle is None:
            sequence.handle = self._ledger.open(layout)
        else:
            sequence.handle = self._ledger.fork(source.handle, length)
            sequence.floor = source.floor
            sequence.copies = length % self._config.page_size > 0
        sequence.layout = layout
        sequence.computed = sequence.planned = sequence.shared = length
        if sequence.preemptions == 0:
            sequence.reused = length
        insort(self.sequences, sequence, key=order_of)
        self.counters.admitted += 1
        self.counters.reused_tokens += length
        if self.tree is not None:
            self.tree.enter(sequence)
            node = self.tree.held_by(source) if isinstance(source, ScheduledSequence) else source
            if node is not None:
                self.tree.hold(sequence, node, length)

    def fork(self, sequence: ScheduledSequence, source: ScheduledSequence, length: int) -> None:
        """Open it as the first `length` tokens of another, which shares them from now on."""
        self.open(sequence, source.layout, source, length)
        source.shared = max(source.shared, length)
        source.copies = source.copies or sequence.copies

    def adopt(self, sequence: ScheduledSequence, kept: RetainedKv, there: Container[int]) -> None:
        """Holders have it already; what those had that are not `there` is counted once it is opened elsewhere. Whom its
        pages are shared with is not known, so none counts as its own."""
        found = tuple(share for share in kept.layout if share.holder in there)
        self._ledger.adopt(kept.handle, self._config.held(found, 0, kept.computed, kept.floor))
        sequence.handle, sequence.layout, sequence.floor = kept.handle, kept.layout, kept.floor
        sequence.computed = sequence.planned = sequence.shared = kept.computed
        sequence.copies = kept.computed % self._config.page_size > 0
        insort(self.sequences, sequence, key=order_of)

    def close(self, sequence: ScheduledSequence) -> None:
        """Take its KV away. Raises EngineError where it has none."""
        if sequence.handle is None:
            raise EngineError(f"request {sequence.request.id} was closed twice")
        self._part_with_tree(sequence)
        self._ledger.close(sequence.handle, self._pages_beyond(sequence, sequence.shared))
        del self.sequences[bisect_left(self.sequences, sequence.order, key=order_of)]
        sequence.handle = sequence.rebuild = None
        sequence.layout = ()
        sequence.computed = sequence.planned = sequence.shared = sequence.floor = 0
        sequence.copies = False

    def retire(self, sequence: ScheduledSequence) -> None:
        """Close one that has ended and is idle; the tree keeps what others may share."""
        if self.tree is not None and sequence.sound and sequence.rebuild is None:
            self.tree.keep(sequence)
        self.close(sequence)

    # Their place.

    def kept_by(self, holder: int) -> list[ScheduledSequence]:
        """Those of which a holder keeps a share."""
        return [s for s in self.sequences if any(share.holder == holder for share in s.layout)]

    def movable(self, sequence: ScheduledSequence) -> bool:
        """Whether its KV is whole, and all that is to be done about it has been said to the holders."""
        handle = sequence.handle
        return handle is not None and sequence.rebuild is None and not self._ledger.concerns(handle)

    def moved(self, sequence: ScheduledSequence, layout: Layout) -> None:
        """The KV of a movable, idle sequence is now kept in this layout; what changed shares no pages any more."""
        self._part_with_tree(sequence)
        fresh = tuple(share for share in layout if share not in sequence.layout)
        if len(fresh) == len(layout):
            sequence.shared, sequence.copies = 0, False
        sequence.layout = layout

    # Pages.

    def pages(self, sequence: ScheduledSequence) -> Pages:
        """What it has, that included that it shares with others."""
        return self._pages_beyond(sequence, 0)

    def _pages_beyond(self, sequence: ScheduledSequence, first: int) -> Pages:
        """Pages that it has of the positions from `first` on."""
        layout, rebuild = sequence.layout, sequence.rebuild
        if rebuild is None:
            return self._config.held(layout, first, sequence.computed, sequence.floor)
        whole = tuple(share for share in layout if share not in rebuild.missing)
        return self._config.held(whole, first, sequence.computed, sequence.floor) + self._config.held(
            rebuild.missing, first, rebuild.at, rebuild.at
        )

    def spare(self) -> Pages:
        """Pages left for newcomers: without what these need for their known tokens and a page set for each."""
        config = self._config
        spare = self._ledger.unpromised()
        if self.tree is not None:
            spare += self.tree.evictable
        alike: dict[int, list[ScheduledSequence]] = {}  # by layout, which placement makes only once of each kind
        for sequence in self.sequences:
            alike.setdefault(id(sequence.layout), []).append(sequence)
            known, planned = len(sequence.tokens), sequence.planned
            if known - planned > 1:
                spare -= config.pages_for(sequence.layout, known) - config.pages_for(sequence.layout, planned)
            if sequence.rebuild is not None:
                spare -= config.held(sequence.rebuild.missing, sequence.rebuild.planned, sequence.rebuild.end, 0)
        for sequences in alike.values():
            layout = sequences[0].layout
            if all(share.lo == 0 and share.hi >= config.max_model_len for share in layout):
                spare -= config.page_set(layout, 0) * len(sequences)
                continue
            for sequence in sequences:
                spare -= config.page_set(layout, len(sequence.tokens))
        return spare

    def needed(self, sequence: ScheduledSequence, layout: Layout, node: Node | None, length: int) -> Pages:
        """Spare pages for all its known tokens, the first `length` shared with `node`, and a page set to grow."""
        config, known = self._config, len(sequence.tokens)
        whole = length - length % config.page_size
        needed = config.pages_for(layout, known, whole) + config.page_set(layout, known)
        return needed + self.tree.unused_pages(node) if self.tree is not None and node is not None else needed

    # What the tree has of them.

    @property
    def cached(self) -> Pages:
        """Pages that only the prefix tree keeps, at least."""
        return self.tree.evictable if self.tree is not None else NO_PAGES

    def match(self, sequence: ScheduledSequence) -> Match:
        """What the tree has of a sequence that waits."""
        return Match() if self.tree is None else self.tree.match(tuple(sequence.tokens), sequence.request.salt)

    def advanced(self, sequence: ScheduledSequence) -> None:
        """More of it is computed: prefixes that others wait for may be there now."""
        if self.tree is not None:
            self.tree.advance(sequence)

    def distrust(self, sequence: ScheduledSequence) -> None:
        """Nothing more of its KV enters the tree."""
        sequence.sound = False
        if self.tree is not None:
            self.tree.discard(sequence)

    def evict(self) -> bool:
        """Give up the prefix that was not used for longest. False: every one that is left is in use."""
        return self.tree is not None and self.tree.evict()

    def evict_used(self) -> bool:
        """Give up any prefix: its users keep what they share. False: none is left."""
        return self.tree is not None and self.tree.evict_used()

    def forget_prefixes(self) -> None:
        """Give up all of them."""
        if self.tree is not None:
            self.tree.clear()

    def _part_with_tree(self, sequence: ScheduledSequence) -> None:
        if self.tree is not None:
            self.tree.discard(sequence)
            self.tree.release(sequence)

    def _evicted(self, handle: int, freed: Pages) -> None:
        self.counters.evicted += 1
        self._ledger.close(handle, freed)

    def check_integrity(self) -> None:
        """Raise EngineError if handles, lengths and tree contradict each other, or what the ledger knows."""
        handles = [sequence.handle for sequence in self.sequences if sequence.handle is not None]
        nodes = self.tree.check_integrity(self.sequences) if self.tree is not None else []
        self._ledger.check_integrity([*handles, *nodes])
        for sequence in self.sequences:
            name = f"sample {sequence.sample} of request {sequence.request.id}"
            if not 0 <= sequence.computed < len(sequence.tokens) or sequence.floor > sequence.computed:
                raise EngineError(f"{name}: {sequence.floor=} {sequence.computed=} {len(sequence.tokens)=}")
            if sequence.finish_reason is not None and not sequence.in_flight:
                raise EngineError(f"{name} has ended, but keeps its KV")


def order_of(sequence: ScheduledSequence) -> Order:
    return sequence.order
