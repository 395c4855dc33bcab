"""Which rows the next batch has, and what gives up its pages for them. Pure."""

from __future__ import annotations

from collections import deque

from lamina.scheduling.admission import Admission
from lamina.scheduling.blame import Blame
from lamina.scheduling.kv_rebuild import KvRebuild
from lamina.scheduling.page_ledger import PageLedger
from lamina.scheduling.request import PlannedRow, ScheduledSequence
from lamina.scheduling.running import RunningSequences


class RowPlanner:
    """Forms batches of the running sequences and of those that `admission` gives KV."""

    def __init__(
        self, ledger: PageLedger, running: RunningSequences, admission: Admission, rebuilds: KvRebuild, blame: Blame
    ) -> None:
        self._ledger = ledger
        self._running = running
        self._admission = admission
        self._rebuilds = rebuilds
        self._blame = blame

    def rows(self, lanes: int, budget: int, admits: bool) -> list[PlannedRow]:
        """Rows for the idle sequences by order, then for new ones where it `admits` any: `budget` tokens at most."""
        rows: list[PlannedRow] = []
        idle = deque(sequence for sequence in self._running if not sequence.in_flight)
        prefill = max(1, budget - sum(sequence.left == 1 for sequence in idle))
        short = not admits  # or a sequence has got no pages
        while budget:
            younger = idle
            if idle and (lanes == 1 or len(rows) * lanes < max(lanes, len(self._running))):
                sequence = idle.popleft()
                if not self._rebuilds.ready(sequence):
                    continue
            elif prefill and not short and (admitted := self._admission.admit()):
                # Even where its lane's share is full: otherwise none would be admitted while every lane is.
                sequence, younger = admitted, deque()
            else:
                break
            left = sequence.left
            limit = self._blame.in_company(sequence, 1 if left == 1 else min(left, prefill, budget))
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

    def trial(self) -> list[ScheduledSequence]:
        """The suspects that are to be tried next, with nothing else under way."""
        idle = (sequence for sequence in self._running if not sequence.in_flight) if self._blame else ()
        return self._blame.next_trial([sequence for sequence in idle if self._rebuilds.ready(sequence)])

    def trial_rows(self, suspects: list[ScheduledSequence], budget: int) -> list[PlannedRow]:
        """Rows for these suspects alone, as far as there is room."""
        rows: list[PlannedRow] = []
        for sequence in suspects:
            younger = deque(s for s in self._running if s.order > sequence.order and s not in suspects)
            count = self._make_room(sequence, min(sequence.left, budget), younger) if budget else 0
            if count:
                rows.append(self._ledger.reserve(sequence, count))
                budget -= count
        return rows

    def _make_room(self, sequence: ScheduledSequence, want: int, younger: deque[ScheduledSequence]) -> int:
        """How many of `want` tokens the pages allow, after making room: 0 where it must wait for batches in flight.

        Only what is kept by a holder that is short makes room. Cached prefixes are evicted first. The youngest of the
        `younger` idle sequences is preempted only where not one token fits. A sequence that is alone at those holders
        always gets one: they decide.
        """
        prefix_cache, keeps_at = self._running.prefix_cache, self._running.keeps_at
        while (count := self._ledger.affordable(sequence, want)) < want:
            short = self._ledger.short(sequence, count + 1)
            if prefix_cache.evict(short):
                continue
            if count:
                break
            victim = next((each for each in reversed(younger) if keeps_at(each, short)), None)
            if victim is not None:
                younger.remove(victim)
                self._admission.preempt(victim)
            elif any(each is not sequence and keeps_at(each, short) for each in self._running):
                break
            elif not prefix_cache.evict_used(short):
                return 1
        return count
