"""Attention over latents as a config.json describes it, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lamina_workers.decoder.config_keys import Keys
from lamina_workers.decoder.rope_keys import RopeConfig, scaled_attention
from lamina_workers.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): k and v of all heads are linear in one vector of
    `rank` numbers, the latent, but for `rotary` more numbers of k, which are rotated and shared by all heads.

    `query_rank`: of the vector that queries are made of; 0: of the residual stream. A head of q and k has `plain`
    numbers beside the rotated ones, a head of v has `value`.
    """

    query_rank: int
    rank: int
    plain: int
    rotary: int
    value: int


def read_latent(keys: Keys, hidden: int) -> LatentConfig:
    """The latents of a model whose residual stream has `hidden` numbers."""
    if keys.flag("attention_bias", False):
        raise UnsupportedModelError("attention_bias is not supported for latent attention; supported: false")
    value = hidden // keys.integer("num_attention_heads", 1, 4096)  # MiniCPM3 leaves it out
    return LatentConfig(
        query_rank=keys.integer("q_lora_rank", 1, 1 << 16) if keys.given("q_lora_rank") else 0,
        rank=keys.integer("kv_lora_rank", 16, 1 << 12),
        plain=keys.integer("qk_nope_head_dim", 1, 1024),
        rotary=keys.integer("qk_rope_head_dim", 2, 1024),
        value=keys.integer("v_head_dim", 1, 1024, default=value),
    )


def latent_scale(latent: LatentConfig, rope: RopeConfig) -> float:
    """What multiplies q.k: with RoPE that is scaled, and `mscale_all_dim`, YaRN's factor for longer contexts too."""
    mscale = scaled_attention(rope.factor, rope.mscale_all_dim) if rope.kind != "default" else 1.0
    return float(mscale**2 / math.sqrt(latent.plain + latent.rotary))
