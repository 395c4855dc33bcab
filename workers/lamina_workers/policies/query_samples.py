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
class _LayerSample:
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
        self._parts: dict[int, dict[int, _LayerSample]] = {}  # by handle, then layer
        self._logged = False

    def add(self, handle: int, layer: int, heads: tuple[int, ...], positions: Positions, q: torch.Tensor) -> int:
        """Keep queries of any float dtype, `[t, heads, group, d]`, at ascending positions, int64 `[t]`. Returns how
        many of the first are not new, or not kept. With other heads than before the sample begins anew."""
        if self.nbytes >= self._limit:
            if not self._logged:
                self._logged = True
                log.warning("samples of prompts' queries take %d bytes: no more are kept", self.nbytes)
            return len(positions)
        layers = self._parts.setdefault(handle, {})
        layer_sample = layers.get(layer)
        if layer_sample is not None and layer_sample.heads != heads:  # a longer prompt interests more policies
            self._leave(layer_sample)
            layer_sample = None
        if layer_sample is None:
            layers[layer] = _LayerSample(heads, QuerySample(*q.shape[1:]))
        sample = self._own(layers, layer)
        self.nbytes -= sample.nbytes
        try:
            return sample.offer(positions, q)
        finally:
            self.nbytes += sample.nbytes

    def positions(self, handle: int, layer: int, head: int) -> int:
        """At how many positions queries to a part's KV head are kept."""
        layer_sample = self._parts.get(handle, {}).get(layer)
        return len(layer_sample.sample) if layer_sample is not None and head in layer_sample.heads else 0

    def of(self, handle: int, layer: int, head: int) -> Floats | None:
        """The queries to a part's KV head, float32 `[n * group, d]`, by position; None where there are none."""
        layer_sample = self._parts.get(handle, {}).get(layer)
        return (
            layer_sample.sample.of(layer_sample.heads.index(head))
            if layer_sample is not None and head in layer_sample.heads
            else None
        )

    def between(self, handle: int, layer: int, lo: int, hi: int) -> tuple[tuple[int, ...], Positions, torch.Tensor]:
        """The KV heads, and what is kept of positions [lo, hi): positions and queries, bfloat16 as in `QuerySample`."""
        layer_sample = self._parts.get(handle, {}).get(layer)
        if layer_sample is None:
            return (), np.empty(0, np.int64), torch.empty(0, 0, dtype=torch.bfloat16)
        positions = layer_sample.sample.positions
        first, end = np.searchsorted(positions, (lo, hi))
        return layer_sample.heads, positions[first:end], layer_sample.sample.queries[first:end]

    def fork(self, handle: int, parent: int, tokens: int) -> None:
        """A part is new, and has the first `tokens` of another."""
        layers = self._parts.get(parent)
        if layers is not None:
            for layer_sample in layers.values():
                layer_sample.owners += 1
            self._parts[handle] = dict(layers)
            self.cut(handle, tokens)

    def cut(self, handle: int, tokens: int) -> None:
        """A part's tokens from the first `tokens` on are new, or differ from before."""
        layers = self._parts.get(handle, {})
        for layer, layer_sample in list(layers.items()):
            if len(layer_sample.sample) and layer_sample.sample.last >= tokens:
                self._own(layers, layer).cut(tokens)

    def forget(self, handle: int) -> None:
        """A part is closed."""
        for layer_sample in self._parts.pop(handle, {}).values():
            self._leave(layer_sample)

    def _leave(self, kept: _LayerSample) -> None:
        """A part has a sample no more."""
        kept.owners -= 1
        if not kept.owners:
            self.nbytes -= kept.sample.nbytes

    def _own(self, layers: dict[int, _LayerSample], layer: int) -> QuerySample:
        """A part's sample, to be changed: no other part has it."""
        layer_sample = layers[layer]
        if layer_sample.owners > 1:
            layer_sample.owners -= 1
            layer_sample = layers[layer] = _LayerSample(layer_sample.heads, layer_sample.sample.copy())
            self.nbytes += layer_sample.sample.nbytes
        return layer_sample.sample
