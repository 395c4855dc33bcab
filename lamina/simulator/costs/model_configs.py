"""From a config.json of Hugging Face to the shape that decides a model's cost.

Any config whose layers are attention and an MLP or experts: GQA, MHA or MLA, with sliding windows or without. Nothing
of it is run, and only integers and flags are read. Layers of other kinds (state spaces, linear or sparse attention) are
refused, since counting them as attention would say something wrong. What a config leaves out has its family's default
where that is known; else the InvalidRequest names the missing key. Layers that only predict further tokens
(num_nextn_predict_layers) are not counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lamina.errors import InvalidRequest, ModelFileError
from lamina.simulator.costs.shapes import LayerGroup, ModelShape
from lamina.system.text_files import read_text
from lamina_workers.decoder.config_keys import Keys

_MAX_CONFIG_BYTES = 4 << 20
_MAX_LAYERS = 1024


@dataclass(frozen=True, slots=True)
class _Family:
    """How a model_type differs from Llama, where its config leaves that out. `defaults` stand in for keys left out."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    norms: int = 2  # of the hidden size, in a layer
    qk_norms: bool = False
    qkv_bias: bool = False  # also where attention_bias does not say so, which is for o too
    plain_mlp: bool = False  # two matrices instead of a gate and two
    pattern: int = 0  # every so manieth layer reads everything, the others a window
    flagged: bool = False  # there is a window only where use_sliding_window says so
    experts_only: bool = False  # moe_intermediate_size is needed: the MLP's size is no expert's


