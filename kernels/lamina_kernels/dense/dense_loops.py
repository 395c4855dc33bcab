"""The small operations of dense layers, compiled for the CPU: each passes over its rows once.

Numbers in memory are float32 or bfloat16; arithmetic is float32, rounded to nearest, ties to even. A row is computed
the same way whatever rows stand beside it and however many threads share them.
The functions at the end take tensors, and check that a kernel may read and write where they are.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import overload

from lamina_kernels.compile import emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.emitter import LANES
from lamina_kernels.compile.intrinsics import GELU_CUBIC, GELU_SLOPE, gelu_mul_half, pointer, silu_mul_half, take
from lamina_kernels.compile.launch import FINISHED, HEADER, TAKEN, block_type, launch, source_fingerprint

DTYPES = (torch.bfloat16, torch.float32)
PARALLEL = 1 << 15
"""Numbers from which more than one thread pays."""

NORM, SPLIT, SILU, GELU, ADD = range(5)
"""What a kernel does with its rows: see `_norm_row`, `_split_row`, `_gate_row` and `_add_row`."""

_SIZES = ("operation", "size", "rows", "width", "heads", "kv_heads")
_ADDRESSES = ("x", "y", "out", "second", "third", "weight", "k_weight", "cos", "sin")
_ARGUMENTS = np.dtype([*HEADER, *((name, "i8") for name in (*_SIZES, *_ADDRESSES)), ("eps", "f8")])
Arguments = block_type(_ARGUMENTS)
"""A kernel's argument block; `size` is the bytes of a number, `x` and what follows are addresses."""

_LAYOUT = struct.Struct(f"={_ARGUMENTS.itemsize // 8 - 1}qd")
_ROUND_BY_ADDING = np.float32(1.5 * 2**23)  # leaves a float32 no bits for a fraction


# Kernels are generic over the numbers in memory, told apart by a tag: a uint16 holds bfloat16's bits.
# fastmath: "contract" joins a product and a sum, "reassoc" lets a sum of squares run in several lanes. Not where two
# products are added: the compiler may join either, and does not choose the same one each time.
# error_model: without it each division is a branch, and the loop around it is not vectorised.


def vector(address: int, n: int, tag: Any) -> Any:
    """n numbers in memory as an array."""
    raise NotImplementedError


def load(number: Any) -> Any:
    """A number in memory as float32."""
    raise NotImplementedError


def store(x: Any, tag: Any) -> Any:
    """A float32 as a number in memory. Every NaN that arithmetic makes stays one."""
    raise NotImplementedError


@overload(vector, strict=False)  # type: ignore[untyped-decorator]
def _vector_of(address: Any, n: Any, tag: Any) -> Any:
    number = np.uint16 if tag == types.uint16 else np.float32
    return lambda address, n, tag: carray(pointer(address), (n,), number)


@overload(load, strict=False)  # type: ignore[untyped-decorator]
def _load_of(number: Any) -> Any:
    if number == types.uint16:
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number


@overload(store, strict=False)  # type: ignore[untyped-decorator]
def _store_of(x: Any, tag: Any) -> Any:
    def rounded(x: Any, tag: Any) -> Any:
        bits = np.float32(x).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return rounded if tag == types.uint16 else lambda x, tag: np.float32(x)


