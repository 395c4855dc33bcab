"""What the scheduler has told the holders, and what they have left: numbered operations, and a count of pages.

Pages are counted, not known. Between two replies the ledger takes the most that rows can need and the least that
closing can free, so a refusal is rare; each reply brings the count back to the truth. Knows nothing of who is
scheduled when, or why.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

from lamina.errors import EngineError
from lamina.request import (
    CloseSequence,
    ForkSequence,
    OpenSequence,
    Plan,
    PlannedRow,
    SchedulerConfig,
    Sequence,
    SequenceOperation,
)


class Ledger:
    """Operations wait in it until a plan that carries them is accepted; every plan carries all that wait."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.page_set = config.page_set
        self.operations: list[SequenceOperation] = []
        self._config = config
        self._freed: list[int] = []  # pages that each of the operations frees, at least
        self._closing = 0  # their sum
        self._first = 0  # the number of the first of them
        self._last_handle = 0
        self._held: set[int] = set()  # handles that the holders have
        self._free = config.total_pages  # as last told
        self._drafted = 0  # pages of the rows reserved since the last plan was made
        self._unanswered: dict[Plan, int] = {}  # and the pages that each will take

    def open(self) -> int:
        """Have an empty sequence opened. Returns its handle, which is never used again."""
        self._last_handle += 1
        self._append(OpenSequence(self._last_handle), 0)
        return self._last_handle

    def fork(self, parent: int, length: int) -> int:
        """Have a sequence made of the parent's first `length` tokens. Returns its handle."""
        self._last_handle += 1
        self._append(ForkSequence(self._last_handle, parent, length), 0)
        return self._last_handle

    def close(self, handle: int, freed: int) -> None:
        """Have a sequence closed, which frees this many pages or more."""
        self._append(CloseSequence(handle), freed)

    def _append(self, operation: SequenceOperation, freed: int) -> None:
        self.operations.append(operation)
        self._freed.append(freed)
        self._closing += freed

    def room(self) -> int:
        """Pages free once every plan is answered and every operation accepted, at least. Can be negative."""
        return self._free + self._closing - self._drafted - sum(self._unanswered.values())

    def affordable(self, sequence: Sequence, want: int) -> int:
        """How many of its next `want` tokens fit into its last page and the room there is."""
        size = self._config.page_size
        tail = -sequence.computed % size
        if want <= tail and not sequence.copies:
            return want
        room = self.room() - self._cost(sequence, 0)
        if room < 0 and sequence.copies:
            return 0
        return min(want, tail + max(0, room) // self.page_set * size)

    def _cost(self, sequence: Sequence, count: int) -> int:
        """Pages that its next `count` tokens take, at most: new ones and the copy of a shared one that they fall
        into, less those that fall behind sliding windows."""
        start, size = sequence.computed, self._config.page_size
        if not sequence.copies and 0 < start % size <= size - count:
            return 0
        held = self._config.held
        pages = held(sequence.shared, start + count, start) - held(sequence.shared, start, sequence.floor)
        return pages + (self.page_set if sequence.copies and start % size else 0)

    def reserve(self, sequence: Sequence, count: int) -> PlannedRow:
        """A row for its next `count` tokens, to go into the next plan."""
        if sequence.handle is None:
            raise EngineError(f"request {sequence.request.id} was planned before it was admitted")
        self._drafted += self._cost(sequence, count)
        start, end = sequence.computed, sequence.computed + count
        sequence.planned = end
        return PlannedRow(sequence, sequence.handle, start, count, sample=end == len(sequence.tokens))

    def plan(self, rows: list[PlannedRow]) -> Plan:
        """A plan of rows that were reserved."""
        plan = Plan(self._first, tuple(self.operations), tuple(rows))
        self._unanswered[plan] = self._drafted
        self._drafted = 0
        return plan

    def accepted(self, plan: Plan, free_pages: int) -> None:
        """All holders have applied the plan's operations and reserved for its rows. The one with the fewest pages
        has this many left."""
        self._answered(plan, free_pages)
        done = max(0, plan.first + len(plan.operations) - self._first)
        for operation in self.operations[:done]:
            _apply(operation, self._held)
        self._closing -= sum(self._freed[:done])
        del self.operations[:done], self._freed[:done]
        self._first += done

    def refused(self, plan: Plan, free_pages: int) -> None:
        """Not every holder has accepted, so all operations still wait. The one with the fewest pages has this many."""
        self._answered(plan, free_pages)

    def _answered(self, plan: Plan, free_pages: int) -> None:
        if self._unanswered.pop(plan, None) is None:
            raise EngineError("a plan was answered that was not waiting for an answer")
        self._free = free_pages

    def forget(self, plan: Plan) -> bool:
        """Expect no answer to the plan any more. Whether one was expected."""
        return self._unanswered.pop(plan, None) is not None

    def awaits(self, plan: Plan) -> bool:
        """Whether the plan has not been answered yet."""
        return plan in self._unanswered

    def check_integrity(self, handles: Several[int]) -> None:
        """Raise `EngineError` unless exactly these handles, all different, will exist once everything is accepted."""
        there = set(self._held)
        for operation in self.operations:
            _apply(operation, there)
        if len(set(handles)) != len(handles) or there != set(handles):
            raise EngineError(f"the holders will have handles {sorted(there)}; in use are {sorted(handles)}")


def _apply(operation: SequenceOperation, handles: set[int]) -> None:
    if isinstance(operation, CloseSequence):
        if operation.handle not in handles:
            raise EngineError(f"{operation} closes what is not there")
        handles.remove(operation.handle)
        return
    if isinstance(operation, ForkSequence) and operation.parent not in handles:
        raise EngineError(f"{operation} forks what is not there")
    if operation.handle in handles:
        raise EngineError(f"{operation} uses a handle twice")
    handles.add(operation.handle)
