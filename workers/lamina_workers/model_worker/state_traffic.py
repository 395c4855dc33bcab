"""Between the model and the holders of states: inputs of a layer in, what was read of its states out.

A holder has some heads of some sequences; states are never cut by positions. It takes a row's inputs of its heads and
their key heads, and answers with its heads' outputs. One message a layer goes each way.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from lamina_kernels.states.advance import StateWork
from lamina_kernels.states.operands import StateConstants
from lamina_protocols.messages.layers import LayerSpec
from lamina_protocols.messages.messages import Advance, Advanced, Constants
from lamina_protocols.messages.routes import Route, Span
from lamina_workers.decoder.model import StateReady
from lamina_workers.devices.staging import Staging
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.holder_traffic import check_answer
from lamina_workers.model_worker.interface import Suspended, Waiting
from lamina_workers.ports.port import AttentionPort, Replies
from lamina_workers.ports.timing import Stopwatch, Times

_SLOWEST = 1e8  # multiplications and additions a second that any holder is trusted to do
_STEPS = 4  # of them that a token does with each number of a state


class Piece(NamedTuple):
    """Tokens of a batch that follow one another, and the same heads of them. `columns` are those of x, `heads` those of
    gates and outputs, as slices in order; `n_heads` counts the heads."""

    tokens: slice
    columns: tuple[slice, ...]
    heads: tuple[slice, ...]
    n_heads: int


class StateHolder:
    """The messages of a batch to and from one holder of states, the same in every layer of the pool.

    `way` copies tensors to the holder and back. `here`: it is in this process. `timeout`: seconds after which a holder
    that has not answered is gone.
    """

    def __init__(
        self,
        spec: LayerSpec,
        way: Staging,
        patience: float,
        replies: Replies,
        spans: Sequence[Span],
        routes: Sequence[Route],
    ) -> None:
        first = list(accumulate((span.count for span in spans), initial=0))
        self.replies = replies
        self.here = replies.here is not None
        self._spec, self._way = spec, way
        self._pieces = tuple(_pieces(spec, [(first[route.source], route.row.count, route.heads) for route in routes]))
        self._all = len(self._pieces) == 1 and self._pieces[0].n_heads == spec.heads
        self._all &= self._pieces[0].tokens == slice(0, first[-1])
        self._vectors = sum((piece.tokens.stop - piece.tokens.start) * piece.n_heads for piece in self._pieces)
        self.timeout = patience + self._vectors * _STEPS * spec.d_k * spec.d_v / _SLOWEST

    def work(self, batch: int, pool: int) -> StateWork | None:
        """The batch's work in the pool, where the holder is in this process and has all heads."""
        computing = self.replies.here
        return computing.state_work(batch, pool) if computing is not None and self._all else None

    def send(self, epoch: int, batch: int, state: StateReady) -> None:
        """Send what the holder needs of a layer's inputs. Raises HolderLost."""
        x, gates = self._flat(state.x, "columns"), self._flat(state.gates, "heads")
        self._way.landed()
        self.replies.asked(batch)
        self.replies.port.send(Advance(epoch, batch, state.layer, x, gates))

    def take(self, batch: int, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
        """The answer, `[n, d_v]` where the model is, and how many seconds the holder took. Raises HolderFault where it
        failed, HolderLost where it is gone or has answered something else."""
        reply = self.replies.take(Advanced, batch, layer, self.timeout)
        check_answer(self.replies, reply.out, (self._vectors, self._spec.d_v), dtype)
        return self._way.up(reply.out), reply.seconds

    def put(self, out: torch.Tensor, joined: torch.Tensor | None, tokens: int) -> torch.Tensor:
        """Put an answer to the others', `[tokens, heads, d_v]`; there are none yet where that is None."""
        spec, first_vector = self._spec, 0
        if self._all:
            return out.view(tokens, spec.heads, spec.d_v)
        if joined is None:
            joined = out.new_empty(tokens, spec.heads, spec.d_v)
        for piece in self._pieces:
            count = piece.tokens.stop - piece.tokens.start
            piece_out = out[first_vector : first_vector + count * piece.n_heads].view(count, piece.n_heads, spec.d_v)
            first_vector, begin = first_vector + count * piece.n_heads, 0
            for heads in piece.heads:
                n = heads.stop - heads.start
                joined[piece.tokens, heads] = piece_out[:, begin : begin + n]
                begin += n
        return joined

    def _flat(self, x: torch.Tensor, field: str) -> torch.Tensor:
        """The holder's part of x or gates, 1-D; `field` of a piece has its slices. All of it is not copied."""
        if not self._all:
            parts = [
                torch.cat([x[piece.tokens, columns] for columns in getattr(piece, field)], dim=1).view(-1)
                for piece in self._pieces
            ]
            x = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._way.down(x.reshape(-1, 1)).view(-1)


class StateExchange:
    """A batch at all holders of one pool of states, one layer after the other; counts the time into `times`."""

    def __init__(
        self,
        ids: tuple[int, int],
        holders: Sequence[StateHolder],
        times: Times,
        watch: Stopwatch,
        work: StateWork | None = None,
    ) -> None:
        self.work = work
        """What the model can do itself, without messages."""
        self._epoch, self._batch = ids
        # A holder here computes while it is sent to: the others are asked first, and compute meanwhile.
        self._holders = sorted(holders, key=lambda holder: holder.here)
        self._times = times
        self._watch = watch

    def advance(self, state: StateReady, suspends: bool) -> Suspended:
        """What the states give for the inputs of a layer: `[T, heads * d_v]`. Raises HolderFault, HolderLost."""
        tokens, start = len(state.x), time.perf_counter()
        for holder in self._holders:
            holder.send(self._epoch, self._batch, state)
        joined: torch.Tensor | None = None
        slowest = answered = 0.0
        for holder in self._holders:
            waits = time.perf_counter()
            if suspends and not holder.replies.ready(self._batch):
                self._watch.stop()
                yield Waiting(holder.replies, self._batch)
                self._watch.start()
            out, seconds = holder.take(self._batch, state.layer, state.x.dtype)
            if holder.here:
                self._times.local += seconds
            else:
                now = time.perf_counter()
                self._times.waited += now - waits
                answered = now - start
                slowest = max(slowest, min(seconds, answered))  # whatever the holder says
            joined = holder.put(out, joined, tokens)
        self._times.remote += slowest
        self._times.answered += answered
        if joined is None:
            raise HolderFault(f"no holder has the states of layer {state.layer}")
        return joined.view(tokens, -1)


def send_constants(port: AttentionPort, epoch: int, constants: Mapping[int, StateConstants]) -> None:
    """Tell a holder what it needs of layers with states besides their specs. Raises HolderLost."""
    nothing = torch.empty(0)
    for layer, of_layer in constants.items():
        tensors = (nothing if x is None else x.cpu() for x in (of_layer.conv, of_layer.bias, of_layer.skip))
        port.send(Constants(epoch, 0, layer, *tensors))


def check_heads(spec: LayerSpec, spans: int, routes: Mapping[Replies, Sequence[Route]]) -> None:
    """Raise HolderFault where holders do not have every head of each of so many spans. spec: of any of the layers."""
    span_heads: list[set[int]] = [set() for _ in range(spans)]
    for routed in routes.values():
        for route in routed:
            span_heads[route.source].update(route.heads)
    for source, heads in enumerate(span_heads):
        if len(heads) < spec.heads:
            head = min(set(range(spec.heads)) - heads)
            raise HolderFault(f"no holder has the state of head {head} for span {source}, it needs all {spec.heads}")


def _pieces(spec: LayerSpec, parts: Iterable[tuple[int, int, tuple[int, ...]]]) -> list[Piece]:
    """Parts, each of a first token, a number of tokens and heads, as few pieces in their order."""
    pieces: list[Piece] = []
    last_heads: tuple[int, ...] = ()
    for first, count, heads in parts:
        if pieces and heads == last_heads and pieces[-1].tokens.stop == first:
            pieces[-1] = pieces[-1]._replace(tokens=slice(pieces[-1].tokens.start, first + count))
        else:
            keys = sorted({head // (spec.heads // spec.key_heads) for head in heads})
            q, k = (_slices(keys, spec.d_k, number * spec.key_heads * spec.d_k) for number in range(2))
            v = _slices(heads, spec.d_v, 2 * spec.key_heads * spec.d_k)
            pieces.append(Piece(slice(first, first + count), (*q, *k, *v), _slices(heads, 1, 0), len(heads)))
        last_heads = heads
    return pieces


def _slices(numbers: Sequence[int], width: int, begin: int) -> tuple[slice, ...]:
    """Where these, each `width` wide, stand from `begin` on; neighbours are one slice."""
    slices: list[slice] = []
    for number in numbers:
        start = begin + number * width
        if slices and slices[-1].stop == start:
            slices[-1] = slice(slices[-1].start, start + width)
        else:
            slices.append(slice(start, start + width))
    return tuple(slices)
