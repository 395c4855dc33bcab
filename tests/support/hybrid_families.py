"""Tiny models with layers that keep states: transformers' model type and its options, by name, and
as folders of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from real_workers import word_tokenizer
from reference_models import COMMON, reference

VOCABULARY = COMMON["vocab_size"]
DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
GRANITE = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 5.0,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_state": 16,
    "shared_intermediate_size": 80,
}
NEMOTRON = {
    "head_dim": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "n_groups": 3,
    "ssm_state_size": 32,
    "time_step_min": 1e-9,  # transformers bounds prompts alone by it
}
FALCON = {"mamba_d_ssm": 96, "mamba_n_heads": 6, "mamba_n_groups": 3, "mamba_d_state": 32, "mamba_d_head": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": (
        "minimax",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 32, "block_size": 16}
        | {"full_attn_alpha_factor": 1.5, "full_attn_beta_factor": 0.7, "linear_attn_alpha_factor": 0.8}
        | {"linear_attn_beta_factor": 1.2, "mlp_alpha_factor": 1.1, "mlp_beta_factor": 0.6}
        | {"layer_types": ["full_attention", "linear_attention", "linear_attention"]},
    ),
    "qwen3_next": (
        "qwen3_next",
        DELTA
        | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": [1]}
        | {"shared_expert_intermediate_size": 56, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "qwen3_5": (
        "qwen3_5_text",
        DELTA | {"layer_types": ["linear_attention", "full_attention"] * 2, "tie_word_embeddings": True},
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        DELTA
        | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"shared_expert_intermediate_size": 56, "linear_num_value_heads": 6, "linear_num_key_heads": 3},
    ),
    "granite 4": (
        "granitemoehybrid",
        GRANITE | {"num_local_experts": 5, "num_experts_per_tok": 2, "mamba_n_groups": 1},
    ),
    "granite 4, dense with RoPE": (
        "granitemoehybrid",
        GRANITE
        | {"num_local_experts": 0, "mamba_n_groups": 4, "position_embedding_type": "rope"}
        | {"mamba_conv_bias": False, "mamba_proj_bias": True, "mamba_d_head": 16, "mamba_n_heads": 8},
    ),
    "nemotron_h": (
        "nemotron_h",
        NEMOTRON
        | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp", "mlp"]},
    ),
    "nemotron_h with experts": (
        "nemotron_h",
        NEMOTRON
        | {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp", "linear_attention"]}
        | {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24}
        | {"moe_shared_expert_intermediate_size": 40, "routed_scaling_factor": 2.5, "moe_latent_size": 32},
    ),
    "falcon_h1": (
        "falcon_h1",
        FALCON
        | {"mlp_multipliers": [0.7, 1.3], "key_multiplier": 0.6, "attention_out_multiplier": 0.8}
        | {"attention_in_multiplier": 1.2, "ssm_multipliers": [0.9, 1.1, 0.8, 1.3, 0.7], "ssm_in_multiplier": 1.25}
        | {"ssm_out_multiplier": 0.6, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0}
        | {"projectors_bias": True},
    ),
    "kimi_linear": (
        "kimi_linear",
        {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
        | {"linear_head_dim": 16, "linear_num_heads": 4, "num_experts": 6, "num_experts_per_token": 2}
        | {"moe_intermediate_size": 24, "num_expert_group": 2, "topk_group": 1, "kv_lora_rank": 32}
        | {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 24, "model_max_length": 256}
        | {"num_attention_heads": 6, "num_key_value_heads": 6, "linear_num_heads": 6},
    ),
    "falcon_h1 with a norm": (
        "falcon_h1",
        FALCON | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_proj_bias": True},
    ),
}


def written(family: str, folder: Path) -> Any:
    """A random model of a family in a folder, where a token is a word; as transformers has it."""
    model = reference(*FAMILIES[family])
    model.save_pretrained(folder)
    word_tokenizer(folder, VOCABULARY)
    return model
