"""How long decode steps take, by their rows and by how many drafts they verify, as measured. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

WINDOW = 9  # measurements that count, of steps with the same rows and drafts
FEW = 5  # measurements of steps without drafts that are needed
FRESH = 128  # steps with drafts after which those without are measured anew: contexts grow, machines are shared
KNOWN = 512  # steps with the same rows after which a measurement is forgotten


@dataclass(slots=True)
class _Steps:
    """Steps of the same number of rows: by the number of their drafts the seconds that they took, and the number of the
    last one. `begun`: numbers of drafts that there was a step with; the first one loads what it needs, and does not
    count."""

    seconds: dict[int, deque[float]] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    begun: set[int] = field(default_factory=lambda: {0})
    steps: int = 0


class StepCosts:
    """Measured steps. Numbers below 16 stand alone; above, those that differ by less than an eighth are one."""

    def __init__(self) -> None:
        self._rows: dict[int, _Steps] = {}

    def measured(self, rows: int, drafts: int, seconds: float) -> None:
        """A step of so many rows verified so many drafts, and took so many seconds."""
        known, drafts = self._rows.setdefault(_rounded(rows), _Steps()), _rounded(drafts)
        if not drafts and known.steps - known.last.get(0, 0) > FRESH:
            known.seconds.pop(0, None)
        known.steps += 1
        if drafts not in known.begun:
            known.begun.add(drafts)
            return
        known.last[drafts] = known.steps
        known.seconds.setdefault(drafts, deque(maxlen=WINDOW)).append(seconds)
        for old in [each for each, last in known.last.items() if each and last < known.steps - KNOWN]:
            del known.last[old], known.seconds[old]

    def stale(self, rows: int) -> bool:
        """Whether steps without drafts are to be measured, for the first time or anew."""
        known = self._rows.get(_rounded(rows))
        return known is None or len(known.seconds.get(0, ())) < FEW or known.steps - known.last[0] > FRESH

    def seconds(self, rows: int, drafts: int = 0) -> float:
        """What a step with exactly so many drafts takes; 0 where none was measured."""
        known, drafts = self._rows.get(_rounded(rows)), _rounded(drafts)
        return median(known.seconds[drafts]) if known is not None and drafts in known.seconds else 0.0

    def curve(self, rows: int, most: int) -> list[float]:
        """What a step takes with 0, 1, ... drafts, `most` at most: between two measured numbers in proportion, beyond
        the highest as that one, and never less for more drafts. It ends a draft a row or twice as far as was measured,
        so that drafts become more by degrees. Steps without drafts must have been measured."""
        known = self._rows[_rounded(rows)]
        marks = sorted(known.seconds)
        curve = [median(known.seconds[0])]
        for low, high in pairwise(marks):
            below = curve[-1]
            above = max(below, median(known.seconds[high]))
            curve += [below + (above - below) * step / (high - low) for step in range(1, high - low + 1)]
        curve += curve[-1:] * max(rows, marks[-1])
        return curve[: most + 1]


def _rounded(number: int) -> int:
    """The lowest number that is not told from this one: it has the same four leading bits."""
    shift = max(0, number.bit_length() - 4)
    return number >> shift << shift
