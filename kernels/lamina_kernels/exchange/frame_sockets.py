"""Compiled code that takes expected frames off a socket, and sends frames, as far as it can without waiting."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from lamina_kernels.compile.calls import call
from lamina_kernels.compile.intrinsics import pointer
from lamina_kernels.exchange.exchange_blocks import AGAIN, ENDED, EXPECTED, HEAD, OTHER, SAME
from lamina_kernels.exchange.layer_work import CLOCK, ERRNO, POLL, RECEIVE, SEND, function

_PEEK, _DONT_WAIT, _NO_SIGNAL = 2, 0x40, 0x4000  # of Linux
_EAGAIN, _EINTR = 11, 4
IN, OUT = 1, 4  # events of poll
_MONOTONIC = 1

_EXPECTED = np.dtype(EXPECTED)


@njit  # type: ignore[untyped-decorator]
def now(functions: int, scratch: int) -> Any:
    """Nanoseconds."""
    call(function(functions, CLOCK), _MONOTONIC, scratch, 0, 0, 0, 0)
    time = carray(pointer(scratch), (2,), np.int64)
    return time[0] * 1_000_000_000 + time[1]


@njit  # type: ignore[untyped-decorator]
def _errno(functions: int) -> Any:
    return carray(pointer(call(function(functions, ERRNO), 0, 0, 0, 0, 0, 0)), (1,), np.int32)[0]


@njit  # type: ignore[untyped-decorator]
def number(address: int) -> Any:
    """The u32 at an address, as an array of it."""
    return carray(pointer(address), (1,), np.uint32)


@njit  # type: ignore[untyped-decorator]
def address_at(addresses: int, number: int) -> Any:
    return carray(pointer(addresses), (number + 1,), np.int64)[number]


@njit  # type: ignore[untyped-decorator]
def poll(functions: int, polls: int, n: int, timeout_ms: int) -> Any:
    return np.int32(call(function(functions, POLL), polls, n, timeout_ms, 0, 0, 0) & 0xFFFFFFFF)


@njit  # type: ignore[untyped-decorator]
def _expected(c: Any, header: int) -> Any:
    """The address of the block that expects the frame of this header, 0 where none does."""
    words = carray(pointer(header), (8,), np.int64)
    layer = number(header + SAME)[0]
    seconds = carray(pointer(header + SAME + 4), (1,), np.float32)[0]
    for i in range(c.n_expected):
        address = address_at(c.expected, i)
        e = carray(pointer(address), (1,), _EXPECTED)[0]
        fits = seconds == 0 or (e.timed != 0 and seconds > 0 and seconds < np.inf)
        if e.live and e.arrived == 0 and e.claimed == 0 and fits and np.int64(layer) == e.layer:
            head = carray(pointer(e.head), (8,), np.int64)
            match = True
            for word in range(SAME // 8):
                match = match and words[word] == head[word]
            if match:
                return address
    return 0


@njit  # type: ignore[untyped-decorator]
def receive(c: Any) -> Any:
    """Take one expected frame, as far as it is there: the address of its block once it is whole, or a result."""
    if c.current == 0:
        n = call(function(c.functions, RECEIVE), c.descriptor, c.scratch, HEAD, _PEEK | _DONT_WAIT, 0, 0)
        if n == 0:
            return ENDED
        if n < 0:
            error = _errno(c.functions)
            return AGAIN if error in (_EAGAIN, _EINTR) else OTHER
        if n < HEAD:
            return OTHER
        c.current = _expected(c, c.scratch)
        c.have = 0
        if c.current == 0:
            return OTHER
        carray(pointer(c.current), (1,), _EXPECTED)[0].claimed = 1
    e = carray(pointer(c.current), (1,), _EXPECTED)[0]
    while c.have < e.size:
        n = call(function(c.functions, RECEIVE), c.descriptor, e.frame + c.have, e.size - c.have, _DONT_WAIT, 0, 0)
        if n == 0:
            return ENDED
        if n < 0:
            error = _errno(c.functions)
            return AGAIN if error in (_EAGAIN, _EINTR) else OTHER
        c.have += n
    block = c.current
    c.received += e.size
    c.current = 0
    c.have = 0
    e.claimed = 0
    e.arrived = now(c.functions, c.scratch + HEAD)
    return block


@njit  # type: ignore[untyped-decorator]
def send(c: Any, frame: int, size: int, done: int) -> Any:
    """Send what is left of a frame, as far as there is room. Returns how much of it has left; a broken socket is found
    when it is read."""
    while done < size:
        n = call(function(c.functions, SEND), c.descriptor, frame + done, size - done, _DONT_WAIT | _NO_SIGNAL, 0, 0)
        if n <= 0:
            if n < 0 and _errno(c.functions) == _EINTR:
                continue
            break
        done += n
    return done
