"""Sums of products of codes and int8 by fours, exact in int32, with the instructions that a CPU has for them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from llvmlite import ir

from lamina_kernels.cpu.emitter import I8, I32, LANES, Emitter, Value, cpu_has

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
        of = [_split(e, code, parts)[part] for code in codes]
        if kind is Fours.PAIRS:
            sums.append(_by_pairs(e, first, of, fours, bits))
            continue
        name = "llvm.x86.avx512.vpdpbusd.256" if kind is Fours.VNNI_HALF else "llvm.aarch64.neon.sdot.v4i32.v16i8"
        if kind is Fours.DOT:
            of, fours = ([_as_bytes(e, v, width) if v.type.element == I32 else v for v in vs] for vs in (of, fours))
        for code, x in zip(of, fours, strict=True):
            first = e.call(name, first.type, first, code, x)
        sums.append(first)
    return _join(e, sums)


def _by_pairs(e: Emitter, total: Value, codes: Sequence[Value], fours: Sequence[Value], bits: int) -> Value:
    """8 int32 sums. Sums of pairs are added in int16 as long as they fit."""
    b, width = e.b, LANES // 2
    pairs, words = ir.VectorType(ir.IntType(16), 2 * width), ir.VectorType(I32, width)
    ones = ir.Constant(pairs, [ir.Constant(ir.IntType(16), 1)] * (2 * width))
    most = 128 if bits == 8 else (1 << bits) - 1
    together = max(_LARGEST // (2 * 127 * most), 1)
    for first in range(0, len(codes), together):
        sums = None
        for code, x in zip(codes[first : first + together], fours[first : first + together], strict=True):
            left, right = _as_bytes(e, code, width), _as_bytes(e, x, width)
            if bits == 8:  # |code| times x with code's sign
                right = e.call("llvm.x86.avx2.psign.b", right.type, right, left)
                left = e.call("llvm.abs.v32i8", left.type, left, ir.IntType(1)(0))
            product = e.call("llvm.x86.avx2.pmadd.ub.sw", pairs, left, right)
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
