"""Between the model and the holders: q, k, v of a layer in, attention output out.

The model worker computes the *present* (a batch's own tokens, causal inside each row), holders compute the *past*
(keys below a row's start), and the partials merge. A holder in this process may be asked to fuse the two. Knows the
messages and the ports; knows nothing of the decoder's weights, of scheduling, or of what a holder does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.pages import Pages, Rows
from lamina_kernels.partial import Partial, empty, merge
from lamina_kernels.select import kernels
from lamina_protocols.messages import Attended, Fresh, HolderConfig, LayerSpec, Query, Row
from lamina_workers.attention_port import AttentionPort, receive
from lamina_workers.errors import HolderFault
from lamina_workers.layout import page_layout
from lamina_workers.model import Forward, KeyValueReady, QueryReady


@dataclass(frozen=True, slots=True)
class Route:
    """A row of one holder: `row` concerns the batch's span number `source`, its KV heads `heads`, and stores
    the positions `stored` of it."""

    source: int
    heads: tuple[int, ...]
    row: Row
    stored: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Span:
    """`count` tokens of one sequence in the batch, at positions `start` ...; spans follow each other in the batch."""

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class _Exchange:
    """Which vectors of a layer go to one holder: indices into the flat q and k, None for all in order."""

    port: AttentionPort
    reads: bool
    stores: bool
    fused: bool
    queries: torch.Tensor | None
    fresh: torch.Tensor | None


class Resolver:
    """Answers a forward pass. One thread, one batch at a time."""

    def __init__(self, config: HolderConfig, ports: Sequence[AttentionPort], threads: int = 1) -> None:
        self._layers = config.layers
        self._ports = tuple(ports)
        self._present = _Present(config, threads)

    def run(
        self, forward: Forward, epoch: int, batch: int, spans: Sequence[Span], routes: Sequence[Sequence[Route]]
    ) -> torch.Tensor:
        """Drive `forward` to its end and return what it returns. `routes` holds one list per port.

        Raises HolderFault where a holder answers with a fault; the batch can then run again from the start.
        """
        spec = self._layers[0]
        exchanges = [
            _exchange(port, spec, spans, routed) for port, routed in zip(self._ports, routes, strict=True) if routed
        ]
        if not all(exchange.fused for exchange in exchanges):
            self._present.begin(spans)
        try:
            event = next(forward)
            while True:
                if not isinstance(event, QueryReady):
                    raise TypeError(f"the model yields QueryReady first in each layer, got {type(event).__name__}")
                layer, q = event.layer, event.q
                for exchange in exchanges:
                    if not exchange.fused:  # the past can be attended while k and v are still being computed
                        _send_query(exchange, epoch, batch, layer, q)
                event = forward.send(None)
                if not isinstance(event, KeyValueReady):
                    raise TypeError(f"the model yields KeyValueReady after QueryReady, got {type(event).__name__}")
                attended = self._attend(exchanges, epoch, batch, layer, q, event)
                event = forward.send(attended)
        except StopIteration as stop:
            logits: torch.Tensor = stop.value
            return logits

    def _attend(
        self, exchanges: Sequence[_Exchange], epoch: int, batch: int, layer: int, q: torch.Tensor, kv: KeyValueReady
    ) -> torch.Tensor:
        """[T, heads * d_v]: the present merged with every holder's partial."""
        spec = self._layers[layer]
        for exchange in exchanges:
            if exchange.stores:
                k, v = _pick(kv.k, exchange.fresh), _pick(kv.v, exchange.fresh)
                exchange.port.send(Fresh(epoch, batch, layer, k, v))
            if exchange.fused:
                _send_query(exchange, epoch, batch, layer, q)
        partial: Partial | None = None
        if not all(exchange.fused for exchange in exchanges):
            partial = self._present.attend(spec, q, kv.k, kv.v)
        for exchange in exchanges:
            if exchange.reads:
                reply = receive(exchange.port, Attended, epoch, batch, layer)
                past = Partial(reply.out, reply.lse)
                partial = _merged(partial, past, exchange.queries, len(q) * spec.heads)
        if partial is None:
            raise HolderFault(f"nobody attends layer {layer}: no holder fuses and no present was computed")
        return partial.out.view(len(q), -1).to(q.device)


def _send_query(exchange: _Exchange, epoch: int, batch: int, layer: int, q: torch.Tensor) -> None:
    if exchange.reads:
        exchange.port.send(Query(epoch, batch, layer, _pick(q, exchange.queries)))


