"""The inner loops that make sketches of pages, as LLVM IR over vectors of 16 floats.

Each public function is a numba intrinsic over int64 addresses and sizes; `kind` and `unit` are compile-time constants.
How a sketch is laid out, `SketchLayout` says.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lamina_kernels.compile.emitter import F32, I64, LANES, VF, VH, VI, VS, Emitter, Kind, Value
from lamina_kernels.compile.intrinsics import Address, from_half, literals, to_half, unpack
from lamina_kernels.compile.trees import LINE, tree


def _smaller(e: Emitter, a: Value, b: Value) -> Value:
    return e.b.select(e.b.fcmp_ordered("<", a, b), a, b)


class SealKeys(NamedTuple):
    """The operands of `seal_keys`."""

    keys: Address  # a K block
    scales: Address  # float32 `[size]`, read for INT8 alone
    size: int  # tokens of the block
    d: int  # channels
    codes: Address  # written, as `SketchLayout` says
    steps: Address  # written: bfloat16 `[d]`
    lows: Address  # written: bfloat16 `[d]`
    scratch: Address  # 34 rows


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def seal_keys(context: Any, kind: Any, unit: Any, operands: Any) -> Any:
    """The 4-bit codes of a K block, and step and low of each channel. operands: `SealKeys`.

    code = round((k - low) / step), from 0 to 15, where step = (high - low) / 15, with both as they are stored. Where a
    number is not finite, low is NaN for the 16 channels about it: that must be seen.
    """
    code, width = literals(kind, unit)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        _KeySeal(e, code, width, unpack(SealKeys, context, e, signature.args[2], args[2])).emit()
        return context.get_dummy_value()

    return types.void(kind, unit, operands), emit


class _KeySeal:
    """What `seal_keys` emits."""

    def __init__(self, e: Emitter, code: int, width: int, operands: SealKeys) -> None:
        self.e, self.b, self.o, self.code, self.width = e, e.b, operands, code, width
        scratch = operands.scratch
        self.least, self.most = scratch, e.at(scratch, LINE * LANES)
        self.inverse, self.low_floats = e.at(scratch, 2 * LINE * LANES), e.at(scratch, 2 * LINE * LANES + LINE)
        self.vectors = self.b.lshr(operands.size, I64(4))

    def emit(self) -> None:
        self.e.loop(self.b.lshr(self.o.d, I64(4)), [], self.channels)

    def channels(self, group: Value) -> list[Value]:
        """16 channels: their range, from that step and low, then the codes."""
        first = self.b.shl(group, I64(3))  # pair of channels
        self.store_steps(group, self.find_range(first))
        strips = self.b.udiv(self.o.size, I64(16 * self.width))
        self.e.loop(strips, [], partial(self.strip, group, first))
        return []

    def find_range(self, first: Value) -> Value:
        """Leave the least and the most of each channel in each lane, and return 0, or NaN if one is not finite."""
        e, b = self.e, self.b
        low_start, high_start = e.number(float("inf")), e.number(float("-inf"))
        nothing = e.number(0.0)
        for j in range(LANES // 2):
            pair = b.add(first, I64(j))

            def tokens(i: Value, *bounds: Value, pair: Value = pair) -> list[Value]:
                numbers = self.load_keys(pair, b.shl(i, I64(4)))
                new = [_smaller(e, x, low) for x, low in zip(numbers, bounds[:2], strict=True)]
                new += [e.larger(x, high) for x, high in zip(numbers, bounds[2:4], strict=True)]
                return [*new, e.fma(numbers[1], e.number(0.0), e.fma(numbers[0], e.number(0.0), bounds[4]))]

            *bounds, nothing = e.loop(self.vectors, [low_start] * 2 + [high_start] * 2 + [nothing], tokens)
            for half in range(2):
                e.store(bounds[half], e.at(self.least, LINE * (2 * j + half)))
                e.store(bounds[2 + half], e.at(self.most, LINE * (2 * j + half)))
        return e.splat(e.call("llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), nothing))

    def store_steps(self, group: Value, nothing: Value) -> None:
        e, b = self.e, self.b
        least = b.fadd(tree(e, self.least, VF, lambda x, y: _smaller(e, x, y)), nothing)
        step, low = _step_and_low(e, least, tree(e, self.most, VF, e.larger))
        e.store(_inverse(e, from_half(e, step)), self.inverse)
        e.store(from_half(e, low), self.low_floats)
        offset = b.shl(group, I64(5))
        e.store(step, e.at(self.o.steps, offset), 2)
        e.store(low, e.at(self.o.lows, offset), 2)

    def strip(self, group: Value, first: Value, i: Value) -> list[Value]:
        """The codes of 16 channels of strip i."""
        e, b, width = self.e, self.b, self.width
        begin = b.mul(i, I64(16 * width))
        place = b.mul(begin, b.lshr(self.o.d, I64(1)))  # of the strip's codes: half a byte a number
        place = e.at(self.o.codes, b.add(place, b.shl(group, I64(8 if width == 2 else 7))))
        for line in range(4 if width == 2 else 2):
            word = e.bits(0)
            for half in range(2):  # low and high half of the bytes: other tokens, or other channels
                quad = line if width == 2 else 2 * line + half
                token = b.add(begin, I64(16 * half if width == 2 else 0))
                for couple in range(2):
                    numbers = self.load_keys(b.add(first, I64(2 * quad + couple)), token)
                    for k, x in enumerate(numbers):
                        code = self.code_of(x, 4 * quad + 2 * couple + k)
                        word = b.or_(word, b.shl(code, e.bits(8 * (2 * couple + k) + 4 * half)))
            e.store(word, e.at(place, LINE * line))
        return []

    def code_of(self, x: Value, channel: int) -> Value:
        """The codes of 16 numbers of one of the 16 channels."""
        e = self.e
        low = e.splat(e.load(e.at(self.low_floats, 4 * channel), F32))
        return _code(e, x, low, e.splat(e.load(e.at(self.inverse, 4 * channel), F32)))

    def load_keys(self, pair: Value, token: Value) -> list[Value]:
        """Channels 2 * pair and 2 * pair + 1 of 16 tokens from `token` on, as floats."""
        e, b, code = self.e, self.b, self.code
        keys, size = self.o.keys, self.o.size
        if code in (Kind.FLOAT32, Kind.FLOAT16):
            width, kind = (4, VF) if code == Kind.FLOAT32 else (2, VH)
            first = b.add(b.mul(b.shl(pair, I64(1)), size), token)
            places = [e.at(keys, b.mul(x, I64(width))) for x in (first, b.add(first, size))]
            loaded = [e.load(p, kind, width) for p in places]
            return loaded if code == Kind.FLOAT32 else [b.fpext(x, VF) for x in loaded]
        place = b.add(b.mul(pair, size), token)
        if code == Kind.INT8:
            pairs = e.load(e.at(keys, b.shl(place, I64(1))), VS, 2)
            byte = ir.Constant(VS, [ir.Constant(ir.IntType(16), 8)] * LANES)
            factor = e.load(e.at(self.o.scales, b.shl(token, I64(2))), VF)
            numbers = b.ashr(b.shl(pairs, byte), byte), b.ashr(pairs, byte)
            return [b.fmul(b.sitofp(b.sext(x, VI), VF), factor) for x in numbers]
        pairs = e.load(e.at(keys, b.shl(place, I64(2))), VI)
        return [b.bitcast(b.shl(pairs, e.bits(16)), VF), b.bitcast(b.and_(pairs, e.bits(0xFFFF0000)), VF)]


class SealValues(NamedTuple):
    """The operands of `seal_values`."""

    values: Address  # a V block
    scales: Address  # float32 `[size]`, read for INT8 alone
    size: int  # tokens of the block
    d: int  # channels
    mean: Address  # written: bfloat16 `[d]`
    codes: Address  # written, as `SketchLayout` says
    steps: Address  # written: bfloat16 `[d]`
    lows: Address  # written: bfloat16 `[d]`


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def seal_values(context: Any, kind: Any, operands: Any) -> Any:
    """The mean of a V block over its tokens, its 4-bit codes, and step and low of each channel. operands: `SealValues`.

    Codes, steps and lows are as in `seal_keys`; where a number is not finite, low and mean are NaN for its channel.
    """
    (code,) = literals(kind)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        _ValueSeal(e, code, unpack(SealValues, context, e, signature.args[1], args[1])).emit()
        return context.get_dummy_value()

    return types.void(kind, operands), emit


class _ValueSeal:
    """What `seal_values` emits: registers of 16 channels, one after the other."""

    def __init__(self, e: Emitter, code: int, operands: SealValues) -> None:
        self.e, self.b, self.o, self.code = e, e.b, operands, code
        self.pack = {Kind.FLOAT32: 1, Kind.FLOAT16: 1, Kind.INT8: 4}.get(Kind(code), 2)
        self.stride = self.b.mul(operands.d, I64(2 if code == Kind.FLOAT16 else 4))

    def emit(self) -> None:
        self.e.loop(self.b.lshr(self.o.d, I64(4)), [], self.channels)

    def channels(self, i: Value) -> list[Value]:
        e, b, o = self.e, self.b, self.o
        start, offset = e.at(o.values, b.shl(i, I64(5 if self.code == Kind.FLOAT16 else 6))), b.shl(i, I64(5))

        def tokens(t: Value, total: Value, bottom: Value, top: Value, nothing: Value) -> list[Value]:
            for x in self.load_values(start, t):
                total, bottom, top = b.fadd(total, x), _smaller(e, x, bottom), e.larger(x, top)
                nothing = e.fma(x, e.number(0.0), nothing)
            return [total, bottom, top, nothing]

        begin = [e.number(x) for x in (0.0, float("inf"), float("-inf"), 0.0)]
        total, bottom, top, nothing = e.loop(b.udiv(o.size, I64(self.pack)), begin, tokens)
        e.store(to_half(e, b.fdiv(total, e.splat(b.sitofp(o.size, F32)))), e.at(o.mean, offset), 2)
        step, low = _step_and_low(e, b.fadd(bottom, nothing), top)
        e.store(step, e.at(o.steps, offset), 2)
        e.store(low, e.at(o.lows, offset), 2)
        inverse, low = _inverse(e, from_half(e, step)), from_half(e, low)
        lines = b.lshr(o.size, I64(3))

        def line(j: Value) -> list[Value]:
            word, first = e.bits(0), b.mul(j, I64(8 // self.pack))
            every = [x for k in range(8 // self.pack) for x in self.load_values(start, b.add(first, I64(k)))]
            for t, x in enumerate(every):
                word = b.or_(word, b.shl(_code(e, x, low, inverse), e.bits(8 * (t % 4) + t // 4 * 4)))
            e.store(word, e.at(o.codes, b.shl(b.add(b.mul(i, lines), j), I64(6))))
            return []

        e.loop(lines, [], line)
        return []

    def load_values(self, start: Value, t: Value) -> list[Value]:
        """The 16 channels of `pack` tokens from pack * t on, as floats."""
        e, b, code = self.e, self.b, self.code
        place = e.at(start, b.mul(t, self.stride))
        if code == Kind.FLOAT32:
            return [e.load(place, VF)]
        if code == Kind.FLOAT16:
            return [b.fpext(e.load(place, VH, 2), VF)]
        stored = e.load(place, VI)
        if code != Kind.INT8:
            return [b.bitcast(b.shl(stored, e.bits(16)), VF), b.bitcast(b.and_(stored, e.bits(0xFFFF0000)), VF)]
        fours = [b.sitofp(b.ashr(b.shl(stored, e.bits(24 - 8 * j)), e.bits(24)), VF) for j in range(4)]
        factors = [e.splat(e.load(e.at(self.o.scales, b.add(b.shl(t, I64(4)), I64(4 * j))), F32)) for j in range(4)]
        return [b.fmul(x, factor) for x, factor in zip(fours, factors, strict=True)]


def _step_and_low(e: Emitter, least: Value, most: Value) -> tuple[Value, Value]:
    """Step and low of 16 channels between these, as bfloat16."""
    low = to_half(e, least)
    step = e.b.fmul(e.b.fsub(most, from_half(e, low)), e.number(1 / 15))
    return to_half(e, e.larger(step, e.number(0.0))), low  # low may have been rounded up, above all there is


def _inverse(e: Emitter, step: Value) -> Value:
    usable = e.b.fcmp_ordered(">", step, e.number(1e-37))
    return e.b.select(usable, e.b.fdiv(e.number(1.0), step), e.number(0.0))


def _code(e: Emitter, x: Value, low: Value, inverse: Value) -> Value:
    """The codes of 16 numbers."""
    x = e.b.fmul(e.b.fsub(x, low), inverse)
    return e.nearest(_smaller(e, e.larger(x, e.number(0.0)), e.number(15.0)))
