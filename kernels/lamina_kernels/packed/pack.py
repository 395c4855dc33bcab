"""Packs W into tiles: from ggml's blocks, and from codes with scales.

A matrix may be packed a few rows at a time: packed rows follow one another in memory, so a multiple of `layout.ROWS`
of them begins where those before end. The compiled loops load and store whole numbers at any address (`load8` to
`store32`), as blocks of ggml are not aligned.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from lamina_kernels.compile import emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.emitter import I64, Emitter
from lamina_kernels.compile.intrinsics import pointer, take
from lamina_kernels.compile.launch import HEADER, TAKEN, launch, source_fingerprint
from lamina_kernels.packed import layout as layouts
from lamina_kernels.packed.layout import BLOCK, LAYOUTS, ROWS, Format, packed_bytes, tiles_of
from lamina_kernels.packed.matrix import PackedMatrix


def _load(bits: int) -> Any:
    """An intrinsic (address): the unsigned number of `bits` there, as int64."""

    def typed(context: Any, address: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emitter(builder)
            return builder.zext(e.load(e.pointer(args[0]), ir.IntType(bits), 1), I64)

        return types.int64(types.int64), emit

    return intrinsic(typed)


def _store(bits: int) -> Any:
    """An intrinsic (address, number): the lower `bits` of an int64 are put there."""

    def typed(context: Any, address: Any, number: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emitter(builder)
            e.store(builder.trunc(args[1], ir.IntType(bits)), e.pointer(args[0]), 1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return intrinsic(typed)


load8, load16, load32 = _load(8), _load(16), _load(32)
store8, store16, store32 = _store(8), _store(16), _store(32)


BLOCKS = {
    "Q4_0": (Format.U4, 32, 18),
    "Q4_1": (Format.U4M, 32, 20),
    "Q5_0": (Format.U5, 32, 22),
    "Q5_1": (Format.U5M, 32, 24),
    "Q8_0": (Format.U8, 32, 34),
    "Q4_K": (Format.K4, 256, 144),
    "Q5_K": (Format.K5, 256, 176),
    "Q6_K": (Format.K6, 256, 210),
    "FP4": (Format.F4, 32, 18),
}
"""Of ggml's kinds: the format, and the columns and bytes of a block. FP4 is laid out as Q4_0, with codes of e2m1."""

CODES = {(4, False): "int4", (4, True): "int4_min", (5, False): "int5", (5, True): "int5_min", (8, False): "int8"}
"""Kinds of codes by their bits, and whether they have minima."""

FORMATS = {kind: block[0] for kind, block in BLOCKS.items()} | {
    "int4": Format.U4,
    "int4_min": Format.U4M,
    "int5": Format.U5,
    "int5_min": Format.U5M,
    "int8": Format.U8,
}
_SHARES = 8  # a thread
_ALONE = 1 << 20  # bytes, an expert, say, that one thread packs sooner than two begin
_ARGUMENTS = np.dtype(
    [
        *HEADER,
        *((name, "i8") for name in ("format", "n_out", "n_in", "out", "source", "stride", "bad")),
        *((name, "i8") for name in ("scales", "mins", "columns", "block_bytes")),
        *((name, "i8") for name in ("bits", "group", "block", "high", "zero", "scale", "min", "d", "dmin", "record")),
    ]
)
_BYTES = 0x01010101


def bytes_of(kind: str, n_out: int, n_in: int) -> int:
    """Bytes of a packed W `[n_out, n_in]` of such a kind, ggml's name or one of CODES."""
    return packed_bytes(_format_of(kind), n_out, n_in)


def can_pack(kind: str, n_out: int, n_in: int) -> bool:
    """Whether W `[n_out, n_in]` of such a kind can be packed."""
    columns = BLOCKS[kind][1] if kind in BLOCKS else BLOCK
    return kind in FORMATS and n_out > 0 and n_in > 0 and n_in % columns == 0


