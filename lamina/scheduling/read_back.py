"""Lost shares that are read back: the bytes of a lost part are the XOR of the parity's and of the others' of its group.

A share gets another holder at once; its part is opened once its turn comes, as a fork where an owner that shares pages
with it was read back before. The engine makes the copies. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lamina.scheduling.kv_shares import Layouts, Part, Place, Share
from lamina.scheduling.page_runs import PageRuns, Run
from lamina.scheduling.prefix_nodes import Node
from lamina.scheduling.spares import Owner, Spare, Spares


@dataclass(eq=False, slots=True)
class ReadBack:
    """A share of an owner, of handle `handle`, of which positions [at, end) are still to be read from the parity
    `spare` and the other shares of its group. `part` has it; None: not opened yet."""

    owner: Owner
    handle: int
    spare: Spare
    share: Share
    at: int
    end: int
    part: Part | None = None


class ReadBacks:
    """The shares that are read back, in this order."""

    def __init__(self, layouts: Layouts, runs: PageRuns, spares: Spares) -> None:
        self._layouts = layouts
        self._runs = runs
        self._spares = spares
        self._due: deque[ReadBack] = deque()
        self._read: list[ReadBack] = []  # since some were due
        self._places: dict[Run, int] = {}  # by the top of what parities share: owners that share pages go together

    def __bool__(self) -> bool:
        return bool(self._due)

    def begin(self, owner: Owner, lost: Share, free: Mapping[Place, int]) -> ReadBack | None:
        """Have an owner's lost share read back to another holder, given the free pages. None where that cannot be."""
        handle = owner.handle or 0
        spare = self._spares.parity(owner, lost)
        if spare is None:
            return None
        share = self._elsewhere(spare, lost, free)
        if share is None:
            return None
        leaf = owner.runs.pop(lost)
        owner.runs[share] = Run(share, share.lo, share.lo if isinstance(owner, Node) else 0, users=leaf.users)
        self._runs.close({lost: leaf})
        self._spares.replaced(owner, lost, share)
        self._layouts.replace(handle, lost.holder, ())
        read = ReadBack(owner, handle, spare, share, share.lo, spare.stored)
        self._due.append(read)
        return read

    def next(self) -> ReadBack | None:
        """The share that is read next, of an owner that is still there; its part is open."""
        while self._due:
            read = self._due[0]
            if self._stands(read):
                if read.part is None:
                    self._open(read)
                return read
            self._due.popleft()
        self._read.clear()
        self._places.clear()
        return None

    def readable(self, read: ReadBack) -> bool:
        """Whether the parity and the other shares are still there."""
        return read.spare in self._spares.of(read.handle) and set(read.spare.of).issubset(read.owner.layout)

    def took(self, read: ReadBack, hi: int) -> None:
        """The holder has taken the pages of positions up to `hi`."""
        if isinstance(read.owner, Node):
            self._runs.extend(read.owner.runs[read.share], hi)

    def ended(self, read: ReadBack) -> None:
        """A share is read back, or will not be."""
        if read in self._due:
            self._due.remove(read)
        if read.at >= read.end:
            self._read.append(read)

    def unreadable(self) -> list[ReadBack]:
        """What was due and cannot be read back any more, since holders are gone; it is due no more."""
        there, due = self._layouts.pages, self._due
        gone = [
            read
            for read in due
            if not self.readable(read) or any(share.at not in there for share in (read.share, *read.spare.of))
        ]
        self._due = deque(read for read in due if read not in gone)
        return [read for read in gone if self._stands(read)]

    def give_up(self, read: ReadBack) -> None:
        """A share is not read back; it has a part all the same."""
        if read.part is None:
            self._layouts.promote(read.handle, read.share, None, read.share)

    @staticmethod
    def _stands(read: ReadBack) -> bool:
        return read.owner.handle == read.handle and read.share in read.owner.layout

    def _elsewhere(self, spare: Spare, lost: Share, free: Mapping[Place, int]) -> Share | None:
        """Another holder for a lost share, apart from its group where that is possible."""
        *_, top = spare.run.path()
        if top not in self._places:
            left = [share for share in spare.of if share != lost]
            there = self._layouts.hosts(left[0], alike=True)
            taken = {spare.part.share.holder, *(share.holder for share in left)}
            numbers = [number for number in there if number not in taken] or there
            if not numbers:
                return None
            self._places[top] = max(numbers, key=lambda number: free.get((number, lost.pool), 0))
        return replace(lost, holder=self._places[top])

    def _open(self, read: ReadBack) -> None:
        """Open the part of a share: empty, or as a fork of one that was read back and has the same pages."""
        best, most = None, read.at
        for other in self._read:
            if other.owner.handle != other.handle or other.share not in other.owner.runs:
                continue
            same = min(self._runs.common(read.spare.run, other.spare.run), other.end, read.end)
            if same > most and replace(other.share, policy=read.share.policy) == read.share:
                best, most = other, same
        if best is None or best.part is None:
            (read.part,) = self._layouts.open_beside((read.share,))
        else:
            read.part = self._layouts.fork_part(best.part, most, read.share)
            leaf, prefix = read.owner.runs.pop(read.share), isinstance(read.owner, Node)
            source = {best.share: best.owner.runs[best.share]}
            read.owner.runs |= self._runs.fork(source, most, prefix, 0, leaf.users, read.share.policy)
            self._runs.close({read.share: leaf})
            read.at = most
        self._layouts.promote(read.handle, read.share, read.part, read.share)
