"""From a config.json of Hugging Face to the shape that decides a model's cost.

Any config whose layers are attention and an MLP or experts: GQA, MHA or MLA, with sliding windows or without; and the
families below whose layers have recurrent states or learned choices. Nothing of it is run, and only integers and flags
are read. Layers of other kinds are refused, since counting them as attention would say something wrong. What a config
leaves out has its family's default where that is known; else the InvalidRequest names the missing key. Layers that
only predict further tokens (num_nextn_predict_layers) are not counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lamina.errors import InvalidRequest, ModelFileError
from lamina.simulator.costs import config_words as words
from lamina.simulator.costs import layer_configs as parts
from lamina.simulator.costs.shapes import LayerGroup, ModelShape
from lamina.system.text_files import read_text
from lamina_workers.model_config.config_keys import Keys
from lamina_workers.model_config.families import FAMILIES
from lamina_workers.model_config.family import Family

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
_LIGHTNING = replace(_NATIVE["minimax"], words=words.with_kinds, state=parts.lightning)
_FAMILIES = _NATIVE | {
    "gemma": _Family({"tie_word_embeddings": True, "head_dim": 256}),
    "gpt_neox": _Family(plain_mlp=True),
    "phi": _Family(plain_mlp=True),
    "starcoder2": _Family({"tie_word_embeddings": True}, plain_mlp=True),
    "nemotron": _Family(plain_mlp=True),
    "deepseek_v32": _SPARSE,
    "glm_moe_dsa": replace(_SPARSE, words=words.of_glm_dsa),
    "minicpm3": replace(_NATIVE["minicpm3"], words=words.of_minicpm3),
    "kimi_linear": replace(_NATIVE["kimi_linear"], words=words.of_kimi, state=parts.kda),
    "nemotron_h": replace(
        _NATIVE["nemotron_h"], reads=_MAMBA, words=words.of_nemotron, state=parts.mamba2, mlps=parts.nemotron_mlps
    ),
    "granitemoehybrid": replace(
        _NATIVE["granitemoehybrid"], reads=_MAMBA, words=words.of_granite, state=parts.mamba2, mlps=parts.granite_mlps
    ),
    "falcon_h1": replace(_NATIVE["falcon_h1"], reads=_MAMBA, words=words.of_falcon_h1, state=parts.mamba2),
    **dict.fromkeys(("minimax", "minimax_text_01", "minimax_m1"), _LIGHTNING),
    **{
        kind: replace(
            _NATIVE[kind],
            reads=("linear_num_key_heads", "linear_key_head_dim"),
            words=words.with_kinds,
            state=parts.gated_delta,
        )
        for kind in ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
    },
    **dict.fromkeys(
        ("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"),
        _Family(
            qk_norm="head", reads=("shared_intermediate_size",), words=words.of_minimax_m3, mlps=parts.minimax_m3_mlps
        ),
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
    attention = parts.NOTHING
    if not set(kinds) <= {"linear_attention", *_ALONE}:
        attention = _attention(keys, family, hidden)
    indexers = ("full",) * layers
    if keys.given("indexer_types"):
        indexers = keys.items("indexer_types", ("full", "shared"), layers)
    for layer, (kind, window, mlp) in enumerate(zip(kinds, _windows(keys, family, kinds), mlps, strict=True)):
        group = parts.NOTHING if kind in _ALONE or kind == "linear_attention" else attention
        if kind in _STATES and family.state is not None:
            group = parts.beside(group, family.state(keys, hidden))
        if kind == "indexed_attention":
            group = parts.chosen_tokens(group, keys, hidden, indexers[layer] == "full")
        elif kind == "minimax_m3_sparse":
            group = parts.chosen_blocks(group, keys, hidden)
        vectors = group.vectors + family.norms * hidden + mlp.get("vectors", 0)
        yield replace(
            group, window=window, vectors=vectors, mlp=mlp.get("mlp", 0), experts=mlp.get("experts", 0),
            top_k=mlp.get("top_k", 0), expert=mlp.get("expert", 0),
        )  # fmt: skip


def _attention(keys: Keys, family: _Family, hidden: int) -> LayerGroup:
    if keys.given("kv_lora_rank"):
        return parts.latent(keys, hidden)
    biases = keys.holds(family.qkv_bias), keys.holds(family.o_bias)
    found = parts.grouped(keys, hidden, biases, family.qk_norm, family.gated)
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
    if "index_topk" in family.reads or family.mlps is parts.minimax_m3_mlps:
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
