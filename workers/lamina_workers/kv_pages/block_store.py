"""Tables of pages that an engine elsewhere owns: it numbers blocks, and says which of them a sequence has.

A block is a page in each layer and KV head. Page numbers follow from block numbers, so nothing is allocated, shared or
freed here. A part stands for a row of the engine's block table, as long as it goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lamina_protocols.messages.layers import BlockConfig
from lamina_protocols.messages.messages import Operation, Row
from lamina_workers.errors import KVError
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.kv_pages.parts import NEVER, Int32, KvPart, Reservation

_NO_PAGES = np.empty(0, np.int32)


class BlockStore(KVStore):
    """The parts of one pool whose blocks an engine owns. `policies` say what is read of them; all is kept."""

    config: BlockConfig

    def __init__(self, config: BlockConfig, policies: HeadPolicies, n_pages: int) -> None:
        super().__init__(config, policies, 1)  # pages are the engine's: none is counted
        self.n_pages = n_pages
        heads = config.layers[0].kv_heads
        self._heads = tuple(range(heads))
        # Consecutive blocks are neighbours in memory: an engine mostly gives them out in order.
        first = np.arange(self.layers * heads, dtype=np.int32) * config.blocks
        self._first = first.reshape(self.layers, heads, 1)
        self._next: dict[int, tuple[int, Int32]] = {}  # by handle: what the next row of a part changes

    def open(self, handle: int, blocks: int) -> KvPart:
        """A part without tokens, with room for so many blocks. Raises PoolExhausted where tables take too much memory
        already."""
        table = self._table(len(self._heads), blocks)
        freed = np.zeros(table.shape[:2], np.int32)
        part = KvPart(self._policies, self._heads, 0, NEVER, 0, 0, table, freed)
        self._insert(handle, part)
        self._undo.clear()  # it is never taken back
        return part

    def close(self, handle: int) -> None:
        self._next.pop(handle, None)
        self._remove(handle)
        self._undo.clear()

    def go_to(self, handle: int, first: int, blocks: Int32) -> None:
        """With its next row a part's blocks are `blocks` from entry `first` on."""
        self._next[handle] = first, blocks

    def update(self, operations: Iterable[Operation], rows: Sequence[Row]) -> Reservation:
        """Raises KVError for operations, which only engines without blocks have."""
        self._undo.clear()
        if any(True for _ in operations):
            raise KVError("operations on parts, from an engine that owns its blocks")
        self._go_on(rows)
        return Reservation(_NO_PAGES, _NO_PAGES, (0,) * len(rows))

    def can_go_on(self, parts: Sequence[KvPart], rows: Sequence[Row]) -> bool:
        return True

    def go_on(self, parts: Sequence[KvPart], rows: Sequence[Row]) -> tuple[set[int], set[int]]:
        self._undo.clear()
        self._go_on(rows)
        return set(), set()

    def _go_on(self, rows: Sequence[Row]) -> None:
        for row in rows:
            part = self.part(row.handle)
            first, blocks = self._next.pop(row.handle, (0, _NO_PAGES))
            if len(blocks):
                self._widen(part, first + len(blocks))
                np.add(self._first, blocks, out=part.table[:, :, first : first + len(blocks)])
            part.held, part.stored = row.start + row.count, row.start

    def owns_from(self, part: KvPart, position: int) -> bool:
        return True  # a step in which two rows write a block is refused

    @property
    def free_pages(self) -> int:
        """How many pages no row of the last step has, where each has its own."""
        parts = self.parts().values()
        used = sum(self._slots(part.held) for part in parts) * self.layers * len(self._heads)
        return max(0, self.n_pages - used)

    def check_integrity(self) -> None:
        for handle, part in self.parts().items():
            used = part.table[:, :, : self._slots(part.held)] - self._first
            if used.size and not 0 <= used.min() <= used.max() < self.config.blocks:
                raise KVError(f"part {handle} names block {used.max()}, there are {self.config.blocks}")
        self._check_tables()
