"""The inner loops that choose pages by their mass, and that add up the values of the pages that are not read exactly.

These pages count by their means (`blend_means`) or by their 4-bit codes (`blend_codes`). All loops are LLVM IR over
vectors of 16 floats, and work on rows of numbers, one a page. Each public function is a numba intrinsic over int64
addresses and sizes. `SketchLayout` says how a sketch is laid out.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from lamina_kernels.compile.emitter import F32, I32, I64, LANES, VF, VI, VS, VY, Emitter, Value
from lamina_kernels.compile.intrinsics import LOG2E, Address, from_half, literals, unpack
from lamina_kernels.compile.trees import LINE

FEW = 4  # query heads whose sums of means are made together
HEADS = 8  # and of codes
CASES = tuple(range(1, HEADS + 1))
AHEAD = 12  # pages that are fetched before they are needed


class BlendMeans(NamedTuple):
    """The operands of `blend_means`."""

    rows: int  # query vectors, at most FEW
    n: int  # pages
    entries: Address  # int32 `[n + AHEAD]`, of the table
    table: Address  # int32
    means: int  # where the mean of page 0 is, bfloat16 `[d]`
    scanned_bytes: int
    d: int
    weights: Address  # float32, one an entry, those of the query vectors `stride` bytes apart
    stride: int
    sums: Address  # written: float32 `[rows, d]`
    totals: Address  # written: float32 `[rows]`


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def blend_means(context: Any, operands: Any) -> Any:
    """The weighted sum of the means of n pages, and of their weights, for some query vectors. operands:
    `BlendMeans`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        _Blend(e, unpack(BlendMeans, context, e, signature.args[0], args[0])).emit()
        return context.get_dummy_value()

    return types.void(operands), emit


class _Blend:
    """What `blend_means` emits."""

    def __init__(self, e: Emitter, operands: BlendMeans) -> None:
        self.e, self.b, self.o = e, e.b, operands

    def emit(self) -> None:
        self.e.choose(self.o.rows, range(1, FEW + 1), self.tile)

    def tile(self, count: int) -> None:
        e, b = self.e, self.b
        quads, remainder = b.lshr(self.o.d, I64(6)), b.and_(b.lshr(self.o.d, I64(4)), I64(3))
        with b.if_then(b.icmp_signed(">", quads, I64(0))):
            e.loop(quads, [], lambda i: self.columns(count, 4, b.shl(i, I64(2))))
        with b.if_then(b.icmp_signed(">", remainder, I64(0))):
            e.loop(remainder, [], lambda i: self.columns(count, 1, b.add(b.shl(quads, I64(2)), i)))

    def columns(self, count: int, chunks: int, first: Value) -> list[Value]:
        """`chunks` registers of channels from number `first` on."""
        e, b, o = self.e, self.b, self.o

        def step(i: Value, *carried: Value) -> list[Value]:
            place = e.at(o.entries, b.shl(i, I64(2)))
            entry, later = (b.sext(e.load(e.at(place, 4 * k), I32), I64) for k in (0, AHEAD))
            far = self.mean_of(later, first)
            for line in range(0, 32 * chunks, 64):
                e.fetch(e.at(far, line))
            near = self.mean_of(entry, first)
            x = [from_half(e, e.load(e.at(near, 32 * c), VS, 2)) for c in range(chunks)]
            weight = e.at(o.weights, b.shl(entry, I64(2)))
            weights = [e.splat(e.load(e.at(weight, b.mul(o.stride, I64(r))), F32)) for r in range(count)]
            new = [b.fadd(w, total) for w, total in zip(weights, carried[:count], strict=True)]
            terms = [(w, y) for w in weights for y in x]
            return new + [e.fma(w, y, s) for (w, y), s in zip(terms, carried[count:], strict=True)]

        sums = e.loop(o.n, [e.number(0.0)] * (count + count * chunks), step)
        for r in range(count):
            e.store(b.extract_element(sums[r], I32(0)), e.at(o.totals, 4 * r))
            for c in range(chunks):
                offset = b.shl(b.add(b.mul(o.d, I64(r)), b.shl(b.add(first, I64(c)), I64(4))), I64(2))
                e.store(sums[count + r * chunks + c], e.at(o.sums, offset))
        return []

    def mean_of(self, entry: Value, first: Value) -> Value:
        """Where the mean of an entry's page has register `first`."""
        e, b, o = self.e, self.b, self.o
        page = b.sext(e.load(e.at(o.table, b.shl(entry, I64(2))), I32), I64)
        return e.at(e.pointer(b.add(o.means, b.mul(page, o.scanned_bytes))), b.shl(first, I64(5)))


