#!/usr/bin/env python3
"""How fast state layers advance: decode beside a copy of the same bytes, and prompts beside torch.

usage: scripts/bench/states.py [--rounds 40] [--threads N] [--json FILE] [--only decode|prompt]

Decode: one token a sequence. A round calls, in turns, the kernel for a layer and a copy of as many bytes as the records
it reads and writes; the layers hold more than the caches do. Rates are those of the fastest tenth of the calls, which
a machine with other work reaches too, and of the median call. With one thread the clock is its CPU time, which other
work does not count in. `in place` writes a record where it was read; the other
rows write another page, as a batch that may run again does.

Prompts: one row of so many tokens, without the convolution, which the functions of torch do not have. The peer is the
chunked form of transformers, the same as the torch reference of flash-linear-attention, and where that has none, the
recurrence token by token in torch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernel_peers import machine

from lamina_kernels.paged import memory
from lamina_kernels.states import advance as states
from lamina_kernels.states.layout import StateLayout
from lamina_kernels.states.operands import StateConstants, StateRows

sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))  # behind this folder and what is installed
import state_reference as reference

LEAST_BYTES = 256e6  # of the records of all layers, read ones alone: many times the caches
SHAPES = {  # kind, d_k, d_v, heads, key heads
    "gated_delta 32 heads of 128x128": ("gated_delta", 128, 128, 32, 16),
    "gated_delta 16 heads of 128x128": ("gated_delta", 128, 128, 16, 16),
    "kda 32 heads of 128x128": ("kda", 128, 128, 32, 32),
    "mamba2 128 heads of 128x64": ("mamba2", 128, 64, 128, 8),
    "lightning 64 heads of 128x128": ("lightning", 128, 128, 64, 64),
}


@dataclass(frozen=True)
class Batch:
    """A batch of one layer shape, and what it is called with."""

    plan: states.Plan
    layers: int
    x: torch.Tensor
    gates: torch.Tensor
    constants: StateConstants
    arena: torch.Tensor

    def advance(self, layer: int) -> torch.Tensor:
        return states.advance(self.plan, layer, self.x, self.gates, self.constants)


def batch(
    shape: str, counts: list[int], threads: int, in_place: bool = False, conv: int = 4, least: float = 0.0
) -> Batch:
    kind, d_k, d_v, heads, key_heads = SHAPES[shape]
    layout = StateLayout(kind, d_k, d_v, 0 if kind == "lightning" else conv)
    rows = StateRows(np.array(counts), [np.arange(heads)] * len(counts), heads // key_heads)
    layers = max(1, -int(-least // (rows.items * layout.page_bytes)))
    n = 2 * layers * rows.items
    arena = memory.allocate(n * layout.page_bytes).view(torch.float32).view(n, layout.record)
    arena.normal_(std=0.1)
    order = np.random.default_rng(0).permutation(n).reshape(2, layers, rows.items)
    plan = states.plan(layout, arena, rows, order[0], order[0 if in_place else 1], threads)
    tokens = sum(counts)
    gates = torch.rand(tokens * heads, layout.gates)
    if layout.gates:
        decays = gates[:, :1] if kind != "kda" else gates[:, :-1]
        decays.neg_()
    constants = StateConstants(
        heads,
        key_heads,
        d_k**-0.5,
        torch.randn(2 * key_heads * d_k + heads * d_v, layout.conv) if layout.conv else None,
        decays=-torch.rand(heads) if kind == "lightning" else None,
    )
    x = torch.randn(tokens * rows.width(layout, 0)).bfloat16()
    return Batch(plan, layers, x, gates.flatten(), constants, arena)


def alternate(
    calls: dict[str, Callable[[int], object]], layers: int, rounds: int, threads: int
) -> dict[str, list[float]]:
    """Seconds of every call, layer after layer, round after round, the calls in turns; the first round is left out."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for layer in range(layers):
            for name, call in calls.items():
                start = clock()
                call(layer)
                if number:
                    times[name].append(clock() - start)
    return times


