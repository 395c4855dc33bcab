"""A holder that counts pages and records instead of keeping KV and states: it gets the operations and rows of a real
one, and answers as that would."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.simulator.event_loop.page_counter import PageCounter
from lamina.simulator.event_loop.record_counter import RecordCounter
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
