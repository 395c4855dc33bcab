"""From evidence to a choice: candidates in order of what they keep, and the least that is measured to be good enough.

The caller gives the function that measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lamina.errors import InvalidRequest
from lamina.measure.calibration.quality import Quality, Target
from lamina.measure.calibration.scores import Scores
from lamina.measure.calibration.spans import plans, policies
from lamina.policy_file import Heads, kept
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import Policy
from lamina_workers.policies.span import Span
from lamina_workers.policies.streaming import Streaming

METHODS = ("windows", "spans", "streaming")
_FRACTIONS = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of the context
_UNIT = 32  # tokens that windows are multiples of: a page
_GRID = 40  # candidates, at most, between nothing and everything


@dataclass(frozen=True, slots=True)
class Trial:
    """Policies that were tried, and what was measured."""

    heads: Heads
    quality: Quality


def options(method: str, context: int, sink: int, recent: int) -> list[Policy]:
    """What a head may be instead of full, cheapest first. Raises InvalidRequest for another method.

    windows: `sink` tokens and the last ones, up to a fraction of `context`. spans: the same at that length, but those
    above `recent` grow with the sequence (MoA). streaming: `sink` and `recent` tokens, nothing else.
    """
    if method not in METHODS:
        raise InvalidRequest(f"method is {method!r:.40}; allowed are {', '.join(METHODS)}")
    if method == "streaming":
        return [Streaming(sink, recent)]
    sizes = sorted({max(_UNIT, round(context * fraction / _UNIT) * _UNIT) for fraction in _FRACTIONS})
    if method == "spans":
        # Short windows stay as they are; a long one is a quarter fixed, the rest a share of the position.
        return [Span(size) if size <= recent else Span(size // 4, round(0.75 * size / context, 4)) for size in sizes]
    return [Streaming(sink, size) for size in sizes]


def candidates(allowed: Sequence[Policy], influence: Scores, combined: Scores, context: int) -> list[Heads]:
    """Policies for all heads, in order of what they keep at `context` tokens; the last is full everywhere.

    `influence` `[len(allowed), layers, kv_heads]` is what each option would change; `combined` `[layers, kv_heads]`,
    from 0 to 1, says what else speaks for seeing everything. It tilts the influence by a factor of 0.5 to 1.5:
    influence is measured at a few hundred tokens, and says little of heads that those did not need.
    """
    every = [*allowed, Full()]
    tilted = np.concatenate([influence * (0.5 + combined), np.zeros((1, *combined.shape))])
    found = plans(tilted, [kept(str(policy), context) for policy in every])
    chosen: list[Heads] = []
    share = -1.0
    for plan in found:
        if plan.share >= share + 1 / _GRID or plan is found[-1]:
            share = plan.share
            chosen.append(policies(plan.choices, every))
    return chosen


def by_evidence(streaming: Policy, combined: Scores) -> list[Heads]:
    """The heads with the least evidence are streaming, the others full: from all of them to none."""
    order = np.argsort(combined, axis=None, kind="stable")
    total = len(order)
    chosen = []
    for count in sorted({round(total * step / _GRID) for step in range(_GRID + 1)}, reverse=True):
        choices = np.ones(total, np.int64)
        choices[order[:count]] = 0
        chosen.append(policies(choices.reshape(combined.shape), [streaming, Full()]))
    return chosen


def choose(
    candidates: Sequence[Heads],
    measure: Callable[[Heads], Quality],
    target: Target,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Trial | None, list[Trial]]:
    """The candidate that keeps least of those found to meet the target, and all that were tried.

    Bisection: it takes candidates in order of what they keep, and that more keeps quality. The last, full everywhere,
    is not tried; None says that none before it was found good enough.
    """
    low, high = 0, len(candidates) - 1
    rounds = max(1, (high - low).bit_length())
    best: Trial | None = None
    trials: list[Trial] = []
    while low < high:
        middle = (low + high) // 2
        trial = Trial(candidates[middle], measure(candidates[middle]))
        trials.append(trial)
        if target.met(trial.quality):
            best, high = trial, middle
        else:
            low = middle + 1
        report(len(trials), max(rounds, len(trials)))
    return best, trials
