"""Small operations of compiled code that numba has no name for, over addresses and vectors of 16 floats.

Each intrinsic is called from compiled code and emitted in place. One with many operands takes them as a named tuple,
which `unpack` takes apart again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NewType, TypeVar, get_type_hints

import numpy as np
from numba.core import cgutils, types
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

from lamina_kernels.compile.emitter import I64, VF, VI, VS, Emitter, Value

LOG2E = 1.4426950408889634
GELU_SLOPE, GELU_CUBIC = 1.5957691216057308, 0.044715
"""GELU's approximation with tanh is x * sigmoid(GELU_SLOPE * (x + GELU_CUBIC * x^3))."""
Address = NewType("Address", int)  # of memory: a field of this type is unpacked to a pointer

T = TypeVar("T", bound=NamedTuple)


def literals(*values: Any) -> list[int]:
    """The values of arguments that must be compile-time constants."""
    for value in values:
        if not isinstance(value, types.IntegerLiteral):
            raise RequireLiteralValue(f"{value} must be a compile-time constant")
    return [value.literal_value for value in values]


def signature_of(literals: Sequence[Any], integers: int, floats: int = 0) -> Any:
    """The numba signature of an intrinsic without a result: constants, then int64, then float32."""
    return types.void(*literals, *[types.int64] * integers, *[types.float32] * floats)


def unpack(cls: type[T], context: Any, e: Emitter, kind: Any, operands: Value) -> T:
    """The operands that an intrinsic got as a `cls` of numba type `kind`: an int64, a float32 or a pointer a field."""
    values = []
    for i, declared in enumerate(get_type_hints(cls).values()):
        target = types.float32 if declared is np.float32 else types.int64
        value = context.cast(e.b, e.b.extract_value(operands, i), kind.types[i], target)
        values.append(e.pointer(value) if declared is Address else value)
    return cls(*values)


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

    return types.void(types.int64, types.int64), emit


def _gate_mul_half(inside: Callable[[Emitter, Value], Value]) -> Any:
    """An intrinsic (gates, ups, out, n): out = gate * sigmoid(inside(gate)) * up for n bfloat16 numbers at each
    address, n a multiple of LANES and at least LANES."""

    def typed(context: Any, gates: Any, ups: Any, out: Any, n: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emitter(builder)
            gates, ups, out = (e.pointer(a) for a in args[:3])

            def at_least(x: Value) -> Value:
                return builder.select(builder.fcmp_ordered("<", x, e.number(-87.0)), e.number(-87.0), x)  # NaN stays

            def step(i: Value) -> list[Value]:
                offset = builder.shl(i, I64(5))
                gate, up = (from_half(e, e.load(e.at(p, offset), VS, 2)) for p in (gates, ups))
                low = at_least(gate)
                power = e.exp2(builder.fmul(at_least(inside(e, low)), e.number(-LOG2E)))
                gated = builder.fdiv(low, builder.fadd(power, e.number(1.0)))
                e.store(to_half(e, builder.fmul(gated, up)), e.at(out, offset), 2)
                return []

            e.loop(builder.lshr(args[3], I64(4)), [], step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), emit

    return intrinsic(typed)


def _gelu_inside(e: Emitter, x: Value) -> Value:
    cubic = e.b.fmul(e.b.fmul(x, x), e.number(GELU_SLOPE * GELU_CUBIC))
    inside, limit = e.b.fmul(x, e.b.fadd(cubic, e.number(GELU_SLOPE))), e.number(87.0)
    return e.b.select(e.b.fcmp_ordered(">", inside, limit), limit, inside)  # x^3 may be infinite


silu_mul_half, gelu_mul_half = _gate_mul_half(lambda e, x: x), _gate_mul_half(_gelu_inside)


def from_half(e: Emitter, bits: Value) -> Value:
    """16 bfloat16 as float32."""
    return e.b.bitcast(e.b.shl(e.b.zext(bits, VI), e.bits(16)), VF)


def to_half(e: Emitter, x: Value) -> Value:
    """16 float32 as bfloat16: to nearest, ties to even; NaN stays NaN."""
    bits = e.b.bitcast(x, VI)
    odd = e.b.and_(e.b.lshr(bits, e.bits(16)), e.bits(1))
    near = e.b.add(e.b.add(bits, e.bits(0x7FFF)), odd)
    result = e.b.select(e.b.fcmp_unordered("uno", x, x), e.bits(0x7FC00000), near)
    return e.b.trunc(e.b.lshr(result, e.bits(16)), VS)
