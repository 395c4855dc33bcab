"""Between the model and the holders: q, k, v of a layer in, attention output out.

The model worker computes the *present* (a batch's own tokens, causal inside each row), holders compute the *past*
(keys below a row's start), and the partials merge. A holder in this process may be asked to fuse the two. A run that
waits for a reply is suspended, so that one thread can drive several.

Present and merging are where the model is: q, k and v lie there, a prompt's chunk is work for the device that computes
fastest, and one tensor must cross back wherever the merge is. Only tensors to and from a holder elsewhere are copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple

import torch

from lamina_kernels.partial import Partial, empty
from lamina_protocols.messages import HolderConfig
from lamina_protocols.routes import Route, Span
from lamina_workers.attention_worker.head_policies import HeadPolicies
from lamina_workers.attention_worker.page_layout import CPU, attention_kernels
from lamina_workers.decoder.model import Forward, KeyValueReady, QueryReady
from lamina_workers.devices.staging import Staging, staging_for
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.compiled_exchange import CompiledExchange, ExchangeMaker
from lamina_workers.model_worker.fresh_attention import FreshAttention
from lamina_workers.model_worker.holder_traffic import HolderTraffic, check_answer, holder_traffic
from lamina_workers.model_worker.waiting import Suspended, Waiting
from lamina_workers.ports.port import InProcess, Replies
from lamina_workers.ports.timing import Stopwatch, Times

Pausing = Generator[QueryReady | KeyValueReady | Waiting, torch.Tensor | None, torch.Tensor]
"""A forward pass that may itself wait before a layer, for an input that comes from elsewhere."""


class LayerExchange:
    """A batch at all its holders, one layer after the other: sends q, k and v, takes the answers, and counts the time
    into `times`. There is one for each batch, since a step has as many exchanges as layers."""

    def __init__(self, epoch: int, batch: int, traffic: Sequence[HolderTraffic], times: Times) -> None:
        self.batch = batch
        self.readers = [holder for holder in traffic if holder.reads]
        self.remote = any(not holder.here for holder in self.readers)
        self.layer = -1
        self.q: torch.Tensor
        self._epoch = epoch
        self._traffic = traffic
        self._times = times

    def begin(self, layer: int, q: torch.Tensor) -> None:
        """The next layer, and its queries. q: `[T, heads, d_k]`."""
        self.layer, self.q = layer, q
        self._early = False  # q is sent, k and v are not
        self._asked = self._slowest = self._answered = 0.0

    def ask(self) -> None:
        """Send q alone to the holders that need no more: they attend the past while k and v are computed."""
        self._early, self._asked = True, time.perf_counter()
        for holder in self.readers:
            if not holder.fused:
                holder.send_query(self._epoch, self.batch, self.layer, self.q)

    def send(self, kv: KeyValueReady) -> None:
        """Send k and v, and q where `ask` has not."""
        if not self._early:
            self._asked = time.perf_counter()
        for holder in self._traffic:
            asks = holder.reads and (holder.fused or not self._early)
            if asks and holder.stores:
                holder.send_both(self._epoch, self.batch, self.layer, self.q, kv)
            elif holder.stores:
                holder.send_fresh(self._epoch, self.batch, self.layer, kv)
            elif asks:
                holder.send_query(self._epoch, self.batch, self.layer, self.q)

    def take(self, holder: HolderTraffic, waits: float) -> Partial:
        """The answer of a holder; waits for it. `waits`: since when there is nothing else to do."""
        past, seconds = holder.take(self.batch, self.layer)
        if holder.here:
            self._times.local += seconds
        else:
            now = time.perf_counter()
            self._times.waited += now - waits
            self._answered = now - self._asked
            self._slowest = max(self._slowest, min(seconds, self._answered))  # whatever the holder says
        return past

    def finish(self) -> None:
        """All answers are there: count the slowest holder, and the time until the last answer."""
        self._times.remote += self._slowest
        self._times.answered += self._answered


class _Lane(NamedTuple):
    """The pages and buffers of one run at a time."""

    present: FreshAttention
    staging: Staging
    exchanges: ExchangeMaker


class AttentionMerge:
    """Answers forward passes. One thread; each batch has a run of its own, on a stream of its own where there are any.

    `device` is the model's; `staging` makes the way from it to holders elsewhere, for one run more.
    `patience`: seconds that a holder may take for an answer, above what its work is expected to take. `watch` runs
    while a run is in the attention of a layer and not suspended.
    """

    def __init__(
        self,
        config: HolderConfig,
        threads: int = 1,
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
        """Drive `forward` to its end and return what it returns. `routes` has those of each holder concerned. Where q
        is early it is sent alone, and the past is attended meanwhile.

        Without `suspends` it waits for replies itself: there is nothing else to go on with, and asking takes time.

        Raises HolderFault where a holder answers with a fault; the batch can then run again from the start. Closing
        the generator leaves replies behind: the caller must have made `Replies` forget the batch.
        """
        lane = self._idle.pop() if self._idle else self._lane()
        try:
            logits = yield from lane.staging.driven(self._run(lane, forward, (epoch, batch), spans, routes, suspends))
            return logits
        finally:
            self._idle.append(lane)

    def _lane(self) -> _Lane:
        present = FreshAttention(self._config, self._policies, self._threads, self._device)
        return _Lane(present, self._staging(), ExchangeMaker(self._layers))

    def _run(
        self,
        lane: _Lane,
        forward: Forward | Pausing,
        ids: tuple[int, int],
        spans: Sequence[Span],
        routes: Mapping[Replies, Sequence[Route]],
        suspends: bool,
    ) -> Suspended:
        present, staging, exchanges = lane
        traffic = [self._traffic(staging, replies, spans, routed) for replies, routed in routes.items() if routed]
        # A holder here attends while it is sent to: the others are asked first, and attend meanwhile.
        traffic.sort(key=lambda holder: holder.here)
        for holder in traffic:
            if holder.replies.frames is not None:  # while it computes it reads nothing
                holder.replies.frames.patience = max(holder.replies.frames.patience, holder.timeout)
        times = Times()
        exchange = LayerExchange(*ids, traffic, times)
        fused = {route.source for routed in routes.values() for route in routed if route.row.fused}
        unfused = [source for source in range(len(spans)) if source not in fused]
        compiled: CompiledExchange | None = None
        try:
            present.begin(spans, unfused)
            event = next(forward)
            if not unfused and self._device.type == "cpu" and isinstance(event, QueryReady):
                tokens = sum(span.count for span in spans)
                compiled = exchanges.begin(traffic, ids, tokens, event.q.dtype, times)
            while True:
                while isinstance(event, Waiting):
                    yield event
                    event = next(forward)
                staging.turn()
                if not isinstance(event, QueryReady):
                    raise TypeError(f"the model yields QueryReady first in each layer, got {type(event).__name__}")
                exchange.begin(event.layer, event.q)
                if event.early and compiled is None:
                    exchange.ask()
                event = forward.send(None)
                if not isinstance(event, KeyValueReady):
                    raise TypeError(f"the model yields KeyValueReady after QueryReady, got {type(event).__name__}")
                self._watch.start()
                try:
                    if compiled is not None:
                        attended = yield from compiled.attend(exchange.layer, exchange.q, event, suspends, self._watch)
                    else:
                        attended = yield from self._attend(exchange, present, event, suspends)
                finally:
                    self._watch.stop()
                event = forward.send(attended)
        except StopIteration as stop:
            result: torch.Tensor = stop.value
            return result
        finally:
            if compiled is not None:
                compiled.close()
            self.times = times

    def _attend(self, exchange: LayerExchange, present: FreshAttention, kv: KeyValueReady, suspends: bool) -> Suspended:
        """[T, heads * d_v]: the present merged with every holder's partial."""
        spec, q = self._layers[exchange.layer], exchange.q
        exchange.send(kv)
        whole = present.attend(exchange.layer, q, kv.k, kv.v)
        for holder in exchange.readers:
            waits = time.perf_counter()
            if suspends and not holder.replies.ready(exchange.batch):
                self._watch.stop()
                yield Waiting(holder.replies, exchange.batch)
                self._watch.start()
            past = exchange.take(holder, waits)
            n = len(q) * spec.heads if holder.queries is None else len(holder.queries)
            check_answer(holder.replies, past.out, (n, spec.d_v), q.dtype)
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
            raise HolderFault(f"nothing attends layer {exchange.layer}: no holder fuses and no present was computed")
        if exchange.remote:
            exchange.finish()
        return whole.out.view(len(q), -1)

    def _traffic(
        self, staging: Staging, replies: Replies, spans: Sequence[Span], routes: Sequence[Route]
    ) -> HolderTraffic:
        port = replies.port
        direct = isinstance(port, InProcess) and port.device == self._device
        return holder_traffic(self._layers[0], staging, direct, self._patience, replies, spans, routes)
