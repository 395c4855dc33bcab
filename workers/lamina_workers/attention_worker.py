"""One KV shard: append, attend, free. Built from a `HolderConfig` alone; knows no sockets, no model, no engine.

A batch is announced once; then, per layer, its `Fresh` is stored and its `Query` answered, in the order in which
they come. What an `Exchange` brings is stored after its answer was given, so that nobody waits for it: by `settle`,
or before the next message. A batch's state is dropped when one of its handles is announced again or a new epoch
comes, so a late message of a dropped batch is refused instead of touching pages that are now someone else's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.pages import Pages, gather
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages import (
    Announced,
    Announcement,
    Attended,
    Close,
    Exchange,
    Fetch,
    Fetched,
    Fork,
    Fresh,
    HolderConfig,
    LayerSpec,
    Query,
    Reply,
    Request,
    Row,
)
from lamina_workers.errors import KVError, PoolExhausted
from lamina_workers.kv_store import KVStore
from lamina_workers.layout import attention_kernels, page_count, page_layout
from lamina_workers.reader import Policies, Reader, Reading
from lamina_workers.retention import layer_policies


@dataclass(slots=True)
class Counters:
    """What a worker has done since it was made: batches accepted, query vectors attended, K vectors stored."""

    batches: int = 0
    queries: int = 0
    vectors_stored: int = 0


@dataclass(frozen=True, slots=True)
class _Batch:
    """An accepted batch: where its tokens go and what its queries read, the same for every layer."""

    handles: frozenset[int]
    fused: bool  # whether a row attends its own tokens
    places: Any  # the kernels' plan of where K and V go, None where no row stores
    sealed: torch.Tensor | None  # int64 [layers, pages] that are full once stored, where sketches are made of them
    readings: dict[Policies, Reading]  # what is read, by the policies of a layer's heads; empty where no row reads


class AttentionWorker:
    """Holds the KV of its parts and attends it. Every method runs on the caller's thread.

    Raises UnsupportedModelError for layers that its pages cannot keep, KVError for too little memory or a wrong dtype.
    """

    def __init__(self, config: HolderConfig, threads: int = 1) -> None:
        self.config = config
        self._threads = threads
        self._kernels = attention_kernels()
        n_pages = page_count(config)
        self.store = KVStore(config, n_pages)
        layout = page_layout(config)
        for _ in self._kernels.prepare(layout):
            pass
        self._pages = Pages.allocate(layout, n_pages)
        self._policies = [layer_policies(spec) for spec in config.layers]
        self._reader = Reader(config, self._kernels, self._pages, self.store, threads)
        self._epoch = 0
        self._last_batch = 0
        self._next_operation = 0
        self._batches: dict[int, _Batch] = {}
        self._unsettled: Exchange | None = None
        self.counters = Counters()

    def handle(self, request: Request) -> Reply | None:
        """Answer one message; `Fresh` has no answer.

        Raises ProtocolError for a message out of order or of a wrong shape, KVError for what the parts do not allow.
        """
        self.settle()
        match request:
            case Announcement():
                return self._announce(request)
            case Query():
                return self._attend(request)
            case Fresh():
                self._append(request)
                return None
            case Exchange():
                reply = self._attend(request)
                self._unsettled = request
                return reply
            case Fetch():
                return self._fetch(request)

    @property
    def unsettled(self) -> int | None:
        """The batch of which something waits to be stored."""
        return self._unsettled.batch if self._unsettled else None

    def settle(self) -> None:
        """Store what the last `Exchange` brought, if that was not done yet. Raises as `handle` does."""
        exchange, self._unsettled = self._unsettled, None
        if exchange is not None:
            self._append(exchange)

    def _announce(self, message: Announcement) -> Announced:
        if (message.epoch, message.batch) <= (self._epoch, self._last_batch):
            raise ProtocolError(
                f"announcement {(message.epoch, message.batch)} is not newer than {(self._epoch, self._last_batch)}"
            )
        if message.first > self._next_operation:
            raise ProtocolError(f"operation {message.first} announced, {self._next_operation} has not come yet")
        self._drop_superseded(message)
        self._epoch, self._last_batch = message.epoch, message.batch
        operations = message.operations[self._next_operation - message.first :]
        try:
            reservation = self.store.update(operations, message.rows)
        except PoolExhausted as error:
            return Announced(message.epoch, message.batch, False, self.store.free_pages, (), str(error))
        for operation in operations:
            if isinstance(operation, Close):
                self._reader.forget(operation.handle)
            elif isinstance(operation, Fork):
                self._reader.forked(operation)
        self._reader.absorb(reservation.absorbed)
        # They are applied, whatever goes wrong from here on; the batch exists only once all has gone right.
        self._next_operation = max(self._next_operation, message.first + len(message.operations))
        if reservation.copies_from.size:
            source, target = map(_indices, (reservation.copies_from, reservation.copies_to))
            self._kernels.copy(self._pages, source, target)
        if message.rows:
            self._batches[message.batch] = self._prepare(message.rows)
            self.counters.batches += 1
        usages = tuple(self._reader.usage(row.handle) for row in message.rows) if self._reader.tallies else ()
        return Announced(message.epoch, message.batch, True, self.store.free_pages, reservation.floors, usages=usages)

    def _drop_superseded(self, message: Announcement) -> None:
        announced = {row.handle for row in message.rows}
        # Those applied already came again because their first reply was still on its way: their batch is under way.
        new = message.operations[self._next_operation - message.first :]
        announced.update(operation.handle for operation in new)
        for number, batch in list(self._batches.items()):
            if message.epoch > self._epoch or batch.handles & announced:
                self._reader.over(batch.readings.values())
                del self._batches[number]

    def _prepare(self, rows: Sequence[Row]) -> _Batch:
        slots = [self.store.slots(row) for row in rows if row.store]
        slots = [s.reshape(s.shape[0], -1) for s in slots if s.size]
        places = None
        try:
            if slots:
                places = self._kernels.plan_append(self._pages, torch.from_numpy(np.concatenate(slots, axis=1)))
            readings = self._reader.readings([row for row in rows if row.read is not None])
        except ValueError as error:
            raise ProtocolError(f"rows that no batch can have: {error}") from error
        handles = frozenset(row.handle for row in rows)
        return _Batch(handles, any(row.fused for row in rows), places, self._reader.sealed(rows), readings)

    def _append(self, message: Fresh | Exchange) -> None:
        spec, batch = self._layer(message)
        if batch.places is None:
            raise ProtocolError(f"{len(message.k)} fresh vectors for batch {message.batch}, which stores 0")
        try:
            self._kernels.append(self._pages, batch.places, spec.kv_layer, message.k, message.v)
        except ValueError as error:
            raise ProtocolError(f"fresh vectors of batch {message.batch}: {error}") from error
        self._reader.seal(batch.sealed, spec.kv_layer)
        self.counters.vectors_stored += len(message.k)

    def _fetch(self, message: Fetch) -> Fetched:
        part = self.store.part(message.handle)
        if not 0 <= message.layer < len(self.config.layers):
            raise ProtocolError(f"layer {message.layer}, there are {len(self.config.layers)}")
        lo, hi = message.lo, message.hi
        if not part.lo <= lo <= hi <= part.held:
            raise KVError(f"[{lo}, {hi}) of part {message.handle} asked for, it holds [{part.lo}, {part.held})")
        spec, size = self.config.layers[message.layer], self.config.page_size
        first = (lo - part.lo) // size
        tables = part.table[spec.kv_layer, :, first : -(-(hi - part.lo) // size)]
        skip = lo - part.lo - first * size
        k = torch.empty(hi - lo, len(part.heads), spec.d_k, dtype=self._pages.layout.loaded)
        v = torch.empty(hi - lo, len(part.heads), spec.d_v, dtype=self._pages.layout.loaded)
        for head, table in enumerate(tables):
            pages = torch.from_numpy(np.maximum(table, 0))
            of_k, of_v = gather(self._pages, pages, hi - lo + skip)
            gone = torch.from_numpy(np.repeat(table < 0, size)[: hi - lo + skip, None])
            for_k, for_v = self._reader.stand_in(message.handle, spec.kv_layer, head)
            k[:, head] = torch.where(gone, for_k.to(of_k.dtype), of_k)[skip:]
            v[:, head] = torch.where(gone, for_v.to(of_v.dtype), of_v)[skip:]
        flat_k, flat_v = k.view(-1, spec.d_k), v.view(-1, spec.d_v)
        return Fetched(message.epoch, message.batch, message.layer, flat_k, flat_v)

    def _attend(self, message: Query | Exchange) -> Attended:
        _, batch = self._layer(message)
        if isinstance(message, Exchange) and batch.fused:
            raise ProtocolError(f"an exchange for batch {message.batch}, whose queries need its own keys stored first")
        if not batch.readings:
            raise ProtocolError(f"query for batch {message.batch}, none of whose rows read")
        reading = batch.readings[self._policies[message.layer]]
        try:
            out, lse = self._reader.attend(reading, message.layer, message.q)
        except ValueError as error:
            raise ProtocolError(f"query of batch {message.batch}: {error}") from error
        self.counters.queries += len(message.q)
        return Attended(message.epoch, message.batch, message.layer, out, lse)

    def _layer(self, message: Query | Fresh | Exchange) -> tuple[LayerSpec, _Batch]:
        batch = self._batches.get(message.batch)
        if message.epoch != self._epoch or batch is None:
            raise ProtocolError(
                f"batch {message.batch} of epoch {message.epoch} is not in flight (epoch {self._epoch}, "
                f"batches {sorted(self._batches)})"
            )
        if not 0 <= message.layer < len(self.config.layers):
            raise ProtocolError(f"layer {message.layer}, there are {len(self.config.layers)}")
        return self.config.layers[message.layer], batch


def _indices(pages: npt.NDArray[np.int32]) -> torch.Tensor:
    return torch.from_numpy(pages.astype(np.int64))
