"""The inner loops of packed weights, written as LLVM IR over the 16 rows of a tile.

A code is unsigned and an activation int8: a quad of each is a product of fours, summed in int32 with the instructions
that the CPU has for it (`Fours`; VPDPBUSD at best). The sum is exact, whatever instructions make it. Once a block it
becomes float32 and is multiplied with both scales. Every CPU therefore gives the same result up to how it joins a
product and a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lamina_kernels.compile.emitter import F32, I8, I32, I64, LANES, VF, VH, VI, VS, VY, Emitter, Value, cpu_has
from lamina_kernels.compile.intrinsics import literals, to_half
from lamina_kernels.packed.activations import HALF_ZEROS, LINE, SCALE, SUM, ZEROS
from lamina_kernels.packed.layout import LAYOUTS, Format, Layout

_LARGEST = 32767  # int16


class Fours(Enum):
    """An instruction for products of fours."""

    VNNI = "avx512vnni"  # 16 sums of uint8 times int8
    VNNI_HALF = "avxvnni"  # 8 of them
    PAIRS = "avx2"  # sums of pairs of such products, in int16
    DOT = "dotprod"  # 4 sums of int8 times int8: NEON
    PLAIN = ""  # what LLVM makes of multiplications


def fours_of_cpu() -> Fours:
    """The best for the CPU that numba compiles for."""
    return next(kind for kind in Fours if not kind.value or cpu_has(kind.value))


def multiply_fours(
    e: Emitter, kind: Fours, codes: Sequence[Value], xs: Sequence[Value], bits: int, zeros: Value | None
) -> Value:
    """16 int32: over all quads, (code - zero) * x, summed.

    codes: vectors of 16 fours of unsigned codes of `bits`; xs: pointers to the fours of int8, from -127 to 127, that
    all 16 are multiplied with. zeros: a pointer to the int32 -zero * sum of x, or None where zero is 0. The zero of 8
    bits is 128.
    """
    b, total = e.b, e.bits(0) if zeros is None else e.splat(e.load(zeros, I32))
    if kind in (Fours.VNNI, Fours.PLAIN):
        for code, x in zip(codes, xs, strict=True):
            total = e.add_fours(total, code, e.splat(e.load(x, I32)))
        return total
    if bits == 8 and kind in (Fours.PAIRS, Fours.DOT):  # codes that have to be, or may as well be, signed
        codes, total = [b.xor(code, e.bits(0x80808080 - (1 << 32))) for code in codes], e.bits(0)
    parts = 4 if kind is Fours.DOT else 2
    width = LANES // parts
    fours = [_splat(e, e.load(x, I32), width) for x in xs]
    sums = []
    for part, first in enumerate(_split(e, total, parts)):
        part_codes = [_split(e, code, parts)[part] for code in codes]
        if kind is Fours.PAIRS:
            sums.append(_by_pairs(e, first, part_codes, fours, bits))
            continue
        name = "llvm.x86.avx512.vpdpbusd.256" if kind is Fours.VNNI_HALF else "llvm.aarch64.neon.sdot.v4i32.v16i8"
        if kind is Fours.DOT:
            part_codes, fours = (
                [_as_bytes(e, v, width) if v.type.element == I32 else v for v in vs] for vs in (part_codes, fours)
            )
        for code, x in zip(part_codes, fours, strict=True):
            first = e.call(name, first.type, first, code, x)
        sums.append(first)
    return _join(e, sums)


def _by_pairs(e: Emitter, total: Value, codes: Sequence[Value], fours: Sequence[Value], bits: int) -> Value:
    """8 int32 sums. Sums of pairs are added in int16 as long as they fit."""
    b, width = e.b, LANES // 2
    pairs, words = ir.VectorType(ir.IntType(16), 2 * width), ir.VectorType(I32, width)
    ones = ir.Constant(pairs, [ir.Constant(ir.IntType(16), 1)] * (2 * width))
    largest_code = 128 if bits == 8 else (1 << bits) - 1
    together = max(_LARGEST // (2 * 127 * largest_code), 1)
    for first in range(0, len(codes), together):
        sums = None
        for code, x in zip(codes[first : first + together], fours[first : first + together], strict=True):
            code_bytes, x_bytes = _as_bytes(e, code, width), _as_bytes(e, x, width)
            if bits == 8:  # |code| times x with code's sign
                x_bytes = e.call("llvm.x86.avx2.psign.b", x_bytes.type, x_bytes, code_bytes)
                code_bytes = e.call("llvm.abs.v32i8", code_bytes.type, code_bytes, ir.IntType(1)(0))
            product = e.call("llvm.x86.avx2.pmadd.ub.sw", pairs, code_bytes, x_bytes)
            sums = product if sums is None else b.add(sums, product)
        total = b.add(total, e.call("llvm.x86.avx2.pmadd.wd", words, sums, ones))
    return total


def _as_bytes(e: Emitter, vector: Value, width: int) -> Value:
    return e.b.bitcast(vector, ir.VectorType(I8, 4 * width))


def _splat(e: Emitter, word: Value, width: int) -> Value:
    vector = ir.VectorType(I32, width)
    one = e.b.insert_element(ir.Constant(vector, ir.Undefined), word, I32(0))
    return e.b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(vector, [I32(0)] * width))


def _split(e: Emitter, vector: Value, parts: int) -> list[Value]:
    width = LANES // parts
    lanes = ir.VectorType(I32, width)
    return [
        e.b.shuffle_vector(vector, vector, ir.Constant(lanes, [I32(i) for i in range(first, first + width)]))
        for first in range(0, LANES, width)
    ]


def _join(e: Emitter, parts: Sequence[Value]) -> Value:
    while len(parts) > 1:
        width = parts[0].type.count * 2
        order = ir.Constant(ir.VectorType(I32, width), [I32(i) for i in range(width)])
        parts = [e.b.shuffle_vector(parts[i], parts[i + 1], order) for i in range(0, len(parts), 2)]
    return parts[0]


GROUP = 8
"""Rows of x that are multiplied with a tile at once."""

_AHEAD = 12288  # bytes from what is loaded to what is fetched
_MASK = ir.VectorType(ir.IntType(1), 64)
_V8, _V16, _VB = (ir.VectorType(ir.IntType(n), k) for n, k in ((8, 64), (16, 32), (1, LANES)))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def multiply_tile(
    context: Any,
    format: Any,
    rows: Any,
    x: Any,
    order: Any,
    w: Any,
    y: Any,
    records: Any,
    blocks: Any,
    stride: Any,
    columns: Any,
    size: Any,
) -> Any:
    """y `[rows, columns]` = x times a tile of W.

    format: a compile-time constant. rows: 1 to GROUP, of x at lines of `round_rows`, `blocks` a row; order: the address
    of their numbers, int64. stride: bytes from
    a row of y to the next; columns: 1 to 16, what of the tile is stored; size: bytes of a number of y, 2 or 4.
    """
    (number,) = literals(format)
    layout = LAYOUTS[Format(number)]

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        _, rows, x, order, w, y, records, blocks, stride, columns, size = args
        row_bytes = builder.mul(blocks, I64(LINE))

        def tile(height: int) -> None:
            xs = e.rows(x, row_bytes, order, height)
            sums = _multiply(e, layout, xs, e.pointer(w), records)
            _store(e, sums, y, stride, columns, size)

        e.choose(rows, range(1, GROUP + 1), tile)
        return context.get_dummy_value()

    return types.void(format, *[types.int64] * 10), emit


def _multiply(e: Emitter, layout: Layout, xs: list[Value], tile: Value, records: Value) -> list[Value]:
    """One float32 vector for each x: of 16 rows of W."""
    b = e.b

    def record(index: Value, *sums: Value) -> list[Value]:
        place = e.at(tile, b.mul(index, I64(layout.record)))
        first = b.mul(index, I64(layout.blocks))
        factors = [None if d < 0 else b.fpext(e.load(e.at(place, d), VH, 2), VF) for d in (layout.d, layout.dmin)]

        def block(i: Value, *sums: Value) -> list[Value]:
            codes = e.at(place, b.mul(i, I64(layout.block)))
            for line in range(0, layout.block, 64):
                e.fetch(e.at(codes, _AHEAD + line))
            line = b.shl(b.add(first, i), I64(6))
            return _block(e, layout, place, i, codes, [e.at(x, line) for x in xs], list(sums), factors)

        for line in range(layout.scale, layout.record, 64):
            e.fetch(e.at(place, _AHEAD + line))
        if layout.blocks > 2:
            return list(e.loop(layout.blocks, sums, block))
        for i in range(layout.blocks):
            sums = (*block(I64(i), *sums),)
        return list(sums)

    return e.loop(records, [e.number(0.0)] * len(xs), record)


def _block(
    e: Emitter,
    layout: Layout,
    record: Value,
    i: Value,
    codes: Value,
    xs: list[Value],
    sums: list[Value],
    factors: list[Value],
) -> list[Value]:
    """sums, and the products of one block."""
    b = e.b
    quads = _quads(e, layout, codes)
    if layout.bits == 6:  # two halves of a block, each with a scale
        for half in range(2):
            place = e.at(record, b.add(I64(layout.scale + 16 * half), b.shl(i, I64(5))))
            scale = b.fmul(factors[0], b.sitofp(e.load(place, VY, 16), VF))
            half_quads = range(4 * half, 4 * half + 4)
            sums = [_add(e, layout, total, x, quads, half_quads, scale) for total, x in zip(sums, xs, strict=True)]
        return sums
    places = zip((layout.scale, layout.min), factors, strict=True)
    scale, minimum = (_numbers(e, layout, record, i, *pair) for pair in places)
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
    fours = [e.at(x, 4 * q) for q in which]
    bits = 5 if layout.table else layout.bits
    product = multiply_fours(e, fours_of_cpu(), [quads[q] for q in which], fours, bits, zeros)
    factor = e.b.fmul(scale, e.splat(e.load(e.at(x, SCALE), F32)))
    return e.fma(e.b.sitofp(product, VF), factor, total)


def _quads(e: Emitter, layout: Layout, codes: Value) -> list[Value]:
    """The 8 quads of a block as vectors of 16 fours of bytes."""
    b = e.b
    if layout.bits == 8:
        return [e.load(e.at(codes, 64 * q), VI, 64) for q in range(8)]
    low = e.bits(0x0F0F0F0F)
    vectors = [e.load(e.at(codes, 64 * q), VI, 64) for q in range(4)]
    quads = [b.and_(v, low) for v in vectors] + [b.and_(b.lshr(v, e.bits(4)), low) for v in vectors]
    if layout.table:
        quads = [e.e2m1(quad) for quad in quads]
    elif layout.bits == 5:
        bit, zero = (ir.Constant(_V8, [ir.Constant(ir.IntType(8), x)] * 64) for x in (16, 0))
        for q in range(8):
            mask = b.bitcast(e.load(e.at(codes, layout.high + 8 * q), I64, 8), _MASK)
            quads[q] = b.or_(quads[q], b.bitcast(b.select(mask, bit, zero), VI))
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
