"""A pool of attention layers at one worker (`KVPool`): appends and attends the KV of its parts.

A batch touches only the pages that its rows have reserved. Other holders fetch keys and values of a range of a part, or
whole pages as they lie (`KvFetch`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.exchange.layer_work import LayerWork, layer_work
from lamina_kernels.paged.pages import PageLayout, Pages, copy, gather, gather_heads, store_whole, whole
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames.bounds import MAX_PAYLOAD
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import (
    Attended,
    Bound,
    Close,
    Constants,
    Exchange,
    Fetch,
    Fetched,
    FetchedPages,
    FetchedSample,
    FetchPages,
    FetchSample,
    Fresh,
    FreshPages,
    Operation,
    PartHeld,
    Query,
    Reply,
    Row,
    Sample,
    Usage,
)
from lamina_protocols.messages.pools import Pool
from lamina_workers.attention_worker.batch import Counters, KVBatch
from lamina_workers.attention_worker.cold_pages import ColdPages
from lamina_workers.attention_worker.decode_rows import DecodeRows, is_next
from lamina_workers.attention_worker.page_layout import attention_kernels, layout_name, page_count, page_layout
from lamina_workers.attention_worker.paged_reader import PagedReader, Readings
from lamina_workers.attention_worker.pool import Layered, LayerPool
from lamina_workers.devices.available import room_for
from lamina_workers.errors import KVError
from lamina_workers.kv_pages.cold_file import check_folder
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.kv_pages.parts import Int32, KvPart, Reservation


class KvFetch:
    """Answers `Fetch` and `FetchPages` for one pool of a worker, whose pages lie on `device`."""

    def __init__(self, config: HolderConfig, store: KVStore, pages: Pages, device: torch.device) -> None:
        self._config = config
        self._store = store
        self._pages = pages
        self._device = device

    def fetch_pages(self, message: FetchPages) -> FetchedPages:
        """Raises KVError where a part has not what is asked for, ProtocolError for layers that are not there."""
        part = self._held(message)
        slots = page_slots(part.lo, message.lo, message.hi, self._config.page_size)
        tables = part.table[layers_of(message, self._config), :, slots]
        pages = whole(self._pages, indices(tables.reshape(-1)).to(self._device)).cpu()
        return FetchedPages(message.epoch, message.batch, message.layer, pages)

    def fetch(self, layer: int, message: Fetch) -> Fetched:
        """`layer`: the number of the message's layer within the pool. Raises KVError as `fetch_pages`."""
        part, lo, hi = self._held(message), message.lo, message.hi
        spec, size = self._config.layers[layer], self._config.page_size
        first = (lo - part.lo) // size
        tables = part.table[spec.kv_layer, :, first : -(-(hi - part.lo) // size)]
        skip = lo - part.lo - first * size
        if (tables >= 0).all():
            all_k, all_v = gather_heads(self._pages, indices(tables).to(self._device))
            tokens = slice(skip, skip + hi - lo)
            flat_k, flat_v = (x[tokens].flatten(0, 1).cpu() for x in (all_k, all_v[..., : spec.own_v]))
            return Fetched(message.epoch, message.batch, message.layer, flat_k, flat_v)
        k = torch.empty(hi - lo, len(part.heads), spec.key_width, dtype=self._pages.layout.loaded)
        v = torch.empty(hi - lo, len(part.heads), spec.own_v, dtype=self._pages.layout.loaded)
        for head, table in enumerate(tables):
            pages = torch.from_numpy(np.maximum(table, 0))
            of_k, of_v = (x.cpu() for x in gather(self._pages, pages, hi - lo + skip))
            freed = torch.from_numpy(np.repeat(table < 0, size)[: hi - lo + skip, None])
            k[:, head] = of_k.masked_fill(freed, 0)[skip:]
            v[:, head] = of_v.masked_fill(freed, 0)[skip:, : spec.own_v]
        return Fetched(message.epoch, message.batch, message.layer, k.flatten(0, 1), v.flatten(0, 1))

    def _held(self, message: Fetch | FetchPages) -> KvPart:
        """The part of a request. Raises KVError unless it holds the positions that are asked for."""
        part, lo, hi = self._store.part(message.handle), message.lo, message.hi
        if not part.lo <= lo <= hi <= part.stored:
            raise KVError(f"[{lo}, {hi}) of part {message.handle} asked for, it holds [{part.lo}, {part.stored})")
        return part


def layers_of(message: FetchPages | FreshPages, config: HolderConfig) -> slice:
    """The layers with KV that a message of pages is about. Raises ProtocolError where some are not there."""
    first, end = message.layer, message.layer + message.layers
    layer_count = 1 + max(spec.kv_layer for spec in config.layers)
    if not 0 <= first < end <= layer_count:
        raise ProtocolError(f"KV of layers [{first}, {end}), there are {layer_count}")
    return slice(first, end)


def page_slots(begin: int, lo: int, hi: int, size: int) -> slice:
    """The slots of positions [lo, hi) in a part which begins at `begin`. Raises KVError where `lo` is inside a page."""
    first, inside = divmod(lo - begin, size)
    if inside:
        raise KVError(f"pages from position {lo} on, which is number {inside} of its page")
    return slice(first, -(-(hi - begin) // size))


def indices(pages: npt.NDArray[np.int32]) -> torch.Tensor:
    """Numbers of pages as torch takes them."""
    return torch.from_numpy(pages.astype(np.int64))


_WORKS = 32  # of batches that took turns last: for each lane, and for each number of tokens that its batches have


class KVPool(LayerPool[KVBatch]):
    """Of attention layers. `number`: which pool of the worker it is. What it does is counted in
    `counters`. Raises as `AttentionWorker` does."""

    def __init__(self, number: int, pool: Pool, threads: int, device: torch.device, counters: Counters) -> None:
        self.config = config = pool.config
        self._number = number
        self._numbers = pool.layers
        self._device = device
        self._counters = counters
        self._kernels = attention_kernels(device)
        policies = self._policies()
        self.n_pages = self._page_count()
        layout = page_layout(config, device)
        for _ in self._kernels.prepare(layout):
            pass
        with room_for("KV pages", self.n_pages * layout.page_bytes, device):
            self.store: KVStore = self._new_store(policies)
            self.pages = self._arena(layout)
        self.layout = layout_name(layout)
        self.reader = PagedReader(config, policies, self._kernels, self.pages, self.store, threads)
        self._cold: ColdPages | None = None
        if config.cold is not None:
            check_folder(config.cold.folder, device.type)
            limit, sketch = int(config.kv_memory * config.cold.resident), self.reader.sketch_bytes
            self._cold = ColdPages(config.cold.folder, limit, sketch, self.pages, self.store)
            self.reader.touch = self._cold.touch
        self._fetching = KvFetch(config, self.store, self.pages, device)
        self._kv_layers = {spec.kv_layer for spec in config.layers}
        # of the rows of a batch: their queries in two bytes a number fill a frame
        self.most_heads = MAX_PAYLOAD // max(2 * spec.group * spec.query_width for spec in config.layers)
        self._updated: tuple[Sequence[Operation], Reservation]
        self._unsettled: tuple[KVBatch, int, Exchange] | None = None
        self._works: dict[tuple[Any, ...], LayerWork] = {}  # the last ones, by what they were made of

    # What it is made of.

    def _policies(self) -> HeadPolicies:
        return HeadPolicies.of(self.config)

    def _page_count(self) -> int:
        return page_count(self.config, self._device)

    def _new_store(self, policies: HeadPolicies) -> KVStore:
        return KVStore(self.config, policies, self.n_pages)

    def _arena(self, layout: PageLayout) -> Pages:
        return Pages.allocate(layout, self.n_pages, self._device)

    # Parts.

    def held(self, handle: int) -> PartHeld:
        part = self.store.part(handle)
        return PartHeld(handle, self._number, part.heads, part.lo, part.hi, part.stored, self.store.floor(part))

    def counts_usage(self, handle: int) -> bool:
        return self.store.part(handle).policies.counted

    def usage(self, handle: int) -> Usage:
        usage = self.reader.usage(handle)
        return usage if self._cold is None else replace(usage, resident=self._cold.resident(handle, usage.held))

    def update(self, operations: Sequence[Operation], rows: Sequence[Row]) -> tuple[int, ...]:
        reservation = self.store.update(operations, rows)
        self._updated = operations, reservation
        return reservation.floors

    def commit(self) -> None:
        operations, reservation = self._updated
        for operation in operations:
            if isinstance(operation, Close):
                self.reader.forget(operation.handle)
                if self._cold is not None:
                    self._cold.forget(operation.handle)
            elif not isinstance(operation, Bound):
                self.reader.opened(operation)
        if reservation.copies_from.size:
            source, target = map(indices, (reservation.copies_from, reservation.copies_to))
            copy(self.pages, source, target)

    def check_integrity(self) -> None:
        self.store.check_integrity()
        if self._cold is not None:
            self._cold.check_integrity()

    # Batches.

    def begin(self, rows: Sequence[Row], delay: float) -> KVBatch:
        stores = tuple(self._stores(rows))
        try:
            readings = self.reader.readings([row for row in rows if row.read is not None])
            # Planned now, before the first layer. Rows that only store may come as whole pages, which need no plan.
            places = self._plan(stores) if stores and readings.each else None
        except ValueError as error:
            raise ProtocolError(f"rows that no batch can have: {error}") from error
        fused, missing = any(row.fused for row in rows), set(self._kv_layers)
        sealed, written = self.reader.sealed(rows), self._begin_cold(rows, readings)
        samples = self.reader.queries.begin(rows)
        return KVBatch(rows, fused, stores, missing, places, sealed, readings, delay, samples, written)

    def samples(self, batch: KVBatch) -> tuple[int, ...]:
        return batch.samples.strides if batch.samples is not None else ()

    def follows(self, batch: KVBatch, rows: Sequence[Row]) -> bool:
        if not rows:
            return True
        if any(row.prompt for row in rows):  # its queries may have to be kept
            return False
        readings = batch.readings
        if not readings.each or (batch.stores and batch.missing) or not self.reader.goes_on(readings, rows):
            return False
        if batch.series is None and is_next(batch.rows, rows):
            counts = [(reading, readings.by_layer.count(number)) for number, reading in enumerate(readings.each)]
            batch.series = DecodeRows.of(
                self.store, self._kernels, self.pages, batch.rows, counts, batch.places, readings.counted
            )
        return batch.series is not None and batch.series.follows(rows)

    def follow(self, batch: KVBatch, rows: Sequence[Row], delay: float) -> KVBatch:
        if batch.series is None:  # there are no rows
            return batch
        self.end(batch)
        places = batch.series.next(rows)
        stores = tuple(row for row in rows if row.store)
        missing, written = set(self._kv_layers), self._begin_cold(rows, batch.readings)
        return KVBatch(
            rows,
            batch.fused,
            stores,
            missing,
            places,
            self.reader.sealed(stores),
            batch.readings,
            delay,
            None,
            written,
            batch.series.counts(),
            batch.series,
        )

    def floors(self, batch: KVBatch) -> Sequence[int]:
        return batch.series.floors if batch.series is not None else (0,) * len(batch.rows)

    def end(self, batch: KVBatch) -> None:
        attended = sum(reading.layers for reading in batch.readings.each)
        counts = batch.counts if attended == len(self.config.layers) else ()  # of a batch that was given up, nothing
        self.reader.end(batch.readings.each, counts)
        self._end_cold(batch)

    def _begin_cold(self, rows: Sequence[Row], readings: Readings) -> Int32 | None:
        if self._cold is None:
            return None
        layers: list[set[int]] = [set() for _ in readings.each]
        for number, spec in zip(readings.by_layer, self.config.layers, strict=False):  # or nothing reads
            layers[number].add(spec.kv_layer)
        return self._cold.begin(
            rows,
            [(sorted(layer_numbers), reading) for layer_numbers, reading in zip(layers, readings.each, strict=True)],
        )

    def _end_cold(self, batch: KVBatch) -> None:
        if self._cold is not None and batch.written is not None:
            self._cold.end(batch.written)

    def _stores(self, rows: Sequence[Row]) -> Iterator[Row]:
        for row in rows:
            part = self.store.part(row.handle)
            if any(row.stored(part.lo, part.hi)):
                yield row

    def _plan(self, stores: Iterable[Row]) -> Any:
        slots = [self.store.slots(row) for row in stores]
        columns = np.concatenate([s.reshape(s.shape[0], -1) for s in slots], axis=1)
        return self._kernels.plan_append(self.pages, torch.from_numpy(columns))

    # Messages.

    @property
    def unsettled(self) -> int | None:
        return self._unsettled[2].batch if self._unsettled else None

    def settle(self) -> None:
        unsettled, self._unsettled = self._unsettled, None
        if unsettled is not None:
            self._append(*unsettled)

    def handle(self, batch: KVBatch, layer: int, message: Layered) -> Reply | None:
        match message:
            case Query():
                return self._attend(batch, layer, message)
            case Fresh():
                self._append(batch, layer, message)
                return None
            case Exchange() if batch.fused:
                self._append(batch, layer, message)
                return self._attend(batch, layer, message)
            case Exchange():
                reply = self._attend(batch, layer, message)
                self._unsettled = batch, layer, message
                return reply
            case Sample():
                self.reader.queries.came(batch.samples, layer, message, self._has(batch, layer))
                return None
        raise self._refused(message)

    def constants(self, layer: int, message: Constants) -> None:
        raise self._refused(message)

    def fetch(self, layer: int, message: Fetch | FetchSample) -> Fetched | FetchedSample:
        if isinstance(message, FetchSample):
            return self.reader.queries.fetch(layer, message)
        self._read_whole(message.handle, [self.config.layers[layer].kv_layer])
        return self._fetching.fetch(layer, message)

    def fetch_pages(self, message: FetchPages) -> FetchedPages:
        self._read_whole(message.handle, range(self.store.layers))
        return self._fetching.fetch_pages(message)

    def _read_whole(self, handle: int, layers: Sequence[int]) -> None:
        """A part is read by another holder."""
        if self._cold is not None:
            self._cold.read(handle, layers, range(len(self.store.part(handle).heads)))

    def store_pages(self, batch: KVBatch, message: FreshPages) -> None:
        layers = layers_of(message, self.config)
        tables, vectors = [], 0
        for row in batch.stores:
            part = self.store.part(row.handle)
            first, end = row.stored(part.lo, part.hi)
            table = part.table[layers, :, page_slots(part.lo, first, end, self.config.page_size)]
            tables.append(table.reshape(message.layers, -1))
            vectors += message.layers * len(part.heads) * (end - first)
        if not tables:
            raise ProtocolError(f"{len(message.pages)} fresh pages for batch {message.batch}, which stores 0")
        index = indices(np.concatenate(tables, axis=1).reshape(-1))
        try:
            store_whole(self.pages, index.to(self._device), message.pages.to(self._device))
        except ValueError as error:
            raise ProtocolError(f"fresh pages of batch {message.batch}: {error}") from error
        self._stored(batch, range(layers.start, layers.stop))
        self._counters.vectors_stored += vectors

    def _append(self, batch: KVBatch, layer: int, message: Fresh | Exchange) -> None:
        kv_layer = self.config.layers[layer].kv_layer
        if not batch.stores:
            raise ProtocolError(f"{len(message.k)} fresh vectors for batch {message.batch}, which stores 0")
        try:
            if batch.places is None:
                batch.places = self._plan(batch.stores)
            self._kernels.append(self.pages, batch.places, kv_layer, message.k, message.v)
        except ValueError as error:
            raise ProtocolError(f"fresh vectors of batch {message.batch}: {error}") from error
        self._stored(batch, (kv_layer,))
        self._counters.vectors_stored += len(message.k)

    def _stored(self, batch: KVBatch, layers: Iterable[int]) -> None:
        """All K and V that a batch stores in these layers have come."""
        layers = list(layers)
        self.reader.seal(batch.sealed, layers)
        batch.missing.difference_update(layers)
        if batch.samples is not None and batch.samples.waiting:
            for layer in layers:
                self._show(batch, layer)
        if not batch.missing:
            self.store.stored(batch.stores)

    def _has(self, batch: KVBatch, layer: int) -> bool:
        """Whether all that a batch stores of a layer is stored."""
        return not batch.stores or self.config.layers[layer].kv_layer not in batch.missing

    def _show(self, batch: KVBatch, kv_layer: int) -> None:
        """Prompts' queries have waited for the keys of a layer."""
        for number, spec in enumerate(self.config.layers):
            if spec.kv_layer == kv_layer and batch.samples is not None:
                self.reader.queries.stored(batch.samples, number)

    def _attend(self, batch: KVBatch, layer: int, message: Query | Exchange) -> Attended:
        if not batch.readings.each:
            raise ProtocolError(f"query for batch {message.batch}, none of whose rows read")
        reading = batch.readings.of(layer)
        start_time = time.perf_counter()
        try:
            out, lse = self.reader.attend(reading, layer, message.q)
        except ValueError as error:
            raise ProtocolError(f"query of batch {message.batch}: {error}") from error
        if batch.delay:
            time.sleep(batch.delay)
        self._counters.queries += len(message.q)
        if batch.samples is not None:
            self.reader.queries.asked(batch.samples, layer, message.q, self._has(batch, layer))
        return Attended(message.epoch, message.batch, message.layer, out, lse, time.perf_counter() - start_time)

    def _refused(self, message: Layered | Constants) -> ProtocolError:
        name, kind = type(message).__name__, self.config.layers[0].kind
        return ProtocolError(f"{name} for layer {message.layer}, whose kind is {kind}; allowed: Query, Fresh, Exchange")

    # Layers without Python.

    def layer_work(self, batch: KVBatch) -> LayerWork | None:
        """It needs Python where there are other kernels, choosers, queries to be kept."""
        if batch.samples is not None or (batch.stores and batch.places is None):
            return None
        # Batches of a series have plans with the same blocks, so they have the same work.
        blocks = [None if reading.plan is None else id(reading.plan.arguments) for reading in batch.readings.each]
        key = (*blocks, id(batch.places), batch.fused)
        work = self._works.get(key)
        if work is None and (readings := self.reader.layer_readings(batch.readings, self._numbers)) is not None:
            work = layer_work(readings, batch.places, batch.fused)
            if work is not None:
                # What recent works are made of stays, so no address comes again.
                recent_works = list(self._works.items())[1 - _WORKS :]
                self._works = {**dict(recent_works), key: work}
        if work is not None:
            work.block.delay = round(batch.delay * 1e6)
        return work

    def worked(self, batch: KVBatch, layers: range, work: LayerWork) -> None:
        if batch.stores:
            self._stored(batch, (spec.kv_layer for spec in self.config.layers[layers.start : layers.stop]))
        readings = batch.readings
        if len(readings.each) == 1:
            readings.each[0].layers += len(layers)
        elif readings.each:
            for layer in layers:
                readings.of(layer).layers += 1
        self._counters.queries += work.queries * len(layers)
        self._counters.vectors_stored += work.fresh * len(layers)