_QWEN = {"sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096}
_FAMILIES = {
    "mistral": _Family({"sliding_window": 4096, "num_key_value_heads": 8}),
    "mixtral": _Family({"num_key_value_heads": 8}),
    "qwen2": _Family(_QWEN, qkv_bias=True, flagged=True),
    "qwen2_moe": _Family(_QWEN, qkv_bias=True, flagged=True, experts_only=True),
    "qwen3": _Family({**_QWEN, "head_dim": 128}, qk_norms=True, flagged=True),
    "qwen3_moe": _Family({**_QWEN, "max_window_layers": 0}, qk_norms=True, flagged=True, experts_only=True),
    "smollm3": _Family({"tie_word_embeddings": True}, flagged=True),
    "gemma": _Family({"tie_word_embeddings": True, "head_dim": 256}),
    "gemma2": _Family(_GEMMA, norms=4, pattern=2),
    "gemma3_text": _Family(_GEMMA, norms=4, qk_norms=True, pattern=6),
    "cohere2": _Family({"tie_word_embeddings": True, "sliding_window": 4096}, norms=1, pattern=4),
    "gpt_neox": _Family(plain_mlp=True),
    "phi": _Family(plain_mlp=True),
    "starcoder2": _Family({"tie_word_embeddings": True}, plain_mlp=True),
    "nemotron": _Family(plain_mlp=True),
    "deepseek_v2": _Family(experts_only=True),
    "deepseek_v3": _Family(experts_only=True),
}
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
# Keys of what is not counted here: to pass over them would describe another model.
_OTHER_LAYERS = (
    *("attn_layer_period", "hybrid_override_pattern", "mamba_d_state", "mamba_d_ssm", "ssm_state_size", "state_size"),
    *("linear_num_key_heads", "linear_key_head_dim", "index_topk", "cross_attention_layers", "encoder_layers"),
    *("interleave_moe_layer_step", "shared_intermediate_size", "altup_num_inputs", "num_kv_shared_layers"),
)
_KINDS = ("full_attention", "sliding_attention", "chunked_attention")


def from_config(raw: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of a parsed config.json. Raises InvalidRequest for what is missing, out of bounds or not described."""
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{name}: the config is {type(raw).__name__}; allowed is an object")
    try:
        return _shape({str(key): value for key, value in raw.items()}, name)
    except InvalidRequest as error:
        raise InvalidRequest(f"{name}: {error}") from error
    except (ModelFileError, ValueError) as error:  # ValueError: an integer that is too long to print
        raise InvalidRequest(f"{name}: {error}") from error


def from_folder(path: str | Path) -> ModelShape:
    """The shape that a folder's config.json describes, or a file of that form. Raises InvalidRequest."""
    try:
        file = Path(path).expanduser()
        file = file / "config.json" if file.is_dir() else file
        raw = json.loads(read_text(file, _MAX_CONFIG_BYTES))
    except (OSError, ValueError, RuntimeError) as error:  # no JSON, a NUL in the path, a user without home; nesting
        raise InvalidRequest(f"cannot read the model at {str(path)!r:.200}: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidRequest(f"{file} holds a {type(raw).__name__}; allowed is an object")
    return from_config(raw, file.parent.name if file.name == "config.json" else file.stem)


def _shape(raw: Mapping[str, Any], name: str) -> ModelShape:
    if isinstance(text := raw.get("text_config"), Mapping) and raw.get("num_hidden_layers") is None:
        raw = {**raw, **{str(key): value for key, value in text.items()}}  # of text and pictures: what it decodes with
    kind = raw.get("model_type")
    family = _FAMILIES.get(kind, _Family()) if isinstance(kind, str) else _Family()
    keys = Keys(raw, family.defaults)
    if other := [key for key in _OTHER_LAYERS if keys.get(key) not in (None, 0, [], "")]:
        raise InvalidRequest(f"the config has {other[0]}; layers of that kind are not described here")
    if not any(keys.given(key) for key in _EXPERTS):
        other = [key for key, value in raw.items() if "expert" in key and type(value) is int and value > 0]
        if other:  # counted as dense, it would be another model
            raise InvalidRequest(f"the config has {other[0]}, but none of {', '.join(_EXPERTS)}")
    if keys.get("is_encoder_decoder") is True:
        raise InvalidRequest("is_encoder_decoder is true; only decoders are described here")
    layers, hidden = keys.integer("num_hidden_layers", 1, _MAX_LAYERS), keys.integer("hidden_size", 1, 1 << 17)
    table = keys.integer("vocab_size", 1, 1 << 22) * hidden
    attention = _latent(keys, hidden) if keys.given("kv_lora_rank") else _heads(keys, family, hidden)
    attention = replace(attention, vectors=attention.vectors + family.norms * hidden)
    counts: dict[LayerGroup, int] = {}
    for window, mlp in zip(_windows(keys, family, layers), _mlps(keys, family, hidden, layers), strict=True):
        group = replace(
            attention,
            window=window,
            mlp=mlp.mlp,
            experts=mlp.experts,
            top_k=mlp.top_k,
            expert=mlp.expert,
            vectors=attention.vectors + mlp.vectors,
        )
        counts[group] = counts.get(group, 0) + 1
    return ModelShape(
        name=name,
        hidden=hidden,
        groups=tuple(replace(group, layers=count) for group, count in counts.items()),
        embedding=table,
        head=table,
        tied=keys.flag("tie_word_embeddings", False),
        max_context=keys.integer("max_position_embeddings", 1, 1 << 30),
        vectors=hidden,
        element=1.0 if keys.table("quantization_config").get("quant_method") == "fp8" else 2.0,
    )


def _heads(keys: Keys, family: _Family, hidden: int) -> LayerGroup:
    """One layer's attention with heads of their own, in groups that share keys or not."""
    heads = keys.integer("num_attention_heads", 1, 4096)
    kv_heads = keys.integer("num_key_value_heads", 1, 4096, default=heads)
    if heads % kv_heads:
        raise InvalidRequest(f"num_key_value_heads is {kv_heads}; it must divide num_attention_heads {heads}")
    if not keys.given("head_dim") and hidden % heads:
        raise InvalidRequest(
            f"head_dim is missing from the model's config, and num_attention_heads {heads} does not divide hidden_size "
            f"{hidden}"
        )
    width = keys.integer("head_dim", 1, 4096, default=hidden // heads)
    qkv, kv = (heads + 2 * kv_heads) * width, 2 * kv_heads * width
    bias = keys.flag("attention_bias", False)
    biases = (qkv if bias or family.qkv_bias else 0) + (hidden if bias else 0)
    return LayerGroup(
        layers=1,
        kv_heads=kv_heads,
        projections=hidden * (qkv + heads * width),
        kv_projections=hidden * kv,
        mlp=0,
        kv_elements=kv,
        query_elements=heads * width,
        output_elements=heads * width,
        score_flops=4 * heads * width,
        vectors=biases + (2 * width if family.qk_norms else 0),
    )


def _latent(keys: Keys, hidden: int) -> LayerGroup:
    """One layer's MLA, absorbed."""
    heads = keys.integer("num_attention_heads", 1, 4096)
    latent, rotary = keys.integer("kv_lora_rank", 1, 1 << 16), keys.integer("qk_rope_head_dim", 1, 4096)
    plain, value = keys.integer("qk_nope_head_dim", 1, 4096), keys.integer("v_head_dim", 1, 4096)
    queries = heads * (plain + rotary)
    if keys.given("q_lora_rank"):
        rank = keys.integer("q_lora_rank", 1, 1 << 16)
        into_queries, norms = hidden * rank + rank * queries, rank + latent
    else:
        into_queries, norms = hidden * queries, latent
    into_latent = hidden * (latent + rotary)
    return LayerGroup(
        layers=1,
        kv_heads=1,
        projections=into_queries + into_latent + latent * heads * (plain + value) + heads * value * hidden,
        kv_projections=into_latent,
        mlp=0,
        kv_elements=latent + rotary,
        query_elements=heads * (latent + rotary),
        output_elements=heads * latent,
        score_flops=2 * heads * (2 * latent + rotary),
        prompt_score_flops=2 * heads * (plain + rotary + value),
        vectors=norms,
    )


@dataclass(frozen=True, slots=True)
class _Mlp:
    """One layer's, with the names of `LayerGroup`."""

    mlp: int
    experts: int = 0
    top_k: int = 0
    expert: int = 0
    vectors: int = 0


def _mlps(keys: Keys, family: _Family, hidden: int, layers: int) -> Iterator[_Mlp]:
    matrices = 2 if family.plain_mlp else 3
    counted = next((key for key in _EXPERTS if keys.given(key)), None)
    sparse = [False] * layers
    moe = _Mlp(0)
    if counted is not None:
        experts = keys.integer(counted, 1, 1 << 16)
        size = None if family.experts_only else keys.integer("intermediate_size", 1, 1 << 22)
        expert = matrices * hidden * keys.integer("moe_intermediate_size", 1, 1 << 22, default=size)
        shared = keys.integer("n_shared_experts", 0, 1 << 16, default=0) * expert
        if keys.given("shared_expert_intermediate_size"):  # Qwen2-MoE: one, behind a gate of its own
            shared += matrices * hidden * keys.integer("shared_expert_intermediate_size", 0, 1 << 22) + hidden
        top_k = keys.integer("num_experts_per_tok", 1, experts)
        moe = _Mlp(hidden * experts + shared, experts, top_k, expert)
        sparse = _sparse(keys, layers)
    if all(sparse):
        yield from [moe] * layers
        return
    size = keys.integer("intermediate_size", 1, 1 << 22)
    bias = (matrices - 1) * size + hidden if keys.flag("mlp_bias", False) else 0
    dense = _Mlp(matrices * hidden * size, vectors=bias)
    yield from (moe if is_sparse else dense for is_sparse in sparse)


def _sparse(keys: Keys, layers: int) -> list[bool]:
    """Which layers have experts, by the keys of DeepSeek (first_k_dense_replace) and Qwen."""
    first = keys.integer("first_k_dense_replace", 0, _MAX_LAYERS, default=0)
    every = keys.integer("moe_layer_freq", 1, _MAX_LAYERS, default=1)
    step = keys.integer("decoder_sparse_step", 1, _MAX_LAYERS, default=1)
    dense = set(keys.items("mlp_only_layers", range(_MAX_LAYERS)))
    return [
        layer >= first and layer % every == 0 and (layer + 1) % step == 0 and layer not in dense
        for layer in range(layers)
    ]


def _windows(keys: Keys, family: _Family, layers: int) -> list[int | None]:
    """How many tokens each layer reads at most, None for all."""
    none: list[int | None] = [None] * layers
    if (family.flagged or keys.given("use_sliding_window")) and not keys.flag("use_sliding_window", False):
        return none
    if keys.given("layer_types"):
        kinds = keys.items("layer_types", _KINDS, layers)
        return [_window(keys, kind) for kind in kinds]
    if not keys.given("sliding_window"):
        return none
    window = _window(keys, "sliding_attention")
    pattern = keys.integer("sliding_window_pattern", 0, _MAX_LAYERS, default=family.pattern)
    if pattern:
        return [window if (layer + 1) % pattern else None for layer in range(layers)]
    first = keys.integer("max_window_layers", 0, 1 << 20, default=0)
    return [window if layer >= first else None for layer in range(layers)]


def _window(keys: Keys, kind: str) -> int | None:
    if kind == "full_attention":
        return None
    return keys.integer("sliding_window" if kind == "sliding_attention" else "attention_chunk_size", 1, 1 << 30)
