"""y = x W^T for a few rows of x, at the speed of reading W: bfloat16, on CPUs with AVX512_BF16.

In decode a linear map is nothing but reading its weights, and oneDNN reads small matrices at half the speed of
memory. Here W stays `[n_out, n_in]`, as it is in the file. Each thread streams its rows of W once; a tile of them is
multiplied with all rows of x while it is in registers and the first-level cache. Sums are float32, in an order that
depends on n_in alone, so a row of y depends neither on the rows beside it nor on the threads.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from ctypes import addressof, create_string_buffer
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from lamina_kernels.compile import emitter, groups, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.emitter import I32, I64, LANES, VB, VF, VI, Emitter, Kind, Value, kind_of
from lamina_kernels.compile.intrinsics import literals, take
from lamina_kernels.compile.launch import FINISHED, HEADER, TAKEN, block_type, launch, source_fingerprint

MAX_ROWS = 32
"""Rows of x up to which this is worth while: beyond, arithmetic binds, and a library multiplies faster."""

_TILE = 4  # rows of W between two stores
_GROUP = 8  # rows of x multiplied with a tile at once
_CHUNK = 32  # numbers in a register
_AHEAD = 12288  # bytes from what is loaded to what is fetched
_SHARES = 8  # a thread, so that one that is held up leaves work to the others
_FIELDS = ("x", "w", "y", "rows", "n_in", "n_out", "size", *groups.FIELDS)
_ARGUMENTS = np.dtype([*HEADER, *((name, "i8") for name in _FIELDS)])
Arguments = block_type(_ARGUMENTS)
"""The kernel's argument block; `size` is the bytes of a number of y."""

_LAYOUT = struct.Struct(f"={_ARGUMENTS.itemsize // 8}q")
_OUT_BYTES = {torch.bfloat16: 2, torch.float32: 4}
_I16 = ir.IntType(16)


def can_multiply(weight: torch.Tensor) -> bool:
    """Whether this CPU and these kernels can multiply with W `[n_out, n_in]`."""
    n_out, n_in = weight.shape
    fits = n_out % _TILE == 0 and n_in % _CHUNK == 0 and n_in > 0 and weight.is_contiguous()
    half = weight.is_cpu and weight.dtype == torch.bfloat16
    return fits and half and kind_of(weight.dtype) == Kind.BFLOAT16_DOT


def multiply(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """x `[n, n_in]` times W^T, both bfloat16, for W `[n_out, n_in]` that `can_multiply`.

    Gives `[n, n_out]` in `dtype`, bfloat16 or float32: the sums are float32 either way.
    """
    x = x.contiguous()
    if dtype not in _OUT_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _OUT_BYTES))}, got {dtype}")
    n_out, n_in = weight.shape
    if x.dtype != torch.bfloat16 or x.ndim != 2 or x.shape[1] != n_in:
        raise ValueError(f"x must be bfloat16 [n, {n_in}], got {x.dtype} {list(x.shape)}")
    y = torch.empty(len(x), n_out, dtype=dtype)
    threads = torch.get_num_threads()
    addresses = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    sizes = (len(x), n_in, n_out, _OUT_BYTES[dtype])
    _LAYOUT.pack_into(_block.buffer, 0, 0, 0, threads * _SHARES, *addresses, *sizes, 0, 0, 0, groups.IDENTITY)
    launch(load_kernel(), _block.address, threads)
    return y


class _Block(threading.local):
    """One argument block a thread, used again for every call."""

    def __init__(self) -> None:
        self.buffer = create_string_buffer(_LAYOUT.size)
        self.address = addressof(self.buffer)


_block = _Block()


