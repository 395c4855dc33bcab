"""The inner loops of attention on a CPU, written as LLVM IR over vectors of 16 floats.

Each public function is a numba intrinsic: called from compiled code, it is emitted in place. Addresses and sizes are
int64, `kind` and `unit` compile-time constants. Knows registers and blocks of memory; knows nothing of pages, masks,
rows or threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

from lamina_kernels.emitter import F32, I32, I64, LANES, VF, VH, VI, VS, Emitter, Kind, Value

TILE = 8  # query vectors computed together: 8 x 2 registers of logits
BLOCK = 128  # keys between two updates of the softmax
ROW = BLOCK * 4  # bytes from one query vector's logits to the next one's
LOG2E = 1.4426950408889634


def literals(*values: Any) -> list[int]:
    """The values of arguments that must be compile-time constants."""
    for value in values:
        if not isinstance(value, types.IntegerLiteral):
            raise RequireLiteralValue(f"{value} must be a compile-time constant")
    return [value.literal_value for value in values]


def _signature(literals: Sequence[Any], integers: int, floats: int = 0) -> Any:
    return types.void(*literals, *[types.int64] * integers, *[types.float32] * floats)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def pointer(context: Any, address: Any) -> Any:
    """An address as what numba's carray takes."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def take(context: Any, block: Any, index: Any) -> Any:
    """Add one to the int64 number `index` of the block at a pointer, atomically, and return what it was."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.gep(args[0], [args[1]], source_etype=I64)
        return builder.atomic_rmw("add", place, I64(1), "acq_rel")

    return types.int64(types.voidptr, types.int64), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def prefetch(context: Any, address: Any, size: Any) -> Any:
    """Ask for `size` bytes (at least 1) to be brought into the second-level cache."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        start = e.pointer(args[0])

        def line(i: Value) -> list[Value]:
            e.fetch(e.at(start, builder.shl(i, I64(6))))
            return []

        e.loop(builder.lshr(builder.add(args[1], I64(63)), I64(6)), [], line)
        return context.get_dummy_value()

    return _signature([], 2), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def dot(
    context: Any,
    kind: Any,
    unit: Any,
    rows: Any,
    panel: Any,
    keys: Any,
    ahead: Any,
    logits: Any,
    steps: Any,
    stride: Any,
    scale: Any,
) -> Any:
    """Logits of up to TILE query vectors against 16 * unit keys: scale * sum over d of q[d] k[d].

    panel: the queries `[steps, TILE]`, each one channel's float, or pair's; keys: `[steps, stride bytes]`, each step
    one channel, or pair, of all keys; ahead: keys to fetch meanwhile, of the same shape; logits: float32
    `[TILE, BLOCK]`, of which rows x 16 * unit are written.
    """
    code, width = literals(kind, unit)
    words = 2 if code == Kind.BFLOAT16 else 1  # of the panel a step
    size = 32 if code == Kind.FLOAT16 else 64  # bytes of 16 stored numbers, or pairs

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        rows, panel, keys, ahead, logits, steps, stride, scale = args[2:]
        panel, keys, ahead, logits = (e.pointer(a) for a in (panel, keys, ahead, logits))
        factor = e.splat(scale)

        def tile(count: int) -> None:
            def step(i: Value, q: Value, k: Value, far: Value, *sums: Value) -> list[Value]:
                for line in range(0, size * width, 64):
                    e.fetch(e.at(far, line))
                stored = [e.at(k, size * u) for u in range(width)]
                new = e.multiply_stored(code, stored, [e.at(q, 4 * words * r) for r in range(count)], sums)
                return [e.at(q, 4 * words * TILE), e.at(k, stride), e.at(far, stride), *new]

            sums = e.loop(steps, [panel, keys, ahead] + [e.number(0.0)] * (count * width), step)[3:]
            for i, total in enumerate(sums):
                e.store(builder.fmul(total, factor), e.at(logits, i // width * ROW + i % width * 64))

        e.choose(rows, (1, 2, 4, TILE), tile)
        return context.get_dummy_value()

    return _signature([kind, unit], 7, 1), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def cap(context: Any, logits: Any, vectors: Any, soft_cap: Any) -> Any:
    """x <- log2(e) * soft_cap * tanh(x / soft_cap) over 16 * vectors floats; tanh(y) = 1 - 2 / (e^2y + 1)."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        logits, limit = e.pointer(args[0]), e.splat(args[2])
        rate = builder.fdiv(e.number(2 * LOG2E), limit)
        height = builder.fmul(limit, e.number(LOG2E))

        def step(i: Value) -> list[Value]:
            place = e.at(logits, builder.shl(i, I64(6)))
            y = builder.fmul(e.load(place, VF), rate)
            y = builder.select(builder.fcmp_ordered(">", y, e.number(126.0)), e.number(126.0), y)
            two = builder.fdiv(e.number(2.0), builder.fadd(e.exp2(y), e.number(1.0)))
            e.store(builder.fmul(height, builder.fsub(e.number(1.0), two)), place)
            return []

        e.loop(args[1], [], step)
        return context.get_dummy_value()

    return _signature([], 2, 1), emit


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

    return _signature([], 4), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def weigh(context: Any, kind: Any, logits: Any, vectors: Any, peak: Any, total: Any, decay: Any) -> Any:
    """One query vector's softmax over 16 * vectors more keys, in powers of two.

    logits: float32, overwritten by the weights 2^(x - peak), as bfloat16 where the kind multiplies that; peak: the
    largest logit so far, updated; total: 16 partial sums of weights, updated; decay: gets what the earlier sums
    must be multiplied with. All logits -inf: weights 0.
    """
    (code,) = literals(kind)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        logits, vectors, peak, total, decay = (e.pointer(a) if i != 1 else a for i, a in enumerate(args[1:]))
        low = e.number(float("-inf"))
        (top,) = e.loop(vectors, [low], lambda i, top: [e.larger(e.load(e.at(logits, b.shl(i, I64(6))), VF), top)])
        old = e.load(peak, F32)
        highest = e.call("llvm.vector.reduce.fmax.v16f32", F32, top)
        highest = b.select(b.fcmp_ordered(">", highest, old), highest, old)
        e.store(highest, peak)
        shift = e.splat(b.select(b.fcmp_ordered("==", highest, F32(float("-inf"))), F32(0.0), highest))
        fade = e.exp2(b.fsub(e.splat(old), shift))
        e.store(b.extract_element(fade, I32(0)), decay)

        def step(i: Value, sums: Value) -> list[Value]:
            weights = e.exp2(b.fsub(e.load(e.at(logits, b.shl(i, I64(6))), VF), shift))
            if code == Kind.BFLOAT16_DOT:  # weights are finite and not negative: rounding is one addition
                rounded = b.lshr(b.add(b.bitcast(weights, VI), e.bits(0x8000)), e.bits(16))
                e.store(b.trunc(rounded, VS), e.at(logits, b.shl(i, I64(5))))
            else:
                e.store(weights, e.at(logits, b.shl(i, I64(6))))
            return [b.fadd(sums, weights)]

        (sums,) = e.loop(vectors, [b.fmul(e.load(total, VF), fade)], step)
        e.store(sums, total)
        return context.get_dummy_value()

    return _signature([kind], 5), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def accumulate(
    context: Any,
    kind: Any,
    unit: Any,
    rows: Any,
    weights: Any,
    values: Any,
    ahead: Any,
    strips: Any,
    sums: Any,
    d: Any,
    decay: Any,
) -> Any:
    """sums <- decay * sums + weights @ values, for up to 4 query vectors.

    weights: as `weigh` leaves them, ROW bytes a query vector; values: addresses of `strips` strips of 16 * unit
    values, each `[tokens, d]` or `[tokens / 2, d, 2]`; ahead: those of strips to fetch meanwhile; sums: float32
    `[rows, d]`; decay: float32 `[rows]`.
    """
    code, width = literals(kind, unit)
    paired = code in (Kind.BFLOAT16, Kind.BFLOAT16_DOT)
    steps = LANES * width // (2 if paired else 1)  # of a strip
    size = 32 if code == Kind.FLOAT16 else 64
    advance = 8 if code == Kind.BFLOAT16 else 4  # bytes of weights a step

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        rows, weights, values, ahead, strips, sums, d, decay = args[2:]
        weights, values, ahead, sums, decay = (e.pointer(a) for a in (weights, values, ahead, sums, decay))
        stride = b.mul(d, I64(size // LANES))
        row_bytes = b.shl(d, I64(2))

        def columns(count: int, chunks: int, first: Value) -> list[Value]:
            """`count` query vectors, `chunks` registers of channels from number `first` on."""
            places = [
                e.at(sums, b.add(b.mul(row_bytes, I64(r)), b.shl(b.add(first, I64(c)), I64(6))))
                for r in range(count)
                for c in range(chunks)
            ]
            fades = [e.splat(e.load(e.at(decay, 4 * r), F32)) for r in range(count)]
            start = [b.fmul(e.load(p, VF), fades[i // chunks]) for i, p in enumerate(places)]

            def strip(i: Value, w: Value, *totals: Value) -> list[Value]:
                near, far = (
                    e.at(e.pointer(e.load(e.at(x, b.shl(i, I64(3))), I64, 8)), b.mul(first, I64(size)))
                    for x in (values, ahead)
                )

                def step(i: Value, w: Value, v: Value, far: Value, *totals: Value) -> list[Value]:
                    for line in range(0, size * chunks, 64):
                        e.fetch(e.at(far, line))
                    stored = [e.at(v, size * c) for c in range(chunks)]
                    new = e.multiply_stored(code, stored, [e.at(w, ROW * r) for r in range(count)], totals)
                    return [e.at(w, advance), e.at(v, stride), e.at(far, stride), *new]

                new = e.loop(steps, [w, near, far, *totals], step)
                return [new[0], *new[3:]]

            for place, total in zip(places, e.loop(strips, [weights, *start], strip)[1:], strict=True):
                e.store(total, place)
            return []

        def tile(count: int) -> None:
            registers = b.lshr(d, I64(4))
            whole = b.lshr(registers, I64(2))
            with b.if_then(b.icmp_signed(">", whole, I64(0))):
                e.loop(whole, [], lambda i: columns(count, 4, b.shl(i, I64(2))))
            left = b.and_(registers, I64(3))
            with b.if_then(b.icmp_signed(">", left, I64(0))):
                e.loop(left, [], lambda i: columns(count, 1, b.add(b.shl(whole, I64(2)), i)))

        e.choose(rows, (1, 2, 4), tile)
        return context.get_dummy_value()

    return _signature([kind, unit], 8), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def settle(context: Any, dtype: Any, sums: Any, out: Any, vectors: Any, factor: Any) -> Any:
    """out <- factor * sums over 16 * vectors floats, stored as `dtype`: 0 float32, 1 bfloat16, 2 float16."""

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

    return _signature([], 4, 1), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def silu_mul_half(context: Any, gates: Any, ups: Any, out: Any, n: Any) -> Any:
    """out = silu(gates) * ups for n bfloat16 numbers at each address, n a multiple of LANES and at least LANES."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        gates, ups, out = (e.pointer(a) for a in args[:3])

        def step(i: Value) -> list[Value]:
            at = builder.shl(i, I64(5))
            gate, up = (from_half(e, e.load(e.at(p, at), VS, 2)) for p in (gates, ups))
            low = builder.select(builder.fcmp_ordered("<", gate, e.number(-87.0)), e.number(-87.0), gate)  # NaN stays
            power = e.exp2(builder.fmul(low, e.number(-LOG2E)))
            silu = builder.fdiv(low, builder.fadd(power, e.number(1.0)))
            e.store(to_half(e, builder.fmul(silu, up)), e.at(out, at), 2)
            return []

        e.loop(builder.lshr(args[3], I64(4)), [], step)
        return context.get_dummy_value()

    return _signature([], 4), emit


def from_half(e: Emitter, bits: Value) -> Value:
    """16 bfloat16 as float32."""
    return e.b.bitcast(e.b.shl(e.b.zext(bits, VI), e.bits(16)), VF)


def to_half(e: Emitter, x: Value) -> Value:
    """16 float32 as bfloat16: to nearest, ties to even; NaN stays NaN."""
    whole = e.b.bitcast(x, VI)
    odd = e.b.and_(e.b.lshr(whole, e.bits(16)), e.bits(1))
    near = e.b.add(e.b.add(whole, e.bits(0x7FFF)), odd)
    kept = e.b.select(e.b.fcmp_unordered("uno", x, x), e.bits(0x7FC00000), near)
    return e.b.trunc(e.b.lshr(kept, e.bits(16)), VS)
