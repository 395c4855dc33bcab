"""Stores K and V in pages of `Order.TOKENS`, in Triton, and says how stored numbers are read back.

Codes are those of `pages.quantise`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lamina_kernels.gpu.tuning import launch, padded
from lamina_kernels.paged.pages import PEAKS, AppendPlan, Order, Pages, check_append, check_order, check_slots

BLOCK = 16  # vectors of a program: estimate, unmeasured
PLAIN, INT8, E4M3 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how numbers are stored

_KINDS = {torch.int8: (INT8, torch.int8), torch.float8_e4m3fn: (E4M3, torch.uint8)}


def plan_append(pages: Pages, slots: torch.Tensor) -> AppendPlan:
    check_order(pages, Order.TOKENS)
    check_slots(pages, slots)
    return AppendPlan(pages, slots.contiguous().to(pages.arena.device))


def append(pages: Pages, plan: AppendPlan, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
    check_append(pages, plan, layer, k, v)
    n, layout = len(k), pages.layout
    if not n:
        return
    if not layout.scaled:
        k, v = k.to(layout.dtype), v.to(layout.dtype)
    arguments = {
        "slots": plan.slots[layer],
        "k": k.contiguous(),
        "v": v.contiguous(),
        "n": n,
        "WIDTH_K": padded(layout.d_k),
        "WIDTH_V": padded(layout.d_v),
        "PEAK": PEAKS.get(layout.dtype, 0.0),
        "BLOCK": BLOCK,
    }
    launch(append_kernel, (int(triton.cdiv(n, BLOCK)),), arguments | describe(pages))


def describe(pages: Pages) -> dict[str, Any]:
    """What every kernel gets of the pages. Offsets count numbers of the arena's dtype, those of scales float32."""
    layout = pages.layout
    kind, stored = _KINDS.get(layout.dtype, (PLAIN, layout.dtype))
    return {
        "arena": pages.arena.view(stored),
        "scales": pages.arena.view(torch.float32) if layout.scaled else pages.arena,
        "PAGE": layout.page_size,
        "PAGE_NUMBERS": layout.page_bytes // layout.dtype.itemsize,
        "PAGE_SCALES": layout.page_bytes // 4,
        "V_AT": 0 if layout.latent else layout.k_bytes // layout.dtype.itemsize,
        "SCALES_AT": layout.kv_bytes // 4,
        "D_K": layout.d_k,
        "D_V": layout.d_v,
        "LATENT": layout.latent,
        "KIND": kind.value,
    }


@triton.jit  # type: ignore[untyped-decorator]
def append_kernel(
    slots: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    n: tl.tensor,
    arena: tl.tensor,
    scales: tl.tensor,
    PAGE: tl.constexpr,
    PAGE_NUMBERS: tl.constexpr,
    PAGE_SCALES: tl.constexpr,
    V_AT: tl.constexpr,
    SCALES_AT: tl.constexpr,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    LATENT: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
    PEAK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK vectors of K, and those of V where there are any."""
    vector = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    vector_mask = vector < n
    slot = tl.load(slots + vector, mask=vector_mask, other=0)
    page, offset = slot // PAGE, slot % PAGE
    block, scale = arena + page * PAGE_NUMBERS, scales + page * PAGE_SCALES + SCALES_AT + offset
    _store(k + vector * D_K, vector_mask, block + offset * D_K, scale, D_K, KIND, WIDTH_K, PEAK)
    if not LATENT:
        _store(v + vector * D_V, vector_mask, block + V_AT + offset * D_V, scale + PAGE, D_V, KIND, WIDTH_V, PEAK)


@triton.jit  # type: ignore[untyped-decorator]
def _store(
    x: tl.tensor,
    vector_mask: tl.tensor,
    place: tl.tensor,
    scale_place: tl.tensor,
    D: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    PEAK: tl.constexpr,
) -> None:
    column = tl.arange(0, WIDTH)
    mask = vector_mask[:, None] & (column < D)[None, :]
    numbers = tl.load(x[:, None] + column[None, :], mask=mask, other=0.0)
    if KIND == PLAIN:
        tl.store(place[:, None] + column[None, :], numbers, mask=mask)
    else:
        numbers = numbers.to(tl.float32)
        # Compared as integers NaN is above infinity and everything else, so one in a vector shows in its scale.
        peak = tl.max(numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
        scale = tl.div_rn(peak, PEAK)
        scale_mask = scale > 0
        ratio = tl.div_rn(numbers, tl.broadcast_to(tl.where(scale_mask, scale, 1.0)[:, None], numbers.shape))
        ratio = tl.where(scale_mask[:, None] & (ratio == ratio), tl.minimum(tl.maximum(ratio, -PEAK), PEAK), 0.0)
        if KIND == INT8:
            codes = ((ratio + 12582912.0) - 12582912.0).to(tl.int8)  # + 1.5 * 2**23: rounds to a whole, half to even
        else:
            codes = encoded(ratio)
        tl.store(place[:, None] + column[None, :], codes, mask=mask)
        tl.store(scale_place, scale, mask=vector_mask)


@triton.jit  # type: ignore[untyped-decorator]
def encoded(x: tl.tensor) -> tl.tensor:
    """float32 from -448 to 448 as e4m3 codes in uint8, rounded half to even: compute capability 8.0 has no such
    conversion, and the interpreter's loses the carry."""
    bits = x.to(tl.int32, bitcast=True)
    low = bits & 0x7FFFFFFF
    magnitude = low.to(tl.float32, bitcast=True)
    normal = ((low + 0x7FFFF + ((low >> 20) & 1)) >> 20) - (120 << 3)  # 20 bits fewer, exponent bias 127 to 7
    tiny = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # 16384's last place is 2**-9, a code's step
    return (tl.where(magnitude < 0.015625, tiny, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit  # type: ignore[untyped-decorator]
def widened(x: tl.tensor, KIND: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """Stored numbers in the dtype in which they are multiplied."""
    if KIND == E4M3:
        code = x.to(tl.int16)
        # The same bits at float16's places are 2**8 times too small, subnormals too.
        x = (((code & 0x7F) << 7) | ((code & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
    if KIND != PLAIN:
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 in another dtype, rounded half to even. By hand for bfloat16: the interpreter cuts its bits off."""
    if dtype == tl.bfloat16:
        bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
        y = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y
