"""The compiled loops of paged attention: from a block of arguments to the micro-kernels.

A piece's keys stream through in blocks with an online softmax. Every block is read once for all heads of its group
and all queries of the piece, while the block after it is fetched: without that the loops would wait for memory most
of the time. The thread that finishes the last share merges the outputs that were cut. Nothing here is checked:
addresses and sizes come from `decode`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import carray, literally, njit, types

from lamina_kernels.attention import microkernels as micro
from lamina_kernels.attention import moves as cpu_moves
from lamina_kernels.attention import strips
from lamina_kernels.attention.microkernels import BLOCK, ROW, TILE, Accumulate, Dot
from lamina_kernels.attention.moves import PAGES
from lamina_kernels.attention.strips import STRIPS, collect_scales, floats, locate, look_ahead, numbers, strip_of
from lamina_kernels.compile import emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.emitter import Kind
from lamina_kernels.compile.intrinsics import LOG2E, pointer
from lamina_kernels.compile.launch import FINISHED, HEADER, TAKEN, source_fingerprint
from lamina_kernels.paged import schedule
from lamina_kernels.paged.schedule import PIECE

FEW = 4  # query vectors that are few
ALIKE = 32  # tokens of a row that are attended as if each were alone
WIDE = 64  # channels that `accumulate` passes over at once, for few query vectors
FETCHES_NEAR = emitter.fetches_near()

# What the kernels are called with. Sizes in bytes; scratch addresses are those of share 0.
SCRATCH = (
    *("panel", "scales", "logits", "sums", "totals", "peaks", "decays", "tails", "lists", "slots", "gathered"),
    "spread",  # V of a block of latents
)
ARGUMENTS = np.dtype(
    [
        *HEADER,
        *PAGES,
        *((name, "i8") for name in ("layer", "q", "out", "lse", "out_dtype", "pieces", "starts")),
        *((name, "i8") for name in ("partials", "partial_lse", "scratch_bytes")),
        *((name, "i8") for name in SCRATCH),
        ("scale", "f8"),
        ("soft_cap", "f8"),  # 0: none
    ]
)


@njit  # type: ignore[untyped-decorator]
def _pack(kind: int, a: Any, piece: Any, shift: int) -> None:
    """Lay the piece's queries out as `dot` reads them, `[tiles, steps, TILE, words a step]`: INT8 as int16, with the
    scale of each among the scales."""
    channels, pair = 2 if kind == Kind.BFLOAT16_DOT or kind == Kind.INT8 else 1, 2 if kind == Kind.BFLOAT16 else 1
    words = a.d_k // channels
    for row in range(piece.rows):
        vector = piece.q + row // piece.group * piece.stride + row % piece.group
        place = a.panel + shift + (row // TILE * TILE * words + row % TILE * pair) * 4
        if kind == Kind.INT8:
            scale = micro.quantise(a.q + vector * a.d_k * 4, place, words, TILE)
            floats(a.scales + shift, piece.rows)[row] = scale
        else:
            source = carray(pointer(a.q + vector * words * 4), (words // pair, pair), np.int32)
            target = carray(pointer(place), (words // pair * TILE, pair), np.int32)
            for i in range(words // pair):
                for j in range(pair):
                    target[i * TILE, j] = source[i, j]


@njit  # type: ignore[untyped-decorator]
def _finish(a: Any, piece: Any, sums: int, totals: int, peaks: Any) -> None:
    """Normalise, and write to the outputs or, of what was cut, to the partials."""
    for row in range(piece.rows):
        vector, out, lse, dtype = piece.partial + row, a.partials, a.partial_lse, 0
        if piece.partial < 0:
            vector = piece.q + row // piece.group * piece.stride + row % piece.group
            out, lse, dtype = a.out, a.lse, a.out_dtype
        total = floats(totals + row * 64, 16).sum()
        empty = total == 0  # not so where a logit is NaN: that must be seen
        size = 4 if dtype == 0 else 2
        factor = np.float32(0.0) if empty else np.float32(1.0) / total
        micro.settle(dtype, sums + row * a.d_v * 4, out + vector * a.d_v * size, a.d_v // 16, factor)
        floats(lse, vector + 1)[vector] = -np.inf if empty else peaks[row] / LOG2E + math.log(total)


class _Keys(NamedTuple):
    """A block of keys."""

    begin: int  # its first slot
    end: int
    near: Any  # addresses of its strips of K, then of V
    far: Any  # those of strips to fetch meanwhile


@njit  # type: ignore[untyped-decorator]
def _attend_block(kind: int, unit: int, a: Any, piece: Any, row: int, keys: _Keys, shift: int) -> None:
    """TILE query vectors from `row` on against a block of keys."""
    begin, end, near, far = keys
    width = 16 * unit
    rows = min(TILE, piece.rows - row)
    first = piece.position + row // piece.group  # of the tile's queries
    last = piece.position + (row + rows - 1) // piece.group
    hi = min(end, piece.hi, last + 1)
    if begin >= hi or end <= first - piece.window + 1:
        return
    strips = (hi - begin + width - 1) // width
    channels = 2 if kind == Kind.BFLOAT16_DOT or kind == Kind.INT8 else 1
    panel, logits = a.panel + shift + row * (a.d_k // channels) * 4, a.logits + shift
    steps, stride = a.d_k // a.k_pack, (width if piece.listed else a.page_size) * a.itemsize * a.k_pack
    scale = np.float32(a.scale if a.soft_cap else a.scale * LOG2E)
    of_q, of_k = a.scales + shift + row * 4, a.slots + shift
    for strip in range(strips):
        offset = strip * width * 4
        place = logits + offset
        micro.dot(
            kind, unit, Dot(rows, panel, near[strip], far[strip], place, steps, stride, of_q, of_k + offset, scale)
        )
    edge = begin < max(piece.lo, last - piece.window + 1) or begin + strips * width > min(piece.hi, first + 1)
    sums, totals = a.sums + shift + row * a.d_v * 4, a.totals + shift + row * 64
    peaks, decays = a.peaks + shift + row * 4, a.decays + shift
    for r in range(rows):
        row_logits = logits + r * ROW
        if a.soft_cap:
            micro.cap(row_logits, strips * unit, np.float32(a.soft_cap))
        if edge:
            position = piece.position + (row + r) // piece.group
            lowest, highest = max(piece.lo, position - piece.window + 1), min(piece.hi, position + 1)
            micro.mask(row_logits, strips * unit, max(lowest - begin, -1), min(highest - begin, BLOCK))
        factors = a.slots + shift + 4 * BLOCK
        micro.weigh(kind, row_logits, strips * unit, peaks + r * 4, totals + r * 64, decays + r * 4, factors)
    tile = TILE if rows == TILE else 4  # of rows that share what is loaded of V
    for r in range(0, rows, tile):
        tile_sums = sums + r * a.d_v * 4
        values, ahead = near.ctypes.data + 8 * STRIPS, (near if r else far).ctypes.data + 8 * STRIPS
        count, weights = min(tile, rows - r), logits + r * ROW
        micro.accumulate(
            kind, unit, Accumulate(count, weights, values, ahead, strips, tile_sums, a.d_v, decays + r * 4)
        )


@njit  # type: ignore[untyped-decorator]
def _block(kind: int, a: Any, piece: Any, begin: int, width: int) -> int:
    """How many keys from slot `begin` on to take at once.

    A page alone where the next one follows it in memory and one pass reads each of its bytes in order: then the
    hardware fetches better than we do, but on CPUs with FETCHES_NEAR. For few query vectors half a block, so that
    prefetches come in smaller bursts. Weights are rounded by blocks, so a few tokens together have the blocks that
    each has alone.
    """
    alike = piece.group <= FEW and piece.rows <= ALIKE * piece.group
    if piece.rows > FEW and not alike:
        return BLOCK
    in_order = kind != Kind.INT8 and width == a.page_size and a.d_v <= WIDE and not piece.listed
    if not FETCHES_NEAR and in_order and begin + width < piece.hi:
        page, _ = locate(a, piece, begin)
        following, _ = locate(a, piece, begin + width)
        if following - page == a.page_bytes:
            return width
    return BLOCK // 2


@njit  # type: ignore[untyped-decorator]
def _attend_piece(kind: int, unit: int, a: Any, piece: Any, following: Any, shift: int) -> None:
    """All of one piece; `following` is the one whose first keys are fetched while the last are computed."""
    width = 16 * unit
    near, far = numbers(a.lists + shift, 2 * STRIPS), numbers(a.lists + shift + 16 * STRIPS, 2 * STRIPS)
    _pack(kind, a, piece, shift)
    peaks = floats(a.peaks + shift, piece.rows)
    peaks[:] = -np.inf
    floats(a.totals + shift, piece.rows * 16)[:] = 0
    floats(a.sums + shift, piece.rows * a.d_v)[:] = 0
    begin = piece.lo // width * width
    while begin < piece.hi:
        block = _block(kind, a, piece, begin, width)
        ahead, target = begin + block, piece
        if ahead >= piece.hi:
            ahead, target = following.lo // width * width, following
        strips = (min(piece.hi - begin, block) + width - 1) // width
        for strip in range(strips):
            slot = begin + strip * width
            k, v = strip_of(kind, unit, a, piece, slot, strip, shift)
            near[strip], near[STRIPS + strip] = k, v
            far[strip], far[STRIPS + strip] = k, v
        look_ahead(a, target, ahead, ahead + block, width, strips, near, far)
        if kind == Kind.INT8:
            collect_scales(a, piece, begin, strips, width, shift)
        for row in range(0, piece.rows, TILE):
            keys = _Keys(begin, begin + block, near, far if row == 0 else near)
            _attend_block(kind, unit, a, piece, row, keys, shift)
        begin += block
    _finish(a, piece, a.sums + shift, a.totals + shift, peaks)


@njit  # type: ignore[untyped-decorator]
def _merge(a: Any, pieces: Any) -> None:
    """The outputs that were cut, from their parts in order (the formula of `lamina_kernels.partial`)."""
    for i in range(len(pieces)):
        piece = pieces[i]
        if piece.parts < 2:
            continue
        for row in range(piece.rows):
            first, last = piece.partial + row, piece.partial + row + piece.parts * piece.rows
            lse = floats(a.partial_lse, last)
            peak, total = np.float32(-np.inf), np.float32(0.0)
            for vector in range(first, last, piece.rows):
                peak = max(peak, lse[vector])
            sums = floats(a.sums, a.d_v)
            sums[:] = 0
            for vector in range(first, last, piece.rows):
                if lse[vector] != -np.inf:
                    weight = math.exp(lse[vector] - peak)
                    total += weight
                    part = floats(a.partials + vector * a.d_v * 4, a.d_v)
                    for c in range(a.d_v):
                        sums[c] += weight * part[c]
            vector = piece.q + row // piece.group * piece.stride + row % piece.group
            factor = np.float32(0.0) if total == 0 else np.float32(1.0) / total
            size = 4 if a.out_dtype == 0 else 2
            micro.settle(a.out_dtype, a.sums, a.out + vector * a.d_v * size, a.d_v // 16, factor)
            floats(a.lse, vector + 1)[vector] = -np.inf if total == 0 else peak + math.log(total)


@njit  # type: ignore[untyped-decorator]
def _attend_shares(kind: int, unit: int, block: Any) -> None:
    kind, unit = literally(kind), literally(unit)
    a = carray(block, (1,), ARGUMENTS)[0]
    starts = numbers(a.starts, a.shares + 1)
    pieces = carray(pointer(a.pieces), (starts[a.shares],), PIECE)
    share = intrinsics.take(block, TAKEN)
    while share < a.shares:
        for i in range(starts[share], starts[share + 1]):
            following = pieces[min(i + 1, starts[share + 1] - 1)]
            _attend_piece(kind, unit, a, pieces[i], following, share * a.scratch_bytes)
        if intrinsics.take(block, FINISHED) == a.shares - 1:  # every share is done, and this thread saw it last
            _merge(a, pieces)
        share = intrinsics.take(block, TAKEN)


@cache
def attend_kernel(kind: Kind, unit: int) -> int:
    """The address of the attention kernel for strips of 16 * unit tokens.

    Compiled where numba's cache on disk does not have it yet.
    """
    code = int(kind)
    fingerprint = source_fingerprint(micro, intrinsics, emitter, schedule, launching, cpu_moves, strips)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _attend_shares(code, unit, block)

    return int(kernel.address)
