"""Attention of the decode queries whose policy chooses what they read.

Choosers choose the pages, kernels attend them, what stands for the rest is merged, and all of it is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.pages import Pages
from lamina_kernels.partial import Partial
from lamina_kernels.select import Kernels
from lamina_protocols.layers import LayerSpec
from lamina_protocols.messages import Usage
from lamina_workers.attention_worker.kv_parts import Part
from lamina_workers.policies.chooser import Adaptive, Chooser, Holding, Items, Observer


class Cell(NamedTuple):
    """One query to a KV head of a part; `head` is its number in the part. Its group of vectors of the flat q begins
    with `first`. It may read `tokens` tokens."""

    handle: int
    part: Part
    head: int
    first: int
    tokens: int


class ObservedQueries(NamedTuple):
    """A row of prefill of which a chooser is shown some KV heads: `heads` by their numbers in the part. `first` is the
    row's first vector in the flat q, of `tokens` tokens from position `start` of the part on, each with a group for
    every head of the part."""

    policy: Adaptive
    handle: int
    part: Part
    heads: tuple[int, ...]
    first: int
    tokens: int
    start: int
    group: int


@dataclass(slots=True)
class _Tally:
    """A part's `Usage` so far."""

    read: float = 0.0
    whole: float = 0.0
    missed: float = 0.0
    queries: int = 0
    worst: float = 0.0


@dataclass(slots=True)
class Tallies:
    """What was read for each part in decode. `token_bytes`: of one token's K and V in a layer and KV head."""

    token_bytes: float
    _by_handle: dict[int, _Tally] = field(default_factory=dict)

    def add(self, handle: int, read: float, whole: float) -> None:
        """A part's queries read `read` bytes, where everything would have been `whole` tokens."""
        tally = self._of(handle)
        tally.read += read
        tally.whole += whole * self.token_bytes

    def miss(self, handle: int, missed: float, queries: int, worst: float) -> None:
        """How much of the attention mass of some queries was not read, by estimate: `missed` is the sum over them,
        `worst` the largest."""
        tally = self._of(handle)
        tally.missed += missed
        tally.queries += queries
        tally.worst = max(tally.worst, worst)

    def _of(self, handle: int) -> _Tally:
        return self._by_handle.setdefault(handle, _Tally())

    def forget(self, handle: int) -> None:
        """The part is closed."""
        self._by_handle.pop(handle, None)

    def usage(self, handle: int, held: int, kept: int) -> Usage:
        """The usage of one part, which holds `held` pages where keeping everything would take `kept`."""
        t = self._by_handle.get(handle, _Tally())
        return Usage(round(t.read), round(t.whole), t.missed, t.queries, t.worst, held, kept)


class _Counts:
    """What the layers of a batch have read for some cells, in arrays, since every layer adds to it."""

    def __init__(self, cells: int) -> None:
        self.read = np.zeros(cells)  # tokens
        self.chosen_by = 0.0  # bytes a cell
        self.layers = 0
        self.missed = np.zeros(cells)
        self.queries = np.zeros(cells, np.int64)
        self.worst = np.zeros(cells)

    def add(self, lengths: npt.NDArray[np.int64], missed: npt.NDArray[np.float32], chosen_by: float) -> None:
        self.layers += 1
        self.read += lengths
        self.chosen_by += chosen_by
        of_cells = missed.reshape(len(lengths), -1)
        known = of_cells >= 0  # NaN, unknown, is not
        of_cells = np.where(known, of_cells, 0)
        self.missed += of_cells.sum(1)
        self.queries += known.sum(1)
        np.maximum(self.worst, of_cells.max(1), out=self.worst)


@dataclass(frozen=True, slots=True)
class Group:
    """The cells of one policy in a batch. vectors: int64 `[cells * group]`, the numbers of theirs in the flat q;
    `plan` is the chooser's, `lists` the kernels'."""

    policy: Adaptive
    cells: tuple[Cell, ...]
    vectors: torch.Tensor
    plan: Any
    lists: Any
    lacking: npt.NDArray[np.int64]  # of each cell: tokens that its last page lacks
    counts: _Counts