@cache
def load_kernel() -> int:
    """The kernel's address. From numba's cache on disk where it is there."""
    arguments, fingerprint = _ARGUMENTS, source_fingerprint(emitter, groups, intrinsics, launching)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        a = carray(block, (1,), arguments)[0]
        tiles = a.n_out // _TILE
        total = groups.count_of(a) * tiles
        share = take(block, TAKEN)
        while fingerprint and share < a.shares:
            for place in range(total * share // a.shares, total * (share + 1) // a.shares):
                first, end, w = groups.group_of(a, place // tiles)
                column = place % tiles * _TILE
                w += column * a.n_in * 2
                for row in range(first, end, _GROUP):
                    rows, y = min(_GROUP, end - row), a.y + (row * a.n_out + column) * a.size
                    x, order = groups.rows_from(a, row, a.n_in * 2)
                    if a.size == 2:
                        _multiply_tile(2, rows, x, order, w, y, a.n_in, a.n_out)
                    else:
                        _multiply_tile(4, rows, x, order, w, y, a.n_in, a.n_out)
            take(block, FINISHED)
            share = take(block, TAKEN)

    return int(kernel.address)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _multiply_tile(
    context: Any, size: Any, rows: Any, x: Any, order: Any, w: Any, y: Any, n_in: Any, n_out: Any
) -> Any:
    """y at `_TILE` columns = rows of x `[.., n_in]` times as many rows of W; rows is 1 to `_GROUP`, and at the address
    `order` stand their numbers, int64.

    size: bytes of a number of y, a compile-time constant.
    """
    (out_bytes,) = literals(size)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        _, rows, x, order, w, y, n_in, n_out = args
        row_bytes, column_bytes = builder.shl(n_in, I64(1)), builder.mul(n_out, I64(out_bytes))
        steps = builder.lshr(n_in, I64(5))

        def tile(height: int) -> None:
            width = _TILE if height <= _GROUP // 2 else _TILE // 2  # at most 16 sums: all stay in registers
            xs = e.rows(x, row_bytes, order, height)
            for first in range(0, _TILE, width):
                sums = _dot(e, xs, _rows(e, w, row_bytes, range(first, first + width)), steps)
                for j, out in enumerate(_rows(e, y, column_bytes, range(height))):
                    for i in range(width):
                        total = sums[j * width + i]
                        place = e.at(out, out_bytes * (first + i))
                        e.store(_half(e, total) if out_bytes == 2 else total, place, out_bytes)

        e.choose(rows, range(1, _GROUP + 1), tile)
        return context.get_dummy_value()

    return types.void(size, *[types.int64] * 7), emit


def _rows(e: Emitter, address: Value, stride: Value, which: Sequence[int]) -> list[Value]:
    return [e.pointer(e.b.add(address, e.b.mul(stride, I64(i)))) for i in which]


def _dot(e: Emitter, xs: Sequence[Value], ws: Sequence[Value], steps: Value) -> list[Value]:
    """Every x times every w, x by x: float32 values."""

    def step(index: Value, *sums: Value) -> list[Value]:
        offset = e.b.shl(index, I64(6))
        for w in ws:
            e.fetch(e.at(w, e.b.add(offset, I64(_AHEAD))))
        weights = [e.b.bitcast(e.load(e.at(w, offset), VI, 2), VB) for w in ws]
        inputs = [e.b.bitcast(e.load(e.at(x, offset), VI, 2), VB) for x in xs]
        pairs = [(x, w) for x in inputs for w in weights]
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return [e.call(name, VF, total, x, w) for total, (x, w) in zip(sums, pairs, strict=True)]

    lanes = e.loop(steps, [e.number(0.0)] * (len(xs) * len(ws)), step)
    together = _sum_lanes(e, lanes)
    return [e.b.extract_element(together, I32(i)) for i in range(len(lanes))]


def _sum_lanes(e: Emitter, vectors: Sequence[Value]) -> Value:
    """One vector with the sum of the lanes of each of up to LANES vectors.

    Halves are added to halves, two vectors sharing one register after each step: a third of the work of one by one.
    """
    vectors, width = list(vectors), LANES
    while width > 1:
        half = width // 2
        low = [lane for lane in range(2 * LANES) if lane % width < half]
        merged = []
        for i in range(0, len(vectors), 2):
            first, second = vectors[i], vectors[min(i + 1, len(vectors) - 1)]
            halves = [
                e.b.shuffle_vector(first, second, ir.Constant(VI, [lane + shift for lane in low]))
                for shift in (0, half)
            ]
            merged.append(e.b.fadd(*halves))
        vectors, width = merged, half
    return vectors[0]


def _half(e: Emitter, x: Value) -> Value:
    """A float32 as bfloat16's bits: to nearest, ties to even; NaN stays NaN."""
    bits = e.b.bitcast(x, I32)
    odd = e.b.and_(e.b.lshr(bits, I32(16)), I32(1))
    near = e.b.add(e.b.add(bits, I32(0x7FFF)), odd)
    result = e.b.select(e.b.fcmp_unordered("uno", x, x), I32(0x7FC00000), near)
    return e.b.trunc(e.b.lshr(result, I32(16)), _I16)
