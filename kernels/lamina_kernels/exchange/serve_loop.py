"""The holder's half of a layer's exchange: answers the layers of all batches that it was told of, without Python.

It returns to Python for whatever it was not told of, with no byte of it consumed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, njit, types

from lamina_kernels.attention import loops, moves
from lamina_kernels.compile import calls, emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.intrinsics import pointer
from lamina_kernels.compile.launch import source_fingerprint
from lamina_kernels.exchange import exchange_blocks, frame_sockets, layer_work
from lamina_kernels.exchange.exchange_blocks import AGAIN, CHANNEL, HEAD, INTERRUPTED, SAME, SERVED, SERVER, TIMEOUT
from lamina_kernels.exchange.frame_sockets import IN, address_at, now, number, poll, receive, send
from lamina_kernels.exchange.layer_work import WORK, attend, store
from lamina_kernels.states import loops as states


@njit  # type: ignore[untyped-decorator]
def _compute(s: Any, functions: int, scratch: int, late: bool) -> None:
    """Attend the layer that has come and write the answer's numbers; store first, or later where `late`."""
    w = carray(pointer(s.work), (1,), WORK)[0]
    if s.stores and not late:
        store(w, s.layer, s.k, s.v)
    if s.attends:
        attend(w, s.layer, s.q, s.k, s.out, s.lse)
        number(s.reply + SAME)[0] = np.uint32(s.layer)
        duration = now(functions, scratch) - s.arrived
        carray(pointer(s.reply + SAME + 4), (1,), np.float32)[0] = np.float32(duration * 1e-9)


@njit  # type: ignore[untyped-decorator]
def _advance(s: Any, functions: int, scratch: int) -> None:
    """The layer is done; the next one is due."""
    s.nanoseconds += now(functions, scratch) - s.arrived
    s.arrived = 0
    s.layer = carray(pointer(s.following), (s.layers,), np.int64)[s.layer]
    if s.layer == s.layers:
        s.live = 0


@njit  # type: ignore[untyped-decorator]
def _answer(channel: int, found: int) -> Any:
    """Store and attend the layer that has come, and answer. Returns whether Python is needed."""
    c, s = carray(pointer(channel), (1,), CHANNEL)[0], carray(pointer(found), (1,), SERVED)[0]
    w = carray(pointer(s.work), (1,), WORK)[0]
    late = s.stores != 0 and s.attends != 0 and w.fused == 0
    _compute(s, c.functions, c.scratch + HEAD, late)
    if s.attends:
        s.sent, s.by = send(c, s.reply, s.reply_size, 0), channel
        c.sent += s.reply_size
        s.claimed = 1 if s.sent < s.reply_size else 0
    if late:
        store(w, s.layer, s.k, s.v)
    _advance(s, c.functions, c.scratch + HEAD)
    return s.live == 0 or s.claimed != 0


@njit  # type: ignore[untyped-decorator]
def _serve(a: Any) -> Any:
    """Answer layers until something else has happened: then 0, and `revents` of what is left for Python are set."""
    while True:
        n = poll(a.functions, a.polls, a.n, a.timeout_ms)
        if n == 0:
            return TIMEOUT
        if n < 0:
            return INTERRUPTED
        polls = carray(pointer(a.polls), (a.n, 4), np.int16)  # struct pollfd: int descriptor, short events, revents
        python = False
        for i in range(a.n):
            events = polls[i, 3]
            if events == 0:
                continue
            address = address_at(a.channels, i)
            if address == 0 or events != IN:
                python = True
                continue
            c = carray(pointer(address), (1,), CHANNEL)[0]
            result = receive(c)
            if result == AGAIN:
                polls[i, 3] = 0
            elif result < 0:
                python = True
            else:
                polls[i, 3] = 0
                if _answer(address, result):
                    python = True
        if python:
            return 0


@cache
def serve_kernel() -> int:
    """The address of the holder's loop: void(SERVER*)."""
    fingerprint, server = _fingerprint(), SERVER

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        a = carray(block, (1,), server)[0]
        if fingerprint:
            a.result = _serve(a)

    return int(kernel.address)


@cache
def answer_kernel() -> int:
    """The address of one answer whose frames are carried by Python: void(SERVED*). Its frame has come, and `by` is the
    address of 16 bytes of scratch."""
    fingerprint, served = _fingerprint(), SERVED

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        s = carray(block, (1,), served)[0]
        if fingerprint:
            functions = carray(pointer(s.work), (1,), WORK)[0].functions
            s.arrived = now(functions, s.by)
            _compute(s, functions, s.by, False)
            _advance(s, functions, s.by)

    return int(kernel.address)


def _fingerprint() -> int:
    return source_fingerprint(
        calls, exchange_blocks, frame_sockets, layer_work, loops, states, moves, intrinsics, emitter, launching
    )
