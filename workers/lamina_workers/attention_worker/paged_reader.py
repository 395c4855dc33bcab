"""What a batch reads at one worker (`PagedReader`): each KV head of a part by its policy, by positions or by choice.

What static policies see is planned once a batch, row by row (`ReadingBuilder`), for all layers that are read alike.
Each vector of the flat q is either in the kernels' plan or in one cell of an adaptive policy. In each layer the plan is
attended, and adaptive policies choose what else is read. The reader keeps the sketches by which they choose.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lamina_kernels.exchange.layer_work import LayerReading
from lamina_kernels.paged.pages import PageLayout, Pages, gather_keys
from lamina_kernels.paged.rows import Ints, Rows
from lamina_kernels.partial import Partial, empty
from lamina_kernels.select import Kernels
from lamina_kernels.sketches import sketches
from lamina_kernels.sketches.layout import Sketches
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import Fork, Open, Row, Usage
from lamina_workers.attention_worker.adaptive import AdaptiveAttention, Cell, CellGroup, Tallies, Touch
from lamina_workers.attention_worker.index_attention import IndexAttention, IndexReading
from lamina_workers.attention_worker.prompt_queries import PromptQueries
from lamina_workers.attention_worker.row_builder import Origin, RowBuilder, RowQueries
from lamina_workers.errors import KVError
from lamina_workers.kv_pages.head_policies import HeadPolicies, read_alike
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.kv_pages.parts import KvPart
from lamina_workers.policies.chooser import Adaptive, Float32, Holding
from lamina_workers.policies.policy import Policy
from lamina_workers.policies.query_samples import QuerySamples

PartPolicies = list[Policy | None]  # of a part's heads; None: this one chooses in this batch


@dataclass(slots=True)
class Reading:
    """What the rows of a batch read in layers where each of their parts has the same policies.

    `plan` is the kernels', of what positions alone decide, and `vectors`, int64, are its vectors of the flat q, None
    for all; without a plan there are none. `groups` has the cells of each adaptive policy.
    """

    plan: Any
    vectors: torch.Tensor | None
    groups: tuple[CellGroup, ...]
    counts: tuple[tuple[int, float, int], ...]  # of decode rows: handle, tokens read by static heads, tokens they have
    rows: Rows | None = None  # of the plan, and
    origins: Sequence[Origin] | None = None  # which of the batch's rows each is of, where one plan leads to the next
    indexed: IndexReading | None = None  # of layers with an index; then there is nothing else
    layers: int = 0  # that have been attended so

    @property
    def planned(self) -> bool:
        """Whether the plan alone answers every query, in the order of q."""
        return self.plan is not None and self.vectors is None


@dataclass(frozen=True, slots=True)
class Readings:
    """The readings of a batch, and by layer the number of its own. Without rows that read there are none. `counted`:
    whether anything is counted for a part."""

    each: tuple[Reading, ...] = ()
    by_layer: tuple[int, ...] = ()
    counted: bool = False

    def of(self, layer: int) -> Reading:
        """The reading of a layer."""
        return self.each[self.by_layer[layer]]


@dataclass(slots=True)
class ReadingBuilder:
    """Collects the rows of a batch, in their order, as `layer` and those like it read them. Policies in `choosing`
    choose in rows that read their part whole. `group`: query heads to a KV head."""

    store: KVStore
    layout: PageLayout
    group: int
    layer: int
    choosing: Collection[Policy]
    rows: RowBuilder = field(init=False)  # what static heads read
    planned: int = 0  # vectors of static heads so far
    cells: dict[Adaptive, list[Cell]] = field(default_factory=dict)
    counts: list[tuple[int, float, int]] = field(default_factory=list)
    _first: int = 0  # of the flat q, the next row's first vector
    _vectors: list[Ints] = field(default_factory=list)  # of static heads, where some heads choose

    def __post_init__(self) -> None:
        self.rows = RowBuilder(self.layout.page_size)

    def add(self, row: Row) -> None:
        """A row that reads. Raises ValueError for one that no batch can have."""
        part = self.store.part(row.handle)
        of_layer = part.policies.reads[self.layer]
        policies: PartPolicies = [of_layer[head] for head in part.heads]
        if row.chooses and self.choosing and reads_whole(row, part):
            self._choose(row, part, policies)
        static = [number for number, policy in enumerate(policies) if policy is not None]
        self._plan(row, part, policies, static)
        if row.chooses and part.policies.counted:
            lo, hi = row.read or (0, 0)
            self.counts.append((row.handle, _keys_seen(policies, row), (hi - lo) * len(static)))
        self._first += row.count * len(policies) * self.group

    def vectors(self) -> torch.Tensor | None:
        """The numbers in the flat q, int64, of what the plan attends; None for all of it."""
        return torch.from_numpy(np.concatenate(self._vectors)) if self.planned < self._first else None

    def _choose(self, row: Row, part: KvPart, policies: PartPolicies) -> None:
        """The heads that choose become cells, and None among the policies."""
        lo, hi = row.read or (0, 0)
        for number, policy in enumerate(policies):
            if isinstance(policy, Adaptive) and policy in self.choosing:
                policies[number] = None
                cell = Cell(row.handle, part, number, self._first + number * self.group, row.start, hi - lo)
                self.cells.setdefault(policy, []).append(cell)

    def _plan(self, row: Row, part: KvPart, policies: PartPolicies, static: Sequence[int]) -> None:
        if static:
            lo, hi = row.read or (0, 0)
            row_queries = RowQueries(self.planned, row.start, row.count, self.group, lo, hi, part.lo, part.table)
            self.rows.add(row_queries, policies)
            self.planned += row.count * len(static) * self.group
        if self.choosing:
            self._vectors.append(self._vectors_of(row, part, static))

    def _vectors_of(self, row: Row, part: KvPart, heads: Sequence[int]) -> Ints:
        """A row's vectors of some heads, by their numbers in the part, token by token."""
        tokens = np.arange(row.count)[:, None, None] * (len(part.heads) * self.group)
        inside = np.array(heads, np.int64)[:, None] * self.group + np.arange(self.group)
        return (self._first + tokens + inside).reshape(-1)