def pack_blocks(kind: str, raw: torch.Tensor, into: torch.Tensor | None = None) -> PackedMatrix:
    """W from ggml's blocks. raw: uint8 `[n_out, bytes of a row]`, as a GGUF file has it, with rows at any distance.

    into: uint8, at least `bytes_of` numbers, 64-byte aligned, which W takes; None: new memory. ValueError names the row
    of a scale that is not finite.
    """
    if kind not in BLOCKS:
        raise ValueError(f"kind must be one of {', '.join(BLOCKS)}, got {kind!r}")
    format, columns, block_bytes = BLOCKS[kind]
    _check("raw", raw, torch.uint8)
    n_out, row_bytes = raw.shape
    if not row_bytes or row_bytes % block_bytes:
        raise ValueError(f"a row of {kind} must be a multiple of {block_bytes} bytes, got {row_bytes}")
    matrix = room_for(format, n_out, row_bytes // block_bytes * columns, into)
    row = _pack(matrix, raw, block_bytes=block_bytes)
    if row >= 0:
        raise ValueError(f"row {row} has a scale that is not finite")
    return matrix


def pack_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
    bits: int = 4,
) -> PackedMatrix:
    """W from codes: scale * code + min, or without minima scale * (code - 2 ** (bits - 1)).

    codes: uint8 `[n_out, n_in]`, below 2 ** bits; scales, mins: floats `[n_out, n_in / g]` for a g that is a multiple
    of 32, or n_in; they are rounded to float16. into: as in `pack_blocks`. ValueError names the row of what is not
    allowed.
    """
    kind = CODES.get((bits, mins is not None))
    if kind is None:
        raise ValueError(f"bits must be 4, 5 or, without minima, 8; got {bits}" + " with minima" * (mins is not None))
    _check("codes", codes, torch.uint8)
    n_out, n_in = codes.shape
    if not can_pack(kind, n_out, n_in):
        raise ValueError(f"codes must be [n_out, a multiple of {BLOCK}], got {list(codes.shape)}")
    groups = scales.shape[-1]
    columns = n_in // groups if groups and n_in % groups == 0 else 0
    if scales.shape != (n_out, groups) or not columns or (columns % BLOCK and groups > 1):
        raise ValueError(
            f"scales must be [{n_out}, {n_in} / g] for g a multiple of {BLOCK} or {n_in}, got {list(scales.shape)}"
        )
    if not scales.is_cpu or (mins is not None and not mins.is_cpu):
        raise ValueError("scales and mins must be on a CPU")
    if mins is not None and mins.shape != scales.shape:
        raise ValueError(f"mins must be {list(scales.shape)} as scales are, got {list(mins.shape)}")
    halves = [_halves(name, x) for name, x in (("scales", scales), ("mins", mins)) if x is not None]
    matrix = room_for(FORMATS[kind], n_out, n_in, into)
    row = _pack(matrix, codes, halves, columns)
    if row >= 0:
        raise ValueError(f"row {row} has a code above {2**bits - 1}")
    return matrix


def _format_of(kind: str) -> Format:
    if kind not in FORMATS:
        raise ValueError(f"kind must be one of {', '.join(FORMATS)}, got {kind!r}")
    return FORMATS[kind]


def _check(name: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype or x.ndim != 2 or not x.is_cpu or (x.numel() and x.stride(1) != 1):
        raise ValueError(f"{name} must be {dtype} [n_out, n] on a CPU, rows contiguous, got {x.dtype} {list(x.shape)}")
    if not len(x):
        raise ValueError(f"{name} must have rows, got {list(x.shape)}")


def _halves(name: str, x: torch.Tensor) -> torch.Tensor:
    halves = x.half().contiguous()
    finite = halves.isfinite().all(1)
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"row {row} has {name} that are not finite in float16")
    return halves


def room_for(format: Format, n_out: int, n_in: int, into: torch.Tensor | None) -> PackedMatrix:
    size = packed_bytes(format, n_out, n_in)
    if into is None:
        into = torch.empty(size, dtype=torch.uint8)
    if into.dtype != torch.uint8 or into.ndim != 1 or len(into) < size or not into.is_contiguous():
        raise ValueError(f"into must be uint8 [at least {size}], got {into.dtype} {list(into.shape)}")
    return PackedMatrix((n_out, n_in), format, into[:size])


