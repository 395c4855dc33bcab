"""A decode batch that grows: the next batch's pages, slots and kernels' plan, from those of the last one.

In decode most batches have the rows of an earlier one, each a token further. Then nothing is planned anew: each part
takes the token that follows, each slot is the next one, and the kernels' plan is changed in place. What does not follow
so simply (windows, choosers, shared pages, a range that ends) is planned anew, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lamina_kernels.select import Kernels
from lamina_protocols.messages import Row
from lamina_workers.attention_worker.kv_store import KVStore


class DecodeRows:
    """The rows of the last batch of a series, in each of which every row is a token further. `grown`: the kernels'
    plans of the series; `slots`: int64 `[layers, n]`, where the rows of the last batch store."""

    def __init__(self, store: KVStore, rows: Sequence[Row], grown: Any, slots: Any) -> None:
        self._store = store
        self._rows = rows
        self._grown = grown
        self._slots = slots
        parts = [store.part(row.handle) for row in rows]
        self._numbers = [number for number, row in enumerate(rows) if row.store]
        self._growing = [parts[number] for number in self._numbers]
        self._tables = [part.table for part in self._growing]
        self._columns = np.cumsum([0, *(len(part.heads) for part in self._growing)]).tolist()
        self._shares = store.shares

    @staticmethod
    def of(store: KVStore, kernels: Kernels, rows: Sequence[Row], plan: Any, places: Any) -> DecodeRows | None:
        """Begin a series with a batch that is in flight, whose static heads have one `plan`, and `places` where any row
        stores. None where the next batch would not simply follow."""
        stores = np.array([row.store for row in rows], np.bool_)
        if plan is None or stores.any() != (places is not None):
            return None
        parts = [store.part(row.handle) for row in rows if row.store]
        if any(store.releases(part) or not store.owns_end(part) for part in parts):
            return None
        grown = kernels.grown(plan, stores)
        return (
            None if grown is None else DecodeRows(store, rows, grown, None if places is None else places.slots.numpy())
        )

    def follows(self, rows: Sequence[Row]) -> bool:
        """Whether `next` can take these rows: they are the last ones, each a token further, and each part can simply
        take one more."""
        return is_next(self._rows, rows) and self._as_before() and self._store.can_extend(self._growing)

    def next(self, rows: Sequence[Row]) -> Any:
        """The kernels' plan of a batch of `rows`, which follow. The store has reserved for them, and the slots have
        been changed."""
        begun = self._store.extend(self._growing)
        if self._growing:
            self._slots += 1
        moved = {}
        for number, pages in begun:
            self._slots[:, self._columns[number] : self._columns[number + 1]] = pages * self._store.config.page_size
            table = self._growing[number].table
            if table is not self._tables[number]:
                self._tables[number] = moved[self._numbers[number]] = table
        self._rows = rows
        return self._grown.next(moved)

    def _as_before(self) -> bool:
        """Whether nobody has got a share of the pages that are written next."""
        if self._shares != self._store.shares:
            if not all(map(self._store.owns_end, self._growing)):
                return False
            self._shares = self._store.shares
        return True


def is_next(last: Sequence[Row], rows: Sequence[Row]) -> bool:
    """Whether `rows` are those of `last`, each a token further: what stores reads one key more, the others as many."""
    return len(last) == len(rows) and all(
        new.handle == old.handle
        and new.start == old.start + 1
        and new.count == old.count == 1
        and new.store == old.store
        and new.chooses == old.chooses
        and new.read is not None
        and old.read is not None
        and new.read[0] == old.read[0]
        and new.read[1] == old.read[1] + old.store
        for old, new in zip(last, rows, strict=True)
    )
