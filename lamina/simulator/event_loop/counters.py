"""A holder that counts pages and records instead of keeping KV and states (`HolderCounter`). It gets the operations and
rows of a real holder, and answers as that would: what an attention worker would fork, copy, share, free and refuse.

Pages are counted as `KVStore` does (`PageCounter`): a page is of one layer and one KV head, and shared by reference
count. Heads that a part has, and layers that keep alike, go together.

Records hold states (`RecordCounter`): a record is of one layer, one head and one position of a sequence. A part has
those at the end of its last row and at its start. It writes those of its next row over older ones that it shares with
no other part. Heads that a part has, and layers, go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lamina.errors import EngineError
from lamina_protocols.messages.messages import Bound, Close, Fork, Open, Operation, Row
from lamina_protocols.messages.routes import HolderBatch


class HolderCounter:
    """A holder with these pools, in their order. Unlike a worker it keeps the operations of a batch that it refuses;
    they are numbered, and not applied again."""

    def __init__(self, pools: Sequence[PageCounter | RecordCounter]) -> None:
        self._pools = tuple(pools)
        self._applied = 0
        self._pool: dict[int, int] = {}  # by handle, of a part

    @property
    def free(self) -> tuple[int, ...]:
        """Pages that are left in each pool."""
        return tuple(pool.free for pool in self._pools)

    def grow(self, pages: Sequence[int]) -> None:
        """There are so many free pages more in each pool, or fewer."""
        for pool, more in zip(self._pools, pages, strict=True):
            pool.free += more

    def take(self, share: HolderBatch) -> list[int] | None:
        """Apply the operations, and reserve for the rows: all of them, then the floor of each row's part, or none."""
        for operation in share.operations[max(0, self._applied - share.first) :]:
            self._pools[self._pool_of(operation)].apply(operation)
        self._applied = max(self._applied, share.first + len(share.operations))
        rows: list[list[Row]] = [[] for _ in self._pools]
        for route in share.routes:
            rows[route.pool].append(route.row)
        fits = [pool.reserve(of_pool) for pool, of_pool in zip(self._pools, rows, strict=True)]
        if not all(fits):
            return None
        for pool, of_pool in zip(self._pools, rows, strict=True):
            pool.take(of_pool)
        return [self._pools[route.pool].floor(route.row.handle) for route in share.routes]

    def _pool_of(self, operation: Operation) -> int:
        match operation:
            case Open(handle, pool):
                self._pool[handle] = pool
            case Fork(handle, parent):
                self._pool[handle] = pool = self._pool[parent]
            case Close(handle):
                pool = self._pool.pop(handle)
            case Bound(handle):
                pool = self._pool[handle]
        return pool


@dataclass(frozen=True, slots=True)
class Window:
    """What layers, or a policy, with a window of the last `tokens` keep: a `Retention` of `scheduling.page_groups`."""

    tokens: int

    def staying(self, first: int, end: int, size: int) -> int:
        return 0

    def seen_from(self, start: int) -> int:
        return max(0, start - self.tokens + 1)

    def returns_to(self, position: int) -> int:
        """The lowest start whose queries see nothing below `position`."""
        return position + self.tokens - 1


Groups = Sequence[tuple[int, Window | None]]
"""How many layers keep what: None everything."""


