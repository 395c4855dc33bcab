"""Records of states: allocate, fork, run again, free, account.

A page of a state pool is the record of one mixer and one head at one position of a sequence: all that the layer
remembers of the tokens before it. A part has the records at `held`, and those at `before`, the start of its last row,
so that a batch which has not ended can run again from there. A record is written once, by the batch that ends at its
position, and never overwritten while another part shares it. A snapshot is nothing of its own: it is a fork.

A row with drafts writes the records at its start, and keeps the inputs of its tokens in a third set of pages: which of
them are the sequence's is known when the next row says where it begins. That row takes them into the states first.

`update` is all or nothing, and can be taken back by `revert` until `commit`. Nothing else allocates.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Bound, Close, Fork, Open, Operation, Row
from lamina_workers.errors import KVError, PoolExhausted, TornParts
from lamina_workers.kv_pages.parts import Int32, PartTable

NO_RECORD = -1  # in a table: zeros, the state before the first token


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Records:
    """The records of all mixers and heads of a part at one position. pages: int32 `[mixers, heads]`, all NO_RECORD at
    position 0. Of so many tokens behind it the inputs are `kept`: a row can start from any of them."""

    position: int
    pages: Int32
    kept: int = 0

    def starts(self, position: int) -> int:
        """Where a row that begins at a position can start at most; 0 where it must begin anew."""
        return min(position, self.position + self.kept) if self.position <= position else 0


@dataclasses.dataclass(slots=True)
class StatePart:
    """What this holder keeps of one sequence: the states of value heads `heads` at `last` and at `earlier`, which are
    one and the same in a new fork. `whole`: all mixers have written what `last` names; not so while a batch is under
    way, and after one that did not end with all its mixers."""

    heads: tuple[int, ...]
    hi: int
    last: Records
    earlier: Records
    whole: bool = True
    lo: int = 0  # states are never cut by positions
    inputs: Int32 | None = None  # pages of what is kept, `[mixers, heads]`, once there is any

    @property
    def nbytes(self) -> int:
        """Of its tables, which forks share in full."""
        return 2 * self.last.pages.nbytes

    @property
    def held(self) -> int:
        """Tokens for which there are records."""
        return self.last.position

    @property
    def before(self) -> int:
        """The start of the last row: the lowest length but 0 to which the part can return."""
        return self.earlier.position

    @property
    def stored(self) -> int:
        """The last position whose records are written in every mixer."""
        return self.held if self.whole else self.before

    def at(self, position: int) -> Records | None:
        """What is written of this position; None where nothing is."""
        return next((record for record in self.written() if record.position == position), None)

    def written(self) -> tuple[Records, ...]:
        """What a row can start from, or a fork hold, besides nothing at all."""
        return (self.last, self.earlier) if self.whole else (self.earlier,)

    def owned(self) -> Iterator[Records]:
        """The different records that take pages. What is kept takes `inputs`."""
        if self.last.position:
            yield self.last
        if self.earlier.position and self.earlier.pages is not self.last.pages:
            yield self.earlier


@dataclasses.dataclass(frozen=True, slots=True)
class StateStep:
    """What one row reads and writes. source, target, kept: int32 `[mixers, heads]`; a source of NO_RECORD is zeros, and
    a target of NO_RECORD is not written. `replay` tokens before `start` are taken from the inputs `kept`; a row that
    `keeps` leaves there its own."""

    heads: tuple[int, ...]
    start: int
    count: int
    replay: int
    keeps: bool
    source: Int32
    target: Int32
    kept: Int32 | None


class StateStore(PartTable[StatePart]):
    """The tables and the page pool of one state pool: numbers of records, not their contents. A row has `drafts`
    drafts at most."""

    def __init__(self, config: HolderConfig, n_pages: int, drafts: int = 0) -> None:
        super().__init__(config, n_pages)
        self._drafts = drafts
        self._mixers = len(config.layers)
        self._kv_heads = config.layers[0].kv_heads

    def update(self, operations: Iterable[Operation], rows: Sequence[Row]) -> tuple[StateStep, ...]:
        """Apply operations in order, then give each row the records that it reads and those that it writes.

        Raises PoolExhausted (pages short), TornParts (a row starts where no record is) or KVError (unknown handle, a
        part with two rows, a fork where no record is). Whatever it raises, nothing has changed. Else the next call is
        `commit` or `revert`.
        """
        try:
            for operation in operations:
                self._apply(operation)
            self._check(rows)
            targets = [self._turn(self._parts[row.handle], row) for row in rows]  # releases before anything takes
            turned = [(self._parts[row.handle], row, target) for row, target in zip(rows, targets, strict=True)]
            needed = sum(
                self._mixers
                * len(part.heads)
                * ((target is None and _writes(part.earlier, row)) + (_keeps(row) and part.inputs is None))
                for part, row, target in turned
            )
            if needed > self._pool.free:
                raise PoolExhausted(f"{needed} pages needed, {self._pool.free} of {self.n_pages} are free")
            return tuple(self._write(*turn) for turn in turned)
        except BaseException:
            self.revert()
            raise

    def commit(self) -> None:
        """What the last `update` has done stays."""
        self._undo.clear()

    def follows(self, rows: Iterable[Row]) -> bool:
        """Whether each row is the next token of a part whose older records can be written: no other part has them."""
        return all(
            part.whole
            and row.store
            and row.count == 1
            and not part.last.kept
            and 0 < part.before < part.held == row.start < part.hi
            and not self._shared(part.earlier)
            for row in rows
            if (part := self._parts[row.handle])
        )

    def follow(self, rows: Iterable[Row]) -> None:
        """As `update` and `commit` for rows that follow: what a part's last row read is now what its next one writes,
        and the other way round."""
        for row in rows:
            part = self._parts[row.handle]
            part.last, part.earlier = Records(row.start + 1, part.earlier.pages), part.last
            part.whole = False

    def stored(self, rows: Iterable[Row]) -> None:
        """All mixers have written what these rows of one batch write."""
        for row in rows:
            self._parts[row.handle].whole = True

    def starts(self, rows: Iterable[Row]) -> tuple[int, ...]:
        """Where each row can start at most: at its own start, or below where a record is; 0 where there is none."""
        return tuple(max(record.starts(row.start) for record in self.part(row.handle).written()) for row in rows)

    def check_integrity(self) -> None:
        """Raise KVError unless tables, reference counts and the free stack agree."""
        counted = np.zeros(self.n_pages, np.int32)
        for handle, part in self._parts.items():
            if not 0 <= part.before <= part.held <= part.hi or (part.before == part.held) != (
                part.last.pages is part.earlier.pages
            ):
                raise KVError(f"part {handle} has records at {part.before} and {part.held} of {part.hi}")
            for records in (part.last, part.earlier):
                pages = records.pages
                if (
                    pages.shape != (self._mixers, len(part.heads))
                    or (pages.max() if records.position == 0 else -1) >= 0
                ):
                    raise KVError(f"part {handle} has pages {pages.shape} at {records.position}")
            for records in part.owned():
                if records.pages.min() < 0 or records.pages.max() >= self.n_pages:
                    raise KVError(f"part {handle} names page {records.pages.max()} of {self.n_pages}")
                np.add.at(counted, records.pages, 1)
            if part.inputs is not None:
                np.add.at(counted, part.inputs, 1)
        self._check_tables()
        self._pool.check_integrity(counted)

    # The operations. Each appends to `_undo` what takes it back.

    def _apply(self, operation: Operation) -> None:
        match operation:
            case Open(handle, _, heads, _, hi):
                self._check_open(operation)
                nothing = Records(0, np.full((self._mixers, len(heads)), NO_RECORD, np.int32))
                self._insert(handle, StatePart(heads, hi, nothing, nothing))
            case Fork(handle, parent, length):
                source = self.part(parent)
                records = source.at(length)
                if records is None:
                    positions = sorted({record.position for record in source.written()})
                    raise KVError(f"cannot fork part {parent} at {length}, it has states at {positions}")
                if length:
                    self._pool.share(records.pages)
                records = dataclasses.replace(records, kept=0)
                self._insert(handle, StatePart(source.heads, source.hi, records, records))
            case Close(handle):
                part = self._remove(handle)
                for records in part.owned():
                    self._pool.release(records.pages)
                if part.inputs is not None:
                    self._pool.release(part.inputs)
            case Bound(handle):
                raise KVError(f"part {handle} has states, which are never cut by positions")

    def _check_open(self, open_: Open) -> None:
        heads = open_.heads
        if not heads or heads[0] < 0 or heads[-1] >= self._kv_heads or any(a >= b for a, b in pairwise(heads)):
            raise KVError(f"part {open_.handle} names heads {heads}, allowed: ascending ones below {self._kv_heads}")
        if open_.lo != 0 or open_.hi < 1:
            raise KVError(
                f"part {open_.handle} of states has range [{open_.lo}, {open_.hi}), allowed: from 0, not empty"
            )

    def _check(self, rows: Sequence[Row]) -> None:
        starts = self.starts(rows)
        if starts != tuple(row.start for row in rows):
            raise TornParts(starts)
        handles = Counter(row.handle for row in rows)
        for row in rows:
            hi = self._parts[row.handle].hi
            if not row.store or row.count < 1 or row.start + row.count > hi:
                raise KVError(
                    f"row of part {row.handle} at [{row.start}, {row.start + row.count}), allowed: one that stores and "
                    f"ends by {hi}"
                )
            if _keeps(row) and row.count > 1 + self._drafts:
                raise KVError(f"row of part {row.handle} with {row.count - 1} drafts, allowed: {self._drafts}")
            if handles[row.handle] > 1:
                raise KVError(f"part {row.handle} has {handles[row.handle]} rows; a part that is stored to has one")

    def _turn(self, part: StatePart, row: Row) -> Int32 | None:
        """Let a part keep those of its records alone, as `earlier`, that the row starts from. Returns pages of it that
        no other part has and that the row can write to; None where it has none, or needs none."""
        nothing = Records(0, np.full_like(part.last.pages, NO_RECORD))
        written = part.written() if row.start else ()
        source = next((record for record in written if record.starts(row.start) == row.start), nothing)
        spare: Int32 | None = None
        for records in part.owned():
            if records.pages is source.pages:
                continue
            if spare is None and _writes(source, row) and not self._shared(records):
                spare = records.pages
            else:
                self._pool.release(records.pages)
        self._set(part, source, source, True, part.inputs)
        return spare

    def _shared(self, records: Records) -> bool:
        """Whether several parts have these. They are taken, shared and released whole, so one page tells of all."""
        return bool(self._pool.shared(records.pages[0, :1])[0])

    def _write(self, part: StatePart, row: Row, target: Int32 | None) -> StateStep:
        """Give a part the records at the row's end, or at its start where it keeps the inputs of its tokens. Nothing
        has written them yet."""
        replay, pages = row.start - part.earlier.position, self._mixers * len(part.heads)
        source, inputs = dataclasses.replace(part.earlier, kept=replay), part.inputs  # later ones are written over
        if target is None and _writes(source, row):
            target = self._pool.take(pages).reshape(self._mixers, -1)
        if _keeps(row):
            if inputs is None:
                inputs = self._pool.take(pages).reshape(self._mixers, -1)
            last = Records(row.start, source.pages if target is None else target, row.count)
        else:
            last = Records(row.start + row.count, source.pages if target is None else target)
        self._set(part, last, source, False, inputs)
        written = np.full_like(source.pages, NO_RECORD) if target is None else target
        return StateStep(part.heads, row.start, row.count, replay, _keeps(row), source.pages, written, inputs)

    def _set(self, part: StatePart, last: Records, earlier: Records, whole: bool, inputs: Int32 | None) -> None:
        was = part.last, part.earlier, part.whole, part.inputs

        def undo() -> None:
            part.last, part.earlier, part.whole, part.inputs = was

        part.last, part.earlier, part.whole, part.inputs = last, earlier, whole, inputs
        self._undo.append(undo)


def _keeps(row: Row) -> bool:
    """Whether a row has drafts, whose inputs are kept: it decodes, and has more tokens than one."""
    return row.chooses and row.count > 1


def _writes(source: Records, row: Row) -> bool:
    """Whether a row from these records writes others: not where it keeps the inputs of all its tokens."""
    return not _keeps(row) or source.position < row.start
