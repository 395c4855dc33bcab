"""What older configs, and published ones, say in other words than transformers' own: each function gives a config in
the words that are read here. Values are not checked yet, so that what cannot be told is left as it is."""

from __future__ import annotations

from typing import Any

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
