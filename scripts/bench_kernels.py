"""GB/s of KV that decode attention reads, and prefill time, beside this machine's read bandwidth and torch.

    python scripts/bench_kernels.py [--gib 2]

KV bytes are counted once, however many query heads read them. KV and bandwidth runs cycle over --gib GiB, so that no
cache answers; pages stand in the order in which a store hands them out to one prompt, or shuffled, the worst case.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from lamina_kernels import cpu_decode
from lamina_kernels.pages import PageLayout, Pages, Rows

DECODE = [(1, 8, 4, 32768, 128), (1, 8, 1, 32768, 128), (16, 3, 3, 4096, 64), (8, 3, 3, 512, 64)]
PREFILL = [(3, 3, 64, 2048), (3, 3, 64, 512), (8, 4, 128, 1024)]


def seconds(call: Callable[[], object], least: float = 1.0) -> float:
    """The median time of a call, repeated for at least that long."""
    call()
    times: list[float] = []
    while sum(times) < least or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth(size: int) -> float:
    """GB/s at which torch sums `size` bytes."""
    x = torch.ones(size // 4)
    return size / seconds(x.sum) / 1e9


def paged(layout: PageLayout, batch: int, heads: int, group: int, context: int, count: int, size: int, shuffle: bool):
    """Pages of about `size` bytes filled with numbers, rows over them, and the number of layers that this makes."""
    slots = -(-(context + count) // layout.page_size)
    layers = max(1, size // (batch * heads * slots * layout.page_bytes))
    pages = Pages.allocate(layout, layers * batch * heads * slots)
    filler = torch.randn(1 << 20).to(layout.dtype).view(torch.uint8)
    flat = pages.arena.view(-1)
    for start in range(0, flat.numel(), filler.numel()):
        flat[start : start + filler.numel()] = filler[: flat.numel() - start]
    order = np.random.default_rng(0).permutation(pages.n_pages) if shuffle else np.arange(pages.n_pages)
    tables = list(order.astype(np.int32).reshape(batch, layers, heads, slots))
    every = np.ones(batch, np.int64)
    hi = context + (count if count > 1 else 0)
    first = np.arange(batch) * count * heads * group
    rows = Rows(
        first, every * count, every * context, every * heads, every * group, every * 0, every * hi, every * 0, tables
    )
    return pages, rows, layers


def decode(shape: tuple[int, int, int, int, int], dtype: torch.dtype, size: int, shuffle: bool) -> float:
    """GB/s of KV."""
    batch, heads, group, context, d = shape
    pages, rows, layers = paged(PageLayout(32, d, d, dtype), batch, heads, group, context, 1, size, shuffle)
    plan = cpu_decode.plan(pages, rows, None, torch.get_num_threads())
    q, layer = torch.randn(rows.n, d).to(dtype), itertools.cycle(range(layers))
    taken = seconds(lambda: cpu_decode.attend(pages, plan, next(layer), q, d**-0.5))
    return batch * heads * context * 2 * d * dtype.itemsize / taken / 1e9


def torch_decode(shape: tuple[int, int, int, int, int], dtype: torch.dtype, size: int) -> float:
    """GB/s of KV of torch's scaled_dot_product_attention, the group as its query tokens."""
    batch, heads, group, context, d = shape
    n = max(1, size // (batch * heads * context * 2 * d * dtype.itemsize))
    kv = torch.randn(1, 2, batch, heads, context, d).to(dtype).repeat(n, 1, 1, 1, 1, 1)
    q, layer = torch.randn(batch, heads, group, d).to(dtype), itertools.cycle(kv)
    taken = seconds(lambda: scaled_dot_product_attention(q, *next(layer)))
    return kv[0].numel() * dtype.itemsize / taken / 1e9


def prefill(heads: int, group: int, d: int, count: int, dtype: torch.dtype) -> tuple[float, float]:
    """Milliseconds of causal attention of a prompt: here, and torch's flash kernel on dense K and V."""
    pages, rows, layers = paged(PageLayout(32, d, d, dtype), 1, heads, group, 0, count, 1 << 25, False)
    plan = cpu_decode.plan(pages, rows, None, torch.get_num_threads())
    q, layer = torch.randn(rows.n, d).to(dtype), itertools.cycle(range(layers))
    ours = seconds(lambda: cpu_decode.attend(pages, plan, next(layer), q, d**-0.5))
    x = torch.randn(1, heads * group, count, d).to(dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return ours * 1e3, seconds(lambda: flash(x, x, x, is_causal=True)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="memory that a run cycles over")
    size = int(parser.parse_args().gib * 2**30)
    limit = read_bandwidth(size)
    print(f"{torch.get_num_threads()} threads, read bandwidth {limit:.1f} GB/s")
    print("batch, KV heads, group, context, d | dtype | GB/s in order (of the limit) | shuffled | torch SDPA")
    for shape, dtype in itertools.product(DECODE, (torch.bfloat16, torch.float32)):
        ordered, shuffled = (decode(shape, dtype, size, shuffle) for shuffle in (False, True))
        peer = torch_decode(shape, dtype, size)
        print(f"{shape} | {dtype} | {ordered:.1f} ({ordered / limit:.2f}) | {shuffled:.1f} | {peer:.1f}", flush=True)
    print("KV heads, group, d, prompt | ms | torch flash")
    for shape in PREFILL:
        ours, peer = prefill(*shape, torch.bfloat16)
        print(f"{shape} | {ours:.2f} | {peer:.2f}", flush=True)


if __name__ == "__main__":
    main()