class AdaptiveAttention:
    """The choosers of one worker."""

    def __init__(
        self, pages: Pages, kernels: Kernels, holding: Holding, policies: Sequence[Adaptive], tallies: Tallies
    ) -> None:
        self._pages = pages
        self._kernels = kernels
        self._threads = holding.threads
        self._choosers: Mapping[Adaptive, Chooser] = {policy: policy.chooser(holding) for policy in policies}
        self._observers = {policy: x for policy, x in self._choosers.items() if isinstance(x, Observer)}
        self.observing = frozenset(self._observers)  # the policies whose choosers are shown prefill's queries
        self._tallies = tallies

    def observe(self, row: ObservedQueries, layer: int, q: torch.Tensor) -> None:
        """Show a chooser the queries of a row of prefill; q `[n, d_k]` of the whole batch, flat."""
        heads = len(row.part.heads)
        vectors = q[row.first : row.first + row.tokens * heads * row.group]
        by_head = vectors.reshape(row.tokens, heads, row.group, -1)
        for number in row.heads:
            of_head = by_head[:, number].float().numpy()
            self._observers[row.policy].observe(row.handle, layer, row.part.heads[number], row.start, of_head)

    def fork(self, handle: int, parent: int, tokens: int) -> None:
        """A part is new, and has the first `tokens` of another."""
        for observer in self._observers.values():
            observer.fork(handle, parent, tokens)

    def written(self, handle: int, start: int) -> None:
        """A part's tokens from `start`, counted from its first, on are new."""
        for observer in self._observers.values():
            observer.written(handle, start)

    def forget(self, handle: int) -> None:
        """A part is closed."""
        for chooser in self._choosers.values():
            chooser.forget(handle)

    def worth(self, policy: Adaptive, tokens: Sequence[int]) -> bool:
        """Whether choosing is cheaper than reading everything, for cells of so many tokens each."""
        return self._choosers[policy].worth(tokens)

    def group(self, policy: Adaptive, cells: Sequence[Cell], group: int) -> Group:
        """Plan a batch's cells of one policy, each with `group` query heads."""
        size = self._pages.layout.page_size
        items = Items(
            [cell.handle for cell in cells],
            [cell.part.heads[cell.head] for cell in cells],
            [cell.part.table[:, cell.head, : -(-cell.tokens // size)] for cell in cells],
            np.array([cell.tokens for cell in cells], np.int64),
            np.array([cell.part.lo == 0 for cell in cells]),
            group,
        )
        vectors = np.array([cell.first for cell in cells])[:, None] + np.arange(group)
        plan = self._choosers[policy].plan(items)
        lists = self._kernels.plan_lists(self._pages, len(cells), group, self._threads)
        lacking = -items.tokens % size
        flat = torch.from_numpy(vectors.reshape(-1))
        return Group(policy, tuple(cells), flat, plan, lists, lacking, _Counts(len(cells)))

    def attend(self, group: Group, layer: int, spec: LayerSpec, q: torch.Tensor) -> Partial:
        """q `[cells * group, d_k]`, cell by cell: attention over what the policy's chooser picks for each."""
        choice = self._choosers[group.policy].choose(group.plan, layer, spec, q)
        lengths = choice.counts * self._pages.layout.page_size - group.lacking
        group.counts.add(lengths, choice.missed, choice.read / len(group.cells))
        whole = self._kernels.attend_lists(
            self._pages, group.lists, choice.pages, lengths, q, spec.scale, spec.soft_cap
        )
        if choice.rest is not None:
            self._kernels.merge_into(whole, choice.rest, None)
        return whole

    def tally(self, group: Group) -> None:
        """The batch is complete, or given up: what it has read is counted for its parts."""
        counts = group.counts
        columns = (counts.read, counts.missed, counts.queries, counts.worst)
        for cell, (read, missed, queries, worst) in zip(
            group.cells, zip(*(c.tolist() for c in columns), strict=True), strict=True
        ):
            whole = cell.tokens * counts.layers
            self._tallies.add(cell.handle, read * self._tallies.token_bytes + counts.chosen_by, whole)
            self._tallies.miss(cell.handle, missed, queries, worst)
