"""`retrieval`: the pages of each head that its queries attend to.

RetrievalAttention (arXiv 2409.10516) with a budget that follows the query. A *full scan* reads the sketches of all
pages, which give each page's share of the attention. Pages are then read exactly until at most `missed` of it is left,
and the means of their values stand for the others (as in RetroInfer's estimation zone). From one step to the next the
choice often stays right. So each full scan also measures what the previous choice would have missed now: while that is
within the limit, full scans become rarer, up to one in `every` steps; where it is not, the next step scans again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.rows import Ints
from lamina_kernels.partial import Partial
from lamina_kernels.sketches import sketches
from lamina_protocols.layers import LayerSpec
from lamina_workers.errors import PolicyError
from lamina_workers.policies.chooser import Adaptive, Choice, Chooser, Holding, Items, everything
from lamina_workers.policies.memory import Memories, Records, full_scan_kernel, limits, read_kernel
from lamina_workers.policies.policy import LONGEST

# What choosing costs in a layer, in pages that could be read in order meanwhile; measured (docs/log.md).
CALL = 1_100  # the calls
SKETCH = 0.34  # a page's sketch
SCATTERED = 1.5  # a page that is read without its neighbours
GUESS = 0.6  # all of that for each page, before anything is known
REST = 64  # steps for which a layer is read whole that was not worth it
INDEXES = ("scan", "graph", "ivf")
MARGIN = 0.7  # of the limit, which a full scan may leave out: the rest is for the steps until the next


@dataclass(frozen=True)
class Retrieval(Adaptive):
    """`sink` first and `recent` last tokens are always read. `missed` of the attention mass may be left out of a
    query, by estimate. A head that needs more than `budget` of its pages reads all until its next full scan.

    index: "scan" has no index. With "graph" or "ivf" (see `indexed`) each query head reads the pages of its `top`
    best keys instead; parts of `least` tokens or more are indexed, and again whenever `segment` tokens have come."""

    name: ClassVar[str] = "retrieval"
    sink: int = 32
    recent: int = 64
    missed: float = 0.02
    budget: float = 0.7
    every: int = 8
    index: str = "scan"
    top: int = 100
    least: int = 8192
    segment: int = 2048

    def __post_init__(self) -> None:
        self.check("sink", 0, LONGEST)
        self.check("recent", 1, LONGEST)
        self.check("missed", 0, 1)
        self.check("budget", 0, 1)
        self.check("every", 1, 1000)
        self.check("top", 1, 10_000)
        self.check("least", 1, LONGEST)
        self.check("segment", 1, LONGEST)
        if self.index not in INDEXES:
            raise PolicyError(f"{self.name}: index is {self.index!r:.40}; allowed are {', '.join(INDEXES)}")

    def chooser(self, at: Holding) -> Chooser:
        if self.index == "scan":
            return _Retrieving(self, at)
        from lamina_workers.policies.indexed import Indexed  # which needs FAISS

        return Indexed(self, at, _Retrieving(self, at))


@dataclass(frozen=True, slots=True)
class _Plan:
    items: Items
    keys: list[tuple[int, int]]
    held: Ints  # entries of each
    sealed: Ints
    tables: Ints  # address of each in layer 0, and
    strides: Ints  # bytes from layer to layer
    scan: Any  # the kernels' plan


@dataclass(slots=True)
class _Retrieving:
    """The chooser."""

    policy: Retrieval
    at: Holding
    limits: Records = field(init=False)
    memories: dict[int, Memories] = field(default_factory=dict)  # by layer
    resting: dict[int, int] = field(default_factory=dict)  # steps for which a layer is still read whole

    def __post_init__(self) -> None:
        self.limits = limits(self.policy.missed, self.policy.budget, self.policy.every)
        full_scan_kernel(), read_kernel()  # compiled now rather than in the first step

    def worth(self, tokens: Sequence[int]) -> bool:
        return CALL / (sum(tokens) / self.at.page_size) + GUESS < 1

    def plan(self, items: Items) -> _Plan:
        size, policy = self.at.page_size, self.policy
        held, sealed = -(-items.tokens // size), items.tokens // size
        keys = list(zip(items.parts, items.heads, strict=True))
        tables = np.array([table.ctypes.data for table in items.tables], np.int64)
        strides = np.array([table.strides[0] for table in items.tables], np.int64)
        recent = np.maximum(0, (items.tokens - policy.recent) // size)
        sinks = np.minimum(np.where(items.begins, -(-policy.sink // size), 0), held)
        asked = sketches.Items(items.tables, sealed, sinks, recent, held)
        scan = sketches.plan_scan(self.at.sketches, asked, items.group, self.at.threads)
        return _Plan(items, keys, held, sealed, tables, strides, scan)

    def choose(self, plan: _Plan, layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        items, at = plan.items, self.at.sketches
        if resting := self.resting.pop(layer, 0):
            if resting > 1:
                self.resting[layer] = resting - 1
            return everything(items, spec.kv_layer)
        most = int(plan.held.max())
        memory = self.memories.setdefault(layer, Memories()).of(plan.keys, most, items.group)
        due, rest, read = memory.begin(plan.held, plan.sealed), None, 0
        if due.any():
            limit = MARGIN * self.policy.missed
            found = sketches.scan(at, plan.scan, spec.kv_layer, q, spec.scale, spec.soft_cap, limit, due)
            memory.full_scan(self.limits, found)
            chosen = memory.heads["chosen"]
            rest = _of(due & (chosen < plan.held), found.tail, items.group)
            read = int(plan.held[due].sum()) * at.layout.sketch_bytes
            every = plan.held.sum()
            often = (plan.held / (1 + memory.heads["pause"])).sum()  # sketches read a step
            if CALL + SKETCH * often + SCATTERED * chosen.sum() > every:
                self.resting[layer] = REST
        pages, counts = memory.read(plan.tables + spec.kv_layer * plan.strides)
        return Choice(pages, counts, memory.missed.reshape(-1), read, rest)

    def forget(self, handle: int) -> None:
        for memories in self.memories.values():
            memories.forget(handle)


def _of(some: npt.NDArray[np.bool_], tail: Partial, group: int) -> Partial:
    """The tail of `some` items, bool `[items]`, alone. What the tail has of the others may be any bytes; its weight
    is 0, but 0 times NaN is NaN."""
    if some.all():
        return tail
    others = torch.from_numpy(~np.repeat(some, group))
    return Partial(tail.out.masked_fill(others[:, None], 0), tail.lse.masked_fill(others, -torch.inf))