def reads_whole(row: Row, part: KvPart) -> bool:
    """Whether a row is one query of decode that reads all that its part has: only such a row may choose."""
    lo, hi = row.read or (0, 0)
    return row.chooses and row.count == 1 and lo == part.lo < hi


def _keys_seen(policies: Sequence[Policy | None], row: Row) -> int:
    """How many keys the last query of a row sees, over the heads that do not choose."""
    lo, hi = row.read or (0, 0)
    key_count, last = 0, row.start + row.count - 1
    for policy in policies:
        if policy is None:
            continue
        (view,) = policy.views(last, 1)
        key_count += view.keys(last, lo, hi)
    return key_count


_SAMPLES = 8  # samples of prompts' queries may take one in so many bytes of the KV memory, beside it


class PagedReader:
    """For one worker and its thread. Parts without a policy of their own have `policies`."""

    def __init__(
        self, config: HolderConfig, policies: HeadPolicies, kernels: Kernels, pages: Pages, store: KVStore, threads: int
    ) -> None:
        self._config = config
        self._kernels = kernels
        self._pages = pages
        self._store = store
        self._threads = threads
        self._samples = QuerySamples(config.kv_memory // _SAMPLES)
        layout = pages.layout
        self.tallies = Tallies(layout.page_bytes / layout.page_size)
        self._index: IndexAttention | None = None
        if (index := config.layers[0].index) is not None:
            self._index = IndexAttention(pages, kernels, store, index, config.layers[0].group, threads)
            self.tallies = self._index.tallies
        self._adaptive: AdaptiveAttention | None = None
        self._sketches: Sketches | None = None
        if policies.sketched:
            self._sketches = Sketches.allocate(layout, pages.n_pages, pages.arena.device)
            for _ in sketches.prepare(layout):
                pass
            holding = Holding(self._sketches, layout.page_size, threads, pages, self._samples, self._keys)
            self._adaptive = AdaptiveAttention(pages, kernels, holding, _choosing(policies), self.tallies)
        self.queries = PromptQueries(config, store, self._adaptive, self._samples)

    def readings(self, rows: Sequence[Row]) -> Readings:
        """How a batch's rows that read are attended. Raises ValueError for rows that no batch can have."""
        if not rows:
            return Readings()
        every = tuple(dict.fromkeys(self._store.part(row.handle).policies for row in rows))
        by_layer = read_alike(every)
        readings = tuple(self._reading(by_layer.index(number), rows) for number in range(1 + max(by_layer)))
        return Readings(readings, by_layer, any(policies.counted for policies in every))

    @property
    def sketch_bytes(self) -> int:
        """Of one page's sketch; 0 where none are kept."""
        return 0 if self._sketches is None else self._sketches.layout.sketch_bytes

    def goes_on(self, readings: Readings, rows: Sequence[Row]) -> bool:
        """Whether the readings are plans of the kernels and nothing more, also for `rows`, which are theirs, each
        further."""
        return all(reading.planned for reading in readings.each) and (
            self._adaptive is None
            or not any(
                self._worth_choosing(readings.by_layer.index(number), rows) for number in range(len(readings.each))
            )
        )

    @property
    def touch(self) -> Touch | None:
        """Told which pages choosers have chosen."""
        return None if self._adaptive is None else self._adaptive.touch

    @touch.setter
    def touch(self, touch: Touch | None) -> None:
        if self._adaptive is not None:
            self._adaptive.touch = touch

    def _reading(self, layer: int, rows: Sequence[Row]) -> Reading:
        """How a layer, and those that are read alike, read these rows."""
        if self._index is not None:
            return Reading(None, None, (), (), indexed=self._index.reading(rows))
        group = self._config.layers[0].group
        choosing = self._worth_choosing(layer, rows) if self._adaptive is not None else set[Adaptive]()
        builder = ReadingBuilder(self._store, self._pages.layout, group, layer, choosing)
        for row in rows:
            builder.add(row)
        planned = builder.rows.rows() if builder.planned else None
        return Reading(
            None if planned is None else self._kernels.plan(self._pages, planned, self._threads),
            builder.vectors(),
            tuple(self._choosers.group(policy, cells, group) for policy, cells in builder.cells.items()),
            tuple(builder.counts),
            planned,
            builder.rows.origins,
        )

    def layer_readings(self, readings: Readings, numbers: Sequence[int]) -> list[LayerReading] | None:
        """How each layer of a batch is attended, for compiled callers, which know layers by `numbers`; None where that
        needs Python."""
        if not all(reading.planned for reading in readings.each):
            return None
        plans = (readings.of(layer).plan if readings.each else None for layer in range(len(numbers)))
        return [
            LayerReading(number, plan, spec.kv_layer, spec.scale, spec.soft_cap)
            for number, plan, spec in zip(numbers, plans, self._config.layers, strict=True)
        ]

    def _worth_choosing(self, layer: int, rows: Sequence[Row]) -> set[Adaptive]:
        """The policies that choose in this batch, where that is cheaper than reading everything."""
        tokens: dict[Adaptive, list[int]] = {}
        for row in rows:
            part = self._store.part(row.handle)
            if reads_whole(row, part):
                lo, hi = row.read or (0, 0)
                policies = part.policies.reads[layer]
                for head in part.heads:
                    if isinstance(policy := policies[head], Adaptive):
                        tokens.setdefault(policy, []).append(hi - lo)
        return {policy for policy, lengths in tokens.items() if self._choosers.worth(policy, lengths)}

    def attend(self, reading: Reading, layer: int, q: torch.Tensor) -> Partial:
        """q `[n, query_width]` of a layer, flat in row order: attention over what each vector's policy reads, or what
        the layer's index chooses."""
        spec = self._config.layers[layer]
        if self._index is not None and reading.indexed is not None:
            return self._index.attend(reading.indexed, spec, q)
        reading.layers += 1
        if reading.vectors is None:
            return self._kernels.attend(self._pages, reading.plan, spec.kv_layer, q, spec.scale, spec.soft_cap)
        if reading.plan is None and len(reading.groups) == 1:  # cells stand in the order of q
            return self._choosers.attend(reading.groups[0], layer, spec, q)
        merged = empty(len(q), self._pages.layout.d_v, q.dtype, q.device)
        if reading.plan is not None:
            vectors = q[reading.vectors]
            static = self._kernels.attend(self._pages, reading.plan, spec.kv_layer, vectors, spec.scale, spec.soft_cap)
            merged.out[reading.vectors], merged.lse[reading.vectors] = static
        for group in reading.groups:
            chosen = self._choosers.attend(group, layer, spec, q[group.vectors])
            merged.out[group.vectors], merged.lse[group.vectors] = chosen
        return merged

    def end(self, readings: Iterable[Reading], counts: Iterable[tuple[int, float, float]] = ()) -> None:
        """A batch is complete, or given up: what it has read is counted for its parts. `counts`: of parts, tokens read
        and tokens there are, over all layers and heads, beside what readings count."""
        for handle, keys, every in counts:
            self.tallies.add(handle, keys * self.tallies.token_bytes, every)
        for reading in readings:
            for handle, read, total in reading.counts:
                self.tallies.add(handle, read * self.tallies.token_bytes * reading.layers, total * reading.layers)
            for group in reading.groups:
                self._choosers.tally(group)

    @property
    def _choosers(self) -> AdaptiveAttention:
        if self._adaptive is None:
            raise ValueError("no policy of this worker chooses")
        return self._adaptive

    def sealed(self, rows: Sequence[Row]) -> torch.Tensor | None:
        """int64 `[layers, n]`: the pages that are full once those rows have stored, where sketches are kept. Choosers
        forget here what they know of tokens that the rows replace."""
        if self._adaptive is None:
            return None
        size, pages = self._pages.layout.page_size, []
        for row in rows:
            part = self._store.part(row.handle)
            first, end = row.stored(part.lo, part.hi)
            if first < end:
                self._samples.cut(row.handle, first - part.lo)
                self._adaptive.written(row.handle, first - part.lo)
            if (first - part.lo) // size < (end - part.lo) // size:
                full = part.table[:, :, (first - part.lo) // size : (end - part.lo) // size]
                pages.append(full.reshape(len(full), -1))
        if self._sketches is None or not pages:
            return None
        return torch.from_numpy(np.concatenate(pages, axis=1).astype(np.int64))

    def seal(self, pages: torch.Tensor | None, layers: Sequence[int]) -> None:
        """Make the sketches of the pages of some layers that have become full."""
        if pages is not None and self._sketches is not None:
            sketches.seal(self._pages, self._sketches, pages[layers].flatten())

    def opened(self, operation: Open | Fork) -> None:
        """A part is new, empty or as a fork of another."""
        if self._adaptive is None:
            return
        try:
            part = self._store.part(operation.handle)
        except KVError:  # the announcement that made it has closed it again
            return
        self._adaptive.open(operation.handle, _choosing(part.policies))
        if isinstance(operation, Fork):
            self._samples.fork(operation.handle, operation.parent, operation.length - part.lo)
            self._adaptive.fork(operation.handle, operation.parent, operation.length - part.lo)

    @property
    def observes(self) -> bool:
        """Whether a policy learns from the queries of prompts."""
        return self._adaptive is not None and self._adaptive.observes

    def forget(self, handle: int) -> None:
        """A part is closed."""
        self.tallies.forget(handle)
        self._samples.forget(handle)
        if self._adaptive is not None:
            self._adaptive.forget(handle)

    def _keys(self, handle: int, layer: int, head: int, lo: int, hi: int) -> Float32:
        """As `Holding.keys`. Raises KVError where there is no such part."""
        part, size = self._store.part(handle), self._pages.layout.page_size
        table = part.table[self._config.layers[layer].kv_layer, part.heads.index(head), lo // size : -(-hi // size)]
        keys = gather_keys(self._pages, torch.from_numpy(table[None].astype(np.int64)))[:, 0]
        key_rows: Float32 = keys[lo % size : hi - lo // size * size].float().contiguous().numpy()
        return key_rows

    def usage(self, handle: int) -> Usage:
        """What a part has read and keeps; nothing where that is not counted."""
        part = self._store.part(handle)
        if not part.policies.counted:
            return Usage(0, 0, 0.0, 0, 0.0, 0, 0, 0)
        return self.tallies.usage(handle, *part.pages(self._pages.layout.page_size))


def _choosing(policies: HeadPolicies) -> list[Adaptive]:
    """Those of them that choose what is read."""
    return [policy for policy in policies.distinct if isinstance(policy, Adaptive)]
