"""Between the model and the holders: q, k, v of a layer in, attention output out.

The model worker computes the *present* (a batch's own tokens, causal inside each row), holders compute the *past*
(keys below a row's start), and the partials merge. A holder in this process may be asked to fuse the two. Where a
reply is not there yet the run is suspended, so that one thread can drive several. Knows the messages and the ports;
knows nothing of the decoder's weights, of scheduling, or of what a holder does.

Present and merging are where the model is: q, k and v lie there, a prompt's chunk is work for the device that computes
fastest, and whoever merges, one tensor must cross back. Only what a holder elsewhere is told or answers is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.pages import Pages
from lamina_kernels.partial import Partial, empty
from lamina_protocols.channels import Channel
from lamina_protocols.messages import Attended, Exchange, Fresh, HolderConfig, Query
from lamina_protocols.routes import Route, Span
from lamina_workers.attention_worker.head_policies import HeadPolicies, LayerPolicies
from lamina_workers.attention_worker.page_layout import CPU, attention_kernels, page_layout
from lamina_workers.attention_worker.row_builder import Asked, RowBuilder
from lamina_workers.decoder.model import Forward, KeyValueReady, QueryReady
from lamina_workers.devices.staging import DIRECT, Staging, staging_for
from lamina_workers.errors import HolderFault
from lamina_workers.ports.port import InProcess, Replies
from lamina_workers.ports.timing import Stopwatch, Times

R = TypeVar("R")


class Replying(Protocol):
    """Who replies to batches: a port's `Replies`, a process that computes for this one, or who feeds a run."""

    @property
    def channel(self) -> Channel | None:
        """What replies come over; None where they come from this process."""

    def ready(self, batch: int) -> bool:
        """Whether something has come for that batch, or never will."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a run is suspended: a reply of `replies` to `batch` is not there yet. It may be resumed anyway, and waits."""

    replies: Replying
    batch: int

    def over(self) -> bool:
        """Whether the run would go on at once."""
        return self.replies.ready(self.batch)


def result(run: Generator[Waiting, None, R]) -> R:
    """What a run returns, each of its waits waited out."""
    try:
        while True:
            next(run)
    except StopIteration as stop:
        returned: R = stop.value
        return returned


Suspended = Generator[Waiting, None, torch.Tensor]
Pausing = Generator[QueryReady | KeyValueReady | Waiting, torch.Tensor | None, torch.Tensor]
"""A forward pass that may itself wait before a layer: for what enters it, and comes from elsewhere."""


@dataclass(frozen=True, slots=True)
class _HolderTraffic:
    """What a layer of a batch exchanges with one holder, by which `way`. `queries` and `fresh` are indices into the
    flat q and k, None for all in order. Where it has several parts of one sequence a vector is asked, and answered,
    more than once: `rounds` cuts the answer so that no vector is twice in a piece. `timeout`: seconds after which a
    missing answer means that the holder is gone."""

    replies: Replies
    way: Staging
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


class _Lane(NamedTuple):
    """What one run at a time works with."""

    present: _FreshAttention
    staging: Staging


