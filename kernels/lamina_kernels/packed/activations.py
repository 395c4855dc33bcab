"""Rows of x rounded to int8, as the kernels of packed weights multiply them.

A row is cut into blocks of 32 numbers, each with a scale of its own: the largest absolute number is 127. A block is one
cache line: the 32 int8, the scale, and what the sum of the int8 contributes beside the products, for every kind of
weights. A block with a number that is not finite has the scale NaN, so every result of its row is NaN.
"""

from __future__ import annotations

import ctypes
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
from lamina_kernels.compile.emitter import F32, I8, I32, I64, LANES, VF, VI, VS, VY, Emitter, Value
from lamina_kernels.compile.intrinsics import from_half, literals, take
from lamina_kernels.compile.launch import FINISHED, HEADER, TAKEN, block_type, launch, source_fingerprint
from lamina_kernels.packed.layout import BLOCK

LINE = 64
"""Bytes of a block."""

SCALE, SUM = 32, 36
"""Where in a line the float32 scale is, and scale times the sum of the block."""

ZEROS = {8: 40, 12: 60, 16: 44, 128: 48}
"""Where in a line the int32 -zero * sum is, for the code `zero` that stands for 0."""

HALF_ZEROS = (52, 56)
"""Where in a line the int32 -32 * sum is, of the first 16 numbers and of the others."""

_ARGUMENTS = np.dtype([*HEADER, *((name, "i8") for name in ("x", "out", "rows", "n_in", "blocks", "size"))])
Arguments = block_type(_ARGUMENTS)
"""The kernel's argument block. x: `[rows, n_in]` of numbers of `size` bytes, 2 (bfloat16) or 4 (float32); blocks: lines
of a row of out."""

PARALLEL = 1 << 13
"""Numbers from which more than one thread pays."""

_LEAST = 1e-30  # below, a block is zeros: 127 / x has to be finite


def round_rows(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """x, bfloat16 or float32 `[n, n_in]`, as uint8 `[n, blocks, LINE]`.

    n_in is a multiple of 32 and `blocks` at least n_in / 32; blocks beyond it are zeros.
    """
    n, n_in = x.shape
    if x.dtype not in (torch.bfloat16, torch.float32) or not x.is_cpu or n_in % BLOCK or blocks * BLOCK < n_in:
        raise ValueError(
            f"x must be bfloat16 or float32 on a CPU, by blocks of {BLOCK} columns, at most {blocks}, got {x.dtype} "
            f"{list(x.shape)} on {x.device}"
        )
    x = x.contiguous()
    out = torch.empty(n, blocks, LINE, dtype=torch.uint8)  # torch gives it whole cache lines
    threads = 1 if x.numel() < PARALLEL else torch.get_num_threads()
    block = arguments(n, n_in, blocks, x.element_size(), threads)
    block.x, block.out = x.data_ptr(), out.data_ptr()
    launch(load_kernel(), ctypes.addressof(block), threads)
    return out


def arguments(rows: int, n_in: int, blocks: int, size: int, shares: int) -> Any:
    """An argument block; addresses are for the caller to set."""
    return Arguments(shares=shares, rows=rows, n_in=n_in, blocks=blocks, size=size)


@cache
def load_kernel() -> int:
    """The kernel's address. From numba's cache on disk where it is there."""
    arguments, fingerprint = _ARGUMENTS, source_fingerprint(emitter, intrinsics, launching)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        a = carray(block, (1,), arguments)[0]
        share, filled = take(block, TAKEN), a.n_in // BLOCK
        lines = a.rows * filled
        while fingerprint and share < a.shares:
            first, end = lines * share // a.shares, lines * (share + 1) // a.shares
            while first < end:  # what of a row is in the share
                row, start = first // filled, first % filled
                n = min(filled - start, end - first)
                x, out = a.x + first * BLOCK * a.size, a.out + (row * a.blocks + start) * LINE
                if a.size == 2:
                    _round(2, x, out, n)
                else:
                    _round(4, x, out, n)
                first += n
                if start + n == filled < a.blocks:
                    _clear(out + n * LINE, a.blocks - filled)
            take(block, FINISHED)
            share = take(block, TAKEN)

    return int(kernel.address)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _round(context: Any, size: Any, x: Any, out: Any, blocks: Any) -> Any:
    """`blocks` lines at out, at least one, of the numbers at x. size: bytes of a number, a compile-time constant."""
    (number,) = literals(size)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        source, target = e.pointer(args[1]), e.pointer(args[2])

        def line(i: Value) -> list[Value]:
            x, out = e.at(source, builder.mul(i, I64(BLOCK * number))), e.at(target, builder.shl(i, I64(6)))
            _round_block(e, [_load(e, e.at(x, half * LANES * number), number) for half in range(2)], out)
            return []

        e.loop(args[3], [], line)
        return context.get_dummy_value()

    return types.void(size, *[types.int64] * 3), emit


def _load(e: Emitter, x: Value, number: int) -> Value:
    return from_half(e, e.load(x, VS, 2)) if number == 2 else e.load(x, VF)


def _round_block(e: Emitter, halves: list[Value], out: Value) -> None:
    b = e.b
    sizes = [b.and_(b.bitcast(x, VI), e.bits(0x7FFFFFFF)) for x in halves]  # as integers they have the same order
    larger = b.select(b.icmp_unsigned(">", *sizes), *sizes)
    bits = e.call("llvm.vector.reduce.umax.v16i32", I32, larger)
    peak = b.bitcast(bits, F32)
    finite = b.icmp_unsigned("<", bits, I32(0x7F800000))
    usable = b.and_(finite, b.fcmp_ordered(">", peak, F32(_LEAST)))
    factor = b.select(usable, b.fdiv(F32(127.0), peak), F32(0.0))
    scale = b.select(usable, b.fmul(peak, F32(1 / 127)), b.select(finite, F32(0.0), F32(float("nan"))))
    factors, sums = e.splat(factor), []
    for half, x in enumerate(halves):
        codes = e.nearest(b.fmul(x, factors))
        codes = b.select(e.splat(finite), codes, e.bits(0))
        e.store(b.trunc(codes, VY), e.at(out, half * LANES), LANES)
        sums.append(e.call("llvm.vector.reduce.add.v16i32", I32, codes))
    code_sum = b.add(*sums)
    fields = {SCALE: scale, SUM: b.fmul(scale, b.sitofp(code_sum, F32))}
    fields.update({place: b.mul(code_sum, I32(-zero)) for zero, place in ZEROS.items()})
    fields.update({place: b.mul(total, I32(-32)) for place, total in zip(HALF_ZEROS, sums, strict=True)})
    for place, value in fields.items():
        e.store(value, e.at(out, place))


@intrinsic  # type: ignore[untyped-decorator]
def _clear(context: Any, out: Any, lines: Any) -> Any:
    """Zeros in so many lines, at least one."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        target, zeros = e.pointer(args[0]), ir.Constant(ir.VectorType(I8, LINE), None)

        def line(i: Value) -> list[Value]:
            e.store(zeros, e.at(target, builder.shl(i, I64(6))), LINE)
            return []

        e.loop(args[1], [], line)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit
