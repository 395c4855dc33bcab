"""Shared by the tests of policies: one attention worker and sequences of given queries, keys and values, beside what
attention by its definition makes of them; and the tiny decoder under a policy."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import (
    Announced,
    Announcement,
    Attended,
    Close,
    Fork,
    Fresh,
    Open,
    Operation,
    Query,
    Row,
    Sample,
    Usage,
)
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.page_layout import page_cost
from lamina_workers.decoder.model import Decoder

LAYERS, KV_HEADS, GROUP, D, PAGE = 2, 3, 2, 16, 16
HEADS = KV_HEADS * GROUP
SCALE = 0.25
TOKEN_BYTES = 2 * D * 4  # of float32, in one layer and KV head


TIGHT = {
    "full": "full",
    "streaming": "streaming(sink=16, recent=40)",
    "span": "span(alpha=40, beta=0.1)",
    "sharded": "sharded(block=16, local=2, stride=3)",
    "dilated": "dilated(block=16, sink=16, local=2, reach=6, dilation=2)",
    "retrieval": "retrieval(sink=16, recent=16, missed=0.02)",
    "page_top_k": "page_top_k(sink=16, recent=16, budget=0.1, least=1)",
    "recycled": "recycled(sink=16, recent=16, budget=0.1, every=20)",
    "heavy_hitter": "heavy_hitter(sink=16, recent=16, budget=0.1, every=3)",
    "razor": "razor(sink=16, recent=40, share=0.05)",
}
LOOSE = {
    "full": "full",
    "streaming": "streaming(sink=0, recent=10000)",
    "span": "span(alpha=10000)",
    "sharded": "sharded(block=64, local=1000, stride=1)",
    "dilated": "dilated(local=1000, reach=1000)",
    "retrieval": "retrieval(missed=0, coarse=0)",
    "page_top_k": "page_top_k(sink=0, recent=1, budget=1)",
    "recycled": "recycled(sink=0, recent=1, budget=1)",
    "heavy_hitter": "heavy_hitter(sink=0, recent=1, budget=1)",
    "razor": "razor(sink=0, recent=10000)",
}
STATIC = {  # whether KV head h of the query at p sees key k <= p, written down a second time
    "full": lambda h, p, k: k >= 0,
    "streaming": lambda h, p, k: (k < 16) | (p - k < 40),
    "span": lambda h, p, k: (k < 64) | (p - k < 40 + (0.1 * (p // 64 * 64)).long()),
    "sharded": lambda h, p, k: (p // 16 - k // 16 < 2) | ((k // 16 + h) % 3 == 0),
    "dilated": lambda h, p, k: (
        (k < 16) | (p // 16 - k // 16 < 2) | ((p // 16 - k // 16 < 6) & ((p // 16 - k // 16) % 2 == 0))
    ),
}


class Bench:
    """A worker whose heads all have one policy, or each its own. Every batch is one row, which fuses. `others`: fields
    of the `HolderConfig`."""

    def __init__(self, *policies: str, dtype: str = "float32", pages: int = 2400, **others: Any) -> None:
        texts = policies if len(policies) == KV_HEADS else policies * KV_HEADS
        spec = LayerSpec(0, HEADS, KV_HEADS, D, D, SCALE, policies=texts)
        layers = tuple(dataclasses.replace(spec, kv_layer=layer) for layer in range(LAYERS))
        config = HolderConfig(layers, PAGE, dtype, 1, **others)
        self.worker = AttentionWorker(dataclasses.replace(config, kv_memory=pages * page_cost(config)))
        self.k: dict[int, torch.Tensor] = {}  # by handle: [layers, tokens, heads, d]
        self.v: dict[int, torch.Tensor] = {}
        self.generator = torch.Generator().manual_seed(5)
        self._lo: dict[int, int] = {}
        self._operations: list[Operation] = []
        self._told = self._batch = self._last = 0
        self._usages: dict[int, Usage] = {}

    def open(self, lo: int = 0) -> int:
        """A new sequence, or the part of one from position `lo` on."""
        handle = self._new(lambda handle: Open(handle, 0, tuple(range(KV_HEADS)), lo, 1 << 20), None, 0)
        self._lo[handle] = lo
        self.k[handle], self.v[handle] = torch.zeros(2, LAYERS, lo, KV_HEADS, D)  # are elsewhere
        return handle

    def fork(self, parent: int, length: int) -> int:
        handle = self._new(lambda handle: Fork(handle, parent, length), parent, length)
        self._lo[handle] = self._lo[parent]
        return handle

    def close(self, handle: int) -> None:
        self._operations.append(Close(handle))
        self._announce(())

    def take_back(self) -> None:
        """The worker refused the last announcement."""
        self._operations.clear()

    def _new(self, operation: Any, parent: int | None, length: int) -> int:
        self._last += 1
        self._operations.append(operation(self._last))
        none = torch.empty(LAYERS, 0, KV_HEADS, D)
        self.k[self._last] = none if parent is None else self.k[parent][:, :length]
        self.v[self._last] = none if parent is None else self.v[parent][:, :length]
        return self._last

    def random(self, n: int, heads: int = KV_HEADS) -> torch.Tensor:
        return torch.randn(LAYERS, n, heads, D, generator=self.generator)

    def prefill(self, handle: int, n: int, chunk: int = 400, **given: torch.Tensor) -> torch.Tensor:
        """n tokens in chunks; out `[layers, n, heads, d]`."""
        start = self.k[handle].shape[1]
        pieces = [
            self.feed(
                handle,
                first,
                min(chunk, n - first + start),
                prompt=start + n,
                **{x: t[:, first - start :] for x, t in given.items()},
            )
            for first in range(start, start + n, chunk)
        ]
        return torch.cat(pieces, 1)

    def step(self, handle: int, **given: torch.Tensor) -> torch.Tensor:
        """One decode step; out `[layers, heads, d]`."""
        return self.feed(handle, self.k[handle].shape[1], 1, True, **given)[:, 0]

    def feed(
        self, handle: int, start: int, count: int, chooses: bool = False, prompt: int = 0, **given: torch.Tensor
    ) -> torch.Tensor:
        """A row of `count` tokens at `start`, where it cuts back; q, k, v `[layers, count or more, heads, d]`, else
        random. It is of a prompt of so many tokens, 0: of none."""
        k, v = (given[x][:, :count] if x in given else self.random(count) for x in ("k", "v"))
        q = given["q"][:, :count] if "q" in given else self.random(count, HEADS)
        self.q = q
        self._announce((Row(handle, start, count, (self._lo[handle], start + count), True, chooses, prompt),))
        self.k[handle] = torch.cat([self.k[handle][:, :start], k], 1)
        self.v[handle] = torch.cat([self.v[handle][:, :start], v], 1)
        outs = []
        for layer in range(LAYERS):
            self.worker.handle(Fresh(1, self._batch, layer, k[layer].reshape(-1, D), v[layer].reshape(-1, D)))
            reply = self.worker.handle(Query(1, self._batch, layer, q[layer].reshape(-1, D)))
            assert isinstance(reply, Attended)
            outs.append(reply.out.reshape(count, HEADS, D).clone())  # a device worker uses its memory again
        return torch.stack(outs)

    def store(self, handle: int, n: int, k: torch.Tensor, q: torch.Tensor, chunk: int = 400) -> None:
        """A prompt of n tokens that is attended elsewhere, in chunks: of its queries come those that the worker asks
        for, after k and v of the layer."""
        v = self.random(n)
        for start in range(0, n, chunk):
            at = slice(start, min(start + chunk, n))
            self._announce((Row(handle, start, at.stop - start, None, True, prompt=n),))
            for layer in range(LAYERS):
                vectors = (x[layer, at].reshape(-1, D) for x in (k, v))
                self.worker.handle(Fresh(1, self._batch, layer, *vectors))
                if self.samples:
                    self.worker.handle(self.sample(handle, layer, q, at, self.samples[0]))
        self.k[handle], self.v[handle] = k, v

    def sample(self, handle: int, layer: int, q: torch.Tensor, at: slice, stride: int) -> Sample:
        """The sample of a row of all heads, at the positions `at`."""
        positions = range(-(-at.start // stride) * stride, at.stop, stride)
        vectors = q[layer, list(positions)].reshape(-1, D).bfloat16()
        return Sample(1, self._batch, layer, handle, tuple(range(KV_HEADS)), tuple(positions), vectors)

    def _announce(self, rows: tuple[Row, ...]) -> None:
        self._batch += 1
        operations, self._operations = tuple(self._operations), []
        reply = self.worker.handle(Announcement(1, self._batch, self._told, operations, rows))
        assert isinstance(reply, Announced)
        assert reply.accepted, reply.reason
        self._told += len(operations)
        self.floors, self.samples = reply.floors, reply.samples
        self._usages.update({row.handle: usage for row, usage in zip(rows, reply.usages, strict=False)})
        self.worker.store.check_integrity()

    def usage(self, handle: int) -> Usage:
        """What a part has read up to now. Usage comes with the next row, so the last token is fed again."""
        self.feed(handle, self.k[handle].shape[1] - 1, 1)
        return self._usages[handle]

    def dense(self, handle: int, seen: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of the last queries over the keys that `seen`, bool `[n, keys]`, `[layers, heads, keys]` or
        `[layers, heads, n, keys]`, lets through, in float64; all that are not later without it. `[layers, n, heads,
        d]`, or without n."""
        keys = self.k[handle].shape[1]
        n = self.q.shape[1]
        if seen is None:
            seen = torch.arange(keys) <= torch.arange(keys - n, keys)[:, None]
        mask = seen[:, :, None] if seen.ndim == 3 else seen[(None,) * (4 - seen.ndim)]
        weights = self.logits(handle).masked_fill(~mask, -torch.inf).softmax(-1)
        out = torch.einsum("lhnk,lkhd->lnhd", weights, self.v[handle].double().repeat_interleave(GROUP, 2)).float()
        return out[:, 0] if seen.ndim == 3 else out

    def logits(self, handle: int) -> torch.Tensor:
        """Of the last queries and all keys, float64 `[layers, heads, n, keys]`."""
        k = self.k[handle].double().repeat_interleave(GROUP, 2)
        return torch.einsum("lnhd,lkhd->lhnk", self.q.double(), k) * SCALE


