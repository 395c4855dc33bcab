"""A holder of KV that keeps count instead of KV: what an attention worker would have free, fork, copy and refuse.

It is told what real ones are told, operations and rows, and owns pages by number and reference count as `KVStore` does,
for one layer and head that stand for all.
"""

from __future__ import annotations

from lamina.errors import EngineError
from lamina_protocols.messages import Close, Fork, Open, Operation, Row
from lamina_workers.routes import HolderShare


class PageCounter:
    """`free` of `pages` pages of `page_size` tokens are left. Unlike a worker it keeps the operations of a batch that
    it refuses; they are numbered, and not applied again."""

    def __init__(self, pages: int, page_size: int) -> None:
        self._size = page_size
        self._free = list(range(pages))
        self._uses = [0] * pages
        self._applied = 0
        self._parts: dict[int, _Part] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def parts(self) -> int:
        """How many parts are open."""
        return len(self._parts)

    def take(self, share: HolderShare) -> bool:
        """Apply the operations, and reserve for the rows: all of them, or none (False)."""
        for operation in share.operations[max(0, self._applied - share.first) :]:
            self._apply(operation)
        self._applied = max(self._applied, share.first + len(share.operations))
        size = self._size
        growing = []
        for route in share.routes:
            row = route.row
            if row.store and (row.start % size == 0 or row.count > 1 or self._parts[row.handle].shared):
                growing.append(row)
        wanted = [(self._parts[row.handle], *self._want(row)) for row in growing]
        if sum(more + copied for _, more, copied in wanted) > len(self._free):
            return False
        for part, more, copied in wanted:
            if copied:
                self._release(part.pages.pop())
            part.shared = False
            for _ in range(more + copied):
                page = self._free.pop()
                self._uses[page] = 1
                part.pages.append(page)
        return True

    def _want(self, row: Row) -> tuple[int, int]:
        """New pages that the row needs, and 1 if it writes into a page that others have too."""
        part = self._parts[row.handle]
        end = max(0, min(row.start + row.count, part.hi) - part.lo)
        begun = max(0, row.start - part.lo) % self._size > 0
        copied = part.shared and begun and self._uses[part.pages[-1]] > 1
        return -(-end // self._size) - len(part.pages), int(copied)

    def _apply(self, operation: Operation) -> None:
        match operation:
            case Open(handle, _, lo, hi):
                self._parts[handle] = _Part([], lo, hi)
            case Fork(handle, parent, length):
                source = self._parts[parent]
                end = max(0, min(length, source.hi) - source.lo)
                pages = source.pages[: -(-end // self._size)]
                for page in pages:
                    self._uses[page] += 1
                source.shared = source.shared or len(pages) == len(source.pages)
                self._parts[handle] = _Part(pages, source.lo, source.hi, shared=end % self._size > 0)
            case Close(handle):
                for page in self._parts.pop(handle).pages:
                    self._release(page)
            case _:
                raise EngineError(f"{operation} is none that the simulator makes")

    def _release(self, page: int) -> None:
        self._uses[page] -= 1
        if not self._uses[page]:
            self._free.append(page)


class _Part:
    __slots__ = ("hi", "lo", "pages", "shared")

    def __init__(self, pages: list[int], lo: int, hi: int, shared: bool = False) -> None:
        self.pages, self.lo, self.hi = pages, lo, hi
        self.shared = shared  # its last page may be another's too
