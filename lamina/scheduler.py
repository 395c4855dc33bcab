"""Who computes what in the next batch: requests in, plans out, tokens back. The owner of the truth.

The life of a plan: `plan`, then `accepted` or `refused` as the holders say; once its batch is complete `record`, or
`drop` where it failed. Several may be in flight, with disjoint sequences. Knows nothing of holders beyond how many
pages they have left, and nothing of tensors, text or time: the same calls give the same plans.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from heapq import heappop, heappush

from lamina.errors import EngineError, InvalidRequest
from lamina.ledger import Ledger
from lamina.prefix_tree import Match, Node, PrefixTree
from lamina.rebuilder import Rebuilder
from lamina.request import Kept, Outcome, Plan, PlannedRow, Request, SchedulerConfig, Sequence
from lamina.shares import NO_PAGES, Layout, Layouts, Pages
from lamina.types import FinishReason

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


class Scheduler:
    """First come, first served within a priority; everything goes by `Sequence.order`. For one thread."""

    def __init__(self, config: SchedulerConfig, layouts: Layouts) -> None:
        self.config = config
        self.counters = Counters()
        self.tree: PrefixTree | None = None
        self._layouts = layouts
        self._ledger = Ledger(config, layouts.capacity)
        self._rebuilder = Rebuilder(config, layouts, self._ledger)
        if config.prefix_cache:
            self.tree = PrefixTree(config.page_size, config.held, self._ledger.fork, self._evicted, self._queue)
        self._requests: dict[str, list[Sequence]] = {}  # unfinished ones
        self._waiting: list[tuple[Order, Sequence]] = []  # heap; a finished sequence stays until it is on top
        self._short: tuple[Sequence | None, tuple[Pages, ...]] = None, ()  # who waits for how many spare pages
        self._stranded: list[Sequence] = []  # they wait for a holder to join: those there are can never keep them
        self.promised = NO_PAGES  # pages that moves under way will still take
        self._running: list[Sequence] = []  # those with KV, by order
        self._in_flight: set[Plan] = set()
        self._batch_tokens = config.max_batch_tokens  # fewer when even a lone sequence was refused
        self._refused = False  # the last answer: nobody else is admitted on a count of pages that was wrong
        self._stalled = False  # no room can be made before a batch in flight is over
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence is unfinished, a plan in flight, or an operation not accepted yet."""
        return bool(self._requests or self._in_flight or self._ledger.operations)

    @property
    def running(self) -> int:
        """How many sequences have KV."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many unfinished sequences have none, those included that wait for a prefix or for their sibling."""
        return sum(sequence.handle is None for samples in self._requests.values() for sequence in samples)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Those with KV, by order."""
        return tuple(self._running)

    @property
    def free(self) -> Pages:
        """Pages that every holder has free, as it said last."""
        return self._ledger.free

    @property
    def cached(self) -> Pages:
        """Pages that only the prefix tree keeps, at least."""
        return self.tree.evictable if self.tree is not None else NO_PAGES

    def kept(self, sequence: Sequence) -> Pages:
        """Pages that a sequence has, those included that it shares with others."""
        return self._pages_beyond(sequence, 0)

    def longest_possible(self) -> int:
        """The most tokens of one sequence that the context and the holders' memory can ever hold."""
        if not self._layouts.capacity:  # no holder, for now
            return self.config.max_model_len
        return bisect_right(range(1, self.config.max_model_len + 1), False, key=lambda length: not self._fits(length))

    def _fits(self, length: int) -> bool:
        return any(self._holds(layout, length) for layout in self._layouts.layouts(length))

    def _holds(self, layout: Layout, length: int) -> bool:
        """Whether so many tokens could ever be kept in this layout."""
        return self._layouts.capacity.covers(self.config.pages_for(layout, length))

    def add(
        self,
        request: Request,
        known: Mapping[int, Tokens[int]] | None = None,
        kept: Mapping[int, Kept] | None = None,
    ) -> tuple[Sequence, ...]:
        """Queue all samples of a request and return them. Raises `InvalidRequest` where it can never run.

        A request that another engine began goes on with the samples in `known`, after these tokens; of those in `kept`
        the holders have KV, as far as a share's holder is there. Tell of `lost` holders afterwards.
        """
        self.validate(request)
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is in use; it must be unique among unfinished requests")
        known = dict.fromkeys(range(request.n), ()) if known is None else known
        if not known:
            raise InvalidRequest(f"request {request.id!r} has no sample that has not ended")
        samples = [Sequence(request, at, self._arrivals, [*request.prompt, *known[at]]) for at in sorted(known)]
        self._arrivals += 1
        self._requests[request.id] = samples
        kept = kept or {}
        first, *others = samples
        if not known[first.sample]:  # those that have nothing either wait for its prompt
            first.siblings = [each for each in others if not known[each.sample] and each.sample not in kept]
        for sequence in samples:
            if sequence.sample in kept:
                self._adopt(sequence, kept[sequence.sample])
            elif sequence not in first.siblings:
                self._queue(sequence)
        return tuple(samples)

    def validate(self, request: Request) -> None:
        """Raise `InvalidRequest` where a request can never run."""
        self.config.validate(len(request.prompt), request.max_tokens, self.longest_possible())
        if request.n < 1:
            raise InvalidRequest(f"n is {request.n}; allowed is 1 or more")

    def _adopt(self, sequence: Sequence, kept: Kept) -> None:
        """Whom its pages are shared with is not known, so none counts as its own."""
        there = self._layouts.capacity
        layout = tuple(share for share in kept.layout if share.holder in there)
        self._ledger.adopt(kept.handle, self.config.held(layout, 0, kept.computed, kept.floor))
        sequence.handle, sequence.layout, sequence.floor = kept.handle, kept.layout, kept.floor
        sequence.computed = sequence.planned = sequence.shared = kept.computed
        sequence.copies = kept.computed % self.config.page_size > 0
        insort(self._running, sequence, key=_order)

    def abort(self, request_id: str) -> tuple[Sequence, ...]:
        """End the unfinished samples of a request, with reason "abort", and return them: none if it has ended."""
        samples = tuple(self._requests.get(request_id, ()))
        for sequence in samples:
            self.end(sequence, "abort")
        return samples

    def end(self, sequence: Sequence, reason: FinishReason, keep: bool = True) -> None:
        """End one sample. In flight, its KV is closed when the batch is over, and a token sampled then is lost.

        Without `keep` nothing more of its KV enters the prefix tree; what batches before the one in flight brought
        there stays. That holds for a sample that has ended before, too.
        """
        if not keep:
            sequence.sound = False
            if self.tree is not None:
                self.tree.discard(sequence)
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        samples = self._requests[sequence.request.id]
        samples.remove(sequence)
        if not samples:
            del self._requests[sequence.request.id]
        for sibling in sequence.siblings:
            self._queue(sibling)
        sequence.siblings = []
        if sequence.handle is not None and not sequence.in_flight:
            self._retire(sequence)

    def plan(self, lanes: int = 1) -> Plan | None:
        """The next batch, or None where nothing can be done before a plan in flight is over.

        Decoding comes first, one token each; what is left of `max_batch_tokens` goes to prefills. Pages go strictly
        by order, so the first sequence never waits for a later one. With nothing to compute, operations that wait
        are flushed in a plan without rows. With several `lanes`, a plan takes its share of the running sequences only.
        """
        if self._stalled:
            return None
        rows = self._rows(lanes)
        if not rows and (self._in_flight or not self._ledger.operations):
            return None
        rows.sort(key=_is_prefill)
        plan = self._ledger.plan(rows)
        self._in_flight.add(plan)
        return plan

    def _rows(self, lanes: int) -> list[PlannedRow]:
        """Rows for the idle sequences by order, then for those that can be admitted."""
        rows: list[PlannedRow] = []
        idle = deque(sequence for sequence in self._running if not sequence.in_flight)
        budget = self._batch_tokens
        prefill = max(1, budget - sum(sequence.left == 1 for sequence in idle))
        short = False  # of pages for somebody
        while budget:
            younger = idle
            if idle and (lanes == 1 or len(rows) * lanes < max(lanes, len(self._running))):
                sequence = idle.popleft()
                if not self._rebuilder.ready(sequence):
                    continue
            elif prefill and not short and not (self._refused and self._running) and (admitted := self._admit()):
                # Its lane's share may be full already: were it not admitted then, nobody would be while all lanes are.
                sequence, younger = admitted, deque()
            else:
                break
            left = sequence.left
            limit = 1 if left == 1 else min(left, prefill, budget)
            if limit == 0:
                continue
            count = self._make_room(sequence, limit, younger)
            if count == 0:
                short = True
                continue
            rows.append(self._ledger.reserve(sequence, count))
            budget -= count
            prefill -= count if left > 1 else 0
        return rows

    def _make_room(self, sequence: Sequence, want: int, younger: deque[Sequence]) -> int:
        """How many of `want` tokens the pages allow, after making room: 0 if it must wait for those in flight.

        Cached prefixes go first. The youngest of the `younger` idle sequences is preempted only where not one token
        fits, and a sequence that is alone always gets one: the holders decide.
        """
        while (count := self._ledger.affordable(sequence, want)) < want:
            if self.tree is not None and self.tree.evict():
                continue
            if count:
                break
            if younger:
                self._preempt(younger.pop())
            elif len(self._running) > 1:
                break
            elif self.tree is None or not self.tree.evict_used():
                return 1
        return count

    def _admit(self) -> Sequence | None:
        """Give KV to the first waiting sequence, if it fits. Those that wait for a prefix are overtaken."""
        while self._waiting and len(self._running) < self.config.max_sequences:
            sequence = self._waiting[0][1]
            if sequence.finish_reason is not None:
                heappop(self._waiting)
                continue
            known, alternatives = self._short
            if self._running and sequence is known:
                spare = self._spare()
                if not any(spare.covers(needed) for needed in alternatives):
                    return None  # and the tree is not searched again in every step
            match = Match()
            if self.tree is not None:
                match = self.tree.match(tuple(sequence.tokens), sequence.request.salt)
                if self._worth_waiting(sequence, match):
                    self.tree.wait(sequence, match)
                    heappop(self._waiting)
                    continue
            places = self._places(sequence, match)
            if not places:
                if not self._layouts.capacity:
                    return None
                self._stranded.append(heappop(self._waiting)[1])
                continue
            spare = self._spare() if self._running else NO_PAGES
            alternatives = tuple(self._needed(sequence, layout, at.node, at.length) for layout, at in places)
            fitting = [place for place, needed in zip(places, alternatives, strict=True) if spare.covers(needed)]
            if not fitting and self._running:  # alone it fits
                self._short = sequence, alternatives
                return None
            layout, match = (fitting or places)[0]
            heappop(self._waiting)
            if self.tree is not None and sequence.preemptions == 0:
                self.counters.looked_up_tokens += len(sequence.tokens)
                self.counters.found_tokens += match.length
            self._start(sequence, layout, match.node, match.length)
            return sequence
        return None

    def _places(self, sequence: Sequence, match: Match) -> list[tuple[Layout, Match]]:
        """Where the sequence could run to its end, and what it would have of the tree there; the best first. What
        was found in the tree is taken up where it is, unless there is room only elsewhere."""
        beside = ((running.layout, len(running.tokens)) for running in self._running)
        layouts = self._layouts.layouts(sequence.longest, len(sequence.tokens), beside)
        anew = [(layout, Match()) for layout in layouts if self._holds(layout, sequence.longest)]
        if match.node is None or not self._holds(match.node.layout, sequence.longest):
            return anew
        there = {share.holder for share in match.node.layout}
        return [
            (match.node.layout, match),
            *((layout, none) for layout, none in anew if there.isdisjoint(share.holder for share in layout)),
        ]

    def _worth_waiting(self, sequence: Sequence, match: Match) -> bool:
        """Whether a prefix being computed saves a page or more, and its writer comes first anyway.

        A writer that comes later could be held up by others that must not hold up this sequence.
        """
        writer = match.pending.writer if match.pending is not None else None
        gain = match.promised - match.length
        return writer is not None and writer.order < sequence.order and gain >= self.config.page_size

    def _spare(self) -> Pages:
        """Pages left for newcomers: without what those running need for their known tokens and a page set for each."""
        config = self.config
        spare = self._ledger.room() - self.promised
        if self.tree is not None:
            spare += self.tree.evictable
        alike: dict[int, list[Sequence]] = {}  # by layout, which placement makes only once of each kind
        for sequence in self._running:
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

    def _needed(self, sequence: Sequence, layout: Layout, node: Node | None, length: int) -> Pages:
        """Spare pages for all its known tokens, the first `length` shared with `node`, and a page set to grow."""
        config, known = self.config, len(sequence.tokens)
        whole = length - length % config.page_size
        needed = config.pages_for(layout, known, whole) + config.page_set(layout, known)
        return needed + self.tree.unused_pages(node) if self.tree is not None and node is not None else needed

    def _start(self, sequence: Sequence, layout: Layout, source: Node | Sequence | None, length: int) -> None:
        """Open it in the holders, as a fork of the source's first `length` tokens where there is one."""
        if source is None or source.handle is None:
            sequence.handle = self._ledger.open(layout)
        else:
            sequence.handle = self._ledger.fork(source.handle, length)
            sequence.floor = source.floor
            sequence.copies = length % self.config.page_size > 0
        sequence.layout = layout
        sequence.computed = sequence.planned = sequence.shared = length
        if sequence.preemptions == 0:
            sequence.reused = length
        insort(self._running, sequence, key=_order)
        self.counters.admitted += 1
        self.counters.reused_tokens += length
        if self.tree is not None:
            self.tree.enter(sequence)
            node = source.node if isinstance(source, Sequence) else source
            if node is not None:
                self.tree.hold(sequence, node, length)

    def _preempt(self, sequence: Sequence) -> None:
        """Take its KV away; it waits until it fits whole, and computes what it had again."""
        sequence.preemptions += 1
        self.counters.preempted += 1
        self._close(sequence)
        self._queue(sequence)

    def _retire(self, sequence: Sequence) -> None:
        """Close a sequence that has ended and is idle; the tree keeps what others may share."""
        if self.tree is not None and sequence.sound and sequence.rebuild is None:
            self.tree.keep(sequence)
        self._close(sequence)

    def _close(self, sequence: Sequence) -> None:
        if sequence.handle is None:
            raise EngineError(f"request {sequence.request.id} was closed twice")
        if self.tree is not None:
            self.tree.discard(sequence)
            self.tree.release(sequence)
        self._ledger.close(sequence.handle, self._freed(sequence))
        del self._running[bisect_left(self._running, sequence.order, key=_order)]
        sequence.handle = sequence.rebuild = None
        sequence.layout = ()
        sequence.computed = sequence.planned = sequence.shared = sequence.floor = 0
        sequence.copies = False

    def _freed(self, sequence: Sequence) -> Pages:
        """Pages that closing it frees, at least."""
        return self._pages_beyond(sequence, sequence.shared)

    def _pages_beyond(self, sequence: Sequence, first: int) -> Pages:
        """Pages that it has of the positions from `first` on."""
        layout, rebuild = sequence.layout, sequence.rebuild
        if rebuild is None:
            return self.config.held(layout, first, sequence.computed, sequence.floor)
        whole = tuple(share for share in layout if share not in rebuild.missing)
        return self.config.held(whole, first, sequence.computed, sequence.floor) + self.config.held(
            rebuild.missing, first, rebuild.at, rebuild.at
        )

    def _queue(self, sequence: Sequence) -> None:
        heappush(self._waiting, (sequence.order, sequence))

    def _evicted(self, handle: int, freed: Pages) -> None:
        self.counters.evicted += 1
        self._ledger.close(handle, freed)

    def accepted(self, plan: Plan, free: Pages, floors: Tokens[int]) -> None:
        """Every holder has accepted. `free` is what those that were asked have left, `floors` is for each row the
        highest of all holders. A plan without rows is over with this."""
        if len(floors) != len(plan.rows):
            raise EngineError(f"{len(floors)} floors for {len(plan.rows)} rows")
        self._ledger.accepted(plan, free)
        self._batch_tokens, self._refused = self.config.max_batch_tokens, False
        for row, floor in zip(plan.rows, floors, strict=True):
            if row.rebuild:  # survivors may have let go more than those that store have
                row.sequence.floor = max(row.sequence.floor, floor)
                continue
            row.sequence.floor = floor
            row.sequence.copies = False
        if not plan.rows:
            self._land(plan)

    def refused(self, plan: Plan, free: Pages) -> tuple[Sequence, ...]:
        """A holder has refused, so that nothing changed in it; others may have accepted. Undo the plan and make room
        for the next one.

        Returns the sequences that can never go on, normally none: where one token of the only running sequence is
        refused with nothing left to give up, it has been ended, with reason "abort".
        """
        self._ledger.refused(plan, free)
        self._refused = True
        self._raise_floors(plan)
        self._undo(plan)
        if not self._running or (self.tree is not None and self.tree.evict()):
            return ()
        tokens = sum(row.count for row in plan.rows)
        youngest = next((sequence for sequence in reversed(self._running[1:]) if not sequence.in_flight), None)
        if youngest is not None:
            self._preempt(youngest)
        elif self._in_flight:
            self._stalled = True
        elif self.tree is not None and self.tree.evict_used():
            return ()
        elif tokens > 1:
            self._batch_tokens = tokens // 2
        else:
            hopeless = self._running[0]
            self.end(hopeless, "abort")
            return (hopeless,)
        return ()

    def record(self, plan: Plan, tokens: Tokens[int]) -> list[Outcome]:
        """The batch is complete. `tokens` has one sampled token for each row that samples, in row order.

        Sequences that were ended in the meantime have no outcome.
        """
        sampled = sum(row.sample for row in plan.rows)
        if len(tokens) != sampled:
            raise EngineError(f"{len(tokens)} tokens for {sampled} rows that sample")
        if self._ledger.awaits(plan):
            raise EngineError("a plan was recorded before it was accepted")
        self._land(plan)
        outcomes = []
        drawn = iter(tokens)
        for row in plan.rows:
            sequence = row.sequence
            if row.rebuild:
                self._rebuilt(sequence, row.count)
                continue
            sequence.computed = sequence.planned
            token = next(drawn) if row.sample else None
            if sequence.pending is not None and self.tree is not None:
                self.tree.advance(sequence)
            if sequence.finish_reason is not None:
                self._retire(sequence)
                continue
            if sequence.siblings and sequence.computed >= len(sequence.request.prompt):
                self._start_siblings(sequence)
            if token is not None:
                sequence.tokens.append(token)
                reason = _finish_reason(sequence, token)
                outcomes.append(Outcome(sequence, token, reason))
                if reason is not None:
                    self.end(sequence, reason)
        return outcomes

    def _rebuilt(self, sequence: Sequence, count: int) -> None:
        rebuild = sequence.rebuild
        if rebuild is None:
            raise EngineError(f"request {sequence.request.id} was rebuilt without need")
        self.counters.rebuilt_tokens += count
        rebuild.at = rebuild.planned
        if rebuild.at >= rebuild.end:
            sequence.rebuild = None
        if sequence.finish_reason is not None:
            self._retire(sequence)

    def drop(self, plan: Plan) -> None:
        """The batch failed. Nothing of it counts; its rows will be planned again."""
        if self._ledger.forget(plan):
            self._raise_floors(plan)
        self._undo(plan)

    def recompute(self) -> None:
        """The holders may have lost KV: compute all of it again. Nothing may be in flight."""
        self._require_idle()
        for sequence in self._running.copy():
            self._close(sequence)
            self._queue(sequence)
        self.forget_prefixes()

    # Holders come and go.

    def room(self) -> Pages:
        """Pages that every holder has left, at least, once all it was told is done."""
        return self._ledger.room()

    def kept_by(self, holder: int) -> list[Sequence]:
        """The sequences of which a holder keeps a share."""
        return [s for s in self._running if any(share.holder == holder for share in s.layout)]

    def plan_operations(self) -> Plan | None:
        """A plan of the operations that wait, without rows; None where none does."""
        if not self._ledger.operations:
            return None
        plan = self._ledger.plan([])
        self._in_flight.add(plan)
        return plan

    def forget_prefixes(self) -> None:
        """Give up all cached prefixes."""
        if self.tree is not None:
            self.tree.clear()

    def preempt(self, sequence: Sequence) -> None:
        """Take an idle sequence's KV away; it waits until it fits whole, and computes what it had again."""
        self._preempt(sequence)

    @property
    def stranded(self) -> tuple[Sequence, ...]:
        """Those that wait for a holder to join, since those there are can never keep them."""
        return tuple(sequence for sequence in self._stranded if sequence.finish_reason is None)

    def movable(self, sequence: Sequence) -> bool:
        """Whether its KV is whole, and all that is to be done about it has been said to the holders."""
        handle = sequence.handle
        return handle is not None and sequence.rebuild is None and not self._ledger.concerns(handle)

    def moved(self, sequence: Sequence, layout: Layout) -> None:
        """The KV of a movable, idle sequence is now kept in this layout; what changed shares no pages any more."""
        if self.tree is not None:
            self.tree.discard(sequence)
            self.tree.release(sequence)
        fresh = tuple(share for share in layout if share not in sequence.layout)
        self._ledger.took(self.config.held(fresh, 0, sequence.computed, sequence.floor))
        if len(fresh) == len(layout):
            sequence.shared, sequence.copies = 0, False
        sequence.layout = layout

    def number_handles_from(self, last: int) -> None:
        """No handle up to this one is given to a sequence that comes."""
        self._ledger.number_from(last)

    def told(self, free: Pages) -> None:
        """Holders that were asked something else than a plan have so many pages free."""
        self._ledger.told(free)

    def left(self, holder: int) -> None:
        """A holder that keeps nothing any more is gone."""
        self._ledger.left(holder)

    def joined(self, holder: int, pages: int) -> None:
        """There is one holder more, which the layouts know already."""
        self._ledger.joined(holder, pages)
        self._stalled = False
        self._short = None, ()
        for sequence in self._stranded:
            self._queue(sequence)
        self._stranded.clear()

    def emptied(self, holder: int, pages: int) -> int:
        """A holder has lost all that it kept, and has all its pages free: what concerns it is computed again, from the
        start. Nothing may be in flight. Returns how many tokens that is."""
        self._require_idle()
        self.forget_prefixes()
        whole = 0
        for sequence in self.kept_by(holder):
            whole += sequence.computed
            self._close(sequence)
            self._queue(sequence)
        self._ledger.told(Pages({holder: pages}))
        return whole

    def lost(self, holder: int) -> tuple[int, int]:
        """A holder is gone, and the layouts know it. What it had is opened elsewhere, to be computed again.

        Nothing may be in flight. Returns how many tokens will be computed again for it, and how many tokens had those
        sequences that cannot be rebuilt in part: they wait, and are computed again from their start.
        """
        self._require_idle()
        self._ledger.left(holder)
        self.forget_prefixes()
        self._short = None, ()
        spare = self._spare()
        begun: list[Sequence] = []
        rebuilt = whole = 0
        for sequence in self._running.copy():
            if all(share.holder != holder for share in sequence.layout):
                continue
            taken = self._rebuilder.begin(sequence, holder, spare, begun)
            if taken is None:
                whole += sequence.computed
                self._close(sequence)
                self._queue(sequence)
                continue
            begun.append(sequence)
            spare -= taken
            if sequence.rebuild is not None:
                rebuilt += sequence.rebuild.end - max(sequence.rebuild.at, sequence.rebuild.length)
        return rebuilt, whole

    def _require_idle(self) -> None:
        if self._in_flight:
            raise EngineError(f"KV cannot be given up with {len(self._in_flight)} plans in flight")

    def _start_siblings(self, first: Sequence) -> None:
        """Fork the other samples off the first, whose prompt is computed; those without room wait like anyone."""
        length = len(first.request.prompt) - 1
        for sibling in first.siblings:
            turn = not self._waiting or sibling.order < self._waiting[0][0]
            place = len(self._running) < self.config.max_sequences
            room = self._spare().covers(self._needed(sibling, first.layout, None, length))
            if sibling.finish_reason is None and length > 0 and turn and place and room:
                self._start(sibling, first.layout, first, length)
                first.shared = max(first.shared, length)
                first.copies = first.copies or sibling.copies
            else:
                self._queue(sibling)
        first.siblings = []

    def _raise_floors(self, plan: Plan) -> None:
        """A holder may have accepted the plan without our knowing: then windows have moved up to its rows."""
        for row in plan.rows:
            if not row.rebuild:
                row.sequence.floor = row.start

    def _land(self, plan: Plan) -> None:
        if plan not in self._in_flight:
            raise EngineError("a plan came back that is not in flight")
        self._in_flight.remove(plan)
        self._stalled = False

    def _undo(self, plan: Plan) -> None:
        self._land(plan)
        for row in plan.rows:
            row.sequence.planned = row.sequence.computed
            if row.sequence.rebuild is not None:
                row.sequence.rebuild.planned = row.sequence.rebuild.at
            if row.sequence.finish_reason is not None:
                self._retire(row.sequence)

    def check_integrity(self) -> None:
        """Raise `EngineError` if handles, lengths, tree, queues and pending operations contradict each other."""
        handles = [sequence.handle for sequence in self._running if sequence.handle is not None]
        nodes = self.tree.check_integrity(self._running) if self.tree is not None else []
        self._ledger.check_integrity([*handles, *nodes])
        flying = {row.sequence: row.start + row.count for plan in self._in_flight for row in plan.rows}
        for sequence in self._running:
            name = f"sample {sequence.sample} of request {sequence.request.id}"
            planned = sequence.planned if sequence.rebuild is None else sequence.rebuild.planned
            if planned != flying.pop(sequence, sequence.next):
                raise EngineError(f"{name} has {sequence.planned} tokens planned, which no plan in flight says")
            if not 0 <= sequence.computed < len(sequence.tokens) or sequence.floor > sequence.computed:
                raise EngineError(f"{name}: {sequence.floor=} {sequence.computed=} {len(sequence.tokens)=}")
            if sequence.finish_reason is not None and not sequence.in_flight:
                raise EngineError(f"{name} has ended, but keeps its KV")
        if flying:
            raise EngineError("a plan in flight has a sequence that is not running")
        for _, sequence in self._waiting:
            if sequence.handle is not None or sequence.computed or sequence.pending or sequence.node:
                raise EngineError(f"sample {sequence.sample} of request {sequence.request.id} waits, but has KV")


def _order(sequence: Sequence) -> Order:
    return sequence.order


def _is_prefill(row: PlannedRow) -> bool:
    return row.count > 1


def _finish_reason(sequence: Sequence, token: int) -> FinishReason | None:
    """Why `sequence` ends with `token`, its last."""
    request = sequence.request
    generated = len(sequence.tokens) - len(request.prompt)
    if token in request.stop_token_ids and generated > request.min_tokens:
        return "stop"
    return "length" if generated >= request.max_tokens else None
