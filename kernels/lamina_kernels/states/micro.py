"""The inner loops of state layers, written as LLVM IR over vectors of 16 floats.

Each public function is a numba intrinsic: called from compiled code, it is emitted in place. Addresses, strides in
bytes and counts are int64; `vectors`, `share`, `rows` and `streaming` are compile-time constants. Numbers are float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from lamina_kernels.compile.emitter import F32, I32, I64, VF, VH, VS, Emitter, Value, fetches_near
from lamina_kernels.compile.intrinsics import LOG2E, Address, from_half, literals, to_half, unpack

LN2 = 0.6931471805599453


class Read(NamedTuple):
    """The operands of `read_state`."""

    state: Address
    stride: int  # from one row of the state to the next
    rows: int
    ahead: Address  # memory to be fetched meanwhile, half as much as is read
    weights: Address  # `[rows]`
    out: Address  # `[16 * vectors]`


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def read_state(context: Any, vectors: Any, operands: Any) -> Any:
    """out = sum over rows of weight * row, of 16 * vectors columns. operands: `Read`."""
    (width,) = literals(vectors)
    fetched = -(-width // 2)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        o = unpack(Read, context, e, signature.args[1], args[1])

        def step(i: Value, row: Value, far: Value, *sums: Value) -> list[Value]:
            for line in range(fetched):
                e.fetch(e.at(far, 64 * line), fetches_near())
            weight = e.splat(e.load(e.at(o.weights, builder.shl(i, I64(2))), F32))
            new = [e.fma(weight, e.load(e.at(row, 64 * v), VF), total) for v, total in enumerate(sums)]
            return [e.at(row, o.stride), e.at(far, 64 * fetched), *new]

        for v, total in enumerate(e.loop(o.rows, [o.state, o.ahead, *[e.number(0.0)] * width], step)[2:]):
            e.store(total, e.at(o.out, 64 * v))
        return context.get_dummy_value()

    return types.void(vectors, operands), emit


class Write(NamedTuple):
    """The operands of `write_state`."""

    state: Address
    target: Address  # the new state, which may be `state`
    stride: int  # from one row of a state to the next
    rows: int
    ahead: Address  # memory to be fetched meanwhile
    decays: Address  # `[rows]`, and so are keys and queries
    keys: Address
    queries: Address
    change: Address  # `[16 * vectors]`, and so is out
    out: Address


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def write_state(context: Any, vectors: Any, share: Any, streaming: Any, operands: Any) -> Any:
    """row = decay * row + key * change; out = sum over rows of query * new row, of 16 * vectors columns.

    1 / share as much is fetched ahead as is read. streaming: 1 writes past the caches, to a target aligned to 64 bytes
    that is not the state. operands: `Write`.
    """
    width, part, past = literals(vectors, share, streaming)
    fetched = -(-width // part)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        o = unpack(Write, context, e, signature.args[3], args[3])
        changes = [e.load(e.at(o.change, 64 * v), VF) for v in range(width)]

        def step(i: Value, row: Value, target: Value, far: Value, *sums: Value) -> list[Value]:
            offset, new = builder.shl(i, I64(2)), []
            decay, key, query = (e.splat(e.load(e.at(p, offset), F32)) for p in (o.decays, o.keys, o.queries))
            for line in range(fetched):
                e.fetch(e.at(far, 64 * line), fetches_near())
            for v, total in enumerate(sums):
                remainder = builder.fmul(decay, e.load(e.at(row, 64 * v), VF))
                value = e.fma(key, changes[v], remainder)
                if past:
                    store = builder.store(value, e.at(target, 64 * v), align=64)
                    store.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
                else:
                    e.store(value, e.at(target, 64 * v))
                new.append(e.fma(query, value, total))
            return [e.at(row, o.stride), e.at(target, o.stride), e.at(far, 64 * fetched), *new]

        first = [o.state, o.target, o.ahead, *[e.number(0.0)] * width]
        for v, total in enumerate(e.loop(o.rows, first, step)[3:]):
            e.store(total, e.at(o.out, 64 * v))
        return context.get_dummy_value()

    return types.void(vectors, share, streaming, operands), emit


class Multiply(NamedTuple):
    """The operands of `multiply_tile`."""

    steps: int
    a: Address
    a_row: int
    b: Address
    b_row: int
    c: Address
    c_row: int


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def multiply_tile(context: Any, rows: Any, vectors: Any, operands: Any) -> Any:
    """C += A B, for C `[rows, 16 * vectors]` and A `[rows, steps]`. operands: `Multiply`."""
    height, width = literals(rows, vectors)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        o = unpack(Multiply, context, e, signature.args[2], args[2])
        lines = [e.at(o.c, builder.mul(o.c_row, I64(r))) for r in range(height)]
        places = [e.at(line, 64 * v) for line in lines for v in range(width)]
        offsets = [builder.mul(o.a_row, I64(r)) for r in range(height)]

        def step(i: Value, a: Value, b: Value, *sums: Value) -> list[Value]:
            columns = [e.load(e.at(b, 64 * v), VF) for v in range(width)]
            rows = [e.splat(e.load(e.at(a, offset), F32)) for offset in offsets]
            pairs = [(x, y) for x in rows for y in columns]
            new = [e.fma(x, y, total) for (x, y), total in zip(pairs, sums, strict=True)]
            return [e.at(a, 4), e.at(b, o.b_row), *new]

        sums = e.loop(o.steps, [o.a, o.b, *(e.load(place, VF) for place in places)], step)[2:]
        for place, total in zip(places, sums, strict=True):
            e.store(total, place)
        return context.get_dummy_value()

    return types.void(rows, vectors, operands), emit


class Convolve(NamedTuple):
    """The operands of `convolve`."""

    taps: int
    inputs: Address  # `[taps, 16 * n]`, rows `stride` apart
    stride: int
    weights: Address  # likewise, rows `weight_stride` apart
    weight_stride: int
    bias: Address  # `[16 * n]`, and so is out
    out: Address
    n: int


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def convolve(context: Any, operands: Any) -> Any:
    """out = SiLU(bias + sum over taps of weight * input). operands: `Convolve`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        o = unpack(Convolve, context, e, signature.args[0], args[0])

        def one(i: Value) -> list[Value]:
            offset = builder.shl(i, I64(6))

            def tap(_: Value, x: Value, weight: Value, total: Value) -> list[Value]:
                new = e.fma(e.load(weight, VF), e.load(x, VF), total)
                return [e.at(x, o.stride), e.at(weight, o.weight_stride), new]

            first = [e.at(o.inputs, offset), e.at(o.weights, offset), e.load(e.at(o.bias, offset), VF)]
            x = e.loop(o.taps, first, tap)[2]
            low = builder.select(builder.fcmp_ordered("<", x, e.number(-87.0)), e.number(-87.0), x)  # NaN stays
            power = e.exp2(builder.fmul(low, e.number(-LOG2E)))
            e.store(builder.fdiv(low, builder.fadd(power, e.number(1.0))), e.at(o.out, offset))
            return []

        e.loop(o.n, [], one)
        return context.get_dummy_value()

    return types.void(operands), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def normalise(context: Any, x: Any, n: Any, epsilon: Any, scale: Any) -> Any:
    """x *= scale / sqrt(sum of x^2 + epsilon), for 16 * n numbers."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        address, n, epsilon, scale = args
        x = e.pointer(address)

        def add(i: Value, total: Value) -> list[Value]:
            value = e.load(e.at(x, builder.shl(i, I64(6))), VF)
            return [e.fma(value, value, total)]

        (total,) = e.loop(n, [e.number(0.0)], add)
        length = e.call("llvm.vector.reduce.fadd.v16f32", F32, epsilon, total)
        factor = e.splat(builder.fdiv(scale, e.call("llvm.sqrt.f32", F32, length)))

        def apply(i: Value) -> list[Value]:
            place = e.at(x, builder.shl(i, I64(6)))
            e.store(builder.fmul(e.load(place, VF), factor), place)
            return []

        e.loop(n, [], apply)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.float32), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def exponentials(context: Any, x: Any, out: Any, n: Any) -> Any:
    """out = e^x to 2e-7, for 16 * n numbers that are not above 0; 0 at -inf."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        x, out = e.pointer(args[0]), e.pointer(args[1])

        def one(i: Value) -> list[Value]:
            offset, least = builder.shl(i, I64(6)), e.number(-200.0)
            value = e.load(e.at(x, offset), VF)
            value = builder.select(builder.fcmp_ordered("<", value, least), least, value)
            power = builder.fmul(value, e.number(LOG2E))
            lost = e.fma(value, e.number(LOG2E), builder.fneg(power))
            error = e.fma(value, e.number(LOG2E - float(np.float32(LOG2E))), lost)
            result = e.exp2(power)
            e.store(e.fma(result, builder.fmul(error, e.number(LN2)), result), e.at(out, offset))
            return []

        e.loop(args[2], [], one)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def widen(context: Any, half: Any, source: Any, target: Any, n: Any) -> Any:
    """16 * n numbers as float32; half: 1 of float16, 0 of bfloat16."""
    (ieee,) = literals(half)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        source, target = e.pointer(args[1]), e.pointer(args[2])

        def one(i: Value) -> list[Value]:
            place = e.at(source, builder.shl(i, I64(5)))
            value = builder.fpext(e.load(place, VH, 2), VF) if ieee else from_half(e, e.load(place, VS, 2))
            e.store(value, e.at(target, builder.shl(i, I64(6))))
            return []

        e.loop(args[3], [], one)
        return context.get_dummy_value()

    return types.void(half, *[types.int64] * 3), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def narrow(context: Any, half: Any, source: Any, target: Any, n: Any) -> Any:
    """16 * n float32 numbers as float16 if `half` is 1, as bfloat16 if it is 0."""
    (ieee,) = literals(half)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        source, target = e.pointer(args[1]), e.pointer(args[2])

        def one(i: Value) -> list[Value]:
            x = e.load(e.at(source, builder.shl(i, I64(6))), VF)
            e.store(builder.fptrunc(x, VH) if ieee else to_half(e, x), e.at(target, builder.shl(i, I64(5))), 2)
            return []

        e.loop(args[3], [], one)
        return context.get_dummy_value()

    return types.void(half, *[types.int64] * 3), emit