def decode(shape: str, size: int, in_place: bool, threads: int, rounds: int) -> dict[str, Any]:
    made = batch(shape, [1] * size, threads, in_place, least=LEAST_BYTES)
    numbers = made.plan.source.shape[1] * made.plan.layout.record
    read, written = (memory.allocate(4 * numbers * made.layers).view(torch.float32).view(made.layers, -1) for _ in "rw")
    read.fill_(1.0)
    calls = {"kernel": made.advance, "copy": lambda layer: written[layer].copy_(read[layer])}
    times = alternate(calls, made.layers, max(2, rounds // made.layers), threads)
    found: dict[str, Any] = {"shape": shape, "batch": size, "in_place": in_place}
    for name, taken in times.items():
        fast, middle = statistics.quantiles(taken, n=10)[0], statistics.median(taken)
        found |= {f"{name}_us": fast * 1e6, f"{name}_gbs": 8 * numbers / fast / 1e9, f"{name}_median_us": middle * 1e6}
    return found


def peers(shape: str, tokens: int) -> dict[str, Callable[[int], object]]:
    """Torch's form of a prompt, after the convolution: by chunks, and token by token."""
    kind, d_k, d_v, heads, _ = SHAPES[shape]
    q, k, v = (torch.randn(1, tokens, heads, d) for d in (d_k, d_k, d_v))
    decay, beta = -torch.rand(1, tokens, heads), torch.rand(1, tokens, heads)
    wide = -torch.rand(1, tokens, heads, d_k)
    state = torch.zeros(heads, d_k, d_v)
    models = "transformers.models"
    every: dict[str, tuple[Callable[[int], object], Callable[[int], object]]] = {}
    if kind == "gated_delta":
        module = importlib.import_module(f"{models}.qwen3_next.modeling_qwen3_next")
        given = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        every[kind] = (
            lambda _: module.torch_chunk_gated_delta_rule(q, k, v, decay, beta, **given),
            lambda _: module.torch_recurrent_gated_delta_rule(q, k, v, decay, beta, **given),
        )
    elif kind == "kda":
        module = importlib.import_module(f"{models}.kimi_linear.modeling_kimi_linear")
        given = {"initial_state": None, "use_qk_l2norm_in_kernel": True, "output_final_state": True}
        every[kind] = (
            lambda _: module.chunk_kimi_delta_attention(q, k, v, wide, beta, **given),
            lambda _: module.recurrent_kimi_delta_attention(q, k, v, wide, beta, **given),
        )
    elif kind == "mamba2":
        module = importlib.import_module(f"{models}.nemotron_h.modeling_nemotron_h")
        a = -torch.ones(heads)
        every[kind] = (
            lambda _: module.mamba2_chunk_scan(v, beta, a, k, q, 64, return_final_states=True),
            lambda _: reference.mamba2(q[0], k[0], v[0], decay[0], beta[0], state),
        )
    else:
        return {"recurrence": lambda _: reference.lightning(q[0], k[0], v[0], -torch.rand(heads), state)}
    return dict(zip(("chunked", "recurrence"), every[kind], strict=True))


def prompt(shape: str, tokens: int, threads: int, rounds: int) -> dict[str, Any]:
    made = batch(shape, [tokens], threads, conv=0)
    times = alternate({"kernel": made.advance, **peers(shape, tokens)}, 1, rounds, threads)
    found = {name: statistics.median(taken) for name, taken in times.items()}
    ratios = {
        name: statistics.median(p / k for p, k in zip(times[name], times["kernel"], strict=True))
        for name in times
        if name != "kernel"
    }
    return {"shape": shape, "tokens": tokens, "ms": {name: s * 1e3 for name, s in found.items()}, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512])
    parser.add_argument("--shapes", nargs="*", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--only", choices=("decode", "prompt"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    print(machine(torch.device("cpu")), f"{args.threads} threads")
    for shape in args.shapes if args.only != "prompt" else ():
        for size in args.batches:
            for in_place in (False, True):
                found = decode(shape, size, in_place, args.threads, args.rounds)
                fast, middle = (found[f"copy_{of}us"] / found[f"kernel_{of}us"] for of in ("", "median_"))
                print(
                    f"{shape:32} batch {size:3} {'in place' if in_place else '':8} | {found['kernel_us']:7.0f} us "
                    f"{found['kernel_gbs']:5.1f} GB/s | copy {found['copy_gbs']:5.1f} GB/s | {fast:.2f} | medians "
                    f"{found['kernel_median_us']:7.0f} us, {middle:.2f}",
                    flush=True,
                )
                results.append(found)
    for shape in args.shapes if args.only != "decode" else ():
        for tokens in args.tokens:
            found = prompt(shape, tokens, args.threads, max(3, args.rounds // 8))
            others = ", ".join(f"{n} {found['ms'][n]:.1f} ms, {r:.1f} times" for n, r in found["ratios"].items())
            rate = tokens / found["ms"]["kernel"]
            print(
                f"{shape:32} {tokens:5} tokens | {found['ms']['kernel']:8.2f} ms, {rate:.1f} tokens/ms | {others}",
                flush=True,
            )
            results.append(found)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
