#!/usr/bin/env python3
"""Milliseconds that a decode step takes by sketches of pages, beside exact attention over the same pages.

usage: scripts/bench/sketches.py [--rounds 40] [--layers 4] [--json FILE] [ITEMSxENTRIES ...]

An item is one KV head of one sequence, an entry a page of 32 tokens. A round calls, in turns, the exact kernel, the
scan with the choice of pages and what stands for the others, and then the exact kernel over what was chosen too, as a
step of `retrieval` does; each once for every layer: layers are more than the caches hold. A column is the median over
the rounds, a ratio to exact the median of each round's. Pages have directions of their own, so that their masses are as
unlike as those of long prompts are; the shares that are read exactly and in 4 bits are printed. GB/s: of the bytes that
each has to read once. Then what it costs to make a sketch.
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

from lamina_kernels.attention import decode as cpu_decode
from lamina_kernels.attention.merge import merge_into
from lamina_kernels.paged.pages import PageLayout, Pages
from lamina_kernels.paged.rows import Rows
from lamina_kernels.sketches import sketches
from lamina_kernels.sketches.items import Items
from lamina_kernels.sketches.layout import Sketches
from lamina_workers.policies.retrieval import Retrieval

SHAPES = ("12x1024", "3x4096", "48x300", "1x32768")
VARIANTS = {  # page size, d, group, dtype, pages in the order of a store that has run for long
    "bf16 32 d 64 group 3": (32, 64, 3, torch.bfloat16, False),
    "shuffled": (32, 64, 3, torch.bfloat16, True),
    "d 128 group 4": (32, 128, 4, torch.bfloat16, False),
    "d 64 group 7": (32, 64, 7, torch.bfloat16, False),
    "page 16": (16, 64, 3, torch.bfloat16, False),
    "int8": (32, 64, 3, torch.int8, False),
}
BLOCK = 512  # pages of random numbers, of which the arena has copies
SPREAD = 4.0  # of the logits of a page, in e-folds
DEFAULTS = Retrieval()
Call = Callable[[int], object]


def filled(layout: PageLayout, n: int) -> tuple[Pages, Sketches]:
    """n pages with their sketches."""
    block = Pages.allocate(layout, BLOCK)
    tokens = BLOCK * layout.page_size
    k = torch.randn(BLOCK, 1, layout.d_k) * SPREAD + torch.randn(BLOCK, layout.page_size, layout.d_k)
    slots = torch.arange(tokens).unsqueeze(0)
    append = cpu_decode.plan_append(block, slots)
    cpu_decode.append(block, append, 0, k.view(tokens, -1), torch.randn(tokens, layout.d_v))
    summary = Sketches.allocate(layout, BLOCK)
    sketches.seal(block, summary, torch.arange(BLOCK))
    pages, every = Pages.allocate(layout, n), Sketches.allocate(layout, n)
    for first in range(0, n, BLOCK):
        count = min(BLOCK, n - first)
        pages.arena[first : first + count] = block.arena[:count]
        every.scanned[first : first + count] = summary.scanned[:count]
        every.values[first : first + count] = summary.values[:count]
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
    asked = Items([table[:, 0] for table in tables], *numbers)
    plan = sketches.plan_scan(every, asked, group, threads)
    lists = cpu_decode.plan_lists(pages, items, group, threads)
    limits = {"missed": DEFAULTS.missed, "coarse": DEFAULTS.coarse}
    q = torch.randn(items * group, d).to(torch.bfloat16)
    out, scale = torch.empty(items * group, d, dtype=q.dtype), d**-0.5
    chosen = coarse = 0
    for layer in range(layers):
        choice = sketches.scan(every, plan, layer, q, scale, **limits)
        chosen += int(choice.counts.sum())
        coarse += int(choice.coarse_counts.sum())

    def whole(layer: int) -> None:
        found = sketches.scan(every, plan, layer, q, scale, **limits)
        lengths = found.counts.numpy() * page_size
        merge_into(cpu_decode.attend_lists(pages, lists, found.pages.numpy(), lengths, q, scale), found.tail, None)

    timed: dict[str, Call] = {
        "exact": lambda layer: cpu_decode.attend(pages, exact, layer, q, scale, None, out),
        "scan": lambda layer: sketches.scan(every, plan, layer, q, scale, **limits),
        "whole": whole,
    }
    at, means = every.layout, n - chosen - coarse
    sizes = {
        "exact": items * entries * layout.page_bytes,
        "scan": items * entries * at.mean_at + (means * 2 * d + coarse * at.value_bytes) // layers,
        "chosen": 1000 * chosen // n,
        "coarse": 1000 * coarse // n,
    }
    sizes["whole"] = sizes["scan"] + chosen * layout.page_bytes // layers
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
    print(f"{'':36} | exact ms GB/s |  scan ms GB/s ratio | whole ms GB/s ratio, quartiles | exact, 4 bits")
    for variant in args.variants:
        for shape in args.shapes if variant == next(iter(VARIANTS)) else args.shapes[:1]:
            items, entries = (int(x) for x in shape.split("x"))
            timed, sizes = calls(variant, items, entries, args.layers, args.threads)
            times = measure(timed, args.layers, args.rounds)
            exact, scan, whole = (statistics.median(times[name]) for name in ("exact", "scan", "whole"))
            of_exact = {
                name: statistics.quantiles([b / a for a, b in zip(times["exact"], times[name], strict=True)], n=4)
                for name in ("scan", "whole")
            }
            low, ratio, high = of_exact["whole"]
            rates = [sizes[name] / ms / 1e6 for name, ms in (("exact", exact), ("scan", scan), ("whole", whole))]
            print(
                f"{variant:22} {shape:13} | {exact:7.3f} {rates[0]:5.1f} | {scan:8.3f} {rates[1]:4.1f} "
                f"{of_exact['scan'][1]:.3f} | {whole:8.3f} {rates[2]:4.1f} {ratio:.3f} ({low:.3f}..{high:.3f}) | "
                f"{sizes['chosen'] / 10} %, {sizes['coarse'] / 10} %",
                flush=True,
            )
            results.append({"variant": variant, "shape": shape, "exact_ms": exact, "scan_ms": scan, "ms": whole})
            results[-1] |= {"ratio": ratio, "exact_share": sizes["chosen"] / 1000, "coarse": sizes["coarse"] / 1000}
    for variant in args.variants:
        us = sealing(variant)
        print(f"a sketch, {variant}: {us:.2f} us", flush=True)
        results.append({"variant": variant, "seal_us": us})
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
