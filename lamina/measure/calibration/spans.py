"""Windows for heads under a budget: each step widens the window that gives the most for the tokens it costs.

MoA (arXiv 2406.14909, section 4) solves an integer program over the same numbers. Greedy steps along each head's
convex hull are optimal for every budget that they end at, and nearly so between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lamina.measure.calibration.scores import Scores
from lamina_workers.policies.policy import Policy

Choices = npt.NDArray[np.int64]


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
    found = [_plan(choices, costs, (layers, heads))]
    for _, head, high in steps:
        choices[head] = high
        found.append(_plan(choices, costs, (layers, heads)))
    return found


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
    kept = np.array(costs)[choices].sum()
    return Plan(choices.reshape(shape).copy(), float(kept / (costs[-1] * len(choices))))


def policies(choices: Choices, options: Sequence[Policy]) -> tuple[tuple[str, ...], ...]:
    """What the choices mean, as a policy file has it."""
    return tuple(tuple(str(options[choice]) for choice in layer) for layer in choices)
