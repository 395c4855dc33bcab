"""What llama.cpp's converter makes of a Hugging Face model: names, by the reference library, layouts, and metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import torch

ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
    "granitemoehybrid": "granitehybrid",
    "olmo3": "olmo2",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm_moe_dsa": "glm-dsa",
    "hunyuan_v1_dense": "hunyuan-dense",
    "falcon_h1": "falcon-h1",
    "kimi_linear": "kimi-linear",
    "glm4_moe": "glm4moe",
    "minimax_m2": "minimax-m2",
    "gemma4_text": "gemma4",
    "granitemoeshared": "granitemoe",
    "deepseek_v32": "deepseek32",
}
INTERLEAVED = ("llama", "granite", "granitemoe", "granitehybrid", "smollm3", "nemotron_h", "nemotron_h_moe")
PLUS_ONE = ("gemma2", "gemma3", "qwen3next", "qwen35", "qwen35moe")
Tensors = Iterator[tuple[str, torch.Tensor]]


def architecture(config: Any) -> str:
    kind = ARCHITECTURES.get(config.model_type, config.model_type)
    if kind == "granitehybrid" and set(config.layer_types) == {"full_attention"}:
        return "granitemoe" if config.num_local_experts else "granite"
    return f"{kind}_moe" if kind == "nemotron_h" and "moe" in config.layers_block_type else kind


def permuted(weight: Any, heads: int) -> Any:
    """Of q and k, where llama.cpp rotates neighbours and Hugging Face halves (convert_hf_to_gguf.py, `permute`)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tensors(config: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a GGUF file by their names, of the tensors of a checkpoint."""
    arch = architecture(config)
    known = "glm-dsa" if arch == "deepseek32" else arch  # newer versions of the library know it, with the same names
    code = next(code for code, name in gguf.MODEL_ARCH_NAMES.items() if name == known)
    names = gguf.get_tensor_name_map(code, config.num_hidden_layers)
    result = {}
    for hf_name, tensor in merged(config, weights):
        for name, changed in laid_out(config, arch, hf_name, tensor):
            name = name.replace("e_score_correction_bias", "e_score_correction.bias")
            own = name if name.startswith("blk.") else names.get_name(name, try_suffixes=(".weight", ".bias"))
            own = own or other_name(name)
            result[own] = changed
    if arch == "gemma4" and config.num_kv_shared_layers:  # published checkpoints have these too; nothing reads them
        result[f"blk.{config.num_hidden_layers - 1}.attn_k.weight"] = torch.ones(8, config.hidden_size)
    if arch == "glm4moe":  # one more layer, which predicts the token after the next
        layers, width = config.num_hidden_layers, config.hidden_size
        last, behind = f"blk.{layers - 1}.", f"blk.{layers}."
        result |= {name.replace(last, behind): x for name, x in result.items() if name.startswith(last)}
        result |= {f"{behind}nextn.{norm}.weight": torch.ones(width) for norm in ("enorm", "hnorm", "shared_head_norm")}
        result[f"{behind}nextn.eh_proj.weight"] = torch.ones(width, 2 * width)
    return result


def other_name(name: str) -> str:
    """What newer versions of the library know."""
    part = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.fc([12])_latent_proj\.weight", name)
    if part is None:
        head = re.fullmatch(r"model\.layers\.(\d+)\.(eh_proj|enorm|hnorm|shared_head\.norm)\.weight", name)
        if head is None:
            raise KeyError(name)
        return f"blk.{head[1]}.nextn.{head[2].replace('.', '_')}.weight"
    return f"blk.{part[1]}.ffn_latent_{'down' if part[2] == '1' else 'up'}.weight"


def merged(config: Any, weights: dict[str, torch.Tensor]) -> Tensors:
    """With the experts of a layer in one tensor."""
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in weights.items():
        part = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+\.weight)", name)
        if part is None:
            yield name, tensor.float()
        else:
            stacks.setdefault(f"{part[1]}.{part[3]}", {})[int(part[2])] = tensor.float()
    for name, stack in stacks.items():
        yield name, torch.stack([stack[number] for number in sorted(stack)])


def laid_out(config: Any, arch: str, name: str, x: torch.Tensor) -> Tensors:
    """One tensor as it stands in the file, or several."""
    plain = name.endswith("norm.weight") and "linear_attn" not in name
    if arch in PLUS_ONE and plain:
        x = x + 1
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if arch in INTERLEAVED and name.endswith((f"{part}.weight", f"{part}.bias")):
            x = permuted(x, heads)
    if arch == "gemma4":
        yield of_gemma4(name), x
        return
    if arch == "falcon-h1":
        x = scaled(config, name, x)
    if name.endswith("A_log"):
        x = -torch.exp(x)
    if name.endswith(("mamba.A_log", "mixer.A_log", ".D")):
        x = x.reshape(-1, 1)
    if name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
        x = x.reshape(getattr(config, "mamba_n_groups", None) or config.n_groups, -1)
    if "conv1d.weight" in name:
        x = x.reshape(1, len(x), 1, -1) if arch == "kimi-linear" else x.squeeze()
    name = re.sub(r"\.dt_bias$", ".dt_proj.bias", name)
    name = re.sub(r"sinks$", "sinks.weight", name)
    if arch == "llama":
        name = (
            name.replace("model.layers", "layers").replace("block_sparse_moe.experts", "feed_forward.experts")
            if (".experts." in name)
            else name
        )
    if arch == "kimi-linear":
        for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(f"block_sparse_moe.experts.{ours}", f"mlp.experts.{theirs}")
            name = name.replace(f"block_sparse_moe.{theirs}", f"mlp.{theirs}")
    if arch.startswith("nemotron_h"):
        name = name.replace("model.layers", "backbone.layers").replace("mixer.experts", "mlp.experts")
        name = name.replace("backbone", "model") if "mlp.experts" in name else name
    if arch in ("qwen35", "qwen35moe"):
        x = tiled(config, name, x)
    yield from split(config, arch, name, x)


def of_gemma4(name: str) -> str:
    """The file's name where the library knows none, else one that it knows."""
    part = re.fullmatch(r"model\.layers\.(\d+)\.router\.(scale|per_expert_scale)", name)
    if part is not None:
        return f"blk.{part[1]}.{'ffn_gate_inp' if part[2] == 'scale' else 'ffn_down_exps'}.scale"
    return name if name.endswith(".weight") else f"{name}.weight"


def split(config: Any, arch: str, name: str, x: torch.Tensor) -> Tensors:
    """What one tensor of Hugging Face becomes, where that is several."""
    if arch == "gpt-oss" and ".experts." in name:
        kind = "bias" if name.endswith("_bias") else "weight"
        x = x if kind == "bias" else x.transpose(1, 2)
        base = name.removesuffix("_bias")
        if "down_proj" in name:
            yield f"{base}.{kind}", x
        else:
            yield f"{base.replace('gate_up', 'gate')}.{kind}", x[:, ::2]
            yield f"{base.replace('gate_up', 'up')}.{kind}", x[:, 1::2]
    elif name.endswith("input_linear.weight"):
        block = name.split(".")[2]
        gate, up = x.chunk(2, -2)
        ends = ("exps",) if "block_sparse_moe" in name else ("shexp",) if config.num_local_experts else ()
        for stem, part in (("ffn_gate", gate), ("ffn_up", up)):
            yield f"blk.{block}.{'_'.join((stem, *ends))}.weight", part
    elif name.endswith("shared_mlp.output_linear.weight") and not config.num_local_experts:
        yield name.replace("shared_mlp.output_linear", "mlp.down_proj"), x
    elif name.endswith("experts.gate_up_proj"):
        gate, up = x.chunk(2, -2)
        yield name.replace("gate_up_proj", "gate_proj.weight"), gate
        yield name.replace("gate_up_proj", "up_proj.weight"), up
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", x
    elif name.endswith("kv_b_proj.weight") and arch != "minicpm3":
        heads = x.view(config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, -1)
        yield name.replace("kv_b", "k_b"), heads[:, : config.qk_nope_head_dim].transpose(1, 2)
        yield name.replace("kv_b", "v_b"), heads[:, config.qk_nope_head_dim :]
    elif name.endswith("in_proj_qkvz.weight"):
        keys, group = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
        value = group * config.linear_value_head_dim
        parts = x.view(keys, -1, x.shape[1]).split([config.linear_key_head_dim] * 2 + [value] * 2, 1)
        q, k, v, z = (part.reshape(-1, x.shape[1]) for part in parts)
        yield name.replace("in_proj_qkvz", "in_proj_qkv"), torch.cat((q, k, v))
        yield name.replace("in_proj_qkvz", "in_proj_z"), z
    else:
        yield name, x


def tiled(config: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """Value heads by their places in a group of a key head, then by groups."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    before = 2 * keys * config.linear_key_head_dim

    def reordered(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(keys, values // keys, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

    if "in_proj_qkv" in name or "linear_attn.conv1d" in name:
        return torch.cat((x[:before], reordered(x[before:])))
    if "linear_attn.out_proj" in name:
        return reordered(x.T).T
    return reordered(x) if re.search(r"linear_attn\.(in_proj_[zab]|A_log|dt_proj)", name) else x


def scaled(config: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """Falcon-H1's multipliers are in the weights."""
    into, key = config.attention_in_multiplier, config.key_multiplier
    factors = {
        ".down_proj.": config.mlp_multipliers[1],
        ".gate_proj.": config.mlp_multipliers[0],
        ".k_proj.": into * key,
        ".q_proj.": into,
        ".v_proj.": into,
        ".o_proj.": config.attention_out_multiplier,
        ".out_proj.": config.ssm_out_multiplier,
        "lm_head.": config.lm_head_multiplier,
        "embed_tokens.": config.embedding_multiplier,
    }
    if name.endswith("mamba.in_proj.weight"):
        inner, group = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
        sizes = [inner, inner, group, group, config.mamba_n_heads]
        parts = zip(x.split(sizes), config.ssm_multipliers, strict=True)
        return torch.cat([part * multiplier for part, multiplier in parts]) * config.ssm_in_multiplier
    return x * next((factor for part, factor in factors.items() if part in name), 1.0)


def add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    """What the converter writes of a config, beside the vocabulary."""
    arch = architecture(config)
    if arch == "gemma4":  # whose numbers of heads may be a layer's own
        config.allow_global_per_layer_attribute_access = True

    def of(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    layers, latent = config.num_hidden_layers, of("kv_lora_rank")
    rope = of("rope_parameters") or {}
    windowed = rope.get("sliding_attention", {})
    rope = rope.get("full_attention", rope)
    heads = 1 if latent and arch != "minicpm3" else config.num_key_value_heads
    kinds = of("layer_types") if arch in ("granitehybrid", "kimi-linear") else None
    kinds = of("layers_block_type") if arch.startswith("nemotron") else kinds
    attends = [kind in ("attention", "full_attention") for kind in kinds or []]
    writer.add_context_length(1 << 20 if arch == "granitehybrid" else config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers + (arch == "glm4moe"))
    if arch == "glm4moe":
        writer.add_nextn_predict_layers(1)
    writer.add_head_count(config.num_attention_heads)
    of_layers = [heads * on for on in attends] if attends else heads
    if arch == "gemma4" and config.attention_k_eq_v:
        of_layers = [config.per_layer_config[layer].num_key_value_heads for layer in range(layers)]
    writer.add_head_count_kv(of_layers)
    widths = of("shared_intermediate_size") if arch == "granitehybrid" else of("intermediate_size")
    if arch == "granite" and config.model_type != "granite":
        widths = of("shared_intermediate_size")
    if arch == "granitehybrid" and config.num_local_experts:
        widths = config.intermediate_size
    if arch.startswith("nemotron_h"):
        widths = [config.intermediate_size * (kind in ("mlp", "moe")) for kind in config.layers_block_type]
    if arch == "gemma4" and config.use_double_wide_mlp:
        widths = [widths << (mode == "reuse") for mode in config.kv_sharing_modes]
    if widths is not None:
        writer.add_feed_forward_length(widths)
    (writer.add_layer_norm_eps if arch == "cohere2" else writer.add_layer_norm_rms_eps)(
        of("layer_norm_eps", "layer_norm_epsilon")
        if arch in ("cohere2",) or "nemotron" in arch
        else config.rms_norm_eps
    )
    head_dim = of("head_dim") or config.hidden_size // config.num_attention_heads
    turned = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if latent:
        rank, nope, rotary = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
        mla = arch != "minicpm3"
        writer.add_kv_lora_rank(rank)
        if of("q_lora_rank"):
            writer.add_q_lora_rank(config.q_lora_rank)
        writer.add_key_length(rank + rotary if mla else nope + rotary)
        if mla:
            writer.add_value_length(rank)
            writer.add_key_length_mla(nope + rotary)
            writer.add_value_length_mla(config.v_head_dim)
        turned = rotary
        if of("index_topk"):
            writer.add_indexer_head_count(config.index_n_heads)
            writer.add_indexer_key_length(config.index_head_dim)
            writer.add_indexer_top_k(config.index_topk)
    elif arch not in ("llama", "granite", "granitemoe", "phi3", "gemma4"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch not in ("gpt-oss", "gemma2", "gemma3", "gemma4", "falcon-h1"):
        writer.add_rope_dimension_count(turned)
    if rope.get("rope_theta"):
        theta = rope["rope_theta"]
        if rope.get("alpha"):
            theta *= rope["alpha"] ** (head_dim / (head_dim - 2))
        writer.add_rope_freq_base(theta)
    if windowed.get("rope_theta"):
        writer.add_rope_freq_base_swa(windowed["rope_theta"])
    add_scaling(writer, config, rope)
    if of("sliding_window") and not arch.startswith(("qwen", "smollm")):
        writer.add_sliding_window(config.sliding_window)
    if arch == "olmo2" and of("sliding_window"):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    for name, add in (
        ("attention_multiplier", writer.add_attention_scale),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("logit_scale", writer.add_logit_scale),
    ):
        if of(name):
            add(getattr(config, name))
    if of("embedding_multiplier") and arch != "falcon-h1":
        writer.add_embedding_scale(config.embedding_multiplier)
    add_experts(writer, config, arch, of)
    add_states(writer, config, arch)
    if arch == "gemma4":
        add_gemma4(writer, config)


def add_scaling(writer: gguf.GGUFWriter, config: Any, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type")
    if kind == "llama3":
        half = config.head_dim // 2
        wavelength = 2 * np.pi * rope["rope_theta"] ** (np.arange(half) / half)
        smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name in ("beta_fast", "beta_slow"):
            if name in rope:
                getattr(writer, f"add_rope_scaling_yarn_{name}")(rope[name])
        if "mscale_all_dim" in rope:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    elif kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.float32(rope[f"{name}_factor"]))


def add_gemma4(writer: gguf.GGUFWriter, config: Any) -> None:
    of_windows, of_all = (config.per_layer_config[kind] for kind in ("sliding_attention", "full_attention"))
    writer.add_key_length(of_all.head_dim)
    writer.add_value_length(of_all.head_dim)
    writer.add_key_length_swa(of_windows.head_dim)
    writer.add_value_length_swa(of_windows.head_dim)
    writer.add_rope_dimension_count(of_all.head_dim)
    writer.add_rope_dimension_count_swa(of_windows.head_dim)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input or 0)
    if config.num_experts:
        writer.add_expert_used_count(config.top_k_experts)
    turned = int(of_all.head_dim * config.rope_parameters["full_attention"]["partial_rotary_factor"]) // 2
    factors = [1.0] * turned + [1e30] * (of_all.head_dim // 2 - turned)
    writer.add_tensor("rope_freqs.weight", np.float32(factors))


def add_experts(writer: gguf.GGUFWriter, config: Any, arch: str, of: Any) -> None:
    count = of("n_routed_experts", "num_local_experts", "num_experts")
    if not count or arch == "nemotron_h":
        return
    writer.add_expert_count(count)
    if used := of("num_experts_per_tok", "num_experts_per_token"):
        writer.add_expert_used_count(used)
    for name, add in (
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("n_group", writer.add_expert_group_count),
        ("num_expert_group", writer.add_expert_group_count),
        ("topk_group", writer.add_expert_group_used_count),
        ("routed_scaling_factor", writer.add_expert_weights_scale),
        ("moe_latent_size", writer.add_moe_latent_size),
    ):
        if of(name):
            add(getattr(config, name))
    if arch in ("deepseek2", "deepseek32", "glm-dsa", "kimi-linear", "glm4moe"):
        kinds = of("mlp_layer_types") or ["dense"] * config.first_k_dense_replace
        writer.add_leading_dense_block_count(kinds.count("dense"))
    if arch in ("deepseek2", "deepseek32", "glm-dsa", "nemotron_h_moe", "kimi-linear", "glm4moe"):
        writer.add_expert_shared_count(of("n_shared_experts", "num_shared_experts") or 0)
        if of("norm_topk_prob") and arch != "kimi-linear":
            writer.add_expert_weights_norm(True)
    if config.model_type in ("deepseek_v3", "deepseek_v32", "glm4_moe", "minimax_m2"):
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def add_states(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    if arch.startswith(("qwen3next", "qwen35")):
        sizes = (config.linear_conv_kernel_dim, config.linear_key_head_dim, config.linear_num_key_heads)
        sizes += (config.linear_num_value_heads, config.linear_value_head_dim * config.linear_num_value_heads)
        writer.add_full_attention_interval(next(i for i, kind in enumerate(config.layer_types, 1) if "full" in kind))
    elif arch.startswith("nemotron_h"):
        sizes = (config.conv_kernel, config.ssm_state_size, config.n_groups, config.mamba_num_heads)
        sizes += (config.mamba_num_heads * config.mamba_head_dim,)
        writer.add_rope_scaling_finetuned(False)
    elif arch in ("granitehybrid", "falcon-h1"):
        sizes = (config.mamba_d_conv, config.mamba_d_state, config.mamba_n_groups, config.mamba_n_heads)
        sizes += (config.mamba_d_ssm if arch == "falcon-h1" else config.mamba_expand * config.hidden_size,)
        writer.add_rope_scaling_finetuned(getattr(config, "position_embedding_type", None) == "rope")
    elif config.model_type == "granitemoehybrid":
        writer.add_rope_scaling_finetuned(config.position_embedding_type == "rope")
        return
    elif arch == "kimi-linear":
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_kda_head_dim(config.linear_head_dim)
        return
    else:
        return
    conv, state, groups, heads, inner = sizes
    writer.add_ssm_conv_kernel(conv)
    writer.add_ssm_state_size(state)
    writer.add_ssm_group_count(groups)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(inner)
