"""From evidence to a choice: candidates in order of what they keep, and the least that is measured to be good enough.

The caller gives the functions that measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lamina.measure.calibration.quality import Quality, Target
from lamina.policy_file import Heads

Rung = Callable[[], Sequence[Heads]]
"""Policies for all heads, made when they are asked for. There may be several that keep as much: the likeliest first."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Policies that were tried, and what was measured: at the longest context first, at others while it was enough."""

    heads: Heads
    qualities: tuple[Quality, ...]

    @property
    def quality(self) -> Quality:
        """That of the longest context."""
        return self.qualities[0]


def choose(
    rungs: Sequence[Rung],
    measures: Sequence[Callable[[Heads], Quality]],
    target: Target,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Trial | None, list[Trial]]:
    """The candidate that keeps least of those found to meet the target by every one of `measures`, and all that were
    tried.

    Bisection: it takes rungs in order of what they keep, and that more keeps quality. The last, full everywhere, is
    not tried; None says that none before it was found good enough.
    """
    low, high = 0, len(rungs) - 1
    rounds = max(1, (high - low).bit_length())
    best: Trial | None = None
    trials: list[Trial] = []
    done = 0
    while low < high:
        middle = (low + high) // 2
        for heads in rungs[middle]():
            trials.append(_trial(heads, measures, target))
            if all(map(target.met, trials[-1].qualities)):
                best, high = trials[-1], middle
                break
        else:
            low = middle + 1
        done += 1
        report(done, max(rounds, done))
    return best, trials


def _trial(heads: Heads, measures: Sequence[Callable[[Heads], Quality]], target: Target) -> Trial:
    qualities: list[Quality] = []
    for measure in measures:
        qualities.append(measure(heads))
        if not target.met(qualities[-1]):
            break
    return Trial(heads, tuple(qualities))
