"""A model and holders made of dense tensors: queries, keys and values at random, attention by its definition."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from lamina_protocols.channels.versions import FEATURES
from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import (
    Announced,
    Announcement,
    Attended,
    Exchange,
    Fresh,
    Query,
    Reply,
    Request,
    Row,
)
from lamina_protocols.messages.routes import Route, Span
from lamina_workers.decoder.model import KeyValueReady, QueryReady
from lamina_workers.ports.port import LocalAttention

LAYERS, HEADS, KV_HEADS, D = 2, 6, 2, 16
GROUP, SCALE = HEADS // KV_HEADS, 0.25
CONFIG = HolderConfig(
    tuple(LayerSpec(layer, HEADS, KV_HEADS, D, D, SCALE) for layer in range(LAYERS)), 16, "float32", 1 << 20
)
BOTH = tuple(range(KV_HEADS))


class Model:
    """Sequences of random vectors: `spans` of them are the batch, the tokens before are in the past.

    q `[layers, T, heads, D]`, k and v `[layers, tokens, kv_heads, D]` of each sequence, the past included; with
    `sinks`, each layer and head has an attention sink.
    """

    def __init__(self, spans: Sequence[Span], seed: int = 1, sinks: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.spans = list(spans)
        self.q = torch.randn(LAYERS, sum(span.count for span in spans), HEADS, D, generator=draw)
        lengths = [span.start + span.count for span in spans]
        self.k, self.v = ([torch.randn(LAYERS, n, KV_HEADS, D, generator=draw) for n in lengths] for _ in range(2))
        self.sinks = torch.randn(LAYERS, HEADS, generator=draw) * 2 + 2 if sinks else None

    def forward(
        self, query_first: bool = False
    ) -> Generator[QueryReady | KeyValueReady, torch.Tensor | None, torch.Tensor]:
        """What a decoder yields, `query_first` with q early. Returns the attention of all layers, `[layers, T, heads *
        D]`."""
        attended = []
        for layer in range(LAYERS):
            yield QueryReady(layer, self.q[layer], query_first)
            k, v = (
                torch.cat([x[layer, span.start :] for x, span in zip(of, self.spans, strict=True)])
                for of in (self.k, self.v)
            )
            answer = yield KeyValueReady(layer, k, v, sinks=None if self.sinks is None else self.sinks[layer])
            assert answer is not None
            attended.append(answer.clone())  # it may be written over by the next layer's
        return torch.stack(attended)

    def dense(self) -> torch.Tensor:
        """The same by the definition."""
        first, parts = 0, []
        for source, span in enumerate(self.spans):
            q = self.q[:, first : first + span.count]
            out = []
            for layer in range(LAYERS):
                k, v, read = self.k[source][layer], self.v[source][layer], (0, span.start + span.count)
                sinks = None if self.sinks is None else self.sinks[layer]
                out.append(attend(q[layer], k, v, span.start, read, sinks)[0])
            parts.append(torch.stack(out))
            first += span.count
        return torch.cat(parts, 1).flatten(2)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    read: tuple[int, int],
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of q `[n, heads, D]` at positions from `start` on over keys [lo, hi), and `sinks` `[heads]`
    beside them: out and lse."""
    keys = torch.arange(*read)
    seen = keys <= start + torch.arange(len(q))[:, None]
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("nhd,khd->nhk", q, k[keys].repeat_interleave(group, 1)) * SCALE
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks[None, :, None].expand(len(q), -1, 1)), -1)
    weights = logits.softmax(-1)[:, :, : len(keys)]
    out = torch.einsum("nhk,khd->nhd", weights, v[keys].repeat_interleave(group, 1))
    return out, logits.logsumexp(-1)


class Holder:
    """A port: the holder behind it has the past of its own heads, and anything else only once it was stored."""

    page_layout = ""
    features = FEATURES

    def __init__(self, model: Model, routes: Sequence[Route], name: str = "a", seconds: float = 0.0) -> None:
        self.name = name
        self.routes = list(routes)
        self.seconds = seconds
        self.sent: list[Request] = []
        self.replies: deque[Reply] = deque()
        self.silent = False  # answers are kept back
        self.closed = False
        self.bend: Callable[[Any], Reply] = lambda reply: reply  # what it answers in place of the reply
        self._k, self._v = ([self._past(model, x, source) for source, x in enumerate(of)] for of in (model.k, model.v))

    def _past(self, model: Model, x: torch.Tensor, source: int) -> torch.Tensor:
        kept, start = torch.full_like(x, torch.nan), model.spans[source].start
        for route in self.routes:
            if route.source == source:
                kept[:, :start, list(route.heads)] = x[:, :start, list(route.heads)]
        return kept

    def send(self, request: Request) -> None:
        self.sent.append(request)
        if isinstance(request, Announcement):
            floors = (0,) * len(request.rows)
            self.replies.append(self.bend(Announced(request.epoch, request.batch, True, (10,), floors)))
        fused = any(route.row.fused for route in self.routes)
        if isinstance(request, Fresh) or (isinstance(request, Exchange) and fused):
            self._store(request)
        if isinstance(request, Query | Exchange):
            self.replies.append(self.bend(self._attend(request)))
        if isinstance(request, Exchange) and not fused:
            self._store(request)

    def receive(self, timeout: float | None = None) -> Reply:
        return self.replies.popleft()

    def ready(self) -> bool:
        return bool(self.replies) and not self.silent

    def close(self) -> None:
        self.closed = True

    def _attend(self, request: Query | Exchange) -> Attended:
        outs, lses, first = [], [], 0
        for route in self.routes:
            row, heads = route.row, list(route.heads)
            if row.read is None:
                continue
            n = row.count * len(heads) * GROUP
            q = request.q[first : first + n].view(row.count, -1, D)
            k, v = (x[route.source][request.layer][:, heads] for x in (self._k, self._v))
            out, lse = attend(q, k, v, row.start, row.read)
            outs.append(out.reshape(-1, D))
            lses.append(lse.reshape(-1))
            first += n
        assert first == len(request.q)
        return Attended(request.epoch, request.batch, request.layer, torch.cat(outs), torch.cat(lses), self.seconds)

    def _store(self, request: Fresh | Exchange) -> None:
        first = 0
        for route in self.routes:
            (lo, hi), heads = route.stored, list(route.heads)
            n = max(hi - lo, 0) * len(heads)
            for new, kept in ((request.k, self._k), (request.v, self._v)):
                kept[route.source][request.layer, lo:hi, heads] = new[first : first + n].view(-1, len(heads), D)
            first += n
        assert first == len(request.k) == len(request.v)

    def holds(self, model: Model) -> bool:
        """Whether the tokens of the batch that its rows store are there as the model computed them."""
        return all(
            torch.equal(kept[route.source][:, slice(*route.stored), list(route.heads)],
                        of[route.source][:, slice(*route.stored), list(route.heads)])
            for route in self.routes for kept, of in ((self._k, model.k), (self._v, model.v))
        )  # fmt: skip


class HolderHere(Holder, LocalAttention):
    """A holder in the model worker's process, whose layers no compiled code computes."""

    device = torch.device("cpu")  # type: ignore[assignment]
    closed = False  # type: ignore[assignment]

    def works(self, batch: int) -> Sequence[None]:
        return ()


def route(
    source: int, span: Span, heads: Sequence[int] = BOTH, read: tuple[int, int] | None = None, stores: bool = True
) -> Route:
    """A row of that span, which stores all of its tokens or none."""
    end = span.start + span.count
    row = Row(source, span.start, span.count, read, stores)
    return Route(source, tuple(heads), row, (span.start, end) if stores else (0, 0))
