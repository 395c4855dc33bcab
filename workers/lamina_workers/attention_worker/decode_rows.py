"""A decode batch that goes on: the next batch's pages, slots and kernels' plan, from those of the last one.

In decode most batches have the rows of an earlier one, each further: by a token, or by some where drafts were verified.
Then nothing is planned anew: each part is cut back to its row's start and takes the tokens that follow, slots move on,
and the kernels' plan is changed in place. What does not follow so simply (windows, choosers, shared pages, a range that
ends) is planned anew, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from lamina_kernels.paged.pages import Pages
from lamina_kernels.select import Kernels
from lamina_protocols.messages import Row
from lamina_workers.attention_worker.kv_store import KVStore

MOST_TOKENS = 32  # of a row; those of prompts have more
_KEPT = 32  # plans of where K and V go, each of another number of vectors


class DecodeRows:
    """The rows of the last batch of a series, in each of which every row goes on. `grown`: the kernels' plans of the
    series; `places`: their plan of where the rows of the first batch store."""

    def __init__(
        self, store: KVStore, kernels: Kernels, pages: Pages, rows: Sequence[Row], grown: Any, places: Any
    ) -> None:
        self._store = store
        self._kernels = kernels
        self._pages = pages
        self._rows = rows
        self._grown = grown
        parts = [store.part(row.handle) for row in rows]
        self._numbers = [number for number, row in enumerate(rows) if row.store]
        self._growing = [parts[number] for number in self._numbers]
        self._tables = [part.table for part in self._growing]
        self._heads = [len(part.heads) for part in self._growing]
        self._growing_rows: Sequence[Row] = [rows[number] for number in self._numbers]
        self._columns = _columns(self._growing_rows, self._heads)
        self._places = {} if places is None else {places.slots.shape[1]: places}
        self._shares = store.shares

    @staticmethod
    def of(
        store: KVStore, kernels: Kernels, pages: Pages, rows: Sequence[Row], plan: Any, places: Any
    ) -> DecodeRows | None:
        """Begin a series with a batch that is in flight, whose static heads have one `plan`, and `places` where any row
        stores. None where the next batch would not simply follow."""
        stores = [row for row in rows if row.store]
        if plan is None or bool(stores) != (places is not None):
            return None
        parts = [store.part(row.handle) for row in stores]
        if any(row.start + row.count > part.hi for row, part in zip(stores, parts, strict=True)):
            return None
        if any(store.releases(part) for part in parts) or not all(map(store.owns_from, parts, _starts(stores))):
            return None
        grown = kernels.grown(plan)
        return None if grown is None else DecodeRows(store, kernels, pages, rows, grown, places)

    def follows(self, rows: Sequence[Row]) -> bool:
        """Whether `next` can take these rows: they are the last ones, each further, and each part can simply take
        their tokens."""
        return (
            is_next(self._rows, rows)
            and self._as_before()
            and self._store.can_go_on(self._growing, [rows[number] for number in self._numbers])
        )

    def next(self, rows: Sequence[Row]) -> tuple[Any, Any]:
        """Reserve for a batch of `rows`, which follow. Returns the kernels' plan of what it reads, and that of where it
        stores."""
        places = self._stored([rows[number] for number in self._numbers]) if self._growing else None
        moved = {}
        for number, (part, table) in enumerate(zip(self._growing, self._tables, strict=True)):
            if part.table is not table:
                self._tables[number] = moved[self._numbers[number]] = part.table
        self._rows = rows
        start, count = [row.start for row in rows], [row.count for row in rows]
        return self._grown.next(start, count, [row.read[1] if row.read else 0 for row in rows], moved), places

    def _stored(self, rows: Sequence[Row]) -> Any:
        """Reserve the tokens of the rows that store; where they go."""
        last, size = self._growing_rows, self._store.config.page_size
        changed = self._store.go_on(self._growing, rows)
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
            own = slots[:, self._columns[number] : self._columns[number + 1]]
            own[...] = self._store.slots(rows[number]).reshape(len(own), -1)
        if places is None:
            places = self._kernels.plan_append(self._pages, torch.from_numpy(slots))
        if self._columns[-1] not in self._places:
            self._places = {**dict(list(self._places.items())[1 - _KEPT :]), self._columns[-1]: places}
        self._growing_rows = list(rows)
        return places

    def _as_before(self) -> bool:
        """Whether nobody has got a share of the pages that are written next."""
        if self._shares != self._store.shares:
            if not all(map(self._store.owns_from, self._growing, _starts(self._growing_rows))):
                return False
            self._shares = self._store.shares
        return True


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
    return list(accumulate((row.count * own for row, own in zip(rows, heads, strict=True)), initial=0))


def _as_many(row: Row, other: Row) -> bool:
    return row.count == other.count


def _starts(rows: Sequence[Row]) -> list[int]:
    return [row.start for row in rows]
