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
        self._pieces = tuple(_pieces(spec, [(first[at.source], at.row.count, at.heads) for at in routes]))
        self._all = len(self._pieces) == 1 and self._pieces[0].n_heads == spec.heads
        self._all &= self._pieces[0].tokens == slice(0, first[-1])
        self._vectors = sum((piece.tokens.stop - piece.tokens.start) * piece.n_heads for piece in self._pieces)
        self.timeout = patience + self._vectors * _STEPS * spec.d_k * spec.d_v / _SLOWEST

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

    def put(self, out: torch.Tensor, whole: torch.Tensor | None, tokens: int) -> torch.Tensor:
        """Put an answer to the others', `[tokens, heads, d_v]`; there are none yet where that is None."""
        spec, at = self._spec, 0
        if self._all:
            return out.view(tokens, spec.heads, spec.d_v)
        if whole is None:
            whole = out.new_empty(tokens, spec.heads, spec.d_v)
        for piece in self._pieces:
            count = piece.tokens.stop - piece.tokens.start
            own = out[at : at + count * piece.n_heads].view(count, piece.n_heads, spec.d_v)
            at, begin = at + count * piece.n_heads, 0
            for heads in piece.heads:
                n = heads.stop - heads.start
                whole[piece.tokens, heads] = own[:, begin : begin + n]
                begin += n
        return whole

    def _flat(self, x: torch.Tensor, of: str) -> torch.Tensor:
        """The holder's part of x or gates, 1-D. Nothing is copied where it is all."""
        if not self._all:
            some = [
                torch.cat([x[piece.tokens, at] for at in getattr(piece, of)], dim=1).view(-1) for piece in self._pieces
            ]
            x = some[0] if len(some) == 1 else torch.cat(some)
        return self._way.down(x.reshape(-1, 1)).view(-1)


class StateExchange:
    """A batch at all holders of one pool of states, one layer after the other; counts the time into `times`."""

    def __init__(self, ids: tuple[int, int], holders: Sequence[StateHolder], times: Times, watch: Stopwatch) -> None:
        self._epoch, self._batch = ids
        # A holder here computes while it is sent to: the others are asked first, and compute meanwhile.
        self._holders = sorted(holders, key=lambda holder: holder.here)
        self._times = times
        self._watch = watch

    def advance(self, state: StateReady, suspends: bool) -> Suspended:
        """What the states give for the inputs of a layer: `[T, heads * d_v]`. Raises HolderFault, HolderLost."""
        tokens, asked = len(state.x), time.perf_counter()
        for holder in self._holders:
            holder.send(self._epoch, self._batch, state)
        whole: torch.Tensor | None = None
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
                answered = now - asked
                slowest = max(slowest, min(seconds, answered))  # whatever the holder says
            whole = holder.put(out, whole, tokens)
        self._times.remote += slowest
        self._times.answered += answered
        if whole is None:
            raise HolderFault(f"no holder has the states of layer {state.layer}")
        return whole.view(tokens, -1)


def send_constants(port: AttentionPort, epoch: int, constants: Mapping[int, StateConstants]) -> None:
    """Tell a holder what it needs of layers with states besides their specs. Raises HolderLost."""
    nothing = torch.empty(0)
    for layer, each in constants.items():
        given = (nothing if x is None else x.cpu() for x in (each.conv, each.bias, each.skip))
        port.send(Constants(epoch, 0, layer, *given))


def check_heads(spec: LayerSpec, spans: int, routes: Mapping[Replies, Sequence[Route]]) -> None:
    """Raise HolderFault where holders do not have every head of each of so many spans. spec: of any of the layers."""
    there: list[set[int]] = [set() for _ in range(spans)]
    for routed in routes.values():
        for route in routed:
            there[route.source].update(route.heads)
    for source, heads in enumerate(there):
        if len(heads) < spec.heads:
            head = min(set(range(spec.heads)) - heads)
            raise HolderFault(f"no holder has the state of head {head} for span {source}, it needs all {spec.heads}")


def _pieces(spec: LayerSpec, parts: Iterable[tuple[int, int, tuple[int, ...]]]) -> list[Piece]:
    """Parts, each of a first token, a number of tokens and heads, as few pieces in their order."""
    pieces: list[Piece] = []
    same: tuple[int, ...] = ()
    for first, count, heads in parts:
        if pieces and heads == same and pieces[-1].tokens.stop == first:
            pieces[-1] = pieces[-1]._replace(tokens=slice(pieces[-1].tokens.start, first + count))
        else:
            keys = sorted({head // (spec.heads // spec.key_heads) for head in heads})
            q, k = (_slices(keys, spec.d_k, at * spec.key_heads * spec.d_k) for at in range(2))
            v = _slices(heads, spec.d_v, 2 * spec.key_heads * spec.d_k)
            pieces.append(Piece(slice(first, first + count), (*q, *k, *v), _slices(heads, 1, 0), len(heads)))
        same = heads
    return pieces


def _slices(numbers: Sequence[int], width: int, begin: int) -> tuple[slice, ...]:
    """Where these, each `width` wide, stand from `begin` on; neighbours are one slice."""
    found: list[slice] = []
    for number in numbers:
        at = begin + number * width
        if found and found[-1].stop == at:
            found[-1] = slice(found[-1].start, at + width)
        else:
            found.append(slice(at, at + width))
    return tuple(found)
