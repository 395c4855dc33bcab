"""Merges a partial into some vectors of another, in place, in one pass over memory, compiled for the CPU.

The formula is that of `lamina_kernels.partial`, for two: where low <= top are their lse and w = exp(low - top),
out = (out_top + w * out_low) / (1 + w) and lse = top + log(1 + w). Arithmetic is float32, rounded once at the end. A
vector comes out the same whatever stands beside it and however many threads share the work.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lamina_kernels.compile import emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.emitter import F32, I32, I64, LANES, VF, VH, VS, Emitter, Value
from lamina_kernels.compile.intrinsics import LOG2E, pointer, prefetch, take
from lamina_kernels.compile.launch import HEADER, TAKEN, block_type, launch, source_fingerprint
from lamina_kernels.paged.pages import FLOATS
from lamina_kernels.partial import Partial

_SHARE = 1 << 15  # numbers of `past` that are worth a thread
_SIZES = ("n", "total", "width", "into_dtype", "past_dtype")
_ADDRESSES = ("into", "into_lse", "past", "past_lse", "index")  # no index: vector i is merged into vector i
MERGE = np.dtype([*HEADER, *((name, "i8") for name in ("check", "highest", *_SIZES, *_ADDRESSES))])
_Arguments = block_type(MERGE)


def check_merge(into: Partial, past: Partial, index: torch.Tensor | None) -> tuple[int, int, int]:
    """How many vectors `into` and `past` have, and their width. Does not look at the numbers in `index`.

    Raises ValueError unless dtypes and shapes are those of `Kernels.merge_into`, all on one device, and `into` is
    contiguous.
    """
    if into.out.ndim != 2 or past.out.ndim != 2:
        raise ValueError(f"out must be [n, d_v], got {list(into.out.shape)} and {list(past.out.shape)}")
    total, width = into.out.shape
    n = past.out.shape[0] if index is not None else total  # len() takes four times as long
    device = into.out.device
    _check("into.out", into.out, FLOATS, (total, width), device)
    _check("into.lse", into.lse, (torch.float32,), (total,), device)
    _check("past.out", past.out, FLOATS, (n, width), device)
    _check("past.lse", past.lse, (torch.float32,), (n,), device)
    if index is not None:
        _check("index", index, (torch.int64,), (n,), device)
    if not into.out.is_contiguous() or not into.lse.is_contiguous():
        raise ValueError(f"into must be contiguous, got strides {into.out.stride()} and {into.lse.stride()}")
    return total, n, width


def _check(
    name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device
) -> None:
    if x.dtype not in dtypes or x.shape != shape or x.device != device:
        allowed = ", ".join(map(str, dtypes))
        raise ValueError(
            f"{name} must be {list(shape)} on {device} in one of {allowed}, got {x.dtype} {list(x.shape)} on {x.device}"
        )


def merge_into(into: Partial, past: Partial, index: torch.Tensor | None) -> None:
    """As `Kernels.merge_into`. Few vectors are merged on the caller's thread: a team costs more than it saves."""
    total, n, width = check_merge(into, past, index)
    if not into.out.is_cpu:
        raise ValueError(f"into.out must be on the CPU, got {into.out.device}")
    if not n:
        return
    out, lse = past.out.contiguous(), past.lse.contiguous()
    index = None if index is None else index.contiguous()
    threads = min(1 + n * width // _SHARE, torch.get_num_threads())
    kernel, call = merge_kernel()
    a = _block.arguments
    a.taken, a.n, a.total, a.width = 0, n, total, width
    a.into_dtype, a.past_dtype = FLOATS.index(into.out.dtype), FLOATS.index(out.dtype)
    a.into, a.into_lse = into.out.data_ptr(), into.lse.data_ptr()
    a.past, a.past_lse = out.data_ptr(), lse.data_ptr()
    a.check, a.highest, a.index = (0, 0, 0) if index is None else (1, 0, index.data_ptr())
    if threads == 1 or index is not None:
        a.shares = 1 if threads == 1 else 0  # a team must not begin before the whole index is known to be good
        call(_block.address)
        if not 0 <= a.highest < total:
            raise ValueError(f"index must be from 0 to {total - 1}, got {a.highest}")
    if threads > 1:
        a.taken, a.check, a.shares = 0, 0, threads
        launch(kernel, _block.address, threads)


def merge_block(
    into: Partial, past: tuple[int, int], past_dtype: torch.dtype, n: int, index: torch.Tensor | None
) -> Any:
    """The block with which compiled code runs `merge_kernel`: `n` vectors at two addresses, of out and lse, into those
    of `into` that `index` numbers, or the first ones. The caller vouches for the index, and keeps what it names."""
    total, width = into.out.shape
    return _Arguments(
        shares=min(1 + n * width // _SHARE, torch.get_num_threads()),
        n=n,
        total=total,
        width=width,
        into_dtype=FLOATS.index(into.out.dtype),
        past_dtype=FLOATS.index(past_dtype),
        into=into.out.data_ptr(),
        into_lse=into.lse.data_ptr(),
        past=past[0],
        past_lse=past[1],
        index=0 if index is None else index.data_ptr(),
    )


class _Block(threading.local):
    """One argument block a thread, used again for every call."""

    def __init__(self) -> None:
        self.arguments = _Arguments()
        self.address = ctypes.addressof(self.arguments)


_block = _Block()


@cache
def merge_kernel() -> tuple[int, Callable[[int], None]]:
    """The kernel's address, and a way to call it on this thread. From numba's cache on disk where it is there."""
    arguments = MERGE  # closed over, so a part of the cache's key, as is what is compiled in from other files
    fingerprint = source_fingerprint(emitter, intrinsics, launching)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        a = carray(block, (1,), arguments)[0]
        if fingerprint and a.check:
            a.highest = _highest(a)
            if a.highest < 0 or a.highest >= a.total:
                return
        share = take(block, TAKEN)
        while share < a.shares:
            _merge(a, a.n * share // a.shares, a.n * (share + 1) // a.shares)
            share = take(block, TAKEN)

    # PYFUNCTYPE keeps the interpreter's lock: such a call is over long before another thread could make use of it.
    return int(kernel.address), ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(kernel.address)


@njit  # type: ignore[untyped-decorator]
def _highest(a: Any) -> Any:
    """The largest number in the index, a negative one before any other."""
    index, highest = carray(pointer(a.index), (a.n,), np.uint64), np.uint64(0)
    for i in range(a.n):
        highest = max(highest, index[i])
    return np.int64(highest)


@njit  # type: ignore[untyped-decorator]
def _merge(a: Any, first: int, last: int) -> None:
    """Vectors [first, last) of past, as many at once as a register has lanes for their lse."""
    index = carray(pointer(a.index), (a.n,), np.int64)
    into_lse = carray(pointer(a.into_lse), (a.total,), np.float32)
    past_lse = carray(pointer(a.past_lse), (a.n,), np.float32)
    into_bytes, past_bytes = a.width * (4 if a.into_dtype == 0 else 2), a.width * (4 if a.past_dtype == 0 else 2)
    scratch = _scratch()
    lanes = carray(pointer(scratch), (3, LANES), np.float32)
    for begin in range(first, last, LANES):
        end = min(begin + LANES, last)
        for i in range(begin, end):
            lanes[0, i - begin], lanes[1, i - begin] = into_lse[index[i] if a.index else i], past_lse[i]
        _weigh(scratch)
        if a.index and a.width:
            for i in range(end, min(end + LANES, last)):
                prefetch(a.into + index[i] * into_bytes, into_bytes)
        for i in range(begin, end):
            target = index[i] if a.index else i
            into_lse[target] = lanes[2, i - begin]
            mine, other = lanes[0, i - begin], lanes[1, i - begin]
            into, past = a.into + target * into_bytes, a.past + i * past_bytes
            _blend(a.into_dtype, a.past_dtype, into, past, a.width, mine, other)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _scratch(context: Any) -> Any:
    """The address of three registers' worth of floats on this thread's stack, zeros at first."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(F32, 3 * LANES)), I64)

    return types.int64(), emit


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _weigh(context: Any, lanes: Any) -> Any:
    """From the lse of LANES pairs to their shares of the sum and its lse.

    lanes: float32 `[3, LANES]`: in, the lse of into and of past; out, the factor of into, of past, and the lse.
    Two empties have factors 0 and lse -inf. Where `partial.merge` makes NaN, of NaN or +inf, so does this.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        base = e.pointer(args[0])
        places = [e.at(base, 4 * LANES * i) for i in range(3)]
        mine, other = e.load(places[0], VF), e.load(places[1], VF)
        zero, one, nan, infinity = (e.number(x) for x in (0.0, 1.0, math.nan, math.inf))
        swap = b.fcmp_ordered(">", other, mine)
        top, low = b.select(swap, other, mine), b.select(swap, mine, other)
        gap = b.fsub(low, top)  # NaN where both are the same infinity
        w = b.select(b.fcmp_ordered("ord", gap, gap), e.exp2(b.fmul(gap, e.number(LOG2E))), zero)
        large = b.fdiv(one, b.fadd(one, w))
        small = b.fmul(w, large)
        unknown = b.fcmp_unordered("uno", mine, other)
        poison = b.or_(unknown, b.fcmp_ordered("==", top, infinity))
        large = b.select(b.fcmp_ordered("==", top, e.number(-math.inf)), zero, b.select(poison, nan, large))
        small = b.select(poison, nan, small)
        lse = b.select(unknown, nan, b.fadd(top, _log1p(e, w)))
        results = b.select(swap, small, large), b.select(swap, large, small), lse
        for place, x in zip(places, results, strict=True):
            e.store(x, place)
        return context.get_dummy_value()

    return types.void(types.int64), emit


def _log1p(e: Emitter, w: Value) -> Value:
    """log(1 + w) for 0 <= w <= 1, within 1e-7 of it: the polynomial of Cephes' logf, in powers of y."""
    b = e.b
    halve = b.fcmp_ordered(">", w, e.number(0.41421356))  # 1 + w = 2 * (1 + y) there, else y = w
    y = b.select(halve, b.fmul(b.fsub(w, e.number(1.0)), e.number(0.5)), w)
    series = e.number(7.0376836292e-2)
    for c in (
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
        -0.5,
        1.0,
    ):
        series = e.fma(series, y, e.number(c))
    return e.fma(series, y, b.select(halve, e.number(0.69314718), e.number(0.0)))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _blend(
    context: Any, into_dtype: Any, past_dtype: Any, into: Any, past: Any, width: Any, mine: Any, other: Any
) -> Any:
    """into <- mine * into + other * past over `width` numbers at two addresses; the dtypes as in `FLOATS`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, e = builder, Emitter(builder)
        into_dtype, past_dtype, into, past, width, mine, other = args
        into, past, mine, other = e.pointer(into), e.pointer(past), e.splat(mine), e.splat(other)
        registers, remainder = b.lshr(width, I64(4)), b.and_(width, I64(LANES - 1))

        def convert(to: int, source: int) -> None:
            def step(first: Value, lanes: int) -> list[Value]:
                target = e.at(into, b.mul(first, I64(4 if to == 0 else 2)))
                x = _widen(e, to, target, lanes)
                y = _widen(e, source, e.at(past, b.mul(first, I64(4 if source == 0 else 2))), lanes)
                _narrow(e, to, e.fma(other, y, b.fmul(mine, x)), target, lanes)
                return []

            with b.if_then(b.icmp_signed(">", registers, I64(0))):
                e.loop(registers, [], lambda i: step(b.shl(i, I64(4)), LANES))
            with b.if_then(b.icmp_signed(">", remainder, I64(0))):
                e.loop(remainder, [], lambda i: step(b.add(b.shl(registers, I64(4)), i), 1))

        e.choose(into_dtype, (0, 1, 2), lambda to: e.choose(past_dtype, (0, 1, 2), lambda source: convert(to, source)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, *[types.float32] * 2), emit


def _widen(e: Emitter, code: int, place: Value, lanes: int) -> Value:
    """LANES stored numbers as float32, or one in the first lane."""
    kind, size = (VF, VS, VH)[code], 4 if code == 0 else 2
    if lanes == LANES:
        x = e.load(place, kind, size)
    else:
        x = e.b.insert_element(ir.Constant(kind, [0] * LANES), e.load(place, kind.element, size), I32(0))
    return x if code == 0 else intrinsics.from_half(e, x) if code == 1 else e.b.fpext(x, VF)


def _narrow(e: Emitter, code: int, x: Value, place: Value, lanes: int) -> None:
    """Store what `_widen` loads."""
    y = x if code == 0 else intrinsics.to_half(e, x) if code == 1 else e.b.fptrunc(x, VH)
    e.store(y if lanes == LANES else e.b.extract_element(y, I32(0)), place, 4 if code == 0 else 2)
