"""Between the model and the holders: q, k, v of a layer in, attention output out. Layers with states: `state_traffic`.

The model worker computes the *present* (a batch's own tokens, causal inside each row; `FreshAttention`), holders
compute the *past* (keys below a row's start), and `AttentionMerge` merges the partials. A holder in this process may be
asked to fuse the two. A run that waits for a reply is suspended, so that one thread can drive several.

Present and merging are where the model is: q, k and v lie there, a prompt's chunk is work for the device that computes
fastest, and one tensor must cross back wherever the merge is. Only tensors to and from a holder elsewhere are copied.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from lamina_kernels.paged.pages import Pages
from lamina_kernels.partial import Partial, empty, with_sinks
from lamina_kernels.states.advance import StateWork
from lamina_protocols.messages.layers import STATES, HolderConfig, LayerSpec
from lamina_protocols.messages.pools import Pool, pools
from lamina_protocols.messages.routes import Route, Span
from lamina_workers.attention_worker.page_layout import CPU, attention_kernels, page_layout
from lamina_workers.attention_worker.row_builder import RowBuilder, RowQueries
from lamina_workers.decoder.model import Event, Forward, KeyValueReady, QueryReady, StateReady
from lamina_workers.devices.staging import DIRECT, Staging, staging_for
from lamina_workers.errors import HolderFault
from lamina_workers.kv_pages.head_policies import HeadPolicies, read_alike
from lamina_workers.model_worker.compiled_exchange import CompiledExchange, ExchangeMaker
from lamina_workers.model_worker.holder_traffic import HolderTraffic, check_answer, holder_traffic, index_of, vectors_of
from lamina_workers.model_worker.interface import Suspended, Waiting
from lamina_workers.model_worker.prompt_samples import SampleTraffic
from lamina_workers.model_worker.state_traffic import StateExchange, check_heads, state_traffic
from lamina_workers.ports.port import Replies
from lamina_workers.ports.timing import Stopwatch, Times

_NO_V = torch.empty(0)  # of a layer with states
_FEW_VECTORS = 4096  # query vectors of a batch's own tokens that one thread attends


class FreshAttention:
    """Attention of a batch's own tokens in the layers of one pool, of which `config` is; causal inside each span, over
    pages that live for one layer. Layers are numbered within the pool.

    The pages have the holders' layout, so k and v are rounded to the cache's dtype here as they are there. Spans that
    a fused holder attends are left out.
    """

    def __init__(self, config: HolderConfig, threads: int, device: torch.device) -> None:
        self._layers = config.layers
        self._threads = threads
        self._device = device
        self._kernels = attention_kernels(device)
        self._pages = Pages.allocate(page_layout(config, device), 1, device)
        self._slots: Any = None
        self._plans: list[Any] = []  # empty where no span was chosen
        self._plan_of: tuple[int, ...] = ()  # by layer, the number of its plan
        self._policies_of = lru_cache(maxsize=64)(partial(HeadPolicies.of, config))  # hashing a config takes long
        self._queries: torch.Tensor | None = None  # which vectors of the flat q they are, None: all
        self._fresh: torch.Tensor | None = None  # and of the flat k and v
        self._tokens = 0

    def begin(self, spans: Sequence[Span], chosen: Sequence[int]) -> None:
        """Lay out the pages of the chosen spans of a batch and plan their attention, once for all layers."""
        self._plans = []
        if not chosen:
            return
        spec, size = self._layers[0], self._pages.layout.page_size
        first = np.cumsum([0, *(span.count for span in spans)])
        self._tokens = int(first[-1])
        policies = [self._policies_of(spans[index].policy) for index in chosen]
        blocks = any(policy.ranged for of_span in policies for policy in of_span.distinct)
        tables, slots, vectors, fresh, used = [], [], [], [], 0
        every_head, every_kv_head = np.arange(spec.heads), np.arange(spec.kv_heads)
        for index in chosen:
            count, source = spans[index].count, int(first[index])
            inside = spans[index].start % size if blocks else 0  # so that blocks are whole pages
            pages = -(-(inside + count) // size)
            table = np.arange(used, used + spec.kv_heads * pages, dtype=np.int32).reshape(1, spec.kv_heads, pages)
            page, offset = np.divmod(np.arange(inside, inside + count), size)
            slots.append((table[0, :, page].astype(np.int64) * size + offset[:, None]).reshape(-1))
            tables.append(table)
            vectors.append(vectors_of(source, source + count, every_head, spec.heads))
            fresh.append(vectors_of(source, source + count, every_kv_head, spec.kv_heads))
            used += table.size
        if used > self._pages.n_pages:
            self._pages = Pages.allocate(self._pages.layout, used, self._device)
        self._queries = self._placed(index_of(vectors, self._tokens * spec.heads))
        self._fresh = self._placed(index_of(fresh, self._tokens * spec.kv_heads))
        self._slots = self._kernels.plan_append(self._pages, torch.from_numpy(np.concatenate(slots)[None]))
        # The holders are attending the past meanwhile, perhaps on these cores: a few tokens are not worth a team.
        threads = self._threads if sum(spans[index].count for index in chosen) * spec.heads > _FEW_VECTORS else 1
        self._plan_of = read_alike(tuple(dict.fromkeys(policies)))
        for layer in (self._plan_of.index(number) for number in range(1 + max(self._plan_of))):
            rows, first_vector = RowBuilder(size), 0
            for index, table, of_span in zip(chosen, tables, policies, strict=True):
                start, count = spans[index].start, spans[index].count
                base = start - start % size if blocks else start
                rows.add(
                    RowQueries(first_vector, start, count, spec.group, start, start + count, base, table),
                    of_span.reads[layer],
                )
                first_vector += count * spec.heads
            self._plans.append(self._kernels.plan(self._pages, rows.rows(), threads))

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Partial | None:
        """q `[T, heads, d_k]`, k `[T, kv_heads, d_k]`, v `[T, kv_heads, d_v]` of one layer, all spans. Vectors of
        spans that were not chosen come back empty; None where no span was chosen."""
        if not self._plans:
            return None
        k, v = DIRECT.down(k, self._fresh), DIRECT.down(v, self._fresh)
        self._kernels.append(self._pages, self._slots, 0, k, v)
        spec, plan = self._layers[layer], self._plans[self._plan_of[layer]]
        out, lse = self._kernels.attend(self._pages, plan, 0, DIRECT.down(q, self._queries), spec.scale, spec.soft_cap)
        if self._queries is None:
            return Partial(out, lse)
        result = empty(self._tokens * spec.heads, spec.d_v, out.dtype, out.device)
        self._kernels.merge_into(result, Partial(out, lse), self._queries)
        return result

    def _placed(self, index: torch.Tensor | None) -> torch.Tensor | None:
        return None if index is None else index.to(self._device)


Pausing = Generator[Event | Waiting, torch.Tensor | StateWork | None, torch.Tensor]
"""A forward pass that may itself wait before a layer, for an input that comes from elsewhere."""


class LayerExchange:
    """The rows of one pool of a batch at all their holders, one layer after the other: sends q, k and v, takes the
    answers, and counts the time into `times`. There is one for each batch and pool, since a step has as many exchanges
    as layers. ids: epoch and number of the batch; `layers` are all of the model."""

    def __init__(
        self,
        ids: tuple[int, int],
        traffic: Sequence[HolderTraffic],
        samples: Sequence[SampleTraffic],
        layers: Sequence[LayerSpec],
        times: Times,
    ) -> None:
        self._epoch, self.batch = ids
        self.samples = samples
        self._layers = layers
        self.readers = [holder for holder in traffic if holder.reads]
        self.remote = any(not holder.here for holder in self.readers)
        self.layer = -1
        self.q: torch.Tensor
        self._traffic = traffic
        self._times = times

    def begin(self, layer: int, q: torch.Tensor) -> None:
        """The next layer, and its queries. q: `[T, heads, d_k]`."""
        self.layer, self.q = layer, q
        self._early = False  # q is sent, k and v are not
        self._send_time = self._slowest = self._answered = 0.0

    def ask(self) -> None:
        """Send q alone to the holders that need no more: they attend the past while k and v are computed."""
        self._early, self._send_time = True, time.perf_counter()
        for holder in self.readers:
            if not holder.fused:
                holder.send_query(self._epoch, self.batch, self.layer, self.q)

    def send(self, kv: KeyValueReady) -> None:
        """Send k and v, and q where `ask` has not."""
        if not self._early:
            self._send_time = time.perf_counter()
        for holder in self._traffic:
            asks = holder.reads and (holder.fused or not self._early)
            if asks and holder.stores:
                holder.send_both(self._epoch, self.batch, self.layer, self.q, kv)
            elif holder.stores:
                holder.send_fresh(self._epoch, self.batch, self.layer, kv)
            elif asks:
                holder.send_query(self._epoch, self.batch, self.layer, self.q)
        for sample in self.samples:
            sample.send(self._epoch, self.batch, self.layer, self._layers[self.layer], self.q)

    def take(self, holder: HolderTraffic, waits: float) -> Partial:
        """The answer of a holder; waits for it. `waits`: since when there is nothing else to do."""
        past, seconds = holder.take(self.batch, self.layer)
        if holder.here:
            self._times.local += seconds
        else:
            now = time.perf_counter()
            self._times.waited += now - waits
            self._answered = now - self._send_time
            self._slowest = max(self._slowest, min(seconds, self._answered))  # whatever the holder says
        return past

    def finish(self) -> None:
        """All answers are there: count the slowest holder, and the time until the last answer."""
        self._times.remote += self._slowest
        self._times.answered += self._answered


class _PoolLane(NamedTuple):
    """The pages and buffers of one run at a time for the layers of one pool, whose specs are `layers`."""

    layers: tuple[LayerSpec, ...]
    present: FreshAttention


class _Lane(NamedTuple):
    """What one run at a time works with. `pools`: by number, those of attention."""

    staging: Staging
    pools: dict[int, _PoolLane]
    exchanges: dict[int, ExchangeMaker]


class _PoolRun(NamedTuple):
    """A batch in the layers of one pool. `fused`: holders attend all of its own tokens."""

    layers: tuple[LayerSpec, ...]
    present: FreshAttention
    traffic: tuple[HolderTraffic, ...]
    exchange: LayerExchange
    fused: bool


class AttentionMerge:
    """Answers forward passes. One thread; each batch has a run of its own, on a stream of its own where there are any.

    `device` is the model's. `patience`: seconds that a holder may take for an answer, above what its work is expected
    to take. `watch` runs while a run is in the attention of a layer and not suspended.
    """

    def __init__(
        self,
        config: HolderConfig,
        threads: int = 1,
        patience: float = 10.0,
        watch: Stopwatch | None = None,
        device: torch.device = CPU,
    ) -> None:
        self._watch = watch or Stopwatch(time.perf_counter)
        self._config = config
        self._pools = pools(config)
        where = {n: (p, position) for p, pool in enumerate(self._pools) for position, n in enumerate(pool.layers)}
        self._places = [where[number] for number in range(len(config.layers))]  # of a layer: its pool, its number there
        self._threads = threads
        self._patience = patience
        self._device = device
        self._staging = staging_for(device)
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
        whole: bool = False,
    ) -> Suspended:
        """Drive `forward` to its end and return what it returns. `routes` has those of each holder concerned. Where q
        is early it is sent alone, and the past is attended meanwhile. `whole`: it is a decoder's own, of all layers.

        Without `suspends` it waits for replies itself: there is nothing else to go on with, and asking takes time.

        Raises HolderFault where a holder answers with a fault; the batch can then run again from the start. Closing
        the generator leaves replies behind: the caller must have made `Replies` forget the batch.
        """
        lane = self._idle.pop() if self._idle else self._lane()
        try:
            logits = yield from lane.staging.driven(
                self._run(lane, forward, (epoch, batch), spans, routes, suspends, whole)
            )
            return logits
        finally:
            self._idle.append(lane)

    def _lane(self) -> _Lane:
        attention = {n: pool for n, pool in enumerate(self._pools) if pool.config.layers[0].kind not in STATES}
        exchanges = {n: ExchangeMaker(n, pool) for n, pool in enumerate(self._pools)}
        return _Lane(self._staging(), {n: self._pool_lane(pool) for n, pool in attention.items()}, exchanges)

    def _pool_lane(self, pool: Pool) -> _PoolLane:
        return _PoolLane(pool.config.layers, FreshAttention(pool.config, self._threads, self._device))

    def _run(
        self,
        lane: _Lane,
        forward: Forward | Pausing,
        ids: tuple[int, int],
        spans: Sequence[Span],
        routes: Mapping[Replies, Sequence[Route]],
        suspends: bool,
        whole: bool,
    ) -> Suspended:
        times = Times()
        of_pools = [
            {replies: [route for route in routed if route.pool == number] for replies, routed in routes.items()}
            for number in range(len(self._pools))
        ]
        runs: dict[int, _PoolRun] = {}
        states: dict[int, StateExchange] = {}
        for n, of_pool in enumerate(of_pools):
            if n in lane.pools:
                runs[n] = self._pool_run(lane, n, ids, spans, of_pool, times)
            else:
                states[n] = self._state_exchange(lane, n, ids, spans, of_pool, times, whole)
        all_compiled: dict[int, CompiledExchange | None] = {}  # by pool
        try:
            event = next(forward)
            tokens = sum(span.count for span in spans)
            if self._device.type == "cpu" and isinstance(event, QueryReady | StateReady):
                dtype = (event.q if isinstance(event, QueryReady) else event.x).dtype
                traffic_of: dict[int, Sequence[HolderTraffic]] = {
                    n: run.traffic for n, run in runs.items() if run.fused and not run.exchange.samples
                }
                if tokens == len(spans):
                    traffic_of |= {n: exchange.holders for n, exchange in states.items() if exchange.work is None}
                for n, traffic in traffic_of.items():
                    all_compiled[n] = lane.exchanges[n].begin(traffic, ids, tokens, dtype, times)
            while True:
                while isinstance(event, Waiting):
                    yield event
                    event = next(forward)
                lane.staging.turn()
                pool, within = self._places[event.layer]
                if isinstance(event, StateReady):
                    if (work := states[pool].work) is not None:
                        event = forward.send(work)
                        continue
                    if (compiled := all_compiled.get(pool)) is not None:
                        kv = KeyValueReady(event.layer, event.gates, _NO_V)
                        answering = compiled.attend(event.layer, event.x, kv, suspends, self._watch)
                    else:
                        answering = states[pool].advance(event, suspends)
                else:
                    run, compiled = runs[pool], all_compiled.get(pool)
                    kv = _keys_values(run.exchange, event, forward, early=compiled is None)
                    if compiled is not None:
                        answering = compiled.attend(event.layer, run.exchange.q, kv, suspends, self._watch)
                    else:
                        answering = self._attend(run, within, kv, suspends)
                self._watch.start()
                try:
                    answer = yield from answering
                finally:
                    self._watch.stop()
                event = forward.send(answer)
        except StopIteration as stop:
            result: torch.Tensor = stop.value
            return result
        finally:
            for compiled in all_compiled.values():
                if compiled is not None:
                    compiled.close()
            self.times = times

    def _pool_run(
        self,
        lane: _Lane,
        number: int,
        ids: tuple[int, int],
        spans: Sequence[Span],
        routes: Mapping[Replies, Sequence[Route]],
        times: Times,
    ) -> _PoolRun:
        """Begin a batch in the layers of one pool of attention, of whose parts the routes are."""
        layers, present = lane.pools[number]
        traffic, samples = [], []
        first = list(accumulate((span.count for span in spans), initial=0))
        for replies, routed in routes.items():
            if routed:
                direct = self._is_direct(replies)
                samples.append(SampleTraffic(replies, DIRECT if direct else lane.staging, routed, first))
                traffic.append(holder_traffic(layers[0], lane.staging, direct, self._patience, replies, spans, routed))
        fused = {route.source for routed in routes.values() for route in routed if route.row.fused}
        # A holder here attends while it is sent to: the others are asked first, and attend meanwhile.
        traffic.sort(key=lambda holder: holder.here)
        for holder in traffic:
            _be_patient(holder.replies, holder.timeout)
        unfused = [source for source in range(len(spans)) if source not in fused]
        present.begin(spans, unfused)
        exchange = LayerExchange(ids, traffic, [sample for sample in samples if sample], self._config.layers, times)
        return _PoolRun(layers, present, tuple(traffic), exchange, not unfused)

    def _state_exchange(
        self,
        lane: _Lane,
        number: int,
        ids: tuple[int, int],
        spans: Sequence[Span],
        routes: Mapping[Replies, Sequence[Route]],
        times: Times,
        whole: bool,
    ) -> StateExchange:
        """Begin a batch in the layers of one pool of states."""
        spec = self._pools[number].config.layers[0]
        check_heads(spec, len(spans), routes)
        holders = []
        for replies, routed in routes.items():
            if routed:
                direct = self._is_direct(replies)
                holders.append(state_traffic(spec, lane.staging, direct, self._patience, replies, spans, routed))
                _be_patient(replies, holders[-1].timeout)
        work = None
        if whole and len(holders) == 1 and holders[0].queries is holders[0].fresh is None:
            port = holders[0].replies.here
            work = None if port is None else port.state_work(ids[1], number)
        return StateExchange(spec, ids, holders, times, self._watch, work)

    def _is_direct(self, replies: Replies) -> bool:
        """Whether a holder is on the model's device, so that nothing is copied."""
        return replies.here is not None and replies.here.device == self._device

    def _attend(self, run: _PoolRun, layer: int, kv: KeyValueReady, suspends: bool) -> Suspended:
        """[T, heads * d_v]: the present merged with every holder's partial, in a layer of the pool."""
        spec, exchange = run.layers[layer], run.exchange
        q = exchange.q
        exchange.send(kv)
        merged = run.present.attend(layer, q, kv.k, kv.v)
        for holder in exchange.readers:
            waits = time.perf_counter()
            if suspends and not holder.replies.ready(exchange.batch):
                self._watch.stop()
                yield Waiting(holder.replies, exchange.batch)
                self._watch.start()
            past = exchange.take(holder, waits)
            n = len(q) * spec.heads if holder.queries is None else len(holder.queries)
            check_answer(holder.replies, past.out, (n, spec.d_v), q.dtype)
            if merged is None:
                if holder.queries is None and past.out.shape == (len(q) * spec.heads, spec.d_v):
                    merged = past
                    continue
                merged = empty(len(q) * spec.heads, spec.d_v, q.dtype, q.device)
            try:
                for piece, index in holder.pieces(past):
                    self._kernels.merge_into(merged, piece, index)
            except ValueError as error:
                raise HolderFault(f"{holder.replies.port.name}: {error}") from error
        if merged is None:
            raise HolderFault(f"nothing attends layer {exchange.layer}: no worker fuses and no present was computed")
        if exchange.remote:
            exchange.finish()
        out = merged.out if kv.sinks is None else with_sinks(merged, kv.sinks)
        return out.view(len(q), -1)


def _keys_values(exchange: LayerExchange, event: Event, forward: Forward | Pausing, early: bool) -> KeyValueReady:
    """Begin a layer with its queries, and let the model go on to k and v. `early`: q may be sent before."""
    if not isinstance(event, QueryReady):
        raise TypeError(f"the model yields QueryReady first in each layer, got {type(event).__name__}")
    exchange.begin(event.layer, event.q)
    if event.early and early:
        exchange.ask()
    kv = forward.send(None)
    if not isinstance(kv, KeyValueReady):
        raise TypeError(f"the model yields KeyValueReady after QueryReady, got {type(kv).__name__}")
    return kv


def _be_patient(replies: Replies, timeout: float) -> None:
    """A holder may take that long for an answer, and while it computes it reads nothing."""
    if replies.frames is not None:
        replies.frames.patience = max(replies.frames.patience, timeout)
