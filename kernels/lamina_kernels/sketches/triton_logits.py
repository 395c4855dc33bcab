"""Logits of decode queries and the keys of sketches, in Triton: what a scan of sketches spends its time on.

A program has one page of one item. It reads the page's codes once, as they lie, for all query heads, and no key is ever
written as a float: q.k is sum(q * step * code) + sum(q * low). Sums are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 32  # tokens of a program: estimate, unmeasured


def sketch_logits(
    scanned: torch.Tensor,
    steps: torch.Tensor,
    lows: torch.Tensor,
    tables: torch.Tensor,
    q: torch.Tensor,
    scale: float,
    page_size: int,
    unit: int,
) -> torch.Tensor:
    """scale * q.k, float32 `[items, group, entries, page_size]`.

    scanned uint8 `[n_pages, bytes]`, whose first ones are the codes of a page in strips of 16 * unit tokens
    (`SketchLayout`); steps and lows bfloat16 `[n_pages, d_k]`, views of it; tables int64 `[items, entries]`, pages that
    exist; q float32 `[items, group, d_k]`, contiguous.
    """
    (items, group, d), entries = q.shape, tables.shape[1]
    out = torch.empty(items, group, entries, page_size, device=q.device)
    arguments: dict[str, Any] = {
        "scanned": scanned,
        "steps": steps,
        "lows": lows,
        "tables": tables.contiguous(),
        "q": q,
        "out": out,
        "scale": float(scale),
        "page_bytes": scanned.stride(0),
        "row": steps.stride(0),
        "D": d,
        "WIDTH": int(triton.next_power_of_2(d)),
        "SIZE": page_size,
        "TOKENS": BLOCK,
        "GROUP": group,
        "UNIT": unit,
    }
    if items * entries:
        launch(logits_kernel, (entries, items, int(triton.cdiv(page_size, BLOCK))), arguments)
    return out


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Run `kernel` on a grid of programs, on a GPU or, in tests, in Triton's interpreter."""
    compiled = isinstance(kernel, triton.JITFunction)
    kernel[grid](**arguments, **({"enable_fp_fusion": True} if compiled else {}))


@triton.jit  # type: ignore[untyped-decorator]
def logits_kernel(
    scanned: tl.tensor,
    steps: tl.tensor,
    lows: tl.tensor,
    tables: tl.tensor,
    q: tl.tensor,
    out: tl.tensor,
    scale: float,
    page_bytes: int,
    row: int,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
) -> None:
    """TOKENS tokens of one page of one item."""
    entry, entries, item = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    page = tl.load(tables + item * entries + entry)
    first = tl.program_id(2) * TOKENS
    token, channel = first + tl.arange(0, TOKENS)[:, None], tl.arange(0, WIDTH)[None, :]
    if UNIT == 2:
        place = token // 32 * (16 * D) + channel // 4 * 64 + token % 16 * 4 + channel % 4
        shift = token // 16 % 2 * 4 + channel * 0
    else:
        place = token // 16 * (8 * D) + channel // 8 * 64 + token % 16 * 4 + channel % 4
        shift = channel // 4 % 2 * 4 + token * 0
    packed = tl.load(scanned + page * page_bytes + place, mask=(token < SIZE) & (channel < D), other=0).to(tl.int32)
    codes = ((packed >> shift) & 15).to(tl.float32)
    column = tl.arange(0, WIDTH)
    within = column < D
    step = tl.load(steps + page * row + column, mask=within, other=0.0).to(tl.float32)
    low = tl.load(lows + page * row + column, mask=within, other=0.0).to(tl.float32)
    places = first + tl.arange(0, TOKENS)
    for head in range(GROUP):
        vector = item * GROUP + head
        query = tl.load(q + vector * D + column, mask=within, other=0.0)
        sums = tl.sum(codes * (query * step)[None, :], 1) + tl.sum(query * low, 0)
        tl.store(out + (vector * entries + entry) * SIZE + places, sums * scale, mask=places < SIZE)