class BlendCodes(NamedTuple):
    """The operands of `blend_codes`."""

    rows: int  # query vectors, at most HEADS
    n: int  # pages
    entries: Address  # int32 `[n + AHEAD]`, of the table
    table: Address  # int32
    values: int  # where the values' codes of page 0 are
    value_bytes: int
    size: int  # tokens of a page
    d: int
    steps_at: int  # bytes from the codes to the steps, behind which the lows stand
    bytes: Address  # the weights of the tokens in each page, uint8 `[size]`, those of query vectors side by side
    bytes_stride: int  # of those of an entry
    weights: Address  # float32, one an entry, those of the query vectors `stride` bytes apart
    stride: int
    sums: Address  # float32 `[rows, d]`, added to
    totals: Address  # float32 `[rows]`, added to


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def blend_codes(context: Any, operands: Any) -> Any:
    """sums += weight * the mean of a page's values as their codes have them, each token by its own weight, over n
    pages; totals += weight. operands: `BlendCodes`. More than 4 rows are computed as HEADS."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        o = unpack(BlendCodes, context, e, signature.args[0], args[0])
        e.choose(o.rows, CASES, lambda count: _CodeBlend(e, o, count).emit())
        return context.get_dummy_value()

    return types.void(operands), emit


class _CodeBlend:
    """What `blend_codes` emits for so many query vectors."""

    def __init__(self, e: Emitter, operands: BlendCodes, count: int) -> None:
        self.e, self.b, self.o, self.count = e, e.b, operands, count
        self.row_bytes = self.b.shl(operands.d, I64(2))

    def emit(self) -> None:
        self.e.loop(self.o.n, [], self.page)

    def page(self, i: Value) -> list[Value]:
        e, b, o = self.e, self.b, self.o
        place = e.at(o.entries, b.shl(i, I64(2)))
        entry, later = (b.sext(e.load(e.at(place, 4 * k), I32), I64) for k in (0, AHEAD))
        codes, tokens = self.codes_of(entry), e.at(o.bytes, b.mul(entry, o.bytes_stride))
        weight = e.at(o.weights, b.shl(entry, I64(2)))
        shares, units = [], []
        for r in range(self.count):
            share = e.load(e.at(weight, b.mul(o.stride, I64(r))), F32)
            total = e.at(o.totals, 4 * r)
            e.store(b.fadd(e.load(total, F32), share), total)
            shares.append(e.splat(share))
            units.append(e.splat(b.fdiv(share, self.sum_of(e.at(tokens, b.mul(o.size, I64(r)))))))
        steps, carried = e.at(codes, o.steps_at), [codes, self.codes_of(later)]
        _, far = e.loop(b.lshr(o.d, I64(4)), carried, partial(self.channels, steps, tokens, shares, units))
        e.loop(b.lshr(b.sub(o.value_bytes, o.steps_at), I64(6)), [far], lambda _, line: self.fetch(line))
        return []

    def fetch(self, at: Value) -> list[Value]:
        self.e.fetch(at)
        return [self.e.at(at, LINE)]

    def sum_of(self, tokens: Value) -> Value:
        """The sum of the weights of a page's tokens, which are at most 127 each, as a float."""
        e, b = self.e, self.b
        zeros = ir.Constant(VS, [ir.Constant(ir.IntType(16), 0)] * LANES)

        def step(i: Value, total: Value) -> list[Value]:
            return [b.add(total, b.zext(e.load(e.at(tokens, b.shl(i, I64(4))), VY, 1), VS))]

        (total,) = e.loop(b.lshr(self.o.size, I64(4)), [zeros], step)
        return b.uitofp(e.call("llvm.vector.reduce.add.v16i16", ir.IntType(16), total), F32)

    def channels(
        self, steps: Value, tokens: Value, shares: list[Value], units: list[Value], c: Value, codes: Value, far: Value
    ) -> list[Value]:
        """Register c of channels: add its values to the sums."""
        e, b, o, count = self.e, self.b, self.o, self.count
        begin = [codes, far, tokens] + [e.bits(0)] * (2 * count)
        codes, far, _, *sums = e.loop(b.lshr(o.size, I64(4)), begin, self.lines)
        offset = b.shl(c, I64(5))
        step, low = (from_half(e, e.load(e.at(p, offset), VS, 2)) for p in (steps, e.at(steps, b.shl(o.d, I64(1)))))
        for r in range(count):
            place = e.at(o.sums, b.add(b.mul(self.row_bytes, I64(r)), b.shl(c, I64(6))))
            product = b.sitofp(b.add(sums[2 * r], b.ashr(sums[2 * r + 1], e.bits(4))), VF)
            total = e.fma(low, shares[r], e.load(place, VF))
            e.store(e.fma(product, b.fmul(step, units[r]), total), place)
        return [codes, far]

    def lines(self, j: Value, codes: Value, far: Value, tokens: Value, *sums: Value) -> list[Value]:
        """Two lines of codes, of 16 tokens. The high halves are summed as they stand: 16 times what they are."""
        e, b, new = self.e, self.b, list(sums)
        for k in range(2):
            e.fetch(e.at(far, LINE * k))
            stored = e.load(e.at(codes, LINE * k), VI)
            for half, mask in enumerate((0x0F0F0F0F, 0xF0F0F0F0)):
                part = b.and_(stored, e.bits(mask))
                for r in range(self.count):
                    offset = b.add(b.mul(self.o.size, I64(r)), I64(8 * k + 4 * half))
                    word = e.splat(e.load(e.at(tokens, offset), I32))
                    new[2 * r + half] = e.add_fours(new[2 * r + half], part, word)
        return [e.at(codes, 2 * LINE), e.at(far, 2 * LINE), e.at(tokens, 16), *new]

    def codes_of(self, entry: Value) -> Value:
        """Where the values' codes of an entry's page are."""
        e, b, o = self.e, self.b, self.o
        page = b.sext(e.load(e.at(o.table, b.shl(entry, I64(2))), I32), I64)
        return e.pointer(b.add(o.values, b.mul(page, o.value_bytes)))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def peak_of(context: Any, numbers: Any, vectors: Any) -> Any:
    """The largest of 16 * vectors floats; NaN where all are."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, numbers = Emitter(builder), args[0]
        first = e.pointer(numbers)

        def step(i: Value, top: Value) -> list[Value]:
            return [e.larger(e.load(e.at(first, builder.shl(i, I64(6))), VF), top)]

        (top,) = e.loop(args[1], [e.load(first, VF)], step)
        return e.call("llvm.vector.reduce.fmax.v16f32", F32, top)

    return types.float32(types.int64, types.int64), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def powers(context: Any, logs: Any, vectors: Any, shift: Any, out: Any) -> Any:
    """out <- e^(x - shift) over 16 * vectors floats; returns their sum."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        logs, vectors, shift, out = e.pointer(args[0]), args[1], e.splat(args[2]), e.pointer(args[3])

        def step(i: Value, total: Value) -> list[Value]:
            offset = b.shl(i, I64(6))
            y = e.exp2(b.fmul(b.fsub(e.load(e.at(logs, offset), VF), shift), e.number(LOG2E)))
            e.store(y, e.at(out, offset))
            return [b.fadd(total, y)]

        (total,) = e.loop(vectors, [e.number(0.0)], step)
        return e.call("llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), total)

    return types.float32(types.int64, types.int64, types.float32, types.int64), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def normalise(context: Any, numbers: Any, vectors: Any, factor: Any, scores: Any) -> Any:
    """x <- factor * x over 16 * vectors floats, and score <- the larger of it and that, or that if it is NaN."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        numbers, vectors, factor, scores = e.pointer(args[0]), args[1], e.splat(args[2]), e.pointer(args[3])

        def step(i: Value) -> list[Value]:
            offset = b.shl(i, I64(6))
            x, score = b.fmul(e.load(e.at(numbers, offset), VF), factor), e.load(e.at(scores, offset), VF)
            e.store(x, e.at(numbers, offset))
            e.store(b.select(b.fcmp_ordered("<=", x, score), score, x), e.at(scores, offset))
            return []

        e.loop(vectors, [], step)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def all_fit(
    context: Any, squared: Any, rows: Any, scores: Any, limit: Any, numbers: Any, stride: Any, vectors: Any, most: Any
) -> Any:
    """1 if in each of up to FEW rows of 16 * vectors numbers, `stride` bytes apart, those whose score is below `limit`,
    or with the constant `squared` 1 their squares, sum to at most `most`; else, or where a sum is NaN, 0."""
    (power,) = literals(squared)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        rows, scores, limit, numbers = args[1], e.pointer(args[2]), e.splat(args[3]), e.pointer(args[4])
        stride, vectors, ceiling = args[5:]
        result = cgutils.alloca_once(builder, I64)

        def tile(count: int) -> None:
            def step(i: Value, *totals: Value) -> list[Value]:
                offset = b.shl(i, I64(6))
                below = b.fcmp_ordered("<", e.load(e.at(scores, offset), VF), limit)
                shares = [e.load(e.at(numbers, b.add(offset, b.mul(stride, I64(r)))), VF) for r in range(count)]
                parts = [b.select(below, x, e.number(0.0)) for x in shares]
                factors = parts if power else [e.number(1.0)] * count
                return [e.fma(x, y, total) for x, y, total in zip(parts, factors, totals, strict=True)]

            totals = e.loop(vectors, [e.number(0.0)] * count, step)
            fits = ir.IntType(1)(1)
            for total in totals:
                row_sum = e.call("llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), total)
                fits = b.and_(fits, b.fcmp_ordered("<=", row_sum, ceiling))
            b.store(b.zext(fits, I64), result)

        e.choose(rows, range(1, FEW + 1), tile)
        return b.load(result, typ=I64)

    return types.int64(squared, types.int64, types.int64, types.float32, *[types.int64] * 3, types.float32), emit
