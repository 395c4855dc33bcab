"""What the rows of a batch read in layers whose heads have the same policies: collected row by row, once a batch.

Promises that each vector of the flat q is either in the kernels' plan or in one cell of an adaptive policy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lamina_kernels.paged.pages import PageLayout
from lamina_kernels.paged.rows import Ints
from lamina_protocols.messages import Row
from lamina_workers.attention_worker.adaptive import Cell, Group, ObservedQueries
from lamina_workers.attention_worker.head_policies import LayerPolicies
from lamina_workers.attention_worker.index_attention import IndexReading
from lamina_workers.attention_worker.kv_parts import Part
from lamina_workers.attention_worker.kv_store import KVStore
from lamina_workers.attention_worker.mean_slots import MeanReading
from lamina_workers.attention_worker.row_builder import Asked, RowBuilder
from lamina_workers.policies.chooser import Adaptive
from lamina_workers.policies.policy import Policy

PartPolicies = list[Policy | None]  # of a part's heads; None: this one chooses in this batch
Gaps = dict[Policy | None, tuple[int, int]]


@dataclass(slots=True)
class Reading:
    """What the rows of a batch read in layers whose heads have the same policies.

    `plan` is the kernels', of what positions alone decide, and `vectors`, int64, are its vectors of the flat q, None
    for all; without a plan there are none. `groups` has the cells of each adaptive policy.
    """

    plan: Any
    vectors: torch.Tensor | None
    groups: tuple[Group, ...]
    counts: tuple[tuple[int, float, int], ...]  # of decode rows: handle, tokens read by static heads, tokens they have
    means: MeanReading | None = None  # what stands for the pages that compensated policies have freed
    observed: tuple[ObservedQueries, ...] = ()  # rows of prefill whose queries a chooser is shown
    indexed: IndexReading | None = None  # of layers with an index; then there is nothing else
    layers: int = 0  # that have been attended so

    @property
    def planned(self) -> bool:
        """Whether the plan alone answers every query, in the order of q."""
        return self.plan is not None and self.vectors is None and self.means is None and not self.observed


@dataclass(slots=True)
class ReadingBuilder:
    """Collects the rows of a batch, in their order. Heads have `policies`. Policies in `choosing` choose in rows that
    read their part whole; policies in `observing` are shown the queries of prefill. `group`: query heads to a KV head;
    `counting`: whether decode rows are counted."""

    store: KVStore
    layout: PageLayout
    group: int
    policies: LayerPolicies
    choosing: Collection[Policy]
    observing: Collection[Policy]
    counting: bool
    rows: RowBuilder = field(init=False)  # what static heads read
    planned: int = 0  # vectors of static heads so far
    cells: dict[Adaptive, list[Cell]] = field(default_factory=dict)
    observed: list[ObservedQueries] = field(default_factory=list)
    means: list[tuple[int, int, torch.Tensor]] = field(default_factory=list)  # handle, head, the vectors that read it
    counts: list[tuple[int, float, int]] = field(default_factory=list)
    _first: int = 0  # of the flat q, the next row's first vector
    _vectors: list[Ints] = field(default_factory=list)  # of static heads, where some heads choose

    def __post_init__(self) -> None:
        self.rows = RowBuilder(self.layout.page_size)

    def add(self, row: Row) -> None:
        """A row that reads. Raises ValueError for one that no batch can have."""
        part = self.store.part(row.handle)
        policies: PartPolicies = [self.policies[head] for head in part.heads]
        if row.chooses and self.choosing and reads_whole(row, part):
            self._choose(row, part, policies)
        elif not row.chooses and self.observing:
            self._observe(row, part, policies)
        gaps = self._gaps(part, policies)
        static = [number for number, policy in enumerate(policies) if policy is not None]
        self._plan(row, part, policies, gaps, static)
        for number in static if gaps else ():
            if policies[number] in gaps:
                self.means.append((row.handle, number, torch.from_numpy(self._vectors_of(row, part, [number]))))
        if row.chooses and self.counting:
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

    def _observe(self, row: Row, part: Part, policies: PartPolicies) -> None:
        lo, hi = row.read or (0, 0)
        for policy in dict.fromkeys(policies) if lo < hi else ():
            if isinstance(policy, Adaptive) and policy in self.observing:
                heads = tuple(number for number, of_head in enumerate(policies) if of_head == policy)
                start = row.start - part.lo
                self.observed.append(
                    ObservedQueries(policy, row.handle, part, heads, self._first, row.count, start, self.group)
                )

    def _gaps(self, part: Part, policies: PartPolicies) -> Gaps:
        """Of compensated policies: the slots for which a mean stands, where there are any."""
        found = {p: self.store.gap(part, p) for p in dict.fromkeys(policies) if p is not None and p.compensated}
        return {policy: (first, end) for policy, (first, end) in found.items() if first < end}

    def _plan(self, row: Row, part: Part, policies: PartPolicies, gaps: Gaps, static: Sequence[int]) -> None:
        if static:
            lo, hi = row.read or (0, 0)
            asked = Asked(self.planned, row.start, row.count, self.group, lo, hi, part.lo, part.table)
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
        saved = sum(self._saved(part, gaps[policy], hi) for policy in policies if policy in gaps)
        self.counts.append((row.handle, _keys_seen(policies, row) - saved, (hi - lo) * static))

    def _saved(self, part: Part, gap: tuple[int, int], hi: int) -> float:
        """How many of the keys below `hi` a head does not read because their slots were freed. The mean that it reads
        for them, in float32, counts by its bytes."""
        at = self.layout
        first, end = (min(part.lo + slot * at.page_size, hi) for slot in gap)
        return end - first - 4 * (at.d_k + at.d_v) * at.page_size / at.page_bytes


def reads_whole(row: Row, part: Part) -> bool:
    """Whether a row is one query of decode that reads all that its part has: only such a row may choose."""
    lo, hi = row.read or (0, 0)
    return row.chooses and row.count == 1 and lo == part.lo < hi


def _keys_seen(policies: Sequence[Policy | None], row: Row) -> int:
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
