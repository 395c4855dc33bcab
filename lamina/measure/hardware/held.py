"""Sequences of random KV at holders, and decode batches over them: what an engine does of a step, without an engine.

Knows messages, ports and the resolver. A batch is announced as the engine announces it, then a forward pass is driven
over it; which pass, the caller says: the model's own, or one that only asks attention.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch

from lamina.errors import EngineError
from lamina_protocols.messages import Announced, Announcement, Close, Fresh, HolderConfig, LayerSpec, Open, Row
from lamina_protocols.routes import Route, Span
from lamina_workers.decoder.model import Forward, KeyValueReady, QueryReady
from lamina_workers.model_worker.attention_merge import AttentionMerge
from lamina_workers.ports.port import AttentionPort, Replies

PATIENCE = 60.0  # seconds for an announcement's answer
ROOM = 1 << 20  # tokens up to which a sequence might grow; takes no memory by itself
_CHUNK = 1024  # tokens whose KV is stored at a time, as a prefill does
_EPOCH = 1


class Seconds(NamedTuple):
    """One batch: until all holders had accepted it, and until its forward pass was through."""

    announce: float
    run: float


class Held:
    """Sequences at the holders of `ports`, each of which keeps the KV heads `heads[number]` of all of them.

    `fused`: the one holder is in this process and attends a row's own token too. KV is `dtype`, as the queries are.
    """

    def __init__(
        self,
        config: HolderConfig,
        ports: Mapping[int, AttentionPort],
        heads: Mapping[int, tuple[int, ...]],
        *,
        fused: bool,
        dtype: torch.dtype,
        threads: int,
    ) -> None:
        self._config = config
        self._replies = {number: Replies(port) for number, port in ports.items()}
        self._heads = heads
        self._fused = fused
        self._dtype = dtype
        self._resolver = AttentionMerge(config, threads)
        self._batch = 0
        self._handles = 0
        self._told = dict.fromkeys(ports, 0)  # operations
        self._sequences: list[int] = []
        self._length = 0

    def fill(self, batch: int, context: int) -> None:
        """Keep `batch` sequences of `context` tokens, in the place of those that were there."""
        self.drop()
        spec = self._config.layers[0]
        for _ in range(batch):
            self._handles += 1
            opened = Open(self._handles, (), 0, context + ROOM)
            for start in range(0, context, _CHUNK):
                count = min(_CHUNK, context - start)
                self._announce((opened,) if not start else (), [Row(self._handles, start, count, None, True)])
                k = torch.randn(count * spec.kv_heads, spec.d_k).to(self._dtype)
                v = torch.randn(count * spec.kv_heads, spec.d_v).to(self._dtype)
                for layer in range(len(self._config.layers)):
                    for number, heads in self._heads.items():
                        n = count * len(heads)
                        self._replies[number].port.send(Fresh(_EPOCH, self._batch, layer, k[:n], v[:n]))
                self._forget()
            self._sequences.append(self._handles)
        self._length = context

    def drop(self) -> None:
        """Let all sequences go."""
        if self._sequences:
            self._announce(tuple(Close(handle) for handle in self._sequences), [])
            self._forget()
            self._sequences = []

    def step(self, forward: Forward) -> Seconds:
        """One token more for each sequence, by a forward pass that has not begun."""
        start, end = self._length, self._length + 1
        read = (0, end if self._fused else start)
        began = time.perf_counter()
        rows = [Row(handle, start, 1, read, True, True) for handle in self._sequences]
        self._announce((), rows)
        announced = time.perf_counter()
        routes = {
            self._replies[number]: [Route(at, heads, row, (start, end)) for at, row in enumerate(rows)]
            for number, heads in self._heads.items()
        }
        run = self._resolver.run(forward, _EPOCH, self._batch, [Span(start, 1)] * len(rows), routes, False)
        try:
            next(run)
        except StopIteration:
            done = time.perf_counter()
        else:
            raise EngineError("a forward pass was suspended that should have waited")
        self._forget()
        self._length = end
        return Seconds(announced - began, done - announced)

    def _announce(self, operations: tuple[Open | Close, ...], rows: list[Row]) -> None:
        self._batch += 1
        for number, replies in self._replies.items():
            told = tuple(
                Open(each.handle, self._heads[number], each.lo, each.hi) if isinstance(each, Open) else each
                for each in operations
            )
            replies.expect(_EPOCH, self._batch)
            replies.port.send(Announcement(_EPOCH, self._batch, self._told[number], told, tuple(rows)))
        for number, replies in self._replies.items():
            answer = replies.take(Announced, self._batch, timeout=PATIENCE)
            if not answer.accepted:
                raise EngineError(f"{replies.port.name} has no room: {answer.reason}")
            self._told[number] += len(operations)

    def _forget(self) -> None:
        for replies in self._replies.values():
            replies.forget(self._batch)


def attention_alone(layers: tuple[LayerSpec, ...], batch: int, dtype: torch.dtype) -> Forward:
    """A forward pass of `batch` tokens that has no dense layers: it asks the same of every layer's attention."""
    spec = layers[0]
    q = torch.randn(batch, spec.heads, spec.d_k).to(dtype)
    k, v = torch.randn(batch, spec.kv_heads, spec.d_k).to(dtype), torch.randn(batch, spec.kv_heads, spec.d_v).to(dtype)

    def run() -> Forward:
        for layer in range(len(layers)):
            yield QueryReady(layer, q)
            yield KeyValueReady(layer, k, v)
        return q

    return run()
