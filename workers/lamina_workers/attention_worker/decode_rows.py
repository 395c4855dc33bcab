"""A decode batch that goes on: the next batch's pages, slots and kernels' plan, from those of the last one.

In decode most batches have the rows of an earlier one, each further: by a token, or by some where drafts were verified.
Then nothing is planned anew: each part is cut back to its row's start and takes the tokens that follow, slots move on,
and the kernels' plans are changed in place, also where windows move and pages are freed. What does not follow so simply
(choosers, windows that grow, blocks, shared pages, a range that ends) is planned anew, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from lamina_kernels.paged.pages import Pages
from lamina_kernels.paged.rows import Rows, Table, visible
from lamina_kernels.select import Grown, Kernels
from lamina_protocols.messages.messages import Row
from lamina_workers.attention_worker.paged_reader import Reading
from lamina_workers.attention_worker.row_builder import Origin
from lamina_workers.kv_pages.kv_store import KVStore

MOST_TOKENS = 32  # of a row; those of prompts have more
_KEPT = 32  # plans of where K and V go, each of another number of vectors


class DecodeRows:
    """The rows of the last batch of a series, in each of which every row goes on. `readings`: with how many layers are
    read so; their plans move on with the series. `places`: the kernels' plan of where the rows of the first batch
    store. `counted`: whether what is read is counted. `floors`: of the rows' parts."""

    def __init__(
        self,
        store: KVStore,
        kernels: Kernels,
        pages: Pages,
        rows: Sequence[Row],
        readings: Sequence[_GrowingReading],
        places: Any,
        counted: bool,
    ) -> None:
        self._store = store
        self._kernels = kernels
        self._pages = pages
        self._rows = rows
        self._readings = readings
        self._split = any(reading.split for reading in readings)
        self._parts = parts = [store.part(row.handle) for row in rows]
        self._numbers = [number for number, row in enumerate(rows) if row.store]
        self._growing = [parts[number] for number in self._numbers]
        self._tables = [part.table for part in self._growing]
        self._heads = [len(part.heads) for part in self._growing]
        self._growing_rows: Sequence[Row] = [rows[number] for number in self._numbers]
        self._columns = _columns(self._growing_rows, self._heads)
        self._places = {} if places is None else {places.slots.shape[1]: places}
        self._shares = store.shares
        self._counter = _Counter(rows, readings) if counted else None
        self.floors = list(map(store.floor, parts))

    @staticmethod
    def of(
        store: KVStore,
        kernels: Kernels,
        pages: Pages,
        rows: Sequence[Row],
        readings: Sequence[tuple[Reading, int]],
        places: Any,
        counted: bool,
    ) -> DecodeRows | None:
        """Begin a series with a batch that is in flight, which its `readings`, with their numbers of layers, attend by
        plans alone; `places` where any row stores. None where the next batch would not simply follow."""
        stores = [row for row in rows if row.store]
        if bool(stores) != (places is not None):
            return None
        parts = [store.part(row.handle) for row in stores]
        if any(row.start < part.lo or row.start + row.count > part.hi for row, part in zip(stores, parts, strict=True)):
            return None
        if not all(map(store.owns_from, parts, _starts(stores))):
            return None
        growing = [_GrowingReading.of(kernels, *reading) for reading in readings]
        decodable = [reading for reading in growing if reading is not None]
        if len(decodable) < len(growing):
            return None
        return DecodeRows(store, kernels, pages, rows, decodable, places, counted)

    def follows(self, rows: Sequence[Row]) -> bool:
        """Whether `next` can take these rows: they are the last ones, each further, and each part can simply take
        their tokens."""
        return (
            is_next(self._rows, rows)
            and not (self._split and any(row.count > 1 for row in rows))
            and self._as_before()
            and self._store.can_go_on(self._growing, [rows[number] for number in self._numbers])
        )

    def next(self, rows: Sequence[Row]) -> Any:
        """Reserve for a batch of `rows`, which follow, and let the readings have its plans. Returns the kernels' plan
        of where it stores."""
        places, freeing = self._stored([rows[number] for number in self._numbers]) if self._growing else (None, ())
        moved = {}
        for number, (part, table) in enumerate(zip(self._growing, self._tables, strict=True)):
            if part.table is not table:
                self._tables[number] = moved[self._numbers[number]] = part.table
        for number in freeing:
            self.floors[self._numbers[number]] = self._store.floor(self._growing[number])
        self._rows = rows
        start, count = [row.start for row in rows], [row.count for row in rows]
        hi = [row.read[1] if row.read else 0 for row in rows]
        for reading in self._readings:
            reading.next(start, count, hi, moved)
        return places

    def counts(self) -> tuple[tuple[int, float, float], ...]:
        """Of each row that decodes: its handle, the tokens that its last query reads, over all layers and heads, and
        those that there are."""
        return self._counter.counts(self._rows) if self._counter else ()

    def _stored(self, rows: Sequence[Row]) -> tuple[Any, set[int]]:
        """Reserve the tokens of the rows that store: where they go, and the numbers of those that have freed pages."""
        last, size = self._growing_rows, self._store.config.page_size
        changed, freeing = self._store.go_on(self._growing, rows)
        if all(map(_as_many, rows, last)):
            # Within one page the slots move on with the row.
            places = self._places[self._columns[-1]]
            slots = places.slots.numpy()
            steps = [new.start - old.start for new, old in zip(rows, last, strict=True)]
            if steps.count(steps[0]) == len(steps):  # which takes half the time
                slots += steps[0]
            else:
                slots += np.repeat(steps, np.diff(self._columns))
            for number, (part, old, new) in enumerate(zip(self._growing, last, rows, strict=True)):
                if (old.start - part.lo) // size != (new.start + new.count - 1 - part.lo) // size:
                    changed.add(number)
        else:
            self._columns = _columns(rows, self._heads)
            places = self._places.pop(self._columns[-1], None)
            shape = self._store.layers, self._columns[-1]
            slots = np.empty(shape, np.int64) if places is None else places.slots.numpy()
            changed = set(range(len(rows)))
        for number in changed:
            reading_slots = slots[:, self._columns[number] : self._columns[number + 1]]
            reading_slots[...] = self._store.slots(rows[number]).reshape(len(reading_slots), -1)
        if places is None:
            places = self._kernels.plan_append(self._pages, torch.from_numpy(slots))
        if self._columns[-1] not in self._places:
            self._places = {**dict(list(self._places.items())[1 - _KEPT :]), self._columns[-1]: places}
        self._growing_rows = list(rows)
        return places, freeing

    def _as_before(self) -> bool:
        """Whether the pages that are written next have still one owner."""
        if self._shares != self._store.shares:
            if not all(map(self._store.owns_from, self._growing, _starts(self._growing_rows))):
                return False
            self._shares = self._store.shares
        return True


