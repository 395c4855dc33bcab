"""What the rows of a batch read in layers that are read alike: collected row by row, once a batch.

Promises that each vector of the flat q is either in the kernels' plan or in one cell of an adaptive policy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lamina_kernels.paged.pages import PageLayout
from lamina_kernels.paged.rows import Ints, Rows
from lamina_protocols.messages.messages import Row
from lamina_workers.attention_worker.adaptive import Cell, Group
from lamina_workers.attention_worker.eviction import counts, gap, readable
from lamina_workers.attention_worker.heavy_pages import CountedQuery
from lamina_workers.attention_worker.index_attention import IndexReading
from lamina_workers.attention_worker.kv_parts import Part
from lamina_workers.attention_worker.kv_store import KVStore
from lamina_workers.attention_worker.mean_slots import MeanReading
from lamina_workers.attention_worker.row_builder import Asked, Origin, RowBuilder
from lamina_workers.policies.chooser import Adaptive
from lamina_workers.policies.policy import Policy

PartPolicies = list[Policy | None]  # of a part's heads; None: this one chooses in this batch
Gaps = dict[Policy | None, tuple[int, int]]


@dataclass(slots=True)
class Reading:
    """What the rows of a batch read in layers where each of their parts has the same policies.

    `plan` is the kernels', of what positions alone decide, and `vectors`, int64, are its vectors of the flat q, None
    for all; without a plan there are none. `groups` has the cells of each adaptive policy.
    """

    plan: Any
    vectors: torch.Tensor | None
    groups: tuple[Group, ...]
    counts: tuple[tuple[int, float, int], ...]  # of decode rows: handle, tokens read by static heads, tokens they have
    means: MeanReading | None = None  # what stands for the pages that compensated policies have freed
    counted: tuple[CountedQuery, ...] = ()  # by whose attention pages will be evicted
    rows: Rows | None = None  # of the plan, and
    origins: Sequence[Origin] | None = None  # which of the batch's rows each is of, where one plan leads to the next
    indexed: IndexReading | None = None  # of layers with an index; then there is nothing else
    layers: int = 0  # that have been attended so

    @property
    def planned(self) -> bool:
        """Whether the plan alone answers every query, in the order of q."""
        return self.plan is not None and self.vectors is None and self.means is None and not self.counted


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
    counted: list[CountedQuery] = field(default_factory=list)
    means: list[tuple[int, int, torch.Tensor]] = field(default_factory=list)  # handle, head, the vectors that read it
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
        if row.chooses and row.count == 1:
            self._evict(row, part, policies)
        gaps = self._gaps(part, policies)
        static = [number for number, policy in enumerate(policies) if policy is not None]
        self._plan(row, part, policies, gaps, static)
        for number in static if gaps else ():
            if (policy := policies[number]) in gaps and policy is not None and policy.compensated:
                self.means.append((row.handle, number, torch.from_numpy(self._vectors_of(row, part, [number]))))
        if row.chooses and part.policies.counted:
            self._count(row, part, policies, gaps, len(static))
        self._first += row.count * len(policies) * self.group

    def vectors(self) -> torch.Tensor | None:
        """The numbers in the flat q, int64, of what the plan attends; None for all of it."""
        return torch.from_numpy(np.concatenate(self._vectors)) if self.planned < self._first else None

    def _choose(self, row: Row, part: Part, policies: PartPolicies) -> None:
        """The heads that choose become cells, and None among the policies."""
        lo, hi = row.read or (0, 0)
        for number, policy in enumerate(policies):
            if isinstance(policy, Adaptive) and policy in self.choosing:
                policies[number] = None
                cell = Cell(row.handle, part, number, self._first + number * self.group, hi - lo)
                self.cells.setdefault(policy, []).append(cell)

    def _evict(self, row: Row, part: Part, policies: PartPolicies) -> None:
        """The queries that policies count which evict."""
        for policy in dict.fromkeys(policies):
            if policy is not None and policy.evicts and counts(part, policy, row.start, self.layout.page_size):
                heads = tuple(number for number, of_head in enumerate(policies) if of_head == policy)
                position = row.start - part.lo
                self.counted.append(CountedQuery(row.handle, part, heads, self._first, self.group, position))

    def _gaps(self, part: Part, policies: PartPolicies) -> Gaps:
        """The slots for which a mean stands, or whose pages were evicted, where there are any."""
        letting = [p for p in dict.fromkeys(policies) if p is not None and (p.compensated or p.evicts)]
        found = {p: gap(part, p, self.layout.page_size) for p in letting}
        return {policy: (first, end) for policy, (first, end) in found.items() if first < end}

    def _plan(self, row: Row, part: Part, policies: PartPolicies, gaps: Gaps, static: Sequence[int]) -> None:
        if static:
            lo, hi = row.read or (0, 0)
            table = readable(part) if gaps else part.table
            asked = Asked(self.planned, row.start, row.count, self.group, lo, hi, part.lo, table)
            self.rows.add(asked, policies, gaps)
            self.planned += row.count * len(static) * self.group
        if self.choosing:
            self._vectors.append(self._vectors_of(row, part, static))

    def _vectors_of(self, row: Row, part: Part, heads: Sequence[int]) -> Ints:
        """A row's vectors of some heads, by their numbers in the part, token by token."""
        tokens = np.arange(row.count)[:, None, None] * (len(part.heads) * self.group)
        inside = np.array(heads, np.int64)[:, None] * self.group + np.arange(self.group)
        return (self._first + tokens + inside).reshape(-1)

    def _count(self, row: Row, part: Part, policies: PartPolicies, gaps: Gaps, static: int) -> None:
        lo, hi = row.read or (0, 0)
        saved = sum(self._saved(part, policy, gaps[policy], hi) for policy in policies if policy and policy in gaps)
        self.counts.append((row.handle, _keys_seen(policies, row) - saved, (hi - lo) * static))

    def _saved(self, part: Part, policy: Policy, gap: tuple[int, int], hi: int) -> float:
        """How many of the keys below `hi` a head does not read because their slots were freed. A mean that it reads
        for them, in float32, counts by its bytes."""
        at = self.layout
        first, end = (min(part.lo + slot * at.page_size, hi) for slot in gap)
        if not policy.compensated:
            return end - first
        return end - first - 4 * (at.d_k + at.d_v) * at.page_size / at.page_bytes


def reads_whole(row: Row, part: Part) -> bool:
    """Whether a row is one query of decode that reads all that its part has: only such a row may choose."""
    lo, hi = row.read or (0, 0)
    return row.chooses and row.count == 1 and lo == part.lo < hi


def _keys_seen(policies: Sequence[Policy | None], row: Row) -> int:
    """How many keys the last query of a row sees, over the heads that do not choose."""
    lo, hi = row.read or (0, 0)
    seen, last = 0, row.start + row.count - 1
    for policy in policies:
        if policy is None:
            continue
        (view,) = policy.views(last, 1)
        seen += view.keys(last, lo, hi)
    return seen
