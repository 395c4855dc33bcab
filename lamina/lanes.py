"""How many batches are under way at a time, decided by what each number was measured to yield. Pure: told the time.

While one batch waits for attention another can compute; but each has fewer sequences, and reads all weights.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("lamina")

WINDOW = 24  # batches that one measurement takes
HOLD = 2000  # batches until a choice is looked at again
GAIN = 1.03  # by which more lanes must be better: below that, noise decides
CHANGE = 1.5  # of the number of sequences, after which a choice is looked at again


class Lanes:
    """`count` lanes at a time. With `most` above 1 each number up to it is tried in turn, and the best is kept."""

    def __init__(self, count: int, most: int = 1) -> None:
        self.count = count
        self._most = most
        self._rates: dict[int, float] = {}  # tokens a second, by number of lanes; those not tried yet are missing
        self._since: float | None = None
        self._batches = self._tokens = self._held = 0
        self._sequences = 0

    @classmethod
    def auto(cls, most: int) -> Lanes:
        """Begins with one lane, and tries up to `most`."""
        return cls(1, most)

    def completed(self, tokens: int, sequences: int, prefill: bool, now: float) -> None:
        """A batch is complete: it gave that many tokens, `sequences` are running in all lanes together."""
        if self._most == 1:
            return
        if prefill or sequences < 2:  # nothing to learn for decoding
            self._since = None
            return
        if (
            self._held
            and self._held < HOLD
            and max(sequences, self._sequences) <= CHANGE * min(sequences, self._sequences)
        ):
            self._held += 1
            return
        if self._held:
            self._held, self._rates, self.count, self._since = 0, {}, 1, None
        if self._since is None:  # the batches before this one ran otherwise
            self._since, self._batches, self._tokens = now, 0, 0
            return
        self._batches += 1
        self._tokens += tokens
        if self._batches < WINDOW:
            return
        self._rates[self.count] = self._tokens / max(now - self._since, 1e-9)
        self._since = None
        if self.count < min(self._most, sequences):
            self.count += 1
            return
        self.count = self._best()
        self._held, self._sequences = 1, sequences
        rates = ", ".join(f"{count}: {rate:.0f}" for count, rate in sorted(self._rates.items()))
        logger.info("%d lanes for %d sequences; tokens/s measured by number of lanes: %s", self.count, sequences, rates)

    def _best(self) -> int:
        best = 1
        for count, rate in sorted(self._rates.items()):
            if rate > GAIN * self._rates[best]:
                best = count
        return best
