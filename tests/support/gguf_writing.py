"""Small random models of every GGUF family, written as GGUF by the reference library."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, rope_theta=100000.0, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SIZES, rope_theta=500000.0, rope_scaling=LLAMA3, tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZES, sliding_window=32),
    "qwen2": Qwen2Config(**{name: size for name, size in SIZES.items() if name != "head_dim"}, rope_theta=1e6),
    "qwen3": Qwen3Config(**SIZES, rope_theta=1e6),
    "gemma3": Gemma3TextConfig(**SIZES | {"num_hidden_layers": 7}, sliding_window=32, query_pre_attn_scalar=8),
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA3_PARTS = PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str, arch: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{(GEMMA3_PARTS if arch == 'gemma3' else PARTS)[part]}.{kind}"


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to q and k of the llama family (convert_hf_to_gguf.py, `permute`)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def random_blocks(kind: str, n_out: int, n_in: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Rows of ggml's blocks, uint8, whose numbers are as large as those of a model. The reference library cannot make
    K kinds, but any bytes are codes and scales; only the factors of the scales are put in."""
    draw = np.random.default_rng(seed)
    code = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        return gguf.quants.quantize(draw.standard_normal((n_out, n_in), dtype=np.float32) * n_in**-0.5, code)
    raw = draw.integers(0, 256, (n_out, n_in // 256, gguf.GGML_QUANT_SIZES[code][1]), dtype=np.uint8)
    factor = (draw.uniform(0.5, 1.0, (n_out, n_in // 256, 1)) * n_in**-0.5).astype(np.float32)

    def half(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return x.astype(np.float16).view(np.uint8)

    if kind == "Q2_K":
        raw[..., -4:-2], raw[..., -2:] = half(factor / 32), half(factor / 16)
    elif kind == "Q6_K":
        raw[..., -2:] = half(factor / 2048)
    else:
        raw[..., :2], raw[..., 2:4] = half(factor / (32 << (kind == "Q5_K")) / 8), half(factor / 32)
    return raw.reshape(n_out, -1)


def write_gguf(
    path: Path, config: Any, weights: dict[str, torch.Tensor], kinds: Mapping[str, str] | None = None, **extra: Any
) -> Path:
    """A GGUF of a Hugging Face model, written by the reference library in the way of llama.cpp's converter.

    kinds: for the ends of the file's names, such as "attn_q.weight", random blocks of that kind in the place of the
    weights.
    """
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    else:
        writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if config.model_type in ("mistral", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if rope["rope_type"] == "llama3":
        half = config.head_dim // 2
        wavelength = 2 * np.pi * rope["rope_theta"] ** (np.arange(half) / half)
        smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32))
    for key, value in extra.items():
        writer.add_uint32(key.replace("__", "."), value)
    add_vocabulary(writer, config.vocab_size)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for name, tensor in weights.items():
        values = tensor.float().numpy()
        for part, count in heads.items():
            if arch == "llama" and part in name:
                values = permuted(values, count)
        if arch == "gemma3" and name.endswith("norm.weight"):
            values = values + 1  # as llama.cpp's converter does
        own = gguf_name(name, arch)
        kind = next((kind for end, kind in (kinds or {}).items() if own.endswith(end)), None)
        if kind is None:
            writer.add_tensor(own, np.ascontiguousarray(values))
        else:
            blocks = random_blocks(kind, *values.shape, seed=zlib.crc32(own.encode()))
            writer.add_tensor(own, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Byte-level BPE: every byte, a few merges, unused words, and special tokens at the end."""
    merges = ["Ġ t", "h e", "Ġt he", "1 2", "Ġ 1"]
    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens += [f"[PAD{i}]" for i in range(size - len(tokens) - len(special))] + special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(size - 2)
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.05
        if parameter.dim() == 1:
            parameter.data = (parameter.data * 256).round() / 256  # 1 + weight is exact then
    return model.eval()


def write_tiny_llama(path: Path) -> Path:
    """A small llama as GGUF."""
    model = tiny("llama")
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    return write_gguf(path, model.config, weights)
