"""What a holder keeps of a sequence (`KvPart`), the parts of one pool, and the pages that they share (`PagePool`).

The page pool knows which pages are free and how many parts share each, but no part and no page's content. Each change
of the parts appends to `_undo` what takes it back, so that an announcement is taken as a whole or not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from lamina_protocols.messages.layers import HolderConfig
from lamina_workers.errors import KVError, PoolExhausted
from lamina_workers.kv_pages.head_policies import Group, HeadPolicies, lowest_length, returns_to

Int32 = npt.NDArray[np.int32]
NO_PAGE = -1  # where a table names none


class PagePool:
    """`n_pages` pages. Each change appends to `undo` what takes it back; they are taken back in reverse order.

    `shares` counts how often pages were shared: as long as it stays the same, no part has got a page beside its owner.
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
        """How many pages are in no part."""
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

        An unused pool gives the pages of a new one. Where pages lie decides how kernels group their sums, so
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
        """One part less has each of these pages. Those that no part has any more are free."""
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


_PART = 8 << 10  # bytes that a part counts for besides its tables, which forks do not share
_LEAST_TABLES = 64 << 20  # bytes of parts that every pool takes; more only where its pages take as many


class Tabled(Protocol):
    """A part, whose tables take `nbytes` bytes."""

    @property
    def nbytes(self) -> int: ...


P = TypeVar("P", bound=Tabled)


class PartTable(Generic[P]):
    """What the stores of KV and of states have in common. `n_pages`: of the pool."""

    def __init__(self, config: HolderConfig, n_pages: int) -> None:
        self.config = config
        self.n_pages = n_pages
        self._parts: dict[int, P] = {}
        self._tables = 0  # bytes of all parts and their tables
        self._undo: list[Callable[[], None]] = []
        self._pool = PagePool(n_pages, self._undo)

    @property
    def free_pages(self) -> int:
        """How many pages no part holds."""
        return self._pool.free

    @property
    def references(self) -> Int32:
        """How many parts have each page, `[n_pages]`: a view, for reading."""
        return self._pool.references

    def parts(self) -> dict[int, P]:
        """All parts by handle, as they are now. May be called from any thread."""
        return dict(self._parts)

    def has(self, handle: int) -> bool:
        """Whether there is a part of that handle."""
        return handle in self._parts

    def part(self, handle: int) -> P:
        """The part of a handle. Raises KVError where there is none."""
        try:
            return self._parts[handle]
        except KeyError:
            raise KVError(f"no part has handle {handle}") from None

    def revert(self) -> None:
        """Take back the last update."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _insert(self, handle: int, part: P) -> None:
        if handle in self._parts:
            raise KVError(f"handle {handle} is in use; handles are never reused")
        if self._tables + _bytes(part) > max(_LEAST_TABLES, self.config.kv_memory):
            raise PoolExhausted(f"part {handle} is one too many: {len(self._parts)} others count {self._tables} bytes")
        self._count(_bytes(part))
        self._parts[handle] = part
        self._undo.append(lambda: self._parts.__delitem__(handle))

    def _remove(self, handle: int) -> P:
        part = self.part(handle)
        del self._parts[handle]
        self._undo.append(lambda: self._parts.update({handle: part}))
        self._count(-_bytes(part))
        return part

    def _count(self, size: int) -> None:
        self._tables += size
        self._undo.append(lambda: setattr(self, "_tables", self._tables - size))

    def _check_tables(self) -> None:
        """Raise KVError unless the bytes of all parts are those counted."""
        if self._tables != sum(map(_bytes, self._parts.values())):
            raise KVError(f"{len(self._parts)} parts count {self._tables} bytes")


def _bytes(part: Tabled) -> int:
    return _PART + part.nbytes


NEVER = 1 << 62


@dataclasses.dataclass(slots=True)
class KvPart:
    """What this holder keeps of one sequence: KV heads `heads`, positions [lo, held) of at most [lo, hi). There are
    pages up to `held`, and KV in every layer up to `stored`: they differ while a batch is under way, and after one that
    did not end with all its layers. `policies` say what is read of it and kept."""

    policies: HeadPolicies
    heads: tuple[int, ...]
    lo: int
    hi: int
    held: int
    stored: int
    table: Int32  # [layers, len(heads), capacity]
    freed: Int32  # [layers, len(heads)]: slots below this hold nothing, but for what stays
    absent: int | None = 0  # slots below `held`, of all layers and heads, without a page; None: not counted yet
    frees_from: int | None = None  # the lowest start of a row for which pages are freed; None: not known yet

    @property
    def groups(self) -> tuple[Group, ...]:
        """Its cells by policy, where anything is freed while it lives."""
        return self.policies.retention.groups(self.heads)

    def floor(self, size: int) -> int:
        """The lowest length to which it can return, where a page has `size` tokens: there all that any query sees is
        still held."""
        freed_by_group = ((group, int(self.freed[group.cells].max())) for group in self.groups)
        return max(
            (lowest_length(group.policy, self.lo, freed, size) for group, freed in freed_by_group if freed), default=0
        )

    def next_free(self, size: int) -> int:
        """The lowest start of a row for which pages are freed, as far as some have been by now."""
        if self.frees_from is None:
            least = ((group, self.lo + (int(self.freed[group.cells].min()) + 1) * size) for group in self.groups)
            self.frees_from = min((returns_to(group.policy, position) for group, position in least), default=NEVER)
        return self.frees_from

    def pages(self, size: int) -> tuple[int, int]:
        """How many pages of `size` tokens it holds, and how many keeping everything would take."""
        slots = -(-(self.held - self.lo) // size)
        if self.absent is None:
            self.absent = int(np.count_nonzero(self.table[:, :, :slots] == NO_PAGE))
        page_count = self.freed.size * slots
        return page_count - self.absent, page_count

    @property
    def nbytes(self) -> int:
        """Of its tables."""
        return self.table.nbytes + self.freed.nbytes


def staying(part: KvPart, size: int) -> npt.NDArray[np.bool_]:
    """The slots of every layer and head, `[layers, heads, capacity]`, that are held behind what was freed."""
    slots = np.arange(part.table.shape[2])
    stay = np.zeros(part.table.shape, np.bool_)
    for group in part.groups:
        stay[group.cells] = group.policy.stays(part.lo + slots * size)
    return stay


@dataclasses.dataclass(frozen=True, slots=True)
class Reservation:
    """What one accepted batch may write: pages to copy before the first write, and each part's floor."""

    copies_from: Int32  # [n] pages whose content the first writer must keep
    copies_to: Int32  # [n] pages that take it
    floors: tuple[int, ...]  # per row
