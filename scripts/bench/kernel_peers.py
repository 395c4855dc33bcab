"""What paged attention is measured against: the machine, the rate at which it reads memory, other implementations.

A peer attends one decode step of one layer over dense K and V; the caller chooses the layer and how often, and takes
the time.
"""

from __future__ import annotations

import importlib
import math
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from lamina.measure.hardware.reading import Bandwidth, allocate, repeat, synchronise
from lamina_kernels.compile.emitter import cpu_has

__all__ = [
    "Attend", "Bandwidth", "allocate", "huge_pages", "machine", "peers", "repeat", "sdpa_prefill", "synchronise",
]  # fmt: skip

Attend = Callable[[torch.Tensor, torch.Tensor], object]  # K `[batch, kv_heads, tokens, d_k]` and V of one layer


def machine(device: torch.device) -> dict[str, Any]:
    """What the device is, and what the CPU can multiply."""
    if device.type == "cuda":
        model = torch.cuda.get_device_name(device)
    else:
        found = _lines("/proc/cpuinfo", "model name")
        model = found[0].split(":")[1].strip() if found else platform.processor()
    wanted = {"AVX512_BF16": "avx512bf16", "AVX512_VNNI": "avx512vnni", "AVX_VNNI": "avxvnni"}
    features = {label: cpu_has(x) for label, x in {**wanted, "AMX_BF16": "amx-bf16", "AMX_INT8": "amx-int8"}.items()}
    return {"device": model, "cores": os.cpu_count(), "features": features, "torch": torch.__version__}


def huge_pages() -> float:
    """GiB that this process has in huge pages; 0 where the system does not report it."""
    return sum(int(line.split()[1]) for line in _lines("/proc/self/smaps_rollup", "AnonHugePages")) / 2**20


def _lines(path: str, start: str) -> list[str]:
    text = Path(path).read_text() if Path(path).exists() else ""
    return [line for line in text.splitlines() if line.startswith(start)]


def peers(
    device: torch.device, batch: int, kv_heads: int, group: int, tokens: int, d_k: int, dtype: torch.dtype
) -> Iterator[tuple[str, Attend | str]]:
    """Every implementation's name, and itself, or why it cannot run here. Queries are chosen once."""
    q = torch.randn(batch, kv_heads, group, d_k, device=device).to(dtype)
    single = q.view(batch, kv_heads * group, 1, d_k)
    yield "torch SDPA, group as query tokens", lambda k, v: scaled_dot_product_attention(q, k, v)
    yield "torch SDPA, enable_gqa", lambda k, v: scaled_dot_product_attention(single, k, v, enable_gqa=True)
    yield "torch matmul, softmax, matmul", lambda k, v: _plain(q, k, v)
    kv = q.new_zeros(2, batch, kv_heads, tokens, d_k)
    yield "torch FlexAttention, compiled, group as query tokens", _flex(q, kv)
    yield "torch FlexAttention, compiled, enable_gqa", _flex(single, kv)
    if device.type == "cuda":
        yield "FlashInfer", _flash_infer(q, tokens)
        yield "FlashAttention", _flash_attention(q)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v


def _flex(q: torch.Tensor, kv: torch.Tensor) -> Attend | str:
    """Compiled by a first call, over kv `[2, batch, kv_heads, tokens, d]`."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = partial(torch.compile(flex_attention, dynamic=False), enable_gqa=q.shape[1] > kv.shape[2])
    try:
        attend(q, *kv)
    except RuntimeError as e:  # what every failure to compile derives from: no C++ compiler, too old a CPU
        lines = [line for line in str(e).splitlines() if line.strip()]
        return f"does not compile: {type(e).__name__}: {lines[0] if lines else ''}"
    return partial(attend, q)


def _flash_infer(q: torch.Tensor, tokens: int, page_size: int = 16) -> Attend | str:
    """FlashInfer's paged decode. The numbers are random: dense K is read as pages `[pages, heads, page_size, d]`."""
    try:
        flashinfer = importlib.import_module("flashinfer")
    except ImportError as e:
        return f"not installed: {e}"
    batch, heads, group, d = q.shape
    each = tokens // page_size
    counts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * each
    pages = torch.arange(batch * each, dtype=torch.int32, device=q.device)
    last = torch.full((batch,), page_size, dtype=torch.int32, device=q.device)
    workspace = torch.zeros(1 << 28, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=group > 1)
    kinds = {"q_data_type": q.dtype, "kv_data_type": q.dtype}
    wrapper.plan(counts, pages, last, heads * group, heads, d, page_size, **kinds)
    flat, shape = q.view(batch, heads * group, d), (-1, heads, page_size, d)
    return lambda k, v: wrapper.run(flat, (k.view(shape), v.view(shape)))


def _flash_attention(q: torch.Tensor) -> Attend | str:
    """FlashAttention 3 where it is installed, else 2: `[batch, tokens, heads, d]`, contiguous along d only."""
    for name in ("flash_attn_interface", "flash_attn"):
        try:
            attend = importlib.import_module(name).flash_attn_with_kvcache
        except (ImportError, AttributeError):
            continue
        single = q.flatten(1, 2).unsqueeze(1)
        return lambda k, v: attend(single, k.transpose(1, 2), v.transpose(1, 2))
    return "not installed"


def sdpa_prefill(
    heads: int, d: int, count: int, past: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """torch's causal attention of the last `count` tokens over dense K and V, each head with its own.

    After a past it takes a mask, made beforehand; torch has no other way on a CPU.
    """
    k, v = torch.randn(2, 1, heads, past + count, d, device=device).to(dtype)
    q = torch.randn(1, heads, count, d, device=device).to(dtype)
    if not past:
        return lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
    hidden = torch.ones(count, past + count, dtype=torch.bool, device=device).triu(past + 1)
    mask = torch.zeros(count, past + count, device=device).masked_fill(hidden, -math.inf).to(dtype)
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask)
