"""Which sequences made batches fail (`Blame`), and which holders contradict the engine's books (`Refusals`). Pure.

Every row of a failed batch makes its sequence a suspect. Where a suspect failed it is tried again in company of a few
other suspects, then alone; below that place it is computed with all others, as after a loss. Past that place it is no
suspect any more. Failures at other places are not counted together: holders also die by chance.

A holder contradicts the books where it lacks KV that it was sent, or refuses though its pages cannot all be taken.
That may happen once, for example where a message was lost. A holder that goes on so is at fault, and is given up like
one that does not answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt

from lamina.kv.request import PlannedRow, ScheduledSequence

REFUSALS = 3  # such answers, without progress between them, after which a holder is at fault

TRIES = 3  # failures of a sequence, the last one alone, after which it is to blame


class Blame:
    """The suspects of one engine."""

    def __init__(self) -> None:
        self._suspects: dict[ScheduledSequence, list[_Suspicion]] = {}  # the lowest place is the last

    def __bool__(self) -> bool:
        return bool(self._suspects)

    def failed(self, rows: Sequence[PlannedRow]) -> ScheduledSequence | None:
        """The batches that failed together had these rows. Returns the sequence that is to blame, once it is known; the
        caller ends it."""
        for row in rows:
            if row.sequence.finish_reason is None:
                self.suspect(row.sequence, 1, row.start, row.start + row.known)
        alone = rows[0].sequence if len(rows) == 1 else None
        return alone if alone is not None and self._failures(alone) >= TRIES else None

    def suspect(self, sequence: ScheduledSequence, failures: int, start: int, end: int) -> None:
        """A sequence failed so many times more, with its tokens [start, end)."""
        places = self._suspects.setdefault(sequence, [])
        if places and end > places[-1].start:
            failures += places.pop().failures
        places.append(_Suspicion(failures, start, end))

    def passed(self, row: PlannedRow) -> None:
        """A batch with this row went well."""
        places = self._suspects.get(row.sequence)
        while places and row.start + row.known >= places[-1].end:
            places.pop()
        if places == []:
            del self._suspects[row.sequence]

    def forget(self, sequence: ScheduledSequence) -> None:
        self._suspects.pop(sequence, None)

    def _failures(self, sequence: ScheduledSequence) -> int:
        places = self._suspects.get(sequence)
        return places[-1].failures if places else 0

    def in_company(self, sequence: ScheduledSequence, count: int) -> int:
        """How many of a sequence's next `count` tokens can be computed with all others: those below where it failed."""
        places = self._suspects.get(sequence)
        return max(0, min(count, places[-1].start - sequence.next)) if places else count

    def on_trial(self, rows: Iterable[PlannedRow]) -> bool:
        """Whether one of these rows is tried again where it failed."""
        suspect_rows = ((row, places) for row in rows if (places := self._suspects.get(row.sequence)))
        return any(row.start + row.count > places[-1].start for row, places in suspect_rows)

    def due(self, idle: Sequence[ScheduledSequence]) -> list[ScheduledSequence]:
        """The suspects among idle sequences that are where they failed."""
        return [sequence for sequence in idle if sequence in self._suspects and not self.in_company(sequence, 1)]

    def next_trial(self, idle: Sequence[ScheduledSequence]) -> list[ScheduledSequence]:
        """The suspects to try together, with nothing else under way: one that failed in such a trial before alone, else
        the root of their number, so that many are cleared in few batches. Empty where none is where it failed."""
        suspects = self.due(idle)
        repeaters = [sequence for sequence in suspects if self._failures(sequence) > 1]
        return repeaters[:1] or suspects[: isqrt(len(self._suspects) - 1) + 1] if suspects else []


@dataclass(frozen=True, slots=True)
class _Suspicion:
    """A sequence failed so many times since it last got past a place: its tokens [start, end)."""

    failures: int
    start: int
    end: int


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
        return counts[holder] >= REFUSALS

    def full(self, holder: int, falsely: bool) -> bool:
        """A holder says falsely that it has too few pages, or answers otherwise. Whether it is at fault."""
        self._full[holder] = self._full[holder] + 1 if falsely else 0
        return self._full[holder] >= REFUSALS

    def believed(self, holder: int) -> bool:
        """Whether a holder has not just said falsely that it has too few pages."""
        return not self._full[holder]

    def passed(self, row: PlannedRow) -> None:
        """A batch with this row went well."""
        if row.sequence in self._torn and row.start >= self._torn[row.sequence][0]:
            del self._torn[row.sequence]

    def forget(self, sequence: ScheduledSequence) -> None:
        self._torn.pop(sequence, None)
