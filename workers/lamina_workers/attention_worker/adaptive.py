"""Attention of the decode queries whose policy chooses what they read.

Choosers choose the pages, kernels attend them, what stands for the rest is merged, and all of it is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.pages import Pages
from lamina_kernels.partial import Partial
from lamina_kernels.select import Kernels
from lamina_protocols.messages.layers import LayerSpec
from lamina_protocols.messages.messages import Row, Usage
from lamina_workers.kv_pages.parts import KvPart
from lamina_workers.policies.chooser import Adaptive, Choice, Chooser, Holding, Int32, Items, Shown
from lamina_workers.policies.policy import LONGEST

Touch = Callable[[Int32, npt.NDArray[np.int64]], None]  # gets the pages and counts of a `Choice`


class Cell(NamedTuple):
    """One query to a KV head of a part; `head` is its number in the part. Its group of vectors of the flat q begins
    with `first`. It is at `position`, and may read `tokens` tokens."""

    handle: int
    part: KvPart
    head: int
    first: int
    position: int
    tokens: int


@dataclass(slots=True)
class _Tally:
    """A part's `Usage` so far."""

    read: float = 0.0
    total: float = 0.0
    missed_mass: float = 0.0
    queries: int = 0
    worst: float = 0.0
    coarse: float = 0.0


@dataclass(slots=True)
class Tallies:
    """What was read for each part in decode. `token_bytes`: of one token's K and V in a layer and KV head."""

    token_bytes: float
    _by_handle: dict[int, _Tally] = field(default_factory=dict)

    def add(self, handle: int, read: float, whole: float) -> None:
        """A part's queries read `read` bytes, where everything would have been `whole` tokens."""
        tally = self._of(handle)
        tally.read += read
        tally.total += whole * self.token_bytes

    def miss(self, handle: int, missed: float, queries: int, worst: float, coarse: float) -> None:
        """How much of the attention mass of some queries was not read, by estimate: `missed` is the sum over them,
        `worst` the largest, `coarse` the sum of what was read in 4 bits."""
        tally = self._of(handle)
        tally.missed_mass += missed
        tally.coarse += coarse
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
        return Usage(round(t.read), round(t.total), t.missed_mass, t.queries, t.worst, held, kept, held, t.coarse)


class _Counts:
    """What the layers of a batch have read for some cells: every layer puts it down, and it is added up once."""

    def __init__(self, cells: int) -> None:
        self.layers = 0
        self.chosen_by = 0.0  # bytes a cell
        self._cells = cells
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._missed_masses: list[npt.NDArray[np.float32]] = []
        self._coarse: list[npt.NDArray[np.float32]] = []

    def add(self, lengths: npt.NDArray[np.int64], choice: Choice) -> None:
        """Count the choice of a layer, which reads so many tokens of each cell; copies are kept."""
        self.layers += 1
        self.chosen_by += choice.read / len(lengths)
        self._lengths.append(lengths.copy())
        self._missed_masses.append(choice.missed.copy())
        if choice.coarse is not None:
            self._coarse.append(choice.coarse.copy())

    def sums(self) -> list[tuple[float, float, int, float, float]]:
        """Of each cell: the tokens read, the mass missed by how many queries, the most that one missed, and the mass
        that was read in 4 bits."""
        if not self.layers:
            return [(0.0, 0.0, 0, 0.0, 0.0)] * self._cells
        read = np.sum(self._lengths, axis=0)
        sums = np.stack(self._missed_masses).reshape(self.layers, self._cells, -1)
        counted = sums >= 0  # NaN, unknown, is not
        sums = np.where(counted, sums, 0)
        coarse = np.zeros(self._cells)
        if self._coarse:
            of_layers = np.stack(self._coarse).reshape(len(self._coarse), self._cells, -1)
            coarse = np.nan_to_num(of_layers).sum((0, 2), dtype=np.float64)
        columns = read, sums.sum((0, 2), dtype=np.float64), counted.sum((0, 2)), sums.max((0, 2)), coarse
        return list(zip(*(column.tolist() for column in columns), strict=True))


