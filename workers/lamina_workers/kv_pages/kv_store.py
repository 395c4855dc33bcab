"""Pages of KV: allocate, fork, cut, free, account.

A page is `page_size` tokens of one layer and one KV head. A part's table `[layer, head, slot]` names the page that
holds its positions `lo + slot * page_size ...`; -1 where none is held. Forks share pages by reference count, and a
shared page is copied before its first write. `update` is all or nothing: it either reserves every page that the
batch can need, in every layer, or leaves the store as it was. Nothing else allocates.

Operations on parts are checked before, and a part can be checked: it holds what its policies keep, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from lamina_kernels.paged.rows import Ints
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Bound, Close, Fork, Open, Operation, Row
from lamina_workers.errors import KVError, PolicyError, PoolExhausted, TornParts
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.kv_pages.parts import NO_PAGE, Int32, KvPart, PartTable, Reservation, staying


def check_open(open_: Open, kv_heads: int) -> None:
    """Raise KVError unless a part of a pool with so many KV heads can be opened."""
    if len(set(open_.heads)) != len(open_.heads) or not all(0 <= head < kv_heads for head in open_.heads):
        raise KVError(f"part {open_.handle} names heads {open_.heads}, allowed: different ones below {kv_heads}")
    if not open_.heads or not 0 <= open_.lo < open_.hi:
        raise KVError(f"part {open_.handle} of heads {open_.heads} and range [{open_.lo}, {open_.hi}) is empty")


def check_bound(bound: Bound, part: KvPart, size: int) -> None:
    """Raise KVError unless a part, of pages of `size` tokens, can end where it is told to."""
    lowest = max(part.lo + 1, part.floor(size) if part.held > bound.hi else 0)
    if not lowest <= bound.hi <= part.hi or (bound.hi - part.lo) % size:
        raise KVError(
            f"part {bound.handle} is to end at {bound.hi}, allowed: {lowest} to {part.hi}, where a page of {size} "
            f"tokens begins"
        )


def check_part(handle: int, part: KvPart, n_pages: int, size: int) -> None:
    """Raise KVError unless a part holds what it should. Its pool has `n_pages` pages of `size` tokens."""
    occupied = part.table[part.table != NO_PAGE]
    if occupied.size and (occupied.min() < 0 or occupied.max() >= n_pages):
        raise KVError(f"part {handle} names page {occupied.max()} of {n_pages}")
    if not part.lo <= part.stored <= part.held <= part.hi:
        raise KVError(f"part {handle} holds up to {part.stored}, {part.held}, outside [{part.lo}, {part.hi}]")
    slots = np.arange(part.table.shape[2])
    absent = (slots < part.freed[..., None]) & ~staying(part, size)
    inside = ~absent & (slots < -(-(part.held - part.lo) // size))
    for layer, table in enumerate(part.table):
        if (table[inside[layer]] == NO_PAGE).any():
            raise KVError(f"part {handle} lacks a page in layer {layer} that it should hold")
        if (table[~inside[layer]] != NO_PAGE).any():
            raise KVError(f"part {handle} keeps a freed page in layer {layer}")


class KVStore(PartTable[KvPart]):
    """The tables and pages of one pool, of which `config` is: numbers of pages, not their contents. Parts without a
    policy of their own have `policies`."""

    def __init__(self, config: HolderConfig, policies: HeadPolicies, n_pages: int) -> None:
        super().__init__(config, n_pages)
        self._layers = 1 + max(spec.kv_layer for spec in config.layers)
        self._policies = policies

    def update(self, operations: Iterable[Operation], rows: Sequence[Row]) -> Reservation:
        """Apply operations in order, cut every storing row's part back to its start, then reserve for all rows.

        Raises PoolExhausted (pages short), TornParts (a row needs what its part has not stored, or has let go of) or
        KVError (unknown handle, a stored part with two rows). Whatever it raises, nothing has changed.
        """
        self._undo.clear()
        try:
            for operation in operations:
                self._apply(operation)
            handles = Counter(row.handle for row in rows)
            for row in rows:
                self._check(row, rows)
                if row.store and handles[row.handle] > 1:
                    raise KVError(f"part {row.handle} has {handles[row.handle]} rows; a part that is stored to has one")
            for row in rows:
                if row.store:
                    self._cut_back(self._parts[row.handle], row.start)
                    self._free(self._parts[row.handle], row)
            return self._reserve(rows)
        except BaseException:
            self.revert()
            raise

    def can_go_on(self, parts: Sequence[KvPart], rows: Sequence[Row]) -> bool:
        """Whether each part can store its row: its range reaches so far, and pages are not short."""
        size, more = self.config.page_size, 0
        for part, row in zip(parts, rows, strict=True):
            end = row.start + row.count
            if end > part.hi:
                return False
            if end > part.held:
                more += len(part.heads) * ((part.lo - part.held) // size - (part.lo - end) // size)
        return self._layers * more <= self._pool.free

    def go_on(self, parts: Sequence[KvPart], rows: Sequence[Row]) -> tuple[set[int], set[int]]:
        """Cut each part back to its row's start, free what no query from there on can see, and reserve for the row, for
        which there is room: as `update` would, where parts are different and own the pages that are written. Returns
        the parts, by number, that have other pages where they store, and those that have freed some; the table of the
        first ones may be another one."""
        changed, freeing = set(), set()
        for number, (part, row) in enumerate(zip(parts, rows, strict=True)):
            if row.start < part.held:
                used, held_slots = self._slots(row.start - part.lo), self._slots(part.held - part.lo)
                if used < held_slots:
                    tail = part.table[:, :, used:held_slots]
                    self._drop(tail, tail != NO_PAGE)
                    changed.add(number)
                part.held, part.stored = row.start, min(part.stored, row.start)
            if row.start >= part.next_free(self.config.page_size):
                self._free(part, row)
                freeing.add(number)
        for number, (part, row) in enumerate(zip(parts, rows, strict=True)):
            end = row.start + row.count
            used, slots = self._slots(part.held - part.lo), self._slots(end - part.lo)
            if used < slots:
                self._widen(part, slots)
                fresh = part.table[:, :, used:slots]
                fresh[...] = self._pool.take(fresh.size).reshape(fresh.shape)
                changed.add(number)
            part.held = end
        self._undo.clear()
        return changed, freeing

    def stored(self, rows: Iterable[Row]) -> None:
        """All KV has come that these rows of one batch store."""
        for row in rows:
            part = self._parts[row.handle]
            part.stored = part.held

    @property
    def layers(self) -> int:
        """How many layers have KV of their own."""
        return self._layers

    @property
    def shares(self) -> int:
        """As long as this number stays the same, no part has got a share of another part's pages."""
        return self._pool.shares

    def owns_from(self, part: KvPart, position: int) -> bool:
        """Whether no other part has the pages that hold a part's tokens from a position on, in any layer and head."""
        used = self._slots(part.held - part.lo)
        return not self._pool.shared(part.table[:, :, (position - part.lo) // self.config.page_size : used]).any()

    def slots(self, row: Row) -> Ints:
        """Where a storing row's tokens go: `[layers, stored tokens, heads]`, each page * page_size + offset."""
        part = self._parts[row.handle]
        size = self.config.page_size
        first, end = row.stored(part.lo, part.hi)
        slot, offset = np.divmod(np.arange(first, end) - part.lo, size)
        return part.table[:, :, slot].transpose(0, 2, 1).astype(np.int64) * size + offset[:, None]

    def check_integrity(self) -> None:
        """Raise KVError unless tables, reference counts and the free stack agree."""
        counted = np.zeros(self.n_pages, np.int32)
        for handle, part in self._parts.items():
            check_part(handle, part, self.n_pages, self.config.page_size)
            occupied = part.table[part.table != NO_PAGE]
            if (page_count := part.pages(self.config.page_size)[0]) != len(occupied):
                raise KVError(f"part {handle} holds {len(occupied)} pages, and says {page_count}")
            np.add.at(counted, occupied, 1)
        self._check_tables()
        self._pool.check_integrity(counted)

    # The operations. Each appends to `_undo` what takes it back.

    def _apply(self, operation: Operation) -> None:
        match operation:
            case Open(handle, _, heads, lo, hi, policy):
                check_open(operation, self.config.layers[0].kv_heads)
                freed = np.zeros((self._layers, len(heads)), np.int32)
                policies = self._policies_of(handle, policy)
                self._insert(handle, KvPart(policies, heads, lo, hi, lo, lo, self._table(len(heads), 0), freed))
            case Fork(handle, parent, length, policy):
                policies = self._policies_of(handle, policy)
                self._insert(handle, self._forked(self.part(parent), parent, length, policies))
            case Close(handle):
                part = self._remove(handle)
                self._pool.release(part.table[part.table != NO_PAGE])
            case Bound(handle, hi):
                part = self.part(handle)
                check_bound(operation, part, self.config.page_size)
                self._undo.append(partial(setattr, part, "hi", part.hi))
                part.hi = hi
                self._cut_back(part, hi)

    def _policies_of(self, handle: int, policy: str) -> HeadPolicies:
        try:
            return HeadPolicies.of(self.config, policy) if policy else self._policies
        except PolicyError as error:
            raise KVError(f"part {handle}: {error}") from error

    def _forked(self, source: KvPart, parent: int, length: int, policies: HeadPolicies) -> KvPart:
        """What `source`, of handle `parent`, keeps of the sequence's first `length` tokens, for a part of these
        policies: all where its range ends below `length`, nothing where it begins there or above."""
        end = max(source.lo, min(length, source.hi))
        lowest = self.floor(source) if end > source.lo else 0
        if length < lowest:
            raise KVError(f"cannot fork part {parent} at {length}, allowed: {lowest} or more")
        if end > source.held:
            raise KVError(f"cannot fork part {parent} at {length}, it holds up to {source.held}")
        used = self._slots(end - source.lo)
        table, freed = source.table[:, :, :used].copy(), np.minimum(source.freed, used)
        part = dataclasses.replace(
            source,
            policies=policies,
            held=end,
            stored=min(end, source.stored),
            table=table,
            freed=freed,
            absent=None if source.freed.any() else 0,
            frees_from=None,
        )
        if policies.keepers != source.policies.keepers:
            self._take_over(part, parent, length)
        self._pool.share(part.table[part.table != NO_PAGE])
        return part

    def _take_over(self, part: KvPart, parent: int, length: int) -> None:
        """Count what the parent has let go of as let go by `part`, its fork of other policies, whose queries come from
        `length` on. Raises KVError where one of them sees some of it."""
        slots = np.arange(part.table.shape[2])
        missing = (part.table == NO_PAGE) & (slots < self._slots(part.held - part.lo))
        stay = staying(part, self.config.page_size)
        part.freed = np.where(missing, slots + 1, 0).max(axis=2, initial=0).astype(np.int32)
        lowest = np.zeros_like(part.freed)
        for group in part.groups:
            lowest[group.cells] = max(0, group.policy.seen_from(length) - part.lo) // self.config.page_size
        if (missing & stay).any() or (part.freed > lowest).any():
            raise KVError(f"cannot fork part {parent} at {length} for other policies, which see what it has let go of")
        part.table[(slots < part.freed[..., None]) & ~stay] = NO_PAGE
        part.absent = None

    def _check(self, row: Row, rows: Sequence[Row]) -> None:
        part = self.part(row.handle)
        if self._highest_start(row) < row.start:
            raise TornParts(tuple(map(self._highest_start, rows)))
        if row.count < 1:
            raise KVError(f"row of part {row.handle} has {row.count} tokens, allowed: 1 or more")
        if row.read is not None:
            lo, hi = row.read
            reach = row.start + row.count if row.fused else row.start
            reach = min(reach, part.hi if row.store and row.fused else part.stored)
            if not part.lo <= lo <= hi <= reach:
                raise KVError(f"row reads [{lo}, {hi}) of part {row.handle}, allowed: within [{part.lo}, {reach}]")

    def _highest_start(self, row: Row) -> int:
        """Where a row can start at most: at its own start, or where KV of its part has not come in every layer. 0 where
        the part has let go of what the row needs."""
        part = self.part(row.handle)
        if row.start < self.floor(part):
            return 0
        return row.start if min(row.start, part.hi) <= part.stored else part.stored

    def _cut_back(self, part: KvPart, start: int) -> None:
        end, stored = part.held, part.stored
        part.held, part.stored = (max(part.lo, min(upto, start)) for upto in (end, stored))

        def undo() -> None:
            part.held, part.stored = end, stored

        self._undo.append(undo)
        used = self._slots(part.held - part.lo)
        tail = part.table[:, :, used:]
        self._drop(tail, tail != NO_PAGE)
        part.absent = part.absent and None  # some of them may have been above

    def _free(self, part: KvPart, row: Row) -> None:
        """Free what no query from the row's start on can see."""
        size = self.config.page_size
        for group in part.groups:
            lowest = group.policy.seen_from(row.start)
            freed = min(max(0, (lowest - part.lo) // size), self._slots(part.held - part.lo))
            before = part.freed.copy()
            part.freed[group.cells] = np.maximum(before[group.cells], freed)
            if (part.freed == before).all():
                continue
            part.absent = part.frees_from = None
            self._undo.append(partial(part.freed.__setitem__, ..., before))
            first = int(before[group.cells].min())
            view = part.table[:, :, first:freed]
            slots = np.arange(first, freed)
            leaving = (slots >= before[..., None]) & ~group.policy.stays(part.lo + slots * size)
            self._drop(view, group.cells[..., None] & leaving & (view != NO_PAGE))

    def _drop(self, view: Int32, where: npt.NDArray[np.bool_]) -> None:
        """Free the pages that `view`, a slice of a table, names there."""
        pages: Int32 = view[where]
        if pages.size:
            view[where] = NO_PAGE
            self._undo.append(lambda: view.__setitem__(where, pages))
            self._pool.release(pages)

    def _reserve(self, rows: Sequence[Row]) -> Reservation:
        """Pages for all that the storing rows can write. Counted first: a refusal takes nothing."""
        writes = []
        for row in rows:
            part = self._parts[row.handle]
            first, end = row.stored(part.lo, part.hi)
            if first < end:
                writes.append((part, first - part.lo, end - part.lo))
        shared = [int(np.count_nonzero(self._shared(*write))) for write in writes]
        needed = sum(shared) + sum(self._missing(*write) for write in writes)
        if needed > self._pool.free:
            raise PoolExhausted(f"{needed} pages needed, {self._pool.free} of {self.n_pages} are free")
        copies = [self._own(*write) for write, is_shared in zip(writes, shared, strict=True) if is_shared]
        for part, _, end in writes:
            self._extend(part, end)
        return Reservation(
            np.concatenate([_NO_PAGES, *(source for source, _ in copies)]),
            np.concatenate([_NO_PAGES, *(target for _, target in copies)]),
            tuple(self.floor(self._parts[row.handle]) for row in rows),
        )

    def _shared(self, part: KvPart, first: int, _end: int) -> npt.NDArray[np.bool_]:
        """[layers, heads]: whether the page that `first` falls into holds tokens and belongs to others too."""
        slot, offset = divmod(first, self.config.page_size)
        if not offset:
            return _NONE_SHARED
        pages = part.table[:, :, slot]
        shared: npt.NDArray[np.bool_] = (pages != NO_PAGE) & self._pool.shared(pages)
        return shared

    def _missing(self, part: KvPart, first: int, end: int) -> int:
        return self._layers * len(part.heads) * (self._slots(end) - self._slots(first))

    def _own(self, part: KvPart, first: int, end: int) -> tuple[Int32, Int32]:
        """Replace shared pages that will be written. Returns the pages to copy from, and those to copy to."""
        shared = self._shared(part, first, end)
        if not shared.any():
            return _NO_PAGES, _NO_PAGES
        slot = first // self.config.page_size
        layers, heads = np.nonzero(shared)
        sources: Int32 = part.table[layers, heads, slot]
        targets = self._pool.take(len(sources))
        self._pool.leave(sources)
        table = part.table
        table[layers, heads, slot] = targets
        self._undo.append(lambda: table.__setitem__((layers, heads, slot), sources))
        return sources, targets

    def _extend(self, part: KvPart, end: int) -> None:
        table, previous = part.table, part.held
        start, stop = self._slots(previous - part.lo), self._slots(end)
        self._widen(part, stop)
        fresh = part.table[:, :, start:stop]

        def undo() -> None:
            fresh[...] = NO_PAGE
            part.table, part.held = table, previous

        self._undo.append(undo)
        if stop > start:
            fresh[...] = self._pool.take(fresh.size).reshape(fresh.shape)
        part.held = part.lo + end

    def _widen(self, part: KvPart, slots: int) -> None:
        """Let a part's table have room for so many slots: where it has not, the part gets another table."""
        table = part.table
        if slots > table.shape[2]:
            part.table = self._table(len(part.heads), max(slots, 2 * table.shape[2]))
            self._count(part.table.nbytes - table.nbytes)
            part.table[:, :, : table.shape[2]] = table

    def _slots(self, tokens: int) -> int:
        return -(-tokens // self.config.page_size)

    def floor(self, part: KvPart) -> int:
        """The lowest length to which the part can return: there all that any query sees must still be held."""
        return part.floor(self.config.page_size)

    def _table(self, heads: int, slots: int) -> Int32:
        return np.full((self._layers, heads, slots), NO_PAGE, np.int32)


_NO_PAGES, _NONE_SHARED = np.empty(0, np.int32), np.zeros((0, 0), np.bool_)
