"""The spares of sequences and cached prefixes (`Spares`), and lost shares that are read back (`ReadBacks`). Pure.

A spare is a part of its owner's that no row reads. Forks of an owner fork its spares, so pages that several owners
share are kept once in spares too. Its pages count as unused ones, like those of unused prefixes, and go first where
others need them: a spare is never a reason that a sequence waits or is preempted.

A replica takes a lost part's place. With parity the lost part is read back: its bytes are the XOR of the parity's and
of those of the others of its group. The lost share gets another holder at once. Its part is opened once its turn comes,
as a fork where an owner that shares pages with it was read back before. The engine makes the copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from lamina.errors import EngineError
from lamina.kv.kv_shares import NO_PAGES, Layout, Pages, Part, Place, Share, under
from lamina.kv.pages import PageRun, PageRuns
from lamina.kv.placement import Placement
from lamina.kv.prefix_nodes import Node
from lamina.kv.redundancy import groups
from lamina.kv.request import ScheduledSequence, SchedulerConfig

Owner = ScheduledSequence | Node


@dataclass(eq=False, slots=True)
class Spare:
    """`part` has the pages of positions below `stored`, where a page begins, of the shares `of` its owner: the pages
    themselves of one share, or of several the XOR, shares of fewer heads being zeros in the others. `run` counts
    them. The holder may have taken pages up to position `reach` for a copy."""

    of: Layout
    part: Part
    run: PageRun
    stored: int
    reach: int = 0


class SpareCopy(NamedTuple):
    """A spare of the owner `handle` is to get positions [lo, hi), which are whole pages."""

    handle: int
    spare: Spare
    lo: int
    hi: int


class Spares:
    """All spares, by the handles of their owners; the last ones are given up first."""

    def __init__(self, config: SchedulerConfig, placement: Placement, runs: PageRuns) -> None:
        self._config = config
        self._redundancy = config.redundancy
        self._placement = placement
        self._runs = runs
        self._by_owner: dict[int, list[Spare]] = {}
        self._groups: dict[Layout, list[Layout]] = {}  # of layouts, while the holders stay the same

    def __iter__(self) -> Iterator[Spare]:
        return (spare for spares in self._by_owner.values() for spare in spares)

    @property
    def leaves(self) -> Iterator[PageRun]:
        return (spare.run for spare in self)

    @property
    def pages(self) -> Pages:
        """The pages of all spares, each once."""
        return self._runs.own({run for leaf in self.leaves for run in leaf.path() if not run.users})

    @property
    def doubtful(self) -> Pages:
        """The most pages that holders have for copies that were begun, and did not end."""
        pages = NO_PAGES
        for spare in self:
            if spare.reach > spare.run.hi:
                pages += self._config.held((spare.part.share,), spare.run.hi, spare.reach, 0)
        return pages

    def of(self, handle: int) -> tuple[Spare, ...]:
        return tuple(self._by_owner.get(handle, ()))

    # Their owners are forked, moved and closed.

    def forked(self, parent: int, handle: int, length: int, policy: str | None = None) -> None:
        """An owner was made of the first `length` tokens of another, of that policy; None: of the other's."""
        for spare in self.of(parent):
            self._fork(spare, handle, length, under(spare.of, policy) if policy is not None else spare.of)

    def close(self, handle: int) -> None:
        for spare in self.of(handle):
            self._drop(handle, spare)

    def keep(self, handle: int, layout: Layout) -> None:
        """An owner has this layout now: spares of other shares are closed."""
        for spare in self.of(handle):
            if not set(spare.of).issubset(layout):
                self._drop(handle, spare)

    def ended(self, handle: int, ended: Mapping[Share, Share], layout: Layout) -> None:
        """Shares of an owner end where the values have it, above all that is stored: so do their spares. Those of
        shares that are not in its new layout are closed, as are those whose holders do not know `Bound`."""
        for spare in self.of(handle):
            shares = tuple(ended.get(share, share) for share in spare.of)
            end = max(share.hi for share in shares)
            if not set(shares).issubset(layout) or (part := self._placement.bound(spare.part, end)) is None:
                self._drop(handle, spare)
            else:
                spare.of, spare.part, spare.run.share = shares, part, part.share

    def cut(self, handle: int, length: int) -> None:
        """The first `length` tokens of an owner count, the others are computed again."""
        for spare in self.of(handle):
            if spare.stored > length:
                self._drop(handle, spare)

    # Their pages.

    def give_up(self, at: Container[Place]) -> bool:
        """Close the last spare in these pools. False where there is none."""
        for handle in reversed(self._by_owner):
            for spare in self._by_owner[handle]:
                if spare.part.share.at in at:
                    self._drop(handle, spare)
                    return True
        return False

    def leave(self, holders: Container[int]) -> None:
        self.holders_changed()
        for handle in list(self._by_owner):
            for spare in self.of(handle):
                if spare.part.share.holder in holders:
                    self._drop(handle, spare)

    def holders_changed(self) -> None:
        """Holders have come or gone. Spares at lost holders are lost too."""
        self._groups.clear()
        present_places = self._placement.pages
        for handle in list(self._by_owner):
            for spare in self.of(handle):
                if spare.part.share.at not in present_places:
                    self._drop(handle, spare)

    def _keep(self, handle: int, spare: Spare) -> Spare:
        self._by_owner.setdefault(handle, []).append(spare)
        return spare

    def _remove(self, handle: int, spare: Spare) -> None:
        self._by_owner[handle].remove(spare)
        if not self._by_owner[handle]:
            del self._by_owner[handle]

    def _drop(self, handle: int, spare: Spare) -> None:
        self._remove(handle, spare)
        self._placement.close_parts((spare.part,), self._runs.own((spare.run,)))
        self._runs.close({spare.part.share: spare.run})

    def _fork(self, spare: Spare, handle: int, length: int, of: Layout) -> Spare | None:
        """A spare for another owner's shares, with what a spare has of the first `length` tokens; None: nothing."""
        share = replace(spare.part.share, policy=of[0].policy)
        cut = min(spare.stored, length - length % self._config.page_size)
        if cut <= share.lo or not self._config.unbounded(share.policy):
            return None
        part = self._placement.fork_part(spare.part, cut, share)
        forks = self._runs.fork({spare.part.share: spare.run}, cut, True, 0, share.policy)
        return self._keep(handle, Spare(of, part, forks[share], cut))

    # What they lack.

    def next_copy(
        self, owner: Owner, length: int, least: int, most: int, room: Pages, others: Callable[[], Iterable[Owner]]
    ) -> SpareCopy | None:
        """What a spare of an owner of `length` tokens is to get next, `most` tokens at most; a spare that lacks fewer
        than `least` has all. A spare that is not there is opened first, or forked off one of the `others`, where these
        share pages with the owner. None where it lacks nothing, or there is no `room` for it."""
        if owner.handle is None or not self._protects(owner.layout):
            return None
        protected, size = self._wanted(owner.layout), self._config.page_size
        for present in self.of(owner.handle):
            if present.of not in protected or not self._apart(present):
                self._drop(owner.handle, present)
        for group in protected:
            end = min(length, group[0].hi)
            end -= end % size
            least_here = least if group[0].hi > length else size
            group_spares = [spare for spare in self.of(owner.handle) if spare.of == group]
            for number in range(self._redundancy.copies):
                spare: Spare | None = group_spares[number] if number < len(group_spares) else None
                position = group[0].lo if spare is None else spare.stored
                if end - position < max(size, least_here):
                    continue
                if (source := self._further(owner, group, spare, position, end, others)) is not None:
                    if spare is not None:
                        self._drop(owner.handle, spare)
                    spare, position = self._fork(source[0], owner.handle, source[1], group), source[1]
                if spare is None and (spare := self._open(owner.handle, group, room)) is None:
                    continue
                stop = min(end, position + max(size, most - most % size))
                if position < stop and room.covers(self._config.held((spare.part.share,), position, stop, 0)):
                    return SpareCopy(owner.handle, spare, position, stop)
        return None

    def begins(self, copy: SpareCopy) -> None:
        copy.spare.reach = max(copy.spare.reach, copy.hi)

    def took(self, copy: SpareCopy) -> None:
        """The holder has taken the pages of a copy, and has those that a copy before left no more."""
        copy.spare.reach = copy.hi
        self._runs.extend(copy.spare.run, copy.hi)

    def copied(self, copy: SpareCopy) -> None:
        copy.spare.stored = copy.hi

    def refused(self, copy: SpareCopy) -> None:
        copy.spare.reach = copy.spare.run.hi

    def abandoned(self, copy: SpareCopy) -> None:
        """A copy ended before its end. What its holder may have taken for it is given back: a fork of what is stored
        takes the place of the part."""
        spare = copy.spare
        if spare not in self.of(copy.handle):
            return
        if spare.stored <= spare.part.share.lo:
            self._drop(copy.handle, spare)
            return
        fork = self._placement.fork_part(spare.part, spare.stored, spare.part.share)
        self._runs.extend(spare.run, spare.stored)
        self._placement.close_parts((spare.part,), NO_PAGES)
        spare.part, spare.reach = fork, spare.stored

    def stands(self, copy: SpareCopy) -> bool:
        """Whether the spare of a copy is still there, and wants it."""
        return copy.spare in self.of(copy.handle) and copy.spare.stored == copy.lo

    def covered(self, owner: Owner, length: int) -> tuple[int, int]:
        """Of how many tokens, by head, an owner of `length` tokens has all its spares, and how many it has at
        attention workers."""
        covered = total = 0
        spares = self.of(owner.handle or 0)
        for share in () if self._placement.is_local(owner.layout) else owner.layout:
            end = min(length, share.hi)
            if end <= share.lo:
                continue
            total += (end - share.lo) * len(share.heads)
            stored = [min(spare.stored, end) for spare in spares if share in spare.of]
            if len(stored) >= self._redundancy.copies:
                covered += max(0, min(stored) - share.lo) * len(share.heads)
        return covered, total

    def _protects(self, layout: Layout) -> bool:
        """Whether the KV of owners in this layout has spares: where it is in attention workers, and all is kept."""
        return (
            bool(self._redundancy and layout)
            and self._config.unbounded(layout[0].policy)
            and len(self._placement.hosts(layout[0])) > 1
            and not self._placement.is_local(layout)
        )

    def _wanted(self, layout: Layout) -> list[Layout]:
        if layout not in self._groups:
            if len(self._groups) > 4096:
                self._groups.clear()
            self._groups[layout] = groups(
                layout, self._redundancy, lambda share: self._placement.hosts(share, alike=True)
            )
        return self._groups[layout]

    def _apart(self, spare: Spare) -> bool:
        """Whether a spare lies apart from all that it protects."""
        return all(spare.part.share.holder != share.holder for share in spare.of)

    def _taken(self, handle: int, group: Layout, but: Spare | None = None) -> set[int]:
        """The holders that can have no further spare of a group, or none in the place of one."""
        spares = (spare for spare in self.of(handle) if spare.of == group and spare is not but)
        return {share.holder for share in group}.union(spare.part.share.holder for spare in spares)

    def _open(self, handle: int, group: Layout, room: Pages) -> Spare | None:
        """An empty spare at the holder with the most room; None where no holder can have it."""
        excluded, pool = self._taken(handle, group), group[0].pool
        hosts = self._placement.hosts(group[0], alike=len(group) > 1)
        numbers = [number for number in hosts if number not in excluded]
        if not numbers:
            return None
        best = max(numbers, key=lambda number: room.get((number, pool), 0))
        share = replace(group[0], holder=best, heads=max((share.heads for share in group), key=len))
        if not room.covers(self._config.held((share,), share.lo, share.lo + self._config.page_size, 0)):
            return None
        (part,) = self._placement.open_beside((share,))
        return self._keep(handle, Spare(group, part, PageRun(share, share.lo, share.lo, users=0), share.lo))

    def _further(
        self, owner: Owner, group: Layout, spare: Spare | None, at: int, end: int, others: Callable[[], Iterable[Owner]]
    ) -> tuple[Spare, int] | None:
        """A spare of another owner that can take the place of one with the first `at` tokens, since it has more of the
        pages that both owners share; and up to where it has them."""
        leaf = owner.runs.get(group[0])
        if leaf is None or owner.handle is None or leaf.lo <= at:
            return None
        excluded, best, reach = self._taken(owner.handle, group, spare), None, at
        for other in others():
            for theirs in self.of(other.handle or 0) if other is not owner else ():
                usable = theirs.stored > reach and under(theirs.of, group[0].policy) == group
                if not usable or theirs.part.share.holder in excluded or theirs.of[0] not in other.runs:
                    continue
                common = min(theirs.stored, self._runs.common(leaf, other.runs[theirs.of[0]]), end)
                if common > reach:
                    best, reach = theirs, common
        return None if best is None else (best, reach)

    # A lost part is replaced.

    def replica(self, handle: int, lost: Share) -> Spare | None:
        """The replica of a lost share that has the most; None where none has anything."""
        replicas = (spare for spare in self.of(handle) if spare.of == (lost,) and spare.stored > lost.lo)
        return max(replicas, key=lambda spare: spare.stored, default=None)

    def parity(self, owner: Owner, lost: Share) -> Spare | None:
        """The parity from which a lost share can be read: it is there, and so are the others of the group."""
        present_places = self._placement.pages
        for spare in self.of(owner.handle or 0):
            others = [share for share in spare.of if share != lost]
            readable = others and all(share in owner.layout and share.at in present_places for share in others)
            if lost in spare.of and readable and spare.stored > lost.lo:
                return spare
        return None

    def promote(self, owner: Owner, lost: Share, spare: Spare, users: int) -> Share:
        """A replica takes the place of its owner's lost share. Returns the share that it is. `users`: whether the owner
        is in use (1)."""
        if owner.handle is None:
            raise EngineError("a closed owner has no spares")
        share = spare.part.share
        self._remove(owner.handle, spare)
        self._runs.close({lost: owner.runs.pop(lost)})
        self._runs.use({share: spare.run}, users)
        owner.runs[share] = spare.run
        self.replaced(owner, lost, share)
        self._placement.promote(owner.handle, lost, spare.part, share)
        return share

    def reopen(self, owner: Owner, lost: Share, share: Share, users: int) -> None:
        """An empty part takes the place of one that was lost empty."""
        self._runs.close({lost: owner.runs.pop(lost)})
        owner.runs[share] = PageRun(share, share.lo, share.lo, users=users)
        self.replaced(owner, lost, share)
        self._placement.promote(owner.handle or 0, lost, None, share)

    def replaced(self, owner: Owner, lost: Share, share: Share) -> None:
        """An owner has `share` in the place of a lost one, with the same KV: the other spares protect it."""
        owner.layout = tuple(share if other == lost else other for other in owner.layout)
        for spare in self.of(owner.handle or 0):
            spare.of = tuple(share if other == lost else other for other in spare.of)


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

    def __init__(self, placement: Placement, runs: PageRuns, spares: Spares) -> None:
        self._placement = placement
        self._runs = runs
        self._spares = spares
        self._due: deque[ReadBack] = deque()
        self._read: list[ReadBack] = []  # since some were due
        self._places: dict[PageRun, int] = {}  # by the top of what parities share: owners that share pages go together

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
        owner.runs[share] = PageRun(share, share.lo, share.lo if isinstance(owner, Node) else 0, users=leaf.users)
        self._runs.close({lost: leaf})
        self._spares.replaced(owner, lost, share)
        self._placement.replace(handle, lost.holder, ())
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
        if isinstance(read.owner, Node):
            self._runs.extend(read.owner.runs[read.share], hi)

    def ended(self, read: ReadBack) -> None:
        """A share is read back, or will not be."""
        if read in self._due:
            self._due.remove(read)
        if read.at >= read.end:
            self._read.append(read)

    def unreadable(self) -> list[ReadBack]:
        """What was due and cannot be read back any more, since holders were lost; it is due no more."""
        present_places, due = self._placement.pages, self._due
        unreadable = [
            read
            for read in due
            if not self.readable(read) or any(share.at not in present_places for share in (read.share, *read.spare.of))
        ]
        self._due = deque(read for read in due if read not in unreadable)
        return [read for read in unreadable if self._stands(read)]

    def give_up(self, read: ReadBack) -> None:
        """A share is not read back; it has a part all the same."""
        if read.part is None:
            self._placement.promote(read.handle, read.share, None, read.share)

    @staticmethod
    def _stands(read: ReadBack) -> bool:
        return read.owner.handle == read.handle and read.share in read.owner.layout

    def _elsewhere(self, spare: Spare, lost: Share, free: Mapping[Place, int]) -> Share | None:
        """Another holder for a lost share, apart from its group where that is possible."""
        *_, top = spare.run.path()
        if top not in self._places:
            group_rest = [share for share in spare.of if share != lost]
            hosts = self._placement.hosts(group_rest[0], alike=True)
            excluded = {spare.part.share.holder, *(share.holder for share in group_rest)}
            numbers = [number for number in hosts if number not in excluded] or hosts
            if not numbers:
                return None
            self._places[top] = max(numbers, key=lambda number: free.get((number, lost.pool), 0))
        return replace(lost, holder=self._places[top])

    def _open(self, read: ReadBack) -> None:
        """Open the part of a share: empty, or as a fork of one that was read back and has the same pages."""
        best, length = None, read.at
        for other in self._read:
            if other.owner.handle != other.handle or other.share not in other.owner.runs:
                continue
            common = min(
                self._runs.common(read.spare.run, other.spare.run), other.end, read.end, _rewritten_from(other)
            )
            if common > length and replace(other.share, policy=read.share.policy) == read.share:
                best, length = other, common
        if best is None or best.part is None:
            (read.part,) = self._placement.open_beside((read.share,))
        else:
            read.part = self._placement.fork_part(best.part, length, read.share)
            leaf, prefix = read.owner.runs.pop(read.share), isinstance(read.owner, Node)
            source = {best.share: best.owner.runs[best.share]}
            read.owner.runs |= self._runs.fork(source, length, prefix, leaf.users, read.share.policy)
            self._runs.close({read.share: leaf})
            read.at = length
        self._placement.promote(read.handle, read.share, read.part, read.share)


def _rewritten_from(read: ReadBack) -> int:
    """From which position on the owner of what was read back will write it again, in pages of its own; its end, where
    it will not."""
    rebuild = None if isinstance(read.owner, Node) else read.owner.rebuild
    return read.end if rebuild is None or read.share not in rebuild.missing else rebuild.at