@dataclass(frozen=True, slots=True)
class CellGroup:
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
    """The choosers of one worker: those of its own `policies`, and of each policy as long as a part has it."""

    def __init__(
        self, pages: Pages, kernels: Kernels, holding: Holding, policies: Sequence[Adaptive], tallies: Tallies
    ) -> None:
        self._pages = pages
        self._kernels = kernels
        self._holding = holding
        self._tallies = tallies
        self._choosers: dict[Adaptive, Chooser] = {}
        self._parts: dict[int, Sequence[Adaptive]] = {}  # by handle, the policies of a part
        self._users: Counter[Adaptive] = Counter()  # how many parts have a policy, and one more for the worker's own
        self._use(policies)
        self.touch: Touch | None = None  # told what was chosen, before it is read

    def open(self, handle: int, policies: Sequence[Adaptive]) -> None:
        """A part is new, whose heads have some of these policies."""
        self._parts[handle] = policies
        self._use(policies)

    def _use(self, policies: Sequence[Adaptive]) -> None:
        for policy in policies:
            self._users[policy] += 1
            if policy not in self._choosers:
                self._choosers[policy] = policy.chooser(self._holding)

    def show(
        self,
        row: Row,
        part: KvPart,
        layer: int,
        spec: LayerSpec,
        heads: Sequence[int],
        stride: int,
        positions: npt.NDArray[np.int64],
        q: torch.Tensor,
    ) -> None:
        """Show choosers some queries of a row of a prompt to some KV heads of a part, `[positions, heads, group, d_k]`.
        Positions count from the part's first token."""
        tokens = min(row.start + row.count, part.held) - part.lo
        tokens_left = max(0, row.prompt - row.start - row.count)
        prompt_tokens = min(row.prompt, part.hi) - part.lo
        slots = -(-tokens // self._pages.layout.page_size)
        for number, head in enumerate(heads):
            policy = part.policies.reads[layer][head]
            if isinstance(policy, Adaptive):
                table = part.table[spec.kv_layer, part.heads.index(head), :slots]
                vectors = q[:, number].float().cpu().numpy()
                self._choosers[policy].observe(
                    Shown(
                        row.handle,
                        layer,
                        spec,
                        head,
                        positions,
                        stride,
                        vectors,
                        table,
                        tokens,
                        tokens_left,
                        prompt_tokens,
                        part.lo,
                    )
                )

    @property
    def observes(self) -> bool:
        """Whether a policy learns from the queries of prompts."""
        return any(policy.sampled(0, LONGEST) for policy in self._choosers)

    def fork(self, handle: int, parent: int, tokens: int) -> None:
        """A part is new, and has the first `tokens` of another."""
        for chooser in self._choosers.values():
            chooser.fork(handle, parent, tokens)

    def written(self, handle: int, start: int) -> None:
        """A part's tokens from `start`, counted from its first, on are new."""
        for chooser in self._choosers.values():
            chooser.written(handle, start)

    def forget(self, handle: int) -> None:
        """A part is closed."""
        for chooser in self._choosers.values():
            chooser.forget(handle)
        for policy in self._parts.pop(handle, ()):
            self._users[policy] -= 1
            if not self._users[policy]:
                del self._users[policy], self._choosers[policy]

    def worth(self, policy: Adaptive, tokens: Sequence[int]) -> bool:
        """Whether choosing is cheaper than reading everything, for cells of so many tokens each."""
        return self._choosers[policy].worth(tokens)

    def group(self, policy: Adaptive, cells: Sequence[Cell], group: int) -> CellGroup:
        """Plan a batch's cells of one policy, each with `group` query heads."""
        size = self._pages.layout.page_size
        items = Items(
            [cell.handle for cell in cells],
            [cell.part.heads[cell.head] for cell in cells],
            [cell.part.table[:, cell.head, : -(-cell.tokens // size)] for cell in cells],
            np.array([cell.tokens for cell in cells], np.int64),
            np.array([cell.part.lo for cell in cells], np.int64),
            np.array([cell.position for cell in cells], np.int64),
            group,
        )
        vectors = np.array([cell.first for cell in cells])[:, None] + np.arange(group)
        plan = self._choosers[policy].plan(items)
        lists = self._kernels.plan_lists(self._pages, len(cells), group, self._holding.threads)
        lacking = -items.tokens % size
        flat = torch.from_numpy(vectors.reshape(-1)).to(self._pages.arena.device)
        return CellGroup(policy, tuple(cells), flat, plan, lists, lacking, _Counts(len(cells)))

    def attend(self, group: CellGroup, layer: int, spec: LayerSpec, q: torch.Tensor) -> Partial:
        """q `[cells * group, d_k]`, cell by cell: attention over what the policy's chooser picks for each."""
        choice = self._choosers[group.policy].choose(group.plan, layer, spec, q)
        if self.touch is not None:
            self.touch(choice.pages, choice.counts)
        lengths = choice.counts * self._pages.layout.page_size - group.lacking
        group.counts.add(lengths, choice)
        partial = self._kernels.attend_lists(
            self._pages, group.lists, choice.pages, lengths, q, spec.scale, spec.soft_cap
        )
        if choice.rest is not None:
            self._kernels.merge_into(partial, choice.rest, None)
        return partial

    def tally(self, group: CellGroup) -> None:
        """The batch is complete, or given up: what it has read is counted for its parts."""
        counts = group.counts
        for cell, (read, missed_mass, queries, worst, coarse) in zip(group.cells, counts.sums(), strict=True):
            tokens = cell.tokens * counts.layers
            self._tallies.add(cell.handle, read * self._tallies.token_bytes + counts.chosen_by, tokens)
            self._tallies.miss(cell.handle, missed_mass, queries, worst, coarse)
