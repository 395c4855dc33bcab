"""A model with layers of two shapes, so that a holder has two pools, and its attention by the definition."""

from __future__ import annotations

import dataclasses

import torch

from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.pools import pools

NEAR = LayerSpec(kv_layer=0, heads=8, kv_heads=4, d_k=16, d_v=16, scale=0.3, window=40)
FULL = LayerSpec(kv_layer=0, heads=4, kv_heads=2, d_k=32, d_v=32, scale=0.2)
SIZE = 16
PAGES = 96, 48  # of each pool: a sequence takes as many bytes in both, in pages of which one are twice as large


def two_pools(window: int | None = 40, pages: int = PAGES[0]) -> HolderConfig:
    """Three layers of the one shape, of which the last reads the KV of the second, and two of the other."""
    layers = (NEAR, NEAR, FULL, NEAR, FULL)
    specs = [dataclasses.replace(spec, kv_layer=1 if n == 3 else n) for n, spec in enumerate(layers)]
    specs = [dataclasses.replace(spec, window=window) if spec.kv_heads == 4 else spec for spec in specs]
    return HolderConfig(tuple(specs), SIZE, "float32", 2 * pages * SIZE * 2 * NEAR.d_k * 4)


def pool_numbers(config: HolderConfig) -> list[int]:
    """Of each layer, the number of its pool."""
    where = {n: number for number, pool in enumerate(pools(config)) for n in pool.layers}
    return [where[n] for n in range(len(config.layers))]


def attend(
    spec: LayerSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, read: tuple[int, int], lo: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q `[n, heads, d_k]` at positions from `start` on over keys [read), of which k and v `[tokens,
    kv_heads, d]` begin at position `lo`: out `[n, heads, d_v]` and lse `[n, heads]`."""
    keys = torch.arange(*read)
    group = q.shape[1] // k.shape[1]
    k, v = (x[keys - lo].repeat_interleave(group, 1) for x in (k, v))
    age = start + torch.arange(len(q))[:, None] - keys
    seen = (age >= 0) & (age < (spec.window or 1 << 30))
    logits = torch.einsum("nhd,khd->nhk", q, k) * spec.scale
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("nhk,khd->nhd", logits.softmax(-1).nan_to_num(0.0), v), logits.logsumexp(-1)
