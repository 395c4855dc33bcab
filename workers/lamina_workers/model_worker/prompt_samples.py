"""The samples of prompts' queries that holders want which do not read them: sent with a batch, or moved with KV."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch

from lamina_protocols.messages.layers import LayerSpec
from lamina_protocols.messages.messages import FetchedSample, Sample
from lamina_protocols.messages.routes import Route
from lamina_workers.attention_worker.prompt_queries import sampled_positions
from lamina_workers.devices.staging import Staging
from lamina_workers.model_worker.holder_traffic import index_of
from lamina_workers.ports.port import Replies


class SampleTraffic:
    """The samples of a batch for one holder, of all heads of a part; the holder keeps those that its policies learn
    from. `first` has each span's first token in the batch."""

    def __init__(self, replies: Replies, way: Staging, routes: Sequence[Route], first: Sequence[int]) -> None:
        self._port = replies.port
        self._way = way
        self._sampled = [(route, first[route.source]) for route in routes if route.sampled]
        self._indices: dict[Route, torch.Tensor | None] = {}

    def __bool__(self) -> bool:
        return bool(self._sampled)

    def send(self, epoch: int, batch: int, layer: int, spec: LayerSpec, q: torch.Tensor) -> None:
        """Send the samples of a layer. q: `[T, heads, d_k]` of the batch."""
        for route, token in self._sampled:
            row, heads = route.row, route.heads
            positions = sampled_positions(row, route.sampled)
            if not len(positions):
                continue
            if route not in self._indices:
                query_heads = (np.array(heads)[:, None] * spec.group + np.arange(spec.group)).reshape(-1)
                tokens = (token + positions - row.start)[:, None]
                picked = index_of([(tokens * spec.heads + query_heads).reshape(-1)], len(q) * spec.heads)
                self._indices[route] = self._way.index(picked)
            queries = self._way.down(q, self._indices[route])
            self._way.landed()
            self._port.send(
                Sample(epoch, batch, layer, row.handle, heads, tuple(positions.tolist()), queries.to(torch.bfloat16))
            )


def check_sample(replies: Replies, reply: FetchedSample, spec: LayerSpec, prompt: int) -> None:
    """Raise HolderLost unless a holder's answer can be a sample of a layer, of a prompt of that many tokens."""
    positions = np.array((*reply.positions, prompt), np.int64)
    vectors = len(reply.positions) * len(reply.heads) * spec.group
    shape = (vectors, spec.query_width) if vectors else (0, 0)
    if reply.q.dtype != torch.bfloat16 or tuple(reply.q.shape) != shape or (np.diff(positions) <= 0).any():
        raise replies.unfit(
            f"a sample of {len(reply.positions)} positions and {len(reply.heads)} KV heads came as {reply.q.dtype} "
            f"{list(reply.q.shape)}"
        )


def moved_sample(
    ids: tuple[int, int, int], route: Route, spec: LayerSpec, arrived: Sequence[FetchedSample]
) -> Sample | None:
    """What the part of a route gets, of the samples of the parts that it is made of: of the positions that all of these
    have. None where that is nothing. ids: epoch, batch and layer."""
    positions = reduce(np.intersect1d, [np.array(sample.positions, np.int64) for sample in arrived])
    of_head: dict[int, torch.Tensor] = {}
    for sample in arrived:
        indices = torch.from_numpy(np.searchsorted(np.array(sample.positions, np.int64), positions))
        by_head = sample.q.view(-1, len(sample.heads), spec.group, spec.query_width) if sample.heads else sample.q
        of_head |= {head: by_head[indices, number] for number, head in enumerate(sample.heads)}
    heads = tuple(head for head in route.heads if head in of_head)
    if not len(positions) or not heads:
        return None
    q = torch.stack([of_head[head] for head in heads], 1).flatten(0, 2)
    return Sample(*ids, route.row.handle, heads, tuple(positions.tolist()), q)