def _merged(partial: Partial | None, past: Partial, index: torch.Tensor | None, total: int) -> Partial:
    """`past` merged into `partial`, whose `total` vectors it covers whole, or at `index` only."""
    if index is None:
        return past if partial is None else merge((partial, past))
    whole = partial or empty(total, past.out.shape[-1], past.out.dtype, past.out.device)
    whole.out[index], whole.lse[index] = merge((Partial(whole.out[index], whole.lse[index]), past))
    return whole


def _exchange(port: AttentionPort, spec: LayerSpec, spans: Sequence[Span], routes: Sequence[Route]) -> _Exchange:
    first = np.cumsum([0, *(span.count for span in spans)])
    queries, fresh = [], []
    for route in routes:
        start, source, row = spans[route.source].start, int(first[route.source]), route.row
        if row.read is not None:
            heads = np.concatenate([np.arange(h * spec.group, (h + 1) * spec.group) for h in route.heads])
            queries.append(_vectors(source, source + row.count, heads, spec.heads))
        lo, hi = route.stored
        if lo < hi:
            heads = np.array(route.heads)
            fresh.append(_vectors(source + lo - start, source + hi - start, heads, spec.kv_heads))
    tokens = int(first[-1])
    return _Exchange(
        port=port,
        reads=bool(queries),
        stores=bool(fresh),
        fused=any(route.row.fused for route in routes),
        queries=_index(queries, tokens * spec.heads),
        fresh=_index(fresh, tokens * spec.kv_heads),
    )


def _vectors(first: int, end: int, heads: npt.NDArray[np.int64], of: int) -> npt.NDArray[np.int64]:
    """Indices of the vectors of tokens [first, end) and these heads in a flat `[tokens * of, d]`, token-major."""
    return (np.arange(first, end)[:, None] * of + heads).reshape(-1)


def _index(parts: list[npt.NDArray[np.int64]], total: int) -> torch.Tensor | None:
    """The whole index, or None where it would pick all `total` vectors in order."""
    index = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(index) == total and (index == np.arange(total)).all():
        return None
    return torch.from_numpy(index)


def _pick(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Vectors of x `[T, heads, d]` as flat `[n, d]`, where the kernels and the transports are: on the CPU."""
    flat = x.cpu().view(-1, x.shape[-1])
    return flat if index is None else flat[index]


class _Present:
    """Attention of a batch's own tokens, causal inside each span, over pages that live for one layer.

    They have the holders' layout, so k and v are rounded to the cache's dtype here as they are there.
    """

    def __init__(self, config: HolderConfig, threads: int) -> None:
        self._layers = config.layers
        self._threads = threads
        self._kernels = kernels(torch.device("cpu"))
        self._pages = Pages.allocate(page_layout(config), 1)
        self._slots: Any = None
        self._plans: dict[int | None, Any] = {}

    def begin(self, spans: Sequence[Span]) -> None:
        """Lay out the pages of a batch and plan its attention, once for all layers."""
        spec, size = self._layers[0], self._pages.layout.page_size
        tables, slots, used = [], [], 0
        for span in spans:
            pages = -(-span.count // size)
            table = np.arange(used, used + spec.kv_heads * pages, dtype=np.int32).reshape(1, spec.kv_heads, pages)
            page, offset = np.divmod(np.arange(span.count), size)
            slots.append((table[0, :, page].astype(np.int64) * size + offset[:, None]).reshape(-1))
            tables.append(table)
            used += table.size
        if used > self._pages.n_pages:
            self._pages = Pages.allocate(self._pages.layout, used)
        self._slots = self._kernels.plan_append(self._pages, torch.from_numpy(np.concatenate(slots)[None]))
        starts, counts = (np.array([getattr(span, name) for span in spans]) for name in ("start", "count"))
        vectors = counts * spec.heads
        heads, group = np.full(len(spans), spec.kv_heads), np.full(len(spans), spec.group)
        rows = Rows(np.cumsum(vectors) - vectors, counts, starts, heads, group, starts, starts + counts, starts, tables)
        self._plans = {
            window: self._kernels.plan(self._pages, rows, window, self._threads)
            for window in {layer.window for layer in self._layers}
        }

    def attend(self, spec: LayerSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Partial:
        """q `[T, heads, d_k]`, k `[T, kv_heads, d_k]`, v `[T, kv_heads, d_v]` of one layer, all spans."""
        self._kernels.append(self._pages, self._slots, 0, _pick(k, None), _pick(v, None))
        return self._kernels.attend(self._pages, self._plans[spec.window], 0, _pick(q, None), spec.scale, spec.soft_cap)
