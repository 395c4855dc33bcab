"""Which rows the next batch has, and what gives up its pages for them. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from lamina.scheduling.admission import Admission
from lamina.scheduling.blame import Blame
from lamina.scheduling.fair_share import FairShare
from lamina.scheduling.growth import Growth
from lamina.scheduling.kv_rebuild import KvRebuild
from lamina.scheduling.kv_shares import Pages
from lamina.scheduling.local_copies import LocalCopies
from lamina.scheduling.page_ledger import PageLedger
from lamina.scheduling.request import PlannedRow, ScheduledSequence, SchedulerConfig
from lamina.scheduling.running import RunningSequences
from lamina.scheduling.speculation import left_to_draft


class RowPlanner:
    """Forms batches of the running sequences and of those that `admission` gives KV."""

    def __init__(
        self,
        ledger: PageLedger,
        running: RunningSequences,
        admission: Admission,
        rebuilds: KvRebuild,
        blame: Blame,
        fair_share: FairShare,
        config: SchedulerConfig,
        copies: LocalCopies,
        growth: Growth,
    ) -> None:
        self._ledger = ledger
        self._running = running
        self._admission = admission
        self._rebuilds = rebuilds
        self._blame = blame
        self._fair_share = fair_share
        self._config = config
        self._most_rows = config.max_sequences
        self._copies = copies
        self._growth = growth
        self._turn = 0  # the number of the present plan

    def rows(self, lanes: int, budget: int, admits: bool) -> list[PlannedRow]:
        """Rows for the idle sequences by order, then for new ones where it `admits` any: `budget` tokens at most, of
        which each tenant gets its share."""
        rows: list[PlannedRow] = []
        if admits:
            self._admission.reclaim()
        present = [sequence for sequence in self._running if sequence.idle]
        decodes, prefill, rows_left = self._dealt(present, budget)
        idle = deque(present)
        short = not admits  # or a sequence has got no pages
        self._turn += 1
        while budget and len(rows) < self._most_rows:
            younger = idle
            if idle and (lanes == 1 or len(rows) * lanes < max(lanes, len(self._running))):
                sequence = idle.popleft()
                if not self._rebuilds.ready(sequence) or (sequence.left == 1 and sequence not in decodes):
                    continue
            elif not short and (admitted := self._admission.admit(+prefill & +rows_left)):
                # Even where its lane's share is full: otherwise none would be admitted while every lane is.
                sequence, younger = admitted, deque()
            else:
                break
            left, tenant = sequence.left, sequence.request.tenant
            limit = 1 if left == 1 else self._config.chunk(sequence, min(left, prefill[tenant], budget))
            limit = self._blame.in_company(sequence, limit)
            if sequence.held and sequence.rebuild is None:
                limit = min(limit, left - 1)
            if limit == 0 or rows_left[tenant] == 0:
                continue
            count = self._make_room(sequence, limit, younger)
            if count == 0:
                short = True
                continue
            rows.append(self._ledger.reserve(sequence, count))
            sequence.turn = self._turn
            budget -= count
            rows_left[tenant] -= 1
            prefill[tenant] -= count if left > 1 or younger is not idle else 0
        self._speculate(rows, budget, prefill)
        return rows

    def _speculate(self, rows: list[PlannedRow], budget: int, left: Counter[str]) -> None:
        """Let the rows that decode have their drafts: `budget` tokens at most, what is `left` of each tenant's share,
        and no page that anybody may need."""
        room: Pages | None = None
        for at, row in enumerate(rows):
            sequence, tenant = row.sequence, row.sequence.request.tenant
            drafts, sequence.drafts = sequence.drafts, ()
            if not drafts or not row.decodes or sequence.local_copy:
                continue
            most = min(len(drafts), self._config.max_drafts, budget, left[tenant], left_to_draft(sequence))
            # A row is attended where it is stored, so it does not cross from one share into the next.
            border = min(share.hi for share in sequence.layout if share.lo <= row.start < share.hi)
            most = self._blame.in_company(sequence, min(1 + most, border - row.start)) - 1
            while most > 0 and (cost := self._ledger.further(row, most)):
                if room is None:
                    room = self._running.headroom() - self._running.giving_way
                if room.covers(cost):
                    room -= cost
                    break
                most -= 1
            if most > 0:
                rows[at] = self._ledger.speculate(row, drafts[:most])
                budget -= most
                left[tenant] -= most

    def _dealt(
        self, idle: Sequence[ScheduledSequence], budget: int
    ) -> tuple[set[ScheduledSequence], Counter[str], Counter[str]]:
        """The sequences that may decode, and for each tenant how many tokens of prompts it may have beside them and
        how many rows.

        Of a tenant that gets less than it wants, those decode that have waited longest, and half of what it gets goes
        to its prompts. The oldest sequence always decodes: it may be the only one for which there is room.
        """
        wanted, drafts = Counter(self._admission.wanted()), Counter[str]()
        decoding = defaultdict[str, list[ScheduledSequence]](list)
        for sequence in idle:
            tenant = sequence.request.tenant
            wanted[tenant] += sequence.left
            if sequence.left == 1:
                decoding[tenant].append(sequence)
                drafts[tenant] += len(sequence.drafts)
        dealt = self._fair_share.deal(wanted + drafts, budget)
        decodes, prefill, rows_left = set(idle[:1]), Counter[str](), Counter[str]()
        for tenant, wants in wanted.items():
            rows, tokens, most = decoding[tenant], budget, self._most_rows
            if dealt is not None:
                rows.sort(key=lambda each: each.turn)
                tokens, most = dealt[tenant], max(1, most // len(dealt))
                del rows[min(most, max(tokens - (wants - len(rows)), tokens // 2)) :]
            decodes.update(rows)
            prefill[tenant], rows_left[tenant] = max(1, tokens - len(rows)), most
        return decodes, prefill, rows_left

    def trial(self) -> list[ScheduledSequence]:
        """The suspects that are to be tried next, with nothing else under way."""
        idle = (sequence for sequence in self._running if sequence.idle and not sequence.held) if self._blame else ()
        return self._blame.next_trial([sequence for sequence in idle if self._rebuilds.ready(sequence)])

    def trial_rows(self, suspects: list[ScheduledSequence], budget: int) -> list[PlannedRow]:
        """Rows for these suspects alone, as far as there is room."""
        rows: list[PlannedRow] = []
        for sequence in suspects:
            younger = deque(s for s in self._running if s.order > sequence.order and s not in suspects)
            want = self._config.chunk(sequence, min(sequence.left, budget))
            count = self._make_room(sequence, want, younger) if budget else 0
            if count:
                rows.append(self._ledger.reserve(sequence, count))
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
            victim = next((each for each in reversed(younger) if keeps_at(each, short)), None)
            if victim is not None:
                younger.remove(victim)
                self._admission.preempt(victim)
            elif any(each is not sequence and keeps_at(each, short) for each in self._running):
                break
            elif not prefix_cache.evict_used(short):
                return 1
        return count
