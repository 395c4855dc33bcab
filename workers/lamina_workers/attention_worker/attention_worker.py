"""One KV shard: append, attend, free. Built from a `HolderConfig` alone.

Its layers are in pools, each of layers of one shape. A batch is announced once, to all pools or to none; then, per
layer, its messages are answered by the layer's pool, in the order in which they come. What an `Exchange` brings is
stored first where a row attends its own tokens; else after its answer was given, so that the engine need not wait for
it: by `settle`, or before the next message. A batch's state is dropped when one of its handles is announced again or a
new epoch comes: a late message of a dropped batch is refused, and never touches pages that belong to another part by
then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lamina_kernels.exchange.layer_work import LayerWork
from lamina_kernels.states.advance import StateWork
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import ATTENTION, LATENT, STATES, HolderConfig
from lamina_protocols.messages.messages import (
    MAX_PARTS,
    Advance,
    Announced,
    Announcement,
    BlockTables,
    Bound,
    Close,
    Constants,
    Exchange,
    Fetch,
    FetchPages,
    FetchSample,
    Fork,
    Fresh,
    FreshPages,
    Open,
    Operation,
    PartHeld,
    Query,
    Reply,
    Request,
    Row,
    Sample,
    Survey,
    Surveyed,
    Usage,
)
from lamina_protocols.messages.pools import Pool, pools
from lamina_workers.attention_worker.batch import Batch, Counters
from lamina_workers.attention_worker.kv_pool import KVPool
from lamina_workers.attention_worker.page_layout import CPU
from lamina_workers.attention_worker.pool import Ints, LayerPool, samples_of
from lamina_workers.attention_worker.state_pool import StatePool
from lamina_workers.errors import KVError, PoolExhausted, TornParts, UnsupportedModelError
from lamina_workers.kv_pages.kv_store import KVStore

Pools = Sequence[LayerPool[Any]]


def dealt(
    pools: Pools, operations: Sequence[Operation], rows: Sequence[Row]
) -> tuple[list[list[Operation]], tuple[Ints, ...]]:
    """The operations of each pool, and the numbers of its rows. Raises KVError for a part that is not there, or is
    there already."""
    operations_of_pool: list[list[Operation]] = [[] for _ in pools]
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
        operations_of_pool[pool].append(operation)
    for number, row in enumerate(rows):
        numbers[pool_of(pools, row.handle, new)].append(number)
    return operations_of_pool, tuple(map(tuple, numbers))


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


_IN_FLIGHT = 8  # batches of the largest size that are kept; an engine has up to three lanes
_BATCH = 1 << 12  # tokens that a batch counts for at least
_SURVEYED_NUMBERS = 50_000  # in one frame: its header has room for some 58,000 of the largest

_KINDS: dict[str, Callable[[int, Pool, int, torch.device, Counters], LayerPool[Any]]] = {
    **dict.fromkeys((ATTENTION, LATENT), KVPool),
    **dict.fromkeys(STATES, StatePool),
}


class AttentionWorker:
    """Holds what its layers keep of its parts, and reads it. Every method runs on the caller's thread.

    Its pages lie on `device`, and so must the tensors of messages (`device_worker` copies them there).
    Raises UnsupportedModelError for layers that its pages cannot keep, KVError for too little memory or a wrong dtype,
    NotEnoughMemory where the device lacks it, PolicyError for a policy that its device cannot serve.

    `read_delay` makes it slow, for experiments: seconds of sleep for each million positions that a layer reads.
    """

    read_delay = 0.0

    def __init__(self, config: HolderConfig, threads: int = 1, device: torch.device = CPU) -> None:
        self.config = config
        self.device = device
        self.counters = Counters()
        of_pools = pools(config)
        self.pools = tuple(self._pool(number, pool, threads) for number, pool in enumerate(of_pools))
        self.page_layout = "; ".join(pool.layout for pool in self.pools)
        # of each layer: its pool, and its number there
        where = {n: (p, index) for p, pool in enumerate(of_pools) for index, n in enumerate(pool.layers)}
        self._places = [where[number] for number in range(len(config.layers))]
        self._epoch = 0
        self._last_batch = 0
        self._next_operation = 0
        self._fence = -1  # the last epoch that a survey has ended: its messages and older ones are refused
        self._batches: dict[int, Batch] = {}

    def _pool(self, number: int, pool: Pool, threads: int) -> LayerPool[Any]:
        kind = pool.config.layers[0].kind
        if kind not in _KINDS:
            raise UnsupportedModelError(
                f"layer {pool.layers[0]} is of kind {kind!r:.80}, this worker keeps {', '.join(_KINDS)}"
            )
        try:
            return _KINDS[kind](number, pool, threads, self.device, self.counters)
        except KVError as error:
            if pool.config.kv_memory == self.config.kv_memory:
                raise
            raise KVError(f"of {self.config.kv_memory} bytes of KV memory, for {kind} layers: {error}") from error

    def handle(self, request: Request) -> Reply | None:
        """Answer one message; `Fresh`, `FreshPages` and `Constants` have no answer.

        Raises ProtocolError for a message out of order or of a wrong shape, KVError for what the parts do not allow.
        """
        self.settle()
        match request:
            case Announcement():
                return self._announce(request)
            case Query() | Fresh() | Exchange() | Sample() | Advance():
                pool, layer = self._place(request.layer)
                batch = self._batch(request)
                return self.pools[pool].handle(batch.pools[pool], layer, request)
            case FreshPages():
                if request.pool >= len(self.pools):
                    raise ProtocolError(f"pages of pool {request.pool}, there are {len(self.pools)}")
                self.pools[request.pool].store_pages(self._batch(request).pools[request.pool], request)
                return None
            case Constants():
                pool, layer = self._place(request.layer)
                self.pools[pool].constants(layer, request)
                return None
            case Fetch() | FetchSample():
                pool, layer = self._place(request.layer)
                return self.pools[pool].fetch(layer, request)
            case FetchPages():
                return self.pools[pool_of(self.pools, request.handle)].fetch_pages(request)
            case Survey():
                return self._survey(request)
            case BlockTables():
                raise ProtocolError(
                    "block tables, from an engine that has said nothing of blocks; allowed: Announcement"
                )

    def layer_work(self, number: int, pool: int) -> LayerWork | None:
        """The work of a batch in flight in the layers of a pool, for compiled callers, which `worked` counts; None
        where it needs Python."""
        batch = self._batches.get(number)
        return None if batch is None else self.pools[pool].layer_work(batch.pools[pool])

    def state_work(self, number: int, pool: int) -> StateWork | None:
        """The work of a batch in flight in the layers of a pool of states; None where messages are needed."""
        states, batch = self.pools[pool], self._batches.get(number)
        return states.work(batch.pools[pool]) if batch is not None and isinstance(states, StatePool) else None

    def worked(self, number: int, pool: int, layers: range, work: LayerWork) -> None:
        """Compiled code has done these layers of a batch in flight, by their numbers within the pool."""
        if (batch := self._batches.get(number)) is not None:
            self.pools[pool].worked(batch.pools[pool], layers, work)

    def in_flight(self, number: int) -> bool:
        """Whether a batch was accepted and not dropped."""
        return number in self._batches

    @property
    def unsettled(self) -> int | None:
        """The batch of which something waits to be stored."""
        return next((pool.unsettled for pool in self.pools if pool.unsettled is not None), None)

    def settle(self) -> None:
        """Store what the last `Exchange` brought, if that was not done yet. Raises as `handle` does."""
        for pool in self.pools:
            pool.settle()

    def outdated(self, request: Request) -> bool:
        """Whether a message is of an epoch that ended with a survey."""
        return request.epoch <= self._fence

    @property
    def free_pages(self) -> tuple[int, ...]:
        """How many pages of each pool no part holds."""
        return tuple(pool.free_pages for pool in self.pools)

    @property
    def store(self) -> KVStore:
        """The pages of a worker whose layers are all of attention and of one shape. Raises KVError for others."""
        pool = self.pools[0]
        if len(self.pools) > 1 or not isinstance(pool, KVPool):
            raise KVError(f"this worker has {len(self.pools)} pools, of which each has pages of its own")
        return pool.store

    def check_integrity(self) -> None:
        """Raise KVError unless all that is kept agrees."""
        for pool in self.pools:
            pool.check_integrity()

    # Announcements.

    def _announce(self, message: Announcement) -> Announced:
        if self.outdated(message):
            raise ProtocolError(
                f"announcement of epoch {message.epoch}: others have taken over what is kept here, from epoch "
                f"{self._fence + 1} on"
            )
        last = self._epoch, self._last_batch
        if (message.epoch, message.batch) <= last:
            raise ProtocolError(f"announcement {(message.epoch, message.batch)} is not newer than {last}")
        if message.first > self._next_operation:
            raise ProtocolError(f"operation {message.first} announced, {self._next_operation} has not come yet")
        operations = message.operations[self._next_operation - message.first :]
        if not operations and message.epoch == self._epoch and self._followed(message):
            batch = self._batches[message.batch]
            floors = batch.by_row(pool.floors(readings) for pool, readings in zip(self.pools, batch.pools, strict=True))
            return self._accepted(message, floors, batch.numbers)
        self._drop_superseded(message, operations)
        self._epoch, self._last_batch = message.epoch, message.batch
        own_operations, numbers = dealt(self.pools, operations, message.rows)
        own_rows = [[message.rows[n] for n in of_pool] for of_pool in numbers]
        try:
            floors = self._update(own_operations, own_rows, numbers)
        except (PoolExhausted, TornParts) as error:
            starts = error.starts if isinstance(error, TornParts) else ()
            return Announced(message.epoch, message.batch, False, self.free_pages, (), str(error), starts=starts)
        for pool in self.pools:
            pool.commit()
        # The operations are applied, even if an error follows; the batch exists only once nothing has failed.
        self._next_operation = max(self._next_operation, message.first + len(message.operations))
        samples = self._begin(message, numbers, own_rows) if message.rows else ()
        return self._accepted(message, floors, numbers, samples)

    def _accepted(
        self,
        message: Announcement,
        floors: tuple[int, ...],
        numbers: Sequence[Sequence[int]],
        samples: tuple[int, ...] = (),
    ) -> Announced:
        """The answer to an announcement; `numbers`: of each pool, which of the rows are its own."""
        usages: tuple[Usage, ...] = ()
        of_row = {n: pool for pool, of_pool in zip(self.pools, numbers, strict=True) for n in of_pool}
        if any(of_row[n].counts_usage(row.handle) for n, row in enumerate(message.rows)):
            usages = tuple(of_row[n].usage(row.handle) for n, row in enumerate(message.rows))
        return Announced(message.epoch, message.batch, True, self.free_pages, floors, "", usages, (), samples)

    def _update(
        self, operations: Sequence[Sequence[Operation]], rows: Sequence[Sequence[Row]], numbers: Sequence[Sequence[int]]
    ) -> tuple[int, ...]:
        """Update all pools, or none: the floor of each row. Raises as a pool does; where some parts are torn, with the
        starts of all rows."""
        total = sum(map(len, numbers))
        floors, starts = [0] * total, [0] * total
        updated: list[LayerPool[Any]] = []
        refusal: PoolExhausted | None = None
        torn = False
        try:
            for pool, pool_operations, pool_rows, pool_numbers in zip(
                self.pools, operations, rows, numbers, strict=True
            ):
                begins = tuple(row.start for row in pool_rows)
                try:
                    for n, floor in zip(pool_numbers, pool.update(pool_operations, pool_rows), strict=True):
                        floors[n] = floor
                    updated.append(pool)
                except TornParts as error:
                    torn, begins = True, error.starts
                except PoolExhausted as error:
                    refusal = refusal or error
                for n, start in zip(pool_numbers, begins, strict=True):
                    starts[n] = start
            if torn:
                raise TornParts(tuple(starts))
            if refusal is not None:
                raise refusal
        except BaseException:
            for pool in updated:
                pool.revert()
            raise
        return tuple(floors)

    def _begin(self, message: Announcement, numbers: tuple[Ints, ...], rows: list[list[Row]]) -> Ints:
        """Begin a batch. Returns its `Announced.samples`."""
        heads = sum(pool.size(pool_rows) for pool, pool_rows in zip(self.pools, rows, strict=True))
        max_heads = max(pool.most_heads for pool in self.pools)
        self._drop_oldest(_IN_FLIGHT * max_heads - heads)  # before memory is taken by token
        pool_batches = tuple(
            pool.begin(pool_rows, self._delay(pool_rows)) for pool, pool_rows in zip(self.pools, rows, strict=True)
        )
        handles = frozenset(row.handle for row in message.rows)
        self._batches[message.batch] = Batch(message.rows, handles, numbers, pool_batches, heads)
        self.counters.batches += 1
        return samples_of(self.pools, pool_batches, numbers, len(message.rows))

    def _followed(self, message: Announcement) -> bool:
        """Whether the announced batch could be made of one in flight, whose place it takes: it has that one's rows,
        each further. If not, nothing has changed."""
        if not message.rows:
            return False
        first = message.rows[0].handle
        last, batch = next(((n, b) for n, b in self._batches.items() if b.rows[0].handle == first), (0, None))
        if batch is None or len(batch.rows) != len(message.rows):
            return False
        rows_by_pool = batch.dealt(message.rows)
        pairs = list(zip(self.pools, batch.pools, rows_by_pool, strict=True))
        if not all(pool.follows(pool_batch, rows) for pool, pool_batch, rows in pairs) or not self._resized(
            batch, message.rows
        ):
            return False
        self._last_batch = message.batch
        self._next_operation = max(self._next_operation, message.first + len(message.operations))
        batch.pools = tuple(pool.follow(pool_batch, rows, self._delay(rows)) for pool, pool_batch, rows in pairs)
        batch.rows = message.rows
        del self._batches[last]
        self._batches[message.batch] = batch
        self.counters.batches += 1
        return True

    def _resized(self, batch: Batch, rows: Sequence[Row]) -> bool:
        """Whether a batch in flight could have these rows instead, which are of the same parts, and no others need go
        for it. It counts so much then."""
        if [row.count for row in rows] == [row.count for row in batch.rows]:
            return True
        max_heads, others = max(pool.most_heads for pool in self.pools), batch.heads + _BATCH
        try:
            heads = sum(pool.size(pool_rows) for pool, pool_rows in zip(self.pools, batch.dealt(rows), strict=True))
        except ProtocolError:
            return False
        if (
            heads > batch.heads
            and sum(b.heads + _BATCH for b in self._batches.values()) - others > _IN_FLIGHT * max_heads - heads
        ):
            return False
        batch.heads = heads
        return True

    def _delay(self, rows: Sequence[Row]) -> float:
        return self.read_delay and self.read_delay * sum(row.read[1] - row.read[0] for row in rows if row.read) / 1e6

    def _drop_superseded(self, message: Announcement, operations: Sequence[Operation]) -> None:
        announced = {row.handle for row in message.rows}
        # Operations that were applied before came again because their reply was under way: so is their batch.
        announced.update(operation.handle for operation in operations if not only_bounds(self.pools, operation))
        for number, batch in list(self._batches.items()):
            if message.epoch > self._epoch or batch.handles & announced:
                self._drop(number)

    def _drop_oldest(self, room: int) -> None:
        """Drop the oldest batches so that the others have at most `room` tokens times heads. An engine has a few under
        way; older ones are over, but stay where none of their handles is announced again."""
        for number, batch in reversed(list(self._batches.items())):
            room -= batch.heads + _BATCH
            if room < 0:
                self._drop(number)

    def _drop(self, number: int) -> None:
        for pool, pool_batch in zip(self.pools, self._batches.pop(number).pools, strict=True):
            pool.end(pool_batch)

    def _survey(self, message: Survey) -> Surveyed:
        """The batches in flight end: their engine was lost, or has none in flight while it asks."""
        for number in list(self._batches):
            self._drop(number)
        self._fence = max(self._fence, self._epoch, message.epoch)
        keepers = {handle: pool for pool in self.pools for handle in pool.parts() if handle >= message.first}
        parts: list[PartHeld] = []
        numbers = 0
        for handle in sorted(keepers)[:MAX_PARTS]:
            part = keepers[handle].held(handle)
            numbers += 6 + len(part.heads)
            if parts and numbers > _SURVEYED_NUMBERS:
                break
            parts.append(part)
        more = len(keepers) - len(parts)
        return Surveyed(message.epoch, message.batch, self._epoch, self._next_operation, tuple(parts), more)

    def _place(self, layer: int) -> tuple[int, int]:
        """The pool of a layer, and its number there."""
        if not 0 <= layer < len(self._places):
            raise ProtocolError(f"layer {layer}, there are {len(self._places)}")
        return self._places[layer]

    def _batch(self, message: Query | Fresh | Exchange | Sample | Advance | FreshPages) -> Batch:
        batch = self._batches.get(message.batch)
        if message.epoch != self._epoch or batch is None:
            raise ProtocolError(
                f"batch {message.batch} of epoch {message.epoch} is not in flight (epoch {self._epoch}, "
                f"batches {sorted(self._batches)})"
            )
        return batch
