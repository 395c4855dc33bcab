"""GGUF files of Gemma 4, which transformers' code computes: their config.json, and where each tensor lies.

Nothing is changed in its tensors; names are those of llama.cpp's converter. Of RoPE that turns a part of a head the
file has what divides the frequencies: 1, or about infinity for what is not turned.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from lamina.models.gguf_architectures import ROPE_FACTORS, Keys, common
from lamina.models.gguf_files import GgufFile
from lamina_workers.checkpoints.gguf_checkpoint import GgufEntry, GgufPart
from lamina_workers.errors import ModelFileError, UnsupportedModelError

_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "per_layer_token_embd": "embed_tokens_per_layer",
    "per_layer_model_proj": "per_layer_model_projection",
    "per_layer_proj_norm": "per_layer_projection_norm",
}
_IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
}
_IN_LAYER |= {f"attn_{part}.weight": f"self_attn.{part}_proj.weight" for part in "qkv"}
_IN_LAYER |= {f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"}
_IN_LAYER |= {f"ffn_{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
_OF_KEYS = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def config_of(file: GgufFile) -> dict[str, Any]:
    """The config.json of the model in `file`, as Hugging Face writes it."""
    keys = Keys(file)
    flags = keys.by_layer("attention.sliding_window_pattern")
    heads, widths = keys.by_layer("attention.head_count_kv"), keys.by_layer("feed_forward_length")
    of_windows = [count for count, flag in zip(heads, flags, strict=True) if flag]
    of_all = [count for count, flag in zip(heads, flags, strict=True) if not flag]
    if not of_windows or not of_all:
        raise UnsupportedModelError(f"{file.path} has layers of one kind alone; supported are windows and full layers")
    dims = [keys.integer(f"attention.{part}_length{kind}") for kind in ("_swa", "") for part in ("key", "value")]
    turned = [keys.integer("rope.dimension_count_swa", dims[0]), keys.integer("rope.dimension_count", dims[2])]
    if dims[::2] != dims[1::2] or dims[::2] != turned:
        raise UnsupportedModelError(f"{file.path} has heads of {dims} and turns {turned}; supported are equal numbers")
    first_full = flags.index(0)
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 1e4)},
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": keys.real("rope.freq_base", 1e6),
            "partial_rotary_factor": _part_turned(file, dims[2] // 2),
        },
    }
    config = common(file, keys, "gemma4_text") | {
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "head_dim": dims[0],
        "global_head_dim": dims[2],
        "num_key_value_heads": of_windows[0],
        "num_global_key_value_heads": of_all[0],
        "attention_k_eq_v": f"blk.{first_full}.attn_v.weight" not in file.tensors,
        "num_kv_shared_layers": keys.integer("attention.shared_kv_layers", 0, most=keys.layers),
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if flag else "full_attention" for flag in flags],
        "rope_parameters": ropes,
        "intermediate_size": min(widths),
        "use_double_wide_mlp": min(widths) != max(widths),
        "hidden_size_per_layer_input": keys.integer("embedding_length_per_layer_input", 0),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id", 0),
    }
    if table := file.tensors.get("per_layer_token_embd.weight"):
        config["vocab_size_per_layer_input"] = table.shape[0]
    if keys.has("final_logit_softcapping"):
        config["final_logit_softcapping"] = keys.real("final_logit_softcapping")
    if count := keys.integer("expert_count", 0):
        config |= {"enable_moe_block": True, "num_experts": count, "top_k_experts": keys.integer("expert_used_count")}
        config["moe_intermediate_size"] = keys.integer("expert_feed_forward_length")
    return config


def _part_turned(file: GgufFile, half: int) -> float:
    """The part of a head of 2 * half numbers that layers without a window turn."""
    if (tensor := file.tensors.get(ROPE_FACTORS)) is None:
        return 1.0
    if tensor.shape != (half,):
        raise ModelFileError(f"{file.path}: {ROPE_FACTORS!r} has shape {list(tensor.shape)}; expected [{half}]")
    factors = np.concatenate(list(file.rows(ROPE_FACTORS)), axis=None)
    count = int((factors == 1).sum())
    if not count or (factors[:count] != 1).any() or (factors[count:] < 1e20).any():
        raise UnsupportedModelError(f"{file.path} has RoPE factors in {ROPE_FACTORS!r} other than 1 and infinity")
    return count / half


def entries(file: GgufFile, config: dict[str, Any]) -> dict[str, GgufEntry]:
    """Of every tensor by the name that transformers has for it, what it is made of. Its shape is the file's: whether
    that is the model's is checked where it is loaded."""
    result = {}
    last_with_keys = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    for name in file.tensors:
        block = _BLOCK.fullmatch(name)
        stem = name.removesuffix(".weight")
        if block is not None and block[2] in _IN_LAYER:
            if block[2] not in _OF_KEYS or int(block[1]) < last_with_keys:  # others take over keys of a layer before
                result[f"model.layers.{block[1]}.{_IN_LAYER[block[2]]}"] = _entry(file, name)
        elif block is not None and block[2] == "ffn_gate_exps.weight":
            gate_up = _entry(file, name, name.replace("gate", "up"))
            result[f"model.layers.{block[1]}.experts.gate_up_proj"] = gate_up
        elif stem in _NAMES:
            result[f"model.{_NAMES[stem]}.weight"] = _entry(file, name)
        elif stem == "output":
            result["lm_head.weight"] = _entry(file, name)
        elif name != ROPE_FACTORS and not (block is not None and block[2] == "ffn_up_exps.weight"):
            raise UnsupportedModelError(f"{file.path} has a tensor {name!r:.80}, which Gemma 4 does not know")
    return result


def _entry(file: GgufFile, *names: str) -> GgufEntry:
    """One tensor, or the rows of several, expert by expert."""
    parts, tensor = [], file.tensors[names[0]]
    for name in names:
        part = file.tensors.get(name)
        if part is None or part.shape != tensor.shape or len(part.shape) not in (1, len(names) + 1, 3):
            raise ModelFileError(f"{file.path}: tensor {name!r} is missing or has another shape than its layer's")
        *rows, width = part.shape if len(part.shape) > 1 else (*part.shape, 1)
        parts.append(GgufPart(part.kind.name, (int(np.prod(rows)), width), part.offset))
    shape = tensor.shape if len(names) == 1 else (tensor.shape[0], len(names) * tensor.shape[1], tensor.shape[2])
    return GgufEntry(shape, tuple(parts), 1 if len(names) == 1 else shape[0])