def peaked(bench: Bench, handle: int, n: int, near: Sequence[int]) -> dict[str, torch.Tensor]:
    """Keys and values of n tokens: small ones, but for those on the pages `near`, which point where `towards` does."""
    k, v = bench.random(n) * 0.3, bench.random(n)
    for page in near:
        k[:, page * PAGE : (page + 1) * PAGE] += towards(0)
    return {"k": k, "v": v}


def towards(number: int, strength: float = 3.0) -> torch.Tensor:
    """A direction, `[d]`: the same one for each number, and one at a right angle for another."""
    direction = torch.zeros(D)
    direction[2 * number : 2 * number + 2] = strength
    return direction


def pages_held(bench: Bench, handle: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How many pages each layer and head of a part holds."""
    return (bench.worker.store.part(handle).table >= 0).sum(2)


class _Policied:
    """A model's config whose layers have policies."""

    def __init__(self, config: Any, policies: tuple[str, ...]) -> None:
        self._config = config
        self._policies = policies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        return tuple(dataclasses.replace(spec, policies=self._policies) for spec in self._config.layer_specs())


def under(decoder: Decoder, *policies: str) -> Decoder:
    """The decoder, all of whose heads have that policy, or each its own."""
    changed = copy.copy(decoder)
    heads = decoder.config.num_key_value_heads
    changed.config = _Policied(decoder.config, policies if len(policies) == heads else policies * heads)  # type: ignore[assignment]  # it has what a config has
    return changed


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def kept_of_razor(length: int, sink: int = 16, recent: int = 40, share: float = 0.05) -> tuple[int, int]:
    """Of a decode step at position `length`: the tokens [first, end) for which the mean stands."""
    lowest = length - max(recent, int(share * length)) + 1
    first = -(-sink // PAGE) * PAGE
    return first, max(first, lowest // PAGE * PAGE)


def razor_dense(bench: Bench, handle: int, gap: tuple[int, int], lo: int = 0) -> torch.Tensor:
    """Attention of the last queries over the keys from `lo` on, with the mean of [first, end) and its ln n instead of
    these: `[layers, n, heads, d]`."""
    first, end = gap
    k, v = (x.repeat_interleave(GROUP, 2).double() for x in (bench.k[handle], bench.v[handle]))
    n, keys = bench.q.shape[1], k.shape[1]
    kept = [*range(lo, first), *range(end, keys)]
    logits = bench.logits(handle).masked_fill(torch.arange(keys) > torch.arange(keys - n, keys)[:, None], -torch.inf)
    mean_k, mean_v = k[:, first:end].mean(1), v[:, first:end].mean(1)
    slot = torch.einsum("lnhd,lhd->lhn", bench.q.double(), mean_k) * SCALE + math.log(end - first)
    weights = torch.cat([logits[..., kept], slot[..., None]], -1).softmax(-1)
    return torch.einsum("lhnk,lkhd->lnhd", weights, torch.cat([v[:, kept], mean_v[:, None]], 1)).float()
