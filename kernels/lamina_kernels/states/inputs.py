"""What goes into a state, convolved and normalised, and what comes out of it, by compiled code."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from lamina_kernels.compile.intrinsics import pointer
from lamina_kernels.states import micro
from lamina_kernels.states.layout import EPSILON
from lamina_kernels.states.micro import Convolve


@njit  # type: ignore[untyped-decorator]
def floats(address: int, n: int) -> Any:
    return carray(pointer(address), (n,), np.float32)


@njit  # type: ignore[untyped-decorator]
def move(source: int, target: int, n: int) -> None:
    """Copy n numbers to where they may overlap those behind them."""
    numbers, destination = floats(source, n), floats(target, n)
    for i in range(n):
        destination[i] = numbers[i]


@njit  # type: ignore[untyped-decorator]
def _load(dtype: int, source: int, target: int, n: int) -> None:
    """n numbers of a dtype, its place in `operands.DTYPES`, as float32."""
    if dtype == 1:
        micro.widen(0, source, target, n >> 4)
    elif dtype == 2:
        micro.widen(1, source, target, n >> 4)
    else:
        move(source, target, n)


@njit  # type: ignore[untyped-decorator]
def give(a: Any, item: Any, token: int, value: int, v: int) -> None:
    """Write the output `[d_v]` of a token of an item, read of the state at `value`, where x's v is."""
    if a.skip:
        outs, values, skip = floats(value, a.d_v), floats(v, a.d_v), floats(a.skip, a.heads)[item.head]
        for c in range(a.d_v):
            outs[c] += skip * values[c]
    out = a.out + (item.out + token * item.out_width) * a.itemsize
    if a.dtype == 1:
        micro.narrow(0, value, out, a.d_v >> 4)
    elif a.dtype == 2:
        micro.narrow(1, value, out, a.d_v >> 4)
    else:
        move(value, out, a.d_v)


@njit  # type: ignore[untyped-decorator]
def _channels(a: Any, inputs: Any, column: int, place: int, n: int, out: Any) -> None:
    """Convolve n channels: those from `column` on of the inputs `[conv, channels]`, from `place` on of the weights."""
    weights, stride = a.weights + place * 4, (2 * a.d_k + a.d_v) * 4
    address = inputs + column * 4
    micro.convolve(Convolve(a.conv, address, stride, weights, a.channels * 4, a.bias + place * 4, out, n >> 4))


@njit  # type: ignore[untyped-decorator]
def _take(a: Any, item: Any, dtype: int, at: Any, t: int, shift: int) -> None:
    """q, k and v of the t-th token in scratch, ready for the state, from its inputs at these three addresses."""
    d_k, d_v, width = a.d_k, a.d_v, 2 * a.d_k + a.d_v
    q, k, v = (a.q + shift + t * d_k * 4, a.k + shift + t * d_k * 4, a.v + shift + t * d_v * 4)
    if a.conv:
        inputs = a.inputs + shift + t * width * 4
        newest = inputs + (a.conv - 1) * width * 4
        _load(dtype, at[0], newest, d_k)
        _load(dtype, at[1], newest + d_k * 4, d_k)
        _load(dtype, at[2], newest + 2 * d_k * 4, d_v)
        _channels(a, inputs, 0, item.key * d_k, d_k, q)
        _channels(a, inputs, d_k, (a.key_heads + item.key) * d_k, d_k, k)
        _channels(a, inputs, 2 * d_k, 2 * a.key_heads * d_k + item.head * d_v, d_v, v)
    else:
        _load(dtype, at[0], q, d_k)
        _load(dtype, at[1], k, d_k)
        _load(dtype, at[2], v, d_v)
    if a.delta:
        micro.normalise(q, d_k >> 4, np.float32(EPSILON), np.float32(a.scale))
        micro.normalise(k, d_k >> 4, np.float32(EPSILON), np.float32(1.0))
    elif a.scale != 1.0:
        queries, scale = floats(q, d_k), np.float32(a.scale)
        for c in range(d_k):
            queries[c] *= scale


@njit  # type: ignore[untyped-decorator]
def _given(a: Any, item: Any, token: int) -> Any:
    """The addresses of q, k and v of a token of an item, in x."""
    x, size = a.x + (item.x + token * item.width) * a.itemsize, a.itemsize
    return x + item.q * size, x + item.k * size, x + item.v * size


@njit  # type: ignore[untyped-decorator]
def _pass_on(a: Any, n: int, shift: int) -> None:
    """After n tokens the last inputs of the convolution are the first of the next tokens'."""
    if a.conv:
        width = 2 * a.d_k + a.d_v
        move(a.inputs + shift + n * width * 4, a.inputs + shift, (a.conv - 1) * width)


@njit  # type: ignore[untyped-decorator]
def take_tokens(a: Any, item: Any, first: int, n: int, shift: int) -> None:
    """q, k `[n, d_k]` and v `[n, d_v]` of an item's tokens from `first` on, ready for the state, in scratch.

    The convolution's last inputs stand at the beginning of `inputs` before and after.
    """
    for t in range(n):
        _take(a, item, a.dtype, _given(a, item, first + t), t, shift)
    _pass_on(a, n, shift)


@njit  # type: ignore[untyped-decorator]
def keep_token(a: Any, item: Any, token: int, slot: int) -> None:
    """Copy the inputs and gates of an item's token to where they are kept."""
    q, k, v = _given(a, item, token)
    _load(a.dtype, q, slot, a.d_k)
    _load(a.dtype, k, slot + a.d_k * 4, a.d_k)
    _load(a.dtype, v, slot + 2 * a.d_k * 4, a.d_v)
    move(a.gates + (item.gates + token * item.gates_width) * 4, slot + (2 * a.d_k + a.d_v) * 4, a.gates_size)


@njit  # type: ignore[untyped-decorator]
def take_kept(a: Any, item: Any, slot: int, shift: int) -> None:
    """As `take_tokens`, of one token whose inputs are kept in a slot."""
    _take(a, item, 0, (slot, slot + a.d_k * 4, slot + 2 * a.d_k * 4), 0, shift)
    _pass_on(a, 1, shift)
