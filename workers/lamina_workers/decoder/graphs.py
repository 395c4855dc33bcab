"""A decoder's work between two attentions, recorded once as graphs or compiled: wrapped around it from outside.

A graph is launched at once where its kernels would be launched one by one. It is made for a number of tokens, so a
small batch, as in decoding, is padded to the next bucket; a larger one runs as without graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from lamina_workers.decoder.choices import Rotation
from lamina_workers.decoder.model import Batch, Decoder, Forward
from lamina_workers.decoder.moe import Experts
from lamina_workers.decoder.shard import Collective

logger = logging.getLogger("lamina")

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Tokens of a batch that graphs are made for; the largest is about what the scheduler lets decode at once."""

WARMUPS = 2  # runs before recording: libraries choose their algorithms and take their workspace in the first

Tensors = tuple[torch.Tensor, ...]
Work = Callable[[], Tensors]


def bucket(tokens: int, buckets: Sequence[int] = BUCKETS) -> int | None:
    """The smallest bucket that holds so many tokens; None where none does, or there are none."""
    return next((size for size in buckets if 0 < tokens <= size), None)


class Recorder(Protocol):
    """Makes the graphs of one run at a time. They share memory, and are launched in the order of layers."""

    def record(self, work: Work) -> tuple[Callable[[], None], Tensors]:
        """Run `work`, which only reads and writes tensors that stay where they are, and record it. What launches it
        again, and the tensors in which its results then are."""


class CudaGraphs:
    """On a GPU. None of this has been run on one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, work: Work) -> tuple[Callable[[], None], Tensors]:
        stream, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                work()
            # Not `torch.cuda.graph`, which waits for the whole device. thread_local: what other threads do is theirs.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                results = work()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        self._pool = graph.pool()
        graph.replay()
        return graph.replay, results


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Where the graphs of one bucket read: hidden `[B, hidden_size]`, rotation `[B, d / 2]` twice, attended
    `[B, heads * d_v]`."""

    hidden: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor]
    attended: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Graph:
    launch: Callable[[], None]
    results: Tensors

    def first(self, tokens: int) -> Tensors:
        """The results without the padding. They stay until the graph is launched again."""
        return tuple(x[:tokens] for x in self.results)


class _Around(Decoder):
    """A decoder around another one: it does some steps in its own way."""

    def __init__(self, decoder: Decoder) -> None:
        self.__dict__.update(vars(decoder))
        self._plain = decoder
        self._spans = {False: None}  # the other one's would go past what is done here in another way

    @property
    def _collective(self) -> Collective | None:
        return self._plain._collective

    @_collective.setter
    def _collective(self, collective: Collective | None) -> None:
        self._plain._collective = collective

    def _settled(self, index: int) -> bool:
        """Whether the work after the attention of a layer is the same for all tokens, without other ranks. With experts
        the host must see which have work; and a graph would go on calling a group that was replaced."""
        layer = self._weights.layers[index]
        experts = any(isinstance(weights.mlp, Experts) for weights in layer.mlps)
        return self._collective is None and not experts and layer.state is None


