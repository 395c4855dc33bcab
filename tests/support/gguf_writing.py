"""Small random models of every GGUF family, written as GGUF by the reference library."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf_layouts import add_metadata, architecture, tensors
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


def random_blocks(kind: str, n_out: int, n_in: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Rows of ggml's blocks, uint8, whose numbers are as large as those of a model. The reference library cannot make
    K kinds, but any bytes are codes and scales; only the factors of the scales are put in."""
    draw = np.random.default_rng(seed)
    code = gguf.GGMLQuantizationType[kind]
    if kind not in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K") and not kind.startswith("IQ"):
        return gguf.quants.quantize(draw.standard_normal((n_out, n_in), dtype=np.float32) * n_in**-0.5, code)
    numbers, size = gguf.GGML_QUANT_SIZES[code]
    raw = draw.integers(0, 256, (n_out, n_in // numbers, size), dtype=np.uint8)
    factor = (draw.uniform(0.5, 1.0, (n_out, n_in // numbers, 1)) * n_in**-0.5).astype(np.float32)

    def half(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return x.astype(np.float16).view(np.uint8)

    if kind == "Q2_K":
        raw[..., -4:-2], raw[..., -2:] = half(factor / 32), half(factor / 16)
    elif kind in ("Q3_K", "Q6_K"):
        raw[..., -2:] = half(factor / (64 if kind == "Q3_K" else 2048))
    elif kind.startswith("IQ"):
        raw[..., :2] = half(factor / (64 if kind == "IQ4_NL" else 2048))
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
    writer = gguf.GGUFWriter(path, architecture(config))
    writer.add_name("tiny")
    add_metadata(writer, config)
    for key, value in extra.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(key.replace("__", "."), value)
    add_vocabulary(writer, config.vocab_size)
    for own, tensor in tensors(config, weights).items():
        values = tensor.numpy()
        kind = next((kind for end, kind in (kinds or {}).items() if own.endswith(end)), None)
        if kind is None:
            writer.add_tensor(own, np.ascontiguousarray(values))
        else:
            blocks = random_blocks(kind, values.size // values.shape[-1], values.shape[-1], zlib.crc32(own.encode()))
            blocks = blocks.reshape(*values.shape[:-1], -1)
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
