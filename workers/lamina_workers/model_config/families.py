"""The families of models that are built here: how each differs from Llama."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lamina_workers.model_config.family import ExpertNames, Family, Norms, States

_QWEN = {"sliding_window": 4096, "max_window_layers": 28}
_GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
_GEMMA = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_DEEPSEEK = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_DEEPSEEK |= {"n_routed_experts": 64}
_DEEPSEEK_V3: dict[str, Any] = _DEEPSEEK | {
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
}
_DEEPSEEK_V3 |= {"routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
_DEEPSEEK_V3 |= {"first_k_dense_replace": 3}
_DEEPSEEK_V32 = _DEEPSEEK_V3 | {"index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64}
_LATENT: dict[str, Any] = {"latent": True, "interleaved": True, "mlp_bias": False}
_LATENT |= {"experts": ExpertNames(shared="mlp.shared_experts")}
_FOUR_NORMS = Norms(
    behind_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    behind_mlp="post_feedforward_layernorm",
)
_NORMS_BEHIND = Norms("", "post_attention_layernorm", "", "post_feedforward_layernorm")
_MIXTRAL_EXPERTS = ExpertNames("block_sparse_moe", maps=("w1", "w3", "w2"))
_MINIMAX_NAMES = {"num_local_experts": "n_routed_experts", "intermediate_size": "moe_intermediate_size"}
_QWEN3_NEXT = {
    "head_dim": 256,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_QWEN3_5: dict[str, Any] = {
    "norm_offset": 1.0,
    "qk_norm": "head",
    "partial": True,
    "gated": True,
    "states": States(
        "gated_delta",
        "linear_attn",
        {"in_proj_qkv": ("q", "k", "v"), "in_proj_z": ("z",), "in_proj_b": ("beta",), "in_proj_a": ("step",)},
        conv={"conv1d": ("q", "k", "v")},
    ),
    "unread": r"mtp\..*|model\.visual\..*",
    "renamed": {"model.language_model.": "model."},
    "multimodal": True,
}
_QWEN3_5_MOE: dict[str, Any] = _QWEN3_5 | {
    "defaults": _QWEN3_NEXT | {"norm_topk_prob": True, "intermediate_size": 1},
    "expert_size": "moe_intermediate_size",
    "shared_expert": "shared_expert_intermediate_size",
}
_MAMBA2 = States("mamba2", "mamba", {"in_proj": ("z", "v", "k", "q", "step")}, conv={"conv1d": ("v", "k", "q")})

FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral", {"sliding_window": 4096, "num_key_value_heads": 8}, windows="always"),
    "Qwen2ForCausalLM": Family("qwen2", _QWEN, qkv_bias=True, o_bias=False, windows="layers"),
    "Qwen3ForCausalLM": Family("qwen3", _QWEN | {"head_dim": 128}, qk_norm="head", windows="layers"),
    "SmolLM3ForCausalLM": Family(
        "smollm3", {"rope_theta": 2e6, "tie_word_embeddings": True}, windows="layers", rotary="listed"
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "norm_topk_prob": True},
        windows="always",
        expert_size="intermediate_size",
        experts=_MIXTRAL_EXPERTS,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", {"sliding_window": 4096}, qk_norm="head", windows="flag", expert_size="moe_intermediate_size"
    ),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        _QWEN,
        qkv_bias=True,
        o_bias=False,
        windows="layers",
        expert_size="moe_intermediate_size",
        shared_expert="shared_expert_intermediate_size",
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        {"attention_bias": True, "head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
        | {"norm_topk_prob": True}  # the same as a softmax over those taken
        | {"sliding_window": 128, "rope_theta": 150_000.0, "rope_parameters": _GPT_OSS_ROPE},
        windows="pattern",
        pattern=2,
        expert_size="intermediate_size",
        expert_bias=True,
        clamped=True,
        experts=ExpertNames(router="router"),
        sinks=True,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        windows="pattern",
        pattern=2,
        embedding_root=True,
        norm_offset=1.0,
        norms=_FOUR_NORMS,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        _GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        windows="pattern",
        pattern=6,
        embedding_root=True,
        norm_offset=1.0,
        qk_norm="head",
        norms=_FOUR_NORMS,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        {"rms_norm_eps": 1e-5},
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        windows="always",
        partial=True,
        qkv="qkv_proj",
        gate_up="gate_up_proj",
    ),
    "GraniteForCausalLM": Family(
        "granite",
        {"attention_multiplier": 1.0},
        scales=("embedding_multiplier", "residual_multiplier", "logits_scaling"),
        divides_logits=True,
    ),
    "Ernie4_5ForCausalLM": Family(
        "ernie4_5",
        {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
        | {"rope_theta": 5e5},
        qkv_bias="use_bias",
        o_bias="use_bias",
        mlp_bias="use_bias",
        interleaved=True,
    ),
    "SeedOssForCausalLM": Family(
        "seed_oss", {"head_dim": 128, "num_key_value_heads": 8, "attention_bias": True}, o_bias="attention_out_bias"
    ),
    "HunYuanDenseV1ForCausalLM": Family(
        "hunyuan_v1_dense",
        {"rms_norm_eps": 1e-5},
        mlp_bias=False,
        qk_norm="rotated",
        qk_norm_names=("query_layernorm", "key_layernorm"),
    ),
    "Glm4ForCausalLM": Family(
        "glm4",
        {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7, "attention_bias": True}
        | {"partial_rotary_factor": 0.5},
        o_bias=False,
        mlp_bias=False,
        interleaved=True,
        partial=True,
        norms=Norms(behind_attention="post_self_attn_layernorm", behind_mlp="post_mlp_layernorm"),
        gate_up="gate_up_proj",
    ),
    "Glm4MoeForCausalLM": Family(
        "glm4_moe",
        {"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "use_qk_norm": False},
        o_bias=False,
        mlp_bias=False,
        groups="sigmoid",
        qk_norm="head",
        partial=True,
        experts=ExpertNames(shared="mlp.shared_experts"),
    ),
    "Olmo2ForCausalLM": Family("olmo2", {"rms_norm_eps": 1e-5}, mlp_bias=False, qk_norm="whole", norms=_NORMS_BEHIND),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 5e5},
        mlp_bias=False,
        windows="pattern",
        pattern=4,
        qk_norm="whole",
        norms=_NORMS_BEHIND,
    ),
    "Cohere2ForCausalLM": Family(
        "cohere2",
        {"tie_word_embeddings": True, "sliding_window": 4096, "layer_norm_eps": 1e-5, "logit_scale": 0.0625},
        eps="layer_norm_eps",
        mlp_bias=False,
        windows="pattern",
        pattern=4,
        rotary="windowed",
        scales=("", "", "logit_scale"),
        norm="layer",
        interleaved=True,
        norms=Norms(before_mlp="", parallel=True),
    ),
    "DeepseekV2ForCausalLM": Family(
        "deepseek_v2", _DEEPSEEK | {"n_shared_experts": 2, "moe_intermediate_size": 1407}, **_LATENT, groups="softmax"
    ),
    "DeepseekV3ForCausalLM": Family("deepseek_v3", _DEEPSEEK_V3, **_LATENT, groups="sigmoid"),
    "DeepseekV32ForCausalLM": Family("deepseek_v32", _DEEPSEEK_V32, **_LATENT, groups="sigmoid", index="tokens"),
    "GlmMoeDsaForCausalLM": Family(
        "glm_moe_dsa",
        _DEEPSEEK_V32
        | {"rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1, "qk_nope_head_dim": 192, "v_head_dim": 256}
        | {"index_n_heads": 32},
        **_LATENT,
        groups="sigmoid",
        index="tokens",
        index_interleaved=True,
    ),
    "MiniCPM3ForCausalLM": Family(
        "minicpm3",
        {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "rms_norm_eps": 1e-5}
        | {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256, "tie_word_embeddings": True},
        latent=True,
        mlp_bias=False,
        scales=("scale_emb", "", ""),
        depth_scales=True,
        divides_logits=True,
    ),
    "MiniMaxForCausalLM": Family(
        "minimax",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "norm_topk_prob": True},
        qkv_bias=False,
        o_bias=False,
        windows="always",
        expert_size="intermediate_size",
        experts=_MIXTRAL_EXPERTS,
        states=States(
            "lightning", "self_attn", {"qkv_proj": ("q", "k", "v"), "output_gate": ("z",)}, by_head=True, gate="sigmoid"
        ),
        normed_stream=True,
        factors={
            "attention": ("full_attn_alpha_factor", "full_attn_beta_factor"),
            "state": ("linear_attn_alpha_factor", "linear_attn_beta_factor"),
            "mlp": ("mlp_alpha_factor", "mlp_beta_factor"),
        },
        unread=r".*\.self_attn\.(slope_rate|(query|key|diagonal)_decay)",
    ),
    "Qwen3NextForCausalLM": Family(
        "qwen3_next",
        _QWEN3_NEXT | {"norm_topk_prob": True},
        expert_size="moe_intermediate_size",
        shared_expert="shared_expert_intermediate_size",
        norm_offset=1.0,
        qk_norm="head",
        partial=True,
        gated=True,
        states=States(
            "gated_delta",
            "linear_attn",
            {"in_proj_qkvz": ("q", "k", "v", "z"), "in_proj_ba": ("beta", "step")},
            by_head=True,
            conv={"conv1d": ("q", "k", "v")},
        ),
        unread=r"mtp\..*",
    ),
    "Qwen3_5ForCausalLM": Family("qwen3_5_text", _QWEN3_NEXT, **_QWEN3_5),
    "Qwen3_5ForConditionalGeneration": Family("qwen3_5", _QWEN3_NEXT, **_QWEN3_5),
    "Qwen3_5MoeForCausalLM": Family("qwen3_5_moe_text", **_QWEN3_5_MOE),
    "Qwen3_5MoeForConditionalGeneration": Family("qwen3_5_moe", **_QWEN3_5_MOE),
    "GraniteMoeHybridForCausalLM": Family(
        "granitemoehybrid",
        {"attention_multiplier": 1.0, "norm_topk_prob": True},
        rotary="typed",
        mlp_size="shared_intermediate_size",
        expert_size="intermediate_size",
        shared_expert="shared_intermediate_size",
        shared_gate=False,
        scales=("embedding_multiplier", "residual_multiplier", "logits_scaling"),
        divides_logits=True,
        states=_MAMBA2,
        experts=ExpertNames(
            "block_sparse_moe",
            "router.layer",
            stacked=("input_linear.weight", "output_linear.weight"),
            shared="mlp",
            always=True,
        ),
        gate_up="gate_up_proj",
        renamed={".shared_mlp.input_linear.": ".mlp.gate_up_proj.", ".shared_mlp.output_linear.": ".mlp.down_proj."},
    ),
    "NemotronHForCausalLM": Family(
        "nemotron_h",
        {"head_dim": 128, "num_key_value_heads": 8, "layer_norm_epsilon": 1e-5, "mlp_hidden_act": "relu2"}
        | {"norm_topk_prob": True},
        eps="layer_norm_epsilon",
        qkv_bias=False,
        o_bias=False,
        rotary="typed",
        expert_size="moe_intermediate_size",
        shared_expert="moe_shared_expert_intermediate_size",
        shared_gate=False,
        ungated_mlp=True,
        groups="sigmoid",
        states=replace(_MAMBA2, module="mixer"),
        mixers="alternating",
        experts=ExpertNames(maps=("", "up_proj", "down_proj"), shared="mlp.shared_experts"),
        norms=Norms("norm", before_mlp="norm"),
        unread=r"mtp\..*",
        renamed={
            "backbone.embeddings.": "model.embed_tokens.",
            "backbone.norm_f.": "model.norm.",
            "backbone.": "model.",
        }
        | {f".mixer.{part}_proj.": f".self_attn.{part}_proj." for part in "qkvo"}
        | {
            f".mixer.{part}.": f".mlp.{part}."
            for part in (
                "up_proj",
                "down_proj",
                "gate",
                "experts",
                "shared_experts",
                "fc1_latent_proj",
                "fc2_latent_proj",
            )
        },
    ),
    "FalconH1ForCausalLM": Family(
        "falcon_h1",
        {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "mamba_d_ssm": 1024},
        scales=("embedding_multiplier", "", "lm_head_multiplier"),
        states=_MAMBA2,
        mixers="both",
        norms=Norms(before_mlp="pre_ff_layernorm"),
        renamed={".feed_forward.": ".mlp.", "model.final_layernorm.": "model.norm."},
    ),
    "KimiLinearForCausalLM": Family(
        "kimi_linear",
        {"rms_norm_eps": 1e-5, "routed_scaling_factor": 2.446, "norm_topk_prob": True, "n_group": 1, "topk_group": 1}
        | {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
        | {"linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4, "first_k_dense_replace": 1},
        aliases={
            "model_max_length": "max_position_embeddings",
            "moe_renormalize": "norm_topk_prob",
            "num_expert_group": "n_group",
            "num_experts": "n_routed_experts",
            "num_experts_per_token": "num_experts_per_tok",
            "num_shared_experts": "n_shared_experts",
        },
        mlp_bias=False,
        rotary="typed",
        groups="sigmoid",
        latent=True,
        states=States(
            "kda",
            "self_attn",
            {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",), "b_proj": ("beta",)},
            conv={f"{part}_conv1d": (part,) for part in "qkv"},
            low_rank={"decay": ("f_a_proj", "f_b_proj"), "z": ("g_a_proj", "g_b_proj")},
            norm="o_norm",
            out="o_proj",
            gate="sigmoid",
        ),
        experts=ExpertNames(maps=("w1", "w3", "w2"), shared="mlp.shared_experts"),
        renamed={".block_sparse_moe.": ".mlp."},
    ),
    "MiniMaxM2ForCausalLM": Family(
        "minimax_m2",
        {"head_dim": 128, "num_key_value_heads": 8, "rope_theta": 5e6, "n_group": 1, "topk_group": 1},
        aliases=_MINIMAX_NAMES | {"rotary_dim": "rotary_numbers"},
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        groups="sigmoid",
        qk_norm="whole",
        partial=True,
        experts=_MIXTRAL_EXPERTS,
        renamed={"block_sparse_moe.e_score": "block_sparse_moe.gate.e_score"},
    ),
    "MiniMaxM3VLForCausalLM": Family(
        "minimax_m3_vl_text",
        {"head_dim": 128, "num_key_value_heads": 4, "rope_theta": 5e6, "norm_topk_prob": True}
        | {"routed_scaling_factor": 2.0, "n_group": 1, "topk_group": 1},
        aliases=_MINIMAX_NAMES,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        mlp_size="dense_intermediate_size",
        shared_expert="shared_intermediate_size",
        groups="sigmoid",
        clamped=True,
        index="blocks",
        norm_offset=1.0,
        qk_norm="head",
        partial=True,
        experts=ExpertNames(shared="mlp.shared_experts", always=True),
        gate_up="gate_up_proj",
    ),
}
