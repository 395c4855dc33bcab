"""Layers' own indexes as a config.json describes them, checked once."""

from __future__ import annotations

from lamina_protocols.messages.layers import Index
from lamina_workers.decoder.config_keys import Keys
from lamina_workers.decoder.family import Family
from lamina_workers.errors import ModelFileError, UnsupportedModelError

_NOTHING: tuple[Index | None, tuple[bool, ...]] = (None, ())


def read_index(
    keys: Keys, family: Family, layers: int, kv_heads: int, head_dim: int, rotary: int
) -> tuple[Index | None, tuple[bool, ...]]:
    """The index of a model, None where there is none, and which of its layers have it. `rotary`: how many of a latent's
    numbers are rotated."""
    if family.index == "blocks":
        return _of_blocks(keys, layers, kv_heads, head_dim)
    return _of_tokens(keys, layers, rotary) if family.index == "tokens" else _NOTHING


def _of_blocks(keys: Keys, layers: int, kv_heads: int, head_dim: int) -> tuple[Index | None, tuple[bool, ...]]:
    """MiniMax-M3's: one index query for each KV head, rotated as the queries are."""
    if not keys.given("layer_types"):
        return _NOTHING
    kinds = keys.items("layer_types", ("full_attention", "minimax_m3_sparse"), layers)
    for name, only in (("index_n_heads", kv_heads), ("index_head_dim", head_dim)):
        if (value := keys.integer(name, 1, 4096, default=only)) != only:
            raise UnsupportedModelError(f"{name} {value} is not supported; supported for this model: {only}")
    block, top = (keys.integer(name, 1, 1 << 16) for name in ("index_block_size", "index_topk_blocks"))
    index = Index(head_dim, 1, block, top, keys.integer("index_local_blocks", 0, top, default=1))
    return index, tuple(kind == "minimax_m3_sparse" for kind in kinds)


def _of_tokens(keys: Keys, layers: int, rotary: int) -> tuple[Index, tuple[bool, ...]]:
    """DeepSeek V3.2's: several weighted index queries for all heads, whose first numbers are rotated."""
    if not keys.given("q_lora_rank"):
        raise ModelFileError("q_lora_rank is missing from the model's config, which index queries are made of")
    shared = keys.given("indexer_types") and "shared" in keys.items("indexer_types", ("full", "shared"), layers)
    if shared or keys.given("index_topk_pattern") or keys.integer("index_topk_freq", 0, 1024, default=1) > 1:
        raise UnsupportedModelError(
            "indexer_types 'shared', layers that take over the choice of another, is not supported"
        )
    width = keys.integer("index_head_dim", rotary, 4096)
    index = Index(
        width, keys.integer("index_n_heads", 1, 1024), 1, keys.integer("index_topk", 1, 1 << 16), weighted=True
    )
    return index, (True,) * layers
