"""Rounds a W of floats to 4 or 8 bits and packs it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from lamina_kernels.compile import emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.emitter import F32, I32, LANES, VF, VI, Emitter
from lamina_kernels.compile.intrinsics import pointer, take
from lamina_kernels.compile.launch import HEADER, TAKEN, launch, source_fingerprint
from lamina_kernels.packed.layout import BLOCK, ROWS
from lamina_kernels.packed.matrix import PackedMatrix
from lamina_kernels.packed.pack import CODES, FORMATS, can_pack, pack_codes, room_for

_CHUNK = 1 << 18  # numbers that are rounded at once
_SHARES = 8  # a thread
_TRIES = [7.2 + 0.1 * i for i in range(8)] + [8.0 + 0.1 * i for i in range(8)]  # what the largest number may become
_LEAST = 1e-30  # a block whose largest number is below is zeros: 8 / x has to be finite
_ARGUMENTS = np.dtype([*HEADER, *((name, "i8") for name in ("x", "codes", "scales", "blocks", "bits", "search"))])
_F = np.float32


def quantize(weight: torch.Tensor, bits: int, into: torch.Tensor | None = None) -> PackedMatrix:
    """W from floats `[n_out, n_in]`, in blocks of 32: 8 bits by the largest number, 4 by the least squared error of
    scales about it. into: as in `pack_blocks`. ValueError names a row that is not finite, or exceeds float16's scales.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    kind = CODES[bits, False]
    if weight.ndim != 2 or not (weight.is_cpu and weight.is_floating_point()) or not can_pack(kind, *weight.shape):
        raise ValueError(
            f"weight must be floats [n_out, a multiple of {BLOCK}] on a CPU, got {weight.dtype} {list(weight.shape)} "
            f"on {weight.device}"
        )
    n_out, n_in = weight.shape
    matrix = room_for(FORMATS[kind], n_out, n_in, into)
    step = max(_CHUNK // n_in // ROWS, 1) * ROWS
    for first in range(0, n_out, step):
        rows = slice(first, min(first + step, n_out))
        numbers = weight[rows].float().contiguous()
        finite = numbers.abs().amax(1).isfinite()
        if not finite.all():
            raise ValueError(f"row {first + int(finite.logical_not().nonzero()[0])} is not finite")
        scales = torch.empty(len(numbers), n_in // BLOCK)
        codes = torch.empty(numbers.shape, dtype=torch.uint8)
        _run(_load_kernel(), numbers, codes, scales, bits, 1)
        scales = scales.half().float()
        _run(_load_kernel(), numbers, codes, scales, bits, 0)
        try:
            pack_codes(codes, scales, None, matrix.part(rows).data, bits)
        except ValueError as error:
            raise ValueError(f"rows from {first} on: {error}") from error
    return matrix


def _run(kernel: int, numbers: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bits: int, search: int) -> None:
    threads = torch.get_num_threads()
    values = (0, 0, threads * _SHARES, numbers.data_ptr(), codes.data_ptr(), scales.data_ptr(), scales.numel())
    arguments = np.array([*values, bits, search], np.int64)
    launch(kernel, arguments.ctypes.data, threads)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _code(x: Any, inverse: Any, low: Any, high: Any) -> Any:
    return min(max(np.rint(x * inverse), low), high)


@intrinsic  # type: ignore[untyped-decorator]
def _search(context: Any, numbers: Any) -> Any:
    """The scale of 32 float32 as codes from -8 to 7 whose squared error is least of those tried, one a lane.

    Each try divides by a scale and takes the best scale for the codes c that come of it: sum(x c) / sum(c c).
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emitter(builder), builder
        source, magic = e.pointer(args[0]), e.number(1.5 * 2**23)  # which a sum with is rounded to whole numbers
        halves = [e.load(e.at(source, 4 * LANES * half), VF) for half in range(2)]
        larger = e.larger(*halves)
        smaller = b.fneg(e.larger(*(b.fneg(x) for x in halves)))
        top = e.call("llvm.vector.reduce.fmax.v16f32", F32, larger)
        bottom = e.call("llvm.vector.reduce.fmin.v16f32", F32, smaller)
        extreme = b.select(b.fcmp_ordered(">", top, b.fneg(bottom)), top, bottom)
        inverses = b.fdiv(ir.Constant(VF, [F32(-x) for x in _TRIES]), e.splat(extreme))
        products = squares = e.number(0.0)
        for i in range(BLOCK):
            x = e.splat(e.load(e.at(source, 4 * i), F32))
            code = b.fmul(x, inverses)
            for limit, sign in ((-8.0, ">"), (7.0, "<")):
                code = b.select(b.fcmp_ordered(sign, code, e.number(limit)), code, e.number(limit))
            code = b.fsub(b.fadd(code, magic), magic)
            products, squares = e.fma(x, code, products), e.fma(code, code, squares)
        scales = b.fdiv(products, squares)
        gains = b.fmul(scales, products)  # by how much the squared error is less than without codes
        best = e.splat(e.call("llvm.vector.reduce.fmax.v16f32", F32, gains))
        lanes = b.select(b.fcmp_ordered("==", gains, best), ir.Constant(VI, list(range(LANES))), e.bits(LANES - 1))
        scale = b.extract_element(scales, e.call("llvm.vector.reduce.umin.v16i32", I32, lanes))
        usable = b.fcmp_ordered(">", e.call("llvm.fabs.f32", F32, extreme), F32(_LEAST))
        return b.select(usable, scale, F32(0.0))

    return types.float32(types.int64), emit


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _quantize_shares(block: Any) -> None:
    a = carray(block, (1,), _ARGUMENTS)[0]
    scales = carray(pointer(a.scales), (a.blocks,), np.float32)
    numbers = carray(pointer(a.x), (a.blocks, BLOCK), np.float32)
    codes = carray(pointer(a.codes), (a.blocks, BLOCK), np.uint8)
    high = _F(7.0) if a.bits == 4 else _F(127.0)
    low = -high - _F(1.0)
    share = take(block, TAKEN)
    while share < a.shares:
        for number in range(a.blocks * share // a.shares, a.blocks * (share + 1) // a.shares):
            x = numbers[number]
            if a.search and a.bits == 4:
                scales[number] = _search(a.x + number * BLOCK * 4)
            elif a.search:
                peak = _F(0.0)
                for i in range(BLOCK):
                    peak = max(peak, abs(x[i]))
                scales[number] = peak / high
            else:
                scale = scales[number]
                inverse = _F(1.0) / scale if scale != 0 else _F(0.0)
                for i in range(BLOCK):
                    codes[number, i] = np.uint8(np.int32(_code(x[i], inverse, low, high) - low))
        share = take(block, TAKEN)


@cache
def _load_kernel() -> int:
    fingerprint = source_fingerprint(intrinsics, emitter, launching)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _quantize_shares(block)

    return int(kernel.address)
