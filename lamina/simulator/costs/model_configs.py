"""A model's shape by a preset's name, a folder, or a parsed config.json.

The engine's own reader, `lamina_workers.model_config`, reads the config, and `layer_groups` counts what it says. Here
is what the engine's reader does not know: model types that it has no family for, whose layers are attention (GQA, MHA
or MLA, with windows or without) and an MLP or experts; and other words for what its families have. Layers of other
kinds are refused, since counting them as attention would say something wrong. Layers that only predict further tokens
(num_nextn_predict_layers) are not counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamina.errors import InvalidRequest, ModelFileError, UnsupportedModelError
from lamina.simulator.costs.layer_groups import shape_of
from lamina.simulator.costs.shapes import ModelShape
from lamina.system.text_files import read_text, read_toml
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_config.config_keys import Keys
from lamina_workers.model_config.families import FAMILIES
from lamina_workers.model_config.family import Family

_MAX_CONFIG_BYTES = 4 << 20
_MAX_LAYERS = 1024
_NO_GATE = {"mlp_hidden_act": "relu2"}  # any activation costs the same
_MINIMAX, _MINIMAX_M3 = FAMILIES["MiniMaxForCausalLM"], FAMILIES["MiniMaxM3VLForCausalLM"]
_FAMILIES = {family.model_type: family for family in FAMILIES.values()} | {
    **dict.fromkeys(("minimax_text_01", "minimax_m1"), _MINIMAX),
    **dict.fromkeys(("minimax_m3", "minimax_m3_vl"), _MINIMAX_M3),
}
"""The engine's families by model_type, also by those of published configs in other words."""
_OTHERS = {
    "gemma": Family("gemma", {"tie_word_embeddings": True, "head_dim": 256}),
    "gpt_neox": Family("gpt_neox", _NO_GATE, ungated_mlp=True),
    "phi": Family("phi", _NO_GATE, ungated_mlp=True),
    "starcoder2": Family("starcoder2", {"tie_word_embeddings": True} | _NO_GATE, ungated_mlp=True),
    "nemotron": Family("nemotron", _NO_GATE, ungated_mlp=True),
}
"""Model types that only the planner knows, where they differ from Llama in what their configs leave out."""
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
_DEEPSEEK_EXPERTS = ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "moe_layer_freq")
_OTHER_LAYERS = (
    *("attn_layer_period", "hybrid_override_pattern", "mamba_d_state", "mamba_d_ssm", "ssm_state_size", "state_size"),
    *("linear_num_key_heads", "linear_key_head_dim", "index_topk", "cross_attention_layers", "encoder_layers"),
    *("interleave_moe_layer_step", "shared_intermediate_size", "altup_num_inputs", "num_kv_shared_layers"),
)
"""Keys of layers that are not counted in a family without states and indexes: to pass over them would describe another
model."""
_UNCOUNTED = (
    *("hidden_act", "hidden_activation", "mlp_hidden_act", "mamba_hidden_act", "ssm_multipliers", "topk_method"),
    *("rope_scaling", "rope_parameters", "partial_rotary_factor", "rope_interleave", "attention_in_multiplier"),
    *("norm_topk_prob", "quantization_config", "use_bidirectional_attention"),
)
"""Keys for which the engine may refuse a model, and which cost nothing."""


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


