"""The parts of layers as a config.json describes them: attention, latents, learned choices, recurrent states, MLPs.

A part is a `LayerGroup` of one layer that has nothing else; `beside` joins two.
"""

from __future__ import annotations

from dataclasses import replace

from lamina.errors import InvalidRequest
from lamina.simulator.costs.mixers import ChoiceShape, StateShape
from lamina.simulator.costs.shapes import LayerGroup
from lamina_workers.model_config.config_keys import Keys

NOTHING = LayerGroup(1, 0, 0, 0, 0, 0, 0, 0, 0)
"""A layer without a mixer, and without an MLP."""
_WIDTH = 4096


def beside(one: LayerGroup, other: LayerGroup) -> LayerGroup:
    """One layer with what both have, of which `other` has no attention."""
    return replace(
        one,
        projections=one.projections + other.projections,
        vectors=one.vectors + other.vectors,
        state=other.state or one.state,
    )


def heads_of(keys: Keys) -> tuple[int, int, int]:
    """Query heads, KV heads and their width."""
    heads, hidden = keys.integer("num_attention_heads", 1, 4096), keys.integer("hidden_size", 1, 1 << 17)
    kv_heads = keys.integer("num_key_value_heads", 1, 4096, default=heads)
    if heads % kv_heads:
        raise InvalidRequest(f"num_key_value_heads is {kv_heads}; it must divide num_attention_heads {heads}")
    if not keys.given("head_dim") and hidden % heads:
        raise InvalidRequest(
            f"head_dim is missing from the model's config, and num_attention_heads {heads} does not divide hidden_size "
            f"{hidden}"
        )
    return heads, kv_heads, keys.integer("head_dim", 1, _WIDTH, default=hidden // heads)


def grouped(keys: Keys, hidden: int, biases: tuple[bool, bool], qk_norm: str, gated: bool) -> LayerGroup:
    """One layer's attention with heads of their own, in groups that share keys or not. `biases`: of q, k and v, and of
    o; `gated`: a gate of the queries' width."""
    heads, kv_heads, width = heads_of(keys)
    value = keys.integer("v_head_dim", 1, _WIDTH, default=width)
    kv = kv_heads * (width + value)
    qkv = heads * width + kv
    return LayerGroup(
        layers=1,
        kv_heads=kv_heads,
        projections=hidden * (qkv + heads * value + (heads * width if gated else 0)),
        kv_projections=hidden * kv,
        mlp=0,
        kv_elements=kv,
        query_elements=heads * width,
        output_elements=heads * value,
        score_flops=2 * heads * (width + value),
        vectors=biases[0] * qkv + biases[1] * hidden + _qk_norms(qk_norm, heads + kv_heads, width),
    )


def _qk_norms(kind: str, heads: int, width: int) -> int:
    return {"": 0, "whole": heads * width}.get(kind, 2 * width)


def latent(keys: Keys, hidden: int) -> LayerGroup:
    """One layer's MLA, absorbed."""
    heads = keys.integer("num_attention_heads", 1, 4096)
    rank, rotary = keys.integer("kv_lora_rank", 1, 1 << 16), keys.integer("qk_rope_head_dim", 1, _WIDTH)
    plain, value = keys.integer("qk_nope_head_dim", 1, _WIDTH), keys.integer("v_head_dim", 1, _WIDTH)
    queries = heads * (plain + rotary)
    if keys.given("q_lora_rank"):
        of_queries = keys.integer("q_lora_rank", 1, 1 << 16)
        into_queries, norms = hidden * of_queries + of_queries * queries, of_queries + rank
    else:
        into_queries, norms = hidden * queries, rank
    into_latent = hidden * (rank + rotary)
    return LayerGroup(
        layers=1,
        kv_heads=1,
        projections=into_queries + into_latent + rank * heads * (plain + value) + heads * value * hidden,
        kv_projections=into_latent,
        mlp=0,
        kv_elements=rank + rotary,
        query_elements=heads * (rank + rotary),
        output_elements=heads * rank,
        score_flops=2 * heads * (2 * rank + rotary),
        prompt_score_flops=2 * heads * (plain + rotary + value),
        vectors=norms,
    )


def chosen_tokens(attention: LayerGroup, keys: Keys, hidden: int, own: bool) -> LayerGroup:
    """DeepSeek's sparse attention: an indexer scores every token. Without one of its `own` a layer takes the choice
    of the one before."""
    tokens = keys.integer("index_topk", 1, 1 << 24)
    if not own:
        return replace(attention, choice=ChoiceShape(tokens))
    heads, width = keys.integer("index_n_heads", 1, 4096), keys.integer("index_head_dim", 1, _WIDTH)
    projections = keys.integer("q_lora_rank", 1, 1 << 16) * heads * width + hidden * (width + heads)
    return replace(
        attention,
        projections=attention.projections + projections,
        vectors=attention.vectors + 2 * width,
        choice=ChoiceShape(tokens, width, heads * (width + 1), 2 * heads * width),
    )


def chosen_blocks(attention: LayerGroup, keys: Keys, hidden: int) -> LayerGroup:
    """MiniMax-M3's sparse attention: an indexer scores every token, and each KV head takes the best blocks."""
    heads, width = keys.integer("index_n_heads", 1, 4096), keys.integer("index_head_dim", 1, _WIDTH)
    tokens = keys.integer("index_topk_blocks", 1, 1 << 16) * keys.integer("index_block_size", 1, 1 << 16)
    return replace(
        attention,
        projections=attention.projections + hidden * (heads + 1) * width,
        vectors=attention.vectors + 2 * width,
        choice=ChoiceShape(tokens, width, heads * width, 2 * heads * width),
    )


def lightning(keys: Keys, hidden: int) -> LayerGroup:
    """MiniMax-Text-01's: q, k, v, a gate and the output, and a norm in between."""
    heads, _, width = heads_of(keys)
    return replace(
        NOTHING,
        projections=5 * hidden * heads * width,
        vectors=heads * width,
        state=StateShape("lightning", heads, width, width, heads),
    )


def gated_delta(keys: Keys, hidden: int) -> LayerGroup:
    """Qwen3-Next's and Qwen3.5's gated DeltaNet."""
    state = StateShape(
        "gated_delta",
        keys.integer("linear_num_value_heads", 1, 4096),
        keys.integer("linear_key_head_dim", 1, _WIDTH),
        keys.integer("linear_value_head_dim", 1, _WIDTH),
        keys.integer("linear_num_key_heads", 1, 4096),
        keys.integer("linear_conv_kernel_dim", 0, 64),
    )
    return replace(
        NOTHING,
        projections=hidden * (state.channels + 2 * state.outputs + 2 * state.heads),
        vectors=state.conv * state.channels + 2 * state.heads + state.d_v,
        state=state,
    )


def kda(keys: Keys, hidden: int) -> LayerGroup:
    """Kimi Delta Attention: decays by channel, and an output gate, both through a bottleneck of one head's width."""
    heads, width = keys.integer("linear_num_heads", 1, 4096), keys.integer("linear_head_dim", 1, _WIDTH)
    state = StateShape("kda", heads, width, width, heads, keys.integer("linear_conv_kernel_dim", 0, 64))
    whole = heads * width
    return replace(
        NOTHING,
        projections=4 * hidden * whole + 2 * (hidden * width + width * whole) + hidden * heads,
        vectors=state.conv * state.channels + whole + heads + width,
        state=state,
    )


def mamba2(keys: Keys, hidden: int) -> LayerGroup:
    """Mamba2 in the words of Granite 4 and Falcon-H1: B and C are keys and queries, x is the values."""
    heads = keys.integer("mamba_n_heads", 1, 4096)
    inner = keys.integer("mamba_d_ssm", 1, 1 << 20, default=keys.integer("mamba_expand", 1, 64, default=2) * hidden)
    width = inner // heads
    if isinstance(keys.get("mamba_d_head"), int):  # or "auto"
        width = keys.integer("mamba_d_head", 1, _WIDTH)
    groups = keys.integer("mamba_n_groups", 1, 4096)
    size = keys.integer("mamba_d_state", 1, _WIDTH)
    state = StateShape("mamba2", heads, size, width, groups, keys.integer("mamba_d_conv", 0, 64, default=4))
    inner = state.outputs
    into = inner + state.channels + heads
    biases = (state.channels if keys.flag("mamba_conv_bias", True) else 0) + (
        into if keys.flag("mamba_proj_bias", False) else 0
    )
    biases += hidden if keys.flag("mamba_out_bias", False) else 0
    norm = inner if keys.flag("mamba_rms_norm", False) else 0
    return replace(
        NOTHING,
        projections=hidden * (into + inner),
        vectors=state.conv * state.channels + 3 * heads + norm + biases,
        state=state,
    )


# MLPs: what a `LayerGroup` has of them.


def granite_mlps(keys: Keys, hidden: int, kinds: list[str]) -> list[dict[str, int]]:
    """Granite 4's: a shared MLP in every layer, and experts beside it where there are any."""
    mlp = {"mlp": 3 * hidden * keys.integer("shared_intermediate_size", 1, 1 << 22)}
    if experts := keys.integer("num_local_experts", 0, 1 << 16, default=0):
        top_k = keys.integer("num_experts_per_tok", 1, experts)
        expert = 3 * hidden * keys.integer("intermediate_size", 1, 1 << 22)
        mlp = {"mlp": mlp["mlp"] + hidden * experts, "experts": experts, "top_k": top_k, "expert": expert}
    return [mlp] * len(kinds)


def nemotron_mlps(keys: Keys, hidden: int, kinds: list[str]) -> list[dict[str, int]]:
    """Nemotron-H's: layers of their own, with two matrices, or experts that may work in a narrower space."""
    made: dict[str, dict[str, int]] = {}
    bias = keys.flag("mlp_bias", False)
    if "mlp" in kinds:
        size = keys.integer("intermediate_size", 1, 1 << 22)
        made["mlp"] = {"mlp": 2 * hidden * size, "vectors": bias * (size + hidden)}
    if "moe" in kinds:
        experts = keys.integer("n_routed_experts", 1, 1 << 16)
        shared = keys.integer("moe_shared_expert_intermediate_size", 1, 1 << 22)
        narrow = keys.integer("moe_latent_size", 1, 1 << 17, default=hidden)
        apart = 2 * hidden * narrow if keys.given("moe_latent_size") else 0
        made["moe"] = {
            "mlp": hidden * experts + 2 * hidden * shared + apart,
            "experts": experts,
            "top_k": keys.integer("num_experts_per_tok", 1, experts),
            "expert": 2 * narrow * keys.integer("moe_intermediate_size", 1, 1 << 22),
            "vectors": bias * (shared + hidden + (narrow + hidden if apart else 0)),
        }
    return [made.get(kind, {}) for kind in kinds]


def minimax_m3_mlps(keys: Keys, hidden: int, kinds: list[str]) -> list[dict[str, int]]:
    """MiniMax-M3's: dense layers of a size of their own, and experts beside one that is shared."""
    experts = keys.integer("num_local_experts", 1, 1 << 16)
    shared = 3 * hidden * keys.integer("shared_intermediate_size", 1, 1 << 22)
    moe = {
        "mlp": hidden * experts + shared,
        "experts": experts,
        "top_k": keys.integer("num_experts_per_tok", 1, experts),
        "expert": 3 * hidden * keys.integer("intermediate_size", 1, 1 << 22),
    }
    dense = {"mlp": 3 * hidden * keys.integer("dense_intermediate_size", 1, 1 << 22)}
    if not keys.given("mlp_layer_types"):
        return [moe] * len(kinds)
    types = keys.items("mlp_layer_types", ("dense", "sparse"), len(kinds))
    return [moe if each == "sparse" else dense for each in types]
