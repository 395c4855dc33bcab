"""The inner loops of attention on a CPU, written as LLVM IR over vectors of 16 floats.

Each public function is a numba intrinsic: called from compiled code, it is emitted in place. Addresses and sizes are
int64, `kind` and `unit` compile-time constants.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lamina_kernels.compile.emitter import F32, I32, I64, LANES, VF, VH, VI, VS, VY, Emitter, Kind, Value, fetches_near
from lamina_kernels.compile.intrinsics import LOG2E, Address, literals, signature_of, to_half, unpack

TILE = 8  # query vectors computed together: 8 x 2 registers of logits
BLOCK = 128  # keys between two updates of the softmax, at most
ROW = BLOCK * 4  # bytes from one query vector's logits to the next one's
WORTH = TILE * 4  # bytes from a query vector's decay to what an integer of its sums is worth


def stored_bytes(code: int, pack: int) -> int:
    """Bytes of 16 times `pack` stored numbers: what one step takes of a vector."""
    return LANES * pack * {Kind.FLOAT32: 4, Kind.INT8: 1}.get(Kind(code), 2)


def packs(code: int) -> tuple[int, int]:
    """`k_pack` and `v_pack` of the pages that are multiplied so."""
    if code == Kind.INT8:
        return 2, 4
    return (2, 2) if code in (Kind.BFLOAT16, Kind.BFLOAT16_DOT) else (1, 1)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def quantise(context: Any, source: Any, target: Any, words: Any, stride: Any) -> Any:
    """2 * words floats, words a multiple of 8, as pairs of int16, `stride` pairs apart; returns what a unit of them
    is worth: the largest number over 32767, NaN where one of them is not finite."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        source, target, vectors, stride = e.pointer(args[0]), e.pointer(args[1]), b.lshr(args[2], I64(3)), args[3]

        def widest(i: Value, top: Value, nothing: Value) -> list[Value]:
            x = e.load(e.at(source, b.shl(i, I64(6))), VF)
            return [e.larger(e.call("llvm.fabs.v16f32", VF, x), top), e.fma(x, e.number(0.0), nothing)]

        top, nothing = e.loop(vectors, [e.number(0.0), e.number(0.0)], widest)  # 0 * x: NaN where x is not finite
        nothing = e.call("llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), nothing)
        worth = b.fmul(e.call("llvm.vector.reduce.fmax.v16f32", F32, top), F32(1 / 32767))
        usable = b.fcmp_ordered(">", worth, F32(1e-37))
        units = e.splat(b.select(usable, b.fdiv(F32(1.0), worth), F32(0.0)))

        def step(i: Value) -> list[Value]:
            x = b.fmul(e.load(e.at(source, b.shl(i, I64(6))), VF), units)
            low = e.number(-32767.0)
            x = b.select(b.fcmp_ordered(">", x, low), x, low)
            x = b.select(b.fcmp_ordered("<", x, e.number(32767.0)), x, e.number(32767.0))
            pairs = b.bitcast(b.trunc(e.nearest(x), VS), ir.VectorType(I32, LANES // 2))
            for lane in range(LANES // 2):
                place = b.mul(b.add(b.shl(i, I64(3)), I64(lane)), b.shl(stride, I64(2)))
                e.store(b.extract_element(pairs, I32(lane)), e.at(target, place))
            return []

        e.loop(vectors, [], step)
        return b.fadd(worth, nothing)

    return types.float32(*[types.int64] * 4), emit


class Dot(NamedTuple):
    """The operands of `dot`."""

    rows: int  # query vectors, at most TILE
    panel: Address  # the queries `[steps, TILE]`, each one channel's float, or pair's
    keys: Address  # `[steps, stride bytes]`, each step one channel, or pair, of all keys
    ahead: Address  # keys to fetch meanwhile, of the same shape
    logits: Address  # float32 `[TILE, BLOCK]`, of which rows x 16 * unit are written
    steps: int
    stride: int
    of_q: Address  # float32 `[rows]`, for INT8 alone: what a unit of each query is worth
    of_k: Address  # float32 `[16 * unit]`, likewise of each key
    scale: np.float32


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def dot(context: Any, kind: Any, unit: Any, operands: Any) -> Any:
    """Logits of some query vectors against 16 * unit keys: scale * sum over d of q[d] k[d]. operands: `Dot`."""
    code, width = literals(kind, unit)
    words = Kind(code).words[1]  # of the panel a step
    size = stored_bytes(code, packs(code)[0])

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        o = unpack(Dot, context, e, signature.args[2], args[2])

        def tile(count: int) -> None:
            def step(i: Value, q: Value, k: Value, far: Value, *sums: Value) -> list[Value]:
                for line in range(0, size * width, 64):
                    e.fetch(e.at(far, line), fetches_near())
                stored = [e.at(k, size * u) for u in range(width)]
                new = e.multiply_stored(code, stored, [e.at(q, 4 * words * r) for r in range(count)], sums)
                return [e.at(q, 4 * words * TILE), e.at(k, o.stride), e.at(far, o.stride), *new]

            sums = e.loop(o.steps, [o.panel, o.keys, o.ahead] + [e.zero(code)] * (count * width), step)[3:]
            factors = [e.splat(o.scale)] * width
            if code == Kind.INT8:
                factors = [builder.fmul(e.load(e.at(o.of_k, 64 * u), VF), factors[u]) for u in range(width)]
            for i, total in enumerate(sums):
                factor = factors[i % width]
                if code == Kind.INT8:
                    total = builder.sitofp(total, VF)
                    factor = builder.fmul(e.splat(e.load(e.at(o.of_q, i // width * 4), F32)), factor)
                e.store(builder.fmul(total, factor), e.at(o.logits, i // width * ROW + i % width * 64))

        e.choose(o.rows, (2, 3, 4, TILE), tile)  # one is computed as two: for one alone, fetches come too fast
        return context.get_dummy_value()

    return types.void(kind, unit, operands), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def cap(context: Any, logits: Any, vectors: Any, soft_cap: Any) -> Any:
    """x <- log2(e) * soft_cap * tanh(x / soft_cap) over 16 * vectors floats.

    tanh(y) is 1 - 2 / (e^2y + 1), which loses small y; below 1/64 it is y - y^3 / 3, to 1e-8.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        logits, limit = e.pointer(args[0]), e.splat(args[2])
        rate = builder.fdiv(e.number(2 * LOG2E), limit)
        height = builder.fmul(limit, e.number(LOG2E))
        inverse = builder.fdiv(e.number(1.0), limit)

        def step(i: Value) -> list[Value]:
            place = e.at(logits, builder.shl(i, I64(6)))
            x = e.load(place, VF)
            t = builder.fmul(x, inverse)
            bent = e.fma(builder.fmul(t, t), e.number(-1 / 3), e.number(1.0))
            slight = builder.fmul(builder.fmul(x, e.number(LOG2E)), bent)
            y = builder.fmul(x, rate)
            y = builder.select(builder.fcmp_ordered(">", y, e.number(126.0)), e.number(126.0), y)
            two = builder.fdiv(e.number(2.0), builder.fadd(e.exp2(y), e.number(1.0)))
            full = builder.fmul(height, builder.fsub(e.number(1.0), two))
            small = builder.fcmp_ordered("<", e.call("llvm.fabs.v16f32", VF, t), e.number(1 / 64))
            e.store(builder.select(small, slight, full), place)
            return []

        e.loop(args[1], [], step)
        return context.get_dummy_value()

    return signature_of([], 2, 1), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def mask(context: Any, logits: Any, vectors: Any, begin: Any, end: Any) -> Any:
    """Put -inf into the float32 `[16 * vectors]` logits outside [begin, end)."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        logits = e.pointer(args[0])
        begin, end = (e.splat(builder.trunc(x, I32)) for x in args[2:])
        lanes = ir.Constant(VI, list(range(LANES)))

        def step(i: Value, index: Value) -> list[Value]:
            place = e.at(logits, builder.shl(i, I64(6)))
            inside = builder.and_(builder.icmp_signed(">=", index, begin), builder.icmp_signed("<", index, end))
            e.store(builder.select(inside, e.load(place, VF), e.number(float("-inf"))), place)
            return [builder.add(index, e.bits(LANES))]

        e.loop(args[1], [lanes], step)
        return context.get_dummy_value()

    return signature_of([], 4), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def weigh(context: Any, kind: Any, logits: Any, vectors: Any, peak: Any, total: Any, decay: Any, factors: Any) -> Any:
    """One query vector's softmax over 16 * vectors more keys, in powers of two.

    logits: float32, overwritten by the weights 2^(x - peak), in what the kind multiplies: as bfloat16, or for INT8,
    after a multiplication with factors[i], as `halves`; peak: the largest logit so far, updated; total: 16 partial
    sums of weights, updated; decay: gets what the earlier sums must be multiplied with, and WORTH bytes on, for INT8,
    what one of its integers is worth. All logits -inf: weights 0.
    """
    (code,) = literals(kind)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        logits, vectors, peak, total, decay, factors = (e.pointer(a) if i != 1 else a for i, a in enumerate(args[1:]))
        low = e.number(float("-inf"))
        (top,) = e.loop(vectors, [low], lambda i, top: [e.larger(e.load(e.at(logits, b.shl(i, I64(6))), VF), top)])
        old = e.load(peak, F32)
        highest = e.call("llvm.vector.reduce.fmax.v16f32", F32, top)
        highest = b.select(b.fcmp_ordered(">", highest, old), highest, old)
        e.store(highest, peak)
        shift = e.splat(b.select(b.fcmp_ordered("==", highest, F32(float("-inf"))), F32(0.0), highest))
        fade = e.exp2(b.fsub(e.splat(old), shift))
        e.store(b.extract_element(fade, I32(0)), decay)

        def step(i: Value, sums: Value, *largest: Value) -> list[Value]:
            weights = e.exp2(b.fsub(e.load(e.at(logits, b.shl(i, I64(6))), VF), shift))
            sums = b.fadd(sums, weights)
            if code == Kind.BFLOAT16_DOT:  # weights are finite and not negative: rounding is one addition
                rounded = b.lshr(b.add(b.bitcast(weights, VI), e.bits(0x8000)), e.bits(16))
                e.store(b.trunc(rounded, VS), e.at(logits, b.shl(i, I64(5))))
                return [sums]
            if code == Kind.INT8:
                weights = b.fmul(weights, e.load(e.at(factors, b.shl(i, I64(6))), VF))
                largest = (e.larger(weights, largest[0]), b.fadd(weights, largest[1]))
            e.store(weights, e.at(logits, b.shl(i, I64(6))))
            return [sums, *largest]

        start = [b.fmul(e.load(total, VF), fade), *([e.number(0.0)] * 2 if code == Kind.INT8 else [])]
        sums, *largest = e.loop(vectors, start, step)
        e.store(sums, total)
        if code == Kind.INT8:
            _make_integers(e, logits, vectors, largest[0], largest[1], e.at(decay, WORTH))
        return context.get_dummy_value()

    return signature_of([kind], 6), emit


def _make_integers(e: Emitter, weights: Value, vectors: Value, largest: Value, sums: Value, worth: Value) -> None:
    """16 * vectors weights to `halves`, in place, the largest to 65535: with 8 bits, all weights beside that of an
    attention sink would be lost. Where the sums are not finite, what they are worth is NaN: that must be seen."""
    b = e.b
    peak = e.call("llvm.vector.reduce.fmax.v16f32", F32, largest)
    usable = b.fcmp_ordered(">", peak, F32(1e-33))
    units = e.splat(b.select(usable, b.fdiv(F32(65535.0), peak), F32(0.0)))
    nothing = b.fmul(e.call("llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), sums), F32(0.0))
    e.store(b.fadd(b.fmul(peak, F32(1 / 65535)), nothing), worth)

    def step(i: Value) -> list[Value]:
        scaled = b.fmul(e.load(e.at(weights, b.shl(i, I64(6))), VF), units)
        e.store(halves(e, e.nearest(scaled)), e.at(weights, b.shl(i, I64(5))))
        return []

    e.loop(vectors, [], step)


class Accumulate(NamedTuple):
    """The operands of `accumulate`."""

    rows: int  # query vectors: 1 to 4, or TILE
    weights: Address  # as `weigh` leaves them, ROW bytes a query vector
    values: Address  # int64 `[strips]`: addresses of 16 * unit values each, `[tokens / v_pack, d, v_pack]`
    ahead: Address  # int64 `[strips]`: those of strips to fetch meanwhile
    strips: int
    sums: Address  # float32 `[rows, d]`
    d: int
    decay: Address  # float32 `[rows]`, as `weigh` leaves it


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def accumulate(context: Any, kind: Any, unit: Any, operands: Any) -> Any:
    """sums <- decay * sums + weights @ values. operands: `Accumulate`."""
    code, width = literals(kind, unit)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        _Accumulation(e, code, width, unpack(Accumulate, context, e, signature.args[2], args[2])).emit()
        return context.get_dummy_value()

    return types.void(kind, unit, operands), emit


class _Accumulation:
    """What `accumulate` emits."""

    def __init__(self, e: Emitter, code: int, width: int, operands: Accumulate) -> None:
        self.e, self.b, self.o, self.code = e, e.b, operands, code
        self.exact = code == Kind.INT8
        self.pack = packs(code)[1]
        self.steps = LANES * width // self.pack  # of a strip
        self.size = stored_bytes(code, self.pack)
        self.advance = 8 if self.exact or code == Kind.BFLOAT16 else 4  # bytes of weights a step
        self.stride = self.b.mul(operands.d, I64(self.size // LANES))
        self.row_bytes = self.b.shl(operands.d, I64(2))

    def emit(self) -> None:
        self.e.choose(self.o.rows, (1, 2, 3, 4, TILE), self.tile)

    def tile(self, count: int) -> None:
        b = self.b
        registers, log = b.lshr(self.o.d, I64(4)), (1 if count == TILE else 2) - self.exact  # 16 of sums at most
        groups = b.lshr(registers, I64(log))
        with b.if_then(b.icmp_signed(">", groups, I64(0))):
            self.e.loop(groups, [], lambda i: self.columns(count, 1 << log, b.shl(i, I64(log))))
        remainder = b.and_(registers, I64((1 << log) - 1))
        with b.if_then(b.icmp_signed(">", remainder, I64(0))):
            self.e.loop(remainder, [], lambda i: self.columns(count, 1, b.add(b.shl(groups, I64(log)), i)))

    def columns(self, count: int, chunks: int, first: Value) -> list[Value]:
        """`count` query vectors, `chunks` registers of channels from number `first` on."""
        e, b, o = self.e, self.b, self.o
        places = [
            e.at(o.sums, b.add(b.mul(self.row_bytes, I64(r)), b.shl(b.add(first, I64(c)), I64(6))))
            for r in range(count)
            for c in range(chunks)
        ]
        fades = [e.splat(e.load(e.at(o.decay, 4 * r), F32)) for r in range(count)]

        def faded() -> list[Value]:
            return [b.fmul(e.load(p, VF), fades[i // chunks]) for i, p in enumerate(places)]

        # Of INT8 this block is summed in whole numbers, high and low bytes apart, then added to the earlier ones.
        start = [e.zero(self.code)] * len(places) * 2 if self.exact else faded()
        totals = e.loop(o.strips, [o.weights, *start], partial(self.strip, count, chunks, first))[1:]
        if self.exact:
            worth = [e.splat(e.load(e.at(o.decay, WORTH + 4 * r), F32)) for r in range(count)]
            highs, lows = totals[: len(places)], totals[len(places) :]
            integers = [b.add(b.shl(high, e.bits(8)), low) for high, low in zip(highs, lows, strict=True)]
            terms = zip(integers, faded(), strict=True)
            totals = [e.fma(b.sitofp(t, VF), worth[i // chunks], old) for i, (t, old) in enumerate(terms)]
        for place, total in zip(places, totals, strict=True):
            e.store(total, place)
        return []

    def strip(self, count: int, chunks: int, first: Value, i: Value, weights: Value, *totals: Value) -> list[Value]:
        """Add strip i to the sums of `columns`."""
        e, b, o, size = self.e, self.b, self.o, self.size
        near, far = (
            e.at(e.pointer(e.load(e.at(x, b.shl(i, I64(3))), I64, 8)), b.mul(first, I64(size)))
            for x in (o.values, o.ahead)
        )
        sums = count * chunks

        def step(i: Value, w: Value, v: Value, far: Value, *totals: Value) -> list[Value]:
            for line in range(0, size * chunks, 64):
                e.fetch(e.at(far, line), fetches_near())
            stored, new = [e.at(v, size * c) for c in range(chunks)], []
            for half in range(len(totals) // sums):
                factors = [e.at(w, ROW * r + 4 * half) for r in range(count)]
                new += e.multiply_stored(self.code, stored, factors, totals[half * sums : (half + 1) * sums], self.pack)
            return [e.at(w, self.advance), e.at(v, self.stride), e.at(far, self.stride), *new]

        new = e.loop(self.steps, [weights, near, far, *totals], step)
        return [new[0], *new[3:]]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def settle(context: Any, dtype: Any, sums: Any, out: Any, vectors: Any, factor: Any) -> Any:
    """out <- factor * sums over 16 * vectors floats, stored as `FLOATS[dtype]`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        dtype, sums, out, vectors, factor = args
        sums, out, scale = e.pointer(sums), e.pointer(out), e.splat(factor)

        def convert(code: int) -> None:
            def step(i: Value) -> list[Value]:
                x = b.fmul(e.load(e.at(sums, b.shl(i, I64(6))), VF), scale)
                if code == 0:
                    e.store(x, e.at(out, b.shl(i, I64(6))))
                elif code == 1:
                    e.store(to_half(e, x), e.at(out, b.shl(i, I64(5))), 2)
                else:
                    e.store(b.fptrunc(x, VH), e.at(out, b.shl(i, I64(5))), 2)
                return []

            e.loop(vectors, [], step)

        e.choose(dtype, (0, 1, 2), convert)
        return context.get_dummy_value()

    return signature_of([], 4, 1), emit


def halves(e: Emitter, numbers: Value) -> Value:
    """16 integers below 65536 as bytes: four times the high bytes of four numbers, then their low bytes."""
    four = ir.VectorType(I32, 4)
    high, low = (e.b.bitcast(e.b.trunc(x, VY), four) for x in (e.b.lshr(numbers, e.bits(8)), numbers))
    order = ir.Constant(ir.VectorType(I32, 8), [ir.Constant(I32, i) for i in (0, 4, 1, 5, 2, 6, 3, 7)])
    return e.b.shuffle_vector(high, low, order)
