"""The tensors of a checkpoint: their names, as Hugging Face models are published, and their shapes."""

from __future__ import annotations

from lamina_protocols.messages.layers import Index
from lamina_workers.decoder.config import ModelConfig
from lamina_workers.decoder.family import Family
from lamina_workers.decoder.latent_config import LatentConfig
from lamina_workers.decoder.state_weights import state_shapes

EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
CHOICE_BIAS = "e_score_correction_bias"  # of a router: beside its weight


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of `config`; stacked experts one by one (see `SeparateExperts`)."""
    hidden, family = config.hidden_size, config.family
    shapes: dict[str, tuple[int, ...]] = {f"{NORM}.weight": (hidden,)}

    def linear(name: str, n_out: int, n_in: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (n_out, n_in)
        if bias:
            shapes[f"{name}.bias"] = (n_out,)

    for name in (EMBEDDING,) if config.tie_word_embeddings else (EMBEDDING, HEAD):
        linear(name, config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        shapes.update({f"{at}.{name}.weight": (hidden,) for name in norm_names(family) if name})
        if "state" in config.mixers[layer]:
            shapes.update(state_shapes(config, layer))
        if "attention" in config.mixers[layer]:
            shapes.update(_attention_shapes(config, layer))
        if config.has_mlp(layer):
            shapes.update(_mlp_shapes(config, layer))
    return shapes


def _mlp_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    (router, mlps), hidden, moe = mlp_names(config, layer), config.hidden_size, config.moe
    shapes: dict[str, tuple[int, ...]] = {}

    def mlp(names: tuple[str, str, str], size: int, bias: bool, width: int = hidden) -> None:
        gate, up, down = names
        for name in filter(None, dict.fromkeys((gate, up))):
            shapes[f"{name}.weight"] = (2 * size if gate == up else size), width
        shapes[f"{down}.weight"] = width, size
        if bias:
            shapes.update({f"{name}.bias": shapes[f"{name}.weight"][:1] for name in names if name})

    if router is None or moe is None:
        mlp(mlps[0], config.intermediate_size, config.mlp_bias)
        return shapes
    shapes[f"{router}.weight"] = moe.experts, hidden
    if moe.bias:
        shapes[f"{router}.bias"] = (moe.experts,)
    if moe.choice.sigmoid:
        shapes[f"{router}.{CHOICE_BIAS}"] = (moe.experts,)
    for names in mlps:
        mlp(names, moe.intermediate_size, moe.bias, moe.latent or hidden)
    if moe.latent:
        for name, of in zip(latent_names(config, layer), ((moe.latent, hidden), (hidden, moe.latent)), strict=True):
            shapes[f"{name}.weight"] = of
            if config.mlp_bias:
                shapes[f"{name}.bias"] = of[:1]
    if moe.shared:
        gate, names = shared_names(config, layer)
        if gate is not None:
            shapes[f"{gate}.weight"] = 1, hidden
        mlp(names, moe.shared, False)
    return shapes


def _latent_shapes(latent: LatentConfig, at: str, heads: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the attention `at` but its output's."""
    of_queries = heads * (latent.plain + latent.rotary)
    shapes: dict[str, tuple[int, ...]] = {
        f"{at}.kv_a_proj_with_mqa.weight": (latent.rank + latent.rotary, hidden),
        f"{at}.kv_a_layernorm.weight": (latent.rank,),
        f"{at}.kv_b_proj.weight": (heads * (latent.plain + latent.value), latent.rank),
    }
    if not latent.query_rank:
        return shapes | {f"{at}.q_proj.weight": (of_queries, hidden)}
    return shapes | {
        f"{at}.q_a_proj.weight": (latent.query_rank, hidden),
        f"{at}.q_a_layernorm.weight": (latent.query_rank,),
        f"{at}.q_b_proj.weight": (of_queries, latent.query_rank),
    }


