"""The operations that holders have or get next, numbered, and the pages that each holder has left.

Pages are estimated between two replies: rows count with the most that they can need, closes with the least that they
free. So a refusal is rare, and each reply corrects the estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

from lamina.errors import EngineError
from lamina.scheduling.kv_shares import NO_PAGES, Layout, Pages
from lamina.scheduling.request import (
    CloseSequence,
    ForkSequence,
    OpenSequence,
    Plan,
    PlannedRow,
    ReplaceShares,
    ScheduledSequence,
    SchedulerConfig,
    SequenceOperation,
)


class PageLedger:
    """Operations wait here until a plan that carries them is accepted; every plan carries all that wait.

    `free` has the pages that each holder has left, by its last reply. `promised` are pages that moves under way will
    still take.
    """

    def __init__(self, config: SchedulerConfig, free: Pages) -> None:
        self.operations: list[SequenceOperation] = []
        self.free = free
        self.promised = NO_PAGES
        self._config = config
        self._freed: list[Pages] = []  # what each of the operations frees, at least
        self._closing = NO_PAGES  # their sum
        self._first = 0  # the number of the first of them
        self._last_handle = 0
        self._held: set[int] = set()  # handles that the holders have
        self._drafted = NO_PAGES  # of the rows reserved since the last plan was made
        self._unanswered: dict[Plan, Pages] = {}  # the pages that the rows of each will take

    def joined(self, holder: int, pages: int) -> None:
        """There is one holder more, empty."""
        self.free += {holder: pages}

    def left(self, holder: int) -> None:
        """A holder is gone, with all it had. No plan may wait for an answer."""
        self.free = Pages({at: pages for at, pages in self.free.items() if at != holder})

    def adopt(self, handle: int, pages: Pages) -> None:
        """The holders have a sequence of the previous engine, with at most these pages."""
        self._held.add(handle)
        self._last_handle = max(self._last_handle, handle)
        self.free -= pages

    def number_from(self, last: int) -> None:
        """Give out no handle up to `last`."""
        self._last_handle = max(self._last_handle, last)

    def open(self, layout: Layout) -> int:
        """Have an empty sequence opened. Returns its handle, which is never used again."""
        self._last_handle += 1
        self._append(OpenSequence(self._last_handle, layout), NO_PAGES)
        return self._last_handle

    def fork(self, parent: int, length: int) -> int:
        """Have a sequence made of the parent's first `length` tokens. Returns its handle."""
        self._last_handle += 1
        self._append(ForkSequence(self._last_handle, parent, length), NO_PAGES)
        return self._last_handle

    def close(self, handle: int, freed: Pages) -> None:
        """Have a sequence closed, which frees these pages or more."""
        self._append(CloseSequence(handle), freed)

    def replace(self, handle: int, lost: int, shares: Layout, source: int | None = None, length: int = 0) -> None:
        """Have a lost holder's part of a sequence opened elsewhere: empty, or as forks of the source's shares."""
        self._append(ReplaceShares(handle, lost, shares, source, length), NO_PAGES)

    def _append(self, operation: SequenceOperation, freed: Pages) -> None:
        self.operations.append(operation)
        self._freed.append(freed)
        self._closing += freed

    def room(self) -> Pages:
        """The least pages that are free once every plan is answered and every operation accepted. Can be negative."""
        room = self.free + self._closing - self._drafted
        for pages in self._unanswered.values():
            room -= pages
        return room

    def unpromised(self) -> Pages:
        """The least pages that are free once, besides, every move has ended."""
        return self.room() - self.promised

    def affordable(self, sequence: ScheduledSequence, want: int) -> int:
        """How many of a sequence's next `want` tokens fit into its last page and the free ones."""
        tail = -sequence.computed % self._config.page_size
        if want <= tail and not sequence.copies and sequence.rebuild is None:
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

    def short(self, sequence: ScheduledSequence, count: int) -> set[int]:
        """The holders that have too few pages for a sequence's next `count` tokens."""
        room = self.room()
        return {holder for holder, pages in self._cost(sequence, count).items() if pages > max(0, room.get(holder, 0))}

    def _cost(self, sequence: ScheduledSequence, count: int) -> Pages:
        """The most pages that a sequence's next `count` tokens take: new ones, and the copy of a shared page that the
        first of them falls into, less the pages that sliding windows leave."""
        start, size, held = sequence.next, self._config.page_size, self._config.held
        if sequence.rebuild is not None:
            return held(sequence.rebuild.missing, start, start + count, 0, start)
        if not sequence.copies and 0 < start % size <= size - count:
            return NO_PAGES
        layout, floor, shared = sequence.layout, sequence.floor, max(sequence.shared.values(), default=0)
        pages = held(layout, shared, start + count, floor, start) - held(layout, shared, start, floor)
        return pages + self._config.page_set(layout, start) if sequence.copies and start % size else pages

    def reserve(self, sequence: ScheduledSequence, count: int) -> PlannedRow:
        """A row for a sequence's next `count` tokens, for the next plan."""
        if sequence.handle is None:
            raise EngineError(f"request {sequence.request.id} was planned before it was admitted")
        if cost := self._cost(sequence, count):
            self._drafted += cost
        start, end, rebuild = sequence.next, sequence.next + count, sequence.rebuild
        if rebuild is not None:
            rebuild.planned = end
            return PlannedRow(sequence, sequence.handle, start, count, sample=False, rebuild=True)
        sequence.planned = end
        return PlannedRow(sequence, sequence.handle, start, count, sample=end == len(sequence.tokens))

    def plan(self, rows: list[PlannedRow]) -> Plan:
        """A plan of reserved rows."""
        plan = Plan(self._first, tuple(self.operations), tuple(rows))
        self._unanswered[plan] = self._drafted
        self._drafted = NO_PAGES
        return plan

    def accepted(self, plan: Plan, free: Pages) -> None:
        """All holders have applied the plan's operations and reserved for its rows. `free` has the pages left."""
        self.answered(plan, free)
        done = max(0, plan.first + len(plan.operations) - self._first)
        for operation in self.operations[:done]:
            _apply(operation, self._held)
        for freed in self._freed[:done]:
            self._closing -= freed
        del self.operations[:done], self._freed[:done]
        self._first += done

    def answered(self, plan: Plan, free: Pages) -> None:
        """Holders have answered a plan, and have these pages left. Unless it is `accepted`, all operations wait on."""
        if self._unanswered.pop(plan, None) is None:
            raise EngineError("a plan was answered that was not waiting for an answer")
        self.update_free(free)

    def update_free(self, free: Pages) -> None:
        """These holders have said how many pages they have left."""
        self.free = Pages(self.free | free)

    def took(self, pages: Pages) -> None:
        """These pages were taken outside of any plan."""
        self.free -= pages

    def concerns(self, handle: int) -> bool:
        """Whether a waiting operation makes, forks, changes or closes the sequence of that handle."""
        return any(
            handle == operation.handle
            or (isinstance(operation, ForkSequence) and handle == operation.parent)
            or (isinstance(operation, ReplaceShares) and handle == operation.source)
            for operation in self.operations
        )

    def forget(self, plan: Plan) -> bool:
        """Expect no answer to the plan any more. Returns whether one was expected."""
        return self._unanswered.pop(plan, None) is not None

    def awaits(self, plan: Plan) -> bool:
        """Whether the plan has not been answered yet."""
        return plan in self._unanswered

    def check_integrity(self, handles: Sequence[int]) -> None:
        """Raise EngineError unless exactly these handles, all different, exist once all operations are accepted."""
        there = set(self._held)
        for operation in self.operations:
            _apply(operation, there)
        if len(set(handles)) != len(handles) or there != set(handles):
            raise EngineError(f"the holders will have handles {sorted(there)}; in use are {sorted(handles)}")


def _apply(operation: SequenceOperation, handles: set[int]) -> None:
    if isinstance(operation, CloseSequence | ReplaceShares):
        if operation.handle not in handles:
            raise EngineError(f"{operation} names what is not there")
        if isinstance(operation, CloseSequence):
            handles.remove(operation.handle)
        return
    if isinstance(operation, ForkSequence) and operation.parent not in handles:
        raise EngineError(f"{operation} forks what is not there")
    if operation.handle in handles:
        raise EngineError(f"{operation} uses a handle twice")
    handles.add(operation.handle)
