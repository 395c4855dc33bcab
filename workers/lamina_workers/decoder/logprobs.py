"""The reports on tokens' probabilities, and on prompts. A file of its own, so that code which passes them on loads no
torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Natural log probabilities under the softmax of the raw logits: the chosen token's, and (token, logprob) of
    the likeliest, likeliest first."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Some consecutive tokens of a prompt that are to be scored: the `first` and following ones of a batch, whose
    positions begin at `start`.

    `targets` are the tokens that follow them: their log probabilities are wanted, and those of the `top` likeliest, at
    most 64. Without targets the sum of `count` hidden states is wanted.
    """

    first: int
    start: int
    count: int
    targets: tuple[int, ...] = ()
    top: int = 0


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The answer to `PromptTokens`, whose positions begin at `start`.

    `logprobs` has for each of them the report on the token that follows, `ranks` how likely that is: 1 is the
    likeliest. Or `hidden`, float32 `[hidden_size]`, is the sum over them of what leaves the last norm.
    """

    start: int
    logprobs: tuple[RowLogprobs, ...] = ()
    ranks: tuple[int, ...] = ()
    hidden: tuple[float, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether no NaN and no infinity is among them."""
        return math.isfinite(sum(report.chosen for report in self.logprobs) + sum(self.hidden))
