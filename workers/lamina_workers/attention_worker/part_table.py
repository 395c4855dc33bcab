"""The parts of one pool by handle, the pages that they share, and the bytes that their tables take.

Each change appends to `_undo` what takes it back, so that an announcement is taken whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from lamina_protocols.messages.layers import HolderConfig
from lamina_workers.attention_worker.page_pool import Int32, PagePool
from lamina_workers.errors import KVError, PoolExhausted

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
