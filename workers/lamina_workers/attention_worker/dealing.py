"""Which pool of a worker an operation or a row belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina_protocols.messages.messages import Bound, Close, Fork, Open, Operation, Row
from lamina_workers.attention_worker.pool import Ints, LayerPool
from lamina_workers.errors import KVError

Pools = Sequence[LayerPool[Any]]


def dealt(
    pools: Pools, operations: Sequence[Operation], rows: Sequence[Row]
) -> tuple[list[list[Operation]], tuple[Ints, ...]]:
    """The operations of each pool, and the numbers of its rows. Raises KVError for a part that is not there, or is
    there already."""
    own: list[list[Operation]] = [[] for _ in pools]
    numbers: list[list[int]] = [[] for _ in pools]
    new: dict[int, int | None] = {}  # by handle: its pool, None where it was closed
    for operation in operations:
        match operation:
            case Open(handle, pool):
                if pool >= len(pools):
                    raise KVError(f"part {handle} is in pool {pool}, there are {len(pools)}")
            case Fork(handle, parent):
                pool = pool_of(pools, parent, new)
            case Close(handle) | Bound(handle):
                pool = pool_of(pools, handle, new)
        if isinstance(operation, Open | Fork) and _find(pools, handle, new) is not None:
            raise KVError(f"handle {handle} is in use; handles are never reused")
        new[handle] = None if isinstance(operation, Close) else pool
        own[pool].append(operation)
    for number, row in enumerate(rows):
        numbers[pool_of(pools, row.handle, new)].append(number)
    return own, tuple(map(tuple, numbers))


def pool_of(pools: Pools, handle: int, new: Mapping[int, int | None] | None = None) -> int:
    """The number of a part's pool, after operations that have made or closed the `new` ones. Raises KVError where there
    is no such part."""
    pool = _find(pools, handle, new or {})
    if pool is None:
        raise KVError(f"no part has handle {handle}")
    return pool


def _find(pools: Pools, handle: int, new: Mapping[int, int | None]) -> int | None:
    if handle in new:
        return new[handle]
    return next((number for number, pool in enumerate(pools) if pool.has(handle)), None)


def only_bounds(pools: Pools, operation: Operation) -> bool:
    """Whether an operation ends a part's range above all that it holds, so that batches in flight go on."""
    parts = (pool.parts().get(operation.handle) for pool in pools)
    return isinstance(operation, Bound) and any(part is not None and part.held <= operation.hi for part in parts)
