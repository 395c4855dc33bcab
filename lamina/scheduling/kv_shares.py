"""Shares of a sequence, and pages counted by holder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Share:
    """What one holder keeps of a sequence: KV heads `heads` at positions [lo, hi); `lo` is where a page begins."""

    holder: int
    heads: tuple[int, ...]
    lo: int
    hi: int


Layout = tuple[Share, ...]
"""All shares of one sequence: for each head their ranges are disjoint, and begin at 0 without a gap."""


class Pages(dict[int, int]):
    """Pages by holder. A missing holder has none; a difference can be negative."""

    def __add__(self, other: Mapping[int, int]) -> Pages:
        result = Pages(self)
        for holder, pages in other.items():
            result._set(holder, result.get(holder, 0) + pages)
        return result

    def __sub__(self, other: Mapping[int, int]) -> Pages:
        result = Pages(self)
        for holder, pages in other.items():
            result._set(holder, result.get(holder, 0) - pages)
        return result

    def __mul__(self, times: int) -> Pages:
        return Pages({holder: pages * times for holder, pages in self.items() if pages * times})

    def _set(self, holder: int, pages: int) -> None:
        if pages:
            self[holder] = pages
        else:
            self.pop(holder, None)

    def covers(self, needed: Mapping[int, int]) -> bool:
        """Whether every holder has the pages that are needed of it, 0 or fewer always."""
        return all(pages <= 0 or self.get(holder, 0) >= pages for holder, pages in needed.items())


NO_PAGES = Pages()


class Layouts(Protocol):
    """Where a sequence could be kept at present. `placement.Placement` implements it."""

    @property
    def capacity(self) -> Pages:
        """All pages of every holder that takes sequences."""

    def layouts(self, length: int, tokens: int = 0, beside: Iterable[tuple[Layout, int]] = ()) -> tuple[Layout, ...]:
        """Every possible layout of a new sequence of `tokens` tokens that grows up to `length`. The first goes best
        with the layouts and tokens of the sequences `beside` it. Empty where there is no holder."""

    def opened(self, layout: Layout) -> None:
        """A new sequence is kept in this layout, so that the next one may get another."""

    def reads_locally(self, length: int) -> bool:
        """Whether `length` tokens could be computed, or computed again, with their KV in a prefill pool."""

    def substitute(self, share: Share, free: Pages) -> Share | None:
        """`share` of a lost holder at another one, given the free pages. None where no holder can have it."""
