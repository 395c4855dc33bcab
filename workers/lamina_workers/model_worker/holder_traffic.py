"""The messages of a batch between the model and one holder: which vectors go there, and where the answers belong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.partial import Partial
from lamina_protocols.messages.layers import LayerSpec
from lamina_protocols.messages.messages import Attended, Exchange, Fresh, Query
from lamina_protocols.messages.routes import Route, Span
from lamina_workers.decoder.model import KeyValueReady
from lamina_workers.devices.staging import DIRECT, Staging
from lamina_workers.ports.port import Replies

_SLOWEST = 1e8  # multiplications and additions a second of attention that any holder is trusted to do


@dataclass(frozen=True, slots=True)
class HolderTraffic:
    """The messages of a batch to and from one holder, the same in every layer of a pool.

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
        for piece in self.rounds:
            yield Partial(past.out[piece], past.lse[piece]), self.queries[piece]

    def send_query(self, epoch: int, batch: int, layer: int, q: torch.Tensor) -> None:
        part = self.way.down(q, self.queries)
        self.way.landed()
        self.replies.asked(batch)
        self.replies.port.send(Query(epoch, batch, layer, part))

    def send_fresh(self, epoch: int, batch: int, layer: int, kv: KeyValueReady) -> None:
        k, v = self.way.down(kv.k, self.fresh), self.way.down(kv.v, self.fresh)
        self.way.landed()
        self.replies.port.send(Fresh(epoch, batch, layer, k, v))

    def send_both(self, epoch: int, batch: int, layer: int, q: torch.Tensor, kv: KeyValueReady) -> None:
        k, v = self.way.down(kv.k, self.fresh), self.way.down(kv.v, self.fresh)
        part = self.way.down(q, self.queries)
        self.way.landed()
        self.replies.asked(batch)
        self.replies.port.send(Exchange(epoch, batch, layer, part, k, v))

    def take(self, batch: int, layer: int) -> tuple[Partial, float]:
        """The answer, where the model is, and how many seconds the holder took for it."""
        reply = self.replies.take(Attended, batch, layer, self.timeout)
        return Partial(self.way.up(reply.out), self.way.up(reply.lse)), reply.seconds


def query_goes_first(routes: Mapping[Replies, Sequence[Route]], spans: int) -> bool:
    """Whether q should leave before k and v are computed, in a batch of so many spans: a holder elsewhere attends none
    but earlier tokens, of a batch whose own tokens are not all attended by holders."""
    alone = (
        any(route.row.read for route in routed) and not any(route.row.fused for route in routed)
        for replies, routed in routes.items()
        if replies.here is None
    )
    if not any(alone):
        return False
    return len({route.source for routed in routes.values() for route in routed if route.row.fused}) < spans


def holder_traffic(
    spec: LayerSpec,
    staging: Staging,
    direct: bool,
    patience: float,
    replies: Replies,
    spans: Sequence[Span],
    routes: Sequence[Route],
) -> HolderTraffic:
    """The traffic of a batch of `spans` with the holder of `routes`, in the layers of their pool.

    spec: of any layer of the pool; direct: the holder is on the model's device, so nothing is copied;
    patience: seconds that an answer may take above its expected time.
    """
    first = list(accumulate((span.count for span in spans), initial=0))
    parts = []
    for route in routes:
        row, (lo, hi), token = route.row, route.stored, first[route.source]
        reads = 0
        if row.read is not None:
            reads = row.count
        begin, end = (lo + token - row.start, hi + token - row.start) if lo < hi else (0, 0)
        parts.append((token, reads, begin, end, route.heads))
    queries, rounds, fresh = _vectors(tuple(parts), first[-1], spec.heads, spec.kv_heads)
    return HolderTraffic(
        replies=replies,
        way=DIRECT if direct else staging,
        here=replies.here is not None,
        reads=rounds[-1].stop > 0,
        stores=any(end for _, _, _, end, _ in parts),
        fused=any(route.row.fused for route in routes),
        queries=staging.index(queries),
        rounds=rounds,
        fresh=staging.index(fresh),
        timeout=patience + slowest_seconds(spec, routes),
    )


def slowest_seconds(spec: LayerSpec, routes: Iterable[Route]) -> float:
    """How long a holder may attend these rows, in a layer of their pool, of which `spec` is any."""
    reads = ((route.row, len(route.heads)) for route in routes)
    pairs = sum((row.read[1] - row.read[0]) * row.count * heads for row, heads in reads if row.read is not None)
    return pairs * spec.group * (spec.d_k + spec.d_v) / _SLOWEST


def check_answer(replies: Replies, out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise HolderLost unless a holder's answer has the vectors that are due."""
    if out.shape != shape or out.dtype != dtype:
        raise replies.unfit(f"answers of {out.dtype} {list(out.shape)}, {dtype} {list(shape)} were due")


@lru_cache(maxsize=128)  # in decode batches ask for the same again and again
def _vectors(
    parts: tuple[tuple[int, int, int, int, tuple[int, ...]], ...], tokens: int, heads: int, kv_heads: int
) -> tuple[torch.Tensor | None, tuple[slice, ...], torch.Tensor | None]:
    """The indices `queries`, the slices `rounds` and the indices `fresh` of a `HolderTraffic`, for a batch of `tokens`.

    Each part is a route: its first token in the batch, of how many tokens there are queries, the tokens [lo, hi) of the
    batch that it stores, and its KV heads."""
    queries, fresh, cuts, n_vectors, in_round, group = [], [], [0], 0, set[int](), heads // kv_heads
    for first, reads, lo, hi, part_heads in parts:
        kv = np.array(part_heads)
        if reads:
            if first in in_round:
                cuts.append(n_vectors)
                in_round.clear()
            in_round.add(first)
            n_vectors += reads * len(part_heads) * group
            queries.append(
                vectors_of(first, first + reads, (kv[:, None] * group + np.arange(group)).reshape(-1), heads)
            )
        if lo < hi:
            fresh.append(vectors_of(lo, hi, kv, kv_heads))
    rounds = tuple(slice(lo, hi) for lo, hi in pairwise([*cuts, n_vectors]))
    return index_of(queries, tokens * heads), rounds, index_of(fresh, tokens * kv_heads)


def vectors_of(first: int, end: int, heads: npt.NDArray[np.int64], of: int) -> npt.NDArray[np.int64]:
    """Indices of the vectors of tokens [first, end) and these heads in a flat `[tokens * of, d]`, token-major."""
    return (np.arange(first, end)[:, None] * of + heads).reshape(-1)


def index_of(parts: list[npt.NDArray[np.int64]], total: int) -> torch.Tensor | None:
    """The whole index, or None where it would pick all `total` vectors in order."""
    index = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(index) == total and (index == np.arange(total)).all():
        return None
    return torch.from_numpy(index)
