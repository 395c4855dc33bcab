"""Who computes what in the next batch: requests in, plans out, tokens back. The owner of the truth.

The life of a plan: `plan`, then `accepted` or `refused` as the holders say; once its batch is complete `record`, or
`drop` where it failed. Several may be in flight, with disjoint sequences. Knows nothing of holders beyond how many
pages they have left, and nothing of tensors, text or time: the same calls give the same plans.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from lamina.completions import FinishReason
from lamina.errors import EngineError, InvalidRequest
from lamina.scheduling.admission import Admission
from lamina.scheduling.kv_rebuild import KvRebuild
from lamina.scheduling.kv_shares import Layout, Layouts, Pages
from lamina.scheduling.page_ledger import PageLedger
from lamina.scheduling.request import Outcome, Plan, PlannedRow, Request, RetainedKv, ScheduledSequence, SchedulerConfig
from lamina.scheduling.running import RunningSequences


class Scheduler:
    """First come, first served within a priority; everything goes by `ScheduledSequence.order`. For one thread.

    Its parts: `PageLedger` counts pages and what the holders are told, `RunningSequences` are the sequences with KV,
    `Admission` those that wait for some, `KvRebuild` has lost KV computed again. This forms batches of them, and ends
    requests.
    """

    def __init__(self, config: SchedulerConfig, layouts: Layouts) -> None:
        self.config = config
        self._layouts = layouts
        self._ledger = PageLedger(config, layouts.capacity)
        self._residents = RunningSequences(config, self._ledger, self._wake)
        self._admission = Admission(config, layouts, self._residents)
        self._rebuilder = KvRebuild(config, layouts, self._ledger)
        self.counters = self._residents.counters
        self.tree = self._residents.tree
        self._requests: dict[str, list[ScheduledSequence]] = {}  # unfinished ones
        self._running = self._residents.sequences
        self._in_flight: set[Plan] = set()
        self._batch_tokens = config.max_batch_tokens  # fewer when even a lone sequence was refused
        self._refused = False  # the last answer: nobody else is admitted on a count of pages that was wrong
        self._stalled = False  # no room can be made before a batch in flight is over
        self._arrivals = 0

    def _wake(self, sequence: ScheduledSequence) -> None:
        self._admission.queue(sequence)

    # What there is.

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
    def sequences(self) -> tuple[ScheduledSequence, ...]:
        """Those with KV, by order."""
        return tuple(self._running)

    @property
    def stranded(self) -> tuple[ScheduledSequence, ...]:
        """Those that wait for a holder to join, since those there are can never keep them."""
        return self._admission.stranded

    @property
    def free(self) -> Pages:
        """Pages that every holder has free, as it said last."""
        return self._ledger.free

    @property
    def cached(self) -> Pages:
        """Pages that only the prefix tree keeps, at least."""
        return self._residents.cached

    def kept(self, sequence: ScheduledSequence) -> Pages:
        """Pages that a sequence has, those included that it shares with others."""
        return self._residents.pages(sequence)

    def longest_possible(self) -> int:
        """The most tokens of one sequence that the context and the holders' memory can ever hold."""
        return self._admission.longest_possible()

    # Requests.

    def add(
        self,
        request: Request,
        known: Mapping[int, Sequence[int]] | None = None,
        kept: Mapping[int, RetainedKv] | None = None,
    ) -> tuple[ScheduledSequence, ...]:
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
        samples = [
            ScheduledSequence(request, at, self._arrivals, [*request.prompt, *known[at]]) for at in sorted(known)
        ]
        self._arrivals += 1
        self._requests[request.id] = samples
        kept = kept or {}
        first, *others = samples
        if not known[first.sample]:  # those that have nothing either wait for its prompt
            first.siblings = [each for each in others if not known[each.sample] and each.sample not in kept]
        for sequence in samples:
            if sequence.sample in kept:
                self._residents.adopt(sequence, kept[sequence.sample], self._layouts.capacity)
            elif sequence not in first.siblings:
                self._admission.queue(sequence)
        return tuple(samples)

    def validate(self, request: Request) -> None:
        """Raise `InvalidRequest` where a request can never run."""
        self.config.validate(len(request.prompt), request.max_tokens, self.longest_possible())
        if request.n < 1:
            raise InvalidRequest(f"n is {request.n}; allowed is 1 or more")

    def abort(self, request_id: str) -> tuple[ScheduledSequence, ...]:
        """End the unfinished samples of a request, with reason "abort", and return them: none if it has ended."""
        samples = tuple(self._requests.get(request_id, ()))
        for sequence in samples:
            self.end(sequence, "abort")
        return samples

    def end(self, sequence: ScheduledSequence, reason: FinishReason, keep: bool = True) -> None:
        """End one sample. In flight, its KV is closed when the batch is over, and a token sampled then is lost.

        Without `keep` nothing more of its KV enters the prefix tree; what batches before the one in flight brought
        there stays. That holds for a sample that has ended before, too.
        """
        if not keep:
            self._residents.distrust(sequence)
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        samples = self._requests[sequence.request.id]
        samples.remove(sequence)
        if not samples:
            del self._requests[sequence.request.id]
        for sibling in sequence.siblings:
            self._admission.queue(sibling)
        sequence.siblings = []
        if sequence.handle is not None and not sequence.in_flight:
            self._residents.retire(sequence)

    # Plans.

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
            elif prefill and not short and (admitted := self._admit()):
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

    def _admit(self) -> ScheduledSequence | None:
        return None if self._refused and self._running else self._admission.admit()

    def _make_room(self, sequence: ScheduledSequence, want: int, younger: deque[ScheduledSequence]) -> int:
        """How many of `want` tokens the pages allow, after making room: 0 if it must wait for those in flight.

        Cached prefixes go first. The youngest of the `younger` idle sequences is preempted only where not one token
        fits, and a sequence that is alone always gets one: the holders decide.
        """
        while (count := self._ledger.affordable(sequence, want)) < want:
            if self._residents.evict():
                continue
            if count:
                break
            if younger:
                self.preempt(younger.pop())
            elif len(self._running) > 1:
                break
            elif not self._residents.evict_used():
                return 1
        return count

    def preempt(self, sequence: ScheduledSequence) -> None:
        """Take an idle sequence's KV away; it waits until it fits whole, and computes what it had again."""
        sequence.preemptions += 1
        self.counters.preempted += 1
        self._admission.give_back(sequence)

    def plan_operations(self) -> Plan | None:
        """A plan of the operations that wait, without rows; None where none does."""
        if not self._ledger.operations:
            return None
        plan = self._ledger.plan([])
        self._in_flight.add(plan)
        return plan

    def accepted(self, plan: Plan, free: Pages, floors: Sequence[int]) -> None:
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

    def refused(self, plan: Plan, free: Pages) -> tuple[ScheduledSequence, ...]:
        """A holder has refused, so that nothing changed in it; others may have accepted. Undo the plan and make room
        for the next one.

        Returns the sequences that can never go on, normally none: where one token of the only running sequence is
        refused with nothing left to give up, it has been ended, with reason "abort".
        """
        self._ledger.refused(plan, free)
        self._refused = True
        self._raise_floors(plan)
        self._undo(plan)
        if not self._running or self._residents.evict():
            return ()
        tokens = sum(row.count for row in plan.rows)
        youngest = next((sequence for sequence in reversed(self._running[1:]) if not sequence.in_flight), None)
        if youngest is not None:
            self.preempt(youngest)
        elif self._in_flight:
            self._stalled = True
        elif self._residents.evict_used():
            return ()
        elif tokens > 1:
            self._batch_tokens = tokens // 2
        else:
            hopeless = self._running[0]
            self.end(hopeless, "abort")
            return (hopeless,)
        return ()

    def record(self, plan: Plan, tokens: Sequence[int]) -> list[Outcome]:
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
                self.counters.rebuilt_tokens += row.count
                self._rebuilder.recorded(sequence)
                if sequence.finish_reason is not None:
                    self._residents.retire(sequence)
                continue
            sequence.computed = sequence.planned
            token = next(drawn) if row.sample else None
            self._residents.advanced(sequence)
            if sequence.finish_reason is not None:
                self._residents.retire(sequence)
                continue
            if sequence.siblings and sequence.computed >= len(sequence.request.prompt):
                self._admission.admit_siblings(sequence)
            if token is not None:
                sequence.tokens.append(token)
                reason = _finish_reason(sequence, token)
                outcomes.append(Outcome(sequence, token, reason))
                if reason is not None:
                    self.end(sequence, reason)
        return outcomes

    def drop(self, plan: Plan) -> None:
        """The batch failed. Nothing of it counts; its rows will be planned again."""
        if self._ledger.forget(plan):
            self._raise_floors(plan)
        self._undo(plan)

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
                self._residents.retire(row.sequence)

    # Holders come, go, and hand over what they keep.

    def promise(self, pages: Pages) -> None:
        """Moves under way will still take so many pages, in all: newcomers must leave them."""
        self._ledger.promised = pages

    def room(self) -> Pages:
        """Pages that every holder has left, at least, once all it was told is done and all that moves has moved."""
        return self._ledger.room() - self._ledger.promised

    def told(self, free: Pages) -> None:
        """Holders that were asked something else than a plan have so many pages free."""
        self._ledger.told(free)

    def took(self, pages: Pages) -> None:
        """What moves has taken so many pages; the next reply of these holders counts them too."""
        self._ledger.took(pages)

    def number_handles_from(self, last: int) -> None:
        """No handle up to this one is given to a sequence that comes."""
        self._ledger.number_from(last)

    def forget_prefixes(self) -> None:
        """Give up all cached prefixes."""
        self._residents.forget_prefixes()

    def kept_by(self, holder: int) -> list[ScheduledSequence]:
        """The sequences of which a holder keeps a share."""
        return self._residents.kept_by(holder)

    def movable(self, sequence: ScheduledSequence) -> bool:
        """Whether its KV is whole, and all that is to be done about it has been said to the holders."""
        return self._residents.movable(sequence)

    def moved(self, sequence: ScheduledSequence, layout: Layout) -> None:
        """The KV of a movable, idle sequence is now kept in this layout; what changed shares no pages any more."""
        self._residents.moved(sequence, layout)

    def joined(self, holder: int, pages: int) -> None:
        """There is one holder more, which the layouts know already."""
        self._ledger.joined(holder, pages)
        self._stalled = False
        self._admission.joined()

    def left(self, holder: int) -> None:
        """A holder that keeps nothing any more is gone."""
        self._ledger.left(holder)

    def lost(self, holder: int) -> tuple[int, int]:
        """A holder is gone, and the layouts know it. What it had is opened elsewhere, to be computed again.

        Nothing may be in flight. Returns how many tokens will be computed again for it, and how many tokens had those
        sequences that cannot be rebuilt in part: they wait, and are computed again from their start.
        """
        self._require_idle()
        self._ledger.left(holder)
        self._residents.forget_prefixes()
        self._admission.look_again()
        rebuilt, whole = self._rebuilder.lost(holder, self._residents.kept_by(holder), self._residents.spare())
        return rebuilt, self._begin_anew(whole)

    def emptied(self, holder: int, pages: int) -> int:
        """A holder has lost all that it kept, and has all its pages free: what concerns it is computed again, from the
        start. Nothing may be in flight. Returns how many tokens that is."""
        self._require_idle()
        self._residents.forget_prefixes()
        whole = self._begin_anew(self._residents.kept_by(holder))
        self._ledger.told(Pages({holder: pages}))
        return whole

    def recompute(self) -> None:
        """The holders may have lost KV: compute all of it again. Nothing may be in flight."""
        self._require_idle()
        self._begin_anew(self.sequences)
        self._residents.forget_prefixes()

    def _require_idle(self) -> None:
        if self._in_flight:
            raise EngineError(f"KV cannot be given up with {len(self._in_flight)} plans in flight")

    def _begin_anew(self, sequences: Iterable[ScheduledSequence]) -> int:
        """Take their KV away. Returns how many tokens had some."""
        tokens = 0
        for sequence in sequences:
            tokens += sequence.computed
            self._admission.give_back(sequence)
        return tokens

    def check_integrity(self) -> None:
        """Raise `EngineError` if handles, lengths, tree, queues and pending operations contradict each other."""
        self._residents.check_integrity()
        self._admission.check_integrity()
        flying = {row.sequence: row.start + row.count for plan in self._in_flight for row in plan.rows}
        for sequence in self._running:
            planned = sequence.planned if sequence.rebuild is None else sequence.rebuild.planned
            if planned != flying.pop(sequence, sequence.next):
                name = f"sample {sequence.sample} of request {sequence.request.id}"
                raise EngineError(f"{name} has {sequence.planned} tokens planned, which no plan in flight says")
        if flying:
            raise EngineError("a plan in flight has a sequence that is not running")


def _is_prefill(row: PlannedRow) -> bool:
    return row.count > 1


def _finish_reason(sequence: ScheduledSequence, token: int) -> FinishReason | None:
    """Why `sequence` ends with `token`, its last."""
    request = sequence.request
    generated = len(sequence.tokens) - len(request.prompt)
    if token in request.stop_token_ids and generated > request.min_tokens:
        return "stop"
    return "length" if generated >= request.max_tokens else None
