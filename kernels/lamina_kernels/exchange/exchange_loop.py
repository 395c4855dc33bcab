"""The model's half of a layer's exchange, without Python: asks all holders of a layer, attends what is kept in this
process, waits for all answers, and merges them.

It returns to Python for whatever it was not told of, with no byte of it consumed, and goes on when it is called again.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, njit, types

from lamina_kernels.attention import loops, moves
from lamina_kernels.attention import merge as merging
from lamina_kernels.attention.merge import MERGE
from lamina_kernels.compile import calls, emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.calls import call
from lamina_kernels.compile.intrinsics import pointer
from lamina_kernels.compile.launch import source_fingerprint
from lamina_kernels.exchange import exchange_blocks, frame_sockets, layer_work
from lamina_kernels.exchange.exchange_blocks import (
    AGAIN,
    ASKED,
    ATTENDED,
    CARRY,
    CHANNEL,
    EXCHANGE,
    HERE,
    INTERRUPTED,
    REMOTE,
    SAME,
    TIMEOUT,
    WAITING,
)
from lamina_kernels.exchange.frame_sockets import IN, OUT, address_at, now, number, poll, receive, send
from lamina_kernels.exchange.layer_work import COPY, WORK, attend, function, run_shares, store
from lamina_kernels.states import loops as states


@njit  # type: ignore[untyped-decorator]
def _gather(functions: int, source: int, index: int, count: int, size: int, to: int) -> Any:
    """`count` vectors of `size` bytes, those that `index` numbers or the first ones, one after another. Returns where
    they are: at `source` where nothing had to be moved."""
    if index == 0:
        if to == 0:
            return source
        call(function(functions, COPY), to, source, count * size, 0, 0, 0)
        return to
    numbers = carray(pointer(index), (count,), np.int64)
    words = size // 8
    for i in range(count):
        x = carray(pointer(source + numbers[i] * size), (words,), np.int64)
        y = carray(pointer(to + i * size), (words,), np.int64)
        for word in range(words):
            y[word] = x[word]
    return to


@njit  # type: ignore[untyped-decorator]
def _ask(a: Any, remotes: Any) -> None:
    """Ask the holders elsewhere."""
    a.asked = now(a.functions, a.scratch)
    for i in range(a.n_remotes):
        r = remotes[i]
        _gather(a.functions, a.q, r.q_index, r.q_count, r.q_bytes, r.q_to)
        _gather(a.functions, a.k, r.k_index, r.k_count, r.k_bytes, r.k_to)
        _gather(a.functions, a.v, r.v_index, r.v_count, r.v_bytes, r.v_to)
        number(r.sent_frame + SAME)[0] = np.uint32(a.layer)
        r.layer = a.layer
        r.arrived = 0 if r.size else 1
        r.live = 1 if r.size else 0
        if r.channel:
            c = carray(pointer(r.channel), (1,), CHANNEL)[0]
            r.sent = send(c, r.sent_frame, r.sent_size, 0)
            c.sent += r.sent_size
    a.begun = ASKED


@njit  # type: ignore[untyped-decorator]
def _attend_here(a: Any, here: Any) -> None:
    for i in range(a.n_here):
        h = here[i]
        w = carray(pointer(h.work), (1,), WORK)[0]
        start = now(a.functions, a.scratch)
        k = _gather(a.functions, a.k, h.k_index, h.k_count, h.k_bytes, h.k_to)
        if w.stores:
            v = _gather(a.functions, a.v, h.v_index, h.v_count, h.v_bytes, h.v_to)
            store(w, a.layer, k, v)
        if w.attends:
            q = _gather(a.functions, a.q, h.q_index, h.q_count, h.q_bytes, h.q_to)
            attend(w, a.layer, q, k, h.out, h.lse)
        duration = now(a.functions, a.scratch) - start
        carray(pointer(h.taken), (w.layers,), np.int64)[a.layer] = duration
        a.local += duration
    a.waits_since = now(a.functions, a.scratch)
    a.begun = ATTENDED


@njit  # type: ignore[untyped-decorator]
def _wait(a: Any, remotes: Any) -> Any:
    """Until all holders elsewhere have answered: 0, or a result, and `at` says whose."""
    polls = carray(pointer(a.polls), (max(a.n_remotes, 1), 4), np.int16)
    descriptors = carray(pointer(a.polls), (max(a.n_remotes, 1), 2), np.int32)
    while True:
        pending, carried, wait_ns, time = 0, -1, np.int64(1) << 62, now(a.functions, a.scratch)
        for i in range(a.n_remotes):
            r = remotes[i]
            descriptors[i, 0] = -1
            if r.channel == 0:
                carried = i if r.arrived == 0 else carried
                continue
            c = carray(pointer(r.channel), (1,), CHANNEL)[0]
            r.sent = send(c, r.sent_frame, r.sent_size, r.sent)
            unsent = r.sent < r.sent_size
            if unsent or r.arrived == 0:
                pending += 1
                descriptors[i, 0] = np.int32(c.descriptor)
                polls[i, 2] = IN | (OUT if unsent else 0)
                if a.asked + r.timeout - time < wait_ns:
                    wait_ns, a.at = a.asked + r.timeout - time, i
        if pending == 0:
            a.at = max(carried, 0)
            return 0 if carried < 0 else CARRY
        wait_ms = wait_ns // 1_000_000 + 1 if wait_ns > 0 else 1
        n = poll(a.functions, a.polls, a.n_remotes, wait_ms if a.waits else 0)
        if n < 0:
            return INTERRUPTED
        if n == 0 and wait_ns <= 0:  # first: a batch that is suspended for slow holders never waits for this one
            return TIMEOUT
        if n == 0 and not a.waits:
            return WAITING
        for i in range(a.n_remotes if n > 0 else 0):
            if descriptors[i, 0] >= 0 and polls[i, 3] & ~OUT:
                result = receive(carray(pointer(remotes[i].channel), (1,), CHANNEL)[0])
                if result < 0 and result != AGAIN:
                    a.at = i
                    return result


@njit  # type: ignore[untyped-decorator]
def _finish(a: Any, remotes: Any) -> None:
    """Merge what has come, and count the time."""
    if a.n_remotes:
        slowest, last, time = np.float32(0.0), a.asked, now(a.functions, a.scratch)
        for i in range(a.n_remotes):
            r = remotes[i]
            if r.size:
                slowest = max(slowest, carray(pointer(r.frame + SAME + 4), (1,), np.float32)[0])
                carray(pointer(r.taken), (r.layers,), np.int64)[a.layer] = r.arrived - a.asked
                last = max(last, r.arrived)
        answered = last - a.asked
        a.remote += np.int64(min(np.float64(slowest) * 1e9, np.float64(answered)))  # whatever the holders say
        a.answered += answered
        a.waited += time - a.waits_since
    if a.n_merges:
        # What merging begins with counts nothing, but it must be finite.
        carray(pointer(a.whole_out), (a.whole_bytes,), np.uint8)[:] = 0
        carray(pointer(a.whole_lse), (a.whole,), np.float32)[:] = -np.inf
        for i in range(a.n_merges):
            address = address_at(a.merges, i)
            m = carray(pointer(address), (1,), MERGE)[0]
            m.taken = 0
            run_shares(a.functions, a.merge_kernel, address, m.shares)
    a.begun = 0
    a.layer += 1


@njit  # type: ignore[untyped-decorator]
def _exchange(a: Any) -> Any:
    remotes = carray(pointer(a.remotes), (a.n_remotes,), REMOTE)
    if a.begun == 0:
        _ask(a, remotes)
        if a.carried:
            return CARRY
    if a.begun == ASKED:
        _attend_here(a, carray(pointer(a.here), (a.n_here,), HERE))
    result = _wait(a, remotes) if a.n_remotes else 0
    if result == 0:
        _finish(a, remotes)
    return result


@cache
def exchange_kernel() -> int:
    """The address of the model's half: void(EXCHANGE*). Called again after a result other than 0 it goes on."""
    fingerprint, exchange = _fingerprint(), EXCHANGE

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        a = carray(block, (1,), exchange)[0]
        if fingerprint:
            a.result = _exchange(a)

    return int(kernel.address)


def _fingerprint() -> int:
    return source_fingerprint(
        calls, exchange_blocks, frame_sockets, layer_work, loops, states, moves, merging, intrinsics, emitter, launching
    )
