#!/usr/bin/env python3
"""A GGUF file of a large model's shape with few layers and random weights, for measuring speed.

usage: scripts/bench/random_gguf.py SHAPE FILE.gguf [--layers 10]

SHAPE is `qwen35moe`, that of Qwen3.5-35B-A3B with Q4_K, or `gpt-oss`, that of gpt-oss-20b with MXFP4 experts and Q8_0.
The vocabulary is cut as the layers are, so that the head keeps its share of a step. Any bytes are codes and scales of
ggml's blocks; only the factors of the scales are put in. All layers have the same numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Block = np.ndarray[Any, Any]
Tensor = tuple[str, Block, str | None]
Draw = np.random.Generator


def blocks(draw: Draw, kind: str, *shape: int) -> Block:
    """Random blocks whose numbers are as large as those of a model."""
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    *outer, n_in = shape
    raw = draw.integers(0, 256, (*outer, n_in // numbers, size), dtype=np.uint8)
    factor = np.full((*outer, n_in // numbers, 1), n_in**-0.5, np.float32)

    def half(x: Block) -> Block:
        return x.astype(np.float16).view(np.uint8)

    if kind == "MXFP4":
        raw[..., 0] = 127 + round(np.log2(n_in**-0.5 / 3))
    elif kind == "Q8_0":
        raw[..., :2] = half(factor / 74)
    elif kind == "Q6_K":
        raw[..., -2:] = half(factor / 2048)
    else:
        raw[..., :2], raw[..., 2:4] = half(factor / 256), half(factor / 32)
    return raw.reshape(*outer, -1)


def floats(draw: Draw, *shape: int, size: float = 0.02) -> Block:
    return (draw.standard_normal(shape) * size).astype(np.float32)


def qwen35moe(writer: gguf.GGUFWriter, draw: Draw, layers: int) -> Iterator[Tensor]:
    """Gated delta nets and gated attention, 3 to 1, with 256 experts and a shared one."""
    hidden, experts, inner, keys, values, width = 2048, 256, 512, 16, 32, 128
    heads, kv_heads, head, vocabulary = 16, 2, 256, 248320 // 40 * layers // 256 * 256
    writer.add_context_length(1 << 15)
    writer.add_embedding_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(64)
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    writer.add_rope_freq_base(1e7)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(8)
    writer.add_expert_feed_forward_length(inner)
    writer.add_expert_shared_feed_forward_length(inner)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(width)
    writer.add_ssm_group_count(keys)
    writer.add_ssm_time_step_rank(values)
    writer.add_ssm_inner_size(values * width)
    writer.add_uint32("qwen35moe.full_attention_interval", 4)
    add_vocabulary(writer, vocabulary)

    def matrix(*shape: int) -> Block:
        return blocks(draw, "Q4_K", *shape)

    ones, state = np.ones(hidden, np.float32), values * width
    mixed = (2 * keys + values) * width
    moe: dict[str, tuple[Block, str | None]] = {
        "attn_norm.weight": (ones, None),
        "post_attention_norm.weight": (ones, None),
        "ffn_gate_inp.weight": (floats(draw, experts, hidden), None),
        "ffn_gate_inp_shexp.weight": (floats(draw, hidden), None),
        "ffn_gate_exps.weight": (matrix(experts, inner, hidden), "Q4_K"),
        "ffn_up_exps.weight": (matrix(experts, inner, hidden), "Q4_K"),
        "ffn_down_exps.weight": (matrix(experts, hidden, inner), "Q4_K"),
        "ffn_gate_shexp.weight": (matrix(inner, hidden), "Q4_K"),
        "ffn_up_shexp.weight": (matrix(inner, hidden), "Q4_K"),
        "ffn_down_shexp.weight": (matrix(hidden, inner), "Q4_K"),
    }
    attention: dict[str, tuple[Block, str | None]] = {
        "attn_q.weight": (matrix(2 * heads * head, hidden), "Q4_K"),
        "attn_k.weight": (matrix(kv_heads * head, hidden), "Q4_K"),
        "attn_v.weight": (matrix(kv_heads * head, hidden), "Q4_K"),
        "attn_q_norm.weight": (np.ones(head, np.float32), None),
        "attn_k_norm.weight": (np.ones(head, np.float32), None),
        "attn_output.weight": (matrix(hidden, heads * head), "Q4_K"),
    }
    delta: dict[str, tuple[Block, str | None]] = {
        "attn_qkv.weight": (matrix(mixed, hidden), "Q4_K"),
        "attn_gate.weight": (matrix(state, hidden), "Q4_K"),
        "ssm_conv1d.weight": (floats(draw, mixed, 4, size=0.5), None),
        "ssm_dt.bias": (floats(draw, values, size=0.5), None),
        "ssm_a": (-np.exp(floats(draw, values, size=0.5)), None),
        "ssm_alpha.weight": (floats(draw, values, hidden), None),
        "ssm_beta.weight": (floats(draw, values, hidden), None),
        "ssm_norm.weight": (np.ones(width, np.float32), None),
        "ssm_out.weight": (matrix(hidden, state), "Q4_K"),
    }
    yield "token_embd.weight", matrix(vocabulary, hidden), "Q4_K"
    yield "output.weight", blocks(draw, "Q6_K", vocabulary, hidden), "Q6_K"
    yield "output_norm.weight", ones, None
    for layer in range(layers):
        for name, (values_of, kind) in (moe | (delta if (layer + 1) % 4 else attention)).items():
            yield f"blk.{layer}.{name}", values_of, kind


def gpt_oss(writer: gguf.GGUFWriter, draw: Draw, layers: int) -> Iterator[Tensor]:
    """Attention with sinks, every second within a window, and 32 experts with biases and a clamped gate."""
    hidden, experts, heads, kv_heads, head = 2880, 32, 64, 8, 64
    vocabulary = 201088 * layers // 24 // 256 * 256
    writer.add_context_length(1 << 15)
    writer.add_embedding_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_sliding_window(128)
    writer.add_rope_freq_base(150000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(32.0)
    writer.add_rope_scaling_orig_ctx_len(4096)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(4)
    writer.add_feed_forward_length(hidden)
    writer.add_expert_feed_forward_length(hidden)
    add_vocabulary(writer, vocabulary)
    ones = np.ones(hidden, np.float32)
    parts: dict[str, tuple[Block, str | None]] = {
        "attn_norm.weight": (ones, None),
        "post_attention_norm.weight": (ones, None),
        "attn_sinks.weight": (floats(draw, heads), None),
        "ffn_gate_inp.weight": (floats(draw, experts, hidden), None),
        "ffn_gate_inp.bias": (floats(draw, experts), None),
    }
    for name, n_out, n_in in (
        ("attn_q", heads * head, hidden),
        ("attn_k", kv_heads * head, hidden),
        ("attn_v", kv_heads * head, hidden),
        ("attn_output", hidden, heads * head),
    ):
        parts[f"{name}.weight"] = blocks(draw, "Q8_0", n_out, n_in), "Q8_0"
        parts[f"{name}.bias"] = floats(draw, n_out), None
    for name in ("gate", "up", "down"):
        parts[f"ffn_{name}_exps.weight"] = blocks(draw, "MXFP4", experts, hidden, hidden), "MXFP4"
        parts[f"ffn_{name}_exps.bias"] = floats(draw, experts, hidden), None
    for name in ("token_embd.weight", "output.weight"):
        yield name, blocks(draw, "Q8_0", vocabulary, hidden), "Q8_0"
    yield "output_norm.weight", ones, None
    for layer in range(layers):
        for name, (values, kind) in parts.items():
            yield f"blk.{layer}.{name}", values, kind


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Every byte, unused words, and special tokens at the end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    tokens = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    special = ["<|endoftext|>", "<|end|>"]
    tokens += ["he", *(f"[PAD{i}]" for i in range(size - len(tokens) - len(special) - 1)), *special]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(size - 2)
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)


SHAPES: dict[str, Callable[[gguf.GGUFWriter, Draw, int], Iterator[Tensor]]] = {
    "qwen35moe": qwen35moe,
    "gpt-oss": gpt_oss,
}


def write(shape: str, path: Path, layers: int) -> None:
    writer = gguf.GGUFWriter(path, shape)
    writer.add_name(f"{shape} of {layers} layers")
    writer.add_block_count(layers)
    tensors = list(SHAPES[shape](writer, np.random.default_rng(0), layers))
    for name, values, kind in tensors:
        code = None if kind is None else gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, values, _ in tensors:
        writer.write_tensor_data(values)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, default=10)
    args = parser.parse_args()
    write(args.shape, args.file, args.layers)


if __name__ == "__main__":
    main()
