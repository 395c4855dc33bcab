"""LLVM IR for vectors of 16 floats: the operations that the micro-kernels are made of.

LLVM fits the vectors to what the CPU has (AVX-512, AVX2, NEON); only `Kind.BFLOAT16_DOT` asks for an instruction by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

LANES = 16


class Kind(IntEnum):
    """How stored numbers are multiplied: INT8 in whole numbers, K by pairs of int16, V by fours of uint8; the others in
    floats.

    The two kinds of BFLOAT16 store the same bytes; the second is for CPUs that multiply them as they are.
    """

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    BFLOAT16_DOT = 3
    INT8 = 4

    @property
    def query(self) -> torch.dtype:
        """What dtype the queries must have."""
        return torch.bfloat16 if self is Kind.BFLOAT16_DOT else torch.float32

    @property
    def words(self) -> tuple[int, int]:
        """Of a query as it is multiplied: how many channels stand in a word of 4 bytes, and words a step."""
        return (2, 1) if self in (Kind.BFLOAT16_DOT, Kind.INT8) else (1, 2 if self is Kind.BFLOAT16 else 1)


def cpu_has(feature: str) -> bool:
    """Whether the CPU that numba compiles for has what LLVM calls `feature`."""
    return f"+{feature}" in str(cpu_target.target_context.codegen().magic_tuple()[2]).split(",")


def fetches_near() -> bool:
    """Whether KV that is fetched ahead goes into the first-level cache, and always by software.

    So on Zen 5, where fetches of KV into the second level take up to twice as long, and the hardware does not go on
    through pages that are read in bursts. Zen 4 is the other way around. Weights are one long run: for them the second
    level is better on both.
    """
    return str(cpu_target.target_context.codegen().magic_tuple()[1]) == "znver5"


@cache
def kind_of(dtype: torch.dtype) -> Kind:
    """The fastest kind for KV stored in `dtype` on the CPU that numba compiles for."""
    if dtype is torch.int8:
        return Kind.INT8
    if dtype is torch.bfloat16:
        return Kind.BFLOAT16_DOT if cpu_has("avx512bf16") else Kind.BFLOAT16
    return Kind.FLOAT32 if dtype is torch.float32 else Kind.FLOAT16


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types, and no bfloat
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


I8, I32, I64, F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
VF, VI = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
VH, VS, VB = ir.VectorType(ir.HalfType(), LANES), ir.VectorType(ir.IntType(16), LANES), ir.VectorType(_BFloat(), 32)
V8, V16 = ir.VectorType(I8, 2 * LANES), ir.VectorType(ir.IntType(16), 2 * LANES)  # pairs
VY = ir.VectorType(I8, LANES)
Value = Any  # an llvmlite value


class Emitter:
    """llvmlite's builder with the few operations that the kernels are made of."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def pointer(self, address: Value) -> Value:
        return self.b.inttoptr(address, ir.PointerType())

    def at(self, pointer: Value, offset: Value | int) -> Value:
        offset = I64(offset) if isinstance(offset, int) else offset
        return self.b.gep(pointer, [offset], source_etype=I8)

    def load(self, pointer: Value, kind: Any, align: int = 4) -> Value:
        return self.b.load(pointer, align=align, typ=kind)

    def store(self, value: Value, pointer: Value, align: int = 4) -> None:
        self.b.store(value, pointer, align=align)

    def rows(self, x: Value, row_bytes: Value, order: Value, count: int) -> list[Value]:
        """Pointers to rows of x, by the first `count` of the int64 numbers at the address `order`."""
        numbers = [self.load(self.at(self.pointer(order), 8 * i), I64, 8) for i in range(count)]
        return [self.pointer(self.b.add(x, self.b.mul(row_bytes, number))) for number in numbers]

    def splat(self, scalar: Value) -> Value:
        vector = ir.VectorType(scalar.type, LANES)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
        return self.b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(VI, [0] * LANES))

    def number(self, x: float) -> Value:
        return ir.Constant(VF, [ir.Constant(F32, x)] * LANES)

    def bits(self, x: int) -> Value:
        return ir.Constant(VI, [ir.Constant(I32, x)] * LANES)

    def call(self, name: str, result: Any, *arguments: Value) -> Value:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self.call("llvm.fma.v16f32", VF, a, b, c)

    def larger(self, a: Value, b: Value) -> Value:
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def fetch(self, pointer: Value, near: bool = False) -> None:
        """Ask for the line at `pointer` to be brought into the second-level cache, or `near`: into the first."""
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3 if near else 2), I32(1))

    def loop(self, count: Value | int, carried: Sequence[Value], body: Callable[..., Sequence[Value]]) -> list[Value]:
        """for i in range(count): carried = body(i, *carried); count is at least 1."""
        count = I64(count) if isinstance(count, int) else count
        entry = self.b.block
        head, done = self.b.append_basic_block(), self.b.append_basic_block()
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(I64)
        phis = [self.b.phi(value.type) for value in carried]
        new = body(index, *phis)
        following = self.b.add(index, I64(1))
        for phi, first, value in zip([index, *phis], [I64(0), *carried], [following, *new], strict=True):
            phi.add_incoming(first, entry)
            phi.add_incoming(value, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, count), head, done)
        self.b.position_at_end(done)
        return list(new)

    def choose(self, value: Value, cases: Sequence[int], body: Callable[[int], None]) -> None:
        """body(c), emitted for each case, runs for the smallest c >= value."""
        done = self.b.append_basic_block()
        for case in cases:
            block, next_block = self.b.append_basic_block(), self.b.append_basic_block()
            self.b.cbranch(self.b.icmp_signed("<=", value, I64(case)), block, next_block)
            self.b.position_at_end(block)
            body(case)
            self.b.branch(done)
            self.b.position_at_end(next_block)
        self.b.branch(done)
        self.b.position_at_end(done)

    def exp2(self, x: Value) -> Value:
        """2 ** x to 2e-7, exactly 1 at 0, and 0 at -inf."""
        if cpu_has("avx512dq"):
            return self._exp2_by_instructions(x)
        b, shift = self.b, self.number(1.5 * 2**23)  # the polynomial is that of Cephes' exp2f
        moved = b.fadd(x, shift)  # the low bits of the sum are x rounded to an integer
        fraction = b.fsub(x, b.fsub(moved, shift))
        result = self.number(1.535336188319500e-4)
        for c in (1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1):
            result = self.fma(result, fraction, self.number(c))
        result = self.fma(self.fma(result, fraction, self.number(6.931472028550421e-1)), fraction, self.number(1.0))
        power = b.shl(b.bitcast(moved, VI), self.bits(23))
        result = b.bitcast(b.add(b.bitcast(result, VI), power), VF)
        return b.select(b.fcmp_ordered("<", x, self.number(-126.0)), self.number(0.0), result)

    def _exp2_by_instructions(self, x: Value) -> Value:
        """Half the work: one instruction takes the fraction, one multiplies by 2 ** floor(x).

        The polynomial is the minimax one of relative error (8e-8) on [0, 1) among the polynomials that are 1 at 0.
        """
        every, as_is, floor = ir.IntType(16)(-1), I32(4), I32(1)
        fraction = self.call("llvm.x86.avx512.mask.reduce.ps.512", VF, x, floor, x, every, as_is)
        result = self.number(1.8671300495043397e-3)
        for c in (9.017030708491802e-3, 5.579991266131401e-2, 2.4016444385051727e-1, 6.931512951850891e-1, 1.0):
            result = self.fma(result, fraction, self.number(c))
        return self.call("llvm.x86.avx512.mask.scalef.ps.512", VF, result, x, x, every, as_is)

    def zero(self, kind: int) -> Value:
        """What a sum of `multiply_stored` begins with."""
        return self.bits(0) if kind == Kind.INT8 else self.number(0.0)

    def nearest(self, x: Value) -> Value:
        """The nearest integers of |x| < 2 ** 21, ties to even. Anything of what is not finite, but never undefined."""
        moved = self.b.bitcast(self.b.fadd(x, self.number(1.5 * 2**23)), VI)
        return self.b.sub(moved, self.bits(0x4B400000))

    def e2m1(self, codes: Value) -> Value:
        """Of fours of e2m1's codes, a byte each, twice their numbers plus 12."""
        b, kind = self.b, ir.VectorType(I8, 4 * LANES)
        codes = b.bitcast(codes, kind)
        if cpu_has("avx512bw"):
            table = ir.Constant(kind, [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0] * 4)
            return b.bitcast(self.call("llvm.x86.avx512.pshuf.b.512", kind, table, codes), VI)
        zero, two, four, seven, twelve = (ir.Constant(kind, [x] * 4 * LANES) for x in (0, 2, 4, 7, 12))
        size = b.and_(codes, seven)
        more = b.select(b.icmp_unsigned(">", size, four), b.sub(size, four), zero)
        tail = b.select(b.icmp_unsigned("==", size, seven), two, zero)
        size = b.add(size, b.add(more, tail))
        negative = b.icmp_unsigned(">", codes, seven)
        return b.bitcast(b.select(negative, b.sub(twelve, size), b.add(twelve, size)), VI)

    def add_pairs(self, sums: Value, a: Value, b: Value) -> Value:
        """sums[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]: int32 sums, a and b pairs of int16, seen as int32."""
        if cpu_has("avx512vnni"):
            return self.call("llvm.x86.avx512.vpdpwssd.512", VI, sums, a, b)
        c, half = self.b, self.bits(16)
        high = c.mul(c.ashr(a, half), c.ashr(b, half))
        low = c.mul(c.ashr(c.shl(a, half), half), c.ashr(c.shl(b, half), half))
        return c.add(sums, c.add(low, high))

    def add_fours(self, sums: Value, a: Value, b: Value) -> Value:
        """sums[i] + the four products of a[4i] ... and b[4i] ...: a uint8, b int8, both seen as int32."""
        if cpu_has("avx512vnni"):
            return self.call("llvm.x86.avx512.vpdpbusd.512", VI, sums, a, b)
        c, low, byte = self.b, self.bits(0x00FF00FF), ir.Constant(V16, [ir.Constant(ir.IntType(16), 8)] * 2 * LANES)
        halves = c.bitcast(b, V16)
        even, odd = c.ashr(c.shl(halves, byte), byte), c.ashr(halves, byte)
        sums = self.add_pairs(sums, c.and_(a, low), c.bitcast(even, VI))
        return self.add_pairs(sums, c.and_(c.lshr(a, self.bits(8)), low), c.bitcast(odd, VI))

    def multiply_stored(
        self, kind: int, stored: Sequence[Value], factors: Sequence[Value], sums: Sequence[Value], pack: int = 2
    ) -> list[Value]:
        """sums[f][s] + factor[f] * stored[s], over one stored vector each, as the kind wants it.

        stored: pointers to 16 numbers, or 16 pairs; factors: pointers to one float, or pair. INT8 has int32 sums; with
        `pack` 4 it multiplies fours.
        """
        b = self.b
        if kind == Kind.INT8:
            fours = pack == 4
            vectors = [self.load(p, VI) if fours else b.bitcast(b.sext(self.load(p, V8), V16), VI) for p in stored]
            steps = [(vectors, [self.splat(self.load(p, I32)) for p in factors])]
        elif kind == Kind.BFLOAT16_DOT:
            vectors = [b.bitcast(self.load(p, VI), VB) for p in stored]
            steps = [(vectors, [b.bitcast(self.splat(self.load(p, I32)), VB) for p in factors])]
        elif kind == Kind.BFLOAT16:
            pairs = [self.load(p, VI) for p in stored]
            low = [b.bitcast(b.shl(x, self.bits(16)), VF) for x in pairs]
            high = [b.bitcast(b.and_(x, self.bits(0xFFFF0000)), VF) for x in pairs]
            steps = [
                (low, [self.splat(self.load(p, F32)) for p in factors]),
                (high, [self.splat(self.load(self.at(p, 4), F32)) for p in factors]),
            ]
        else:
            half = kind == Kind.FLOAT16
            vectors = [b.fpext(self.load(p, VH, 2), VF) if half else self.load(p, VF) for p in stored]
            steps = [(vectors, [self.splat(self.load(p, F32)) for p in factors])]
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        for vectors, scalars in steps:
            products = [(f, x) for f in scalars for x in vectors]
            if kind == Kind.INT8:
                add = self.add_fours if pack == 4 else self.add_pairs
                sums = [add(s, f, x) for s, (f, x) in zip(sums, products, strict=True)]
            elif kind == Kind.BFLOAT16_DOT:
                sums = [self.call(name, VF, s, f, x) for s, (f, x) in zip(sums, products, strict=True)]
            else:
                sums = [self.fma(f, x, s) for s, (f, x) in zip(sums, products, strict=True)]
        return list(sums)
