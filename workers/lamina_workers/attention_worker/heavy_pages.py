"""How much attention each page of a part has got: what policies that evict go by.

The sample of a prompt's queries, which is the denser the later, is counted with the first decode query, once all keys
are there. Shares are exact: they are computed from the keys themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from lamina_kernels.paged.pages import Pages, gather_keys
from lamina_kernels.paged.rows import Ints
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.attention_worker.eviction import Float32
from lamina_workers.attention_worker.kv_parts import Part
from lamina_workers.attention_worker.page_pool import NO_PAGE
from lamina_workers.policies.policy import Bools
from lamina_workers.policies.query_samples import QuerySamples

LEAST = 16  # queries that must be counted before anything is evicted
_AT_ONCE = 32  # queries whose logits are computed at a time


class CountedQuery(NamedTuple):
    """A decode query whose attention is counted, to some KV heads of a part, `heads` by their numbers in it. `first` is
    its first vector in the flat q, with `group` for every head of the part; `position` counts from the part's first."""

    handle: int
    part: Part
    heads: tuple[int, ...]
    first: int
    group: int
    position: int


@dataclass(frozen=True, slots=True)
class _Count:
    """What the pages of one head got up to position `at`. got: float32 `[group, slots]`, sums of shares; seen: float32
    `[slots]`, how many queries could see a page; queries: how many there were. Never written."""

    at: int
    queries: int
    got: Float32
    seen: Float32


class HeavyPages:
    """The counts of one pool's parts. Positions count from a part's first token."""

    def __init__(self, pages: Pages, samples: QuerySamples) -> None:
        self._pages = pages
        self._samples = samples
        self._counts: dict[int, dict[tuple[int, int], _Count]] = {}  # by handle, then layer of KV and head in the part

    @property
    def counting(self) -> bool:
        """Whether anything is counted of any part."""
        return bool(self._counts)

    def count(self, query: CountedQuery, layer: int, spec: LayerSpec, q: torch.Tensor) -> None:
        """Count a query of a layer, and before it what is sampled of the prompt; q: `[n, d_k]`, flat."""
        counts, heads = self._counts.setdefault(query.handle, {}), list(query.heads)
        tables, size = query.part.table[spec.kv_layer, heads], self._pages.layout.page_size
        held = tables[:, : query.position // size] != NO_PAGE  # equally many of each head
        pages = tables[:, : held.shape[1]][held].reshape(len(heads), -1)
        keys = gather_keys(self._pages, torch.from_numpy(pages.astype(np.int64)).to(self._pages.arena.device))
        vectors = q[query.first : query.first + len(query.part.heads) * query.group]
        by_head = vectors.unflatten(0, (-1, query.group))
        for at, number in enumerate(heads):
            before, slots = counts.get((spec.kv_layer, number)), np.flatnonzero(held[at])
            positions, asked = self._asked(query, layer, number, by_head[number], 0 if before is None else before.at)
            got = np.zeros((query.group, tables.shape[1]), np.float32)
            seen, queries = np.zeros(tables.shape[1], np.float32), len(positions)
            if before is not None:
                known = min(len(before.seen), len(seen))
                got[:, :known], seen[:known] = before.got[:, :known], before.seen[:known]
                queries += before.queries
            for lo in range(0, len(positions) if len(slots) else 0, _AT_ONCE):
                some = slice(lo, lo + _AT_ONCE)
                could = (slots + 1) * size <= positions[some, None]
                got[:, slots] += _shares(asked[some], keys[:, at], could, spec)
                seen[slots] += could.sum(0)
            counts[spec.kv_layer, number] = _Count(query.position, queries, got, seen)

    def _asked(
        self, query: CountedQuery, layer: int, number: int, q: torch.Tensor, since: int
    ) -> tuple[Ints, torch.Tensor]:
        """The positions, int64 `[n]`, and queries `[n, group, d_k]` to a head that are to be counted: those sampled of
        the prompt from position `since` on, and q, `[group, d_k]`."""
        heads, positions, sampled = self._samples.between(query.handle, layer, since, query.position)
        if (head := query.part.heads[number]) not in heads:
            return np.array([query.position]), q[None]
        both = torch.cat([sampled[:, heads.index(head)].to(q), q[None]])
        return np.append(positions, query.position), both

    def of(self, handle: int, cells: Bools, slots: int) -> Float32 | None:
        """As `PageAttention.of`: a page's mean share of the queries that could see it, in the query head where it is
        largest."""
        known = self._counts.get(handle, {})
        counts = [known.get((layer, head)) for layer, head in np.argwhere(cells).tolist()]
        rows = np.zeros((len(counts), slots), np.float32)
        for row, count in zip(rows, counts, strict=True):
            if count is None or count.queries < LEAST:
                return None
            there = min(slots, len(count.seen))
            row[:there] = count.got[:, :there].max(0) / np.maximum(count.seen[:there], 1)
        return rows

    def written(self, handle: int, start: int) -> None:
        """A part's tokens from `start` on are new, or differ from before."""
        counts, kept = self._counts.get(handle, {}), start // self._pages.layout.page_size
        for key, count in counts.items():
            if count.at > start:
                counts[key] = replace(count, at=start, got=count.got[:, :kept], seen=count.seen[:kept])

    def fork(self, handle: int, parent: int, tokens: int) -> None:
        """A part is new, and has the first `tokens` of another."""
        if (counts := self._counts.get(parent)) is not None:
            self._counts[handle] = dict(counts)
            self.written(handle, tokens)

    def forget(self, handle: int) -> None:
        """A part is closed."""
        self._counts.pop(handle, None)


def _shares(q: torch.Tensor, keys: torch.Tensor, could: Bools, spec: LayerSpec) -> Float32:
    """The attention, float32 `[group, slots]`, that queries `[n, group, d_k]` give to pages together, whose keys are
    `[slots * size, d_k]`. Each query could see those in `could`, bool `[n, slots]`. What is no number counts 0."""
    if keys.dtype not in (torch.bfloat16, torch.float16):
        q = q.float()
    logits = (q.to(keys) @ keys.T).float().mul_(spec.scale)
    if spec.soft_cap is not None:
        logits = spec.soft_cap * torch.tanh(logits / spec.soft_cap)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    by_page = weights.unflatten(2, (could.shape[1], -1)).sum(-1)
    by_page *= torch.from_numpy(could).to(keys.device)[:, None]
    shares = (by_page / by_page.sum(-1, keepdim=True)).nan_to_num_(0, 0)
    found: Float32 = shares.sum(0).cpu().numpy()
    return found
