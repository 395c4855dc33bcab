"""What attention projects, as heads: normed as a family does it, and rotated."""

from __future__ import annotations

import torch

from lamina_kernels.dense.dense import rms_norm, split_heads
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.decoder_weights import MixerWeights
from lamina_workers.decoder.index import beside
from lamina_workers.decoder.latent import LatentAttention, Rotation, query_rows


def project(
    config: ModelConfig, layer: MixerWeights, normed: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q `[T, heads, query_width]`, k `[T, kv_heads, key_width]` and v `[T, kv_heads, d_v]` of the normed residual
    stream, `[T, hidden_size]`, with what the layer's index has of it."""
    projected = layer.qkv(normed)
    q, k, v = split(config, layer, projected, config.num_attention_heads, config.num_key_value_heads, rotation)
    if layer.index is not None:
        q, k = beside(q, k, *layer.index(normed, projected, rotation))
    return q, k, v


def split(
    config: ModelConfig,
    layer: MixerWeights,
    projected: torch.Tensor,
    heads: int,
    kv_heads: int,
    rotation: Rotation,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q `[T, heads, d_k]`, k `[T, kv_heads, d_k]` and v `[T, kv_heads, d_v]` from what `layer` projects of them, side
    by side. Either number of heads may be 0."""
    if layer.latent is not None:
        return _over_latents(layer.latent, projected, heads, kv_heads, rotation)
    kind, norms, eps = config.family.qk_norm, layer.qk_norms, config.rms_norm_eps
    d, d_v = config.head_dim, config.v_head_dim
    if norms is None or kind == "head":
        return split_heads(projected, heads, kv_heads, rotation, norms, eps, d_v)
    if kind == "whole":
        q, k, v = projected.split((heads * d, kv_heads * d, kv_heads * d_v), -1)
        pairs = zip((q, k), norms, strict=True)
        normed = [rms_norm(x.contiguous(), weight, eps) if x.shape[1] else x for x, weight in pairs]
        return split_heads(torch.cat([*normed, v], -1), heads, kv_heads, rotation, d_v=d_v)
    q, k, v = split_heads(projected, heads, kv_heads, rotation, d_v=d_v)
    pairs = zip((q, k), norms, strict=True)
    q, k = (rms_norm(x.flatten(0, 1), weight, eps).view_as(x) if x.numel() else x for x, weight in pairs)
    return q, k, v


def _over_latents(
    latent: LatentAttention,
    projected: torch.Tensor,
    heads: int,
    kv_heads: int,
    rotation: Rotation,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v; without `heads` no q, without `kv_heads` no k, and no v either way."""
    first = query_rows(latent.config, heads) if heads else 0
    none = projected.new_empty(len(projected), kv_heads, 0)
    q = latent.queries(projected[:, :first], rotation) if heads else none
    return q, latent.keys(projected[:, first:], rotation) if kv_heads else none, none
