"""Which sequences are computed in the next batch: requests in, plans out, tokens back.

The life of a plan: `plan`, then `accepted` or `refused` as the holders answer; once its batch is complete `record`, or
`drop` where it failed. Several plans may be in flight, with disjoint sequences. The same calls give the same plans.
`RowPlanner` says which rows a plan has, and what gives up its pages for them.

A token is a function of its logits, of the seed and of its position (`sampler.py`). So a draft is right where it equals
the token that is sampled at its position, and the text is the same, token for token, as without drafts. A draft that
does not depend on the random number is accepted with the probability that the model gives it, as in rejection sampling.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import chain, islice, zip_longest

from lamina.completions import FinishReason
from lamina.errors import EngineError, InvalidRequest
from lamina.kv.kv_rebuild import KvRebuild
from lamina.kv.kv_shares import Pages, Place
from lamina.kv.local_copies import LocalCopies
from lamina.kv.page_ledger import PageLedger
from lamina.kv.placement import Placement
from lamina.kv.relocation import Growth
from lamina.kv.request import (
    FrameRoom,
    Outcome,
    Plan,
    PlannedRow,
    Request,
    RetainedKv,
    ScheduledSequence,
    SchedulerConfig,
    check_length,
)
from lamina.kv.running import RunningSequences
from lamina.scheduling.admission import Admission, FairShare
from lamina.scheduling.blame import Blame, Refusals
from lamina.scheduling.speculation import left_to_draft


class Scheduler:
    """First come, first served within a priority and tenant: everything goes by `ScheduledSequence.order`. Tenants get
    equal shares of KV and of batches (`fair_share`). For one thread.

    `ledger` counts pages, `running` has the sequences with KV, `admission` the queues for KV, `copies` says which rows
    read local copies, `growth` where sequences grow, `blame` has those whose batches failed, `refusals` the holders
    that refuse without reason.
    """

    def __init__(self, config: SchedulerConfig, placement: Placement) -> None:
        self.config = config
        self.ledger = PageLedger(config, placement)
        self.running = RunningSequences(config, placement, self.ledger, lambda sequence: self.admission.queue(sequence))
        self.admission = Admission(config, placement, self.running)
        self.counters = self.running.counters
        self._placement = placement
        self.blame = Blame()
        self.refusals = Refusals()
        self.rebuilds = KvRebuild(config, placement, self.running.runs, self.running.spares)
        self.fair_share = FairShare()
        self._requests: dict[str, list[ScheduledSequence]] = {}  # unfinished ones
        self._in_flight: set[Plan] = set()
        self.copies = LocalCopies(config, placement, self.ledger, self.running, self._in_flight)
        self.growth = Growth(config, placement, self.ledger, self.running)
        self._planner = RowPlanner(self)
        self._batch_tokens = config.max_batch_tokens  # fewer when even a lone sequence was refused
        self._refused = False  # the last plan: the count of pages was wrong, so nothing is admitted by it
        self._stalled = False  # no room can be made before a batch in flight is over
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence is unfinished, or a plan is in flight."""
        return bool(self._requests or self._in_flight)

    @property
    def foremost(self) -> ScheduledSequence | None:
        """The first unfinished sequence by order, of those with KV where there are any: others wait for its pages."""
        candidates = self.running.sequences or chain.from_iterable(self._requests.values())
        return min(candidates, key=lambda sequence: sequence.order, default=None)

    @property
    def waiting(self) -> int:
        """How many unfinished sequences have no KV, those included that wait for a prefix or for a sibling."""
        return sum(sequence.handle is None for samples in self._requests.values() for sequence in samples)

    # Requests.

    def add(
        self,
        request: Request,
        known: Mapping[int, Sequence[int]] | None = None,
        kept: Mapping[int, RetainedKv] | None = None,
    ) -> tuple[ScheduledSequence, ...]:
        """Queue all samples of a request and return them. Raises `InvalidRequest` where it can never run.
        A request of the previous engine goes on with the samples in `known`, after these tokens. Of the samples in
        `kept` the holders have KV, where a share's holder is there. Call `lost` for missing holders afterwards."""
        self.validate(request, taken=known is not None)
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is in use; it must be unique among unfinished requests")
        generated = dict.fromkeys(range(request.n), ()) if known is None else known
        if not generated:
            raise InvalidRequest(f"request {request.id!r} has no sample that has not ended")
        samples = [
            ScheduledSequence(request, sample, self._arrivals, [*request.prompt, *generated[sample]])
            for sample in sorted(generated)
        ]
        self._arrivals += 1
        self._requests[request.id] = samples
        retained = kept or {}
        first, *others = samples
        first.scored = None if any(generated.values()) else request.scored_from
        if not generated[first.sample]:  # other samples without tokens wait for its prompt
            first.siblings = [other for other in others if not generated[other.sample] and other.sample not in retained]
        for sequence in samples:
            if sequence.sample in retained:
                self.running.adopt(sequence, retained[sequence.sample], self._placement.capacity)
            elif sequence not in first.siblings:
                self.admission.queue(sequence)
        return tuple(samples)

    def validate(self, request: Request, taken: bool = False) -> None:
        """Raise `InvalidRequest`, or PolicyError, where it can never run. One that was `taken` waits for room again."""
        context, possible = self.config.max_model_len, self.admission.most_hoped(request.policy)
        check_length(len(request.prompt), request.max_tokens, context, context if taken else possible)
        if request.n < 1:
            raise InvalidRequest(f"n is {request.n}; allowed is 1 or more")
        if request.pooled and not self.config.pools:
            raise InvalidRequest("a converted model gives no embeddings; allowed are models that run natively")

    def abort(self, request_id: str) -> tuple[ScheduledSequence, ...]:
        """End the unfinished samples of a request, with reason "abort", and return them: none if it has ended."""
        samples = tuple(self._requests.get(request_id, ()))
        for sequence in samples:
            self.end(sequence, "abort")
        return samples

    def end(self, sequence: ScheduledSequence, reason: FinishReason, keep: bool = True) -> None:
        """End one sample. The KV of one in flight is closed when its batch is over, and a token sampled then is lost.
        Without `keep` nothing more of its KV enters the prefix cache, even if the sample has ended before. What earlier
        batches entered stays."""
        if not keep:
            sequence.sound = False
            self.running.prefix_cache.discard(sequence)
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        self.admission.forget(sequence)
        self.blame.forget(sequence)
        self.refusals.forget(sequence)
        samples = self._requests[sequence.request.id]
        samples.remove(sequence)
        if not samples:
            del self._requests[sequence.request.id]
        for sibling in sequence.siblings:
            self.admission.queue(sibling)
        sequence.siblings = []
        if sequence.handle is not None and not sequence.in_flight:
            self.running.retire(sequence)

    # Plans.

    def decoding(self, lanes: int = 1) -> list[ScheduledSequence]:
        """The sequences that decode in the next plan, about: where tenants share, some may not. Their `drafts` may be
        set now: policies that choose allow none."""
        idle = [sequence for sequence in self.running if sequence.decodes and sequence.idle]
        count = max(1, -(-len(self.running) // lanes))
        return [decoding for decoding in idle[:count] if not self.config.policy(decoding.request.policy).chooses]

    def plan(self, lanes: int = 1) -> Plan | None:
        """The next batch, or None where nothing can be done before a plan in flight is over.

        Decoding comes first, one token each; what is left of `max_batch_tokens` goes to prefills. Pages are given by
        order, so the first sequence never waits for a later one. With several `lanes` a plan takes only its share of
        the running sequences.
        """
        if self._stalled or (self.blame and any(self.blame.on_trial(plan.rows) for plan in self._in_flight)):
            return None
        rows = self._rows(lanes)
        if not rows:
            return None
        self.copies.fit(rows, opens=not self._refused)
        rows.sort(key=lambda row: (row.known > 1, bool(row.drafts)))  # decode first
        plan = self.ledger.plan(rows)
        self._in_flight.add(plan)
        return plan

    def _rows(self, lanes: int) -> list[PlannedRow]:
        """Rows of suspects that are tried where they failed, with nothing else in flight, else of all others."""
        for suspects in self._planner.trials():
            if self._in_flight:
                return []
            if rows := self._planner.trial_rows(suspects, self._batch_tokens):
                return rows
        admits = not (self._refused and self.running.sequences)
        return self._planner.rows(lanes, self._batch_tokens, admits)

    def accepted(self, plan: Plan, free: Pages, floors: Sequence[int]) -> None:
        """Every holder has accepted. They have `free` pages left; `floors` has for each row the highest of theirs."""
        if len(floors) != len(plan.rows):
            raise EngineError(f"{len(floors)} floors for {len(plan.rows)} rows")
        self.ledger.answered(plan, free)
        self._batch_tokens, self._refused = self.config.max_batch_tokens, False
        for row, floor in zip(plan.rows, floors, strict=True):
            # Floors only rise: holders that do not store may have a higher one, and a holder that got a part by a move
            # does not know what was let go before.
            self.running.raise_floor(row, floor)
            if not row.rebuild:
                row.sequence.stored = row.start + row.count
                row.sequence.keeps_inputs |= bool(row.drafts and self.config.states)
            if row.sequence.copies and not row.rebuild:
                self.running.rewritten(row.sequence, row.start)

    def refused(self, plan: Plan, free: Pages, refusers: Set[Place]) -> tuple[ScheduledSequence, ...]:
        """The holders of these pools have refused, and nothing changed in them; others may have accepted. Undo the plan
        and make room for the next one there. There are none where no refusal is believed.

        Returns the sequences that can never go on, normally none: where one token of the only sequence at a refuser is
        refused and nothing is left to evict, that sequence has ended, as aborted."""
        self.ledger.answered(plan, free)
        self._raise_floors(plan)
        self._undo(plan)
        if not refusers:
            return ()
        self._refused = True
        running, prefix_cache = self.running, self.running.prefix_cache
        if not running.sequences or self.copies.give_back(refusers) or running.evict(refusers):
            return ()
        if self.copies.in_use(refusers):
            self._stalled = True
            return ()
        refused_sequences = {
            row.sequence for row in plan.rows if any(share.at in refusers for share in row.sequence.layout)
        }
        candidates = [
            candidate
            for candidate in running
            if candidate in refused_sequences or running.keeps_at(candidate, refusers)
        ] or running.sequences
        youngest = next((sequence for sequence in reversed(candidates[1:]) if not sequence.in_flight), None)
        if youngest is not None:
            self.admission.preempt(youngest)
        elif self._in_flight:
            self._stalled = True
        elif prefix_cache.evict_used(refusers):
            return ()
        elif (tokens := sum(row.count for row in plan.rows)) > 1:
            self._batch_tokens = tokens // 2
        else:
            hopeless = candidates[0]
            self.end(hopeless, "abort")
            return (hopeless,)
        return ()

    def torn(self, plan: Plan, free: Pages, floors: Sequence[int], starts: Sequence[int]) -> None:
        """Holders lack KV that rows of the plan need; others may have accepted. Undo it, and have that computed again.

        `starts` has for each row where it can start at most, 0 where it must begin anew; `floors` the highest floor of
        the holders that accepted. Cached prefixes are given up, since they may lack the same."""
        self.ledger.answered(plan, free)
        for row, floor in zip(plan.rows, floors, strict=True):
            self.running.raise_floor(row, floor)
        self._undo(plan)
        self.running.prefix_cache.clear()
        for row, start in zip(plan.rows, starts, strict=True):
            self.running.drop_local_copy(row.sequence)
            if start == row.start or row.sequence.handle is None:
                continue
            if start < max(1, row.sequence.floor):
                self.admission.give_back(row.sequence)
            else:
                self.running.cut(row.sequence, start)

    def record(self, plan: Plan, sampled: Sequence[int | None]) -> list[Outcome]:
        """The batch is complete. `sampled` has the tokens that were sampled, `row.samples` of each row, in row order;
        None where the logits allow none. Drafts are accepted while they are what was sampled: a sequence has one
        outcome more than accepted drafts, and none where it was ended meanwhile, or its row is tried again."""
        if len(sampled) != (due := sum(row.samples for row in plan.rows)):
            raise EngineError(f"{len(sampled)} tokens, but the plan samples {due}")
        if self.ledger.awaits(plan):
            raise EngineError("a plan was recorded before it was accepted")
        self._land(plan)
        outcomes: list[Outcome] = []
        drawn = iter(sampled)
        for row in plan.rows:
            sequence = row.sequence
            self.blame.passed(row)
            self.refusals.passed(row)
            if row.rebuild:
                self.counters.rebuilt_tokens += row.count
                self.rebuilds.recorded(sequence)
                if sequence.rebuild is None:
                    self.running.drop_local_copy(sequence)
                if sequence.finish_reason is not None:
                    self.running.retire(sequence)
                continue
            sequence.computed = sequence.planned = row.start + row.known
            sequence.records = sequence.records[1], row.start if row.drafts else sequence.computed
            sequence.scored = row.scored.stop if row.scored else sequence.scored
            of_row = list(islice(drawn, row.samples))
            if row.drafts and of_row[0] is None:  # a draft may have spoilt the row: it is tried again alone, without
                sequence.computed = sequence.planned = row.start
                if sequence.finish_reason is None:
                    self.blame.suspect(sequence, 1, row.start, row.start + row.known)
                of_row.clear()
            self.running.prefix_cache.advance(sequence)
            if sequence.finish_reason is not None:
                self.running.retire(sequence)
                continue
            if sequence.siblings and sequence.computed >= len(sequence.request.prompt):
                self.admission.admit_siblings(sequence)
            if row.sample:
                self.running.drop_local_copy(sequence)
                tokens = verified(row.drafts, of_row) if sequence.request.max_tokens else [None]
                outcomes += self._sampled(sequence, tokens)
        return outcomes

    def _sampled(self, sequence: ScheduledSequence, tokens: Sequence[int | None]) -> Iterator[Outcome]:
        """Add a row's tokens, of which all but the last have KV, up to the one that ends the sequence."""
        sequence.drafts = ()
        for token in tokens:
            if token is not None:
                sequence.tokens.append(token)
            sequence.computed = sequence.planned = len(sequence.tokens) - 1
            reason = sequence.ends_with(token)
            if reason is not None:
                self.end(sequence, reason)
            yield Outcome(sequence, token, reason)
            if reason is not None:
                return

    def drop(self, plan: Plan) -> None:
        """The batch failed. Nothing of it counts; its rows are planned again."""
        if self.ledger.forget(plan):
            self._raise_floors(plan)
        self._undo(plan)

    def _raise_floors(self, plan: Plan) -> None:
        """A holder may have accepted the plan, unknown to us: then its windows have moved up to the rows."""
        for row in plan.rows:
            if not row.rebuild and not self.config.unbounded(row.sequence.request.policy):
                self.running.raise_floor(row, row.start)

    def _land(self, plan: Plan) -> None:
        if plan not in self._in_flight:
            raise EngineError("a plan came back that is not in flight")
        self._in_flight.remove(plan)
        self._stalled = False

    def _undo(self, plan: Plan) -> None:
        self._land(plan)
        for row in plan.rows:
            row.sequence.planned, row.sequence.copied = row.sequence.computed, row.start
            row.sequence.stored = 0  # it may have been cut
            row.sequence.records = (row.sequence.records[1],) * 2
            if row.sequence.rebuild is not None:
                row.sequence.rebuild.planned = row.sequence.rebuild.at
            if row.sequence.finish_reason is not None:
                self.running.retire(row.sequence)

    # Holders join and leave.

    def joined(self, pages: Pages) -> None:
        """A holder with these pages has joined, which the placement knows already."""
        self.ledger.joined(pages)
        self._stalled = False
        self.admission.joined()

    def lost(self, holder: int) -> tuple[int, int, int]:
        """A holder was lost, as the placement knows. Spares take its KV over, or it is opened elsewhere and computed
        again.

        Nothing may be in flight. Returns how many tokens will be computed again for it; how many tokens had those
        sequences that cannot be rebuilt in part, which wait and begin anew; and how many need not: spares had them.
        """
        self._require_idle()
        self.ledger.left(holder)
        holder_sequences, free = self.running.kept_by({holder}), self.ledger.unpromised()
        spared = self.rebuilds.take_over(holder, holder_sequences, self.running.prefix_cache, free)
        self.admission.look_again()
        rebuilt, hopeless = self.rebuilds.lost(holder, holder_sequences, self.running.headroom())
        return rebuilt, self._begin_anew(hopeless), spared

    def emptied(self, holder: int, pages: Pages) -> int:
        """A holder has lost all that it kept, and has all these pages free: what concerns it is computed again, from
        the start. Nothing may be in flight. Returns how many tokens that is."""
        self._require_idle()
        self.running.prefix_cache.clear()
        for sequence in self.running:
            sequence.local_copy = tuple(part for part in sequence.local_copy if part.share.holder != holder)
            self.running.drop_local_copy(sequence)
        tokens = self._begin_anew(self.running.kept_by({holder}))
        self.ledger.update_free(pages)
        return tokens

    def _require_idle(self) -> None:
        if self._in_flight:
            raise EngineError(f"KV cannot be given up with {len(self._in_flight)} plans in flight")

    def _begin_anew(self, sequences: Sequence[ScheduledSequence]) -> int:
        """Take their KV away. Returns how many tokens had KV."""
        tokens = sum(sequence.computed for sequence in sequences)
        for sequence in sequences:
            self.admission.give_back(sequence)
        return tokens

    def check_integrity(self) -> None:
        """Raise `EngineError` if handles, lengths, tree, queues and pending operations contradict each other."""
        self.running.check_integrity()
        self.admission.check_integrity()
        flying = {row.sequence: row.start + row.count for plan in self._in_flight for row in plan.rows}
        for sequence in self.running:
            planned = sequence.planned if sequence.rebuild is None else sequence.rebuild.planned
            if planned != flying.pop(sequence, sequence.next):
                name = f"sample {sequence.sample} of request {sequence.request.id}"
                raise EngineError(f"{name} has {sequence.planned} tokens planned, which no plan in flight says")
        if flying:
            raise EngineError("a plan in flight has a sequence that is not running")


class RowPlanner:
    """Forms batches of the running sequences and of those that `admission` gives KV, by the parts of a scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._ledger = scheduler.ledger
        self._running = scheduler.running
        self._admission = scheduler.admission
        self._rebuilds = scheduler.rebuilds
        self._blame = scheduler.blame
        self._fair_share = scheduler.fair_share
        self._config = scheduler.config
        self._max_rows = scheduler.config.max_sequences
        self._copies = scheduler.copies
        self._growth = scheduler.growth
        self._turn = 0  # the number of the present plan

    def rows(self, lanes: int, budget: int, admits: bool) -> list[PlannedRow]:
        """Rows for the idle sequences by order, then for new ones where it `admits` any: `budget` tokens at most, of
        which each tenant gets its share.

        A sequence that decodes has one token, any other as many as its tenant's prompts may still have. Sequences are
        admitted until one gets no pages."""
        rows: list[PlannedRow] = []
        if admits:
            self._admission.reclaim()
        idle = deque(sequence for sequence in self._running if sequence.idle)
        present = [s for s in idle if self._rebuilds.ready(s) and self._blame.in_company(s, 1)]
        decodes, prompt_tokens, tenant_rows = self._dealt(present, budget)
        goes_on = {sequence for sequence in present if sequence.left > 1} | decodes
        admits_more, room = admits, FrameRoom(self._config)
        self._turn += 1
        while budget and len(rows) < self._max_rows:
            if idle and (lanes == 1 or len(rows) * lanes < max(lanes, len(self._running))):
                sequence, younger = idle.popleft(), idle
                if sequence not in goes_on:
                    continue
            elif admits_more and (admitted := self._admission.admit(+prompt_tokens & +tenant_rows)):
                # Even where its lane's share is full: otherwise none would be admitted while every lane is.
                sequence, younger = admitted, deque()
            else:
                break
            length, tenant = sequence.left, sequence.request.tenant
            limit = 1 if length == 1 else self._config.chunk(sequence, min(length, prompt_tokens[tenant], budget))
            limit = self._blame.in_company(sequence, limit)
            if sequence.held and sequence.rebuild is None:
                limit = min(limit, length - 1)
            if limit == 0 or tenant_rows[tenant] == 0:
                continue
            if not (limit := room.limit(sequence.layout, limit)):
                break
            count = self._make_room(sequence, limit, younger)
            if count == 0:
                admits_more = False
                continue
            rows.append(self._ledger.reserve(sequence, count))
            room.take(sequence.layout, count)
            sequence.turn = self._turn
            budget -= count
            tenant_rows[tenant] -= 1
            if length > 1 or younger is not idle:
                prompt_tokens[tenant] -= count
        self._speculate(rows, budget, prompt_tokens, room)
        return rows

    def _speculate(self, rows: list[PlannedRow], budget: int, left: Counter[str], frames: FrameRoom) -> None:
        """Let the rows that decode have their drafts: `budget` tokens at most, what is `left` of each tenant's share
        and of the frames, and no page that a sequence may need."""
        room: Pages | None = None
        for index, row in enumerate(rows):
            sequence, tenant = row.sequence, row.sequence.request.tenant
            drafts, sequence.drafts = sequence.drafts, ()
            if not drafts or not row.decodes or sequence.local_copy:
                continue
            count = min(len(drafts), self._config.max_drafts, budget, left[tenant], left_to_draft(sequence))
            count = self._blame.in_company(sequence, self._config.chunk(sequence, 1 + count)) - 1
            count = frames.further(sequence.layout, count)
            while count > 0 and (cost := self._ledger.further(row, count)):
                if room is None:
                    room = self._running.headroom() - self._running.giving_way
                if room.covers(cost):
                    room -= cost
                    break
                count -= 1
            if count > 0:
                rows[index] = self._ledger.speculate(row, drafts[:count])
                frames.extend(sequence.layout, count)
                budget -= count
                left[tenant] -= count

    def _dealt(
        self, idle: Sequence[ScheduledSequence], budget: int
    ) -> tuple[set[ScheduledSequence], Counter[str], Counter[str]]:
        """The sequences that may decode, and for each tenant how many tokens of prompts it may have beside them and
        how many rows.

        Of a tenant that gets less than it wants, those decode that have waited longest, one at least, and half of what
        it gets goes to its prompts. The oldest sequence always decodes: it may be the only one for which there is room.
        """
        demand, drafts = Counter(self._admission.wanted()), Counter[str]()
        decoding = defaultdict[str, list[ScheduledSequence]](list)
        for sequence in idle:
            tenant = sequence.request.tenant
            demand[tenant] += sequence.left
            if sequence.left == 1:
                decoding[tenant].append(sequence)
                drafts[tenant] += len(sequence.drafts)
        dealt = self._fair_share.deal(demand + drafts, budget)
        decodes, prompt_tokens, tenant_rows = set(idle[:1]), Counter[str](), Counter[str]()
        for tenant, wants in demand.items():
            rows, tokens, row_limit = decoding[tenant], budget, self._max_rows
            if dealt is not None:
                rows.sort(key=lambda sequence: sequence.turn)
                tokens, row_limit = dealt[tenant], max(1, row_limit // len(dealt))
                del rows[min(row_limit, max(1, tokens - (wants - len(rows)), tokens // 2)) :]
            decodes.update(rows)
            prompt_tokens[tenant], tenant_rows[tenant] = max(1, tokens - len(rows)), row_limit
        return decodes, prompt_tokens, tenant_rows

    def trials(self) -> list[list[ScheduledSequence]]:
        """The suspects that are to be tried next, with nothing else under way; where these have no room, the oldest
        one. Empty where none is where it failed."""
        waiting = (sequence for sequence in self._running if sequence.idle and not sequence.held) if self._blame else ()
        idle = [sequence for sequence in waiting if self._rebuilds.ready(sequence)]
        return [trial for trial in (self._blame.next_trial(idle), self._blame.due(idle)[:1]) if trial]

    def trial_rows(self, suspects: list[ScheduledSequence], budget: int) -> list[PlannedRow]:
        """Rows for these suspects alone, as far as there is room. A younger sequence gives its pages up, even where it
        is to be tried with them: it stays a suspect."""
        rows, room = list[PlannedRow](), FrameRoom(self._config)
        for sequence in suspects:
            if sequence.handle is None:
                continue
            younger = deque(s for s in self._running if s.order > sequence.order)
            want = self._config.chunk(sequence, min(sequence.left, budget))
            want = room.limit(sequence.layout, want)
            count = self._make_room(sequence, want, younger) if want else 0
            if count:
                rows.append(self._ledger.reserve(sequence, count))
                room.take(sequence.layout, count)
                budget -= count
        return rows

    def _make_room(self, sequence: ScheduledSequence, want: int, younger: deque[ScheduledSequence]) -> int:
        """How many of `want` tokens the pages allow, after making room: 0 where it must wait for batches in flight.

        Only what is kept in a pool that is short makes room. Cached prefixes and local copies go first. Where not one
        token fits, the sequence goes on at other holders, if they have room. Else the youngest of the `younger` idle
        ones is preempted, but not while a batch in flight has a copy there. A sequence that is alone in those pools
        always gets one token: the holders decide.
        """
        prefix_cache, keeps_at, grown = self._running.prefix_cache, self._running.keeps_at, False
        while (count := self._ledger.affordable(sequence, want)) < want:
            short = self._ledger.short(sequence, count + 1)
            if self._running.evict(short) or self._copies.give_back(short):
                continue
            if count or self._copies.in_use(short):
                break
            if not grown and self._growth.elsewhere(sequence, short):
                grown = True
                continue
            victim = next((candidate for candidate in reversed(younger) if keeps_at(candidate, short)), None)
            if victim is not None:
                younger.remove(victim)
                self._admission.preempt(victim)
            elif any(candidate is not sequence and keeps_at(candidate, short) for candidate in self._running):
                break
            elif not prefix_cache.evict_used(short):
                return 1
        return count


def verified(drafts: Sequence[int], sampled: Sequence[int | None]) -> list[int]:
    """The new tokens: the drafts that are accepted, and one more. `sampled` has one token more than there are drafts.

    None in it, where logits allow no token, ends them before: as the first token of its row it is sampled again."""
    tokens: list[int] = []
    for draft, token in zip_longest(drafts, sampled):
        if token is None:
            break
        tokens.append(token)
        if token != draft:
            break
    return tokens


def before_the_end(sequence: ScheduledSequence, drafts: tuple[int, ...]) -> tuple[int, ...]:
    """The drafts before the first that would end the sequence, or cannot come yet: it need not be fed to be sampled."""
    stops = sequence.request.stop_token_ids
    return drafts[: next((index for index, draft in enumerate(drafts) if draft in stops), len(drafts))]
