"""Tests over several axes: the fast set runs so many of their combinations that each pair of values occurs in one, and
`scripts/test --all` runs all of them. Most faults need two values to meet (Kuhn, Wallace, Gallo 2004, "Software fault
interactions and implications for software testing")."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest

Combination = tuple[int, ...]  # of each axis the number of its value


def crossing(indirect: Sequence[str] = (), **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """`parametrize` over all combinations of the axes, those outside of a covering set marked soak. The values of a
    mapping are named by its keys, others by themselves. `indirect` are axes that are fixtures."""
    names: list[list[str]] = []
    values: list[list[Any]] = []
    for axis in axes.values():
        names.append([str(value) for value in axis])  # a mapping's are its keys
        values.append(list(axis.values() if isinstance(axis, Mapping) else axis))
    sizes = [len(axis) for axis in values]
    fast = set(covering(sizes))
    return pytest.mark.parametrize(
        tuple(axes),
        [
            pytest.param(
                *(axis[at] for axis, at in zip(values, combination, strict=True)),
                id="-".join(axis[at] for axis, at in zip(names, combination, strict=True)),
                marks=() if combination in fast else pytest.mark.soak,
            )
            for combination in itertools.product(*map(range, sizes))
        ],
        indirect=list(indirect),
    )


def covering(sizes: Sequence[int]) -> Iterator[Combination]:
    """Combinations of which each pair of values of two axes of such sizes is in one: always the one next that has most
    of the pairs that are left. A single axis gives each of its values."""
    combinations = list(itertools.product(*map(range, sizes)))
    left = set().union(*map(_pairs, combinations))
    while left:
        best = max(combinations, key=lambda combination: len(_pairs(combination) & left))
        left -= _pairs(best)
        yield best


def _pairs(combination: Combination) -> set[tuple[tuple[int, int], ...]]:
    width = min(2, len(combination))
    return set(itertools.combinations(enumerate(combination), width))
