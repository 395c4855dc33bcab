"""Tiny random decoders of every kind of layer that KV, or a state, is kept of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from engine_rig import tiny_decoder
from policy_bench import TIGHT, under

from lamina_workers.decoder.model import Decoder

WINDOWED: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "use_sliding_window": True,
    "sliding_window": 21,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
SINKS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 9,
}
NARROW_VALUES: dict[str, Any] = {"head_dim": 32, "v_head_dim": 16}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": None,
}
_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "n_group": 4,
    "topk_group": 2,
}
LATENTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT | _EXPERTS | {"architectures": ["DeepseekV2ForCausalLM"], "q_lora_rank": None},
    "deepseek_v3": _LATENT | _EXPERTS | {"architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 1},
    "minicpm3": _LATENT | {"architectures": ["MiniCPM3ForCausalLM"], "tie_word_embeddings": False},
}
BLOCK_INDEX: dict[str, Any] = {
    "architectures": ["MiniMaxM3VLForCausalLM"],
    "model_type": "minimax_m3_vl_text",
    "rope_theta": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "intermediate_size": 40,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 48,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "index_n_heads": 3,
    "index_head_dim": 16,
    "index_block_size": 16,
    "index_topk_blocks": 3,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
}
TOKEN_INDEX: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "num_key_value_heads": 6,
    "rope_theta": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "moe_intermediate_size": 40,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "index_topk": 40,
    "index_n_heads": 24,
    "index_head_dim": 32,
}
STATES: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}


def _made(**fields: Any) -> Callable[[], Decoder]:
    return functools.partial(tiny_decoder, **fields)


_MAKERS: dict[str, Callable[[], Decoder]] = {
    "full": _made(),
    "windowed": _made(**WINDOWED),
    "sinks": _made(**SINKS),
    "narrow values": _made(**NARROW_VALUES),
    "latents": _made(**LATENTS["deepseek_v3"]),
    "block index": _made(**BLOCK_INDEX),
    "token index": _made(**TOKEN_INDEX),
    "states": _made(**STATES),
    "policies of the heads": lambda: under(tiny_decoder(), TIGHT["span"], TIGHT["dilated"], TIGHT["sharded"]),
}
MODELS = tuple(_MAKERS)
ONE_HEAD = ("latents", "token index")
CUT_BY_HEADS = ("block index", "token index")  # whose index has all positions of a sequence at one worker


@functools.cache
def decoder_of(model: str) -> Decoder:
    return _MAKERS[model]()
