"""Combinations that cover all pairs of values."""

from __future__ import annotations

import itertools

import pytest
from pairwise import covering, crossing


@pytest.mark.parametrize("sizes", [(3,), (2, 3), (2, 2, 7, 2), (5, 4, 3), (2,) * 6])
def test_each_pair_of_values_is_in_one_of_the_combinations(sizes: tuple[int, ...]) -> None:
    found = list(covering(sizes))
    for first, second in itertools.combinations(range(len(sizes)), 2):
        pairs = {(combination[first], combination[second]) for combination in found}
        assert pairs == set(itertools.product(range(sizes[first]), range(sizes[second])))
    assert {combination[0] for combination in found} == set(range(sizes[0]))
    assert len(set(found)) == len(found)


def test_crossing_runs_all_combinations_and_few_of_them_always() -> None:
    mark = crossing(left={"one": 1, "two": 2}, middle=(3, 4), right=("a", "b", "c")).mark
    assert mark.args[0] == ("left", "middle", "right")
    assert [param.values for param in mark.args[1]] == list(itertools.product((1, 2), (3, 4), "abc"))
    assert mark.args[1][0].id == "one-3-a"
    assert sum(not param.marks for param in mark.args[1]) < 12