class AttentionMerge:
    """Answers forward passes. One thread; each batch has a run of its own, on a stream of its own where there are any.

    `device` is the model's; `staging` makes the way from it to holders elsewhere, for one run more.
    `early_query`: the model computes q before k and v, so q is sent alone and the past is attended meanwhile.
    `patience`: seconds that a holder may take for an answer, above what its work is expected to take. `watch` runs
    while a run is in the attention of a layer and not suspended.
    """

    def __init__(
        self,
        config: HolderConfig,
        threads: int = 1,
        early_query: bool = False,
        patience: float = 10.0,
        watch: Stopwatch | None = None,
        device: torch.device = CPU,
        staging: Callable[[], Staging] | None = None,
    ) -> None:
        self._watch = watch or Stopwatch(time.perf_counter)
        self._config = config
        self._layers = config.layers
        self._policies = HeadPolicies.of(config)
        self._threads = threads
        self._early_query = early_query
        self._patience = patience
        self._device = device
        self._staging = staging or staging_for(device)
        self._kernels = attention_kernels(device)
        self._idle: list[_Lane] = []  # pages and buffers to use again
        self.times = Times()  # of the run that has ended last

    def run(
        self,
        forward: Forward | Pausing,
        epoch: int,
        batch: int,
        spans: Sequence[Span],
        routes: Mapping[Replies, Sequence[Route]],
        suspends: bool = True,
    ) -> Suspended:
        """Drive `forward` to its end and return what it returns. `routes` has those of each holder concerned.

        Without `suspends` it waits for replies itself: there is nothing else to go on with, and asking takes time.

        Raises HolderFault where a holder answers with a fault; the batch can then run again from the start. Closing
        the generator leaves replies behind, which whoever called must have forgotten.
        """
        lane = self._idle.pop() if self._idle else self._lane()
        try:
            logits = yield from lane.staging.driven(self._run(lane, forward, epoch, batch, spans, routes, suspends))
            return logits
        finally:
            self._idle.append(lane)

    def _lane(self) -> _Lane:
        return _Lane(_FreshAttention(self._config, self._policies, self._threads, self._device), self._staging())

    def _run(
        self,
        lane: _Lane,
        forward: Forward | Pausing,
        epoch: int,
        batch: int,
        spans: Sequence[Span],
        routes: Mapping[Replies, Sequence[Route]],
        suspends: bool,
    ) -> Suspended:
        present, staging = lane
        traffic = [self._traffic(staging, replies, spans, routed) for replies, routed in routes.items() if routed]
        # A holder that fuses attends while it is sent to: the others are asked first, and attend meanwhile.
        traffic.sort(key=lambda holder: holder.fused)
        times = Times()
        asked = 0.0
        fused = {route.source for routed in routes.values() for route in routed if route.row.fused}
        try:
            present.begin(spans, [source for source in range(len(spans)) if source not in fused])
            event = next(forward)
            while True:
                while isinstance(event, Waiting):
                    yield event
                    event = next(forward)
                staging.turn()
                if not isinstance(event, QueryReady):
                    raise TypeError(f"the model yields QueryReady first in each layer, got {type(event).__name__}")
                layer, q = event.layer, event.q
                if self._early_query:
                    asked = time.perf_counter()
                    for holder in traffic:
                        if holder.reads and not holder.fused:
                            holder.send_query(epoch, batch, layer, q)
                event = forward.send(None)
                if not isinstance(event, KeyValueReady):
                    raise TypeError(f"the model yields KeyValueReady after QueryReady, got {type(event).__name__}")
                self._watch.start()
                try:
                    attended = yield from self._attend(
                        traffic, present, epoch, batch, layer, q, event, suspends, times, asked
                    )
                finally:
                    self._watch.stop()
                event = forward.send(attended)
        except StopIteration as stop:
            self.times = times
            result: torch.Tensor = stop.value
            return result

    def _attend(
        self,
        traffic: Sequence[_HolderTraffic],
        present: _FreshAttention,
        epoch: int,
        batch: int,
        layer: int,
        q: torch.Tensor,
        kv: KeyValueReady,
        suspends: bool,
        times: Times,
        asked: float,
    ) -> Suspended:
        """[T, heads * d_v]: the present merged with every holder's partial. `asked`: when q was sent, 0: not yet."""
        spec = self._layers[layer]
        asked = asked or time.perf_counter()
        for holder in traffic:
            if holder.fused or self._early_query or not (holder.reads and holder.stores):
                if holder.stores:
                    holder.send_fresh(epoch, batch, layer, kv)
                if holder.reads and (holder.fused or not self._early_query):
                    holder.send_query(epoch, batch, layer, q)
            else:
                holder.send_both(epoch, batch, layer, q, kv)
        whole = present.attend(layer, q, kv.k, kv.v)
        slowest = answered = 0.0
        for holder in traffic:
            if not holder.reads:
                continue
            waits = time.perf_counter()
            if suspends and not holder.replies.ready(batch):
                self._watch.stop()
                yield Waiting(holder.replies, batch)
                self._watch.start()
            past, seconds = holder.take(batch, layer)
            if holder.fused:
                times.local += seconds
            else:
                now = time.perf_counter()
                times.waited += now - waits
                slowest, answered = max(slowest, seconds), now - asked
            if whole is None:
                if holder.queries is None and past.out.shape == (len(q) * spec.heads, spec.d_v):
                    whole = past
                    continue
                whole = empty(len(q) * spec.heads, spec.d_v, q.dtype, q.device)
            try:
                for piece, index in holder.pieces(past):
                    self._kernels.merge_into(whole, piece, index)
            except ValueError as error:
                raise HolderFault(f"{holder.replies.port.name}: {error}") from error
        if whole is None:
            raise HolderFault(f"nobody attends layer {layer}: no holder fuses and no present was computed")
        times.remote += slowest
        times.answered += answered
        return whole.out.view(len(q), -1)

    def _traffic(
        self, staging: Staging, replies: Replies, spans: Sequence[Span], routes: Sequence[Route]
    ) -> _HolderTraffic:
        spec = self._layers[0]
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
                queries.append(_vectors(source, source + row.count, heads, spec.heads))
                pairs += (row.read[1] - row.read[0]) * len(heads) * row.count
            lo, hi = route.stored
            if lo < hi:
                heads = np.array(route.heads)
                fresh.append(_vectors(source + lo - start, source + hi - start, heads, spec.kv_heads))
        tokens = int(first[-1])
        port = replies.port
        return _HolderTraffic(
            replies=replies,
            way=DIRECT if isinstance(port, InProcess) and port.device == self._device else staging,
            reads=bool(queries),
            stores=bool(fresh),
            fused=any(route.row.fused for route in routes),
            queries=staging.index(_index(queries, tokens * spec.heads)),
            rounds=tuple(slice(lo, hi) for lo, hi in pairwise([*cuts, asked])),
            fresh=staging.index(_index(fresh, tokens * spec.kv_heads)),
            timeout=self._patience + pairs * (spec.d_k + spec.d_v) / SLOWEST,
        )


