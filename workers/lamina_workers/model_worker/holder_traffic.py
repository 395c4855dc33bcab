"""The messages of a batch between the model and one holder: which vectors go there, and where the answers belong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.partial import Partial
from lamina_protocols.messages import Attended, Exchange, Fresh, LayerSpec, Query
from lamina_protocols.routes import Route, Span
from lamina_workers.decoder.model import KeyValueReady
from lamina_workers.devices.staging import DIRECT, Staging
from lamina_workers.ports.port import InProcess, Replies

SLOWEST = 1e8  # multiplications and additions a second of attention that any holder is trusted to do


@dataclass(frozen=True, slots=True)
class HolderTraffic:
    """The messages of a batch to and from one holder, the same in every layer.

    `way` copies tensors to the holder and back. `here`: it is in this process. `fused`: it attends tokens of the batch
    itself, so it needs k and v before its queries can be answered. `queries` and `fresh` are indices into the flat q
    and k, None for all in order. A holder with several parts of one sequence answers some vectors more than once:
    `rounds` cuts the answer so that no vector is twice in a piece. `timeout`: seconds after which a holder that has not
    answered is gone.
    """

    replies: Replies
    way: Staging
    here: bool
    reads: bool
    stores: bool
    fused: bool
    queries: torch.Tensor | None
    rounds: tuple[slice, ...]
    fresh: torch.Tensor | None
    timeout: float

    def pieces(self, past: Partial) -> Iterator[tuple[Partial, torch.Tensor | None]]:
        """The answer in pieces, each with the indices of its vectors, which are all different."""
        if len(self.rounds) == 1 or self.queries is None:
            yield past, self.queries
            return
        for at in self.rounds:
            yield Partial(past.out[at], past.lse[at]), self.queries[at]

    def send_query(self, epoch: int, batch: int, layer: int, q: torch.Tensor) -> None:
        some = self.way.down(q, self.queries)
        self.way.landed()
        self.replies.asked(batch)
        self.replies.port.send(Query(epoch, batch, layer, some))

    def send_fresh(self, epoch: int, batch: int, layer: int, kv: KeyValueReady) -> None:
        k, v = self.way.down(kv.k, self.fresh), self.way.down(kv.v, self.fresh)
        self.way.landed()
        self.replies.port.send(Fresh(epoch, batch, layer, k, v))

    def send_both(self, epoch: int, batch: int, layer: int, q: torch.Tensor, kv: KeyValueReady) -> None:
        k, v = self.way.down(kv.k, self.fresh), self.way.down(kv.v, self.fresh)
        some = self.way.down(q, self.queries)
        self.way.landed()
        self.replies.asked(batch)
        self.replies.port.send(Exchange(epoch, batch, layer, some, k, v))

    def take(self, batch: int, layer: int) -> tuple[Partial, float]:
        """The answer, where the model is, and how many seconds the holder took for it."""
        reply = self.replies.take(Attended, batch, layer, self.timeout)
        return Partial(self.way.up(reply.out), self.way.up(reply.lse)), reply.seconds


def holder_traffic(
    spec: LayerSpec,
    staging: Staging,
    direct: bool,
    patience: float,
    replies: Replies,
    spans: Sequence[Span],
    routes: Sequence[Route],
) -> HolderTraffic:
    """The traffic of a batch of `spans` with the holder of `routes`.

    spec: of any layer, since shapes are alike; direct: the holder is on the model's device, so nothing is copied;
    patience: seconds that an answer may take above its expected time.
    """
    first = np.cumsum([0, *(span.count for span in spans)])
    queries, fresh, pairs = [], [], 0
    cuts, asked, in_round = [0], 0, set[int]()
    for route in routes:
        start, source, row = spans[route.source].start, int(first[route.source]), route.row
        if row.read is not None:
            if route.source in in_round:
                cuts.append(asked)
                in_round.clear()
            in_round.add(route.source)
            asked += row.count * len(route.heads) * spec.group
            heads = np.concatenate([np.arange(h * spec.group, (h + 1) * spec.group) for h in route.heads])
            queries.append(vectors_of(source, source + row.count, heads, spec.heads))
            pairs += (row.read[1] - row.read[0]) * len(heads) * row.count
        lo, hi = route.stored
        if lo < hi:
            heads = np.array(route.heads)
            fresh.append(vectors_of(source + lo - start, source + hi - start, heads, spec.kv_heads))
    tokens = int(first[-1])
    return HolderTraffic(
        replies=replies,
        way=DIRECT if direct else staging,
        here=isinstance(replies.port, InProcess),
        reads=bool(queries),
        stores=bool(fresh),
        fused=any(route.row.fused for route in routes),
        queries=staging.index(index_of(queries, tokens * spec.heads)),
        rounds=tuple(slice(lo, hi) for lo, hi in pairwise([*cuts, asked])),
        fresh=staging.index(index_of(fresh, tokens * spec.kv_heads)),
        timeout=patience + pairs * (spec.d_k + spec.d_v) / SLOWEST,
    )


def vectors_of(first: int, end: int, heads: npt.NDArray[np.int64], of: int) -> npt.NDArray[np.int64]:
    """Indices of the vectors of tokens [first, end) and these heads in a flat `[tokens * of, d]`, token-major."""
    return (np.arange(first, end)[:, None] * of + heads).reshape(-1)


def index_of(parts: list[npt.NDArray[np.int64]], total: int) -> torch.Tensor | None:
    """The whole index, or None where it would pick all `total` vectors in order."""
    index = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(index) == total and (index == np.arange(total)).all():
        return None
    return torch.from_numpy(index)
