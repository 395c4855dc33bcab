"""Which policies calibration tries, by what they keep: a window of its own for each head, or everything.

The search is greedy: it widens the window that gives most for the tokens it costs. Steps along each head's convex hull
are optimal for every budget that they end at, and nearly so between. There is one length and one budget, so it needs no
integer program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lamina.measure.calibration.evidence import Evidence
from lamina.measure.calibration.scores import Scores
from lamina.policy_file import Heads, kept
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import Policy
from lamina_workers.policies.streaming import Streaming

GRID = 40  # candidates, at most, between nothing and everything
_FRACTIONS = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of the context
_UNIT = 32  # tokens that windows are multiples of: a page

Choices = npt.NDArray[np.int64]


def options_at(context: int, sink: int) -> list[Policy]:
    """What a head may be instead of full, cheapest first: `sink` tokens and the last ones, a part of `context`."""
    sizes = sorted({max(_UNIT, round(context * fraction / _UNIT) * _UNIT) for fraction in _FRACTIONS})
    return [Streaming(sink, size) for size in sizes]


def candidates(allowed: Sequence[Policy], evidence: Evidence, context: int) -> list[Heads]:
    """Policies for all heads, in order of what they keep at `context` tokens; the last is full everywhere.

    The evidence has the influence of each of `allowed`. All of it together tilts the influence by a factor of 0.5 to
    1.5: influence is measured at a few hundred tokens, and says little of heads that those did not need.
    """
    every, combined = [*allowed, Full()], evidence.combined()
    tilted = np.concatenate([evidence.influence * (0.5 + combined), np.zeros((1, *combined.shape))])
    all_plans = plans(tilted, [kept(str(policy), context) for policy in every])
    chosen: list[Heads] = []
    share = -1.0
    for plan in all_plans:
        if plan.share >= share + 1 / GRID or plan is all_plans[-1]:
            share = plan.share
            chosen.append(policies(plan.choices, every))
    return chosen


@dataclass(frozen=True, slots=True)
class Plan:
    """Which of the options each head takes, int64 `[layers, kv_heads]`, and the share of the KV that this keeps."""

    choices: Choices
    share: float


def plans(influence: Scores, costs: Sequence[int]) -> list[Plan]:
    """Every plan on the way from the cheapest option for all heads to the dearest, in that order.

    `influence` `[options, layers, kv_heads]`, least for the last option; `costs` ascending, in tokens kept.
    """
    options, layers, heads = influence.shape
    if len(costs) != options or any(low >= high for low, high in pairwise(costs)):
        raise ValueError(f"costs are {list(costs)}; allowed are {options}, ascending")
    flat = influence.reshape(options, -1)
    steps = []  # (how much a token is worth, head, from, to)
    for head in range(layers * heads):
        hull = _hull(flat[:, head], costs)
        for low, high in pairwise(hull):
            worth = (flat[low, head] - flat[high, head]) / (costs[high] - costs[low])
            steps.append((worth, head, high))
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    choices = np.zeros(layers * heads, np.int64)
    path = [_plan(choices, costs, (layers, heads))]
    for _, head, high in steps:
        choices[head] = high
        path.append(_plan(choices, costs, (layers, heads)))
    return path


def _hull(influence: Scores, costs: Sequence[int]) -> list[int]:
    """The options on the lower convex hull of influence over cost, the first and the last with them: each step along it
    is worth less a token than the one before."""
    hull: list[int] = []
    for option in range(len(costs)):
        while len(hull) > 1 and _worth(influence, costs, *hull[-2:]) <= _worth(influence, costs, hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _worth(influence: Scores, costs: Sequence[int], low: int, high: int) -> float:
    return float((influence[low] - influence[high]) / (costs[high] - costs[low]))


def _plan(choices: Choices, costs: Sequence[int], shape: tuple[int, int]) -> Plan:
    tokens = np.array(costs)[choices].sum()
    return Plan(choices.reshape(shape).copy(), float(tokens / (costs[-1] * len(choices))))


def policies(choices: Choices, options: Sequence[Policy]) -> Heads:
    """What the choices mean, as a policy file has it."""
    return tuple(tuple(str(options[choice]) for choice in layer) for layer in choices)
