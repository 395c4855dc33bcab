"""Copies of prompts in the local pools, which are read while the prompts are computed. Pure.

A prompt, or a rebuild, of a sequence elsewhere is read at its holders or, sooner, in a copy beside the model. A copy
takes pages that were not promised to others, and gives them back before any sequence has to wait or is preempted. It
may begin at any position: what lies below is read at the holders.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass

from lamina.kv.kv_shares import Layout, Pages, Place
from lamina.kv.page_ledger import PageLedger
from lamina.kv.placement import Placement
from lamina.kv.request import Plan, PlannedRow, ScheduledSequence, SchedulerConfig
from lamina.kv.running import RunningSequences


@dataclass(frozen=True, slots=True)
class LocalCopies:
    """Decides which rows read a copy. Of the plans in flight copies cannot be closed."""

    _config: SchedulerConfig
    _placement: Placement
    _ledger: PageLedger
    _running: RunningSequences
    _in_flight: Set[Plan]

    def fit(self, rows: Iterable[PlannedRow], opens: bool) -> None:
        """Fit the copies of these rows, by order, into what the rows leave, and count their pages for the next plan. A
        copy that does not fit is closed; new ones are made only where it `opens` any."""
        reading = (row for row in rows if row.known > 1 or row.sequence.local_copy)
        layouts = {row: layout for row in reading if (layout := self._layout(row, opens))}
        if not layouts:
            return
        planned = {row.sequence for row in layouts}
        room = self._running.headroom()
        for sequence in self._running:
            if sequence.local_copy and sequence not in planned:
                room -= self._pages(_layout(sequence), _end(sequence))
        for row, layout in layouts.items():
            pages = self._pages(layout, _end(row.sequence))
            if room.covers(pages) and self._take(row, layout):
                room -= pages
            else:
                self._running.drop_local_copy(row.sequence)

    def _layout(self, row: PlannedRow, opens: bool) -> Layout:
        """The copy that a row would read: the present one, unless the sequence was cut below it, or a new one."""
        sequence = row.sequence
        if sequence.local_copy and sequence.local_copy[0].share.lo <= row.start:
            return _layout(sequence)
        self._running.drop_local_copy(sequence)
        return self._placement.local_copy(sequence.layout, row.start) if opens else ()

    def _take(self, row: PlannedRow, layout: Layout) -> bool:
        """Count a row's pages in its copy, which is opened where it is new. False where there is no room for them."""
        needed = self._pages(layout, row.start + row.count) - self._pages(layout, row.start)
        while not self._ledger.room().covers(needed):
            if not self._running.evict(needed.keys()):
                return False
        if not row.sequence.local_copy:
            row.sequence.local_copy = self._placement.open_beside(layout)
        row.sequence.copied = row.start + row.count
        self._ledger.draft(needed)
        return True

    def _pages(self, layout: Layout, end: int) -> Pages:
        """The most pages of a copy up to position `end`."""
        lo = layout[0].lo
        return self._config.page_set(layout, lo) * -(-(end - lo) // self._config.page_size)

    def give_back(self, at: Collection[Place]) -> bool:
        """Close the youngest copy in these pools that no plan in flight reads. False where there is none."""
        flying = {row.sequence for plan in self._in_flight for row in plan.rows}
        for sequence in reversed(self._running.sequences):
            if _is_at(sequence, at) and sequence not in flying:
                self._running.drop_local_copy(sequence)
                return True
        return False

    def in_use(self, at: Collection[Place]) -> bool:
        """Whether plans in flight read copies in these pools, which can be closed afterwards."""
        return any(_is_at(row.sequence, at) for plan in self._in_flight for row in plan.rows)


def _layout(sequence: ScheduledSequence) -> Layout:
    return tuple(part.share for part in sequence.local_copy)


def _is_at(sequence: ScheduledSequence, at: Collection[Place]) -> bool:
    return any(part.share.at in at for part in sequence.local_copy)


def _end(sequence: ScheduledSequence) -> int:
    """Up to where a sequence is computed before its copy is closed."""
    return len(sequence.tokens) if sequence.rebuild is None else sequence.rebuild.end
