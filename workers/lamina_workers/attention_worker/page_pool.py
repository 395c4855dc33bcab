"""Pages by number: which are free, and how many parts share each. Knows no part, and nothing of a page's content."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lamina_workers.errors import KVError

Int32 = npt.NDArray[np.int32]
NO_PAGE = -1  # where a table names none


class PagePool:
    """`n_pages` pages. Each change appends to `undo` what takes it back; they are taken back in reverse order.

    `shares` counts how often pages were shared: as long as it stays the same, nobody has got a page beside its owner.
    """

    def __init__(self, n_pages: int, undo: list[Callable[[], None]]) -> None:
        if n_pages < 1:
            raise KVError(f"a pool of {n_pages} pages, at least 1 is needed")
        self.n_pages = n_pages
        self.shares = 0
        self._undo = undo
        self._references = np.zeros(n_pages, np.int32)
        self._stack = _in_order(n_pages)  # of free pages: the page freed last is warm
        self._free = n_pages
        self._mixed = False  # whether pages have come back to the stack

    @property
    def free(self) -> int:
        """How many pages nobody has."""
        return self._free

    @property
    def references(self) -> Int32:
        """How many parts have each page, `[n_pages]`: a view, for reading."""
        return self._references

    def shared(self, pages: Int32) -> npt.NDArray[np.bool_]:
        """Which of these pages several parts have."""
        several: npt.NDArray[np.bool_] = self._references[pages] > 1
        return several

    def take(self, n: int) -> Int32:
        """`n` pages, int32 `[n]`; there must be as many free. Two takes give the pages that one take of both gives.

        A pool that nobody uses gives the pages of a new one. Where pages lie decides how kernels group their sums, so
        an idle engine computes a request as it did the first time.
        """
        if self._mixed and self._free == self.n_pages:
            self._reorder()
        pages = self._stack[self._free - n : self._free][::-1].copy()

        def undo() -> None:  # the pages still stand above the top: an update releases before it takes
            self._references[pages] = 0
            self._free += n

        self._free -= n
        self._references[pages] = 1
        self._undo.append(undo)
        return pages

    def _reorder(self) -> None:
        stack, self._stack, self._mixed = self._stack, _in_order(self.n_pages), False

        def undo() -> None:
            self._stack, self._mixed = stack, True

        self._undo.append(undo)

    def share(self, pages: Int32) -> None:
        """One part more has each of these pages."""
        self.shares += 1
        self._references[pages] += 1
        self._undo.append(lambda: self._references.__setitem__(pages, self._references[pages] - 1))

    def leave(self, pages: Int32) -> None:
        """One part less has each of these pages, all of which others have too."""
        self._references[pages] -= 1
        self._undo.append(lambda: self._references.__setitem__(pages, self._references[pages] + 1))

    def release(self, pages: Int32) -> None:
        """One part less has each of these pages. Those that nobody has any more are free."""
        self._references[pages] -= 1
        returned = pages[self._references[pages] == 0]
        self._stack[self._free : self._free + returned.size] = returned
        self._free += returned.size
        self._mixed = True

        def undo() -> None:
            self._free -= returned.size
            self._references[pages] += 1

        self._undo.append(undo)

    def check_integrity(self, counted: Int32) -> None:
        """Raise KVError unless each page has as many references as were `counted`, and the others are free."""
        if (counted != self._references).any():
            page = int(np.flatnonzero(counted != self._references)[0])
            raise KVError(f"page {page} has {counted[page]} references, counted as {self._references[page]}")
        free, used = self._stack[: self._free], np.count_nonzero(self._references)
        if len(np.unique(free)) != self._free or self._references[free].any():
            raise KVError("the free stack holds a page twice, or one in use")
        if self._free + used != self.n_pages:
            raise KVError(f"{self._free} pages free, {used} used, of {self.n_pages}")


def _in_order(n_pages: int) -> Int32:
    """A stack of all pages, page 0 on top."""
    return np.arange(n_pages - 1, -1, -1, dtype=np.int32)
