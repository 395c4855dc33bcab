#!/usr/bin/env python3
"""GB/s of KV that decode attention reads, and its share of the read bandwidth measured in the same run.

usage: scripts/bench/kernels.py [targets] [grid] [peers] [plot] [--gib 2] [--seconds 2] [--device cpu] [--json FILE]

targets   the shapes that Lamina promises something of, the fixed cost of a call, prefill beside torch (the default)
grid      every KV dtype, head size and group at a context of 16384
peers     two shapes beside torch, FlexAttention and, on a GPU, FlashInfer and FlashAttention where installed
plot      the share over context, batch and raggedness, drawn into docs/internals/kernels.png

KV bytes are counted once, however many query heads read them; int8 counts codes and scales. A row alternates between a
few calls and a reading of the bandwidth, since the machine's bandwidth drifts; its share is the median over these
rounds, each against the bandwidth right before and after it. Calls go through layers that make up --gib GiB, and the
bandwidth through as much of its own, so that no cache answers. A row costs --seconds; a run takes some 3.5 times --gib.
Where the speed of one row is given relative to another, the two were called in turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernel_peers import Bandwidth, allocate, huge_pages, machine, peers, repeat, sdpa_prefill, synchronise
from torch.nn.functional import scaled_dot_product_attention

from lamina_kernels.paged.pages import DTYPES, PEAKS, PageLayout, Pages
from lamina_kernels.paged.rows import Rows
from lamina_kernels.select import kernels

BF16, F32, INT8 = torch.bfloat16, torch.float32, torch.int8
LONG, SMALL = (1, 8, 4, 32768, 128), (16, 3, 3, 4096, 64)  # batch, KV heads, group, context, head size
PREFILL = [(3, 3, 64, 2048, 0), (3, 3, 64, 512, 0), (8, 4, 128, 1024, 0), (8, 4, 128, 256, 4096)]  # ..., d, count, past
HEAD_SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)]
GROUPS = (1, 2, 4, 8, 16)
TIMED = 0.01  # seconds of calls between two readings of the bandwidth
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A decode step of one layer."""

    contexts: tuple[int, ...]
    kv_heads: int
    group: int
    d_k: int
    d_v: int
    dtype: torch.dtype = BF16
    page_size: int = 32
    shuffled: bool = False  # pages in the order of a store that has run for long, instead of one after another

    @property
    def kv_bytes(self) -> int:
        scales = 8 if self.dtype in PEAKS else 0
        return sum(self.contexts) * self.kv_heads * ((self.d_k + self.d_v) * self.dtype.itemsize + scales)

    def __str__(self) -> str:
        longest, n = max(self.contexts), len(self.contexts)
        contexts = f"{n}x{longest}" if len(set(self.contexts)) == 1 else f"{longest}+{n - 1}x{min(self.contexts)}"
        d = f"{self.d_k}" if self.d_k == self.d_v else f"{self.d_k}/{self.d_v}"
        pages = ("" if self.page_size == 32 else f" pages of {self.page_size}") + " shuffled" * self.shuffled
        return f"{name(self.dtype)} {contexts} heads {self.kv_heads}x{self.group} d {d}{pages}"


def even(shape: tuple[int, int, int, int, int], dtype: torch.dtype = BF16, **others: Any) -> Case:
    batch, kv_heads, group, context, d = shape
    return Case((context,) * batch, kv_heads, group, d, d, dtype, **others)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Row:
    """What a row measured: medians, and the quartiles of the share."""

    name: str
    kv_bytes: int
    gb_s: float
    bandwidth: float
    share: float
    low: float
    high: float