_FEW_VECTORS = 4096  # query vectors of a batch's own tokens that one thread attends
SLOWEST = 1e8  # multiplications and additions a second of attention that any holder is trusted to do


def _vectors(first: int, end: int, heads: npt.NDArray[np.int64], of: int) -> npt.NDArray[np.int64]:
    """Indices of the vectors of tokens [first, end) and these heads in a flat `[tokens * of, d]`, token-major."""
    return (np.arange(first, end)[:, None] * of + heads).reshape(-1)


def _index(parts: list[npt.NDArray[np.int64]], total: int) -> torch.Tensor | None:
    """The whole index, or None where it would pick all `total` vectors in order."""
    index = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(index) == total and (index == np.arange(total)).all():
        return None
    return torch.from_numpy(index)


class _FreshAttention:
    """Attention of a batch's own tokens, causal inside each span, over pages that live for one layer.

    They have the holders' layout, so k and v are rounded to the cache's dtype here as they are there. Spans that a
    fused holder attends are left out.
    """

    def __init__(self, config: HolderConfig, policies: HeadPolicies, threads: int, device: torch.device) -> None:
        self._layers = config.layers
        self._threads = threads
        self._device = device
        self._kernels = attention_kernels(device)
        self._pages = Pages.allocate(page_layout(config, device), 1, device)
        self._slots: Any = None
        self._plans: dict[LayerPolicies, Any] = {}  # by the heads' policies; empty where no span was chosen
        self._policies = policies.reads
        self._queries: torch.Tensor | None = None  # which vectors of the flat q they are, None: all
        self._fresh: torch.Tensor | None = None  # and of the flat k and v
        self._tokens = 0

    def begin(self, spans: Sequence[Span], chosen: Sequence[int]) -> None:
        """Lay out the pages of the chosen spans of a batch and plan their attention, once for all layers."""
        spec, size = self._layers[0], self._pages.layout.page_size
        first = np.cumsum([0, *(span.count for span in spans)])
        self._tokens = int(first[-1])
        self._plans = {}
        if not chosen:
            return
        tables, slots, vectors, fresh, used = [], [], [], [], 0
        every_head, every_kv_head = np.arange(spec.heads), np.arange(spec.kv_heads)
        for at in chosen:
            count, source = spans[at].count, int(first[at])
            pages = -(-count // size)
            table = np.arange(used, used + spec.kv_heads * pages, dtype=np.int32).reshape(1, spec.kv_heads, pages)
            page, offset = np.divmod(np.arange(count), size)
            slots.append((table[0, :, page].astype(np.int64) * size + offset[:, None]).reshape(-1))
            tables.append(table)
            vectors.append(_vectors(source, source + count, every_head, spec.heads))
            fresh.append(_vectors(source, source + count, every_kv_head, spec.kv_heads))
            used += table.size
        if used > self._pages.n_pages:
            self._pages = Pages.allocate(self._pages.layout, used, self._device)
        self._queries = self._placed(_index(vectors, self._tokens * spec.heads))
        self._fresh = self._placed(_index(fresh, self._tokens * spec.kv_heads))
        self._slots = self._kernels.plan_append(self._pages, torch.from_numpy(np.concatenate(slots)[None]))
        # The holders are attending the past meanwhile, perhaps on these cores: a few tokens are not worth a team.
        threads = self._threads if sum(spans[at].count for at in chosen) * spec.heads > _FEW_VECTORS else 1
        for policies in dict.fromkeys(self._policies):
            rows, asked = RowBuilder(size), 0
            for at, table in zip(chosen, tables, strict=True):
                start, count = spans[at].start, spans[at].count
                rows.add(Asked(asked, start, count, spec.group, start, start + count, start, table), policies)
                asked += count * spec.heads
            self._plans[policies] = self._kernels.plan(self._pages, rows.rows(), threads)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Partial | None:
        """q `[T, heads, d_k]`, k `[T, kv_heads, d_k]`, v `[T, kv_heads, d_v]` of one layer, all spans. Vectors of
        spans that were not chosen come back empty; None where none was."""
        if not self._plans:
            return None
        k, v = DIRECT.down(k, self._fresh), DIRECT.down(v, self._fresh)
        self._kernels.append(self._pages, self._slots, 0, k, v)
        spec, plan = self._layers[layer], self._plans[self._policies[layer]]
        out, lse = self._kernels.attend(self._pages, plan, 0, DIRECT.down(q, self._queries), spec.scale, spec.soft_cap)
        if self._queries is None:
            return Partial(out, lse)
        whole = empty(self._tokens * spec.heads, spec.d_v, out.dtype, out.device)
        self._kernels.merge_into(whole, Partial(out, lse), self._queries)
        return whole

    def _placed(self, index: torch.Tensor | None) -> torch.Tensor | None:
        return None if index is None else index.to(self._device)
