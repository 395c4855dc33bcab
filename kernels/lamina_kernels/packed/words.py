"""Loads and stores of whole numbers at any address, for compiled code."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lamina_kernels.cpu.emitter import I64, Emitter


def _load(bits: int) -> Any:
    """An intrinsic (address): the unsigned number of `bits` there, as int64."""

    def typed(context: Any, address: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emitter(builder)
            return builder.zext(e.load(e.pointer(args[0]), ir.IntType(bits), 1), I64)

        return types.int64(types.int64), emit

    return intrinsic(typed)


def _store(bits: int) -> Any:
    """An intrinsic (address, number): the lower `bits` of an int64 are put there."""

    def typed(context: Any, address: Any, number: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            e = Emitter(builder)
            e.store(builder.trunc(args[1], ir.IntType(bits)), e.pointer(args[0]), 1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return intrinsic(typed)


load8, load16, load32 = _load(8), _load(16), _load(32)
store8, store16, store32 = _store(8), _store(16), _store(32)
