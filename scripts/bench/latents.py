#!/usr/bin/env python3
"""GFLOP/s of attention over latents (MLA, absorbed), and their share of what the CPU multiplies at most.

usage: scripts/bench/latents.py [--threads 1] [--context 4096] [--seconds 3]

Each latent is read once for all query heads, so with 128 of them there are 242 FLOP a byte: arithmetic binds, not
memory. A row alternates calls and the peak, which is a loop of nothing but products of registers, since the machine's
clock drifts; its share is the median over these rounds. FLOP are 2 * (d_k + d_v) a query head and key. Seconds are
those that the process has the CPU, of all threads together, so GFLOP/s are of one thread.
The last rows compare the two forms for a prompt's own tokens: absorbed, over latents, and expanded, over k and v of
each head, with the maps that only one of them needs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lamina_kernels.attention import decode
from lamina_kernels.compile.emitter import VB, VF, Emitter, Kind, kind_of
from lamina_kernels.compile.launch import launch
from lamina_kernels.dense.dense import HeadLinears
from lamina_kernels.paged.pages import Pages
from lamina_kernels.paged.rows import Rows

SHAPES = {"DeepSeek V3": (128, 512, 64), "half of its heads": (64, 512, 64), "V2 Lite": (16, 512, 64)}
SHAPES |= {"MiniCPM3": (40, 256, 32)}  # heads, latent, rotated
SUMS = 16  # independent sums of the peak's loop
STEPS = 1 << 18  # of it: some milliseconds
ROUNDS = 3  # of a call, at least, however long it takes
Call = Callable[[], object]


@intrinsic  # type: ignore[untyped-decorator]
def _products(context: Any, half: Any) -> Any:
    """STEPS * SUMS products of registers: of pairs of bfloat16, or of float32."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        halves = kind_of(torch.bfloat16) is Kind.BFLOAT16_DOT
        factor = builder.bitcast(e.splat(builder.uitofp(args[0], ir.FloatType())), VB if halves else VF)

        def step(i: Any, *sums: Any) -> list[Any]:
            if halves:
                return [e.call("llvm.x86.avx512bf16.dpbf16ps.512", VF, s, factor, factor) for s in sums]
            return [e.fma(factor, factor, s) for s in sums]

        sums = e.loop(STEPS, [e.number(float(n)) for n in range(SUMS)], step)
        total = sums[0]
        for each in sums[1:]:
            total = builder.fadd(total, each)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.int64), emit


@numba.cfunc(types.void(types.voidptr))  # type: ignore[untyped-decorator]
def _peak(block: Any) -> None:
    memory = numba.carray(block, (8,), np.int64)
    memory[7] += np.int64(_products(memory[6]) > 0)


def peak_flops() -> int:
    """FLOP of one call of `_peak` on one thread."""
    return STEPS * SUMS * 2 * (32 if kind_of(torch.bfloat16) is Kind.BFLOAT16_DOT else 16)


def paged(heads: int, kv_heads: int, d_k: int, d_v: int, latent: bool, tokens: tuple[int, int], threads: int) -> Call:
    """Attention of `tokens[1]` tokens behind `tokens[0]` earlier ones, to themselves, over as many sequences as
    threads; bfloat16."""
    past, count = tokens
    at = decode.layout(32, d_k, d_v, torch.bfloat16, latent)
    entries = -(-(past + count) // 32)
    pages = Pages.allocate(at, threads * kv_heads * entries)
    pages.arena.view(torch.bfloat16).normal_()
    table = np.arange(pages.n_pages, dtype=np.int32).reshape(threads, 1, kv_heads, entries)
    every = np.ones(threads, np.int64)
    rows = Rows(
        first=np.arange(threads) * count * heads,
        count=every * count,
        start=every * past,
        kv_heads=every * kv_heads,
        group=every * (heads // kv_heads),
        lo=every * 0,
        hi=every * (past + count),
        base=every * 0,
        tables=list(table),
    )
    q, plan = torch.randn(rows.n, d_k).bfloat16(), decode.plan(pages, rows, threads)
    return lambda: decode.attend(pages, plan, 0, q, d_k**-0.5)


def timed(call: Call) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def measure(calls: dict[str, Call], flops: dict[str, float], threads: int, seconds: float) -> None:
    """Print the median GFLOP/s of each call, and its share of the peak beside it."""
    block = np.zeros(8, np.int64)
    block[6] = 1

    def peak() -> float:
        return threads * peak_flops() / timed(lambda: launch(int(_peak.address), block.ctypes.data, threads))

    for name, call in calls.items():
        call(), peak()
        shares, speeds, end = [], [], time.perf_counter() + seconds
        while time.perf_counter() < end or len(shares) < ROUNDS:
            before = peak()
            speed = flops[name] / timed(call)
            speeds.append(speed)
            shares.append(speed / ((before + peak()) / 2))
        low, share, high = statistics.quantiles(shares, n=4)
        print(f"{name:52} {statistics.median(speeds) / 1e9:7.0f} GFLOP/s  {share:5.0%} ({low:.0%} to {high:.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calls: dict[str, Call] = {}
    flops: dict[str, float] = {}
    for model, (heads, rank, rotary) in SHAPES.items():
        for past, count in ((options.context, 1), (0, 256), (0, 1024)):
            name = f"{model}: {heads} heads, {'decode at' if count == 1 else 'prompt of'} {past or count}"
            calls[name] = paged(heads, 1, rank + rotary, rank, True, (past, count), options.threads)
            keys = count * past + count * (count + 1) // 2
            flops[name] = options.threads * 2.0 * (2 * rank + rotary) * heads * keys
    measure(calls, flops, options.threads, options.seconds)
    compare_forms(options.threads)


def compare_forms(threads: int) -> None:
    """Seconds of DeepSeek V3's two forms for the own tokens of a prompt without a past, in turns."""
    heads, rank, rotary = SHAPES["DeepSeek V3"]
    up = (torch.randn(heads, 256, rank) * 0.05).bfloat16()
    key_up, value_up = (HeadLinears(x.contiguous()) for x in (up[:, :128].transpose(1, 2), up[:, 128:]))
    for count in (128, 512, 1024, 2048):
        tokens = threads * count
        latents, plain = torch.randn(tokens, rank).bfloat16(), torch.randn(tokens, heads, 128).bfloat16()
        sums = torch.randn(tokens, heads, rank).bfloat16()
        over_latents = paged(heads, 1, rank + rotary, rank, True, (0, count), threads)
        over_heads = paged(heads, heads, 192, 128, False, (0, count), threads)

        def absorbed(over: Call = over_latents, plain: torch.Tensor = plain, sums: torch.Tensor = sums) -> None:
            key_up(plain)
            over()
            value_up(sums)

        def expanded(over: Call = over_heads, latents: torch.Tensor = latents) -> None:
            torch.nn.functional.linear(latents, up.view(-1, rank))
            over()

        absorbed(), expanded()
        both = [(timed(absorbed), timed(expanded)) for _ in range(3)]
        one, other = (statistics.median(x) for x in zip(*both, strict=True))
        print(f"prompt of {count}: absorbed {one:.3f} s, expanded {other:.3f} s, ratio {one / other:.2f}")


if __name__ == "__main__":
    main()
