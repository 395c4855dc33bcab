"""What one pool of a worker keeps of prompts' queries: a sample of each part's in each layer.

A sample lives as long as its part, so that it can move with the part's KV. Forks share it until one of them changes it.
Choosers read it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from lamina_workers.indexes.key_index import Floats, Positions
from lamina_workers.indexes.query_sample import QuerySample

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Kept:
    """A sample of the KV heads `heads`, and how many parts have it."""

    heads: tuple[int, ...]
    sample: QuerySample
    owners: int = 1


class QuerySamples:
    """`limit`: bytes that all samples may take; queries beyond that are not kept. Positions count from a part's first
    token."""

    def __init__(self, limit: int) -> None:
        self.nbytes = 0
        self._limit = limit
        self._parts: dict[int, dict[int, _Kept]] = {}  # by handle, then layer
        self._said = False

    def add(self, handle: int, layer: int, heads: tuple[int, ...], positions: Positions, q: torch.Tensor) -> int:
        """Keep queries of any float dtype, `[t, heads, group, d]`, at ascending positions, int64 `[t]`. Returns how
        many of the first are not new, or not kept. With other heads than before the sample begins anew."""
        if self.nbytes >= self._limit:
            if not self._said:
                self._said = True
                log.warning("samples of prompts' queries take %d bytes: no more are kept", self.nbytes)
            return len(positions)
        layers = self._parts.setdefault(handle, {})
        kept = layers.get(layer)
        if kept is not None and kept.heads != heads:  # a longer prompt interests more policies
            self._leave(kept)
            kept = None
        if kept is None:
            layers[layer] = _Kept(heads, QuerySample(*q.shape[1:]))
        sample = self._own(layers, layer)
        self.nbytes -= sample.nbytes
        try:
            return sample.offer(positions, q)
        finally:
            self.nbytes += sample.nbytes

    def positions(self, handle: int, layer: int, head: int) -> int:
        """At how many positions queries to a part's KV head are kept."""
        kept = self._parts.get(handle, {}).get(layer)
        return len(kept.sample) if kept is not None and head in kept.heads else 0

    def of(self, handle: int, layer: int, head: int) -> Floats | None:
        """The queries to a part's KV head, float32 `[n * group, d]`, by position; None where there are none."""
        kept = self._parts.get(handle, {}).get(layer)
        return kept.sample.of(kept.heads.index(head)) if kept is not None and head in kept.heads else None

    def between(self, handle: int, layer: int, lo: int, hi: int) -> tuple[tuple[int, ...], Positions, torch.Tensor]:
        """The KV heads, and what is kept of positions [lo, hi): positions and queries, bfloat16 as in `QuerySample`."""
        kept = self._parts.get(handle, {}).get(layer)
        if kept is None:
            return (), np.empty(0, np.int64), torch.empty(0, 0, dtype=torch.bfloat16)
        positions = kept.sample.positions
        first, end = np.searchsorted(positions, (lo, hi))
        return kept.heads, positions[first:end], kept.sample.queries[first:end]

    def fork(self, handle: int, parent: int, tokens: int) -> None:
        """A part is new, and has the first `tokens` of another."""
        layers = self._parts.get(parent)
        if layers is not None:
            for kept in layers.values():
                kept.owners += 1
            self._parts[handle] = dict(layers)
            self.cut(handle, tokens)

    def cut(self, handle: int, tokens: int) -> None:
        """A part's tokens from the first `tokens` on are new, or differ from before."""
        layers = self._parts.get(handle, {})
        for layer, kept in list(layers.items()):
            if len(kept.sample) and kept.sample.last >= tokens:
                self._own(layers, layer).cut(tokens)

    def forget(self, handle: int) -> None:
        """A part is closed."""
        for kept in self._parts.pop(handle, {}).values():
            self._leave(kept)

    def _leave(self, kept: _Kept) -> None:
        """A part has a sample no more."""
        kept.owners -= 1
        if not kept.owners:
            self.nbytes -= kept.sample.nbytes

    def _own(self, layers: dict[int, _Kept], layer: int) -> QuerySample:
        """A part's sample, to be changed: no other part has it."""
        kept = layers[layer]
        if kept.owners > 1:
            kept.owners -= 1
            kept = layers[layer] = _Kept(kept.heads, kept.sample.copy())
            self.nbytes += kept.sample.nbytes
        return kept.sample
