"""`retrieval`: of each head's pages those that its queries attend to.

RetrievalAttention (arXiv 2409.10516) with a budget that follows the query. A *look* scans sketches of all pages, which
gives each page's share of the attention; pages are then read exactly until at most `missed` of it is left, and the
means of their values stand for the others (as RetroInfer's estimation zone does). From one step to the next the choice
often stays right: each look also measures what the choice before would have missed now, and while that is within the
limit, looks become rarer, up to one in `every` steps; where it is not, the next step looks again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels import sketches
from lamina_kernels.partial import Partial
from lamina_protocols.messages import LayerSpec
from lamina_workers.policies.chooser import Adaptive, Choice, Chooser, Float32, Holding, Int32, Items, everything
from lamina_workers.policies.policy import LONGEST

WORTH = 24_000  # tokens of a layer's items together, from which on looking pays: measured, see docs/long_context.md
MARGIN = 0.7  # of the limit, which a look may leave out: the rest is for the steps until the next


@dataclass(frozen=True)
class Retrieval(Adaptive):
    """`sink` first and `recent` last tokens are always read. `missed` of the attention mass may be left out of a
    query, by estimate. A head that needs more than `budget` of its pages reads all until its next look."""

    name: ClassVar[str] = "retrieval"
    sink: int = 32
    recent: int = 64
    missed: float = 0.015
    budget: float = 0.7
    every: int = 8

    def __post_init__(self) -> None:
        self.check("sink", 0, LONGEST)
        self.check("recent", 1, LONGEST)
        self.check("missed", 0, 1)
        self.check("budget", 0, 1)
        self.check("every", 1, 1000)

    def chooser(self, at: Holding) -> Chooser:
        return _Looks(self, at)


@dataclass(slots=True)
class _Memory:
    """What a KV head chose at its last look. `entries` are ascending, all below `held`; those from there on are read
    anyway. `missed`, `[group]`, is what the choice before missed at that look, which this one will miss at the next."""

    entries: Int32
    held: int
    missed: Float32
    pause: int = 0  # steps from one look to the next
    left: int = 0  # steps until then


@dataclass(frozen=True, slots=True)
class _Plan:
    items: Items
    held: list[int]  # entries of each
    scan: Any  # the kernels' plan; None where everything is read


@dataclass(slots=True)
class _Looks:
    """The chooser. Memories by layer, then by part and KV head."""

    policy: Retrieval
    at: Holding
    memories: dict[int, dict[tuple[int, int], _Memory]] = field(default_factory=dict)

    def plan(self, items: Items) -> _Plan:
        size, policy = self.at.page_size, self.policy
        held = -(-items.tokens // size)
        if items.tokens.sum() < WORTH:
            return _Plan(items, held.tolist(), None)
        sealed = items.tokens // size
        recent = np.maximum(0, (items.tokens - policy.recent) // size)
        sinks = np.minimum(np.where(items.begins, -(-policy.sink // size), 0), held)
        asked = sketches.Items(items.tables, sealed, sinks, recent, held)
        scan = sketches.plan_scan(self.at.sketches, asked, items.group, self.at.threads)
        return _Plan(items, held.tolist(), scan)

    def choose(self, plan: _Plan, layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        items = plan.items
        if plan.scan is None:
            return everything(items, spec.kv_layer)
        known = self.memories.setdefault(layer, {})
        keys = list(zip(items.parts, items.heads, strict=True))
        memories = [known.get(key) for key in keys]
        due = np.array([m is None or m.left <= 0 or m.held > held for m, held in zip(memories, plan.held, strict=True)])
        rest, read = None, 0
        if due.any():
            found = sketches.scan(
                self.at.sketches, plan.scan, spec.kv_layer, q, spec.scale, spec.soft_cap, MARGIN * self.policy.missed, due
            )
            read = int(np.array(plan.held)[due].sum()) * self.at.sketches.layout.sketch_bytes
            rest = _of(due, found.tail, items.group)
            for item in np.flatnonzero(due).tolist():
                known[keys[item]] = memories[item] = self._look(found, item, memories[item], plan.held[item])
        lists = [_entries(m, held) for m, held in zip(memories, plan.held, strict=True) if m is not None]
        counts = np.array([len(entries) for entries in lists], np.int64)
        pages = np.zeros((len(lists), int(counts.max())), np.int32)
        for row, table, entries in zip(pages, items.tables, lists, strict=True):
            table[spec.kv_layer].take(entries, out=row[: len(entries)])
        for memory in memories:
            if memory is not None:
                memory.left -= 1
        missed = np.stack([m.missed for m in memories if m is not None])
        return Choice(pages, counts, missed.reshape(-1), read, rest)

    def _look(self, found: sketches.Choice, item: int, before: _Memory | None, held: int) -> _Memory:
        """What a head chooses now, and how long it may keep to that."""
        group = found.log_mass.shape[1]
        count = int(found.counts[item])
        entries = found.entries[item, :count].numpy().copy()
        missed = found.missed[item * group : (item + 1) * group].numpy().copy()
        if count > self.policy.budget * held:
            entries, missed = np.arange(held, dtype=np.int32), np.zeros(group, np.float32)
        if before is None or before.held > held:
            return _Memory(entries, held, missed)
        stale = _missed_by(found.log_mass[item].numpy(), before, held)
        fits = bool(stale.max() <= self.policy.missed)
        pause = min(max(1, 2 * before.pause), self.policy.every - 1) if fits else before.pause // 4
        return _Memory(entries, held, np.maximum(missed, stale) if pause else missed, pause, pause + 1)

    def forget(self, handle: int) -> None:
        for known in self.memories.values():
            for key in [key for key in known if key[0] == handle]:
                del known[key]


def _entries(memory: _Memory, held: int) -> Int32:
    """What a head reads now: its choice, and all that came since."""
    if memory.held == held:
        return memory.entries
    return np.concatenate([memory.entries, np.arange(memory.held, held, dtype=np.int32)])


def _missed_by(log_mass: Float32, memory: _Memory, held: int) -> Float32:
    """The share of the mass, `[group]`, that an earlier choice would have missed: log_mass `[group, entries]`."""
    logs = log_mass[:, :held]
    peak = logs.max(1, keepdims=True)
    weights = np.exp(logs - peak)
    kept = weights[:, memory.entries].sum(1) + weights[:, memory.held :].sum(1)
    missed: Float32 = np.clip(1 - kept / weights.sum(1), 0, 1)
    return missed


def _of(due: npt.NDArray[np.bool_], tail: Partial, group: int) -> Partial:
    """The tail of those items alone."""
    if due.all():
        return tail
    return Partial(tail.out, tail.lse.masked_fill(torch.from_numpy(~np.repeat(due, group)), -torch.inf))
