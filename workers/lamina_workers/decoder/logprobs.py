"""The report on one row's probabilities. It has a file of its own, so that code which passes it on loads no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Natural log probabilities under the softmax of the raw logits: the chosen token's, and (token, logprob) of
    the likeliest, likeliest first."""

    chosen: float
    top: tuple[tuple[int, float], ...]