def _attention_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    at, family, hidden = f"model.layers.{layer}.self_attn", config.family, config.hidden_size
    d, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads // config.kv_copies
    widths = heads * d, kv_heads * d, kv_heads * config.v_head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if config.latent is not None:
        shapes.update(_latent_shapes(config.latent, at, heads, hidden))
    else:
        names = projection_names(config, layer)
        projected = (2 * widths[0] if family.gated else widths[0], *widths[1:])
        for name, width in zip(names, projected if len(names) == 3 else (sum(projected),), strict=True):
            shapes[f"{name}.weight"] = width, hidden
            if config.qkv_bias:
                shapes[f"{name}.bias"] = (width,)
    shapes[f"{at}.o_proj.weight"] = hidden, heads * (config.latent.value if config.latent else config.v_head_dim)
    if config.o_bias:
        shapes[f"{at}.o_proj.bias"] = (hidden,)
    if family.qk_norm:
        for name, width in zip(family.qk_norm_names, widths, strict=False):
            shapes[f"{at}.{name}.weight"] = (width if family.qk_norm == "whole" else d,)
    if config.sinks:
        shapes[f"{at}.sinks"] = (heads,)
    if config.index is not None and config.indexed[layer]:
        shapes.update(_index_shapes(config, config.index, layer, kv_heads))
    return shapes


def _index_shapes(config: ModelConfig, index: Index, layer: int, kv_heads: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer's index."""
    hidden, width = config.hidden_size, index.width
    first, second, third, fourth = (f"{name}.weight" for name in index_names(config, layer))
    if config.latent is None:
        return {first: (kv_heads * width, hidden), second: (width, hidden), third: (width,), fourth: (width,)}
    return {
        first: (index.heads * width, config.latent.query_rank),
        second: (width, hidden),
        third: (index.heads, hidden),
        fourth: (width,),
        f"{fourth.removesuffix('weight')}bias": (width,),
    }


def projection_names(config: ModelConfig, layer: int) -> list[str]:
    """The maps to q, k and v of a layer; one name where one map has all. Of latent attention those to queries, or to
    what they are made of, and to latents."""
    at, joined = f"model.layers.{layer}.self_attn", config.family.qkv
    if config.latent is not None:
        return [f"{at}.{'q_a' if config.latent.query_rank else 'q'}_proj", f"{at}.kv_a_proj_with_mqa"]
    return [f"{at}.{joined}"] if joined else [f"{at}.{part}_proj" for part in "qkv"]


def index_names(config: ModelConfig, layer: int) -> tuple[str, str, str, str]:
    """The maps and norms of a layer's index: to index queries and keys, and their norms; with latents to index queries,
    keys and weights, and the norm of keys."""
    at = f"model.layers.{layer}.self_attn.indexer"
    if config.latent is not None:
        return f"{at}.wq_b", f"{at}.wk", f"{at}.weights_proj", f"{at}.k_norm"
    return f"{at}.q_proj", f"{at}.k_proj", f"{at}.q_norm", f"{at}.k_norm"


def norm_names(family: Family) -> tuple[str, str, str, str]:
    """The names of a layer's norms, in the order in which they are applied; "": there is none."""
    names = family.norms
    return names.before_attention, names.behind_attention, names.before_mlp, names.behind_mlp


def mlp_names(config: ModelConfig, layer: int) -> tuple[str | None, list[tuple[str, str, str]]]:
    """The router's name, if any, and (gate, up, down) of the layer's MLP or of each of its experts. Gate and up have
    one name where one map has both; the gate's is "" where there is none."""
    if config.moe is None or not config.sparse[layer]:
        return None, [_plain_names(config.family, f"model.layers.{layer}.mlp")]
    named = config.family.experts
    block, maps = f"model.layers.{layer}.{named.block}", named.maps
    return f"{block}.{named.router}", [_at(f"{block}.experts.{each}", maps) for each in range(config.moe.experts)]


def shared_names(config: ModelConfig, layer: int) -> tuple[str | None, tuple[str, str, str]]:
    """The gate of the expert that all tokens take, if it has one, and its own (gate, up, down)."""
    at = f"model.layers.{layer}.{config.family.experts.shared}"
    gated = config.moe is not None and config.moe.shared_gate
    return f"{at}_gate" if gated else None, _plain_names(config.family, at)


def _plain_names(family: Family, at: str) -> tuple[str, str, str]:
    if family.gate_up:
        return _at(at, (family.gate_up, family.gate_up, "down_proj"))
    return _at(at, ("" if family.ungated_mlp else "gate_proj", "up_proj", "down_proj"))


def _at(at: str, maps: tuple[str, str, str]) -> tuple[str, str, str]:
    gate, up, down = maps
    return gate and f"{at}.{gate}", f"{at}.{up}", f"{at}.{down}"


def latent_names(config: ModelConfig, layer: int) -> tuple[str, str]:
    """The maps before and behind experts that are of another width than the model."""
    at = f"model.layers.{layer}.{config.family.experts.block}"
    return f"{at}.fc1_latent_proj", f"{at}.fc2_latent_proj"
