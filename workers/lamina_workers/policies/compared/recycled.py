"""`recycled`: the pages that mattered in a full step are read again in the steps after it (Recycled Attention, arXiv
2411.05787).

A full step reads every page, so its answer is exact, and ranks them by their sketches' shares of the attention. The
best are read in the steps after it, and the new ones; nothing stands for the others. There is one every `every` steps,
and every 5 steps where the query has turned away from that of the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from lamina_kernels.paged.rows import Ints
from lamina_kernels.sketches import sketches
from lamina_kernels.sketches.items import Items as SketchItems
from lamina_workers.policies.chooser import Chooser, Float32, Holding
from lamina_workers.policies.compared.base import Budgeted, Head, HeadChooser, Picked, best
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
    """The last full step of a head, at so many `tokens`, with the query heads' `q`: until the next it reads the
    `entries`, and all from `upto` on."""

    entries: Ints
    upto: int
    tokens: int
    q: torch.Tensor


class _Recycling(HeadChooser[Recycled, _FullStep]):
    def pick(self, head: Head) -> Picked:
        """`missed` is known in full steps alone: of what the step before read, since they themselves miss nothing."""
        number = head.budget(self.policy.budget)
        if number >= head.recent - head.sinks:
            return Picked(None)
        step, since = self.of(head), 0
        if step is not None:
            since = head.tokens - step.tokens  # below 1 where the part was cut back
            if 0 < since < self.policy.every and not (since % CHECK == 0 and self._turned(step, head.q)):
                return Picked(np.concatenate([step.entries, np.arange(step.upto, head.recent)]))
        sealed = np.array([head.tokens // self.at.page_size])
        ends = sealed, *(np.array([x]) for x in (head.sinks, head.recent, len(head.pages)))
        group = len(head.q)
        scan = sketches.plan_scan(self.at.sketches, SketchItems([head.pages[None]], *ends), group, self.at.threads)
        spec, layout = head.spec, self.at.sketches.layout
        masses = sketches.scan(self.at.sketches, scan, 0, head.q, spec.scale, spec.soft_cap, 0.0).log_mass
        log_mass: Float32 = masses[0, :, : int(sealed[0])].cpu().numpy()
        shares = log_mass - np.logaddexp.reduce(log_mass, axis=1, keepdims=True)
        entries = best(shares.max(0)[head.sinks : head.recent], number) + head.sinks
        self.keep(head, _FullStep(entries, head.recent, head.tokens, head.q.clone()))
        missed_mass = np.full(group, np.nan, np.float32)
        if step is not None and since > 0:
            others = np.ones(step.upto, np.bool_)
            others[: head.sinks] = others[step.entries] = False
            missed_mass = np.exp(shares[:, : step.upto][:, others]).sum(1)
        return Picked(None, missed_mass, len(head.pages) * layout.scanned_bytes)

    def _turned(self, step: _FullStep, q: torch.Tensor) -> bool:
        return not float(torch.cosine_similarity(q, step.q, dim=1, eps=1e-30).mean()) >= self.policy.turn
