"""What a batch reads at one worker: each KV head by its policy, by positions or by choice.

Plans once a batch what static policies see. In each layer it attends that, and adaptive policies choose the rest. It
keeps the sketches by which they choose, and the means that stand for freed pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from lamina_kernels.cpu.layer_work import LayerReading
from lamina_kernels.paged.pages import Pages
from lamina_kernels.partial import Partial, empty
from lamina_kernels.select import Kernels
from lamina_kernels.sketches import sketches
from lamina_protocols.layers import HolderConfig, LayerSpec
from lamina_protocols.messages import Fork, Row, Usage
from lamina_workers.attention_worker.adaptive import AdaptiveAttention, Tallies
from lamina_workers.attention_worker.head_policies import HeadPolicies, LayerPolicies
from lamina_workers.attention_worker.index_attention import IndexAttention
from lamina_workers.attention_worker.kv_parts import Absorbed
from lamina_workers.attention_worker.kv_store import NO_PAGE, KVStore
from lamina_workers.attention_worker.mean_slots import MeanSlots
from lamina_workers.attention_worker.reading import Reading, ReadingBuilder, reads_whole
from lamina_workers.errors import KVError
from lamina_workers.policies.chooser import Adaptive, Holding


class PagedReader:
    """For one worker and its thread."""

    def __init__(
        self,
        config: HolderConfig,
        policies: HeadPolicies,
        kernels: Kernels,
        pages: Pages,
        store: KVStore,
        threads: int,
    ) -> None:
        self._config = config
        self._kernels = kernels
        self._pages = pages
        self._store = store
        self._threads = threads
        self._by_layer = policies.reads
        self._policies = tuple(dict.fromkeys(policies.reads))
        every = policies.distinct
        self._means = MeanSlots(pages) if any(policy.compensated for policy in every) else None
        at = pages.layout
        token_bytes = at.page_bytes / at.page_size
        self.tallies = Tallies(token_bytes) if any(spec.policies for spec in config.layers) else None
        self._index: IndexAttention | None = None
        if (index := config.layers[0].index) is not None:
            self._index = IndexAttention(pages, kernels, store, index, config.layers[0].group, threads)
            self.tallies = self._index.tallies
        self._adaptive: AdaptiveAttention | None = None
        self._sketches: sketches.Sketches | None = None
        if policies.sketched:
            self._sketches = sketches.Sketches.allocate(at, pages.n_pages)
            for _ in sketches.prepare(at):
                pass
            adaptive = [policy for policy in every if isinstance(policy, Adaptive)]
            holding = Holding(self._sketches, at.page_size, threads, pages)
            self._adaptive = AdaptiveAttention(pages, kernels, holding, adaptive, self.tallies or Tallies(token_bytes))

    def readings(self, rows: Sequence[Row]) -> dict[LayerPolicies, Reading]:
        """How a batch's rows that read are attended, by the policies of a layer's heads. Raises ValueError for rows
        that no batch can have."""
        if not rows:
            return {}
        return {policies: self._reading(policies, rows) for policies in self._policies}

    @property
    def plain(self) -> bool:
        """Whether a reading is a plan of the kernels and nothing more, whatever is read."""
        return self.tallies is None and self._means is None and self._sketches is None

    def _reading(self, policies: LayerPolicies, rows: Sequence[Row]) -> Reading:
        if self._index is not None:
            return Reading(None, None, (), (), indexed=self._index.reading(rows))
        group, counting = self._config.layers[0].group, self.tallies is not None
        choosing = self._choosing(policies, rows)
        observing = self._adaptive.observing if self._adaptive else ()
        builder = ReadingBuilder(self._store, self._pages.layout, group, policies, choosing, observing, counting)
        for row in rows:
            builder.add(row)
        return Reading(
            self._kernels.plan(self._pages, builder.rows.rows(), self._threads) if builder.planned else None,
            builder.vectors(),
            tuple(self._choosers.group(policy, cells, group) for policy, cells in builder.cells.items()),
            tuple(builder.counts),
            self._means.reading(builder.means) if self._means else None,
            tuple(builder.observed),
        )

    def layer_readings(
        self, readings: Mapping[LayerPolicies, Reading], numbers: Sequence[int]
    ) -> list[LayerReading] | None:
        """How each layer of a batch is attended, for compiled callers, who know layers by `numbers`; None where that
        needs Python."""
        if not all(reading.planned for reading in readings.values()):
            return None
        plans = (readings[policies].plan if readings else None for policies in self._by_layer)
        return [
            LayerReading(number, plan, spec.kv_layer, spec.scale, spec.soft_cap)
            for number, plan, spec in zip(numbers, plans, self._config.layers, strict=True)
        ]

    def _choosing(self, policies: LayerPolicies, rows: Sequence[Row]) -> set[Adaptive]:
        """The policies that choose in this batch, where that is cheaper than reading everything."""
        tokens: dict[Adaptive, list[int]] = {}
        for row in rows:
            part = self._store.part(row.handle)
            if reads_whole(row, part):
                lo, hi = row.read or (0, 0)
                for head in part.heads:
                    if isinstance(policy := policies[head], Adaptive):
                        tokens.setdefault(policy, []).append(hi - lo)
        return {policy for policy, those in tokens.items() if self._choosers.worth(policy, those)}

    def attend(self, reading: Reading, layer: int, q: torch.Tensor) -> Partial:
        """q `[n, query_width]` of a layer, flat in row order: attention over what each vector's policy reads, or what
        the layer's index chooses."""
        spec = self._config.layers[layer]
        if self._index is not None and reading.indexed is not None:
            return self._index.attend(reading.indexed, spec, q)
        reading.layers += 1
        for observed in reading.observed:
            self._choosers.observe(observed, layer, q)
        whole = self._attend(reading, layer, spec, q)
        if reading.means is not None:
            self._kernels.merge_into(whole, reading.means.attend(spec, q), reading.means.vectors)
        return whole

    def _attend(self, reading: Reading, layer: int, spec: LayerSpec, q: torch.Tensor) -> Partial:
        if reading.vectors is None:
            return self._kernels.attend(self._pages, reading.plan, spec.kv_layer, q, spec.scale, spec.soft_cap)
        if reading.plan is None and len(reading.groups) == 1:  # cells stand in the order of q
            return self._choosers.attend(reading.groups[0], layer, spec, q)
        whole = empty(len(q), self._pages.layout.d_v, q.dtype)
        if reading.plan is not None:
            some = q[reading.vectors]
            static = self._kernels.attend(self._pages, reading.plan, spec.kv_layer, some, spec.scale, spec.soft_cap)
            whole.out[reading.vectors], whole.lse[reading.vectors] = static
        for group in reading.groups:
            chosen = self._choosers.attend(group, layer, spec, q[group.vectors])
            whole.out[group.vectors], whole.lse[group.vectors] = chosen
        return whole

    def end(self, readings: Iterable[Reading]) -> None:
        """A batch is complete, or given up: what it has read is counted for its parts."""
        if self.tallies is None:
            return
        for reading in readings:
            for handle, read, whole in reading.counts:
                self.tallies.add(handle, read * self.tallies.token_bytes * reading.layers, whole * reading.layers)
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
        if self._sketches is None:
            return None
        size, pages = self._pages.layout.page_size, []
        for row in rows:
            part = self._store.part(row.handle)
            first, end = row.stored(part.lo, part.hi)
            if first < end:
                self._choosers.written(row.handle, first - part.lo)
                full = part.table[:, :, (first - part.lo) // size : (end - part.lo) // size]
                pages.append(full.reshape(len(full), -1))
        if not pages or not sum(x.shape[1] for x in pages):
            return None
        return torch.from_numpy(np.concatenate(pages, axis=1).astype(np.int64))

    def seal(self, pages: torch.Tensor | None, layer: int) -> None:
        """Make the sketches of a layer's pages that have become full."""
        if pages is not None and self._sketches is not None:
            sketches.seal(self._pages, self._sketches, pages[layer])

    def forked(self, fork: Fork) -> None:
        """A part is new, as a fork of another."""
        if self._means is not None:
            self._means.fork(fork.handle, fork.parent, fork.length)
        if self._adaptive is not None:
            try:
                part = self._store.part(fork.handle)
            except KVError:  # the announcement that made it has closed it again
                return
            self._adaptive.fork(fork.handle, fork.parent, fork.length - part.lo)

    def absorb(self, absorbed: Sequence[Absorbed]) -> None:
        """Pages have been freed for which a mean stands from now on. Nothing may have been written to them yet."""
        for pages in absorbed:
            if self._means is not None:
                self._means.absorb(pages)

    @property
    def keeps_means(self) -> bool:
        """Whether a mean may stand for pages that were freed."""
        return self._means is not None

    def mean(self, handle: int, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A key `[d_k]` and a value `[d_v]` in the place of each token that a part's head has freed, to move it."""
        return (self._means or MeanSlots(self._pages)).mean(handle, layer, head)

    def forget(self, handle: int) -> None:
        """A part is closed."""
        if self._means is not None:
            self._means.forget(handle)
        if self.tallies is not None:
            self.tallies.forget(handle)
        if self._adaptive is not None:
            self._adaptive.forget(handle)

    def usage(self, handle: int) -> Usage:
        """What a part has read and keeps."""
        part = self._store.part(handle)
        slots = -(-(part.held - part.lo) // self._pages.layout.page_size)
        kept = part.table.shape[0] * part.table.shape[1] * slots
        held = int(np.count_nonzero(part.table[:, :, :slots] != NO_PAGE))
        return (self.tallies or Tallies(0)).usage(handle, held, kept)