class Bench:
    """Makes calls and measures them. One memory serves all rows in turn, and a spare one what they stand beside."""

    def __init__(self, size: int, seconds: float, device: torch.device) -> None:
        self.device, self.size, self._seconds = device, size, seconds
        self.threads = torch.get_num_threads() if device.type == "cpu" else 1
        self.machine = {**machine(device), "threads": self.threads}
        self.kernels = kernels(device)
        self.bandwidth = Bandwidth(size, device, self.threads)
        self.results: list[dict[str, Any]] = []
        self._memories, self._contents = [torch.empty(0, dtype=torch.uint8)] * 2, ["", ""]

    def _filled(self, size: int, content: str, block: Callable[[], torch.Tensor], spare: bool) -> torch.Tensor:
        """uint8 `[size]` with copies of `block`. Filled anew only where `content` is another than before."""
        if len(self._memories[spare]) < size:
            self._memories[spare], self._contents[spare] = torch.empty(0), ""
            self._memories[spare] = allocate(size, self.device)
        if self._contents[spare] != content:
            repeat(block().contiguous().view(torch.uint8).view(-1), self._memories[spare])
            self._contents[spare] = content
        return self._memories[spare][:size]

    def paged(self, case: Case, count: int = 1, size: int | None = None, spare: bool = False) -> Call:
        """Our attention over the next layer, of one query a sequence to its context, or of `count` more tokens.

        Those see themselves too, causally. The layers make up `size` bytes, by default all that a run goes through.
        """
        at = self.kernels.layout(case.page_size, case.d_k, case.d_v, case.dtype)
        held = np.array(case.contexts) + (count if count > 1 else 0)
        entries = case.kv_heads * -(-held // at.page_size)
        layers = -(-(self.size if size is None else size) // int(entries.sum() * at.page_bytes))
        n = layers * int(entries.sum())
        content = f"{at.dtype} {at.page_bytes if at.scaled else ''}"
        arena = self._filled(n * at.page_bytes, content, lambda: self._page_block(at), spare)
        pages = Pages(at, arena.view(n, at.page_bytes))
        order = (np.random.default_rng(0).permutation(n) if case.shuffled else np.arange(n)).astype(np.int32)
        parts = np.split(order, np.cumsum(layers * entries)[:-1])
        tables = [part.reshape(layers, case.kv_heads, -1) for part in parts]
        every, context = np.ones(len(tables), np.int64), np.array(case.contexts, np.int64)
        heads = case.kv_heads * case.group
        first = np.arange(len(tables)) * count * heads
        numbers = (every * count, context, every * case.kv_heads, every * case.group, every * 0, held, every * 0)
        rows = Rows(first, *numbers, tables)
        plan = self.kernels.plan(pages, rows, self.threads)
        query = BF16 if at.scaled else case.dtype
        q, layer = torch.randn(rows.n, at.d_k, device=self.device).to(query), itertools.cycle(range(layers))
        out = q.new_empty(rows.n, at.d_v)
        return lambda: self.kernels.attend(pages, plan, next(layer), q, at.d_k**-0.5, None, out)

    def _page_block(self, at: PageLayout) -> torch.Tensor:
        """About 2 MiB of pages of random numbers."""
        block = Pages.allocate(at, max(1, (1 << 21) // at.page_bytes))
        numbers = torch.randn(block.arena.shape[0], at.kv_bytes // at.dtype.itemsize)
        block.arena[:, : at.kv_bytes] = (numbers * (32 if at.scaled else 1)).to(at.dtype).view(torch.uint8)
        if at.scaled:
            block.scales.fill_(1 / 32)
        return block.arena.to(self.device)

    def dense(self, case: Case) -> list[list[tuple[torch.Tensor, ...]]]:
        """For each layer K and V `[sequences, kv_heads, tokens, d]`, of sequences of the same length together."""
        layers = -(-self.size // case.kv_bytes)
        filler = torch.randn(1 << 20, device=self.device).to(case.dtype)
        flat = self._filled(layers * case.kv_bytes, f"{case.dtype} ", lambda: filler, False).view(case.dtype)
        runs = [(context, len(list(same))) for context, same in itertools.groupby(case.contexts)]
        shapes = [(2, batch, case.kv_heads, context, case.d_k) for context, batch in runs]
        parts = flat.view(layers, -1).split([math.prod(shape) for shape in shapes], 1)
        return [
            [part[i].view(shape).unbind() for part, shape in zip(parts, shapes, strict=True)] for i in range(layers)
        ]

    def timed(self, call: Call, n: int) -> float:
        """Seconds of n calls."""
        start = time.perf_counter()
        for _ in range(n):
            call()
        synchronise(self.device)
        return time.perf_counter() - start

    def repeats(self, call: Call) -> int:
        """How many calls make a timing. The first call of all compiles."""
        self.timed(call, 2)
        return math.ceil(TIMED / min(self.timed(call, 1) for _ in range(3)))

    def measure(self, title: str, call: Call, kv_bytes: int) -> Row:
        """Alternate calls and readings of the bandwidth."""
        n = self.repeats(call)
        rates: list[float] = []
        limits, until = [self.bandwidth()], time.perf_counter() + self._seconds
        while len(rates) < 5 or time.perf_counter() < until:
            rates.append(n * kv_bytes / self.timed(call, n) / 1e9)
            limits.append(self.bandwidth())
        shares = [2 * rate / (a + b) for rate, (a, b) in zip(rates, itertools.pairwise(limits), strict=True)]
        low, share, high = statistics.quantiles(shares, n=4)
        row = Row(title, kv_bytes, statistics.median(rates), statistics.median(limits), share, low, high)
        self.results.append(asdict(row))
        return row

    def decode(self, case: Case, title: str = "") -> Row | None:
        """Our row of a case; None, and a line with the reason, where these kernels do not support it."""
        try:
            call = self.paged(case)
        except ValueError as e:
            print(f"{title or case!s:60} | not here: {e}", flush=True)
            return None
        return self.measure(title or str(case), call, case.kv_bytes)

    def versus(self, title: str, first: Call, second: Call) -> tuple[float, float, float]:
        """Milliseconds of each call, and the second over the first: medians of alternating timings."""
        counts, times = (self.repeats(first), self.repeats(second)), ([], [])
        until = time.perf_counter() + self._seconds
        while len(times[0]) < 5 or time.perf_counter() < until:
            for call, n, into in zip((first, second), counts, times, strict=True):
                into.append(self.timed(call, n) / n * 1e3)
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        ours, other = (statistics.median(x) for x in times)
        self.results.append({"name": title, "ms": ours, "other_ms": other, "ratio": ratio})
        return ours, other, ratio


def show(row: Row | None, note: str = "") -> Row | None:
    if row is not None:
        rates = f"{row.gb_s:7.1f} of {row.bandwidth:7.1f} GB/s"
        print(f"{row.name:60} | {rates} | {row.share:.3f} ({row.low:.3f}..{row.high:.3f}) | {note}", flush=True)
    return row


def targets(bench: Bench) -> None:
    print("decode | KV and bandwidth | share, quartiles |")

    def against(case: Case, other: Case, what: str) -> None:
        """The row of a case, and how many times as fast as another, of as many tokens, it is: in turns."""
        row = bench.decode(case)
        if row is not None:
            _, _, ratio = bench.versus(f"{case} against {other}", bench.paged(case), bench.paged(other, spare=True))
            show(row, f"{ratio:.2f} times the tokens/s of {what}")

    long, small, batch = even(LONG), even(SMALL), Case((2544,) * 32, 8, 4, 128, 128)
    for case in (long, *(even((1, 8, group, 32768, 128)) for group in (1, 8)), small, even(SMALL, F32), batch):
        show(bench.decode(case))
    against(even(LONG, INT8), long, "bfloat16")
    against(even(SMALL, INT8), small, "bfloat16")
    against(Case((65536, *(512,) * 31), 8, 4, 128, 128), batch, "the even batch")
    for shape in (LONG, SMALL):
        against(even(shape, page_size=16), even(shape, page_size=64), "pages of 64")
        against(even(shape, shuffled=True), even(shape), "pages in order")

    call = bench.paged(even((1, 8, 4, 16, 128)), size=1)
    n = bench.repeats(call)
    cost = statistics.median(bench.timed(call, n) / n for _ in range(50)) * 1e6
    bench.results.append({"name": "fixed cost of a call", "us": cost})
    print(f"fixed cost of a call, batch 1, 16 tokens, in caches: {cost:.1f} us", flush=True)

    print("prefill of one layer | ms | torch SDPA, ms | speed-up")
    for dtype, shape in itertools.product((BF16, F32), PREFILL):
        kv_heads, group, d, count, past = shape
        case = Case((past,), kv_heads, group, d, d, dtype)
        title = f"{name(dtype)} {count} tokens on {past} heads {kv_heads}x{group} d {d}"
        ours = bench.paged(case, count, size=1 << 25)
        other = sdpa_prefill(kv_heads * group, d, count, past, dtype, bench.device)
        ms, other_ms, ratio = bench.versus(title, ours, other)
        print(f"{title:60} | {ms:8.2f} | {other_ms:8.2f} | {ratio:.2f}", flush=True)


def grid(bench: Bench) -> None:
    print(f"share at a context of 16384 and 8 KV heads | group {' | '.join(map(str, GROUPS))}")
    worst: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for dtype, (d_k, d_v) in itertools.product(DTYPES, HEAD_SIZES):
        if dtype is torch.float8_e4m3fn and bench.device.type == "cpu":
            continue
        print(f"{name(dtype):9} d {d_k:3}/{d_v:3}", end="", flush=True)
        for group in GROUPS:
            case = Case((16384,), 8, group, d_k, d_v, dtype)
            row = bench.decode(case)
            if row is None:
                break
            print(f" | {row.share:.3f}", end="", flush=True)
            worst["1-8" if group <= 8 else "16"].append((row.share, str(case)))
        print()
    for groups, shares in worst.items():
        share, case_name = min(shares)
        print(f"worst of groups {groups}: {share:.3f}, {case_name}", flush=True)


def beside(bench: Bench) -> None:
    for shape in (LONG, SMALL):
        batch, kv_heads, group, context, d = shape
        case, label = even(shape), f"{batch}x{context}"
        print(f"{case} | KV and bandwidth | share, quartiles |")
        show(bench.decode(case, f"{label} Lamina, bfloat16"))
        show(bench.decode(even(shape, INT8), f"{label} Lamina, int8"))
        for peer, attend in peers(bench.device, batch, kv_heads, group, context, d, BF16):
            if isinstance(attend, str):
                print(f"{label} {peer:52} | {attend}", flush=True)
                continue
            layer = itertools.cycle(bench.dense(case))
            call = partial(lambda attend, layer: attend(*next(layer)[0]), attend, layer)
            row = bench.measure(f"{label} {peer}", call, case.kv_bytes)
            _, _, ratio = bench.versus(f"{label} {peer} against Lamina", call, bench.paged(case, spare=True))
            show(row, f"{ratio:.2f} times the tokens/s of Lamina")


def curves() -> dict[str, dict[float, tuple[int, ...]]]:
    """The panels of the picture: what stands on the x axis, and the contexts at each of its values."""
    total = 1 << 16
    ragged = {}
    for longest in (total // 32, total // 8, total // 4, total // 2, total * 3 // 4, total * 15 // 16):
        ragged[longest / total] = (longest, *((total - longest) // 31,) * 31)
    return {
        "context of one sequence": {1 << i: (1 << i,) for i in range(9, 18)},
        "sequences of 4096 tokens": {1 << i: (4096,) * (1 << i) for i in range(7)},
        "share of the longest of 32 sequences, 65536 tokens": ragged,
    }


def sdpa_row(bench: Bench, case: Case) -> Row:
    """torch's scaled_dot_product_attention, the group as query tokens; a call for each length."""
    layers = bench.dense(case)
    queries = [torch.randn(len(k), case.kv_heads, case.group, case.d_k).to(k) for k, _ in layers[0]]
    layer = itertools.cycle(layers)

    def call() -> None:
        for q, (k, v) in zip(queries, next(layer), strict=True):
            scaled_dot_product_attention(q, k, v)

    return bench.measure(f"torch SDPA {case}", call, case.kv_bytes)


def plot(bench: Bench) -> None:
    from kernel_picture import draw

    panels = {}
    for label, points in curves().items():
        for dtype in (BF16, F32, INT8, None):
            title = f"Lamina, {name(dtype)}" if dtype else "torch SDPA, bfloat16 (a call for each length)"
            cases = {x: Case(contexts, 8, 4, 128, 128, dtype or BF16) for x, contexts in points.items()}
            measured = {x: show(bench.decode(case) if dtype else sdpa_row(bench, case)) for x, case in cases.items()}
            panels[label, title] = {x: (row.share, row.bandwidth) for x, row in measured.items() if row is not None}
    draw(panels, f"{bench.machine['device']}, {bench.threads} threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = {"targets": targets, "grid": grid, "peers": beside, "plot": plot}
    parser.add_argument("modes", nargs="*", metavar="mode", help=", ".join(modes))
    parser.add_argument("--gib", type=float, default=2.0, help="memory that rows and the bandwidth each go through")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a row is measured")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="file for all numbers")
    options = parser.parse_args()
    chosen = options.modes or ["targets"]
    if unknown := sorted(set(chosen) - set(modes)):
        parser.error(f"mode must be one of {', '.join(modes)}, got {', '.join(unknown)}")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device")
    bench = Bench(int(options.gib * 2**30), options.seconds, options.device)
    has = ", ".join(f"{label} {'yes' if there else 'no'}" for label, there in bench.machine["features"].items())
    print(f"{bench.machine['device']}, {bench.threads} threads of {bench.machine['cores']} cores; {has}")
    rates, best = bench.bandwidth.rates, bench.bandwidth.best
    print(f"read bandwidth {rates[best]:.1f} GB/s by {best}; by other ways down to {min(rates.values()):.1f}; ", end="")
    print(f"{huge_pages():.1f} GiB in huge pages; load of the last minute {os.getloadavg()[0]:.1f}")
    try:
        for mode in chosen:
            print(f"\n{mode}")
            modes[mode](bench)
    finally:
        if options.json:
            numbers = {"machine": bench.machine, "bandwidth": rates, "rows": bench.results}
            options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