@njit(fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def exp(x: Any) -> Any:
    """e^x for -87 <= x <= 88, within 3e-7 of it near 0: 2^n by its bits times a polynomial (Cephes' expf)."""
    n = x * np.float32(1.4426950408889634) + _ROUND_BY_ADDING
    power = np.int32(np.int32(np.float32(n).view(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)
    n -= _ROUND_BY_ADDING
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1.0)) * power


@njit(fastmath={"contract", "nsz", "reassoc"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _squares(x: Any, width: int) -> Any:
    total = np.float32(0.0)
    for i in range(width):
        total += load(x[i]) * load(x[i])
    return total


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _norm(x: int, weight: int, out: int, width: int, eps: float, tag: Any) -> None:
    """RMS norm of one vector. x and out may be the same."""
    source, scale, target = vector(x, width, tag), vector(weight, width, tag), vector(out, width, tag)
    factor = np.float32(1.0) / np.sqrt(_squares(source, width) / np.float32(width) + np.float32(eps))
    for i in range(width):
        target[i] = store(load(source[i]) * factor * load(scale[i]), tag)


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _norm_row(a: Any, row: int, tag: Any) -> None:
    """out = rms_norm(x), all `[rows, width]`; where there is a y, second = x + y and out = rms_norm(second)."""
    offset = row * a.width * a.size
    source = a.x + offset
    if a.y:
        source = a.second + offset
        x, y = vector(a.x + offset, a.width, tag), vector(a.y + offset, a.width, tag)
        total = vector(source, a.width, tag)
        for i in range(a.width):
            total[i] = store(load(x[i]) + load(y[i]), tag)
    _norm(source, a.weight, a.out + offset, a.width, a.eps, tag)


@njit(fastmath={"nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _split_row(a: Any, row: int, tag: Any) -> None:
    """x `[rows, heads + 2 * kv_heads, width]` to q at out, k at second and v at third; q and k normed and rotated."""
    stride, pairs = a.width * a.size, a.width // 2
    cos = carray(pointer(a.cos + row * pairs * 4), (pairs,), np.float32)
    sin = carray(pointer(a.sin + row * pairs * 4), (pairs,), np.float32)
    source = a.x + row * (a.heads + 2 * a.kv_heads) * stride
    for head in range(a.heads + a.kv_heads):
        target, weight = a.out + (row * a.heads + head) * stride, a.weight
        if head >= a.heads:
            target, weight = a.second + (row * a.kv_heads + head - a.heads) * stride, a.k_weight
        x, out = vector(source, a.width, tag), vector(target, a.width, tag)
        if weight:
            _norm(source, weight, target, a.width, a.eps, tag)
            x = out
        if a.cos:
            for i in range(pairs):
                first, last = load(x[i]), load(x[i + pairs])
                out[i] = store(first * cos[i] - last * sin[i], tag)
                out[i + pairs] = store(last * cos[i] + first * sin[i], tag)
        elif not weight:
            for i in range(a.width):
                out[i] = x[i]
        source += stride
    n = a.kv_heads * a.width
    x, out = vector(source, n, tag), vector(a.third + row * n * a.size, n, tag)
    for i in range(n):
        out[i] = x[i]


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _gate_row(a: Any, row: int, tag: Any) -> None:
    """out `[rows, width]` = silu(gate) * up, or with GELU gelu(gate) * up, for x `[rows, 2 * width]`."""
    stride = a.width * a.size
    gate_at = a.x + 2 * row * stride
    gate_numbers(gate_at, gate_at + stride, a.out + row * stride, a.width, a.operation == GELU, tag)


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def gate_numbers(gate_at: int, up_at: int, out_at: int, width: int, gelu: bool, tag: Any) -> None:
    """out = silu(gate) * up, or gelu(gate) * up, for so many numbers at each address."""
    gates, ups, out = vector(gate_at, width, tag), vector(up_at, width, tag), vector(out_at, width, tag)
    prefix = width // LANES * LANES if out.itemsize == 2 else 0  # what is left to the loop takes a register's share
    if prefix and gelu:
        gelu_mul_half(gate_at, up_at, out_at, prefix)
    elif prefix:
        silu_mul_half(gate_at, up_at, out_at, prefix)
    for i in range(prefix, width):
        gate = load(gates[i])
        low = np.float32(-88.0) if gate < np.float32(-88.0) else gate  # in this form, NaN stays NaN
        inside = low
        if gelu:
            inside = low * (low * low * np.float32(GELU_SLOPE * GELU_CUBIC) + np.float32(GELU_SLOPE))
            inside = np.float32(-88.0) if inside < np.float32(-88.0) else inside
        exponent = np.float32(-87.0) if inside > np.float32(87.0) else -inside
        out[i] = store(low / (np.float32(1.0) + exp(exponent)) * load(ups[i]), tag)


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _add_row(a: Any, row: int, tag: Any) -> None:
    """x `[rows, width]` += y `[width]`."""
    x, y = vector(a.x + row * a.width * a.size, a.width, tag), vector(a.y, a.width, tag)
    for i in range(a.width):
        x[i] = store(load(x[i]) + load(y[i]), tag)


@njit  # type: ignore[untyped-decorator]
def _share(a: Any, first: int, last: int, tag: Any) -> None:
    for row in range(first, last):
        if a.operation == NORM:
            _norm_row(a, row, tag)
        elif a.operation == SPLIT:
            _split_row(a, row, tag)
        elif a.operation == SILU or a.operation == GELU:
            _gate_row(a, row, tag)
        else:
            _add_row(a, row, tag)


@cache
def load_kernel(half: bool) -> tuple[int, Callable[[int], None]]:
    """The kernel's address, and a way to call it on this thread. From numba's cache on disk where it is there."""
    tag, arguments = np.uint16(0) if half else np.float32(0), _ARGUMENTS  # closed over, so parts of the cache's key
    fingerprint = source_fingerprint(emitter, intrinsics, launching)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        a = carray(block, (1,), arguments)[0]
        share = take(block, TAKEN)
        while fingerprint and share < a.shares:
            _share(a, a.rows * share // a.shares, a.rows * (share + 1) // a.shares, tag)
            take(block, FINISHED)
            share = take(block, TAKEN)

    # PYFUNCTYPE keeps the interpreter's lock: such a call is over long before another thread could make use of it.
    return int(kernel.address), ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(kernel.address)


class _Block(threading.local):
    """One argument block a thread, used again for every call."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(_LAYOUT.size)
        self.address = ctypes.addressof(self.buffer)


_block = _Block()


def _run(
    operation: int,
    x: torch.Tensor,
    rows: int,
    width: int,
    addresses: tuple[int, int, int, int, int, int, int, int],
    heads: tuple[int, int] = (0, 0),
    eps: float = 0.0,
) -> None:
    """Run a kernel on x. addresses: of _ADDRESSES, the ones after x, 0 where there is none; heads: query and KV."""
    address, call = load_kernel(x.dtype == torch.bfloat16)
    threads = 1 if x.numel() < PARALLEL else min(torch.get_num_threads(), rows)
    sizes = (operation, x.element_size(), rows, width)
    _LAYOUT.pack_into(_block.buffer, 0, 0, 0, threads, *sizes, *heads, x.data_ptr(), *addresses, eps)
    if threads == 1:
        call(_block.address)
    else:
        launch(address, _block.address, threads)


def _address(name: str, tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> int:
    """Where the numbers of `tensor` are, once it is certain that as many of that kind may be read there."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device} with strides {tensor.stride()}, "
            f"expected {dtype} {list(shape)}, contiguous, on a CPU"
        )
    return tensor.data_ptr()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `dense.rms_norm`, for x `[n, d]`."""
    x = x.contiguous()
    rows, width = x.shape
    out = torch.empty_like(x)
    scale = _address("weight", weight, x.dtype, width)
    _run(NORM, x, rows, width, (0, out.data_ptr(), 0, 0, scale, 0, 0, 0), eps=eps)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `dense.add_rms_norm`."""
    x = x.contiguous()
    rows, width = x.shape
    y, scale = _address("residual", residual, x.dtype, rows, width), _address("weight", weight, x.dtype, width)
    out, total = torch.empty_like(x), torch.empty_like(x)
    _run(NORM, x, rows, width, (y, out.data_ptr(), total.data_ptr(), 0, scale, 0, 0, 0), eps=eps)
    return out, total


def split_heads(
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `dense.split_heads`."""
    qkv = qkv.contiguous()
    n, width, dtype = len(qkv), qkv.shape[1] // (heads + 2 * kv_heads), qkv.dtype
    _address("qkv", qkv, dtype, n, width * (heads + 2 * kv_heads))
    cos = sin = weight = k_weight = 0
    if rotation is not None:
        if width % 2:
            raise ValueError(f"rotation turns pairs, but a head has {width} numbers")
        cos, sin = (_address("rotation", x, torch.float32, n, width // 2) for x in rotation)
    if norms is not None:
        weight, k_weight = (_address("norm", x, dtype, width) for x in norms)
    q = torch.empty(n, heads, width, dtype=dtype)
    k, v = torch.empty(n, kv_heads, width, dtype=dtype), torch.empty(n, kv_heads, width, dtype=dtype)
    addresses = (0, q.data_ptr(), k.data_ptr(), v.data_ptr(), weight, k_weight, cos, sin)
    _run(SPLIT, qkv, n, width, addresses, (heads, kv_heads), eps)
    return q, k, v


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `dense.silu_mul`."""
    return _gated(SILU, gate_up)


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `dense.gelu_tanh_mul`."""
    return _gated(GELU, gate_up)


def _gated(operation: int, gate_up: torch.Tensor) -> torch.Tensor:
    gate_up = gate_up.contiguous()
    rows, width = len(gate_up), gate_up.shape[1] // 2
    _address("gate_up", gate_up, gate_up.dtype, rows, 2 * width)
    out = torch.empty(rows, width, dtype=gate_up.dtype)
    _run(operation, gate_up, rows, width, (0, out.data_ptr(), 0, 0, 0, 0, 0, 0))
    return out
