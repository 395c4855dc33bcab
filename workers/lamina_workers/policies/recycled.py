"""`recycled`: the pages that mattered in a full step are read again in the steps after it (Recycled Attention, arXiv
2411.05787).

A full step reads every page, so its answer is exact, and ranks them by their sketches' shares of the attention. The
best are read in the steps after it, and the new ones; nothing stands for the others. There is one every `every` steps,
and every 5 steps where the query has turned away from that of the last one. Nothing is freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from lamina_kernels.paged.rows import Ints
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.policies.chooser import Choice, Chooser, Float32, Holding, Int32, Items, everything, lists
from lamina_workers.policies.page_budget import Bounds, Budgeted, ScannedItems, best, planned
from lamina_workers.policies.policy import LONGEST

CHECK = 5  # steps after which the query is compared with that of the last full step: the paper's


@dataclass(frozen=True)
class Recycled(Budgeted):
    """A `Budgeted` policy. A step is full every `every` steps, or where the cosine of the query and that of the last
    full one is below `turn`."""

    name: ClassVar[str] = "recycled"
    every: int = 50
    turn: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("every", 1, LONGEST)
        self.check("turn", -1, 1)

    def chooser(self, at: Holding) -> Chooser:
        return _Recycling(self, at)


@dataclass(slots=True)
class _FullStep:
    """The last full step of a head of a part, at so many `tokens`, with the query heads' `q`, float32 `[group, d_k]`:
    until the next it reads the `entries`, and all from `upto` on."""

    entries: Ints
    upto: int
    tokens: int
    q: Float32


class _Recycling:
    def __init__(self, policy: Recycled, at: Holding) -> None:
        self._policy = policy
        self._holding = at
        self._last: dict[int, dict[tuple[int, int], _FullStep]] = {}  # by part, then by layer and KV head

    def worth(self, tokens: Sequence[int]) -> bool:
        return True

    def plan(self, items: Items) -> ScannedItems:
        return planned(self._policy, items, self._holding)

    def choose(self, plan: ScannedItems, layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        """`missed` is known in full steps alone: of what the step before read, since they themselves miss nothing."""
        items, item_bounds = plan.items, plan.at
        if item_bounds.whole:
            return everything(items, spec.kv_layer)
        queries = q.float().view(len(items), items.group, -1).cpu().numpy()
        last_steps = [self._known(items, i, layer, queries[i]) for i in range(len(items))]
        missed_mass = np.full((len(items), items.group), np.nan, np.float32)
        read, log_mass = 0, np.empty((len(items), items.group, 0), np.float32)
        if None in last_steps:
            log_mass, read = plan.masses(self._holding.sketches, spec, q)
        pages: list[Int32] = []
        for i, step in enumerate(last_steps):
            table = items.tables[i][spec.kv_layer]
            if step is not None:
                pages.append(np.concatenate([table[step.entries], table[step.upto :]]))
                continue
            steps, key = self._last.setdefault(items.parts[i], {}), (layer, items.heads[i])
            masses = log_mass[i, :, : int(item_bounds.sealed[i])]
            if (before := steps.get(key)) is not None and before.tokens < items.tokens[i]:
                missed_mass[i] = _left_out(before, masses)
            steps[key] = self._full_step(item_bounds, i, masses, int(items.tokens[i]), queries[i])
            pages.append(table)
        return Choice(*lists(pages), missed_mass.reshape(-1), read)

    def forget(self, handle: int) -> None:
        self._last.pop(handle, None)

    def _known(self, items: Items, i: int, layer: int, q: Float32) -> _FullStep | None:
        """The full step by which an item still reads; None where another is due."""
        step = self._last.get(items.parts[i], {}).get((layer, items.heads[i]))
        tokens = int(items.tokens[i])
        if step is None or not 0 < tokens - step.tokens < self._policy.every:  # or the part was cut back
            return None
        return None if self._turned(step, tokens, q) else step

    def _turned(self, step: _FullStep, tokens: int, q: Float32) -> bool:
        """Whether a head with these queries, float32 `[group, d_k]`, has a full step sooner."""
        if (tokens - step.tokens) % CHECK:
            return False
        lengths = np.linalg.norm(q, axis=1) * np.linalg.norm(step.q, axis=1)
        cosine = float(((q * step.q).sum(1) / np.maximum(lengths, np.finfo(np.float32).tiny)).mean())
        return not cosine >= self._policy.turn

    def _full_step(self, at: Bounds, i: int, log_mass: Float32, tokens: int, q: Float32) -> _FullStep:
        """The best entries of item i by the largest share of any query head; log_mass `[group, sealed]`."""
        sinks, recent = int(at.sinks[i]), int(at.recent[i])
        shares = log_mass - np.logaddexp.reduce(log_mass, axis=1, keepdims=True)
        chosen = best(shares.max(0)[sinks:recent], int(at.picks[i])) + sinks
        return _FullStep(np.concatenate([np.arange(sinks), chosen]), recent, tokens, q.copy())


def _left_out(step: _FullStep, log_mass: Float32) -> Float32:
    """The share of the mass, `[group]`, of the pages that are not read after a full step; log_mass `[group, pages]`."""
    others = np.ones(step.upto, np.bool_)
    others[step.entries] = False
    unread = log_mass[:, : step.upto][:, others[: log_mass.shape[1]]]
    if not unread.size:
        return np.zeros(len(log_mass), np.float32)
    share: Float32 = np.exp(np.logaddexp.reduce(unread, axis=1) - np.logaddexp.reduce(log_mass, axis=1))
    return share
