"""From a config.json of Hugging Face to the shape that decides a model's cost.

Any config whose layers are attention and an MLP or experts: GQA, MHA or MLA, with sliding windows or without; and the
families below whose layers have recurrent states or learned choices. Nothing of it is run, and only integers and flags
are read. Layers of other kinds are refused, since counting them as attention would say something wrong. What a config
leaves out has its family's default where that is known; else the InvalidRequest names the missing key. Layers that
only predict further tokens (num_nextn_predict_layers) are not counted.

The parts of layers as a config.json describes them: attention, latents, learned choices, recurrent states, MLPs.

A part is a `LayerGroup` of one layer that has nothing else; `beside` joins two.

What older configs, and published ones, say in other words than transformers' own: each function gives a config in
the words that are read here. Values are not checked yet, so that what cannot be told is left as it is.

Models by name: presets of published configs, and any folder or file with a config.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lamina.errors import InvalidRequest, ModelFileError
from lamina.simulator.costs.shapes import ChoiceShape, LayerGroup, ModelShape, StateShape
from lamina.system.text_files import read_text, read_toml
from lamina_workers.model_config.config_keys import Keys
from lamina_workers.model_config.families import FAMILIES
from lamina_workers.model_config.family import Family

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


_OLD_KINDS = {"mamba": "linear_attention", "attention": "full_attention", "hybrid": "hybrid"}
_PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def with_kinds(raw: dict[str, Any]) -> dict[str, Any]:
    """`layer_types` from the keys of Nemotron-H, Granite 4, MiniMax-Text-01 and Qwen3-Next."""
    given = raw.get("layer_types") or raw.get("layers_block_type")
    if given is None and isinstance(pattern := raw.get("hybrid_override_pattern"), str):
        given = [_PATTERN.get(letter, letter) for letter in pattern]
    if given is None and isinstance(flags := raw.get("attn_type_list"), list):
        given = ["full_attention" if flag == 1 else "linear_attention" for flag in flags]
    layers, every = raw.get("num_hidden_layers"), raw.get("full_attention_interval", 4)
    if given is None and type(layers) is int and layers <= 1024 and type(every) is int and every > 0:
        if str(raw.get("model_type")).startswith("qwen3"):
            given = ["linear_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]
        elif raw.get("model_type") == "minimax":
            given = ["linear_attention" if layer % 2 else "full_attention" for layer in range(layers)]
    if not isinstance(given, list):
        return raw
    kinds = [_OLD_KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in given]
    found = {**raw, "layer_types": kinds}
    if "hybrid_override_pattern" in raw or "layers_block_type" in raw:
        found["num_hidden_layers"] = len(kinds)
    return found


def of_kimi(raw: dict[str, Any]) -> dict[str, Any]:
    """Kimi-Linear's published keys in transformers' words."""
    names = {
        "num_experts": "num_local_experts",
        "num_experts_per_token": "num_experts_per_tok",
        "num_shared_experts": "n_shared_experts",
        "model_max_length": "max_position_embeddings",
    }
    found = {names.get(key, key): value for key, value in raw.items()}
    layers, linear = raw.get("num_hidden_layers"), raw.get("linear_attn_config")
    if isinstance(linear, dict):
        for old, new in (
            ("head_dim", "head_dim"),
            ("num_heads", "num_heads"),
            ("short_conv_kernel_size", "conv_kernel_dim"),
        ):
            if old in linear:
                found[f"linear_{new}"] = linear[old]
    if found.get("layer_types") is None and type(layers) is int and layers <= 1024:
        full = [layer + 1 for layer in range(4, layers, 4)]
        if isinstance(linear, dict) and isinstance(given := linear.get("full_attn_layers"), list):
            full = given  # counted from 1
        found["layer_types"] = [
            "full_attention" if layer + 1 in full else "linear_attention" for layer in range(layers)
        ]
    return found


def of_minimax_m3(raw: dict[str, Any]) -> dict[str, Any]:
    """MiniMax-M3's published keys in transformers' words."""
    found = dict(raw)
    names = {
        "sparse_num_index_heads": "index_n_heads",
        "sparse_index_dim": "index_head_dim",
        "sparse_block_size": "index_block_size",
        "sparse_topk_blocks": "index_topk_blocks",
    }
    if isinstance(sparse := raw.get("sparse_attention_config"), dict):
        found |= {new: sparse[old] for old, new in names.items() if old in sparse}
        if found.get("layer_types") is None and isinstance(flags := sparse.get("sparse_attention_freq"), list):
            found["layer_types"] = ["minimax_m3_sparse" if flag else "full_attention" for flag in flags]
    if found.get("mlp_layer_types") is None and isinstance(flags := found.pop("moe_layer_freq", None), list):
        found["mlp_layer_types"] = ["sparse" if flag else "dense" for flag in flags]
    return found


def of_glm_dsa(raw: dict[str, Any]) -> dict[str, Any]:
    """GLM-5's `indexer_types`, from the schedule that published configs give."""
    layers, pattern = raw.get("num_hidden_layers"), raw.get("index_topk_pattern")
    if raw.get("indexer_types") is not None or type(layers) is not int or layers > 1024:
        return raw
    every, offset = raw.get("index_topk_freq", 1), raw.get("index_skip_topk_offset", 2)
    if isinstance(pattern, str):
        types = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    elif type(every) is int and every > 0 and type(offset) is int:
        types = ["shared" if max(layer - offset + 1, 0) % every else "full" for layer in range(layers)]
    else:
        return raw
    return {**raw, "indexer_types": types}


