"""Whether decode rows are fused, or q goes first, decided by the measured rate of both orders. Pure.

Fused: q, k and v of a layer go to an attention worker together, which stores the token and attends it with its past.
q first: q is sent before k and v are computed, and the past is attended meanwhile; the model worker attends the row's
own token and merges. That hides the projection of k and v and their way, and costs a message, an attention and a merge.
"""

from __future__ import annotations

import logging

from lamina.scheduling.trials import Trials

logger = logging.getLogger("lamina")

HOLD = 20_000  # batches until both are tried again
ROUNDS = 2  # times that each is measured, in turn: a machine's speed drifts

_FUSED, _QUERY_FIRST = 0, 1


class OrderTuner:
    """`fused`: how decode rows are attended now. Where it `tries`, each order is measured in turn and the faster one is
    kept, fused where they are equal; else it stays as it is given."""

    def __init__(self, tries: bool = False, fused: bool = True) -> None:
        self.fused = fused
        self._tries = tries
        self._chosen = fused
        self._trials = Trials(HOLD, float("inf"))
        self._measured = 0  # windows of this search

    @property
    def trying(self) -> bool:
        """Whether an order is being measured, so that nothing else should change."""
        return self._tries and self._trials.trying

    def reset(self) -> None:
        """Holders have come or gone: forget what was measured."""
        if self._tries:
            self._trials.restart()
            self.fused = self._chosen = True

    def interrupted(self) -> None:
        """Other work runs, or something else is tried: meanwhile nothing is measured, and the choice so far holds."""
        self._trials.interrupted()
        self.fused = self._chosen

    def completed(self, tokens: int, sequences: int, lanes: int, now: float) -> None:
        """A decode batch is complete, which gave `tokens` tokens; `sequences` are running in `lanes` lanes."""
        if not self._tries or self._trials.holds(sequences):
            return
        if not self._trials.rates:  # a search begins
            self._measured, self._chosen = 0, True
        value = _QUERY_FIRST if self._measured % 2 else _FUSED
        if self.fused != (value == _FUSED):  # the batch ran between two measurements
            self.fused = value == _FUSED
            self._trials.interrupted()
            return
        if self._trials.completed(value, tokens, now, lanes) is None:
            return
        self._measured += 1
        if self._measured < 2 * ROUNDS:
            self.fused = self._measured % 2 == 0
            return
        self.fused = self._chosen = self._trials.settle(sequences) == _FUSED
        rates = self._trials.rates
        logger.info(
            "in decode %s; tokens/s measured, for %d sequences in %d lanes: q, k and v together: %.1f, q first: %.1f",
            "q, k and v go together, and are attended where they are stored" if self.fused else "q goes first",
            sequences, lanes, rates[_FUSED], rates[_QUERY_FIRST],
        )  # fmt: skip
