"""The inner loops that choose pages by their mass, as LLVM IR over vectors of 16 floats.

Each public function is a numba intrinsic over int64 addresses and sizes. It works on rows of numbers, one a page.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from lamina_kernels.cpu.emitter import F32, I64, VF, Emitter, Value
from lamina_kernels.cpu.intrinsics import LOG2E, literals

FEW = 4  # query heads whose sums are made together


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
    context: Any, squared: Any, rows: Any, scores: Any, limit: Any, numbers: Any, stride: Any, vectors: Any, most: Any
) -> Any:
    """1 if in each of up to FEW rows of 16 * vectors numbers, `stride` bytes apart, those whose score is below `limit`,
    or with the constant `squared` 1 their squares, sum to at most `most`; else, or where a sum is NaN, 0."""
    (power,) = literals(squared)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        rows, scores, limit, numbers = args[1], e.pointer(args[2]), e.splat(args[3]), e.pointer(args[4])
        stride, vectors, most = args[5:]
        result = cgutils.alloca_once(builder, I64)

        def tile(count: int) -> None:
            def step(i: Value, *totals: Value) -> list[Value]:
                at = b.shl(i, I64(6))
                below = b.fcmp_ordered("<", e.load(e.at(scores, at), VF), limit)
                own = [e.load(e.at(numbers, b.add(at, b.mul(stride, I64(r)))), VF) for r in range(count)]
                parts = [b.select(below, x, e.number(0.0)) for x in own]
                factors = parts if power else [e.number(1.0)] * count
                return [e.fma(x, y, total) for x, y, total in zip(parts, factors, totals, strict=True)]

            totals = e.loop(vectors, [e.number(0.0)] * count, step)
            fits = ir.IntType(1)(1)
            for total in totals:
                whole = e.call("llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), total)
                fits = b.and_(fits, b.fcmp_ordered("<=", whole, most))
            b.store(b.zext(fits, I64), result)

        e.choose(rows, range(1, FEW + 1), tile)
        return b.load(result, typ=I64)

    return types.int64(squared, types.int64, types.int64, types.float32, *[types.int64] * 3, types.float32), emit
