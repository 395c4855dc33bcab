"""The methods of calibration: which evidence each one needs, and which policies it tries, by what they keep.

windows    a window of its own for each head, by all evidence
streaming  one size of window or full, by DuoAttention's gates alone
razor      echo and induction heads stay full, the others have a window and a mean (RazorAttention)
moa        a window that grows with the context, by a rule for each head (MoA)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lamina.errors import InvalidRequest
from lamina.measure.calibration.evidence import Evidence
from lamina.measure.calibration.moa import check_solver, front, kept_shares, moa_lengths, moa_rules
from lamina.measure.calibration.selection import Rung
from lamina.measure.calibration.windows import GRID, policies, window_candidates, window_options
from lamina.policy_file import Heads
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import Policy
from lamina_workers.policies.razor import Razor
from lamina_workers.policies.streaming import Streaming

ECHO = 0.01  # of the KV heads, those with the most echo stay full (RazorAttention, arXiv 2407.15891, section 3.3)
INDUCTION = 0.14  # and those with the most induction
_DENSITIES = 24  # of MoA's programs, between the least and everything
_PLANS = 3  # of a front that are measured, until one is good enough


@dataclass(frozen=True, slots=True)
class Method(ABC):
    """One method at a context in tokens. `sink` and `recent` are the sizes of windows, where they are fixed."""

    needs: ClassVar[frozenset[str]]  # fields of Evidence
    in_decode: ClassVar[bool] = False  # whether its policies let go in decode alone, where they must be measured

    context: int
    sink: int
    recent: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Where influence and quality are measured, ascending."""
        return (self.context,)

    @property
    @abstractmethod
    def options(self) -> list[Policy]:
        """What a head may be, whose influence is measured; or what it may be instead of full."""

    @abstractmethod
    def rungs(self, evidence: Evidence) -> list[Rung]:
        """Candidates in order of what they keep; the last is full everywhere."""


class Windows(Method):
    """Windows are widened where that gives most for what it costs."""

    needs = frozenset({"echo", "induction", "mean_attention", "alpha", "influence"})

    @property
    def options(self) -> list[Policy]:
        return window_options(self.context, self.sink)

    def rungs(self, evidence: Evidence) -> list[Rung]:
        found = window_candidates(self.options, evidence.influence[0], evidence.combined(), self.context)
        return _one_each(found)


class Gated(Method):
    """The heads with the least alpha are streaming, the others full: from all of them to none."""

    needs = frozenset({"alpha"})

    @property
    def options(self) -> list[Policy]:
        return [Streaming(self.sink, self.recent)]

    def rungs(self, evidence: Evidence) -> list[Rung]:
        order = np.argsort(evidence.alpha, axis=None, kind="stable")
        counts = sorted({round(len(order) * step / GRID) for step in range(GRID + 1)}, reverse=True)
        every = [*self.options, Full()]
        return _one_each([_with_full(evidence.alpha.shape, order[count:], every) for count in counts])


class Retrieving(Method):
    """Full are 1 % of the KV heads by echo and 14 % by induction, as published; then more by induction."""

    needs = frozenset({"echo", "induction"})
    in_decode = True

    @property
    def options(self) -> list[Policy]:
        return [Razor(self.sink, self.recent)]

    def rungs(self, evidence: Evidence) -> list[Rung]:
        by_echo, by_induction = (
            np.argsort(-scores, axis=None, kind="stable") for scores in (evidence.echo, evidence.induction)
        )
        total = len(by_echo)
        least, echoing = max(1, round(INDUCTION * total)), by_echo[: max(1, round(ECHO * total))]
        counts = sorted({*(round(total * step / GRID) for step in range(GRID + 1)), least, total})
        every = [*self.options, Full()]
        return _one_each(
            [
                _with_full(evidence.echo.shape, np.union1d(echoing, by_induction[:count]), every)
                for count in counts
                if count >= least
            ]
        )


class Growing(Method):
    """Plans of rules, of the integer programs at one density after the other."""

    needs = frozenset({"influence"})

    @property
    def lengths(self) -> tuple[int, ...]:
        return moa_lengths(self.context)

    @property
    def options(self) -> list[Policy]:
        return moa_rules(self.lengths)

    def rungs(self, evidence: Evidence) -> list[Rung]:
        every = self.options
        shares = kept_shares(every, self.lengths)
        least = float(shares.max(0).min())

        def plans(density: float) -> list[Heads]:
            return [policies(each, every) for each in front(evidence.influence, shares, density)[:_PLANS]]

        full: Heads = ((str(Full()),) * evidence.influence.shape[3],) * evidence.influence.shape[2]
        densities = np.linspace(least, 1, _DENSITIES + 1)[1:-1]
        return [*(partial(plans, float(density)) for density in densities), lambda: [full]]


METHODS: dict[str, type[Method]] = {"windows": Windows, "streaming": Gated, "razor": Retrieving, "moa": Growing}


def method_of(name: str) -> type[Method]:
    """The method of that name. Raises InvalidRequest, and PolicyError where its solver is missing."""
    if name not in METHODS:
        raise InvalidRequest(f"method is {name!r:.40}; allowed are {', '.join(METHODS)}")
    if METHODS[name] is Growing:
        check_solver()
    return METHODS[name]


def _with_full(shape: tuple[int, ...], full: npt.NDArray[np.int64], every: Sequence[Policy]) -> Heads:
    """The second of `every` for the heads of these numbers, the first for the others."""
    choices = np.zeros(math.prod(shape), np.int64)
    choices[full] = 1
    return policies(choices.reshape(shape), every)


def _one_each(candidates: Sequence[Heads]) -> list[Rung]:
    def rung(heads: Heads) -> list[Heads]:
        return [heads]

    return [partial(rung, heads) for heads in candidates]
