"""The inner loops of packed weights, written as LLVM IR over the 16 rows of a tile.

A code is unsigned and an activation int8: a quad of each is a product of fours (VPDPBUSD where the CPU has it) summed
in int32, exactly, whatever instructions do it. Once a block the sum becomes float32 and is multiplied with both
scales. Every CPU therefore gives the same result up to how it joins a product and a sum.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lamina_kernels.cpu.emitter import F32, I32, I64, LANES, VF, VH, VI, VS, VY, Emitter, Value
from lamina_kernels.cpu.intrinsics import literals, to_half
from lamina_kernels.packed.activations import HALF_ZEROS, LINE, SCALE, SUM, ZEROS
from lamina_kernels.packed.fours import fours_of_cpu, multiply_fours
from lamina_kernels.packed.layout import LAYOUTS, Format, Layout

GROUP = 8
"""Rows of x that are multiplied with a tile at once."""

_AHEAD = 12288  # bytes from what is loaded to what is fetched
_MASK = ir.VectorType(ir.IntType(1), 64)
_V8, _V16, _VB = (ir.VectorType(ir.IntType(n), k) for n, k in ((8, 64), (16, 32), (1, LANES)))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def multiply_tile(
    context: Any, format: Any, rows: Any, x: Any, w: Any, y: Any, records: Any, blocks: Any, stride: Any, columns: Any,
    size: Any,
) -> Any:  # fmt: skip
    """y `[rows, columns]` = x times a tile of W.

    format: a compile-time constant. rows: 1 to GROUP, of x at lines of `round_rows`, `blocks` a row. stride: bytes from
    a row of y to the next; columns: 1 to 16, what of the tile is stored; size: bytes of a number of y, 2 or 4.
    """
    (number,) = literals(format)
    layout = LAYOUTS[Format(number)]

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        _, rows, x, w, y, records, blocks, stride, columns, size = args
        row_bytes = builder.mul(blocks, I64(LINE))

        def tile(height: int) -> None:
            xs = [e.pointer(builder.add(x, builder.mul(row_bytes, I64(i)))) for i in range(height)]
            sums = _multiply(e, layout, xs, e.pointer(w), records)
            _store(e, sums, y, stride, columns, size)

        e.choose(rows, range(1, GROUP + 1), tile)
        return context.get_dummy_value()

    return types.void(format, *[types.int64] * 9), emit


def _multiply(e: Emitter, layout: Layout, xs: list[Value], tile: Value, records: Value) -> list[Value]:
    """One float32 vector for each x: of 16 rows of W."""
    b = e.b

    def record(index: Value, *sums: Value) -> list[Value]:
        at = e.at(tile, b.mul(index, I64(layout.record)))
        first = b.mul(index, I64(layout.blocks))
        factors = [None if d < 0 else b.fpext(e.load(e.at(at, d), VH, 2), VF) for d in (layout.d, layout.dmin)]

        def block(i: Value, *sums: Value) -> list[Value]:
            codes = e.at(at, b.mul(i, I64(layout.block)))
            for line in range(0, layout.block, 64):
                e.fetch(e.at(codes, _AHEAD + line))
            line = b.shl(b.add(first, i), I64(6))
            return _block(e, layout, at, i, codes, [e.at(x, line) for x in xs], list(sums), factors)

        for line in range(layout.scale, layout.record, 64):
            e.fetch(e.at(at, _AHEAD + line))
        if layout.blocks > 2:
            return list(e.loop(layout.blocks, sums, block))
        for i in range(layout.blocks):
            sums = (*block(I64(i), *sums),)
        return list(sums)

    return e.loop(records, [e.number(0.0)] * len(xs), record)


def _block(
    e: Emitter, layout: Layout, record: Value, i: Value, codes: Value, xs: list[Value], sums: list[Value],
    factors: list[Value],
) -> list[Value]:  # fmt: skip
    """sums, and the products of one block."""
    b = e.b
    quads = _quads(e, layout, codes)
    if layout.bits == 6:  # two halves of a block, each with a scale
        for half in range(2):
            place = e.at(record, b.add(I64(layout.scale + 16 * half), b.shl(i, I64(5))))
            scale = b.fmul(factors[0], b.sitofp(e.load(place, VY, 16), VF))
            of = range(4 * half, 4 * half + 4)
            sums = [_add(e, layout, total, x, quads, of, scale) for total, x in zip(sums, xs, strict=True)]
        return sums
    places = zip((layout.scale, layout.min), factors, strict=True)
    scale, minimum = (_numbers(e, layout, record, i, *of) for of in places)
    sums = [_add(e, layout, total, x, quads, range(8), scale) for total, x in zip(sums, xs, strict=True)]
    if minimum is not None:
        sums = [e.fma(minimum, e.splat(e.load(e.at(x, SUM), F32)), s) for s, x in zip(sums, xs, strict=True)]
    return sums


def _numbers(e: Emitter, layout: Layout, record: Value, i: Value, place: int, factor: Value | None) -> Value | None:
    """The scales of block i of a record, or its minima: 16 float32. None where the format has none."""
    b = e.b
    if place < 0:
        return None
    if factor is None:
        return b.fpext(e.load(e.at(record, b.add(I64(place), b.shl(i, I64(5)))), VH, 32), VF)
    numbers = b.uitofp(e.load(e.at(record, b.add(I64(place), b.shl(i, I64(4)))), VY, 16), VF)
    return b.fmul(factor, numbers) if place == layout.scale else b.fneg(b.fmul(factor, numbers))


def _add(e: Emitter, layout: Layout, total: Value, x: Value, quads: list[Value], which: range, scale: Value) -> Value:
    """total + scale * (codes - zero) * x over some quads of a block."""
    zero = max(layout.zero, 0)
    place = -1 if zero == 0 else HALF_ZEROS[which.start // 4] if layout.bits == 6 else ZEROS[zero]
    zeros = None if zero == 0 else e.at(x, place)
    at = [e.at(x, 4 * q) for q in which]
    whole = multiply_fours(e, fours_of_cpu(), [quads[q] for q in which], at, layout.bits, zeros)
    by = e.b.fmul(scale, e.splat(e.load(e.at(x, SCALE), F32)))
    return e.fma(e.b.sitofp(whole, VF), by, total)


def _quads(e: Emitter, layout: Layout, codes: Value) -> list[Value]:
    """The 8 quads of a block as vectors of 16 fours of bytes."""
    b = e.b
    if layout.bits == 8:
        return [e.load(e.at(codes, 64 * q), VI, 64) for q in range(8)]
    low = e.bits(0x0F0F0F0F)
    vectors = [e.load(e.at(codes, 64 * q), VI, 64) for q in range(4)]
    quads = [b.and_(v, low) for v in vectors] + [b.and_(b.lshr(v, e.bits(4)), low) for v in vectors]
    if layout.bits == 5:
        bit, none = (ir.Constant(_V8, [ir.Constant(ir.IntType(8), x)] * 64) for x in (16, 0))
        for q in range(8):
            mask = b.bitcast(e.load(e.at(codes, layout.high + 8 * q), I64, 8), _MASK)
            quads[q] = b.or_(quads[q], b.bitcast(b.select(mask, bit, none), VI))
    elif layout.bits == 6:
        high = [e.load(e.at(codes, layout.high + 64 * v), VI, 64) for v in range(2)]
        for q in range(8):
            v, f = divmod(q, 4)
            shifted = b.shl(high[v], e.bits(4 - 2 * f)) if f < 2 else b.lshr(high[v], e.bits(2 * f - 4))
            quads[q] = b.or_(quads[q], b.and_(shifted, e.bits(0x30303030)))
    return quads


def _store(e: Emitter, sums: list[Value], y: Value, stride: Value, columns: Value, size: Value) -> None:
    """Each vector's first `columns` numbers to a row of y, in float32 or bfloat16."""
    b = e.b
    lanes = ir.Constant(VI, [I32(i) for i in range(LANES)])
    stored = b.icmp_signed("<", lanes, e.splat(b.trunc(columns, I32)))
    with b.if_else(b.icmp_signed("==", size, I64(2))) as (half, full):
        for branch, kind, name in ((half, VS, "v16i16"), (full, VF, "v16f32")):
            with branch:
                for i, total in enumerate(sums):
                    place = e.pointer(b.add(y, b.mul(stride, I64(i))))
                    value = to_half(e, total) if kind is VS else total
                    e.call(f"llvm.masked.store.{name}.p0", ir.VoidType(), value, place, I32(2), stored)
