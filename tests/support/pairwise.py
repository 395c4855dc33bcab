"""Tests over several axes: the fast set runs so many of their combinations that each pair of values occurs in one, and
`scripts/test --all` runs all of them. Most faults need two values to meet (Kuhn, Wallace, Gallo 2004, "Software fault
interactions and implications for software testing")."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest

Combination = tuple[int, ...]  # of each axis the number of its value


def crossing(
    indirect: Sequence[str] = (), marks: Sequence[pytest.MarkDecorator] = (), **axes: Iterable[Any]
) -> pytest.MarkDecorator:
    """`parametrize` over all combinations of the axes, those outside of a covering set marked soak. The values of a
    mapping are named by its keys, others by themselves. `indirect` are axes that are fixtures.
    `marks` are those of the covering set."""
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
                *(axis[number] for axis, number in zip(values, combination, strict=True)),
                id="-".join(axis[number] for axis, number in zip(names, combination, strict=True)),
                marks=marks if combination in fast else pytest.mark.soak,
            )
            for combination in itertools.product(*map(range, sizes))
        ],
        indirect=list(indirect),
    )


def covering(sizes: Sequence[int]) -> Iterator[Combination]:
    """Combinations of which each pair of values of two axes of such sizes is in one: always the first of those that
    have most of the pairs that are missing. A single axis gives each of its values."""
    combinations = list(itertools.product(*map(range, sizes)))
    missing = set().union(*map(_pairs, combinations))
    # What a combination adds never grows, so an old count that is still the largest needs no other to be counted again.
    heap = [(-len(missing), number) for number in range(len(combinations))]
    while missing:
        _, number = heapq.heappop(heap)
        pairs = _pairs(combinations[number]) & missing
        entry = (-len(pairs), number)
        if heap and heap[0] < entry:
            heapq.heappush(heap, entry)
            continue
        missing -= pairs
        yield combinations[number]


def _pairs(combination: Combination) -> set[tuple[tuple[int, int], ...]]:
    width = min(2, len(combination))
    return set(itertools.combinations(enumerate(combination), width))
