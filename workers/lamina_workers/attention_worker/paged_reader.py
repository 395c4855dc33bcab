"""What a batch reads at one worker: each KV head by its policy, by positions or by choice.

Plans once a batch what static policies see; in each layer attends that, and has the adaptive ones choose. Keeps the
sketches that those read. Knows pages and parts; knows no message but its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lamina_kernels.paged.pages import Pages
from lamina_kernels.partial import Partial, empty
from lamina_kernels.select import Kernels
from lamina_kernels.sketches import sketches
from lamina_protocols.messages import Fork, HolderConfig, LayerSpec, Row, Usage
from lamina_workers.attention_worker.adaptive import AdaptiveAttention, Cell, Group, ObservedQueries, Tallies
from lamina_workers.attention_worker.head_policies import HeadPolicies, LayerPolicies
from lamina_workers.attention_worker.kv_store import NO_PAGE, Absorbed, KVStore, Part
from lamina_workers.attention_worker.mean_slots import MeanSlots, Standing
from lamina_workers.attention_worker.row_builder import Asked, RowBuilder
from lamina_workers.errors import KVError
from lamina_workers.policies.chooser import Adaptive, Holding
from lamina_workers.policies.policy import Policy


@dataclass(slots=True)
class Reading:
    """What the rows of a batch read in layers whose heads have the same policies.

    `plan` is the kernels', of what positions alone decide, and `vectors` are its vectors of the flat q, None for all;
    without a plan there are none. `groups` has the cells of each adaptive policy.
    """

    plan: Any
    vectors: torch.Tensor | None
    groups: tuple[Group, ...]
    counts: tuple[tuple[int, float, int], ...]  # of decode rows: handle, tokens read by static heads, tokens they have
    layers: int = 0  # that have been attended so
    standing: Standing | None = None  # what stands for what compensated policies have let go
    watched: tuple[ObservedQueries, ...] = ()  # rows of prefill whose queries a chooser is shown


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
        self._policies = dict.fromkeys(policies.reads)
        every = policies.distinct
        self._stand_ins = MeanSlots(pages) if any(policy.compensated for policy in every) else None
        at = pages.layout
        token_bytes = at.page_bytes / at.page_size
        self.tallies = Tallies(token_bytes) if any(spec.policies for spec in config.layers) else None
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
        """How those rows, all of which read, are attended. Raises ValueError for rows that no batch can have."""
        if not rows:
            return {}
        return {policies: self._reading(policies, rows) for policies in self._policies}

    def _reading(self, policies: LayerPolicies, rows: Sequence[Row]) -> Reading:
        group, size = self._config.layers[0].group, self._pages.layout.page_size
        builder, planned, counts = RowBuilder(size), 0, []
        vectors: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        cells: dict[Adaptive, list[Cell]] = {}
        watched: list[ObservedQueries] = []
        means: list[tuple[int, int]] = []  # of what was let go, by handle and head
        readers: list[torch.Tensor] = []  # the vectors that read each
        choosing = self._choosing(policies, rows)
        first = 0
        for row in rows:
            part = self._store.part(row.handle)
            lo, hi = row.read or (0, 0)
            of_heads: list[Policy | None] = [policies[head] for head in part.heads]
            if self._chooses(row):
                for number, policy in enumerate(of_heads):
                    if isinstance(policy, Adaptive) and policy in choosing:
                        of_heads[number] = None
                        cell = Cell(row.handle, part, number, first + number * group, hi - lo)
                        cells.setdefault(policy, []).append(cell)
            elif not row.chooses and hi > lo:
                watched += self._watched(row, part, of_heads, first)
            static = [number for number, policy in enumerate(of_heads) if policy is not None]
            tokens = np.arange(row.count)[:, None, None] * (len(of_heads) * group)
            gaps = self._gaps(part, of_heads)
            for number, policy in enumerate(of_heads):
                if policy in gaps:
                    means.append((row.handle, number))
                    of_head = first + tokens + number * group + np.arange(group)
                    readers.append(torch.from_numpy(of_head.reshape(-1)))
            if static:
                asked = Asked(planned, row.start, row.count, group, lo, hi, part.lo, part.table)
                builder.add(asked, of_heads, gaps)
                planned += row.count * len(static) * group
            if row.chooses and self.tallies is not None:
                saved = sum(self._saved(part, gaps[policy], hi) for policy in of_heads if policy in gaps)
                counts.append((row.handle, _static_keys(of_heads, row) - saved, (hi - lo) * len(static)))
            if choosing:
                inside = np.array(static, np.int64)[:, None] * group + np.arange(group)
                vectors.append((first + tokens + inside).reshape(-1))
            first += row.count * len(of_heads) * group
        plan = self._kernels.plan(self._pages, builder.rows(), self._threads) if planned else None
        index = torch.from_numpy(np.concatenate(vectors)) if planned < first else None
        groups = [self._choosers.group(policy, those, group) for policy, those in cells.items()] if cells else ()
        standing = self._stand_ins.standing(means, readers) if self._stand_ins else None
        return Reading(plan, index, tuple(groups), tuple(counts), standing=standing, watched=tuple(watched))

    def _watched(
        self, row: Row, part: Part, policies: Sequence[Policy | None], first: int
    ) -> Iterator[ObservedQueries]:
        """What choosers are shown of a row of prefill whose vectors begin with `first`."""
        for policy in dict.fromkeys(policies):
            if isinstance(policy, Adaptive) and self._choosers.watches(policy):
                heads = tuple(number for number, of_head in enumerate(policies) if of_head == policy)
                group = self._config.layers[0].group
                yield ObservedQueries(policy, row.handle, part, heads, first, row.count, row.start - part.lo, group)

    def _chooses(self, row: Row) -> bool:
        """Whether a row is one query of decode that reads all that its part has."""
        lo, hi = row.read or (0, 0)
        return row.chooses and row.count == 1 and lo == self._store.part(row.handle).lo < hi

    def _choosing(self, policies: LayerPolicies, rows: Sequence[Row]) -> set[Adaptive]:
        """The policies that choose in this batch: those for which it is worth it."""
        tokens: dict[Adaptive, list[int]] = {}
        for row in rows:
            if self._chooses(row):
                lo, hi = row.read or (0, 0)
                for head in self._store.part(row.handle).heads:
                    if isinstance(policy := policies[head], Adaptive):
                        tokens.setdefault(policy, []).append(hi - lo)
        return {policy for policy, those in tokens.items() if self._choosers.worth(policy, those)}

    def _gaps(self, part: Part, policies: Sequence[Policy | None]) -> dict[Policy | None, tuple[int, int]]:
        """Of compensated policies: the slots for which a mean stands, where there are any."""
        found = {p: self._store.gap(part, p) for p in dict.fromkeys(policies) if p is not None and p.compensated}
        return {policy: (first, end) for policy, (first, end) in found.items() if first < end}

    def _saved(self, part: Part, gap: tuple[int, int], hi: int) -> float:
        """How many of the keys below `hi` a head does not read where slots were let go; the mean that it reads for
        them, in float32, counts by its bytes."""
        at = self._pages.layout
        first, end = (min(part.lo + slot * at.page_size, hi) for slot in gap)
        return end - first - 4 * (at.d_k + at.d_v) * at.page_size / at.page_bytes

    def attend(self, reading: Reading, layer: int, q: torch.Tensor) -> Partial:
        """q `[n, d_k]` of a layer, flat in row order: attention over what each vector's policy reads."""
        spec = self._config.layers[layer]
        reading.layers += 1
        for watched in reading.watched:
            self._choosers.observe(watched, layer, q)
        whole = self._attend(reading, layer, spec, q)
        if reading.standing is not None:
            means = reading.standing.attend(spec, q)
            self._kernels.merge_into(whole, means, reading.standing.vectors)
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

    def over(self, readings: Iterable[Reading]) -> None:
        """A batch is complete, or given up: what it has read belongs to its parts."""
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
        """int64 `[layers, n]`: the pages that are full once those rows have stored, where sketches are kept. What
        choosers know of tokens that the rows replace ends here."""
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
        if self._stand_ins is not None:
            self._stand_ins.fork(fork.handle, fork.parent, fork.length)
        if self._adaptive is not None:
            try:
                part = self._store.part(fork.handle)
            except KVError:  # the announcement that made it has closed it again
                return
            self._adaptive.fork(fork.handle, fork.parent, fork.length - part.lo)

    def absorb(self, absorbed: Sequence[Absorbed]) -> None:
        """Pages have been let go for which a mean stands from now on. Nothing may have been written to them yet."""
        for pages in absorbed:
            if self._stand_ins is not None:
                self._stand_ins.absorb(pages)

    @property
    def keeps_means(self) -> bool:
        """Whether a mean may stand for pages that were let go."""
        return self._stand_ins is not None

    def stand_in(self, handle: int, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A key `[d_k]` and a value `[d_v]` for the tokens that a part's head has let go, where it is to be moved."""
        return (self._stand_ins or MeanSlots(self._pages)).mean(handle, layer, head)

    def forget(self, handle: int) -> None:
        """A part is closed."""
        if self._stand_ins is not None:
            self._stand_ins.forget(handle)
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


def _static_keys(policies: Sequence[Policy | None], row: Row) -> int:
    """How many keys the last query of a row sees, over the heads that do not choose."""
    lo, hi = row.read or (0, 0)
    seen = 0
    for policy in policies:
        if policy is None:
            continue
        *_, view = policy.views(row.start, row.count)
        if view.listed is not None:
            seen += sum(lo <= token < hi for token in view.listed)
            continue
        end = min(hi, view.start + view.count)
        begin = max(lo, view.start + view.count - view.window)
        seen += max(0, end - begin) + max(0, min(view.sinks, begin, end) - lo)
    return seen