def _pack(
    matrix: PackedMatrix,
    source: torch.Tensor,
    halves: list[torch.Tensor] | None = None,
    columns: int = 0,
    block_bytes: int = 0,
) -> int:
    """The first row that is refused, or -1. halves: scales and minima of codes, one for `columns` numbers of a row."""
    threads = min(torch.get_num_threads(), 1 + matrix.nbytes // _ALONE)
    n_out, n_in = matrix.shape
    shares = min(threads * _SHARES, tiles_of(n_out))
    bad = np.full(shares, -1, np.int64)
    block = np.zeros(1, _ARGUMENTS)[0]
    layout = LAYOUTS[matrix.format]
    for name in ("bits", "group", "block", "high", "zero", "scale", "min", "d", "dmin", "record"):
        block[name] = getattr(layout, name)
    block["shares"], block["format"], block["n_out"], block["n_in"] = shares, matrix.format, n_out, n_in
    block["out"], block["bad"] = matrix.data.data_ptr(), bad.ctypes.data
    block["source"], block["stride"], block["block_bytes"] = source.data_ptr(), source.stride(0), block_bytes
    if halves:
        block["scales"], block["mins"] = halves[0].data_ptr(), halves[-1].data_ptr()
        block["columns"] = columns
    arguments = np.array(block)
    launch(_pack_kernel(), arguments.ctypes.data, threads)
    return min((int(row) for row in bad if row >= 0), default=-1)


@njit  # type: ignore[untyped-decorator]
def _finite(half: int) -> Any:
    return half & 0x7C00 != 0x7C00


@njit  # type: ignore[untyped-decorator]
def _put_nibble(address: int, row: int, nibble: int) -> None:
    """Bits 4 * row on of the 64 at `address`; rows come in order."""
    place = address + (row >> 1)
    store8(place, load8(place) | nibble << 4 if row & 1 else nibble)


@njit  # type: ignore[untyped-decorator]
def _pack_plain(a: Any, source: int, record: int, b: int, row: int) -> Any:
    """A block of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or FP4, whose nibbles stand as those of a tile do."""
    out, cursor, good = record + b * a.block + 4 * row, source + 2, _finite(load16(source))
    place = 2 * (b * ROWS + row)
    store16(record + a.scale + place, load16(source))
    if a.zero < 0:
        good = good and _finite(load16(cursor))
        store16(record + a.min + place, load16(cursor))
        cursor += 2
    if a.bits == 8:
        for q in range(8):
            store32(out + 64 * q, load32(cursor + 4 * q) ^ 0x80808080)
        return good
    if a.bits == 5:
        high = load32(cursor)
        for q in range(8):
            _put_nibble(record + b * a.block + a.high + 8 * q, row, high >> 4 * q & 15)
        cursor += 4
    for q in range(4):
        store32(out + 64 * q, load32(cursor + 4 * q))
    return good


@njit  # type: ignore[untyped-decorator]
def _pack_k4_k5(a: Any, source: int, record: int, row: int) -> Any:
    d, dmin, scales = load16(source), load16(source + 2), source + 4
    store16(record + a.d + 2 * row, d)
    store16(record + a.dmin + 2 * row, dmin)
    for b in range(4):
        low, mins, nibbles = load8(scales + b), load8(scales + 4 + b), load8(scales + 8 + b)
        store8(record + a.scale + ROWS * b + row, low & 63)
        store8(record + a.min + ROWS * b + row, mins & 63)
        store8(record + a.scale + ROWS * (b + 4) + row, nibbles & 15 | (low >> 6) << 4)
        store8(record + a.min + ROWS * (b + 4) + row, nibbles >> 4 | (mins >> 6) << 4)
    high, codes = source + 16, source + (48 if a.bits == 5 else 16)
    for pair in range(4):
        out = record + 2 * pair * a.block + 4 * row
        for q in range(4):
            first, second = load32(codes + 32 * pair + 4 * q), load32(codes + 32 * pair + 16 + 4 * q)
            store32(out + 64 * q, first & 0x0F0F0F0F | (second & 0x0F0F0F0F) << 4)
            store32(out + a.block + 64 * q, first >> 4 & 0x0F0F0F0F | second & 0xF0F0F0F0)
    if a.bits == 5:
        for q in range(8):
            word = load32(high + 4 * q)
            for b in range(8):
                nibble = (word >> b & _BYTES) * 0x01020408 >> 24 & 15
                _put_nibble(record + b * a.block + a.high + 8 * q, row, nibble)
    return _finite(d) and _finite(dmin)


@njit  # type: ignore[untyped-decorator]
def _pack_k6(a: Any, source: int, record: int, row: int) -> Any:
    d = load16(source + 208)
    store16(record + a.d + 2 * row, d)
    for half in range(16):
        store8(record + a.scale + ROWS * half + row, load8(source + 192 + half))
    for b in range(8):
        low, high = source + 64 * (b >> 2) + 32 * (b & 1), source + 128 + 32 * (b >> 2)
        shift, high_shift = 4 * (b >> 1 & 1), 2 * (b & 3)
        out = record + b * a.block + 4 * row
        for q in range(4):
            first, second = load32(low + 4 * q) >> shift, load32(low + 16 + 4 * q) >> shift
            store32(out + 64 * q, first & 0x0F0F0F0F | (second & 0x0F0F0F0F) << 4)
        for v in range(2):
            word = 0
            for f in range(4):
                word |= (load32(high + 16 * v + 4 * f) >> high_shift & 3 * _BYTES) << 2 * f
            store32(out + a.high + 64 * v, word)
    return _finite(d)


@njit  # type: ignore[untyped-decorator]
def _pack_code_block(a: Any, source: int, record: int, b: int, row: int) -> Any:
    """32 codes of a byte. Whether all are below 2 ** bits."""
    out, over = record + b * a.block + 4 * row, 0
    if a.bits == 8:
        for q in range(8):
            store32(out + 64 * q, load32(source + 4 * q))
        return True
    for q in range(4):
        first, second = load32(source + 4 * q), load32(source + 16 + 4 * q)
        over |= first | second
        store32(out + 64 * q, first & 0x0F0F0F0F | (second & 0x0F0F0F0F) << 4)
    if a.bits == 5:
        for q in range(8):
            nibble = (load32(source + 4 * q) >> 4 & _BYTES) * 0x01020408 >> 24 & 15
            _put_nibble(record + b * a.block + a.high + 8 * q, row, nibble)
    return over & (~((1 << a.bits) - 1) & 255) * _BYTES == 0


@njit  # type: ignore[untyped-decorator]
def _pack_group(a: Any, tile: int, group: int, record: int) -> int:
    """The first row that is refused, or -1."""
    rows, bad = min(ROWS, a.n_out - tile * ROWS), -1
    blocks = min(a.group, a.n_in - group * a.group) // BLOCK
    if rows < ROWS or blocks * BLOCK < a.group:
        empty = carray(pointer(record), (a.record,), np.uint8)
        empty[:] = 0
    for row in range(rows):
        number, good = tile * ROWS + row, True
        source = a.source + number * a.stride
        if a.d >= 0:
            source += group * a.block_bytes
            good = _pack_k6(a, source, record, row) if a.bits == 6 else _pack_k4_k5(a, source, record, row)
        else:
            for b in range(blocks):
                block = group * (a.group // BLOCK) + b
                if a.scales == 0:
                    good = _pack_plain(a, source + block * a.block_bytes, record, b, row) and good
                    continue
                good = _pack_code_block(a, source + block * BLOCK, record, b, row) and good
                place, offset = 2 * (b * ROWS + row), 2 * (number * (a.n_in // a.columns) + block * BLOCK // a.columns)
                store16(record + a.scale + place, load16(a.scales + offset))
                if a.zero < 0:
                    store16(record + a.min + place, load16(a.mins + offset))
        if not good and bad < 0:
            bad = number
    return bad


@njit  # type: ignore[untyped-decorator]
def _pack_shares(block: Any) -> None:
    a = carray(block, (1,), _ARGUMENTS)[0]
    bad = carray(pointer(a.bad), (a.shares,), np.int64)
    tiles, groups = (a.n_out + ROWS - 1) // ROWS, (a.n_in + a.group - 1) // a.group
    share = take(block, TAKEN)
    while share < a.shares:
        for tile in range(tiles * share // a.shares, tiles * (share + 1) // a.shares):
            for group in range(groups):
                row = _pack_group(a, tile, group, a.out + (tile * groups + group) * a.record)
                if row >= 0 and not 0 <= bad[share] < row:
                    bad[share] = row
        share = take(block, TAKEN)


@cache
def _pack_kernel() -> int:
    fingerprint = source_fingerprint(intrinsics, emitter, launching, layouts)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _pack_shares(block)

    return int(kernel.address)
