"""Tries the values of a setting in turn on decode batches, by measured rates. Pure: callers give the time."""

from __future__ import annotations

from typing import NamedTuple

WINDOW = 24  # batches that one measurement takes
GAIN = 1.03  # by which a value must be faster than one before it: a smaller gain is noise


class Measured(NamedTuple):
    """`batches` batches with one value, in so many seconds."""

    seconds: float
    batches: int


class Trials:
    """One search at a time, then its result holds for `hold` batches, unless the number of sequences changes by a
    factor of more than `change`.

    `rates` has tokens a second by value; of a value that is measured again the best rate, since what disturbs a
    measurement makes it slower. The owner of the setting says which value ran, and which is next.
    """

    def __init__(self, hold: int, change: float) -> None:
        self.rates: dict[int, float] = {}
        self._hold = hold
        self._change = change
        self._since: float | None = None
        self._skipped = self._batches = self._tokens = self._held = self._sequences = 0

    @property
    def trying(self) -> bool:
        """Whether a value is being measured, so that nothing else should change."""
        return not self._held and self._since is not None

    @property
    def begun(self) -> bool:
        """Whether a search is not at its end."""
        return not self._held and bool(self.rates)

    def restart(self) -> None:
        """Begin a search, and forget the last one."""
        self._since, self.rates, self._held, self._skipped = None, {}, 0, 0

    def interrupted(self) -> None:
        """What is being measured must be measured anew."""
        self._since, self._skipped = None, 0

    def holds(self, sequences: int) -> bool:
        """Whether there is nothing to try in this batch, of so many sequences."""
        if not self._held:
            return False
        low, high = sorted((sequences, self._sequences))
        if self._held < self._hold and high <= self._change * low:
            self._held += 1
            return True
        self.restart()
        return False

    def completed(self, value: int, tokens: int, now: float, under_way: int = 1) -> Measured | None:
        """A batch is complete that ran with `value`, or before it was set: the first `under_way` are not counted. What
        was measured, once that is enough."""
        if self._skipped < under_way:
            self._skipped += 1
            self._since, self._batches, self._tokens = now, 0, 0
            return None
        since = now if self._since is None else self._since
        self._batches += 1
        self._tokens += tokens
        if self._batches < WINDOW:
            return None
        measured = Measured(now - since, self._batches)
        self.rates[value] = max(self._tokens / max(measured.seconds, 1e-9), self.rates.get(value, 0.0))
        self.interrupted()
        return measured

    def settle(self, sequences: int) -> int:
        """The search is over, with so many sequences: the value to keep, the lowest where higher ones gain little."""
        best = min(self.rates)
        for value, rate in sorted(self.rates.items()):
            if rate > GAIN * self.rates[best]:
                best = value
        self._held, self._sequences = 1, sequences
        return best