class _Run(_Around):
    """The decoder of one forward pass at a time: its graphs, and the memory they read and write, are its own."""

    def __init__(self, decoder: Decoder, recorder: Recorder, buckets: Sequence[int]) -> None:
        super().__init__(decoder)
        self._recorder = recorder
        self._buckets = buckets
        self._inputs: dict[int, _Inputs] = {}
        self._graphs: dict[tuple[str, int, int], _Graph] = {}  # by slice, layer and bucket
        self._rotation: Rotation = None  # whose angles stand in the inputs

    def begin(self) -> None:
        """Another batch, at other positions."""
        self._rotation = None

    def _before_attention(
        self, index: int, hidden: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self._from_hidden("before", self._plain._before_attention, index, hidden, rotation)
        return q, k, v

    def _before_query(self, index: int, hidden: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        q, normed = self._from_hidden("query", self._plain._before_query, index, hidden, rotation)
        return q, normed

    def _from_hidden(
        self,
        part: str,
        plain: Callable[[int, torch.Tensor, Rotation], Tensors],
        index: int,
        hidden: torch.Tensor,
        rotation: Rotation,
    ) -> Tensors:
        """The results of a slice that reads what enters a layer: by its graph where there can be one."""
        size = bucket(len(hidden), self._buckets)
        if size is not None:
            inputs = self._filled(size, hidden, rotation)
            work = partial(plain, index, inputs.hidden, rotation and inputs.rotation)
            if (graph := self._launched(part, index, size, work)) is not None:
                return graph.first(len(hidden))
        return plain(index, hidden, rotation)

    def _keys_values(self, index: int, normed: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        size = bucket(len(normed), self._buckets)
        if size is not None:
            inputs = self._inputs_of(size)
            # `normed` is in what the query's graph gives, and the angles are where q had them.
            _, all_normed = self._graphs["query", index, size].results
            work = partial(self._plain._keys_values, index, all_normed, rotation and inputs.rotation)
            if (graph := self._launched("keys", index, size, work)) is not None:
                k, v = graph.first(len(normed))
                return k, v
        return self._plain._keys_values(index, normed, rotation)

    def _after_attention(self, index: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        size = bucket(len(hidden), self._buckets)
        if size is None or not self._settled(index):
            return self._plain._after_attention(index, hidden, attended)
        inputs, tokens = self._inputs_of(size), len(hidden)
        inputs.hidden[:tokens] = hidden
        inputs.attended[:tokens] = attended.flatten(1)

        def work() -> Tensors:
            return (self._plain._after_attention(index, inputs.hidden, inputs.attended),)

        graph = self._launched("after", index, size, work)
        if graph is None:
            return self._plain._after_attention(index, hidden, attended)
        (result,) = graph.first(tokens)
        return result

    def _launched(self, part: str, index: int, size: int, work: Work) -> _Graph | None:
        """The graph of a slice, which has just run; None where none can be recorded: from then on none is tried."""
        graph = self._graphs.get((part, index, size))
        if graph is not None:
            graph.launch()
            return graph
        try:
            graph = self._graphs[part, index, size] = _Graph(*self._recorder.record(work))
        except RuntimeError as error:  # torch has no narrower one for it
            logger.warning("no graph of %d tokens can be recorded, so none is used: %s", size, error)
            self._graphs.clear()
            self._buckets = ()
        return graph

    def _filled(self, size: int, hidden: torch.Tensor, rotation: Rotation) -> _Inputs:
        """The inputs of the graphs of a bucket, with what enters a layer."""
        inputs, tokens = self._inputs_of(size), len(hidden)
        inputs.hidden[:tokens] = hidden
        if rotation is not None and rotation is not self._rotation:
            for place, angles in zip(inputs.rotation, rotation, strict=True):
                place[:tokens] = angles
            self._rotation = rotation
        return inputs

    def _inputs_of(self, size: int) -> _Inputs:
        inputs = self._inputs.get(size)
        if inputs is None:
            config = self.config

            def zeros(width: int, dtype: torch.dtype) -> torch.Tensor:
                return torch.zeros(size, width, dtype=dtype, device=self.device)

            half = config.rotary_dim // 2
            inputs = self._inputs[size] = _Inputs(
                hidden=zeros(config.hidden_size * (2 if config.family.mixers == "both" else 1), self.dtype),
                rotation=(zeros(half, torch.float32), zeros(half, torch.float32)),
                attended=zeros(config.num_attention_heads * config.v_head_dim, self.dtype),
            )
        return inputs


class Captured(_Around):
    """A decoder whose slices are recorded as graphs, for each number of tokens in `buckets` when it first occurs.

    Forward passes that are under way at the same time, in several lanes, have graphs each. `recorder` makes the
    recorder of one of them.
    """

    def __init__(
        self, decoder: Decoder, recorder: Callable[[], Recorder] | None = None, buckets: Sequence[int] = BUCKETS
    ) -> None:
        super().__init__(decoder)
        self._recorder = recorder or (lambda: CudaGraphs(decoder.device))
        self._buckets = buckets
        self._idle: list[_Run] = []

    def forward(
        self,
        batch: Batch,
        hidden: torch.Tensor | None = None,
        first_layer: int = 0,
        attended: torch.Tensor | None = None,
        query_first: bool = False,
    ) -> Forward:
        run = self._idle.pop() if self._idle else _Run(self._plain, self._recorder(), self._buckets)
        run.begin()
        try:
            logits = yield from run.forward(batch, hidden, first_layer, attended, query_first)
        finally:
            self._idle.append(run)
        return logits


def sliced(decoder: Decoder) -> Decoder:
    """The decoder in the way that is fastest on its device: recorded on a GPU."""
    return Captured(decoder) if decoder.device.type == "cuda" else decoder
