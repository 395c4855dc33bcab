"""One KV shard: append, attend, free. Built from a `HolderConfig` alone.

A batch is announced once; then, per layer, its `Fresh` is stored and its `Query` answered, in the order in which
they come. What an `Exchange` brings is stored first where a row attends its own tokens; else after its answer was
given, so that the engine need not wait for it: by `settle`, or before the next message. A batch's state is dropped when
one of its handles is announced again or a new epoch comes: a late message of a dropped batch is refused, and never
touches pages that belong to another part by then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lamina_kernels.cpu.layer_work import LayerWork, layer_work
from lamina_kernels.paged.pages import Pages, store_whole
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages import (
    MAX_PARTS,
    Announced,
    Announcement,
    Attended,
    Close,
    Exchange,
    Fetch,
    FetchPages,
    Fork,
    Fresh,
    FreshPages,
    HolderConfig,
    LayerSpec,
    PartHeld,
    Query,
    Reply,
    Request,
    Row,
    Survey,
    Surveyed,
)
from lamina_workers.attention_worker.batch import Batch, Counters
from lamina_workers.attention_worker.decode_rows import DecodeRows, is_next
from lamina_workers.attention_worker.head_policies import HeadPolicies
from lamina_workers.attention_worker.kv_fetch import KvFetch, indices, layers_of, page_slots
from lamina_workers.attention_worker.kv_store import KVStore
from lamina_workers.attention_worker.page_layout import CPU, attention_kernels, layout_name, page_count, page_layout
from lamina_workers.attention_worker.paged_reader import PagedReader
from lamina_workers.devices.available import room_for
from lamina_workers.errors import PoolExhausted, TornParts

_WORKS = 4  # of batches that took turns last: one for each lane
_SURVEYED_NUMBERS = 50_000  # in one frame: its header has room for some 58,000 of the largest


class AttentionWorker:
    """Holds the KV of its parts and attends it. Every method runs on the caller's thread.

    Its pages lie on `device`, and so must the tensors of messages (`device_worker` copies them there).
    Raises UnsupportedModelError for layers that its pages cannot keep, KVError for too little memory or a wrong dtype,
    NotEnoughMemory where the device lacks it, PolicyError for a policy that its device cannot serve.

    `read_delay` makes it slow, for experiments: seconds of sleep for each million positions that a layer reads.
    """

    read_delay = 0.0

    def __init__(self, config: HolderConfig, threads: int = 1, device: torch.device = CPU) -> None:
        self.config = config
        self.device = device
        self._threads = threads
        self._kernels = attention_kernels(device)
        self._policies = HeadPolicies.of(config)
        n_pages = page_count(config, device)
        layout = page_layout(config, device)
        for _ in self._kernels.prepare(layout):
            pass
        with room_for("KV pages", n_pages * layout.page_bytes, device):
            self.store = KVStore(config, self._policies, n_pages)
            self._pages = Pages.allocate(layout, n_pages, device)
        self.page_layout = layout_name(layout)
        self._reader = PagedReader(config, self._policies, self._kernels, self._pages, self.store, threads)
        self._fetching = KvFetch(config, self.store, self._pages, self._reader, device)
        self._epoch = 0
        self._last_batch = 0
        self._next_operation = 0
        self._fence = -1  # the last epoch that a survey has ended: its messages and older ones are refused
        self._batches: dict[int, Batch] = {}
        self._kv_layers = {spec.kv_layer for spec in config.layers}
        self._unsettled: Exchange | None = None
        self._works: dict[tuple[Any, ...], LayerWork] = {}  # the last ones, by what they were made of
        self.counters = Counters()

    def handle(self, request: Request) -> Reply | None:
        """Answer one message; `Fresh` and `FreshPages` have no answer.

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
            case FreshPages():
                self._store_pages(request)
                return None
            case Exchange():
                if self._batch(request).fused:
                    self._append(request)
                    return self._attend(request)
                reply = self._attend(request)
                self._unsettled = request
                return reply
            case Fetch():
                return self._fetching.fetch(request)
            case FetchPages():
                return self._fetching.fetch_pages(request)
            case Survey():
                return self._survey(request)

    def layer_work(self, number: int) -> LayerWork | None:
        """The work of a batch in flight for compiled callers, which `worked` counts; None where it needs Python: other
        kernels, choosers, means, sketches to be made."""
        batch = self._batches.get(number)
        if batch is None or batch.sealed is not None or (batch.stores and batch.places is None):
            return None
        # Batches of a series have plans with the same blocks, so they have the same work.
        blocks = [None if reading.plan is None else id(reading.plan.arguments) for reading in batch.readings.values()]
        key = (*blocks, id(batch.places), batch.fused)
        work = self._works.get(key)
        if work is None and (readings := self._reader.layer_readings(batch.readings)) is not None:
            work = layer_work(readings, batch.places, batch.fused)
            if work is not None:
                kept = list(self._works.items())[1 - _WORKS :]  # what they are made of stays, so no address comes again
                self._works = {**dict(kept), key: work}
        if work is not None:
            work.block.delay = round(batch.delay * 1e6)
        return work

    def worked(self, number: int, layers: range, work: LayerWork) -> None:
        """These layers of a batch in flight were stored and attended by compiled code."""
        batch = self._batches.get(number)
        if batch is None:
            return
        if batch.stores:
            self._stored(batch, (spec.kv_layer for spec in self.config.layers[layers.start : layers.stop]))
        if len(batch.readings) == 1:
            next(iter(batch.readings.values())).layers += len(layers)
        elif batch.readings:
            for policies in self._policies.reads[layers.start : layers.stop]:
                batch.readings[policies].layers += 1
        self.counters.queries += work.queries * len(layers)
        self.counters.vectors_stored += work.fresh * len(layers)

    def in_flight(self, number: int) -> bool:
        """Whether a batch was accepted and not dropped."""
        return number in self._batches

    @property
    def unsettled(self) -> int | None:
        """The batch of which something waits to be stored."""
        return self._unsettled.batch if self._unsettled else None

    def settle(self) -> None:
        """Store what the last `Exchange` brought, if that was not done yet. Raises as `handle` does."""
        exchange, self._unsettled = self._unsettled, None
        if exchange is not None:
            self._append(exchange)

    def outdated(self, request: Request) -> bool:
        """Whether a message is of an epoch that ended with a survey."""
        return request.epoch <= self._fence

    def _announce(self, message: Announcement) -> Announced:
        if self.outdated(message):
            raise ProtocolError(
                f"announcement of epoch {message.epoch}: others have taken over what is kept here, from epoch "
                f"{self._fence + 1} on"
            )
        if (message.epoch, message.batch) <= (self._epoch, self._last_batch):
            raise ProtocolError(
                f"announcement {(message.epoch, message.batch)} is not newer than {(self._epoch, self._last_batch)}"
            )
        if message.first > self._next_operation:
            raise ProtocolError(f"operation {message.first} announced, {self._next_operation} has not come yet")
        operations = message.operations[self._next_operation - message.first :]
        if not operations and message.epoch == self._epoch and self._followed(message):
            floors = (0,) * len(message.rows)  # what releases pages does not simply follow
            return Announced(message.epoch, message.batch, True, self.store.free_pages, floors)
        self._drop_superseded(message)
        self._epoch, self._last_batch = message.epoch, message.batch
        try:
            reservation = self.store.update(operations, message.rows)
        except (PoolExhausted, TornParts) as error:
            starts = error.starts if isinstance(error, TornParts) else ()
            free = self.store.free_pages
            return Announced(message.epoch, message.batch, False, free, (), str(error), starts=starts)
        for operation in operations:
            if isinstance(operation, Close):
                self._reader.forget(operation.handle)
            elif isinstance(operation, Fork):
                self._reader.forked(operation)
        self._reader.absorb(reservation.absorbed)
        # The operations are applied, even if an error follows; the batch exists only once nothing has failed.
        self._next_operation = max(self._next_operation, message.first + len(message.operations))
        if reservation.copies_from.size:
            source, target = map(indices, (reservation.copies_from, reservation.copies_to))
            self._kernels.copy(self._pages, source, target)
        if message.rows:
            self._batches[message.batch] = self._prepare(message.rows, tuple(self._stores(message.rows)))
            self.counters.batches += 1
        usages = tuple(self._reader.usage(row.handle) for row in message.rows) if self._reader.tallies else ()
        return Announced(message.epoch, message.batch, True, self.store.free_pages, reservation.floors, usages=usages)

    def _followed(self, message: Announcement) -> bool:
        """Whether the announced batch could be made of one in flight, whose place it takes: it has that one's rows,
        each a token further. If not, nothing has changed."""
        if not message.rows or not self._reader.plain:
            return False
        first = message.rows[0].handle
        last, batch = next(((n, b) for n, b in self._batches.items() if b.rows[0].handle == first), (0, None))
        if batch is None or len(batch.readings) != 1 or (batch.stores and batch.missing):
            return False
        (reading,) = batch.readings.values()
        if (series := batch.series) is None and is_next(batch.rows, message.rows):
            series = DecodeRows.of(self.store, self._kernels, batch.rows, reading.plan, batch.places)
        if series is None or (plan := series.next(message.rows)) is None:
            return False
        self._last_batch = message.batch
        self._next_operation = max(self._next_operation, message.first + len(message.operations))
        stores = tuple(row for row in message.rows if row.store)
        del self._batches[last]
        reading.plan, reading.layers = plan, 0
        self._batches[message.batch] = Batch(
            batch.handles, batch.fused, stores, set(self._kv_layers), batch.places, None, batch.readings,
            self._delay(message.rows), message.rows, series,
        )  # fmt: skip
        self.counters.batches += 1
        return True

    def _delay(self, rows: Iterable[Row]) -> float:
        read = sum(row.read[1] - row.read[0] for row in rows if row.read is not None) if self.read_delay else 0
        return self.read_delay * read / 1e6

    def _drop_superseded(self, message: Announcement) -> None:
        announced = {row.handle for row in message.rows}
        # Operations that were applied before came again because their reply was under way: so is their batch.
        new = message.operations[self._next_operation - message.first :]
        announced.update(operation.handle for operation in new)
        for number, batch in list(self._batches.items()):
            if message.epoch > self._epoch or batch.handles & announced:
                self._reader.end(batch.readings.values())
                del self._batches[number]

    def _stores(self, rows: Sequence[Row]) -> Iterator[Row]:
        for row in rows:
            part = self.store.part(row.handle)
            if any(row.stored(part.lo, part.hi)):
                yield row

    def _prepare(self, rows: Sequence[Row], stores: tuple[Row, ...]) -> Batch:
        try:
            readings = self._reader.readings([row for row in rows if row.read is not None])
            # Planned now, before the first layer. Rows that only store may come as whole pages, which need no plan.
            places = self._plan(stores) if stores and readings else None
        except ValueError as error:
            raise ProtocolError(f"rows that no batch can have: {error}") from error
        handles = frozenset(row.handle for row in rows)
        fused, missing = any(row.fused for row in rows), set(self._kv_layers)
        sealed = self._reader.sealed(rows)
        return Batch(handles, fused, stores, missing, places, sealed, readings, self._delay(rows), tuple(rows))

    def _plan(self, stores: Iterable[Row]) -> Any:
        slots = [self.store.slots(row) for row in stores]
        each = np.concatenate([s.reshape(s.shape[0], -1) for s in slots], axis=1)
        return self._kernels.plan_append(self._pages, torch.from_numpy(each))

    def _append(self, message: Fresh | Exchange) -> None:
        spec, batch = self._layer(message)
        if not batch.stores:
            raise ProtocolError(f"{len(message.k)} fresh vectors for batch {message.batch}, which stores 0")
        try:
            if batch.places is None:
                batch.places = self._plan(batch.stores)
            self._kernels.append(self._pages, batch.places, spec.kv_layer, message.k, message.v)
        except ValueError as error:
            raise ProtocolError(f"fresh vectors of batch {message.batch}: {error}") from error
        self._stored(batch, (spec.kv_layer,))
        self.counters.vectors_stored += len(message.k)

    def _store_pages(self, message: FreshPages) -> None:
        batch = self._batch(message)
        layers = layers_of(message, self.config)
        tables, vectors = [], 0
        for row in batch.stores:
            part = self.store.part(row.handle)
            first, end = row.stored(part.lo, part.hi)
            tables.append(
                part.table[layers, :, page_slots(part.lo, first, end, self.config.page_size)].reshape(
                    message.layers, -1
                )
            )
            vectors += message.layers * len(part.heads) * (end - first)
        if not tables:
            raise ProtocolError(f"{len(message.pages)} fresh pages for batch {message.batch}, which stores 0")
        index = indices(np.concatenate(tables, axis=1).reshape(-1))
        try:
            store_whole(self._pages, index.to(self.device), message.pages.to(self.device))
        except ValueError as error:
            raise ProtocolError(f"fresh pages of batch {message.batch}: {error}") from error
        self._stored(batch, range(layers.start, layers.stop))
        self.counters.vectors_stored += vectors

    def _stored(self, batch: Batch, layers: Iterable[int]) -> None:
        """All K and V that a batch stores in these layers have come."""
        for layer in layers:
            self._reader.seal(batch.sealed, layer)
            batch.missing.discard(layer)
        if not batch.missing:
            self.store.stored(batch.stores)

    def _survey(self, message: Survey) -> Surveyed:
        """The batches in flight end: their engine is gone, or has none in flight while it asks."""
        for batch in self._batches.values():
            self._reader.end(batch.readings.values())
        self._batches.clear()
        self._fence = max(self._fence, self._epoch, message.epoch)
        handles = sorted(handle for handle in self.store.parts() if handle >= message.first)
        parts: list[PartHeld] = []
        numbers = 0
        for handle in handles[:MAX_PARTS]:
            part = self.store.part(handle)
            numbers += 5 + len(part.heads)
            if parts and numbers > _SURVEYED_NUMBERS:
                break
            parts.append(PartHeld(handle, part.heads, part.lo, part.hi, part.stored, self.store.floor(part)))
        more = len(handles) - len(parts)
        return Surveyed(message.epoch, message.batch, self._epoch, self._next_operation, tuple(parts), more)

    def _attend(self, message: Query | Exchange) -> Attended:
        _, batch = self._layer(message)
        if not batch.readings:
            raise ProtocolError(f"query for batch {message.batch}, none of whose rows read")
        reading = batch.readings[self._policies.reads[message.layer]]
        begun = time.perf_counter()
        try:
            out, lse = self._reader.attend(reading, message.layer, message.q)
        except ValueError as error:
            raise ProtocolError(f"query of batch {message.batch}: {error}") from error
        if batch.delay:
            time.sleep(batch.delay)
        self.counters.queries += len(message.q)
        return Attended(message.epoch, message.batch, message.layer, out, lse, time.perf_counter() - begun)

    def _layer(self, message: Query | Fresh | Exchange) -> tuple[LayerSpec, Batch]:
        batch = self._batch(message)
        if not 0 <= message.layer < len(self.config.layers):
            raise ProtocolError(f"layer {message.layer}, there are {len(self.config.layers)}")
        return self.config.layers[message.layer], batch

    def _batch(self, message: Query | Fresh | Exchange | FreshPages) -> Batch:
        batch = self._batches.get(message.batch)
        if message.epoch != self._epoch or batch is None:
            raise ProtocolError(
                f"batch {message.batch} of epoch {message.epoch} is not in flight (epoch {self._epoch}, "
                f"batches {sorted(self._batches)})"
            )
        return batch
