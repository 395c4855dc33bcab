"""Paged attention in Triton: the keys of a batch are cut into chunks on the host, and dealt to programs.

Split-KV (`split`) cuts every piece's keys into the same number of chunks, a program each: the schedule of
FlashDecoding, right where pieces are about equally long. Stream-K (`schedule.deal`) lays all work end to end and cuts
it into equal shares, a program each: LeanAttention (arXiv 2405.10480), for batches whose rows differ in length. The
host cuts in both, so no program waits for another: the parts of a cut output are written out, and merged by
`merge_partials`. The query heads of a KV head fill the rows of one tile, so K and V are read once.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from lamina_kernels.gpu.kv_append import PLAIN, widened
from lamina_kernels.gpu.merge_partials import LN2, LOG2E, finite, higher, settle
from lamina_kernels.paged.rows import Ints
from lamina_kernels.paged.schedule import Pieces, number_partials

# What the kernels read of a piece, int64 each. As in schedule.PIECE, but table is the number of an entry in the
# device's copy of all tables.
RECORD = (
    "q",
    "stride",
    "group",
    "rows",
    "position",
    "lo",
    "hi",
    "window",
    "table",
    "layer_stride",
    "listed",
    "partial",
)
FIELDS = tl.constexpr(len(RECORD))
(_Q, _STRIDE, _GROUP, ROWS_OF, _POSITION, LO, HI, _WINDOW, _TABLE, _LAYER_STRIDE, _LISTED, PARTIAL) = (
    tl.constexpr(i) for i in range(len(RECORD))
)

MAX_SPLITS = 128  # num_splits_heuristic of FlashAttention-2 (flash_api.cpp), as the two numbers in split_count
FULL, NEARLY_BEST = 0.8, 0.85


def split(whole: Pieces, programs: int, keys: int) -> tuple[Pieces, Ints]:
    """Cut each piece into as many chunks of whole tiles of `keys`: as `schedule.deal`, a share for each chunk."""
    longest = int((whole["hi"] - whole["lo"]).max(initial=1))
    splits = split_count(len(whole), programs, -(-longest // keys))
    pieces = np.repeat(whole, splits)
    lo, hi = pieces["lo"].copy(), pieces["hi"].copy()
    length = -(-(hi - lo) // (splits * keys)) * keys
    begin = lo + np.tile(np.arange(splits), len(whole)) * length
    pieces["lo"], pieces["hi"] = np.minimum(begin, hi), np.minimum(begin + length, hi)
    pieces = number_partials(pieces[(begin < hi) | (begin == lo)])
    return pieces, np.arange(len(pieces) + 1)


def split_count(pieces: int, programs: int, tiles: int) -> int:
    """Into how many chunks each of `pieces` pieces of `tiles` tiles should be cut for `programs` at once.

    The fewest that keep the programs nearly as busy as the best number does: num_splits_heuristic of FlashAttention-2.
    """
    if pieces >= FULL * programs:
        return 1
    splits = np.arange(1, max(1, min(MAX_SPLITS, programs, tiles)) + 1)
    waves = pieces * splits / programs
    efficiency = waves / np.ceil(waves)
    return int(splits[efficiency >= NEARLY_BEST * efficiency.max()][0])


def records(pieces: Pieces, table: int, device: torch.device) -> torch.Tensor:
    """Pieces as the kernels read them, int64 `[n, len(RECORD)]`. table: the address that theirs count from."""
    columns: dict[str, Ints] = {name: pieces[name] for name in RECORD}
    columns["window"] = np.minimum(pieces["window"], 2**31 - 1)
    columns["table"] = (pieces["table"] - table) // 4
    return torch.from_numpy(np.stack([columns[name] for name in RECORD], 1)).to(device)


@triton.jit  # type: ignore[untyped-decorator]
def located(
    piece: tl.tensor,
    table: tl.tensor,
    layer: tl.tensor,
    key: tl.tensor,
    inside: tl.tensor,
    PAGE: tl.constexpr,
    LISTED: tl.constexpr,
) -> tl.tensor:
    """The page of each key of a piece, int64, and the key's place in it."""
    entries = table + tl.load(piece + _TABLE) + tl.load(piece + _LAYER_STRIDE) * layer
    if LISTED:
        listed = tl.load(piece + _LISTED) > 0
        entry = tl.load(entries + tl.where(listed, key, key // PAGE), mask=inside, other=0)
        page = tl.where(listed, entry // PAGE, entry).to(tl.int64)
        offset = tl.where(listed, entry % PAGE, key % PAGE)
    else:
        page = tl.load(entries + key // PAGE, mask=inside, other=0).to(tl.int64)
        offset = key % PAGE
    return page, offset


@triton.jit  # type: ignore[untyped-decorator]
def weighed(logits: tl.tensor, top: tl.tensor) -> tl.tensor:
    """One step of the online softmax: the weights, what earlier sums must be multiplied with, and the new top."""
    peak = higher(top, tl.max(tl.where(logits == logits, logits, float("-inf")), 1))
    shift = finite(peak)
    return tl.exp2(logits - shift[:, None]), tl.exp2(top - shift), peak


@triton.jit  # type: ignore[untyped-decorator]
def capped(x: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """cap * tanh(x / cap), by way of exp2: Triton has no tanh of its own. Below 1/64 it is y - y^3 / 3, to 1e-8."""
    small = tl.exp2(tl.abs(x) * (-2.0 * LOG2E / cap))
    bent = cap * (1.0 - small) / (1.0 + small)
    y = x / cap
    return tl.where(tl.abs(y) < 1 / 64, x * (1.0 - y * y / 3.0), tl.where(x < 0.0, -bent, bent))


@triton.jit(do_not_specialize=["layer"])  # type: ignore[untyped-decorator]
def attend_kernel(
    pieces: tl.tensor,
    starts: tl.tensor,
    q: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    table: tl.tensor,
    layer: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
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
    DOT: tl.constexpr,
    CAPPED: tl.constexpr,
    LISTED: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """The pieces of one share: share i has those from number starts[i] up to starts[i + 1]. Each is the attention of
    its queries over its keys [lo, hi): into out and lse, or from its partial on.

    The online softmax of FlashAttention, in powers of two: weights are 2 ** (logit - top), logits times log2(e).
    """
    row, column_k, column_v = tl.arange(0, ROWS), tl.arange(0, WIDTH_K), tl.arange(0, WIDTH_V)
    if LATENT:  # K is V, loaded once, and what stands behind it
        column_k += D_V
    mask_k, mask_v = column_k < D_K, column_v < D_V
    share = starts + tl.program_id(0)
    for i in range(tl.load(share), tl.load(share + 1)):
        piece = pieces + i * FIELDS
        lo, hi = tl.load(piece + LO).to(tl.int32), tl.load(piece + HI).to(tl.int32)
        partial = tl.load(piece + PARTIAL)
        rows, group = tl.load(piece + ROWS_OF).to(tl.int32), tl.load(piece + _GROUP).to(tl.int32)
        row_mask = row < rows
        vector = tl.load(piece + _Q) + row // group * tl.load(piece + _STRIDE) + row % group
        position, window = tl.load(piece + _POSITION).to(tl.int32) + row // group, tl.load(piece + _WINDOW).to(tl.int32)
        query_place = q + vector[:, None] * D_K + column_k[None, :]
        query = tl.load(query_place, mask=row_mask[:, None] & mask_k[None, :], other=0.0).to(DOT)
        if LATENT:
            front_place = q + vector[:, None] * D_K + column_v[None, :]
            front = tl.load(front_place, mask=row_mask[:, None] & mask_v[None, :], other=0.0).to(DOT)

        top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, WIDTH_V], tl.float32)
        for begin in range(lo, hi, KEYS):
            key = begin + tl.arange(0, KEYS)
            inside = key < hi
            page, offset = located(piece, table, layer, key, inside, PAGE, LISTED)
            block, scale_place = arena + page * PAGE_NUMBERS, scales + page * PAGE_SCALES + SCALES_AT + offset

            k_place = (block + offset * D_K)[None, :] + column_k[:, None]
            k = tl.load(k_place, mask=inside[None, :] & mask_k[:, None], other=0)
            v_place = (block + V_AT + offset * (D_K if LATENT else D_V))[:, None] + column_v[None, :]
            logits = tl.dot(query, widened(k, KIND, DOT), input_precision="ieee")
            if LATENT:
                v = tl.load(v_place, mask=inside[:, None] & mask_v[None, :], other=0)
                logits = tl.dot(front, tl.trans(widened(v, KIND, DOT)), logits, input_precision="ieee")
            logits *= scale
            if KIND != PLAIN:
                logits *= tl.load(scale_place, mask=inside, other=0.0)[None, :]
            if CAPPED:
                logits = capped(logits, soft_cap)
            logits *= LOG2E
            age = position[:, None] - key[None, :]
            logits = tl.where(inside[None, :] & (age >= 0) & (age < window), logits, float("-inf"))

            weight, decay, top = weighed(logits, top)
            total = total * decay + tl.sum(weight, 1)
            if KIND != PLAIN:
                weight *= tl.load(scale_place + (0 if LATENT else PAGE), mask=inside, other=0.0)[None, :]
            if not LATENT:
                v = tl.load(v_place, mask=inside[:, None] & mask_v[None, :], other=0)
            sums = tl.dot(weight.to(DOT), widened(v, KIND, DOT), sums * decay[:, None], input_precision="ieee")

        mask = row_mask[:, None] & mask_v[None, :]
        if partial < 0:
            settle(
                sums, top * LN2, total, out + vector[:, None] * D_V + column_v[None, :], lse + vector, mask, row_mask
            )
        else:
            number = partial + row
            place = partial_out + number[:, None] * D_V + column_v[None, :]
            settle(sums, top * LN2, total, place, partial_lse + number, mask, row_mask)
