#!/usr/bin/env python3
"""Milliseconds that a decode step's scan of page sketches takes, beside exact attention over the same pages.

usage: scripts/bench/sketches.py [--rounds 40] [--layers 4] [--json FILE] [ITEMSxENTRIES ...]

An item is one KV head of one sequence, an entry a page of 32 tokens. A round calls, in turns, the exact kernel, the
scan with the choice of pages, and the choice alone, each once for every layer: layers are more than the caches hold. A
column is the median over the rounds, the ratio the median of each round's. Pages have directions of their own, so that
their masses are as unlike as those of long prompts are; the share of them that is chosen is printed. GB/s: of the bytes
that each has to read once, the sketches but for the means of chosen pages. Then what it costs to make a sketch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernel_peers import machine

from lamina_kernels.cpu import decode as cpu_decode
from lamina_kernels.paged.pages import PageLayout, Pages
from lamina_kernels.paged.rows import Rows
from lamina_kernels.sketches import sketches

SHAPES = ("12x1024", "3x4096", "48x300", "1x32768")
VARIANTS = {  # page size, d, group, dtype, pages in the order of a store that has run for long
    "bf16 32 d 64 group 3": (32, 64, 3, torch.bfloat16, False),
    "shuffled": (32, 64, 3, torch.bfloat16, True),
    "d 128 group 4": (32, 128, 4, torch.bfloat16, False),
    "page 16": (16, 64, 3, torch.bfloat16, False),
    "int8": (32, 64, 3, torch.int8, False),
}
BLOCK = 512  # pages of random numbers, of which the arena has copies
SPREAD = 4.0  # of the logits of a page, in e-folds
Call = Callable[[int], object]


def filled(layout: PageLayout, n: int) -> tuple[Pages, sketches.Sketches]:
    """n pages with their sketches."""
    block = Pages.allocate(layout, BLOCK)
    tokens = BLOCK * layout.page_size
    k = torch.randn(BLOCK, 1, layout.d_k) * SPREAD + torch.randn(BLOCK, layout.page_size, layout.d_k)
    slots = torch.arange(tokens).unsqueeze(0)
    append = cpu_decode.plan_append(block, slots)
    cpu_decode.append(block, append, 0, k.view(tokens, -1), torch.randn(tokens, layout.d_v))
    summary = sketches.Sketches.allocate(layout, BLOCK)
    sketches.seal(block, summary, torch.arange(BLOCK))
    pages, every = Pages.allocate(layout, n), sketches.Sketches.allocate(layout, n)
    for first in range(0, n, BLOCK):
        count = min(BLOCK, n - first)
        pages.arena[first : first + count] = block.arena[:count]
        every.arena[first : first + count] = summary.arena[:count]
    return pages, every


def calls(variant: str, items: int, entries: int, layers: int, threads: int) -> tuple[dict[str, Call], dict[str, int]]:
    """What is timed, each called with a layer, and how many bytes each reads in a layer."""
    page_size, d, group, dtype, shuffled = VARIANTS[variant]
    layout, n = cpu_decode.layout(page_size, d, d, dtype), layers * items * entries
    pages, every = filled(layout, n)
    order = (np.random.default_rng(0).permutation(n) if shuffled else np.arange(n)).astype(np.int32)
    tables = list(order.reshape(items, layers, 1, entries))
    ones, held = np.ones(items, np.int64), np.full(items, entries * page_size, np.int64)
    rows = Rows(np.arange(items) * group, ones, held, ones, ones * group, ones * 0, held, ones * 0, tables)
    exact = cpu_decode.plan(pages, rows, threads)
    own = ones * entries
    numbers = (own, ones * 2, own - 4, own)
    asked = sketches.Items([table[:, 0] for table in tables], *numbers)
    plan, alone = (sketches.plan_scan(every, asked, group, threads) for _ in range(2))
    tasks = alone.keep[1]
    tasks["hi"] = tasks["lo"]  # nothing to scan, so what was found before is chosen from
    q = torch.randn(items * group, d).to(torch.bfloat16)
    out, scale = torch.empty(items * group, d, dtype=q.dtype), d**-0.5
    chosen = 0
    for layer in range(layers):
        choice = sketches.scan(every, plan, layer, q, scale)
        chosen += int(choice.counts.sum())
    alone.result.log_mass.copy_(choice.log_mass)
    timed: dict[str, Call] = {
        "exact": lambda layer: cpu_decode.attend(pages, exact, layer, q, scale, None, out),
        "both": lambda layer: sketches.scan(every, plan, layer, q, scale),
        "choice": lambda layer: sketches.scan(every, alone, layer, q, scale),
    }
    at, left = every.layout, n - chosen
    sizes = {
        "exact": items * entries * layout.page_bytes,
        "both": items * entries * at.mean_at + left // layers * 2 * d,
        "chosen": 100 * chosen // n,
    }
    return timed, sizes


def measure(timed: dict[str, Call], layers: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a layer, round by round."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 2):
        for name, call in timed.items():
            start = time.perf_counter()
            for layer in range(layers):
                call(layer)
            if number >= 2:
                times[name].append((time.perf_counter() - start) / layers * 1e3)
    return times


def sealing(variant: str) -> float:
    """Microseconds that a sketch takes, of pages that were just written and of others beside them."""
    page_size, d, _, dtype, _ = VARIANTS[variant]
    pages, every = filled(cpu_decode.layout(page_size, d, d, dtype), 8192)
    ids, times = torch.arange(8192), []
    for _ in range(7):
        start = time.perf_counter()
        sketches.seal(pages, every, ids)
        times.append((time.perf_counter() - start) / len(ids) * 1e6)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="ITEMSxENTRIES")
    parser.add_argument("--variants", nargs="*", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    print(machine(torch.device("cpu")), f"{args.threads} threads")
    print(f"{'':36} | exact ms GB/s | scan and choice ms GB/s | choice ms | ratio, quartiles | chosen")
    for variant in args.variants:
        for shape in args.shapes if variant == next(iter(VARIANTS)) else args.shapes[:1]:
            items, entries = (int(x) for x in shape.split("x"))
            timed, sizes = calls(variant, items, entries, args.layers, args.threads)
            times = measure(timed, args.layers, args.rounds)
            exact, both, choice = (statistics.median(times[name]) for name in ("exact", "both", "choice"))
            ratios = [b / a for a, b in zip(times["exact"], times["both"], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            rates = [sizes[name] / ms / 1e6 for name, ms in (("exact", exact), ("both", both))]
            print(
                f"{variant:22} {shape:13} | {exact:7.3f} {rates[0]:5.1f} | {both:16.3f} {rates[1]:6.1f} | "
                f"{choice:9.3f} | {ratio:.3f} ({low:.3f}..{high:.3f}) | {sizes['chosen']} %",
                flush=True,
            )
            results.append({"variant": variant, "shape": shape, "exact_ms": exact, "ms": both, "choice_ms": choice})
            results[-1] |= {"ratio": ratio, "chosen_percent": sizes["chosen"]}
    for variant in args.variants:
        us = sealing(variant)
        print(f"a sketch, {variant}: {us:.2f} us", flush=True)
        results.append({"variant": variant, "seal_us": us})
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
