"""`heavy_hitter`: the pages that have got the most attention so far, and the recent ones; the others are given up (H2O,
arXiv 2306.14048).

H2O adds up the attention that each key gets from all queries, and evicts the least. Here it is pages that are counted,
by a sample of the prompt's queries, which is the denser the later, and every `every`-th of decode's. Shares are exact:
they are computed from the keys themselves. A page's sum is divided by how many of them could see it, since an old page
was seen by more (as SinkLoRA, arXiv 2406.05678, normalises). Prompts are read whole, so pages are given up only in
decode. They are not read again: a page that would have become heavy later is lost, as in H2O, though it stays in
memory here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from lamina_kernels.paged.pages import gather_keys
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.policies.chooser import Chooser, Float32, Holding
from lamina_workers.policies.compared.base import NOTHING, Budgeted, Head, HeadChooser, Picked, indices
from lamina_workers.policies.policy import LONGEST, Bools

SAMPLE = 32  # queries are counted of a row of a prompt that is as long as it is far from the end, up to twice as many
LEAST = 16  # queries that must be counted before anything is given up
AT_ONCE = 32  # queries whose logits are computed at a time


@dataclass(frozen=True)
class HeavyHitter(Budgeted):
    """Read are the `sink` first and `recent` last tokens, and of the pages before the recent ones the share `budget`
    with most attention."""

    name: ClassVar[str] = "heavy_hitter"
    every: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("every", 1, LONGEST)

    def sampled(self, start: int, prompt: int) -> int:
        if prompt <= self.sink + self.recent:
            return 0
        return 1 << max(0, ((prompt - start) // SAMPLE).bit_length() - 1)

    def chooser(self, at: Holding) -> Chooser:
        return _Counting(self, at)


@dataclass(frozen=True, slots=True)
class _Count:
    """What the pages of one head got up to position `position`. got: float32 `[group, entries]`, sums of shares;
    visible: float32 `[entries]`, how many queries could see a page; queries: how many there were. Entries in `lost` are
    given up, of those below `upto`. Never written."""

    position: int
    queries: int
    got: Float32
    visible: Float32
    lost: Bools
    upto: int

    def resized(self, entries: int) -> _Count:
        """The same of so many entries."""
        width = max(0, entries - len(self.visible))
        got, visible = self.got[:, :entries], self.visible[:entries]
        padded = np.pad(got, ((0, 0), (0, width))), np.pad(visible, (0, width)), np.pad(self.lost[:entries], (0, width))
        return replace(self, got=padded[0], visible=padded[1], lost=padded[2], upto=min(self.upto, entries))


class _Counting(HeadChooser[HeavyHitter, _Count]):
    def pick(self, head: Head) -> Picked:
        policy, sealed = self.policy, min(head.position, head.tokens) // self.at.page_size
        count = self.of(head)
        if count is None:
            count = _Count(0, 0, np.zeros((len(head.q), 0), np.float32), np.zeros(0, np.float32), NOTHING > 0, 0)
        count = count.resized(max(sealed, head.recent))
        remaining = min(head.recent, head.sinks + math.ceil(policy.budget * head.recent))
        if remaining < head.recent > count.upto and count.queries >= LEAST:
            count = _given_up(count, head, remaining)
        behind = remaining < head.recent and not count.upto
        if behind or head.position % policy.every == 0:
            count = self._counted(count, head, np.flatnonzero(~count.lost[:sealed]))
        self.keep(head, count)
        entries = np.flatnonzero(~count.lost[: head.recent])
        return Picked(entries[entries >= head.sinks])

    def _counted(self, count: _Count, head: Head, entries: np.ndarray) -> _Count:
        """With a query to these entries, and before it what is sampled of the prompt."""
        size = self.at.page_size
        heads, positions, sampled = self.at.samples.between(head.part, head.layer, count.position, head.position)
        queries = head.q[None]
        if head.head in heads:
            queries = torch.cat([sampled[:, heads.index(head.head)].to(head.q), queries])
            positions = np.append(positions, head.position)
        else:
            positions = np.array([head.position])
        got, visible = count.got.copy(), count.visible.copy()
        pages = indices(head.pages[entries][None], head.q.device)
        keys = gather_keys(self.at.pages, pages)[:, 0]
        for first in range(0, len(positions) if len(entries) else 0, AT_ONCE):
            rows = slice(first, first + AT_ONCE)
            could = (entries + 1) * size <= positions[rows, None]
            got[:, entries] += _shares(queries[rows], keys, could, head.spec)
            visible[entries] += could.sum(0)
        return replace(count, position=head.position, queries=count.queries + len(positions), got=got, visible=visible)

    def written(self, handle: int, start: int) -> None:
        counts, entries = self.kept.get(handle, {}), start // self.at.page_size
        for key, count in counts.items():
            if count.position > start or len(count.visible) > entries:
                counts[key] = replace(count.resized(entries), position=min(count.position, start))

    def fork(self, handle: int, parent: int, tokens: int) -> None:
        if parent in self.kept:
            self.kept[handle] = dict(self.kept[parent])
            self.written(handle, tokens)


def _given_up(count: _Count, head: Head, remaining: int) -> _Count:
    """Where `remaining` entries are left before the recent ones: those with most attention, as a mean share of the
    queries that could see it, in the query head where it is largest; and the sinks."""
    got = count.got[:, : head.recent].max(0) / np.maximum(count.visible[: head.recent], 1)
    got = np.where(count.lost[: head.recent], -1, got)
    got[: head.sinks] = np.inf
    lost = count.lost.copy()
    lost[np.argsort(-got, kind="stable")[remaining:]] = True
    return replace(count, lost=lost, upto=head.recent)


def _shares(q: torch.Tensor, keys: torch.Tensor, could: Bools, spec: LayerSpec) -> Float32:
    """The attention, float32 `[group, entries]`, that queries `[n, group, d_k]` give to pages together, whose keys are
    `[entries * size, d_k]`. Each query could see those in `could`, bool `[n, entries]`. What is no number counts 0."""
    logits = (q.to(keys) @ keys.T).float().mul_(spec.scale)
    if spec.soft_cap is not None:
        logits = spec.soft_cap * torch.tanh(logits / spec.soft_cap)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    by_page = weights.unflatten(2, (could.shape[1], -1)).sum(-1)
    by_page *= torch.from_numpy(could).to(keys.device)[:, None]
    shares = (by_page / by_page.sum(-1, keepdim=True)).nan_to_num_(0, 0)
    mass: Float32 = shares.sum(0).cpu().numpy()
    return mass