def from_config(raw: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of a parsed config.json. Raises InvalidRequest for what is missing, out of bounds or not described."""
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{name}: the config is {type(raw).__name__}; allowed is an object")
    try:
        return _shape({str(key): value for key, value in raw.items()}, name)
    except (InvalidRequest, ModelFileError, UnsupportedModelError, ValueError) as error:
        # ValueError: an integer that is too long to print
        raise InvalidRequest(f"{name}: {error}") from error


def _shape(raw: dict[str, Any], name: str) -> ModelShape:
    if isinstance(text := raw.get("text_config"), Mapping) and raw.get("num_hidden_layers") is None:
        raw = {**raw, **{str(key): value for key, value in text.items()}}  # of text and pictures: what it decodes with
    element = 1.0 if Keys(raw, {}).table("quantization_config").get("quant_method") == "fp8" else 2.0
    family = _family(raw)
    _check(raw, family)
    borrowing: tuple[int, ...] = ()
    if family is None:
        kind = raw.get("model_type")
        base = _OTHERS.get(kind, Family("")) if isinstance(kind, str) else Family("")
        raw, family = _as_family(raw, base)
        config = _without_uncounted(raw, family)
    else:
        raw = _WORDS[family.model_type](raw) if family.model_type in _WORDS else raw
        if family.index == "tokens":
            raw, borrowing = _borrowed_choices(raw)
        try:
            config = ModelConfig.of_family("", family, raw)
        except UnsupportedModelError:  # in a key that costs nothing, perhaps
            config = _without_uncounted(raw, family)
    return replace(shape_of(config, family, name, borrowing), element=element)


def _family(raw: Mapping[str, Any]) -> Family | None:
    """The engine's family of a config, by its architecture as the engine does it, else by its model_type."""
    architectures, kind = raw.get("architectures"), raw.get("model_type")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if isinstance(architecture, str) and architecture in FAMILIES:
        return FAMILIES[architecture]
    return _FAMILIES.get(kind) if isinstance(kind, str) else None


def _check(raw: Mapping[str, Any], family: Family | None) -> None:
    """Raise InvalidRequest where the config has layers that would not be counted."""
    plain = family is None or (family.states is None and not family.index)
    if plain and (other := [key for key in _OTHER_LAYERS if raw.get(key) not in (None, 0, [], "")]):
        raise InvalidRequest(f"the config has {other[0]}; layers of that kind are not described here")
    if family is None and all(raw.get(key) is None for key in _EXPERTS):
        other = [key for key, value in raw.items() if "expert" in key and type(value) is int and value > 0]
        if other:  # counted as dense, it would be another model
            raise InvalidRequest(f"the config has {other[0]}, but none of {', '.join(_EXPERTS)}")
    if raw.get("is_encoder_decoder") is True:
        raise InvalidRequest("is_encoder_decoder is true; only decoders are described here")


def _without_uncounted(raw: Mapping[str, Any], family: Family) -> ModelConfig:
    """The facts of a model that the engine's decoder may refuse to compute, but which is counted all the same."""
    uncounted = (*_UNCOUNTED, "attention_bias") if family.latent else _UNCOUNTED
    return ModelConfig.of_family("", family, {key: value for key, value in raw.items() if key not in uncounted})


# Model types without a family.


def _as_family(raw: dict[str, Any], base: Family) -> tuple[dict[str, Any], Family]:
    """The config of a model type that the engine has no family for in the words of one that differs from `base`."""
    keys = Keys(raw, base.defaults)
    kinds, window = _windows(keys, keys.integer("num_hidden_layers", 1, _MAX_LAYERS))
    words = {**raw, "layer_types": kinds, "sliding_window": window}
    family = replace(base, windows="pattern", latent=keys.given("kv_lora_rank"))
    if family.latent:
        words["v_head_dim"] = keys.integer("v_head_dim", 1, 1024)  # as the engine would make up one that is missing
    experts = next((key for key in _EXPERTS if keys.given(key)), None)
    if experts is None:
        return words, family
    shared = "shared_expert_intermediate_size" if keys.given("shared_expert_intermediate_size") else ""
    if any(map(keys.given, (*_DEEPSEEK_EXPERTS, "mlp_layer_types"))):
        size = keys.integer("moe_intermediate_size", 1, 1 << 20, default=keys.get("intermediate_size"))
        words |= {"n_routed_experts": keys.get(experts), "moe_intermediate_size": size}
        return words, replace(family, groups="softmax", shared_expert=shared)
    size_key = "moe_intermediate_size" if keys.given("moe_intermediate_size") else "intermediate_size"
    return words, replace(family, expert_size=size_key, shared_expert=shared, shared_gate=bool(shared))


def _windows(keys: Keys, layers: int) -> tuple[list[str], int | None]:
    """The kind of each layer in the engine's words, and the tokens that those with a window read at most."""
    full, windowed = "full_attention", "sliding_attention"
    if keys.given("use_sliding_window") and not keys.flag("use_sliding_window", False):
        return [full] * layers, None
    if keys.given("layer_types"):
        kinds = keys.items("layer_types", (full, windowed, "chunked_attention"), layers)
        sizes = {windowed: "sliding_window", "chunked_attention": "attention_chunk_size"}
        widths = {keys.integer(sizes[kind], 1, 1 << 30) for kind in set(kinds) - {full}}
        if len(widths) > 1:
            raise InvalidRequest("layer_types has windows of two widths; described here are layers with one")
        return [full if kind == full else windowed for kind in kinds], next(iter(widths), None)
    if not keys.given("sliding_window"):
        return [full] * layers, None
    window = keys.integer("sliding_window", 1, 1 << 30)
    if pattern := keys.integer("sliding_window_pattern", 0, _MAX_LAYERS, default=0):
        return [windowed if (layer + 1) % pattern else full for layer in range(layers)], window
    first = keys.integer("max_window_layers", 0, 1 << 20, default=0)
    return [windowed if layer >= first else full for layer in range(layers)], window


# Published configs whose words are not those of transformers. Values are not checked yet: the engine's reader does it.


def _minimax_words(raw: dict[str, Any]) -> dict[str, Any]:
    """MiniMax-Text-01's and M1's kinds of layers."""
    flags = raw.get("attn_type_list")
    if raw.get("layer_types") is not None or not isinstance(flags, list):
        return raw
    return {**raw, "layer_types": ["full_attention" if flag == 1 else "linear_attention" for flag in flags]}


def _minimax_m3_words(raw: dict[str, Any]) -> dict[str, Any]:
    """MiniMax-M3's indexes, and which layers have them and experts."""
    words = dict(raw)
    names = {
        "sparse_num_index_heads": "index_n_heads",
        "sparse_index_dim": "index_head_dim",
        "sparse_block_size": "index_block_size",
        "sparse_topk_blocks": "index_topk_blocks",
    }
    if isinstance(sparse := raw.get("sparse_attention_config"), dict):
        words |= {new: sparse[old] for old, new in names.items() if old in sparse}
        if words.get("layer_types") is None and isinstance(flags := sparse.get("sparse_attention_freq"), list):
            words["layer_types"] = ["minimax_m3_sparse" if flag else "full_attention" for flag in flags]
    if words.get("mlp_layer_types") is None and isinstance(flags := words.pop("moe_layer_freq", None), list):
        words["mlp_layer_types"] = ["sparse" if flag else "dense" for flag in flags]
    return words


def _borrowed_choices(raw: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The config without the schedule of its indexes, and the layers that take the choice of the one before.

    The engine does not compute such layers. Published configs of GLM-5 give a pattern or a period.
    """
    keys = Keys(raw, {})
    layers = keys.integer("num_hidden_layers", 1, _MAX_LAYERS)
    if keys.given("indexer_types"):
        types = keys.items("indexer_types", ("full", "shared"), layers)
        borrowing = tuple(layer for layer in range(layers) if types[layer] == "shared")
    elif keys.given("index_topk_pattern"):
        pattern = keys.text("index_topk_pattern")
        if len(pattern) < layers or set(pattern) - {"F", "S"}:
            raise InvalidRequest(f"index_topk_pattern is {pattern!r:.80}; allowed are F and S, one a layer")
        borrowing = tuple(layer for layer in range(layers) if pattern[layer] == "S")
    else:
        period = keys.integer("index_topk_freq", 1, _MAX_LAYERS, default=1)
        offset = keys.integer("index_skip_topk_offset", 0, _MAX_LAYERS, default=2)
        borrowing = tuple(layer for layer in range(layers) if max(layer - offset + 1, 0) % period)
    schedule = ("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
    return {key: value for key, value in raw.items() if key not in schedule}, borrowing


_WORDS: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    _MINIMAX.model_type: _minimax_words,
    _MINIMAX_M3.model_type: _minimax_m3_words,
}


def _presets() -> dict[str, ModelShape]:
    tables = read_toml(Path(__file__).with_name("models.toml"))
    return {
        name: replace(from_config(config, name), published_weight_bytes=config.get("weight_bytes"))
        for name, config in tables.items()
    }


PRESETS: Mapping[str, ModelShape] = _presets()
"""The models of `models.toml`, by name."""
