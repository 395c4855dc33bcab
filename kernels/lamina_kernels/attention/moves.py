"""The compiled loops that put K and V into pages, quantising them where pages want that, and move them about."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, njit, types

from lamina_kernels.compile import emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.intrinsics import pointer, take
from lamina_kernels.compile.launch import HEADER, TAKEN, source_fingerprint
from lamina_kernels.paged import pages

# The fields of the pages in every block of arguments. Sizes in bytes.
_SIZES = ("page_size", "page_bytes", "k_bytes", "kv_bytes", "itemsize", "k_pack", "v_pack", "scaled")
_WIDTHS = ("d_k", "d_v", "own_v")
PAGES = [(name, "i8") for name in ("arena", *_SIZES, *_WIDTHS)]
APPEND = np.dtype([*HEADER, *PAGES, *((name, "i8") for name in ("n", "slots", "k", "v", "codes"))])
CODES = pages.MOST_OF_LATENT + pages.MOST  # bytes of scratch that a share needs for codes: the widest K


@njit  # type: ignore[untyped-decorator]
def move(source: int, source_stride: int, target: int, target_stride: int, n: int, size: int) -> None:
    """Copy n numbers of `size` bytes, 1, 2 or 4, that stand `source_stride` numbers apart, to `target_stride` apart."""
    if size == 4:
        words, to_words = _numbers(source, n, source_stride, np.int32), _numbers(target, n, target_stride, np.int32)
        for i in range(n):
            to_words[i, 0] = words[i, 0]
    elif size == 2:
        halves, to_halves = _numbers(source, n, source_stride, np.int16), _numbers(target, n, target_stride, np.int16)
        for i in range(n):
            to_halves[i, 0] = halves[i, 0]
    else:
        bytes_, to_bytes = _numbers(source, n, source_stride, np.int8), _numbers(target, n, target_stride, np.int8)
        for i in range(n):
            to_bytes[i, 0] = bytes_[i, 0]


@njit  # type: ignore[untyped-decorator]
def _numbers(address: int, n: int, stride: int, kind: Any) -> Any:
    return carray(pointer(address), (n, stride), kind)


@njit  # type: ignore[untyped-decorator]
def value_offset(a: Any, token: int) -> Any:
    """Bytes from a V block, or a strip of one, to the first channel of a token."""
    return (token // a.v_pack * a.d_v * a.v_pack + token % a.v_pack) * a.itemsize


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _quantise(source: int, n: int, codes: int) -> Any:
    """`pages.quantise` of one float32 vector to int8: writes the codes, returns the scale."""
    x, out = carray(pointer(source), (n,), np.float32), carray(pointer(codes), (n,), np.int8)
    peak = np.float32(0.0)
    for i in range(n):
        if not np.abs(x[i]) <= peak:  # NaN is the largest, and stays it
            peak = np.abs(x[i]) if peak == peak else peak
    scale = peak / np.float32(127.0)
    usable = scale > 0 and scale < np.inf
    for i in range(n):
        code = np.rint(x[i] / scale) if usable else np.float32(0.0)
        out[i] = np.int8(min(max(code, np.float32(-127.0)), np.float32(127.0)))
    return scale


@njit  # type: ignore[untyped-decorator]
def _append_shares(block: Any) -> None:
    a = carray(block, (1,), APPEND)[0]
    slots = carray(pointer(a.slots), (a.n,), np.int64)
    share = take(block, TAKEN)
    while share < a.shares:
        codes = a.codes + share * CODES
        for i in range(a.n * share // a.shares, a.n * (share + 1) // a.shares):
            address, offset = a.arena + slots[i] // a.page_size * a.page_bytes, slots[i] % a.page_size
            k, v = a.k + i * a.d_k * a.itemsize, a.v + i * a.d_v * a.itemsize
            word = a.k_pack * a.itemsize
            scales = carray(pointer(address + a.kv_bytes), (2 * a.page_size,), np.float32)
            if a.scaled:
                scales[offset] = _quantise(a.k + i * a.d_k * 4, a.d_k, codes)
                k = codes
            move(k, 1, address + offset * word, a.page_size, a.d_k // a.k_pack, word)
            if not a.own_v:
                continue
            if a.scaled:
                scales[a.page_size + offset] = _quantise(a.v + i * a.d_v * 4, a.d_v, codes)
                v = codes
            values = address + a.k_bytes + value_offset(a, offset)
            move(v, 1, values, a.v_pack, a.d_v, a.itemsize)
        share = take(block, TAKEN)


@cache
def append_kernel() -> int:
    """The address of the kernel that stores K and V, compiled where numba's cache on disk does not have it yet."""
    fingerprint = source_fingerprint(intrinsics, emitter, launching, pages)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _append_shares(block)

    return int(kernel.address)