class PageCounter:
    """A pool of which `free` of `pages` pages of `page_size` tokens are left, in layers of these groups."""

    def __init__(self, pages: int, page_size: int, groups: Groups) -> None:
        self.free = pages
        self._size = page_size
        self._groups = groups
        self._lets_go = any(window is not None for _, window in groups)
        self._uses: list[int] = []  # by number, of sets of pages that go together
        self._spare: list[int] = []  # numbers that are free again
        self._parts: dict[int, _PagePart] = {}
        self._growing: list[tuple[_PagePart, Row]] = []  # of the rows that `take` is for

    def reserve(self, rows: Sequence[Row]) -> bool:
        """Whether there are pages for these rows; they are taken by `take`. What no row sees any more is let go."""
        size, parts = self._size, self._parts
        self._growing = growing = [
            (parts[row.handle], row)
            for row in rows
            if row.store and (self._lets_go or row.start % size == 0 or row.count > 1 or parts[row.handle].shared)
        ]
        for part, row in growing:
            self._let_go(part, row.start)
        return sum(self._wanted(part, row) for part, row in growing) <= self.free

    def take(self, rows: Sequence[Row]) -> None:
        """Take the pages of the rows that were reserved for."""
        for part, row in self._growing:
            self._grow(part, row)

    def floor(self, handle: int) -> int:
        """How far back a part can be cut: there all that a query sees must still be held."""
        return self._floor(self._parts[handle]) if self._lets_go else 0

    def _let_go(self, part: _PagePart, start: int) -> None:
        """Free what no query at `start` or later sees."""
        for run, (_, window) in zip(part.runs, self._groups, strict=True):
            if window is None:
                continue
            first = (window.seen_from(start) - part.lo) // self._size
            excess = min(first - run.first, len(run.pages))
            if excess > 0:
                for page in run.pages[:excess]:
                    self._release(page, run.cells)
                del run.pages[:excess]
                run.first += excess

    def _floor(self, part: _PagePart) -> int:
        lowest = 0
        for run, (_, window) in zip(part.runs, self._groups, strict=True):
            if run.first and window is not None:
                lowest = max(lowest, window.returns_to(part.lo + run.first * self._size))
        return lowest

    def _wanted(self, part: _PagePart, row: Row) -> int:
        """Pages that the row needs: new ones, and copies of shared ones that it writes into."""
        end = self._end(part, row)
        count = 0
        for run in part.runs:
            count += run.cells * (max(0, end - run.first - len(run.pages)) + self._copies(part, run, row))
        return count

    def _grow(self, part: _PagePart, row: Row) -> None:
        end = self._end(part, row)
        for run in part.runs:
            if self._copies(part, run, row):
                self._release(run.pages.pop(), run.cells)
            while run.first + len(run.pages) < end:
                run.pages.append(self._new(run.cells))
        part.shared = False

    def _end(self, part: _PagePart, row: Row) -> int:
        """Pages that the part has after the row, counted from its first position."""
        return -(-max(0, min(row.start + row.count, part.hi) - part.lo) // self._size)

    def _copies(self, part: _PagePart, run: _Run, row: Row) -> bool:
        """Whether the row writes into a page that others have too."""
        is_partial = part.shared and max(0, row.start - part.lo) % self._size > 0
        return is_partial and bool(run.pages) and self._uses[run.pages[-1]] > 1

    def apply(self, operation: Operation) -> None:
        match operation:
            case Open(handle, _, heads, lo, hi):
                self._parts[handle] = _PagePart(
                    lo, hi, [_Run(layers * len(heads), 0, []) for layers, _ in self._groups]
                )
            case Fork(handle, parent, length):
                source = self._parts[parent]
                inside = max(0, min(length, source.hi) - source.lo)
                end = -(-inside // self._size)
                runs = [
                    _Run(run.cells, min(run.first, end), run.pages[: max(0, end - run.first)]) for run in source.runs
                ]
                for run, source_run in zip(runs, source.runs, strict=True):
                    for page in run.pages:
                        self._uses[page] += 1
                    source.shared = source.shared or len(run.pages) == len(source_run.pages)
                self._parts[handle] = _PagePart(source.lo, source.hi, runs, inside % self._size > 0)
            case Close(handle):
                for run in self._parts.pop(handle).runs:
                    for page in run.pages:
                        self._release(page, run.cells)
            case Bound(handle, hi):
                part = self._parts[handle]
                part.hi = hi
                for run in part.runs:
                    while run.pages and run.first + len(run.pages) > (hi - part.lo) // self._size:
                        self._release(run.pages.pop(), run.cells)
            case _:
                raise EngineError(f"{operation} is none that the simulator makes")

    def _new(self, cells: int) -> int:
        self.free -= cells
        if self._spare:
            page = self._spare.pop()
            self._uses[page] = 1
            return page
        self._uses.append(1)
        return len(self._uses) - 1

    def _release(self, page: int, cells: int) -> None:
        self._uses[page] -= 1
        if not self._uses[page]:
            self._spare.append(page)
            self.free += cells


class _Run:
    """The pages of a part in layers that keep alike: `cells` at a time, one for each layer and head, from the part's
    page `first` on."""

    __slots__ = ("cells", "first", "pages")

    def __init__(self, cells: int, first: int, pages: list[int]) -> None:
        self.cells, self.first, self.pages = cells, first, pages


class _PagePart:
    __slots__ = ("hi", "lo", "runs", "shared")

    def __init__(self, lo: int, hi: int, runs: list[_Run], shared: bool = False) -> None:
        self.lo, self.hi, self.runs = lo, hi, runs
        self.shared = shared  # its last page may be another's too


class RecordCounter:
    """`free` of `pages` records are left, of so many layers."""

    def __init__(self, pages: int, layers: int) -> None:
        self.free = pages
        self._layers = layers
        self._parts: dict[int, _RecordPart] = {}

    def apply(self, operation: Operation) -> None:
        match operation:
            case Open(handle, _, heads):
                self._parts[handle] = _RecordPart(self._layers * len(heads), None, None)
            case Fork(handle, parent, length):
                source = self._parts[parent]
                origin = source.at(length)
                if origin is None and length:
                    raise EngineError(f"part {parent} was forked at {length}, where it has no states")
                if origin is not None:
                    origin.uses += 1
                self._parts[handle] = _RecordPart(source.cells, origin, origin)
            case Close(handle):
                part = self._parts.pop(handle)
                for record in part.owned():
                    self._release(part, record)
            case _:
                raise EngineError(f"{operation} is none that the simulator makes")

    def reserve(self, rows: Sequence[Row]) -> bool:
        """Whether there are records for these rows; they are taken by `take`."""
        return sum(part.cells for row in rows if not (part := self._parts[row.handle]).reuses(row.start)) <= self.free

    def take(self, rows: Sequence[Row]) -> None:
        """Give each row's part the records at the row's end, and let it keep those at its start."""
        for row in rows:
            part = self._parts[row.handle]
            source = part.at(row.start)
            if source is None and row.start:
                raise EngineError(f"{row} begins where its part has no states")
            for record in part.owned():
                if record is not source:
                    self._release(part, record)
            self.free -= part.cells
            part.earlier, part.last = source, _Record(row.start + row.count)

    def floor(self, handle: int) -> int:
        """How far back a part can be cut: to the start of its last row."""
        earlier = self._parts[handle].earlier
        return 0 if earlier is None else earlier.position

    def _release(self, part: _RecordPart, record: _Record) -> None:
        record.uses -= 1
        if not record.uses:
            self.free += part.cells


class _Record:
    """The states of all a part's layers and heads at one position, which parts share."""

    __slots__ = ("position", "uses")

    def __init__(self, position: int) -> None:
        self.position, self.uses = position, 1


class _RecordPart:
    """`last`, `earlier`: what it has, the same one in a new fork; None at position 0, where states are zeros."""

    __slots__ = ("cells", "earlier", "last")

    def __init__(self, cells: int, last: _Record | None, earlier: _Record | None) -> None:
        self.cells, self.last, self.earlier = cells, last, earlier

    def owned(self) -> list[_Record]:
        return [record for record in dict.fromkeys((self.last, self.earlier)) if record is not None]

    def at(self, position: int) -> _Record | None:
        return next((record for record in self.owned() if record.position == position), None)

    def reuses(self, start: int) -> bool:
        """Whether a row from `start` writes over records of the part's own."""
        return any(record.uses == 1 and record.position != start for record in self.owned())
