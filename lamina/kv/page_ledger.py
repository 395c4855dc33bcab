"""The pages that each holder has left, by pool.

Pages are estimated between two replies: rows count with the most that they can need, closes with the least that they
free. So a refusal is rare, and each reply corrects the estimate.
"""

from __future__ import annotations

from dataclasses import replace

from lamina.errors import EngineError
from lamina.kv.kv_shares import NO_PAGES, Pages, Place
from lamina.kv.placement import Placement
from lamina.kv.request import Plan, PlannedRow, ScheduledSequence, SchedulerConfig


class PageLedger:
    """`free` has the pages that each holder has left, by its last reply, less what copies may have taken since. Of the
    holders in `estimated` a copy was counted since they were last asked: a reply to what was announced before it may
    have come after it. `moving` are the most pages that moves under way have taken, `promised` those that they will
    still take.
    """

    def __init__(self, config: SchedulerConfig, placement: Placement) -> None:
        self.free = placement.pages
        self.estimated: set[int] = set()
        self.promised = self.moving = NO_PAGES
        self._config = config
        self._size, self._states = config.page_size, bool(config.states)
        self._placement = placement
        self._drafted = NO_PAGES  # of the rows and copies of the next plan
        self._unanswered: dict[Plan, Pages] = {}  # the pages that the rows of each will take

    def joined(self, pages: Pages) -> None:
        self.free += pages

    def left(self, holder: int) -> None:
        """A holder was lost, with all its KV. No plan may wait for an answer."""
        self.free = Pages({place: pages for place, pages in self.free.items() if place[0] != holder})
        self.estimated.discard(holder)

    def room(self) -> Pages:
        """The least pages that are free once every plan is answered and every operation accepted. Can be negative."""
        room = self.free + self._placement.closing - self._drafted
        for pages in self._unanswered.values():
            room -= pages
        return room

    def unpromised(self) -> Pages:
        """The least pages that are free once, besides, every move has ended."""
        return self.room() - self.promised

    def affordable(self, sequence: ScheduledSequence, want: int) -> int:
        """How many of a sequence's next `want` tokens fit into its last page and the free ones."""
        tail = -sequence.computed % self._size
        in_page = want <= tail and not sequence.copies and sequence.rebuild is None
        if in_page and not (self._states and sequence.takes_records):
            return want
        room = self.room()
        if room.covers(self._cost(sequence, want)):
            return want
        fits, too_many = 0, want
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if room.covers(self._cost(sequence, middle)):
                fits = middle
            else:
                too_many = middle
        return fits

    def short(self, sequence: ScheduledSequence, count: int) -> set[Place]:
        """The pools that have too few pages for a sequence's next `count` tokens."""
        return self.room().short_of(self._cost(sequence, count))

    def _cost(self, sequence: ScheduledSequence, count: int) -> Pages:
        """The most pages that a sequence's next `count` tokens take: new ones, and the copy of a shared page that the
        first of them falls into, less the pages that sliding windows leave."""
        start, size = sequence.next, self._size
        if sequence.rebuild is not None:
            return self._config.held(sequence.rebuild.missing, start, start + count, 0, start)
        records = NO_PAGES
        if self._states and sequence.takes_records:
            records = self._config.records(sequence.layout)
        if not sequence.copies and 0 < start % size <= size - count:
            return records
        layout, floor, pages_between = sequence.layout, sequence.floor, self._config.held
        shared = min(start, max((run.lo for run in sequence.runs.values()), default=0))
        before = max(start, min(sequence.stored, start + count))
        pages = pages_between(layout, shared, start + count, floor, start) - pages_between(
            layout, shared, before, floor
        )
        if sequence.copies and start % size:
            pages += self._config.page_set(layout, start)
        return pages + records if records else pages

    def reserve(self, sequence: ScheduledSequence, count: int) -> PlannedRow:
        """A row for a sequence's next `count` tokens, for the next plan."""
        if sequence.handle is None:
            raise EngineError(f"request {sequence.request.id} was planned before it was admitted")
        if cost := self._cost(sequence, count):
            self.draft(cost)
        start, end, rebuild = sequence.next, sequence.next + count, sequence.rebuild
        if rebuild is not None:
            rebuild.planned = end
            return PlannedRow(sequence, sequence.handle, start, count, sample=False, rebuild=True)
        sequence.planned = end
        return PlannedRow(sequence, sequence.handle, start, count, sample=end == len(sequence.tokens))

    def further(self, row: PlannedRow, tokens: int) -> Pages:
        """The most pages that a reserved row takes with so many tokens more."""
        pages = self._cost(row.sequence, row.count + tokens) - self._cost(row.sequence, row.count)
        lacks_inputs = self._states and not row.sequence.keeps_inputs
        return pages + self._config.records(row.sequence.layout) if lacks_inputs else pages

    def speculate(self, row: PlannedRow, drafts: tuple[int, ...]) -> PlannedRow:
        """A reserved row with drafts besides."""
        self.draft(self.further(row, len(drafts)))
        row.sequence.planned += len(drafts)
        return replace(row, count=row.count + len(drafts), drafts=drafts)

    def draft(self, pages: Pages) -> None:
        self._drafted += pages

    def plan(self, rows: list[PlannedRow]) -> Plan:
        plan = Plan(tuple(rows))
        self._unanswered[plan] = self._drafted
        self._drafted = NO_PAGES
        return plan

    def answered(self, plan: Plan, free: Pages) -> None:
        if self._unanswered.pop(plan, None) is None:
            raise EngineError("a plan was answered that was not waiting for an answer")
        self.update_free(free)

    def update_free(self, free: Pages) -> None:
        self.free = Pages(self.free | free)

    def took(self, pages: Pages) -> None:
        self.free -= pages
        self.estimated.update(number for number, _ in pages)

    def forget(self, plan: Plan) -> bool:
        """Expect no answer to the plan any more. Returns whether one was expected."""
        return self._unanswered.pop(plan, None) is not None

    def awaits(self, plan: Plan) -> bool:
        """Whether the plan has not been answered yet."""
        return plan in self._unanswered
