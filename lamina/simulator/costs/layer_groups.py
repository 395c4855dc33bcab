"""What each layer of a model has of parameters, KV, messages and FLOPs, counted from the facts that the engine reads.

The facts are a `ModelConfig`, so that a plan and an engine cannot disagree about a model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lamina.simulator.costs.shapes import ChoiceShape, LayerGroup, ModelShape, StateShape
from lamina_protocols.messages.layers import Index
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_config.family import Family
from lamina_workers.model_config.mixers import LatentConfig, StateConfig

_NO_MIXER = LayerGroup(1, 0, 0, 0, 0, 0, 0, 0, 0)
"""A layer without attention, a state and an MLP."""


def shape_of(config: ModelConfig, family: Family, name: str, borrowing: Collection[int] = ()) -> ModelShape:
    """The shape of a model of `family`. `borrowing`: layers with an index that take the choice of the layer before."""
    counts: dict[LayerGroup, int] = {}
    for layer in range(config.num_hidden_layers):
        group = _layer(config, family, layer, layer in borrowing)
        counts[group] = counts.get(group, 0) + 1
    table = config.vocab_size * config.hidden_size
    return ModelShape(
        name=name,
        hidden=config.hidden_size,
        groups=tuple(replace(group, layers=count) for group, count in counts.items()),
        embedding=table,
        head=table,
        tied=config.tie_word_embeddings,
        max_context=config.max_position_embeddings,
        vectors=config.hidden_size,
    )


def _layer(config: ModelConfig, family: Family, layer: int, borrows: bool) -> LayerGroup:
    """One layer, as a group of its own."""
    mixers, hidden = config.mixers[layer], config.hidden_size
    group = _NO_MIXER
    if "attention" in mixers:
        attention = _heads(config, family) if config.latent is None else _latent(config, config.latent)
        group = replace(attention, window=config.windows[layer])
        if config.index is not None and config.indexed[layer]:
            group = _chosen(group, config, config.index, borrows)
    if "state" in mixers and config.states is not None:
        group = _with_state(group, config.states, hidden)
    norms = family.norms
    of_layer = (norms.before_attention, norms.behind_attention, norms.before_mlp, norms.behind_mlp)
    alternating = family.mixers == "alternating"
    group = replace(group, vectors=group.vectors + hidden * (1 if alternating else sum(map(bool, of_layer))))
    return group if alternating and mixers else _with_mlp(group, config, family, layer)


def _heads(config: ModelConfig, family: Family) -> LayerGroup:
    """Attention whose query heads share KV heads in groups, or not."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    d_k, d_v = config.head_dim, config.v_head_dim
    kv = kv_heads * (d_k + d_v)
    qkv = heads * d_k + kv
    norms = {"": 0, "whole": (heads + kv_heads) * d_k}.get(family.qk_norm, 2 * d_k)
    return LayerGroup(
        layers=1,
        kv_heads=kv_heads,
        projections=hidden * (qkv + heads * d_v + (heads * d_k if family.gated else 0)),
        kv_projections=hidden * kv,
        mlp=0,
        kv_elements=kv,
        query_elements=heads * d_k,
        output_elements=heads * d_v,
        score_flops=2 * heads * (d_k + d_v),
        vectors=config.qkv_bias * qkv + config.o_bias * hidden + norms + config.sinks * heads,
    )


def _latent(config: ModelConfig, latent: LatentConfig) -> LayerGroup:
    """Attention over latents, absorbed."""
    hidden, heads, rank, rotary = config.hidden_size, config.num_attention_heads, latent.rank, latent.rotary
    queries = heads * (latent.plain + rotary)
    of_queries = latent.query_rank * (hidden + queries) if latent.query_rank else hidden * queries
    into_latent = hidden * (rank + rotary)
    return LayerGroup(
        layers=1,
        kv_heads=1,
        projections=of_queries + into_latent + heads * (rank * (latent.plain + latent.value) + latent.value * hidden),
        kv_projections=into_latent,
        mlp=0,
        kv_elements=rank + rotary,
        query_elements=heads * (rank + rotary),
        output_elements=heads * rank,
        score_flops=2 * heads * (2 * rank + rotary),
        prompt_score_flops=2 * heads * (latent.plain + rotary + latent.value),
        vectors=latent.query_rank + rank,
    )


def _chosen(group: LayerGroup, config: ModelConfig, index: Index, borrows: bool) -> LayerGroup:
    """Attention to what an index chooses. The index scores every token by heads of its own."""
    tokens = index.block * index.top
    if borrows:
        return replace(group, choice=ChoiceShape(tokens))
    hidden, width = config.hidden_size, index.width
    heads = group.kv_heads * index.heads
    if (
        index.weighted and config.latent is not None
    ):  # DeepSeek's: queries are made of attention's, weights of the stream
        projections = config.latent.query_rank * heads * width + hidden * (width + heads)
    else:
        projections = hidden * (heads + 1) * width
    return replace(
        group,
        projections=group.projections + projections,
        vectors=group.vectors + 2 * width,
        choice=ChoiceShape(tokens, width, group.kv_heads * index.numbers, 2 * heads * width),
    )


def _with_state(group: LayerGroup, state: StateConfig, hidden: int) -> LayerGroup:
    """The layer with a recurrent state beside what it has."""
    heads, outputs, channels = state.heads, state.heads * state.d_v, state.width
    if state.kind == "lightning":  # q, k, v, the output and its gate; a norm in between
        projections, vectors = 5 * hidden * outputs, outputs
    elif state.kind == "gated_delta":
        projections, vectors = hidden * (channels + 2 * outputs + 2 * heads), 2 * heads + state.d_v
    elif state.kind == "kda":  # decays and the output's gate go through a bottleneck of one head's width
        bottleneck = state.d_v * (hidden + outputs)
        projections, vectors = 4 * hidden * outputs + 2 * bottleneck + hidden * heads, outputs + heads + state.d_v
    else:  # mamba2: B and C are keys and queries, x is the values
        into = outputs + channels + heads
        projections, vectors = hidden * (into + outputs), 3 * heads + (outputs if state.norm else 0)
        vectors += state.bias * into + state.out_bias * hidden + state.conv_bias * channels
    return replace(
        group,
        projections=group.projections + projections,
        vectors=group.vectors + vectors + state.conv * channels,
        state=StateShape(state.kind, heads, state.d_k, state.d_v, state.key_heads, state.conv),
    )


def _with_mlp(group: LayerGroup, config: ModelConfig, family: Family, layer: int) -> LayerGroup:
    """The layer with its MLP or its experts."""
    hidden, moe, inner_maps = config.hidden_size, config.moe, 1 if family.ungated_mlp else 2
    if moe is None or not config.sparse[layer]:
        bias = config.mlp_bias * (inner_maps * config.intermediate_size + hidden)
        mlp = (inner_maps + 1) * hidden * config.intermediate_size
        return replace(group, mlp=mlp, vectors=group.vectors + bias)
    width = moe.latent or hidden
    every_token = (hidden + moe.bias) * moe.experts + (inner_maps + 1) * hidden * moe.shared + 2 * hidden * moe.latent
    every_token += hidden if moe.shared and moe.shared_gate else 0
    bias = inner_maps * moe.shared + hidden if moe.shared else 0
    bias += moe.latent + hidden if moe.latent else 0
    expert = (inner_maps + 1) * width * moe.intermediate_size
    return replace(
        group,
        mlp=every_token,
        experts=moe.experts,
        top_k=moe.top_k,
        expert=expert + moe.bias * (inner_maps * moe.intermediate_size + width),
        vectors=group.vectors + config.mlp_bias * bias,
    )
