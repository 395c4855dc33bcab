"""What paged attention is measured against: the machine, the rate at which it reads memory, other implementations.

A peer attends one decode step of one layer over dense K and V; which layer, how often, and how long that takes is the
caller's. Knows nothing of our attention, of our pages, or of rows.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, literally, njit, types
from numba.extending import intrinsic
from torch.nn.functional import scaled_dot_product_attention

from lamina_kernels import memory
from lamina_kernels.emitter import I64, VI, Emitter, cpu_has
from lamina_kernels.intrinsics import literals, take
from lamina_kernels.launch import HEADER, TAKEN, block_type, launch

SLICE = 1 << 28  # bytes of one timing of the bandwidth: many times what caches keep
LINE, UNROLL = 64, 8  # bytes; lines that an iteration of the loop reads
_READ = np.dtype([*HEADER, ("address", "i8"), ("size", "i8"), ("ahead", "i8"), ("sink", "i8")])
_Read = block_type(_READ)

# How memory is read: streams side by side, bytes that a prefetch runs ahead (0: none), shares for each thread. Which is
# the fastest differs from machine to machine.
VARIANTS = [(1, 0, 1), (2, 4096, 1), (4, 1024, 1), (4, 1024, 16), (8, 1024, 1), (8, 4096, 1), (8, 4096, 16)]
Attend = Callable[[torch.Tensor, torch.Tensor], object]  # K `[batch, kv_heads, tokens, d_k]` and V of one layer


def allocate(size: int, device: torch.device) -> torch.Tensor:
    """uint8 `[size]`, on the CPU in huge pages where there are any."""
    return memory.allocate(size) if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)


def repeat(block: torch.Tensor, flat: torch.Tensor) -> None:
    """Fill `flat` with copies of `block`, both uint8 `[bytes]`."""
    for start in range(0, len(flat), len(block)):
        flat[start : start + len(block)] = block[: len(flat) - start]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    """GiB that this process has in huge pages; 0 where the system does not say."""
    return sum(int(line.split()[1]) for line in _lines("/proc/self/smaps_rollup", "AnonHugePages")) / 2**20


def _lines(path: str, start: str) -> list[str]:
    text = Path(path).read_text() if Path(path).exists() else ""
    return [line for line in text.splitlines() if line.startswith(start)]


class Bandwidth:
    """The rate at which this machine reads `size` bytes of memory: the fastest of several ways, measured at the start.

    On a CPU compiled loops of vector loads, on all threads of torch's own team; on a GPU torch's reductions.
    """

    def __init__(self, size: int, device: torch.device, threads: int) -> None:
        self._device, self._threads, self._place = device, threads, 0
        self._slice = min(SLICE, size) if device.type == "cpu" else size
        self._memory = allocate(size // self._slice * self._slice, device)
        repeat(torch.randn(1 << 18, device=device).view(torch.uint8), self._memory)
        self._readers = dict(self._variants())
        rates: dict[str, list[float]] = {name: [] for name in self._readers}
        for _ in range(9):
            for name in self._readers:
                rates[name].append(self._rate(name))
        self.rates = {name: statistics.median(values[1:]) for name, values in rates.items()}
        self.best = max(self.rates, key=self.rates.__getitem__)

    def __call__(self) -> float:
        """GB/s of the fastest way, over the next slice of memory."""
        return self._rate(self.best)

    def _rate(self, name: str) -> float:
        part = self._memory[self._place : self._place + self._slice]
        self._place = (self._place + self._slice) % len(self._memory)
        start = time.perf_counter()
        self._readers[name](part)
        synchronise(self._device)
        return self._slice / (time.perf_counter() - start) / 1e9

    def _variants(self) -> Iterator[tuple[str, Callable[[torch.Tensor], object]]]:
        if self._device.type != "cpu":
            yield "torch float32 sum", lambda x: x.view(torch.float32).sum()
            yield "torch float32 maximum", lambda x: x.view(torch.float32).amax()
            yield "torch int32 maximum", lambda x: x.view(torch.int32).amax()
            return
        for streams, ahead, cuts in VARIANTS:
            name = f"{streams} streams, prefetch {ahead} bytes ahead, {cuts} shares a thread"
            yield name, lambda x, how=(streams, ahead, cuts): self._read(x, *how)

    def _read(self, part: torch.Tensor, streams: int, ahead: int, cuts: int) -> None:
        sink = np.zeros(self._threads * cuts * LINE, np.uint8)
        a = _Read(
            shares=self._threads * cuts, address=part.data_ptr(), size=len(part), ahead=ahead, sink=sink.ctypes.data
        )
        launch(_reader(streams, ahead > 0), ctypes.addressof(a), self._threads)


@intrinsic(prefer_literal=True)
def _read_streams(
    context: Any, streams: Any, fetched: Any, address: Any, stride: Any, steps: Any, ahead: Any, sink: Any
) -> Any:
    """Load `steps` times UNROLL lines: as many of each stream, which begin `stride` bytes apart.

    sink: where 16 int32 sums go, without which nothing would be loaded.
    """
    count, far = literals(streams, fetched)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        address, stride, steps, ahead, sink = args[2:]
        starts = [e.at(e.pointer(address), builder.mul(stride, I64(i))) for i in range(count)]
        each = UNROLL // count

        def step(i: Any, *carried: Any) -> list[Any]:
            places, sums = carried[:count], list(carried[count:])
            for n in range(UNROLL):
                place = e.at(places[n // each], n % each * LINE)
                if far:
                    e.fetch(e.at(place, ahead))
                sums[n] = builder.add(sums[n], e.load(place, VI))
            return [*(e.at(place, each * LINE) for place in places), *sums]

        total, *others = e.loop(steps, [*starts, *[e.bits(0)] * UNROLL], step)[count:]
        for other in others:
            total = builder.add(total, other)
        e.store(total, e.pointer(sink))
        return context.get_dummy_value()

    return types.void(streams, fetched, *[types.int64] * 5), emit


@njit
def _read_shares(streams: int, fetched: int, block: Any) -> None:
    streams, fetched = literally(streams), literally(fetched)
    a = carray(block, (1,), _READ)[0]
    size = a.size // a.shares // (UNROLL * LINE) * (UNROLL * LINE)
    share = take(block, TAKEN)
    while share < a.shares:
        steps, stride = size // (UNROLL * LINE), size // streams
        _read_streams(streams, fetched, a.address + share * size, stride, steps, a.ahead, a.sink + share * LINE)
        share = take(block, TAKEN)


@cache
def _reader(streams: int, fetched: bool) -> int:
    """The address of a kernel that reads shares of memory."""
    code = int(fetched)

    @numba.cfunc(types.void(types.voidptr))
    def kernel(block: Any) -> None:
        _read_shares(streams, code, block)

    return int(kernel.address)


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

    After a past it takes a mask, made beforehand; torch knows no other way on a CPU.
    """
    k, v = torch.randn(2, 1, heads, past + count, d, device=device).to(dtype)
    q = torch.randn(1, heads, count, d, device=device).to(dtype)
    if not past:
        return lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
    hidden = torch.ones(count, past + count, dtype=torch.bool, device=device).triu(past + 1)
    mask = torch.zeros(count, past + count, device=device).masked_fill(hidden, -math.inf).to(dtype)
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask)
