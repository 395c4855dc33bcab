"""Tiny random checkpoints of transformers' models, and whether Lamina computes what transformers computes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from lamina.config import EngineConfig
from lamina.launch.kv_sizing import holder_config
from lamina.measure.probe import Probe
from lamina.system.machine import this_machine
from lamina_workers.checkpoints.model_checkpoint import open_checkpoint
from lamina_workers.converted.config import converted_config
from lamina_workers.converted.models import decoder_of, load_model, model_config
from lamina_workers.decoder.model import Decoder

VOCABULARY = 97
PROMPT, DECODED = 41, 6
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.1,
    "head_dim": 16,
    "sliding_window": 9,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {"num_key_value_heads": 4, "head_dim": None}  # k and v of all heads come from one vector
_NARROW = _LATENT | {"kv_lora_rank": 32, "q_lora_rank": 48}  # wider than the residual stream they would add rounding
_INDEXED = _NARROW | {"head_dim": 16, "index_topk": 16, "index_head_dim": 64}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_GRANITE = {"attention_multiplier": 0.25}
_KINDS = ["linear_attention", "full_attention"] * 2
_DELTA = {
    "layer_types": _KINDS, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "glm4_moe_lite", "sarvam_mla"), _LATENT),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3"), _NARROW),
    "youtu": _LATENT,
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _DELTA),
    "granitemoehybrid": _MAMBA | _GRANITE | {"layer_types": _KINDS, "shared_intermediate_size": 32},
    "nemotron_h": {
        "num_hidden_layers": None, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16,
        "moe_shared_expert_intermediate_size": 32, "time_step_min": 1e-9,  # transformers bounds prompts alone by it
    },
    **{kind: {"text_config": _DELTA} for kind in ("qwen3_5", "qwen3_5_moe")},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "kimi_linear": _NARROW | {
        "layer_types": _KINDS, "num_experts": None, "linear_head_dim": 16, "linear_num_heads": 4,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": None,
    },
    "longcat_flash": {**_LATENT, "num_layers": 2, "num_hidden_layers": None},
    **dict.fromkeys(("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared"), _GRANITE),
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4, "window_size": 9,
        "num_hidden_layers": None, "num_attention_heads": None,
    },
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    **{
        kind: {"is_decoder": True, "pad_token_id": 0}
        for kind in (
            "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "roberta", "roc_bert",
            "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "megatron-bert", "rembert", "roformer", "big_bird",
            "xmod",
        )
    },
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gemma4_text": {"global_head_dim": 32, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8},
    "falcon": {"head_dim": None},
    "modernbert-decoder": {"pad_token_id": 0},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse"] * 4, "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 3,
    },
    "deepseek_v32": _INDEXED,
    "glm_moe_dsa": _INDEXED,
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0},
}  # fmt: skip
"""What a model's type needs beside, or other than, `COMMON`; None: leave out."""


def make(kind: str, folder: Path, **more: Any) -> transformers.PreTrainedModel:
    """A random checkpoint of model type `kind` in `folder`, and its model in float32. Norms and biases are random too,
    so that ignoring one shows. Of a model for pictures too, the part for text."""
    torch.manual_seed(3)
    config = config_of(kind, **more).get_text_config(decoder=True)
    model_class = getattr(transformers, NAMES[kind])
    model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32, converts: bool = False) -> Decoder:
    """The decoder that Lamina makes of a folder; `converts`: not as a native family."""
    raw = json.loads((folder / "config.json").read_text())
    config = converted_config(raw) if converts else model_config(folder)
    with open_checkpoint(folder) as checkpoint, torch.inference_mode():
        return decoder_of(config, load_model(config, checkpoint, dtype, torch.device("cpu")))


def probe(folder: Path, decoder: Decoder) -> Probe:
    """Sequences at a real attention worker, through the merge of a model worker."""
    engine = EngineConfig(kv_memory=256 << 20)
    holder = holder_config(folder, decoder.config, engine, decoder.dtype, this_machine())
    return Probe(decoder.config, decoder, dataclasses.replace(holder, dtype="float32"))


def difference(model: transformers.PreTrainedModel, folder: Path, decoder: Decoder) -> float:
    """The largest difference of logits from transformers': of a prompt at once, in chunks, and of tokens decoded after
    it, beside those of another sequence."""
    tokens = torch.randint(3, VOCABULARY, (PROMPT + DECODED,), generator=torch.Generator().manual_seed(5)).tolist()
    other = tokens[::-1]
    with torch.inference_mode():
        expected = [model(torch.tensor([each]), use_cache=False).logits[0].float() for each in (tokens, other)]
    served = probe(folder, decoder)
    worst = 0.0
    for chunks in ([PROMPT], [1, 7, PROMPT - 8]):
        handles = [served.open(), served.open()]
        for handle, each, right in zip(handles, (tokens, other), expected, strict=True):
            at = 0
            for count in chunks:
                found = served.read(handle, each[at : at + count])
                worst = max(worst, float((found - right[at : at + count]).abs().max()))
                at += count
        for at in range(PROMPT, PROMPT + DECODED):
            found = served.step([(handles[0], tokens[at]), (handles[1], other[at])])
            right = torch.stack([each[at] for each in expected])
            worst = max(worst, float((found - right).abs().max()))
        for handle in handles:
            served.close(handle)
    return worst


def config_of(kind: str, **more: Any) -> Any:
    """transformers' config of a tiny model."""
    asked = {**COMMON, **OWN.get(kind, {}), **more}
    if "text_config" in asked:
        asked = {"text_config": {**COMMON, **asked["text_config"]}}
    asked = {name: value for name, value in asked.items() if value is not None or name == "pad_token_id"}
    return transformers.CONFIG_MAPPING[kind](**asked)


def write_config(kind: str, folder: Path, **more: Any) -> None:
    """A folder with a config.json alone."""
    (folder / "config.json").write_text(
        json.dumps({**config_of(kind, **more).to_dict(), "architectures": [NAMES[kind]]})
    )
