"""y = x W^T for more rows of x than `few_rows` is for: bfloat16, on CPUs with AMX. W stays `[n_out, n_in]`.

One instruction multiplies a tile of 16 rows of W with one of 16 rows of x, 32 numbers of each. W is loaded as it lies.
The instruction wants x in lines: of two columns, the pairs of 16 rows side by side. One kernel writes these lines,
another multiplies, and turns around what stands column by column. Sums are float32, in an order that depends on n_in
alone, so a row of y depends neither on the rows beside it nor on the threads.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from lamina_kernels.compile import emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.emitter import I8, I32, I64, LANES, VB, VF, VI, Emitter, Value, cpu_has
from lamina_kernels.compile.intrinsics import literals, take
from lamina_kernels.compile.launch import FINISHED, HEADER, TAKEN, block_type, launch, source_fingerprint

MIN_ROWS = 4
"""Rows of x from which this is worth while: with fewer, `few_rows` reads W as fast and needs no lines."""

PARALLEL = 1 << 14  # numbers of x, from which several threads write its lines
_ROWS = 16  # of W or x in a tile
_LINE = 64  # bytes of a row of a tile
_CHUNK = 32  # numbers in it
_PASS = 1 << 19  # bytes of lines that stay in the second-level cache while W goes by
_SHARES = 8  # a thread, so that one that is held up leaves work to the others
_SYSTEM_CALL, _PERMISSION, _TILE_DATA = 158, 0x1023, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
# Palette 1; bytes a row and rows of eight tiles, which are all full.
_CONFIG = ctypes.create_string_buffer(struct.pack("<BB14x16H16B", 1, 0, *[_LINE] * 8, *[0] * 8, *[_ROWS] * 8, *[0] * 8))
_WRITING = np.dtype([*HEADER, *((name, "i8") for name in ("x", "lines", "rows", "n_in"))])
_FIELDS = ("lines", "w", "y", "rows", "n_in", "n_out", "size", "config")
_MULTIPLYING = np.dtype([*HEADER, *((name, "i8") for name in _FIELDS)])
_WritingArguments, _MultiplyingArguments = block_type(_WRITING), block_type(_MULTIPLYING)


@cache
def available() -> bool:
    """Whether the CPU has tiles of bfloat16, and the system gives this process their registers."""
    has_tiles = cpu_has("amx-bf16") and cpu_has("avx512bf16") and platform.system() == "Linux"
    return has_tiles and ctypes.CDLL(None).syscall(_SYSTEM_CALL, _PERMISSION, _TILE_DATA) == 0


def can_multiply(weight: torch.Tensor) -> bool:
    """Whether this CPU and these kernels can multiply with W `[n_out, n_in]`."""
    n_out, n_in = weight.shape
    fits = n_out % _ROWS == 0 and n_in % _CHUNK == 0 and n_in > 0 and weight.is_contiguous()
    return fits and weight.is_cpu and weight.dtype == torch.bfloat16 and available()


def multiply(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """x `[n, n_in]` times W^T, both bfloat16, for W `[n_out, n_in]` that `can_multiply`.

    Gives `[n, n_out]` in `dtype`, bfloat16 or float32: the sums are float32 either way.
    """
    x = x.contiguous()
    n_out, n_in = weight.shape
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float32, got {dtype}")
    if x.dtype != torch.bfloat16 or x.ndim != 2 or x.shape[1] != n_in:
        raise ValueError(f"x must be bfloat16 [n, {n_in}], got {x.dtype} {list(x.shape)}")
    y = torch.empty(len(x), n_out, dtype=dtype)
    lines = torch.empty(lines_size(*x.shape), dtype=torch.uint8)
    threads = torch.get_num_threads()
    writers = threads if x.numel() >= PARALLEL else 1
    writing = writing_arguments(len(x), n_in, writers, lines.data_ptr())
    multiplying = multiplying_arguments(weight, len(x), y.itemsize, threads * _SHARES, lines.data_ptr())
    writing.x, multiplying.y = x.data_ptr(), y.data_ptr()
    write_lines, multiply_lines = load_kernels()
    launch(write_lines, ctypes.addressof(writing), writers)
    launch(multiply_lines, ctypes.addressof(multiplying), threads)
    return y


def lines_size(rows: int, n_in: int) -> int:
    """Bytes of the lines of x `[rows, n_in]`. The last 16 rows may not be full: the lines are."""
    return -(-rows // _ROWS) * _ROWS * n_in * 2


def writing_arguments(rows: int, n_in: int, shares: int, lines: int) -> Any:
    """The argument block of the kernel that writes lines; `x` is for the caller to set."""
    return _WritingArguments(shares=shares, rows=rows, n_in=n_in, lines=lines)


def multiplying_arguments(weight: torch.Tensor, rows: int, size: int, shares: int, lines: int) -> Any:
    """The argument block of the kernel that multiplies. size: bytes of a number of y; `y` is for the caller to set."""
    n_out, n_in = weight.shape
    return _MultiplyingArguments(
        shares=shares,
        lines=lines,
        w=weight.data_ptr(),
        rows=rows,
        n_in=n_in,
        n_out=n_out,
        size=size,
        config=ctypes.addressof(_CONFIG),
    )


@cache
def load_kernels() -> tuple[int, int]:
    """The addresses of the kernels that write lines and multiply. From numba's cache on disk where it is there."""
    writing, multiplying = _WRITING, _MULTIPLYING
    fingerprint = source_fingerprint(emitter, intrinsics, launching)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def write_lines(block: Any) -> None:
        a = carray(block, (1,), writing)[0]
        groups = (a.rows + _ROWS - 1) // _ROWS
        share = take(block, TAKEN)
        while fingerprint and share < a.shares:
            for group in range(groups * share // a.shares, groups * (share + 1) // a.shares):
                row = group * _ROWS
                _write_group(min(_ROWS, a.rows - row), a.x + row * a.n_in * 2, a.lines + row * a.n_in * 2, a.n_in)
            take(block, FINISHED)
            share = take(block, TAKEN)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def multiply_lines(block: Any) -> None:
        a = carray(block, (1,), multiplying)[0]
        tiles, pairs = a.n_out // _ROWS, (a.rows + 2 * _ROWS - 1) // (2 * _ROWS)
        pairs_at_once = max(1, _PASS // (a.n_in * 4 * _ROWS))
        _configure(a.config)
        share = take(block, TAKEN)
        while fingerprint and share < a.shares:
            for begin in range(0, pairs, pairs_at_once):
                for tile in range(tiles * share // a.shares, tiles * (share + 1) // a.shares, 2):
                    height = min(2, tiles * (share + 1) // a.shares - tile)
                    column = tile * _ROWS
                    w = a.w + column * a.n_in * 2
                    for pair in range(begin, min(pairs, begin + pairs_at_once)):
                        row = pair * 2 * _ROWS
                        lines, y = a.lines + row * a.n_in * 2, a.y + (row * a.n_out + column) * a.size
                        form = _form(height, 1 if a.rows - row <= _ROWS else 2, pair == begin)
                        if a.size == 2:
                            _multiply_tiles(2, form, a.rows - row, lines, w, y, a.n_in, a.n_out)
                        else:
                            _multiply_tiles(4, form, a.rows - row, lines, w, y, a.n_in, a.n_out)
            take(block, FINISHED)
            share = take(block, TAKEN)
        _release()

    return int(write_lines.address), int(multiply_lines.address)


@numba.njit  # type: ignore[untyped-decorator]
def _form(height: int, width: int, fetches: bool) -> int:
    """One number for what `_multiply_tiles` is compiled for: how many tiles of W and of x, and whether the next rows of
    W are to be fetched."""
    return (height - 1) * 4 + (width - 1) * 2 + fetches


@intrinsic  # type: ignore[untyped-decorator]
def _configure(context: Any, config: Any) -> Any:
    """Give the tiles of this thread the shape at an address."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        e.call("llvm.x86.ldtilecfg", ir.VoidType(), e.pointer(args[0]))
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def _release(context: Any) -> Any:
    """Let the tiles of this thread go, so that the system need not keep them."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Emitter(builder).call("llvm.x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _write_group(context: Any, rows: Any, x: Any, lines: Any, n_in: Any) -> Any:
    """The lines of 16 rows of x, of which the first `rows` exist. The others are zeros."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        rows, x, lines, n_in = args
        exist = [builder.icmp_signed(">", rows, I64(i)) for i in range(_ROWS)]
        sources = [e.pointer(builder.add(x, builder.mul(builder.shl(n_in, I64(1)), I64(i)))) for i in range(_ROWS)]
        # In the place of a row that does not exist the first one is read, and forgotten.
        sources = [builder.select(exists, source, sources[0]) for exists, source in zip(exist, sources, strict=True)]
        out = e.pointer(lines)

        def step(index: Value) -> list[Value]:
            vectors = [e.load(e.at(source, builder.shl(index, I64(6))), VI, 2) for source in sources]
            vectors = [builder.select(exists, v, e.bits(0)) for exists, v in zip(exist, vectors, strict=True)]
            for i, line in enumerate(_turned(e, vectors)):
                e.store(line, e.at(e.at(out, builder.shl(index, I64(10))), _LINE * i), 4)
            return []

        e.loop(builder.lshr(n_in, I64(5)), [], step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _multiply_tiles(
    context: Any, size: Any, form: Any, rows: Any, lines: Any, w: Any, y: Any, n_in: Any, n_out: Any
) -> Any:
    """y of one or two tiles of rows of W with one or two of x.

    size: bytes of a number of y, a compile-time constant; form: `_form`; rows: how many rows of y there are from here
    on, behind which nothing is written.
    """
    (size_of_y,) = literals(size)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emitter(builder), builder
        _, form, rows, lines, w, y, n_in, n_out = args
        row_bytes, y_bytes, nothing = b.shl(n_in, I64(1)), b.mul(n_out, I64(size_of_y)), ir.VoidType()
        with b.goto_entry_block():
            columns = b.alloca(VF, size=_ROWS)
            columns.align = _LINE

        def rows_of_w(first: int, count: int, stride: int) -> list[Value]:
            return [e.pointer(b.add(w, b.mul(row_bytes, I64(first + stride * i)))) for i in range(count)]

        def multiplied(form: int) -> None:
            height, width, fetches = (form >> 2) + 1, (form >> 1 & 1) + 1, form & 1
            sums = [(i, j) for i in range(height) for j in range(width)]  # tiles 0 to 3; 4 and 5: W, 6 and 7: x
            ws, ahead = rows_of_w(0, height, _ROWS), rows_of_w(_ROWS * height, _ROWS * height * fetches, 1)
            xs = [e.pointer(b.add(lines, b.mul(row_bytes, I64(_ROWS * j)))) for j in range(width)]
            for tile in range(len(sums)):
                e.call("llvm.x86.tilezero", nothing, I8(tile))

            def step(index: Value) -> list[Value]:
                for i, rows in enumerate(ws):
                    e.call("llvm.x86.tileloadd64", nothing, I8(4 + i), e.at(rows, b.shl(index, I64(6))), row_bytes)
                for j, group in enumerate(xs):
                    place = e.at(group, b.shl(index, I64(10)))
                    e.call("llvm.x86.tileloadd64", nothing, I8(6 + j), place, I64(_LINE))
                for tile, (i, j) in enumerate(sums):
                    e.call("llvm.x86.tdpbf16ps", nothing, I8(tile), I8(4 + i), I8(6 + j))
                for row in ahead:
                    e.fetch(e.at(row, b.shl(index, I64(6))))
                return []

            e.loop(b.lshr(n_in, I64(5)), [], step)
            for tile, (i, j) in enumerate(sums):
                e.call("llvm.x86.tilestored64", nothing, I8(tile), columns, I64(_LINE))
                loaded = [e.load(e.at(columns, _LINE * k), VF, _LINE) for k in range(_ROWS)]
                for k, row in enumerate(_turned(e, loaded) if size_of_y == 4 else _turned_halves(e, loaded)):
                    with b.if_then(b.icmp_signed(">", rows, I64(_ROWS * j + k))):
                        place = b.add(b.mul(y_bytes, I64(_ROWS * j + k)), I64(_ROWS * i * size_of_y))
                        e.store(row, e.pointer(b.add(y, place)), size_of_y)

        e.choose(form, range(8), multiplied)
        return context.get_dummy_value()

    return types.void(size, *[types.int64] * 7), emit


def _turned(e: Emitter, rows: Sequence[Value]) -> list[Value]:
    """Of 8 or 16 vectors of 16 lanes, lane i of vector j as lane j of vector i; of 8, in either half of the lanes."""
    rows, distance = list(rows), len(rows) // 2
    while distance:
        low = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
        high = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
        masks = [ir.Constant(VI, [I32(lane) for lane in order]) for order in (low, high)]
        for i in range(len(rows)):
            if not i & distance:
                a, b = rows[i], rows[i | distance]
                rows[i], rows[i | distance] = (e.b.shuffle_vector(a, b, mask) for mask in masks)
        distance //= 2
    return rows


def _turned_halves(e: Emitter, columns: Sequence[Value]) -> list[Value]:
    """16 columns of 16 float32 as 16 rows of 16 bfloat16, each a vector of 8 lanes: two columns share a lane."""
    halves = ir.VectorType(ir.IntType(16), 2 * LANES)
    order = ir.Constant(ir.VectorType(I32, 2 * LANES), [I32(i) for k in range(LANES) for i in (k, LANES + k)])
    pairs = []
    for first, second in zip(columns[::2], columns[1::2], strict=True):
        rounded = e.b.bitcast(e.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", VB, second, first), halves)
        pairs.append(e.b.bitcast(e.b.shuffle_vector(rounded, rounded, order), VI))
    turned, lanes = _turned(e, pairs), ir.VectorType(I32, LANES // 2)
    parts = [ir.Constant(lanes, [I32(i) for i in range(start, start + LANES // 2)]) for start in (0, LANES // 2)]
    return [e.b.shuffle_vector(rows, rows, part) for part in parts for rows in turned]
