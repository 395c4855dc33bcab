"""A batch that several workers compute in turn, from one attention to the next: the slices of one worker.

Only the residual stream and the attention's output come in and go out. Indices, plans and pages for the present are
made once a batch, and kept until the worker has done its last slice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from lamina_protocols.channels.channels import Channel
from lamina_protocols.channels.waiting import Waiter
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.routes import HolderBatch
from lamina_workers.decoder.model import Batch, Decoder, QueryReady
from lamina_workers.decoder.sampler import RowSampling, Sampled, sample
from lamina_workers.model_worker.attention_merge import Pausing
from lamina_workers.model_worker.interface import Suspended, Waiting
from lamina_workers.ports.timing import Stopwatch


class Context(NamedTuple):
    """The state between two slices: `hidden`, `[T, hidden_size]`, the residual stream that entered the last
    layer, and `attended`, `[T, heads * d_v]`, the attention of that layer."""

    hidden: torch.Tensor
    attended: torch.Tensor


def rotation(turn: int, layers: int, replicas: int) -> list[int]:
    """The replica of each slice of batch number `turn`: slice k of batch j is at replica (j + k) mod replicas.

    Slices are cut at attention: slice k begins behind the attention of layer k - 1 and ends with that of layer k. So
    there is one slice more than layers, and a replica that has waited for attention is free at once for another batch.
    Batches of successive numbers begin at different replicas.
    """
    return [(turn + k) % replicas for k in range(layers + 1)]


def rotates(shares: Mapping[int, HolderBatch], here: Iterable[int] = ()) -> bool:
    """Whether a batch may be computed by several workers in turn, each with a channel of its own to every holder.

    For that every store must be answered. Keys that travel without a query are not, and the next announcement, which
    comes over another channel, could overtake them. So each holder that stores must read too. Where q goes first the
    store is over before the worker's next query is answered, which comes over the same channel; in its last slice with
    an attention q, k and v go together. No holder may be one of `here`: other processes cannot reach those.
    """
    routed = {number: share.routes for number, share in shares.items() if share.routes}
    if routed.keys() & set(here):
        return False
    for routes in routed.values():
        reads = any(route.row.read is not None for route in routes)
        stores = any(lo < hi for lo, hi in (route.stored for route in routes))
        if stores and not reads:
            return False
    return bool(routed)


def plain_rows(sampling: Sequence[RowSampling]) -> tuple[int, ...]:
    """The rows that need nothing but their likeliest token, which the worker with the logits can choose."""
    return tuple(i for i, row in enumerate(sampling) if row.plain and row.logprobs is None)


def likeliest(logits: torch.Tensor, plain: Sequence[int]) -> tuple[tuple[int, ...], torch.Tensor]:
    """Of `logits`, float32 `[S, vocab]`, the tokens of the plain rows, each plus 1 (0: not finite), and the logits of
    the other rows, on the host."""
    if not plain:
        return (), logits.cpu()
    remainder = [i for i in range(len(logits)) if i not in set(plain)]
    tokens = sample(logits[list(plain)], [RowSampling()] * len(plain)).tokens
    return tuple(0 if token is None else token + 1 for token in tokens), logits[remainder].cpu()


def chosen(sampling: Sequence[RowSampling], tokens: Sequence[int], logits: torch.Tensor) -> Sampled:
    """The tokens of all rows: the plain ones as `likeliest` chose them, the others sampled here."""
    plain = plain_rows(sampling)
    remainder = [i for i in range(len(sampling)) if i not in set(plain)]
    if len(tokens) != len(plain) or len(logits) != len(remainder):
        raise ProtocolError(
            f"{len(tokens)} tokens and {len(logits)} rows of logits, due {len(plain)} and {len(remainder)}"
        )
    sampled = sample(logits, [sampling[i] for i in remainder])
    result = Sampled([None] * len(sampling), [None] * len(sampling))
    for i, shifted_token in zip(plain, tokens, strict=True):
        result.tokens[i] = shifted_token - 1 if shifted_token else None
    for i, token, report in zip(remainder, sampled.tokens, sampled.logprobs, strict=True):
        result.tokens[i], result.logprobs[i] = token, report
    return result


class SlicedBatch:
    """One batch at one worker. `query_first`: q may go before k and v. `drive` makes a run of a forward pass; `watch`
    and `clock` are the worker's.

    `model_seconds` is the time of its last slice outside of attention, `attention_seconds` the rest of it.
    """

    channel: Channel | None = None  # slices are fed in this process

    def __init__(
        self,
        decoder: Decoder,
        batch: Batch,
        query_first: bool,
        drive: Callable[[Pausing], Suspended],
        watch: Stopwatch,
        clock: Callable[[], float],
    ) -> None:
        self.model_seconds = self.attention_seconds = 0.0
        self._decoder = decoder
        self._batch = batch
        self._query_first = query_first
        self._watch = watch
        self._clock = clock
        self._next_slice: tuple[int, Context | None, bool] | None = None
        self._result_context: Context | None = None
        self._run = drive(self._forward())

    def slice(
        self, number: int, context: Context | None, last: bool = True
    ) -> Generator[Waiting, None, Context | torch.Tensor]:
        """Compute slice `number` from the context of the one before, None for the first. `last`: the worker attends no
        further layer of the batch, so what this one stores must be answered. Returns its own context, on
        the host, or behind the last attention the logits, float32 `[S, vocab]`, where the model is. Raises as
        `AttentionMerge.run` does."""
        self._next_slice = number, context, last
        self._result_context = None
        self.model_seconds = 0.0
        start = self._clock()
        logits = torch.empty(0)
        while True:
            since, attending = self._clock(), self._watch.seconds
            try:
                waiting = next(self._run)
            except StopIteration as stop:
                waiting, logits = None, stop.value
            self.model_seconds += self._clock() - since - (self._watch.seconds - attending)
            if waiting is None or waiting.replies is self:
                break
            yield waiting
        self.attention_seconds = self._clock() - start - self.model_seconds
        return logits if self._result_context is None else self._result_context

    def close(self) -> None:
        """The batch goes no further here."""
        self._run.close()

    def ready(self, batch: int) -> bool:
        """Whether a slice is wanted."""
        return self._next_slice is not None

    def _forward(self) -> Pausing:
        device = self._decoder.device
        while True:
            while self._next_slice is None:
                yield Waiting(self, 0)
            (number, context, last), self._next_slice = self._next_slice, None
            first = self._query_first and not last
            if context is None:
                forward = self._decoder.forward(self._batch, query_first=first)
            else:
                hidden, attended = context.hidden.to(device), context.attended.to(device)
                forward = self._decoder.forward(self._batch, hidden, number - 1, attended, first)
            try:
                event = next(forward)
                while isinstance(event, QueryReady):
                    yield event
                    event = next(forward)
            except StopIteration as stop:
                logits: torch.Tensor = stop.value
                return logits
            attention_output = yield event
            if not isinstance(attention_output, torch.Tensor) or event.hidden is None:
                raise ValueError(f"layer {event.layer} cannot be cut behind its attention: a part of it is missing")
            self._result_context = Context(event.hidden.cpu(), attention_output.flatten(1).cpu())
            forward.close()


class Waits:
    """Lets one thread that drives several runs wait until any of them can go on."""

    def __init__(self, waiter: Waiter | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._waiter = waiter or Waiter()
        self._clock = clock

    def until_any(self, waitings: Iterable[Waiting], timeout: float, beside: Sequence[Channel] = ()) -> bool:
        """Wait until something comes over a channel of one of the runs, or one `beside` them. False where nothing has
        for `timeout` seconds, or a run waits for something that comes over no channel."""
        channels = set(beside)
        for waiting in waitings:
            if waiting.replies.channel is None:
                return False
            channels.add(waiting.replies.channel)
        watched: list[Channel] = []
        try:
            for channel in channels:
                try:
                    self._waiter.add(channel)
                except ValueError:  # it was closed a moment ago
                    return True
                watched.append(channel)
            deadline = self._clock() + timeout
            while (seconds_left := deadline - self._clock()) > 0:
                if self._waiter.wait(seconds_left):  # it may wake for a part of a frame
                    return True
            return False
        finally:
            for channel in watched:
                self._waiter.remove(channel)
