"""Layouts: every head and position has exactly one keeper, in proportion to what each holder can keep."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import EngineError
from lamina.kv.kv_shares import SHARDS, Share, apportion, layout


@given(
    shard=st.sampled_from(SHARDS),
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    heads=st.integers(1, 9),
    length=st.integers(1, 200),
    page_size=st.sampled_from([4, 16]),
)
def test_layout_gives_every_head_and_position_one_holder(
    shard: str, weights: list[int], heads: int, length: int, page_size: int
) -> None:
    end = 256
    shares = layout(shard, list(enumerate(weights)), range(heads), length, page_size, end)
    for head in range(heads):
        at = 0
        for share in sorted((share for share in shares if head in share.heads), key=lambda share: share.lo):
            assert share.lo == at < share.hi
            assert share.lo % page_size == 0
            at = share.hi
        assert at == end
    assert len({share.holder for share in shares}) == len(shares)


def test_layout_follows_the_weights_of_the_workers() -> None:
    two = layout("heads", [(1, 1), (2, 1)], range(3), 100, 16, 512)
    assert two == (Share(1, (0, 1), 0, 512), Share(2, (2,), 0, 512))
    unlike = layout("heads", [(1, 1), (2, 3)], range(8), 100, 16, 512)
    assert [len(share.heads) for share in unlike] == [2, 6]
    ranges = layout("sequence", [(1, 1), (2, 3)], range(8), 400, 100, 512)
    assert [(share.lo, share.hi) for share in ranges] == [(0, 100), (100, 512)]
    both = layout("heads+sequence", [(n, 1) for n in range(4)], range(4), 64, 16, 128)
    assert [(share.heads, share.lo, share.hi) for share in both] == [
        ((0, 1), 0, 32), ((0, 1), 32, 128), ((2, 3), 0, 32), ((2, 3), 32, 128),
    ]  # fmt: skip


def test_layout_leaves_workers_out_when_there_are_more_than_shares() -> None:
    assert len(layout("heads", [(n, 1) for n in range(5)], range(3), 10, 16, 64)) == 3
    assert len(layout("sequence", [(n, 1) for n in range(5)], range(3), 10, 16, 64)) == 1
    assert layout("heads", [], range(3), 10, 16, 64) == ()


@given(st.integers(0, 1000), st.lists(st.integers(0, 100), min_size=1, max_size=9).filter(any))
def test_apportioned_numbers_are_exact_and_close(total: int, weights: list[int]) -> None:
    counts = apportion(total, weights)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1


def test_layout_refuses_an_unknown_shard_and_weights_without_a_sum() -> None:
    with pytest.raises(EngineError, match="shard is 'rows', allowed: heads, sequence"):
        layout("rows", [(1, 1)], range(3), 10, 16, 64)
    with pytest.raises(EngineError, match="no sum"):
        apportion(3, [0, 0])
