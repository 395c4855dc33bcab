"""A pool of states that counts records instead of keeping them: those that an attention worker would take, share, free
and refuse.

A record is of one layer, one head and one position of a sequence. A part has those at the end of its last row and at
its start, and writes its next row's over older ones that it shares with none. Heads that a part has, and layers, go
together.
"""

from __future__ import annotations

from collections.abc import Sequence

from lamina.errors import EngineError
from lamina_protocols.messages.messages import Close, Fork, Open, Operation, Row


class RecordCounter:
    """`free` of `pages` records are left, of so many layers."""

    def __init__(self, pages: int, layers: int) -> None:
        self.free = pages
        self._layers = layers
        self._parts: dict[int, _Part] = {}

    def apply(self, operation: Operation) -> None:
        match operation:
            case Open(handle, _, heads):
                self._parts[handle] = _Part(self._layers * len(heads), None, None)
            case Fork(handle, parent, length):
                source = self._parts[parent]
                found = source.at(length)
                if found is None and length:
                    raise EngineError(f"part {parent} was forked at {length}, where it has no states")
                if found is not None:
                    found.uses += 1
                self._parts[handle] = _Part(source.cells, found, found)
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

    def _release(self, part: _Part, record: _Record) -> None:
        record.uses -= 1
        if not record.uses:
            self.free += part.cells


class _Record:
    """The states of all a part's layers and heads at one position, which parts share."""

    __slots__ = ("position", "uses")

    def __init__(self, position: int) -> None:
        self.position, self.uses = position, 1


class _Part:
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
