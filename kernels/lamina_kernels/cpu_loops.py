"""The compiled loops of paged attention: from a block of arguments to the micro-kernels.

A piece's keys stream through in blocks with an online softmax. Every block is read once for all heads of its group
and all queries of the piece, while the block after it is fetched: without that the loops would wait for memory most
of the time. Whoever finishes the last share merges the outputs that were cut. Nothing here is checked: addresses and
sizes come from `cpu_decode`.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import carray, literally, njit, types

from lamina_kernels import emitter, schedule
from lamina_kernels import launch as launching
from lamina_kernels import microkernels as micro
from lamina_kernels.emitter import Kind
from lamina_kernels.launch import FINISHED, HEADER, TAKEN
from lamina_kernels.microkernels import BLOCK, LOG2E, ROW, TILE, pointer
from lamina_kernels.schedule import PIECE

logger = logging.getLogger("lamina")

STRIPS = BLOCK // 16  # at most, of a block

# What the kernels are called with. Sizes in bytes; scratch addresses are those of share 0.
_PAGES = [(name, "i8") for name in ("arena", "page_size", "page_bytes", "k_bytes", "itemsize", "pair", "d_k", "d_v")]
ARGUMENTS = np.dtype(
    [
        *HEADER,
        *_PAGES,
        *((name, "i8") for name in ("layer", "q", "out", "lse", "out_dtype", "window", "pieces", "starts")),
        *((name, "i8") for name in ("partials", "partial_lse", "scratch_bytes")),
        *((name, "i8") for name in ("panel", "logits", "sums", "totals", "peaks", "decays", "tails", "lists")),
        ("scale", "f8"),
        ("soft_cap", "f8"),  # 0: none
    ]
)
APPEND = np.dtype([*HEADER, *_PAGES, *((name, "i8") for name in ("n", "slots", "k", "v"))])


@njit  # type: ignore[untyped-decorator]
def _numbers(address: int, n: int) -> Any:
    return carray(pointer(address), (n,), np.int64)


@njit  # type: ignore[untyped-decorator]
def _floats(address: int, n: int) -> Any:
    return carray(pointer(address), (n,), np.float32)


@njit  # type: ignore[untyped-decorator]
def _locate(a: Any, piece: Any, slot: int) -> tuple[int, int]:
    """Addresses of K and V from `slot` on."""
    table = carray(pointer(piece.table + a.layer * piece.layer_stride * 4), (slot // a.page_size + 1,), np.int32)
    address = a.arena + np.int64(table[slot // a.page_size]) * a.page_bytes
    offset = slot % a.page_size * a.itemsize
    return address + offset * a.pair, address + a.k_bytes + offset * a.d_v


@njit  # type: ignore[untyped-decorator]
def _trim(a: Any, values: int, scratch: int, begin: int, end: int, width: int) -> int:
    """A copy of a strip of V with zeros outside tokens [begin, end): there memory may hold anything, even NaN."""
    size = a.d_v * a.itemsize // 2
    source = carray(pointer(values), (width // a.pair, size, a.pair), np.uint16)
    target = carray(pointer(scratch), (width // a.pair, size, a.pair), np.uint16)
    target[:] = 0
    for token in range(begin, end):
        target[token // a.pair, :, token % a.pair] = source[token // a.pair, :, token % a.pair]
    return scratch


@njit  # type: ignore[untyped-decorator]
def _pack(kind: int, a: Any, piece: Any, panel: int) -> None:
    """Lay the piece's queries out as `dot` reads them: `[tiles, steps, TILE, words a step]`."""
    words = a.d_k // 2 if kind == Kind.BFLOAT16_DOT else a.d_k
    pair = 2 if kind == Kind.BFLOAT16 else 1
    for row in range(piece.rows):
        vector = piece.q + row // piece.group * piece.stride + row % piece.group
        source = carray(pointer(a.q + vector * words * 4), (words // pair, pair), np.int32)
        place = panel + (row // TILE * TILE * words + row % TILE * pair) * 4
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
        total = _floats(totals + row * 64, 16).sum()
        empty = total == 0  # not so where a logit is NaN: that must be seen
        size = 4 if dtype == 0 else 2
        factor = np.float32(0.0) if empty else np.float32(1.0) / total
        micro.settle(dtype, sums + row * a.d_v * 4, out + vector * a.d_v * size, a.d_v // 16, factor)
        _floats(lse, vector + 1)[vector] = -np.inf if empty else peaks[row] / LOG2E + math.log(total)


@njit  # type: ignore[untyped-decorator]
def _attend_block(
    kind: int, unit: int, a: Any, piece: Any, begin: int, row: int, near: Any, far: Any, shift: int
) -> None:
    """TILE query vectors from `row` on against the block of keys from slot `begin` on.

    near: addresses of the block's strips of K, then of V; far: of strips to fetch meanwhile.
    """
    width = 16 * unit
    rows = min(TILE, piece.rows - row)
    first = piece.position + row // piece.group  # of the tile's queries
    last = piece.position + (row + rows - 1) // piece.group
    hi = min(begin + BLOCK, piece.hi, last + 1)
    if begin >= hi or begin + BLOCK <= first - a.window + 1:
        return
    strips = (hi - begin + width - 1) // width
    words = a.d_k // 2 if kind == Kind.BFLOAT16_DOT else a.d_k
    panel, logits = a.panel + shift + row * words * 4, a.logits + shift
    steps, stride = a.d_k // a.pair, a.page_size * a.itemsize * a.pair
    scale = np.float32(a.scale if a.soft_cap else a.scale * LOG2E)
    for strip in range(strips):
        at = logits + strip * width * 4
        micro.dot(kind, unit, rows, panel, near[strip], far[strip], at, steps, stride, scale)
    edge = begin < max(piece.lo, last - a.window + 1) or begin + strips * width > min(piece.hi, first + 1)
    sums, totals = a.sums + shift + row * a.d_v * 4, a.totals + shift + row * 64
    peaks, decays = a.peaks + shift + row * 4, a.decays + shift
    for r in range(rows):
        at = logits + r * ROW
        if a.soft_cap:
            micro.cap(at, strips * unit, np.float32(a.soft_cap))
        if edge:
            position = piece.position + (row + r) // piece.group
            lowest, highest = max(piece.lo, position - a.window + 1), min(piece.hi, position + 1)
            micro.mask(at, strips * unit, max(lowest - begin, -1), min(highest - begin, BLOCK))
        micro.weigh(kind, at, strips * unit, peaks + r * 4, totals + r * 64, decays + r * 4)
    for r in range(0, rows, 4):
        at = sums + r * a.d_v * 4
        values, ahead = near.ctypes.data + 8 * STRIPS, (near if r else far).ctypes.data + 8 * STRIPS
        micro.accumulate(
            kind, unit, min(4, rows - r), logits + r * ROW, values, ahead, strips, at, a.d_v, decays + r * 4
        )


@njit  # type: ignore[untyped-decorator]
def _attend_piece(kind: int, unit: int, a: Any, piece: Any, following: Any, shift: int) -> None:
    """All of one piece; `following` is the one whose first keys are fetched while the last are computed."""
    width = 16 * unit
    near, far = _numbers(a.lists + shift, 2 * STRIPS), _numbers(a.lists + shift + 16 * STRIPS, 2 * STRIPS)
    _pack(kind, a, piece, a.panel + shift)
    peaks = _floats(a.peaks + shift, piece.rows)
    peaks[:] = -np.inf
    _floats(a.totals + shift, piece.rows * 16)[:] = 0
    _floats(a.sums + shift, piece.rows * a.d_v)[:] = 0
    strip_bytes = width * a.itemsize
    for begin in range(piece.lo // width * width, piece.hi, BLOCK):
        ahead, target = begin + BLOCK, piece
        if ahead >= piece.hi:
            ahead, target = following.lo // width * width, following
        strips = (min(piece.hi - begin, BLOCK) + width - 1) // width
        for strip in range(strips):
            slot = begin + strip * width
            k, v = _locate(a, piece, slot)
            if slot < piece.lo or slot + width > piece.hi:
                place = a.tails + shift + (0 if slot < piece.lo else width * a.d_v * a.itemsize)
                v = _trim(a, v, place, max(piece.lo - slot, 0), min(piece.hi - slot, width), width)
            near[strip], near[STRIPS + strip] = k, v
            far[strip], far[STRIPS + strip] = k, v
        for strip in range((min(target.hi - ahead, BLOCK) + width - 1) // width):
            k, v = _locate(a, target, ahead + strip * width)
            if strip < strips:
                far[strip], far[STRIPS + strip] = k, v
            else:
                micro.prefetch(k, strip_bytes * a.d_k)
                micro.prefetch(v, strip_bytes * a.d_v)
        for row in range(0, piece.rows, TILE):
            _attend_block(kind, unit, a, piece, begin, row, near, far if row == 0 else near, shift)
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
            lse = _floats(a.partial_lse, last)
            peak, total = np.float32(-np.inf), np.float32(0.0)
            for vector in range(first, last, piece.rows):
                peak = max(peak, lse[vector])
            sums = _floats(a.sums, a.d_v)
            sums[:] = 0
            for vector in range(first, last, piece.rows):
                if lse[vector] != -np.inf:
                    weight = math.exp(lse[vector] - peak)
                    total += weight
                    part = _floats(a.partials + vector * a.d_v * 4, a.d_v)
                    for c in range(a.d_v):
                        sums[c] += weight * part[c]
            vector = piece.q + row // piece.group * piece.stride + row % piece.group
            factor = np.float32(0.0) if total == 0 else np.float32(1.0) / total
            size = 4 if a.out_dtype == 0 else 2
            micro.settle(a.out_dtype, a.sums, a.out + vector * a.d_v * size, a.d_v // 16, factor)
            _floats(a.lse, vector + 1)[vector] = -np.inf if total == 0 else peak + math.log(total)


@njit  # type: ignore[untyped-decorator]
def _attend_shares(kind: int, unit: int, block: Any) -> None:
    kind, unit = literally(kind), literally(unit)
    a = carray(block, (1,), ARGUMENTS)[0]
    starts = _numbers(a.starts, a.shares + 1)
    pieces = carray(pointer(a.pieces), (starts[a.shares],), PIECE)
    share = micro.take(block, TAKEN)
    while share < a.shares:
        for i in range(starts[share], starts[share + 1]):
            following = pieces[min(i + 1, starts[share + 1] - 1)]
            _attend_piece(kind, unit, a, pieces[i], following, share * a.scratch_bytes)
        if micro.take(block, FINISHED) == a.shares - 1:  # every share is done, and this thread saw it last
            _merge(a, pieces)
        share = micro.take(block, TAKEN)


@njit  # type: ignore[untyped-decorator]
def _scatter(source: int, target: int, n: int, stride: int, size: int) -> None:
    """Copy n numbers of `size` bytes, 2 or 4, to places `stride` numbers apart."""
    if size == 4:
        from_words = carray(pointer(source), (n,), np.int32)
        to_words = carray(pointer(target), (n, stride), np.int32)
        for i in range(n):
            to_words[i, 0] = from_words[i]
    else:
        from_halves = carray(pointer(source), (n,), np.int16)
        to_halves = carray(pointer(target), (n, stride), np.int16)
        for i in range(n):
            to_halves[i, 0] = from_halves[i]


@njit  # type: ignore[untyped-decorator]
def _append_shares(block: Any) -> None:
    a = carray(block, (1,), APPEND)[0]
    slots = _numbers(a.slots, a.n)
    share = micro.take(block, TAKEN)
    while share < a.shares:
        for i in range(a.n * share // a.shares, a.n * (share + 1) // a.shares):
            address, offset = a.arena + slots[i] // a.page_size * a.page_bytes, slots[i] % a.page_size
            word = a.pair * a.itemsize
            _scatter(a.k + i * a.d_k * a.itemsize, address + offset * word, a.d_k // a.pair, a.page_size, word)
            values = address + a.k_bytes + (offset // a.pair * a.d_v * a.pair + offset % a.pair) * a.itemsize
            _scatter(a.v + i * a.d_v * a.itemsize, values, a.d_v, a.pair, a.itemsize)
        share = micro.take(block, TAKEN)


@cache
def attend_kernel(kind: Kind, unit: int) -> int:
    """The address of the attention kernel for strips of 16 * unit tokens.

    Compiled where numba's cache on disk does not have it yet.
    """
    code, fingerprint, started = int(kind), _fingerprint(), time.perf_counter()
    logger.info("loading the CPU attention kernel for %s; compiling it, the first time, takes a while", kind.name)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _attend_shares(code, unit, block)

    logger.info("CPU attention kernel ready after %.1f s", time.perf_counter() - started)
    return int(kernel.address)


@cache
def append_kernel() -> int:
    """The address of the kernel that stores K and V, compiled or from the cache as well."""
    fingerprint = _fingerprint()

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _append_shares(block)

    return int(kernel.address)


def _fingerprint() -> int:
    """What the kernels are compiled from outside this file. Closed over, it is a part of numba's cache key."""
    sources = (micro, emitter, schedule, launching)
    return zlib.crc32(b"".join(Path(str(source.__file__)).read_bytes() for source in sources)) or 1
