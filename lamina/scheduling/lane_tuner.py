"""How many batches are under way at a time, decided by the measured rate of each number. Pure: callers give the time.

While one batch waits for attention another can compute. But each batch has fewer sequences, and reads all weights. With
several replicas of the model several batches compute at the same time.
"""

from __future__ import annotations

import logging

from lamina.scheduling.trials import Trials

logger = logging.getLogger("lamina")

HOLD = 2000  # batches until the numbers are tried again
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
        self._attended = 0.0  # seconds of attention when the present measurement began
        self._trials = Trials(HOLD, CHANGE)

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
        return self._most > 1 and self._trials.trying

    @property
    def begun(self) -> bool:
        """Whether some numbers are measured and others are to be."""
        return self._most > 1 and self._trials.begun

    def alone(self) -> None:
        """No batch waits for an attention worker: use one lane, unless the number is fixed."""
        if self._most > 1:
            self.count = 1
            self._trials.restart()

    def completed(self, tokens: int, sequences: int, prefill: bool, now: float, attended: float = 0.0) -> None:
        """A batch is complete: it gave `tokens` tokens, and `sequences` are running in all lanes together. `attended`
        are the seconds of attention of all batches until `now`."""
        if self._most == 1:
            return
        trials = self._trials
        if prefill or sequences < 2:  # nothing to learn for decoding
            trials.interrupted()
            return
        if trials.holds(sequences):
            return
        if not trials.rates:
            self.count = 1
        if not trials.trying:
            self._attended = attended
        measured = trials.completed(self.count, tokens, now)
        if measured is None:
            return
        if self.count == 1:
            attention = (attended - self._attended) / measured.batches
            self.tiers = max(0.0, measured.seconds / measured.batches - attention), attention
        if self.count < min(self._most, sequences):
            self.count += 1
            return
        self.count = trials.settle(sequences)
        rates = ", ".join(f"{count}: {rate:.0f}" for count, rate in sorted(trials.rates.items()))
        model, attention = self.tiers or (0.0, 0.0)
        logger.info(
            "%d lanes for %d sequences over %d replicas; tokens/s measured by number of lanes: %s; alone, a batch is "
            "in the model for %.1f ms and in attention for %.1f ms, which suggests %.1f lanes, of at most %d",
            self.count, sequences, self._replicas, rates, model * 1e3, attention * 1e3, self.suggested or 1.0,
            self._most,
        )  # fmt: skip
