"""Merges partials in Triton: the pieces of outputs that were cut, and a partial into some vectors of another.

The formula is that of `lamina_kernels.partial`, with exp2 in place of exp; sums are float32, rounded once at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lamina_kernels.attention.merge import check_merge
from lamina_kernels.gpu.kv_append import rounded
from lamina_kernels.gpu.tuning import launch, padded
from lamina_kernels.paged.pages import check_range
from lamina_kernels.partial import Partial

BLOCK = 16  # vectors of a program: estimate, unmeasured
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
OUTPUT = ("q", "stride", "group", "rows", "partial", "parts")  # the fields of an output, int64 each

_Q, _STRIDE, _GROUP, _ROWS, _PARTIAL, _PARTS = (tl.constexpr(i) for i in range(len(OUTPUT)))
_FIELDS = tl.constexpr(len(OUTPUT))


def merge_outputs(outputs: torch.Tensor, most_rows: int, partials: Partial, into: Partial) -> None:
    """Merge the parts of each output into the vectors that it stands for.

    outputs: int64 `[n, len(OUTPUT)]`; the vectors of part i are `rows` partials from number partial + i * rows on,
    and vector r of the output is number q + r // group * stride + r % group of `into`. most_rows: the most of `rows`.
    partials: out float32 `[p, d_v]`, lse float32 `[p]`; into: out `[n, d_v]` in any float dtype, lse float32 `[n]`.
    """
    d_v = partials.out.shape[1]
    arguments = {
        "outputs": outputs,
        "partial_out": partials.out,
        "partial_lse": partials.lse,
        "out": into.out,
        "lse": into.lse,
        "D_V": d_v,
        "WIDTH": padded(d_v),
        "BLOCK": BLOCK,
    }
    launch(merge_kernel, (len(outputs), int(triton.cdiv(most_rows, BLOCK))), arguments)


def merge_into(into: Partial, past: Partial, index: torch.Tensor | None) -> None:
    """As `Kernels.merge_into`; but the host does not look at an index on a GPU: what is outside is skipped."""
    total, n, width = check_merge(into, past, index)
    if not n:
        return
    if index is not None:
        if looked_at(index):
            check_range("index", index, total)
        index = index.contiguous()
    arguments = {
        "out": into.out,
        "lse": into.lse,
        "past_out": past.out.contiguous(),
        "past_lse": past.lse.contiguous(),
        "index": into.lse if index is None else index,
        "n": n,
        "into_n": total,
        "D_V": width,
        "INDEXED": index is not None,
        "WIDTH": padded(width),
        "BLOCK": BLOCK,
    }
    launch(merge_into_kernel, (int(triton.cdiv(n, BLOCK)),), arguments)


def looked_at(index: torch.Tensor) -> bool:
    """Whether the host checks an index: not where it would wait for a GPU."""
    return index.is_cpu


@triton.jit  # type: ignore[untyped-decorator]
def merge_kernel(
    outputs: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    D_V: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK vectors of one output."""
    output = outputs + tl.program_id(0).to(tl.int64) * _FIELDS
    rows, group = tl.load(output + _ROWS), tl.load(output + _GROUP)
    row, column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    row_mask = row < rows
    mask = row_mask[:, None] & (column < D_V)[None, :]
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, WIDTH], tl.float32)
    number = tl.load(output + _PARTIAL) + row
    for _ in range(tl.load(output + _PARTS).to(tl.int32)):
        numbers = tl.load(partial_out + number[:, None] * D_V + column[None, :], mask=mask, other=0.0)
        sums, top, total = folded(sums, top, total, numbers, tl.load(partial_lse + number, mask=row_mask, other=0.0))
        number += rows
    vector = tl.load(output + _Q) + row // group * tl.load(output + _STRIDE) + row % group
    settle(sums, top, total, out + vector[:, None] * D_V + column[None, :], lse + vector, mask, row_mask)


@triton.jit  # type: ignore[untyped-decorator]
def merge_into_kernel(
    out: tl.tensor,
    lse: tl.tensor,
    past_out: tl.tensor,
    past_lse: tl.tensor,
    index: tl.tensor,
    n: tl.tensor,
    into_n: tl.tensor,
    D_V: tl.constexpr,
    INDEXED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK vectors of past."""
    vector, column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    vector_mask = vector < n
    if INDEXED:
        target = tl.load(index + vector, mask=vector_mask, other=0)
        vector_mask = vector_mask & (target >= 0) & (target < into_n)
    else:
        target = vector
    mask = vector_mask[:, None] & (column < D_V)[None, :]
    place = out + target[:, None] * D_V + column[None, :]
    mine = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(past_out + vector[:, None] * D_V + column[None, :], mask=mask, other=0.0).to(tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, WIDTH], tl.float32)
    sums, top, total = folded(sums, top, total, mine, tl.load(lse + target, mask=vector_mask, other=0.0))
    sums, top, total = folded(sums, top, total, other, tl.load(past_lse + vector, mask=vector_mask, other=0.0))
    settle(sums, top, total, place, lse + target, mask, vector_mask)


@triton.jit  # type: ignore[untyped-decorator]
def folded(sums: tl.tensor, top: tl.tensor, total: tl.tensor, numbers: tl.tensor, lse: tl.tensor) -> tl.tensor:
    """One more partial in sums and total, whose weights are exp(lse - top)."""
    peak = higher(top, lse)
    shift = finite(peak)
    decay, weight = tl.exp2((top - shift) * LOG2E), tl.exp2((lse - shift) * LOG2E)
    return sums * decay[:, None] + numbers * weight[:, None], peak, total * decay + weight


@triton.jit  # type: ignore[untyped-decorator]
def settle(
    sums: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    place: tl.tensor,
    lse_place: tl.tensor,
    mask: tl.tensor,
    vector_mask: tl.tensor,
) -> None:
    """Store what the sums come to, the weights in which are exp(lse - top): (0, -inf) where nothing was added."""
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(place, rounded(sums / divisor[:, None], place.dtype.element_ty), mask=mask)
    tl.store(lse_place, tl.where(total == 0.0, float("-inf"), finite(top) + tl.log2(divisor) * LN2), mask=vector_mask)


@triton.jit  # type: ignore[untyped-decorator]
def higher(top: tl.tensor, x: tl.tensor) -> tl.tensor:
    """The higher of two, or top where x is NaN: a maximum treats NaN differently from device to device."""
    return tl.maximum(top, tl.where(x == x, x, float("-inf")))


@triton.jit  # type: ignore[untyped-decorator]
def finite(x: tl.tensor) -> tl.tensor:
    """x, or 0 where it is an infinity: what can be subtracted from one."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)