class _GrowingReading:
    """A reading of `layers` layers whose plan moves on. `split`: whether some row of the batch is several of its own,
    each for some heads."""

    def __init__(self, reading: Reading, layers: int, grown: Grown, rows: Rows, origins: Sequence[Origin]) -> None:
        self.layers, self.rows, self.origins = layers, rows, origins
        self.numbers = [origin.number for origin in origins]
        self.split = any(origin.heads is not None for origin in origins)
        self._reading, self._grown = reading, grown

    @staticmethod
    def of(kernels: Kernels, reading: Reading, layers: int) -> _GrowingReading | None:
        """None where the next plan does not follow from this one."""
        if reading.plan is None or reading.rows is None or reading.origins is None:
            return None
        grown = kernels.grown(reading.plan)
        return None if grown is None else _GrowingReading(reading, layers, grown, reading.rows, reading.origins)

    def next(self, start: list[int], count: list[int], hi: list[int], moved: dict[int, Table]) -> None:
        """Of each row of the batch. Rows in `moved` have other tables."""
        if self.split:
            start, count, hi = ([values[number] for number in self.numbers] for values in (start, count, hi))
            moved = {
                index: table if heads is None else table[:, heads]
                for index, (number, heads) in enumerate(self.origins if moved else ())
                if (table := moved.get(number)) is not None
            }
        self._reading.plan = self._grown.next(start, count, hi, moved)
        self._reading.layers, self._reading.counts = 0, ()


class _Counter:
    """Counts what a batch of a series reads, by arithmetic over the rows of all readings together."""

    def __init__(self, rows: Sequence[Row], readings: Sequence[_GrowingReading]) -> None:
        row_sets = [reading.rows for reading in readings]
        self._numbers = np.concatenate([reading.numbers for reading in readings])
        self._lo, self._window, self._sinks = (
            np.concatenate([getattr(row_set, name) for row_set in row_sets]) for name in ("lo", "window", "sinks")
        )
        self._cells = np.concatenate([reading.rows.kv_heads * reading.layers for reading in readings])
        self._decoding = [number for number, row in enumerate(rows) if row.chooses]

    def counts(self, rows: Sequence[Row]) -> tuple[tuple[int, float, float], ...]:
        last = np.array([row.start + row.count - 1 for row in rows])[self._numbers]
        hi = np.array([row.read[1] if row.read else 0 for row in rows])[self._numbers]
        visible_keys = visible(last, last, self._lo, hi, self._window, self._sinks)
        keys = np.maximum(visible_keys.end - visible_keys.lo, 0) + np.maximum(visible_keys.hi - visible_keys.begin, 0)
        read, every = (
            np.bincount(self._numbers, self._cells * weights, len(rows)) for weights in (keys, hi - self._lo)
        )
        return tuple((rows[n].handle, float(read[n]), float(every[n])) for n in self._decoding)


def is_next(last: Sequence[Row], rows: Sequence[Row]) -> bool:
    """Whether `rows` are those of `last`, each of which goes on after a token that the last one computed. What stores
    reads up to its own end, or its own start, as before; the others as many keys as before."""
    return len(last) == len(rows) and all(
        new.handle == old.handle
        and old.start < new.start <= old.start + old.count
        and old.count <= MOST_TOKENS
        and new.count <= MOST_TOKENS
        and new.store == old.store
        and new.chooses == old.chooses
        and new.read is not None
        and old.read is not None
        and new.read[0] == old.read[0]
        and new.read[1] - old.read[1] == (_further(old, new) if old.store else 0)
        for old, new in zip(last, rows, strict=True)
    )


def _further(old: Row, new: Row) -> int:
    """How many keys more a row that stores reads, where it attends its own tokens as before, or none of them."""
    return new.start - old.start + (new.count - old.count if old.fused else 0)


def _columns(rows: Sequence[Row], heads: Sequence[int]) -> list[int]:
    """Where the vectors that each row stores begin, and the last ones end. heads: of the rows' parts."""
    return list(accumulate((row.count * head_count for row, head_count in zip(rows, heads, strict=True)), initial=0))


def _as_many(row: Row, other: Row) -> bool:
    return row.count == other.count


def _starts(rows: Sequence[Row]) -> list[int]:
    return [row.start for row in rows]
