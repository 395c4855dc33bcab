"""Shares of a sequence, how it is cut into them (`layout`), and pages counted by pool of a holder (`Pages`). Pure.

A sequence is cut over holders of different memory by KV head, by range, or both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

from lamina.errors import EngineError

GONE = -1
"""The number of a holder that stands for all lost ones."""

Place = tuple[int, int]
"""A pool of a holder: the holder's number, and the number of the pool there."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one holder keeps of a sequence in the layers of one pool: KV heads `heads` at positions [lo, hi); `lo` is
    where a page begins. `policy` is the sequence's, "" the engine's own. `at` is where that is."""

    holder: int
    heads: tuple[int, ...]
    lo: int
    hi: int
    pool: int = 0
    policy: str = ""
    at: Place = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", (self.holder, self.pool))


Layout = tuple[Share, ...]
"""All shares of one sequence: for each pool and head their ranges are disjoint, and begin at 0 without a gap."""


def under(layout: Layout, policy: str) -> Layout:
    """The layout for a sequence of that policy."""
    if all(share.policy == policy for share in layout):
        return layout
    return tuple(replace(share, policy=policy) for share in layout)


class Handover(NamedTuple):
    """A share of a sequence that grows elsewhere: it ends as `ended`, and what would have come to it comes to `taker`.
    None where it has nothing yet, so that all of it is the taker's."""

    share: Share
    ended: Share | None
    taker: Share


@dataclass(frozen=True, slots=True)
class Part:
    """A share, and the handle that it has at its holder."""

    handle: int
    share: Share


class Pages(dict[Place, int]):
    """Pages by pool of a holder. A missing pool has none; a difference can be negative."""

    @classmethod
    def of(cls, holder: int, pages: Iterable[int]) -> Pages:
        """Pages of one holder, by pool."""
        return cls({(holder, pool): count for pool, count in enumerate(pages) if count})

    def __add__(self, other: Mapping[Place, int]) -> Pages:
        result = Pages(self)
        for place, pages in other.items():
            result._set(place, result.get(place, 0) + pages)
        return result

    def __sub__(self, other: Mapping[Place, int]) -> Pages:
        result = Pages(self)
        for place, pages in other.items():
            result._set(place, result.get(place, 0) - pages)
        return result

    def __mul__(self, times: int) -> Pages:
        return Pages({place: pages * times for place, pages in self.items() if pages * times})

    def _set(self, at: Place, pages: int) -> None:
        if pages:
            self[at] = pages
        else:
            self.pop(at, None)

    def covers(self, needed: Mapping[Place, int]) -> bool:
        """Whether every pool has the pages that are needed of it, 0 or fewer always."""
        return all(pages <= 0 or self.get(place, 0) >= pages for place, pages in needed.items())

    def short_of(self, needed: Mapping[Place, int]) -> set[Place]:
        """The pools that have fewer pages than are needed of them."""
        return {place for place, pages in needed.items() if pages > max(0, self.get(place, 0))}


NO_PAGES = Pages()


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
        Share(number, heads, lo, end if index == len(used) - 1 else hi) for index, (number, lo, hi) in enumerate(used)
    )


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """`total` cut by weight into whole numbers (largest remainders; of equal ones the first)."""
    weight_sum = sum(weights)
    if weight_sum <= 0:
        raise EngineError(f"weights {list(weights)} have no sum to share by")
    exact = [total * weight / weight_sum for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts
