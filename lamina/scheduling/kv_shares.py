"""Who keeps what of a sequence, and pages counted by holder. Pure nouns: knows no message, no plan, no request."""

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
"""Everything of one sequence: for each head the shares' ranges are disjoint, and begin at 0 without a gap."""


class Pages(dict[int, int]):
    """Pages by holder. A holder that is not in it has none; a difference can be negative."""

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
        """Whether every holder has as many as are needed of it. Nothing needed of a holder is always there."""
        return all(pages <= 0 or self.get(holder, 0) >= pages for holder, pages in needed.items())


NO_PAGES = Pages()


class Layouts(Protocol):
    """Who would keep a sequence, as things are now. `placement.Placement` is the real one."""

    @property
    def capacity(self) -> Pages:
        """All pages of every holder that takes sequences."""

    def layouts(self, length: int, tokens: int = 0, beside: Iterable[tuple[Layout, int]] = ()) -> tuple[Layout, ...]:
        """Shares for a new sequence of `tokens` tokens that will have up to `length`, in every way that there is, the
        one first that goes best with the layouts and tokens of those `beside` it. None where there is no holder."""

    def reads_locally(self, length: int) -> bool:
        """Whether so many tokens could be computed, or computed again, with their KV in the engine's process."""

    def substitute(self, share: Share, free: Pages) -> Share | None:
        """Who takes over `share`, whose holder is gone, given the pages that the others have free."""
