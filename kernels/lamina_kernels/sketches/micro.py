"""The inner loops over page sketches, written as LLVM IR over vectors of 16 floats.

Each public function is a numba intrinsic: called from compiled code, it is emitted in place. Addresses and sizes are
int64, `kind` and `unit` compile-time constants. How a sketch is laid out, `SketchLayout` says.

What is computed for up to LANES pages at once stands in *rows* of 64 bytes: that of query head r and page p is number
LANES * r + p, so that one tree of shuffles reduces the rows of a head's pages to a register.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lamina_kernels.compile.emitter import F32, I32, I64, LANES, V16, VB, VF, VI, VS, VY, Emitter, Value, cpu_has
from lamina_kernels.compile.intrinsics import LOG2E, Address, from_half, literals, signature_of, to_half, unpack
from lamina_kernels.compile.trees import LINE, tree

HEADS = 8  # query heads computed together
CASES = tuple(range(1, HEADS + 1))
EXP2 = (0.337189434618089, 0.6576362757382366, 1.001724763214558)  # of a polynomial of 2^x on [0, 1)
MAGIC = 1.5 * 2**23  # added to a small float, it leaves the nearest integer in the low bits
BIAS = 127 << 7  # of the exponent, in the bits of a bfloat16
LEAST = BIAS - (90 << 7)  # the bits of 2^-90, below which a product of a step and a query is taken for that
SLACK = 1.126  # the sum of two floats' bits is the bits of their product, or of up to 9/8 less (Mitchell)


def _larger_bits(e: Emitter, a: Value, b: Value) -> Value:
    return e.b.select(e.b.icmp_unsigned(">", a, b), a, b)


def _half_words(x: int) -> Value:
    return ir.Constant(V16, [ir.Constant(ir.IntType(16), x)] * 2 * LANES)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def spread(context: Any, query: Any, d: Any, padded: Any, floats: Any, halves: Any, bounds: Any) -> Any:
    """One query vector as the loops read it, and what it adds to each logit: 0, or NaN if it is not finite.

    query: float32 `[d]`; floats: the same; halves: as bfloat16 `[padded]`; bounds: the bits of its size as bfloat16,
    rounded up, `[padded]`. padded: d, or more by 16, where zeros are written.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        query, floats, halves, bounds = (e.pointer(args[i]) for i in (0, 3, 4, 5))
        d, padded = args[1], args[2]
        zeros = ir.Constant(VS, [ir.Constant(ir.IntType(16), 0)] * LANES)
        last = b.shl(b.sub(padded, I64(LANES)), I64(1))
        for target in (halves, bounds):
            e.store(zeros, e.at(target, last), 2)

        def step(i: Value, nothing: Value) -> list[Value]:
            x = e.load(e.at(query, b.shl(i, I64(6))), VF)
            e.store(x, e.at(floats, b.shl(i, I64(6))))
            e.store(to_half(e, x), e.at(halves, b.shl(i, I64(5))), 2)
            size = b.add(b.and_(b.bitcast(x, VI), e.bits(0x7FFFFFFF)), e.bits(0xFFFF))
            e.store(b.trunc(b.lshr(size, e.bits(16)), VS), e.at(bounds, b.shl(i, I64(5))), 2)
            return [e.fma(x, e.number(0.0), nothing)]

        nothing = e.loop(b.lshr(d, I64(4)), [e.number(0.0)], step)[0]
        return e.call("llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), nothing)

    return types.float32(*[types.int64] * 6), emit


class Bound(NamedTuple):
    """The operands of `bound`."""

    rows: int  # query vectors, at most HEADS
    pages: int  # at most LANES
    places: Address  # int64 `[pages]`, where the sketches are
    steps_at: int  # bytes to the steps, bfloat16 `[32 * chunks]`, behind which the lows stand
    chunks: int
    bounds: Address  # as `spread` leaves them, a query vector after the other
    halves: Address  # likewise
    tops: Address  # written: rows of the first query vector and page, bits of the products
    dots: Address  # written: rows likewise, summands of q . low


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def bound(context: Any, operands: Any) -> Any:
    """Of some pages and query vectors: a bound of |q| * step over the channels, and q . low. operands: `Bound`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        o = unpack(Bound, context, e, signature.args[0], args[0])
        size = b.shl(o.chunks, I64(6))

        def tile(count: int) -> None:
            def page(p: Value) -> list[Value]:
                steps = e.pointer(b.add(e.load(e.at(o.places, b.shl(p, I64(3))), I64, 8), o.steps_at))
                lows, row = e.at(steps, size), b.shl(p, I64(6))

                def chunk(i: Value, *results: Value) -> list[Value]:
                    offset = b.shl(i, I64(6))
                    step, low = e.load(e.at(steps, offset), V16), e.load(e.at(lows, offset), VI)
                    new = []
                    for r in range(count):
                        product = b.add(step, e.load(e.at(o.bounds, b.add(offset, b.mul(size, I64(r)))), V16))
                        new.append(_larger_bits(e, product, results[r]))
                    for r in range(count):
                        half = e.load(e.at(o.halves, b.add(offset, b.mul(size, I64(r)))), VI)
                        new.append(_add_halves(e, half, low, results[count + r]))
                    return new

                results = e.loop(o.chunks, [_half_words(0)] * count + [e.number(0.0)] * count, chunk)
                for r in range(count):
                    top, place = b.bitcast(results[r], VI), b.add(row, I64(LINE * LANES * r))
                    top = _larger_bits(e, b.lshr(top, e.bits(16)), b.and_(top, e.bits(0xFFFF)))
                    e.store(top, e.at(o.tops, place))
                    e.store(results[count + r], e.at(o.dots, place))
                return []

            e.loop(o.pages, [], page)

        e.choose(o.rows, CASES, tile)
        return context.get_dummy_value()

    return types.void(operands), emit


def _add_halves(e: Emitter, a: Value, b: Value, total: Value) -> Value:
    """total[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1], of bfloat16 seen as int32."""
    if cpu_has("avx512bf16"):
        return e.call("llvm.x86.avx512bf16.dpbf16ps.512", VF, total, e.b.bitcast(a, VB), e.b.bitcast(b, VB))
    low = [e.b.bitcast(e.b.shl(x, e.bits(16)), VF) for x in (a, b)]
    high = [e.b.bitcast(e.b.and_(x, e.bits(0xFFFF0000)), VF) for x in (a, b)]
    for x, y in (low, high):
        total = e.fma(x, y, total)
    return total


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def settle_bounds(
    context: Any, tops: Any, dots: Any, inverses: Any, factors: Any, bases: Any, nothing: Any, scale: Any
) -> Any:
    """From the rows of LANES pages of one query vector to what it is to be multiplied with as whole numbers.

    inverses: float32 `[LANES]`, 127 over the bound of |q| * step; factors: scale over that; bases: scale * q . low.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        tops, dots, inverses, factors, bases = (e.pointer(a) for a in args[:5])
        nothing, scale = e.splat(args[5]), e.splat(args[6])
        top = tree(e, tops, VI, lambda x, y: _larger_bits(e, x, y))
        top = b.sub(_larger_bits(e, top, e.bits(BIAS + LEAST)), e.bits(BIAS))
        peaks = b.fmul(b.bitcast(b.shl(top, e.bits(16)), VF), e.number(SLACK / 127))
        e.store(b.fdiv(e.number(1.0), peaks), inverses)
        e.store(b.fmul(peaks, scale), factors)
        e.store(b.fadd(b.fmul(tree(e, dots, VF, b.fadd), scale), nothing), bases)
        return context.get_dummy_value()

    return signature_of([], 5, 2), emit


class Judge(NamedTuple):
    """The operands of `judge`."""

    rows: int  # query vectors, at most HEADS
    pages: int  # at most LANES
    places: Address  # int64 `[pages]`, where the sketches are
    ahead: Address  # int64 `[pages]`, those to fetch meanwhile
    scanned: int  # bytes of a sketch that are read, and fetched
    steps_at: int  # bytes to the steps of a sketch
    strips: int  # of 16 * unit tokens
    d: int
    floats: Address  # float32 `[rows, d]`
    panel: Address  # scratch, int8 `[rows, d]`: the queries times steps and inverses, in whole numbers
    inverses: Address  # as `settle_bounds` leaves them, of the first query vector and page
    factors: Address  # likewise
    bases: Address  # likewise
    logits: Address  # written: float32 `[rows, LANES, 16 * unit * strips]`
    tops: Address  # written: a row with the largest logit in each lane


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def judge(context: Any, unit: Any, operands: Any) -> Any:
    """Logits of some query vectors against the keys of some pages, from their codes. operands: `Judge`."""
    (width,) = literals(unit)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        _Judgement(e, width, unpack(Judge, context, e, signature.args[1], args[1])).emit()
        return context.get_dummy_value()

    return types.void(unit, operands), emit


class _Judgement:
    """What `judge` emits."""

    def __init__(self, e: Emitter, width: int, operands: Judge) -> None:
        self.e, self.b, self.o, self.width = e, e.b, operands, width
        o, b = operands, e.b
        self.lines = b.lshr(o.d, I64(2 if width == 2 else 3))
        self.size = b.mul(o.strips, I64(width * LINE))  # of a page's logits
        self.others = b.lshr(b.sub(o.scanned, o.steps_at), I64(6))  # lines without codes, all but parts of one

    def emit(self) -> None:
        self.e.choose(self.o.rows, CASES, self.tile)

    def tile(self, count: int) -> None:
        self.e.loop(self.o.pages, [], partial(self.page, count))

    def page(self, count: int, p: Value) -> list[Value]:
        e, b, o = self.e, self.b, self.o
        offset = b.shl(p, I64(2))
        near, far = (e.pointer(e.load(e.at(x, b.shl(p, I64(3))), I64, 8)) for x in (o.places, o.ahead))
        self.make_panel(count, e.at(near, o.steps_at), offset)
        factors, bases = self.splats(count, o.factors, offset), self.splats(count, o.bases, offset)
        worth = [[f, b.fmul(f, e.number(1 / 16))] for f in factors]
        target = e.at(o.logits, b.mul(p, self.size))

        def strip(i: Value, near: Value, far: Value, *tops: Value) -> list[Value]:
            carried = [near, far, o.panel] + [e.bits(0)] * (self.width * count)
            near, far, _, *sums = e.loop(self.lines, carried, partial(self.line, count))
            start, new = b.mul(i, I64(self.width * LINE)), []
            for r in range(count):
                top, position = tops[r], b.add(start, b.mul(self.size, I64(LANES * r)))
                for u in range(self.width):
                    x = e.fma(b.sitofp(sums[self.width * r + u], VF), worth[r][u], bases[r])
                    e.store(x, e.at(target, b.add(position, I64(LINE * u))))
                    top = e.larger(x, top)
                new.append(top)
            return [near, far, *new]

        def fetch(i: Value, far: Value) -> list[Value]:
            e.fetch(far)
            return [e.at(far, LINE)]

        _, far, *tops = e.loop(o.strips, [near, far] + [e.number(float("-inf"))] * count, strip)
        e.loop(self.others, [far], fetch)
        for r in range(count):
            e.store(tops[r], e.at(o.tops, b.add(b.shl(p, I64(6)), I64(LINE * LANES * r))))
        return []

    def splats(self, count: int, numbers: Value, at: Value) -> list[Value]:
        """Of each query vector its float32 for the page that stands `at` bytes on."""
        e, b = self.e, self.b
        return [e.splat(e.load(e.at(numbers, b.add(at, I64(4 * LANES * r))), F32)) for r in range(count)]

    def make_panel(self, count: int, steps: Value, at: Value) -> None:
        e, b, o = self.e, self.b, self.o
        inverses = self.splats(count, o.inverses, at)

        def chunk(i: Value) -> list[Value]:
            step = from_half(e, e.load(e.at(steps, b.shl(i, I64(5))), VS, 2))
            for r in range(count):
                place = b.add(b.shl(i, I64(4)), b.mul(o.d, I64(r)))
                x = b.fmul(step, e.load(e.at(o.floats, b.shl(place, I64(2))), VF))
                x = b.bitcast(e.fma(x, inverses[r], e.number(MAGIC)), VI)
                e.store(b.trunc(x, VY), e.at(o.panel, place), 1)
            return []

        e.loop(b.lshr(o.d, I64(4)), [], chunk)

    def line(self, count: int, j: Value, near: Value, far: Value, place: Value, *sums: Value) -> list[Value]:
        """Line j of a strip's codes: add its products with the panel to the sums."""
        e, b, width = self.e, self.b, self.width
        e.fetch(far)
        stored, new = e.load(near, VI), list(sums)
        parts = [b.and_(stored, e.bits(0x0F0F0F0F)), b.and_(stored, e.bits(0xF0F0F0F0))]
        if width == 1:
            parts[1] = b.lshr(parts[1], e.bits(4))
        for r in range(count):
            row_place = e.at(place, b.mul(self.o.d, I64(r)))
            for half in range(2):
                word = e.splat(e.load(row_place if width == 2 or half == 0 else e.at(row_place, 4), I32))
                slot = width * r + (half if width == 2 else 0)
                new[slot] = e.add_fours(new[slot], parts[half], word)
        return [e.at(near, LINE), e.at(far, LINE), e.at(place, 8 // width), *new]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def crest(context: Any, numbers: Any, vectors: Any, top: Any) -> Any:
    """top <- the largest of 16 * vectors floats in each lane."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        numbers = e.pointer(args[0])

        def step(i: Value, top: Value) -> list[Value]:
            return [e.larger(e.load(e.at(numbers, b.shl(i, I64(6))), VF), top)]

        (top,) = e.loop(args[1], [e.number(float("-inf"))], step)
        e.store(top, e.pointer(args[2]))
        return context.get_dummy_value()

    return signature_of([], 3), emit


class Masses(NamedTuple):
    """The operands of `masses`."""

    tops: Address  # the rows of `judge` of one query vector, overwritten
    logits: Address  # float32 `[pages, 16 * unit * strips]`
    pages: int
    strips: int
    bases: Address  # float32 `[LANES]`, what makes the result NaN where it is not finite
    out: Address  # written: float32 `[LANES]`, the logs
    weights: Address  # written: uint8 `[16 * unit * strips]` a page, 127 the largest of it
    stride: int  # bytes from the weights of one page to those of the next


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def masses(context: Any, unit: Any, operands: Any) -> Any:
    """The log of the sum of 2^x over the logits of each page, and the weight of each. operands: `Masses`."""
    (width,) = literals(unit)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        o = unpack(Masses, context, e, signature.args[1], args[1])
        tops, out, strips = o.tops, o.out, o.strips
        peaks = tree(e, tops, VF, e.larger)
        e.store(peaks, out)

        def page(p: Value, place: Value) -> list[Value]:
            peak = e.splat(e.load(e.at(out, b.shl(p, I64(2))), F32))
            weights = e.at(o.weights, b.mul(p, o.stride))

            def step(i: Value, place: Value, *totals: Value) -> list[Value]:
                powers = [_exp2(e, b.fsub(e.load(e.at(place, LINE * u), VF), peak)) for u in range(width)]
                for u, x in enumerate(powers):
                    codes = b.bitcast(e.fma(x, e.number(127.0), e.number(MAGIC)), VI)
                    offset = b.add(b.mul(i, I64(LANES * width)), I64(LANES * u))
                    e.store(b.trunc(codes, VY), e.at(weights, offset), 1)
                return [e.at(place, LINE * width), *(b.fadd(t, x) for t, x in zip(totals, powers, strict=True))]

            place, *totals = e.loop(strips, [place] + [e.number(0.0)] * width, step)
            total = totals[0] if width == 1 else b.fadd(*totals)
            e.store(total, e.at(tops, b.shl(p, I64(6))))
            return [place]

        e.loop(o.pages, [o.logits], page)
        log = b.fadd(peaks, _log2(e, tree(e, tops, VF, b.fadd)))
        nothing = b.fmul(e.load(o.bases, VF), e.number(0.0))
        e.store(e.fma(log, e.number(1 / LOG2E), nothing), out)
        return context.get_dummy_value()

    return types.void(unit, operands), emit


def _exp2(e: Emitter, x: Value) -> Value:
    """2 ** x to 1.8e-3, far less than the codes' error: a minimax polynomial of relative error where one instruction
    takes the fraction and one multiplies by a power of two, which is most of the work; else as exactly as always."""
    if not cpu_has("avx512dq"):
        return e.exp2(x)
    every, as_is, floor = ir.IntType(16)(-1), I32(4), I32(1)
    fraction = e.call("llvm.x86.avx512.mask.reduce.ps.512", VF, x, floor, x, every, as_is)
    result = e.number(EXP2[0])
    for c in EXP2[1:]:
        result = e.fma(result, fraction, e.number(c))
    return e.call("llvm.x86.avx512.mask.scalef.ps.512", VF, result, x, x, every, as_is)


def _log2(e: Emitter, x: Value) -> Value:
    """log2(x) to 2e-7, for x of at least 2^-126: exponent, and a Chebyshev polynomial of the fraction."""
    b = e.b
    bits = b.bitcast(x, VI)
    exponent = b.sitofp(b.sub(b.lshr(bits, e.bits(23)), e.bits(127)), VF)
    mantissa = b.bitcast(b.or_(b.and_(bits, e.bits(0x7FFFFF)), e.bits(0x3F800000)), VF)
    w = b.fsub(mantissa, e.number(1.0))
    series = e.number(-0.012077020234711909)
    for c in (
        0.0627484334406473,
        -0.15415200623469044,
        0.25517634906150993,
        -0.35309635327795946,
        0.4800124607817127,
        -0.7213067574267126,
        1.4426947245903081,
    ):
        series = e.fma(series, w, e.number(c))
    return e.fma(series, w, exponent)
