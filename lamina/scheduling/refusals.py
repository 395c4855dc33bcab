"""Which holders answer what the engine's books contradict. Pure.

A holder contradicts the books where it lacks KV that it was sent, or refuses though its pages cannot all be taken.
That may happen once, as where a message was lost. A holder that goes on so is at fault, and is given up as one that
does not answer.
"""

from __future__ import annotations

from collections import Counter

from lamina.scheduling.request import PlannedRow, ScheduledSequence

TRIES = 3  # such answers, without progress between them, after which a holder is at fault


class Refusals:
    """The answers of one engine's holders that its books contradict."""

    def __init__(self) -> None:
        self._torn: dict[ScheduledSequence, tuple[int, Counter[int]]] = {}  # see `lacks`
        self._full: Counter[int] = Counter()  # by holder, since it answered otherwise

    def lacks(self, holder: int, row: PlannedRow, start: int) -> bool:
        """A holder says that it has KV up to `start` alone, below the row's start. Whether it is at fault. Its refusals
        are counted until the sequence has got as far beyond this row as it is cut back now."""
        end, counts = self._torn.setdefault(row.sequence, (0, Counter()))
        counts[holder] += 1
        self._torn[row.sequence] = max(end, 2 * row.start - start), counts
        return counts[holder] >= TRIES

    def full(self, holder: int, falsely: bool) -> bool:
        """A holder says falsely that it has too few pages, or answers otherwise. Whether it is at fault."""
        self._full[holder] = self._full[holder] + 1 if falsely else 0
        return self._full[holder] >= TRIES

    def believed(self, holder: int) -> bool:
        """Whether a holder has not just said falsely that it has too few pages."""
        return not self._full[holder]

    def passed(self, row: PlannedRow) -> None:
        """A batch with this row went well."""
        if row.sequence in self._torn and row.start >= self._torn[row.sequence][0]:
            del self._torn[row.sequence]

    def forget(self, sequence: ScheduledSequence) -> None:
        """A sequence has ended."""
        self._torn.pop(sequence, None)
