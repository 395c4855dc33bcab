"""The inner loops that choose pages by their mass, as LLVM IR over vectors of 16 floats.

Each public function is a numba intrinsic over int64 addresses and sizes. It works on rows of numbers, one a page, and
on the means of pages' values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from lamina_kernels.cpu.emitter import F32, I32, I64, VF, VI, VS, Emitter, Value
from lamina_kernels.cpu.intrinsics import LOG2E, Address, from_half, unpack

FEW = 4  # query heads whose sums are made together
AHEAD = 12  # means that are fetched before they are needed


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
            at = b.shl(i, I64(6))
            y = e.exp2(b.fmul(b.fsub(e.load(e.at(logs, at), VF), shift), e.number(LOG2E)))
            e.store(y, e.at(out, at))
            return [b.fadd(total, y)]

        (total,) = e.loop(vectors, [e.number(0.0)], step)
        return e.call("llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), total)

    return types.float32(types.int64, types.int64, types.float32, types.int64), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def multiply(context: Any, numbers: Any, vectors: Any, factor: Any) -> Any:
    """x <- factor * x over 16 * vectors floats."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        numbers, factor = e.pointer(args[0]), e.splat(args[2])

        def step(i: Value) -> list[Value]:
            place = e.at(numbers, builder.shl(i, I64(6)))
            e.store(builder.fmul(e.load(place, VF), factor), place)
            return []

        e.loop(args[1], [], step)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def normalise(context: Any, numbers: Any, vectors: Any, factor: Any, scores: Any) -> Any:
    """x <- factor * x over 16 * vectors floats, and score <- the larger of it and that, or that if it is NaN."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        numbers, vectors, factor, scores = e.pointer(args[0]), args[1], e.splat(args[2]), e.pointer(args[3])

        def step(i: Value) -> list[Value]:
            at = b.shl(i, I64(6))
            x, own = b.fmul(e.load(e.at(numbers, at), VF), factor), e.load(e.at(scores, at), VF)
            e.store(x, e.at(numbers, at))
            e.store(b.select(b.fcmp_ordered("<=", x, own), own, x), e.at(scores, at))
            return []

        e.loop(vectors, [], step)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def all_fit(
    context: Any, rows: Any, scores: Any, limit: Any, numbers: Any, stride: Any, vectors: Any, most: Any
) -> Any:
    """1 if in each of up to FEW rows of 16 * vectors numbers, `stride` bytes apart, those whose score is below `limit`
    sum to at most `most`; else, or where a sum is NaN, 0."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        rows, scores, limit, numbers = args[0], e.pointer(args[1]), e.splat(args[2]), e.pointer(args[3])
        stride, vectors, most = args[4:]
        result = cgutils.alloca_once(builder, I64)

        def tile(count: int) -> None:
            def step(i: Value, *totals: Value) -> list[Value]:
                at = b.shl(i, I64(6))
                below = b.fcmp_ordered("<", e.load(e.at(scores, at), VF), limit)
                own = [e.load(e.at(numbers, b.add(at, b.mul(stride, I64(r)))), VF) for r in range(count)]
                parts = [b.select(below, x, e.number(0.0)) for x in own]
                return [b.fadd(total, x) for total, x in zip(totals, parts, strict=True)]

            totals = e.loop(vectors, [e.number(0.0)] * count, step)
            fits = ir.IntType(1)(1)
            for total in totals:
                whole = e.call("llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), total)
                fits = b.and_(fits, b.fcmp_ordered("<=", whole, most))
            b.store(b.zext(fits, I64), result)

        e.choose(rows, range(1, FEW + 1), tile)
        return b.load(result, typ=I64)

    return types.int64(types.int64, types.int64, types.float32, *[types.int64] * 3, types.float32), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def count_below(context: Any, scores: Any, limit: Any, vectors: Any) -> Any:
    """How many of 16 * vectors scores are below `limit`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        scores, limit = e.pointer(args[0]), e.splat(args[1])

        def step(i: Value, total: Value) -> list[Value]:
            below = b.fcmp_ordered("<", e.load(e.at(scores, b.shl(i, I64(6))), VF), limit)
            return [b.add(total, b.zext(below, VI))]

        (total,) = e.loop(args[2], [e.bits(0)], step)
        return b.sext(e.call("llvm.vector.reduce.add.v16i32", I32, total), I64)

    return types.int64(types.int64, types.float32, types.int64), emit


class BlendMeans(NamedTuple):
    """The operands of `blend_means`."""

    rows: int  # query vectors, at most FEW
    n: int  # pages
    entries: Address  # int32 `[n + AHEAD]`, of the table
    table: Address  # int32
    means: int  # where the mean of page 0 is, bfloat16 `[d]`
    sketch_bytes: int
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
        whole, left = b.lshr(self.o.d, I64(6)), b.and_(b.lshr(self.o.d, I64(4)), I64(3))
        with b.if_then(b.icmp_signed(">", whole, I64(0))):
            e.loop(whole, [], lambda i: self.columns(count, 4, b.shl(i, I64(2))))
        with b.if_then(b.icmp_signed(">", left, I64(0))):
            e.loop(left, [], lambda i: self.columns(count, 1, b.add(b.shl(whole, I64(2)), i)))

    def columns(self, count: int, chunks: int, first: Value) -> list[Value]:
        """`chunks` registers of channels from number `first` on."""
        e, b, o = self.e, self.b, self.o

        def step(i: Value, *carried: Value) -> list[Value]:
            place = e.at(o.entries, b.shl(i, I64(2)))
            entry, later = (b.sext(e.load(e.at(place, 4 * k), I32), I64) for k in (0, AHEAD))
            far = self.mean_of(later, first)
            for at in range(0, 32 * chunks, 64):
                e.fetch(e.at(far, at))
            near = self.mean_of(entry, first)
            x = [from_half(e, e.load(e.at(near, 32 * c), VS, 2)) for c in range(chunks)]
            weight = e.at(o.weights, b.shl(entry, I64(2)))
            own = [e.splat(e.load(e.at(weight, b.mul(o.stride, I64(r))), F32)) for r in range(count)]
            new = [b.fadd(w, total) for w, total in zip(own, carried[:count], strict=True)]
            terms = [(w, y) for w in own for y in x]
            return new + [e.fma(w, y, s) for (w, y), s in zip(terms, carried[count:], strict=True)]

        found = e.loop(o.n, [e.number(0.0)] * (count + count * chunks), step)
        for r in range(count):
            e.store(b.extract_element(found[r], I32(0)), e.at(o.totals, 4 * r))
            for c in range(chunks):
                at = b.shl(b.add(b.mul(o.d, I64(r)), b.shl(b.add(first, I64(c)), I64(4))), I64(2))
                e.store(found[count + r * chunks + c], e.at(o.sums, at))
        return []

    def mean_of(self, entry: Value, first: Value) -> Value:
        """Where the mean of an entry's page has register `first`."""
        e, b, o = self.e, self.b, self.o
        page = b.sext(e.load(e.at(o.table, b.shl(entry, I64(2))), I32), I64)
        return e.at(e.pointer(b.add(o.means, b.mul(page, o.sketch_bytes))), b.shl(first, I64(5)))
