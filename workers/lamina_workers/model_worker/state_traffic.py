"""Between the model and the holders of states: inputs of a layer in, what was read of its states out.

A holder has some heads of some sequences; states are never cut by positions. It takes a row's inputs of its heads and
their key heads, and answers with its heads' outputs. One message a layer goes each way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch

from lamina_kernels.states.advance import StateWork
from lamina_kernels.states.operands import StateConstants
from lamina_protocols.messages.layers import LayerSpec
from lamina_protocols.messages.messages import Advance, Advanced, Constants
from lamina_protocols.messages.routes import Route, Span
from lamina_workers.decoder.model import StateReady
from lamina_workers.devices.staging import DIRECT, Staging
from lamina_workers.errors import HolderFault
from lamina_workers.model_worker.holder_traffic import HolderTraffic, check_answer, index_of, vectors_of
from lamina_workers.model_worker.interface import Suspended, Waiting
from lamina_workers.ports.port import AttentionPort, Replies
from lamina_workers.ports.timing import Stopwatch, Times

_SLOWEST = 1e8  # multiplications and additions a second that any holder is trusted to do
_STEPS = 4  # of them that a token does with each number of a state


def state_traffic(
    spec: LayerSpec,
    staging: Staging,
    direct: bool,
    patience: float,
    replies: Replies,
    spans: Sequence[Span],
    routes: Sequence[Route],
) -> HolderTraffic:
    """The traffic of a batch of `spans` with the holder of `routes`, in the layers of a pool of states: `queries` are
    indices into vectors of x (`LayerSpec.widths`), `fresh` into gates and outputs. Arguments as of `holder_traffic`."""
    first = list(accumulate((span.count for span in spans), initial=0))
    parts = tuple((first[route.source], route.row.count, route.heads) for route in routes)
    x, heads = _vectors(spec, parts, first[-1])
    count = sum(tokens * len(of_part) for _, tokens, of_part in parts)
    return HolderTraffic(
        replies=replies,
        way=DIRECT if direct else staging,
        here=replies.here is not None,
        reads=True,
        stores=True,
        fused=True,
        queries=staging.index(x),
        rounds=(slice(0, count),),
        fresh=staging.index(heads),
        timeout=patience + count * _STEPS * spec.d_k * spec.d_v / _SLOWEST,
    )


@lru_cache(maxsize=128)  # in decode batches ask for the same again and again
def _vectors(
    spec: LayerSpec, parts: tuple[tuple[int, int, tuple[int, ...]], ...], tokens: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The indices `queries` and `fresh` of a `HolderTraffic`. Each part is a route: its first token in the batch, how
    many tokens, its heads."""
    unit, (in_token, _), x, gates = spec.widths[0], spec.vectors, [], []
    per_key, per_value = spec.d_k // unit, spec.d_v // unit
    for first, count, part_heads in parts:
        heads = np.array(part_heads)
        keys = np.unique(heads // (spec.heads // spec.key_heads))
        q, k = ((keys[:, None] + n * spec.key_heads) * per_key + np.arange(per_key) for n in range(2))
        v = 2 * spec.key_heads * per_key + heads[:, None] * per_value + np.arange(per_value)
        columns = np.concatenate([q.reshape(-1), k.reshape(-1), v.reshape(-1)])
        x.append(vectors_of(first, first + count, columns, in_token))
        gates.append(vectors_of(first, first + count, heads, spec.heads))
    return index_of(x, tokens * in_token), index_of(gates, tokens * spec.heads)


class StateExchange:
    """A batch at all holders of one pool of states, one layer after the other; counts the time into `times`."""

    def __init__(
        self,
        spec: LayerSpec,
        ids: tuple[int, int],
        holders: Sequence[HolderTraffic],
        times: Times,
        watch: Stopwatch,
        work: StateWork | None = None,
    ) -> None:
        self.work = work
        """What the model can do itself, without messages."""
        self._spec = spec
        self._epoch, self._batch = ids
        # A holder here computes while it is sent to: the others are asked first, and compute meanwhile.
        self.holders = sorted(holders, key=lambda holder: holder.here)
        self._times = times
        self._watch = watch

    def advance(self, state: StateReady, suspends: bool) -> Suspended:
        """What the states give for the inputs of a layer: `[T, heads * d_v]`. Raises HolderFault, HolderLost."""
        tokens, start, spec = len(state.x), time.perf_counter(), self._spec
        x, gates = state.x.reshape(-1, spec.widths[0]), state.gates.flatten(0, 1)
        for holder in self.holders:
            parts = holder.way.down(x, holder.queries), holder.way.down(gates, holder.fresh)
            holder.way.landed()
            holder.replies.asked(self._batch)
            flat = (part.reshape(-1) for part in parts)
            holder.replies.port.send(Advance(self._epoch, self._batch, state.layer, *flat))
        joined: torch.Tensor | None = None
        slowest = answered = 0.0
        for holder in self.holders:
            waits = time.perf_counter()
            if suspends and not holder.replies.ready(self._batch):
                self._watch.stop()
                yield Waiting(holder.replies, self._batch)
                self._watch.start()
            reply = holder.replies.take(Advanced, self._batch, state.layer, holder.timeout)
            check_answer(holder.replies, reply.out, (holder.rounds[0].stop, spec.d_v), state.x.dtype)
            out, seconds = holder.way.up(reply.out), reply.seconds
            if holder.here:
                self._times.local += seconds
            else:
                now = time.perf_counter()
                self._times.waited += now - waits
                answered = now - start
                slowest = max(slowest, min(seconds, answered))  # whatever the holder says
            joined = join(joined, out, holder.fresh, tokens * spec.heads)
        self._times.remote += slowest
        self._times.answered += answered
        if joined is None:
            raise HolderFault(f"no attention worker has the states of layer {state.layer}")
        return joined.view(tokens, -1)


def join(joined: torch.Tensor | None, out: torch.Tensor, index: torch.Tensor | None, vectors: int) -> torch.Tensor:
    """`joined` with a holder's answer, whose places `index` has; made first where that is None. None for index: the
    answer has all of them."""
    if index is None:
        return out
    if joined is None:
        joined = out.new_empty(vectors, out.shape[1])
    return joined.index_copy_(0, index, out)


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
            raise HolderFault(f"no worker has the state of head {head} for span {source}, it needs all {spec.heads}")
