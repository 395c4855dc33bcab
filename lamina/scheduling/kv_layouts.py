"""How a sequence is cut over holders of different memory: by KV head, by range, or both. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from lamina.errors import EngineError
from lamina.scheduling.kv_shares import Layout, Share

SHARDS = ("heads", "sequence", "heads+sequence")


def layout(
    shard: str, holders: Sequence[tuple[int, int]], heads: Sequence[int], length: int, page_size: int, end: int
) -> Layout:
    """Shares of these KV heads and positions [0, end) for the holders, given as (number, weight), in their order.

    Ranges are whole pages, and spread a sequence of `length` tokens by weight; positions beyond go to the last holder.
    A holder whose range would be empty has no share. Empty without holders.
    """
    if shard not in SHARDS:
        raise EngineError(f"shard is {shard!r}, allowed: {', '.join(SHARDS)}")
    if not holders:
        return ()
    every = tuple(heads)
    if shard == "sequence":
        return _by_range(holders, every, length, page_size, end)
    if shard == "heads":
        groups = [[holder] for holder in holders]
    else:
        columns = max(1, min(len(every), round(len(holders) ** 0.5)))
        groups = [list(holders[column::columns]) for column in range(columns)]
    counts = apportion(len(every), [sum(weight for _, weight in group) for group in groups])
    shares: list[Share] = []
    for group, (first, last) in zip(groups, pairwise(accumulate(counts, initial=0)), strict=True):
        if first < last:
            shares += _by_range(group, every[first:last], length, page_size, end)
    return tuple(shares)


def _by_range(
    holders: Sequence[tuple[int, int]], heads: tuple[int, ...], length: int, page_size: int, end: int
) -> Layout:
    counts = apportion(-(-length // page_size), [weight for _, weight in holders])
    cuts = [min(end, pages * page_size) for pages in accumulate(counts, initial=0)]
    used = [(number, lo, hi) for (number, _), (lo, hi) in zip(holders, pairwise(cuts), strict=True) if lo < hi]
    return tuple(
        Share(number, heads, lo, end if at == len(used) - 1 else hi) for at, (number, lo, hi) in enumerate(used)
    )


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """`total` cut by weight into whole numbers (largest remainders; of equal ones the first)."""
    whole = sum(weights)
    if whole <= 0:
        raise EngineError(f"weights {list(weights)} have no sum to share by")
    exact = [total * weight / whole for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda at: counts[at] - exact[at])
    for at in by_remainder[: total - sum(counts)]:
        counts[at] += 1
    return counts
