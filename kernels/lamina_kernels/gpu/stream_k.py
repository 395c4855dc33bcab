"""Paged attention in Triton, stream-K: all work is laid end to end and cut into equal shares, a program each.

LeanAttention (arXiv 2405.10480) for batches whose rows differ in length. The host cuts (`schedule.deal`), so no
program waits for another: the parts of a cut output are written out, and merged by `merge_partials`. The attention of
a piece is that of `split_kv`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lamina_kernels.gpu.split_kv import FIELDS, HI, LO, PARTIAL, attend_chunk


@triton.jit(do_not_specialize=["layer"])  # type: ignore[untyped-decorator]
def lean_kernel(
    pieces: tl.tensor, starts: tl.tensor,
    q: tl.tensor, out: tl.tensor, lse: tl.tensor, partial_out: tl.tensor, partial_lse: tl.tensor,
    table: tl.tensor, bias: tl.tensor, layer: tl.tensor, scale: tl.tensor, soft_cap: tl.tensor,
    arena: tl.tensor, scales: tl.tensor,
    PAGE: tl.constexpr, PAGE_NUMBERS: tl.constexpr, PAGE_SCALES: tl.constexpr, V_AT: tl.constexpr,
    SCALES_AT: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, LATENT: tl.constexpr, KIND: tl.constexpr,
    DOT: tl.constexpr, CAPPED: tl.constexpr, LISTED: tl.constexpr, BIASED: tl.constexpr, WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
) -> None:  # fmt: skip
    """The pieces of one share: share i has those from number starts[i] up to starts[i + 1]."""
    share = starts + tl.program_id(0)
    for i in range(tl.load(share), tl.load(share + 1)):
        piece = pieces + i * FIELDS
        lo, hi = tl.load(piece + LO).to(tl.int32), tl.load(piece + HI).to(tl.int32)
        attend_chunk(
            piece, lo, hi, tl.load(piece + PARTIAL),
            q, out, lse, partial_out, partial_lse, table, bias, layer, scale, soft_cap, arena, scales,
            PAGE, PAGE_NUMBERS, PAGE_SCALES, V_AT, SCALES_AT, D_K, D_V, LATENT, KIND, DOT, CAPPED, LISTED, BIASED,
            WIDTH_K, WIDTH_V, ROWS, KEYS,
        )  # fmt: skip