def of_minicpm3(raw: dict[str, Any]) -> dict[str, Any]:
    """MiniCPM3's value heads, which its config leaves out."""
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if raw.get("v_head_dim") is None and type(hidden) is int and type(heads) is int and heads > 0:
        return {**raw, "v_head_dim": hidden // heads}
    return raw


def of_nemotron(raw: dict[str, Any]) -> dict[str, Any]:
    """Nemotron-H's Mamba2 in the words of Granite 4."""
    names = {
        "mamba_num_heads": "mamba_n_heads",
        "mamba_head_dim": "mamba_d_head",
        "n_groups": "mamba_n_groups",
        "ssm_state_size": "mamba_d_state",
        "conv_kernel": "mamba_d_conv",
        "use_conv_bias": "mamba_conv_bias",
        "use_bias": "mamba_proj_bias",
        "attention_head_dim": "head_dim",
    }
    found = {names.get(key, key): value for key, value in with_kinds(raw).items()}
    return {**found, "mamba_rms_norm": True, "mamba_out_bias": found.get("mamba_proj_bias", False)}


def of_granite(raw: dict[str, Any]) -> dict[str, Any]:
    found = with_kinds(raw)
    return {**found, "mamba_rms_norm": True, "mamba_out_bias": found.get("mamba_proj_bias", False)}


def of_falcon_h1(raw: dict[str, Any]) -> dict[str, Any]:
    """Falcon-H1's, whose layers are all alike: attention and Mamba2 beside each other."""
    layers = raw.get("num_hidden_layers")
    kinds = ["hybrid"] * layers if type(layers) is int and 0 <= layers <= 1024 else []
    return {**raw, "layer_types": kinds, "mamba_out_bias": raw.get("projectors_bias", False)}


_MAX_CONFIG_BYTES = 4 << 20
_MAX_LAYERS = 1024


@dataclass(frozen=True, slots=True)
class _Family:
    """How a model_type differs from Llama, where its config leaves that out. `defaults` stand in for keys left out."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    norms: int = 2  # of the hidden size, in a layer
    qk_norm: str = ""  # as in `Family`
    qkv_bias: bool | str = "attention_bias"  # whether there is one, or the key that says so
    o_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    plain_mlp: bool = False  # two matrices instead of a gate and two
    pattern: int = 0  # every so manieth layer reads everything, the others a window
    flagged: bool = False  # there is a window only where use_sliding_window says so
    sinks: bool = False  # one for each query head
    biased_experts: bool = False  # and their routers
    experts_only: bool = False  # moe_intermediate_size is needed: the MLP's size is no expert's
    gated: bool = False  # attention's outputs, by a gate as wide as the queries
    reads: tuple[str, ...] = ()  # of `_OTHER_LAYERS`, those that are described
    words: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # the config in the words read here
    state: Callable[[Keys, int], LayerGroup] | None = None  # of a layer of linear attention
    mlps: Callable[[Keys, int, list[str]], list[dict[str, int]]] | None = None  # of each layer, by their kinds


def _native(family: Family) -> _Family:
    """A family that model workers compute themselves."""
    norms = family.norms
    return _Family(
        family.defaults,
        norms=1
        if family.mixers == "alternating"
        else sum(map(bool, (norms.before_attention, norms.behind_attention, norms.before_mlp, norms.behind_mlp))),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        o_bias=family.o_bias,
        mlp_bias=family.mlp_bias,
        pattern=family.pattern,
        flagged=family.windows in ("flag", "layers"),
        sinks=family.sinks,
        biased_experts=family.expert_bias,
        experts_only=family.expert_size == "moe_intermediate_size" or bool(family.groups),
        gated=family.gated,
    )


_NATIVE = {family.model_type: _native(family) for family in FAMILIES.values()}
_SPARSE = replace(_NATIVE["deepseek_v3"], defaults={"first_k_dense_replace": 3}, reads=("index_topk",))
_MAMBA = ("mamba_d_state", "mamba_d_ssm", "ssm_state_size", "hybrid_override_pattern", "shared_intermediate_size")
_LIGHTNING = replace(_NATIVE["minimax"], words=with_kinds, state=lightning)
_FAMILIES = _NATIVE | {
    "gemma": _Family({"tie_word_embeddings": True, "head_dim": 256}),
    "gpt_neox": _Family(plain_mlp=True),
    "phi": _Family(plain_mlp=True),
    "starcoder2": _Family({"tie_word_embeddings": True}, plain_mlp=True),
    "nemotron": _Family(plain_mlp=True),
    "deepseek_v32": _SPARSE,
    "glm_moe_dsa": replace(_SPARSE, words=of_glm_dsa),
    "minicpm3": replace(_NATIVE["minicpm3"], words=of_minicpm3),
    "kimi_linear": replace(_NATIVE["kimi_linear"], words=of_kimi, state=kda),
    "nemotron_h": replace(_NATIVE["nemotron_h"], reads=_MAMBA, words=of_nemotron, state=mamba2, mlps=nemotron_mlps),
    "granitemoehybrid": replace(
        _NATIVE["granitemoehybrid"], reads=_MAMBA, words=of_granite, state=mamba2, mlps=granite_mlps
    ),
    "falcon_h1": replace(_NATIVE["falcon_h1"], reads=_MAMBA, words=of_falcon_h1, state=mamba2),
    **dict.fromkeys(("minimax", "minimax_text_01", "minimax_m1"), _LIGHTNING),
    **{
        kind: replace(
            _NATIVE[kind],
            reads=("linear_num_key_heads", "linear_key_head_dim"),
            words=with_kinds,
            state=gated_delta,
        )
        for kind in ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
    },
    **dict.fromkeys(
        ("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"),
        _Family(qk_norm="head", reads=("shared_intermediate_size",), words=of_minimax_m3, mlps=minimax_m3_mlps),
    ),
}
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
# Keys of what is not counted here: to pass over them would describe another model.
_OTHER_LAYERS = (
    *("attn_layer_period", "hybrid_override_pattern", "mamba_d_state", "mamba_d_ssm", "ssm_state_size", "state_size"),
    *("linear_num_key_heads", "linear_key_head_dim", "index_topk", "cross_attention_layers", "encoder_layers"),
    *("interleave_moe_layer_step", "shared_intermediate_size", "altup_num_inputs", "num_kv_shared_layers"),
)
_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
_STATES = ("linear_attention", "hybrid")
_ALONE = ("mlp", "moe")
_CHOICES = ("indexed_attention", "minimax_m3_sparse")


def from_config(raw: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of a parsed config.json. Raises InvalidRequest for what is missing, out of bounds or not described."""
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{name}: the config is {type(raw).__name__}; allowed is an object")
    try:
        return _shape({str(key): value for key, value in raw.items()}, name)
    except (InvalidRequest, ModelFileError, ValueError) as error:  # ValueError: an integer that is too long to print
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
    if family.words is not None:
        raw = family.words(dict(raw))
    keys = Keys(raw, family.defaults)
    if other := [key for key in _OTHER_LAYERS if key not in family.reads and keys.get(key) not in (None, 0, [], "")]:
        raise InvalidRequest(f"the config has {other[0]}; layers of that kind are not described here")
    if not any(keys.given(key) for key in _EXPERTS):
        other = [key for key, value in raw.items() if "expert" in key and type(value) is int and value > 0]
        if other:  # counted as dense, it would be another model
            raise InvalidRequest(f"the config has {other[0]}, but none of {', '.join(_EXPERTS)}")
    if keys.get("is_encoder_decoder") is True:
        raise InvalidRequest("is_encoder_decoder is true; only decoders are described here")
    layers, hidden = keys.integer("num_hidden_layers", 1, _MAX_LAYERS), keys.integer("hidden_size", 1, 1 << 17)
    table = keys.integer("vocab_size", 1, 1 << 22) * hidden
    counts: dict[LayerGroup, int] = {}
    for group in _layers(keys, family, hidden, layers):
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


def _layers(keys: Keys, family: _Family, hidden: int, layers: int) -> Iterator[LayerGroup]:
    """Each layer as a group of its own."""
    kinds = _kinds(keys, family, layers)
    mlps = list(_mlps(keys, family, hidden, layers)) if family.mlps is None else family.mlps(keys, hidden, kinds)
    attention = NOTHING
    if not set(kinds) <= {"linear_attention", *_ALONE}:
        attention = _attention(keys, family, hidden)
    indexers = ("full",) * layers
    if keys.given("indexer_types"):
        indexers = keys.items("indexer_types", ("full", "shared"), layers)
    for layer, (kind, window, mlp) in enumerate(zip(kinds, _windows(keys, family, kinds), mlps, strict=True)):
        group = NOTHING if kind in _ALONE or kind == "linear_attention" else attention
        if kind in _STATES and family.state is not None:
            group = beside(group, family.state(keys, hidden))
        if kind == "indexed_attention":
            group = chosen_tokens(group, keys, hidden, indexers[layer] == "full")
        elif kind == "minimax_m3_sparse":
            group = chosen_blocks(group, keys, hidden)
        vectors = group.vectors + family.norms * hidden + mlp.get("vectors", 0)
        yield replace(
            group,
            window=window,
            vectors=vectors,
            mlp=mlp.get("mlp", 0),
            experts=mlp.get("experts", 0),
            top_k=mlp.get("top_k", 0),
            expert=mlp.get("expert", 0),
        )


def _attention(keys: Keys, family: _Family, hidden: int) -> LayerGroup:
    if keys.given("kv_lora_rank"):
        return latent(keys, hidden)
    biases = keys.holds(family.qkv_bias), keys.holds(family.o_bias)
    found = grouped(keys, hidden, biases, family.qk_norm, family.gated)
    return (
        replace(found, vectors=found.vectors + keys.integer("num_attention_heads", 1, 4096)) if family.sinks else found
    )


def _kinds(keys: Keys, family: _Family, layers: int) -> list[str]:
    """What each layer is, in the words of transformers' `layer_types`; full_attention where the config does not say."""
    if not keys.given("layer_types"):
        return ["indexed_attention" if "index_topk" in family.reads else "full_attention"] * layers
    known: tuple[str, ...] = _KINDS
    if family.state is not None:
        known += (*_STATES, *_ALONE)
    if "index_topk" in family.reads or family.mlps is minimax_m3_mlps:
        known += _CHOICES
    return list(keys.items("layer_types", known, layers))


def _mlps(keys: Keys, family: _Family, hidden: int, layers: int) -> Iterator[dict[str, int]]:
    """Of each layer, what its MLP or experts are in a `LayerGroup`."""
    matrices = 2 if family.plain_mlp else 3
    counted = next((key for key in _EXPERTS if keys.given(key)), None)
    sparse = [False] * layers
    moe: dict[str, int] = {}
    if counted is not None:
        experts = keys.integer(counted, 1, 1 << 16)
        size = None if family.experts_only else keys.integer("intermediate_size", 1, 1 << 22)
        width = keys.integer("moe_intermediate_size", 1, 1 << 22, default=size)
        expert = matrices * hidden * width + (2 * width + hidden if family.biased_experts else 0)
        shared = keys.integer("n_shared_experts", 0, 1 << 16, default=0) * expert
        if keys.given("shared_expert_intermediate_size"):  # Qwen2-MoE: one, behind a gate of its own
            shared += matrices * hidden * keys.integer("shared_expert_intermediate_size", 0, 1 << 22) + hidden
        top_k = keys.integer("num_experts_per_tok", 1, experts)
        router = (hidden + family.biased_experts) * experts
        moe = {"mlp": router + shared, "experts": experts, "top_k": top_k, "expert": expert}
        sparse = _sparse(keys, layers)
    if all(sparse):
        yield from [moe] * layers
        return
    size = keys.integer("intermediate_size", 1, 1 << 22)
    bias = (matrices - 1) * size + hidden if keys.holds(family.mlp_bias) else 0
    dense = {"mlp": matrices * hidden * size, "vectors": bias}
    yield from (moe if is_sparse else dense for is_sparse in sparse)


def _sparse(keys: Keys, layers: int) -> list[bool]:
    """Which layers have experts, by the keys of DeepSeek (first_k_dense_replace) and Qwen."""
    if keys.given("mlp_layer_types"):
        return [kind == "sparse" for kind in keys.items("mlp_layer_types", ("dense", "sparse"), layers)]
    first = keys.integer("first_k_dense_replace", 0, _MAX_LAYERS, default=0)
    every = keys.integer("moe_layer_freq", 1, _MAX_LAYERS, default=1)
    step = keys.integer("decoder_sparse_step", 1, _MAX_LAYERS, default=1)
    dense = set(keys.items("mlp_only_layers", range(_MAX_LAYERS)))
    return [
        layer >= first and layer % every == 0 and (layer + 1) % step == 0 and layer not in dense
        for layer in range(layers)
    ]


def _windows(keys: Keys, family: _Family, kinds: list[str]) -> list[int | None]:
    """How many tokens each layer reads at most, None for all."""
    layers = len(kinds)
    none: list[int | None] = [None] * layers
    if (family.flagged or keys.given("use_sliding_window")) and not keys.flag("use_sliding_window", False):
        return none
    if keys.given("layer_types"):
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
    if kind not in ("sliding_attention", "chunked_attention"):
        return None
    return keys.integer("sliding_window" if kind == "sliding_attention" else "attention_chunk_size", 1, 1 << 30)


__all__ = ["PRESETS", "LayerGroup", "ModelShape", "from_config", "from_folder", "model"]


def model(name: str | Path) -> ModelShape:
    """A preset by its name, in any case; or the shape of a folder or config.json, which `./` sets apart from presets.

    Raises InvalidRequest, which lists the presets where the name means nothing.
    """
    text = str(name)
    if (preset := PRESETS.get(text.lower())) is not None:
        return preset
    try:
        is_path = "/" in text or "\\" in text or Path(text).exists()
    except (OSError, ValueError):  # too long, a null character
        is_path = False
    if text and is_path:
        return from_folder(text)
    raise InvalidRequest(f"unknown model {text!r:.200}; known are {', '.join(PRESETS)}, or a path to a config.json")


def _presets() -> dict[str, ModelShape]:
    tables = read_toml(Path(__file__).with_name("models.toml"))
    return {
        name: replace(from_config(config, name), published_weight_bytes=config.get("weight_bytes"))
        for name, config in tables.items()
    }


PRESETS: Mapping[str, ModelShape] = _presets()
"""The models of `models.toml`, by name."""
