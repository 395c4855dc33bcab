"""How many batches are under way at a time, decided by the measured rate of each number. Pure: callers give the time.

While one batch waits for attention another can compute. But each batch has fewer sequences, and reads all weights. With
several replicas of the model several batches compute at the same time.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("lamina")

WINDOW = 24  # batches that one measurement takes
HOLD = 2000  # batches until the numbers are tried again
GAIN = 1.03  # by which more lanes must be faster: a smaller gain is noise
CHANGE = 1.5  # of the number of sequences, after which the numbers are tried again


class LaneTuner:
    """`count` lanes at a time, over `replicas` of the model. With `most` above 1 each number up to it is tried in turn,
    and the best is kept.

    `tiers`, once measured, are the seconds that a batch that is alone spends in the model and in attention.
    """

    def __init__(self, count: int, most: int = 1, replicas: int = 1) -> None:
        self.count = count
        self.tiers: tuple[float, float] | None = None
        self._most = most
        self._replicas = replicas
        self._attended = 0.0
        self._rates: dict[int, float] = {}  # tokens a second, by number of lanes tried
        self._since: float | None = None
        self._batches = self._tokens = self._held = 0
        self._sequences = 0

    @property
    def suggested(self) -> float | None:
        """How many lanes would keep all replicas computing, by the times of both tiers: 1 + attention / model for each
        replica. The estimate takes attention to be equally fast for any number of lanes."""
        if self.tiers is None:
            return None
        model, attention = self.tiers
        return self._replicas * (1 + attention / max(model, 1e-9))

    @property
    def trying(self) -> bool:
        """Whether a number is being measured, so that nothing else should change."""
        return self._most > 1 and not self._held and self._since is not None

    def alone(self) -> None:
        """No batch waits for an attention worker: use one lane, unless the number is fixed."""
        if self._most > 1:
            self.count, self._since, self._rates, self._held = 1, None, {}, 0

    def completed(self, tokens: int, sequences: int, prefill: bool, now: float, attended: float = 0.0) -> None:
        """A batch is complete: it gave `tokens` tokens, and `sequences` are running in all lanes together. `attended`
        are the seconds of attention of all batches until `now`."""
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
        if self._since is None:  # the previous batches ran with other settings
            self._since, self._batches, self._tokens, self._attended = now, 0, 0, attended
            return
        self._batches += 1
        self._tokens += tokens
        if self._batches < WINDOW:
            return
        self._rates[self.count] = self._tokens / max(now - self._since, 1e-9)
        if self.count == 1:
            attention = (attended - self._attended) / self._batches
            self.tiers = max(0.0, (now - self._since) / self._batches - attention), attention
        self._since = None
        if self.count < min(self._most, sequences):
            self.count += 1
            return
        self.count = self._best()
        self._held, self._sequences = 1, sequences
        rates = ", ".join(f"{count}: {rate:.0f}" for count, rate in sorted(self._rates.items()))
        model, attention = self.tiers or (0.0, 0.0)
        logger.info(
            "%d lanes for %d sequences over %d replicas; tokens/s measured by number of lanes: %s; alone, a batch is "
            "in the model for %.1f ms and in attention for %.1f ms, which suggests %.1f lanes, of at most %d",
            self.count, sequences, self._replicas, rates, model * 1e3, attention * 1e3, self.suggested or 1.0,
            self._most,
        )  # fmt: skip

    def _best(self) -> int:
        best = 1
        for count, rate in sorted(self._rates.items()):
            if rate > GAIN * self._rates[best]:
                best = count
        return best
