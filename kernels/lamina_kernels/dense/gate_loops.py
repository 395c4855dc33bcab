"""The small operations of layers that keep states, compiled for the CPU: the gate of the output, and the gates of the
recurrence.

Numbers in memory are float32 or bfloat16, arithmetic and weights are float32. As in `dense_loops`, a row is computed
the same way whatever rows stand beside it and however many threads share them.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, njit, types

from lamina_kernels.compile import emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.intrinsics import pointer, take
from lamina_kernels.compile.launch import FINISHED, HEADER, TAKEN, block_type, launch, source_fingerprint
from lamina_kernels.dense import dense_loops
from lamina_kernels.dense.dense_loops import PARALLEL, exp, load, store, vector

SIGMOID, SILU, RECURRENCE = range(3)
"""What a kernel does with its rows: see `_output_row` and `_recurrence_row`."""

_SIZES = ("operation", "size", "rows", "width", "groups")
_ADDRESSES = ("x", "gate", "out", "weight", "offset")
_ARGUMENTS = np.dtype([*HEADER, *((name, "i8") for name in (*_SIZES, *_ADDRESSES)), ("eps", "f8")])
Arguments = block_type(_ARGUMENTS)
"""A kernel's argument block; `size` is the bytes of a number, `x` and what follows are addresses."""


@njit  # type: ignore[untyped-decorator]
def sigmoid(x: Any) -> Any:
    """Of a float32."""
    bounded = np.float32(-87.0) if x < np.float32(-87.0) else x  # in this form, NaN stays NaN
    exponent = np.float32(-87.0) if bounded > np.float32(87.0) else -bounded
    return np.float32(1.0) / (np.float32(1.0) + exp(exponent))


@njit(fastmath={"contract", "nsz", "reassoc"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _squares(x: Any, n: int) -> Any:
    total = np.float32(0.0)
    for i in range(n):
        total += load(x[i]) * load(x[i])
    return total


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _output_row(a: Any, row: int, tag: Any) -> None:
    """out = x times sigmoid(gate), or silu(gate), all `[rows, groups, width]`; where there is a weight, `[groups,
    width]`, x is normed by group first."""
    for group in range(a.groups):
        place = (row * a.groups + group) * a.width
        x, gate = vector(a.x + place * a.size, a.width, tag), vector(a.gate + place * a.size, a.width, tag)
        out = vector(a.out + place * a.size, a.width, tag)
        if a.weight:
            weight = carray(pointer(a.weight + group * a.width * 4), (a.width,), np.float32)
            factor = np.float32(1.0) / np.sqrt(_squares(x, a.width) / np.float32(a.width) + np.float32(a.eps))
            for i in range(a.width):
                gate_value = load(gate[i])
                gain = sigmoid(gate_value) if a.operation == SIGMOID else gate_value * sigmoid(gate_value)
                out[i] = store(load(x[i]) * factor * weight[i] * gain, tag)
        else:
            for i in range(a.width):
                gate_value = load(gate[i])
                gain = sigmoid(gate_value) if a.operation == SIGMOID else gate_value * sigmoid(gate_value)
                out[i] = store(load(x[i]) * gain, tag)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _recurrence_row(a: Any, row: int, tag: Any) -> None:
    """out float32 `[rows, width, 2]`: softplus(x + offset) * weight and sigmoid(x), for x `[rows, 2, width]`."""
    x = vector(a.x + row * 2 * a.width * a.size, 2 * a.width, tag)
    out = carray(pointer(a.out + row * 2 * a.width * 4), (a.width, 2), np.float32)
    rate = carray(pointer(a.weight), (a.width,), np.float32)
    offset = carray(pointer(a.offset), (a.width,), np.float32)
    for head in range(a.width):
        time = load(x[head]) + offset[head]
        if not time > np.float32(20.0):  # as torch's softplus
            time = np.float32(math.log1p(math.exp(time)))
        out[head, 0] = time * rate[head]
        out[head, 1] = sigmoid(load(x[a.width + head]))


@cache
def load_kernel(half: bool) -> int:
    """The kernel's address. From numba's cache on disk where it is there."""
    tag, arguments = np.uint16(0) if half else np.float32(0), _ARGUMENTS  # closed over, so parts of the cache's key
    fingerprint = source_fingerprint(dense_loops, emitter, intrinsics, launching)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        a = carray(block, (1,), arguments)[0]
        share = take(block, TAKEN)
        while fingerprint and share < a.shares:
            for row in range(a.rows * share // a.shares, a.rows * (share + 1) // a.shares):
                if a.operation == RECURRENCE:
                    _recurrence_row(a, row, tag)
                else:
                    _output_row(a, row, tag)
            take(block, FINISHED)
            share = take(block, TAKEN)

    return int(kernel.address)


def _run(x: torch.Tensor, threads: int, **fields: int | float) -> None:
    block = Arguments(size=x.element_size(), shares=threads, x=x.data_ptr(), **fields)
    launch(load_kernel(x.dtype == torch.bfloat16), ctypes.addressof(block), threads)


def gate_output(
    x: torch.Tensor, gate: torch.Tensor, norm: torch.Tensor | None, group: int, eps: float, silu: bool
) -> torch.Tensor:
    """x times sigmoid(gate), or silu(gate), both `[n, width]` in one dtype. Where `norm`, float32 `[width]`, has the
    weights of a norm, x is normed by `group` numbers before that."""
    x, gate = x.contiguous(), gate.contiguous()
    n, width = x.shape
    group = width if norm is None else group
    if gate.shape != x.shape or gate.dtype != x.dtype or group < 1 or width % group:
        raise ValueError(f"the gate of {x.dtype} {list(x.shape)} by {group} is {gate.dtype} {list(gate.shape)}")
    if norm is not None and (norm.shape != (width,) or norm.dtype != torch.float32 or not norm.is_contiguous()):
        raise ValueError(f"norm is {norm.dtype} {list(norm.shape)}, expected torch.float32 [{width}]")
    out, weight = torch.empty_like(x), 0 if norm is None else norm.data_ptr()
    threads = 1 if x.numel() < PARALLEL else min(torch.get_num_threads(), n)
    where = {"gate": gate.data_ptr(), "out": out.data_ptr(), "weight": weight}
    operation = SILU if silu else SIGMOID
    _run(x, threads, operation=operation, rows=n, width=group, groups=width // group, eps=eps, **where)
    return out


def recurrence_gates(x: torch.Tensor, rate: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """float32 `[n, heads, 2]`: softplus(step + offset) * rate and sigmoid(beta), for x `[n, 2 * heads]`, step then
    beta; rate, offset: float32 `[heads]`."""
    x, heads = x.contiguous(), x.shape[1] // 2
    for name, parameter in (("rate", rate), ("offset", offset)):
        if parameter.shape != (heads,) or parameter.dtype != torch.float32 or not parameter.is_contiguous():
            raise ValueError(f"{name} is {parameter.dtype} {list(parameter.shape)}, expected torch.float32 [{heads}]")
    out = torch.empty(len(x), heads, 2)
    where = {"out": out.data_ptr(), "weight": rate.data_ptr(), "offset": offset.data_ptr()}
    _run(x, 1, operation=RECURRENCE, rows=len(x), width=heads, **where)
    return out
