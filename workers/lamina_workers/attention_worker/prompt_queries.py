"""The queries of prompts at one worker, for the choosers that learn from them.

Of a row that reads they are picked out of what it asks anyway; of one that does not, the engine sends a `Sample`.
Either way a layer's queries are shown once the row's own keys of the layer are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.messages import FetchedSample, FetchSample, Row, Sample
from lamina_workers.attention_worker.adaptive import AdaptiveAttention
from lamina_workers.indexes.key_index import Positions
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.kv_pages.parts import KvPart
from lamina_workers.policies.query_samples import QuerySamples

_NOTHING = torch.empty(0, 0, dtype=torch.bfloat16)


class SampledRow(NamedTuple):
    """A row of a prompt, one in `stride` of whose queries are kept. `first` is its first vector in the flat q, -1 where
    it does not read."""

    row: Row
    part: KvPart
    stride: int
    first: int


class Picked(NamedTuple):
    """Queries of a row in a layer, `[positions, heads, group, d_k]`, which wait for the row's keys."""

    row: SampledRow
    heads: tuple[int, ...]
    positions: Positions
    stride: int
    q: torch.Tensor


@dataclass(slots=True)
class BatchSamples:
    """Of a batch: by handle the rows whose queries are kept, and by layer and handle what was picked and not shown yet.
    `strides` has, of each of its rows, what the engine is to send."""

    rows: dict[int, SampledRow]
    strides: tuple[int, ...]
    waiting: dict[int, dict[int, Picked]] = field(default_factory=dict)


class PromptQueries:
    """For one pool. Layers are numbered within it."""

    def __init__(
        self, config: HolderConfig, store: KVStore, choosers: AdaptiveAttention | None, samples: QuerySamples
    ) -> None:
        self._config = config
        self._store = store
        self._choosers = choosers
        self._samples = samples

    def begin(self, rows: Sequence[Row]) -> BatchSamples | None:
        """What is kept of a batch's queries; None for nothing."""
        group, first = self._config.layers[0].group, 0
        sampled: dict[int, SampledRow] = {}
        strides = [0] * len(rows)
        for number, row in enumerate(rows):
            part = self._store.part(row.handle)
            stride = part.policies.stride(row.start, row.prompt) if row.prompt else 0
            reads = row.read is not None
            if stride and row.start + row.count > part.lo:
                sampled[row.handle] = SampledRow(row, part, stride, first if reads else -1)
                strides[number] = 0 if reads else stride
            first += row.count * len(part.heads) * group if reads else 0
        return BatchSamples(sampled, tuple(strides)) if sampled else None

    def asked(self, batch: BatchSamples, layer: int, q: torch.Tensor, stored: bool) -> None:
        """The queries of a layer have come, `[n, d_k]` of the whole batch, flat. `stored`: so have its keys."""
        spec = self._config.layers[layer]
        for of_row in batch.rows.values():
            row, part, stride, first = of_row
            sampled_heads = _sampled_heads(layer, row, part)
            if first < 0 or not sampled_heads:
                continue
            positions = sampled_positions(row, stride)
            vectors = q[first : first + row.count * len(part.heads) * spec.group]
            by_head = vectors.view(row.count, len(part.heads), spec.group, spec.query_width)
            tokens = torch.from_numpy(positions - row.start)
            numbers = torch.tensor([part.heads.index(head) for head in sampled_heads])
            picked = Picked(of_row, sampled_heads, positions, stride, by_head[tokens][:, numbers].bfloat16())
            batch.waiting.setdefault(layer, {})[row.handle] = picked
        if stored:
            self.stored(batch, layer)

    def came(self, batch: BatchSamples | None, layer: int, message: Sample, stored: bool) -> None:
        """A sample of a row of the batch has come. Raises ProtocolError for one that no row of it wants."""
        of_row = batch.rows.get(message.handle) if batch is not None else None
        if batch is None or of_row is None or of_row.first >= 0:
            raise ProtocolError(f"a sample for part {message.handle}, of which batch {message.batch} wants none")
        row, spec = of_row.row, self._config.layers[layer]
        sampled_heads = _sampled_heads(layer, row, of_row.part)
        positions = np.array(message.positions, np.int64)
        shape, heads = (len(positions) * len(message.heads) * spec.group, spec.query_width), of_row.part.heads
        fits = tuple(message.q.shape) == shape and shape[0] and message.q.is_floating_point()
        message_heads = set(message.heads)
        if not (
            fits and set(sampled_heads) <= message_heads <= set(heads) and len(message.heads) == len(message_heads)
        ):
            raise ProtocolError(
                f"a sample of {message.q.dtype} {list(message.q.shape)} for the KV heads {message.heads} of part "
                f"{message.handle}; allowed is one of {list(shape)} for heads of {heads}, {sampled_heads} among them"
            )
        if len(positions) > row.prompt or (np.diff(positions) <= 0).any() or (positions >= row.prompt).any():
            raise ProtocolError(
                f"a sample of {len(positions)} positions for part {message.handle}; allowed are ascending ones below "
                f"{row.prompt}"
            )
        if not sampled_heads:
            return
        numbers = torch.tensor([message.heads.index(head) for head in sampled_heads])
        q = message.q.view(len(positions), len(message.heads), spec.group, -1)[:, numbers].bfloat16()
        batch.waiting.setdefault(layer, {})[row.handle] = Picked(of_row, sampled_heads, positions, of_row.stride, q)
        if stored:
            self.stored(batch, layer)

    def stored(self, batch: BatchSamples, layer: int) -> None:
        """The batch's keys of a layer are stored: keep and show the queries that have waited for them."""
        for picked in batch.waiting.pop(layer, {}).values():
            self._keep(layer, picked)

    def _keep(self, layer: int, picked: Picked) -> None:
        (row, part, stride, _), heads = picked.row, picked.heads
        skip = int(np.searchsorted(picked.positions, part.lo))
        positions, q = picked.positions[skip:] - part.lo, picked.q[skip:]
        sampled = self._samples.add(row.handle, layer, heads, positions, q)
        if self._choosers is not None and sampled < len(positions):
            self._choosers.show(
                row, part, layer, self._config.layers[layer], heads, stride, positions[sampled:], q[sampled:]
            )

    def fetch(self, layer: int, message: FetchSample) -> FetchedSample:
        """Raises KVError where there is no such part."""
        part = self._store.part(message.handle)
        hi = message.hi - part.lo if message.hi < part.hi else 1 << 62
        heads, positions, q = self._samples.between(message.handle, layer, message.lo - part.lo, hi)
        ids = message.epoch, message.batch, message.layer
        if not len(positions):
            return FetchedSample(*ids, (), (), _NOTHING)
        return FetchedSample(*ids, heads, tuple((positions + part.lo).tolist()), q.flatten(0, 2))


def _sampled_heads(layer: int, row: Row, part: KvPart) -> tuple[int, ...]:
    """The KV heads of a part whose policies learn from the queries of a row's prompt, in a layer."""
    policies = part.policies.reads[layer]
    return tuple(head for head in part.heads if policies[head].sampled(0, row.prompt))


def sampled_positions(row: Row, stride: int) -> Positions:
    """The multiples of `stride` among a row's positions, int64."""
    return np.arange(-(-row.start // stride) * stride, row.start + row.count, stride)
