"""The compiled halves of a layer's exchange: frames of known headers over sockets, without Python in between.

`serve_kernel` is the holder's half: it answers the layers of all batches that it was told of. `exchange_kernel` is the
model's: it asks all holders of a layer, attends what is kept in this process, waits for all, and merges. Both return
to Python for whatever they were not told of, with no byte of it consumed. They know addresses, sizes and offsets, and
no message: blocks are filled in by their callers from the codec's layout.

A frame is told by its first 64 bytes. All but the last eight must be those of the block that expects it, then comes the
layer's number, which must be the one that is due.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, njit, types

from lamina_kernels.cpu import calls, emitter, intrinsics, layer_work
from lamina_kernels.cpu import launch as launching
from lamina_kernels.cpu import merge as merging
from lamina_kernels.cpu.calls import call
from lamina_kernels.cpu.intrinsics import pointer
from lamina_kernels.cpu.launch import block_type, source_fingerprint
from lamina_kernels.cpu.layer_work import (
    CLOCK,
    COPY,
    ERRNO,
    POLL,
    RECEIVE,
    SEND,
    WORK,
    attend,
    function,
    run_shares,
    store,
)
from lamina_kernels.cpu.merge import MERGE

logger = logging.getLogger("lamina")

ASKED, ATTENDED = 1, 2  # how far an exchange is
HEAD, SAME = 64, 56  # bytes of a header, and of those how many are the same in each layer
AGAIN, OTHER, ENDED, TIMEOUT, INTERRUPTED, WAITING, CARRY = -1, -2, -3, -4, -5, -6, -7
"""Nothing is there now; a frame that no block expects, or a broken socket; its end; no answer in time; a signal came;
an answer is not there yet, and the caller does not wait; frames are to be sent, or to be received, by Python. OTHER and
ENDED are for Python to look at."""

_PEEK, _DONT_WAIT, _NO_SIGNAL = 2, 0x40, 0x4000  # of Linux
_EAGAIN, _EINTR = 11, 4
_IN, _OUT = 1, 4  # events of poll
_MONOTONIC = 1

EXPECTED = [
    ("live", "i8"),
    ("layer", "i8"),  # that is due
    ("layers", "i8"),
    ("head", "i8"),  # address of the header that its frames have
    ("frame", "i8"),  # where a frame goes, and its bytes
    ("size", "i8"),
    ("arrived", "i8"),  # when, in nanoseconds; 0: not yet
]
CHANNEL = np.dtype(
    [
        ("functions", "i8"),
        ("descriptor", "i8"),
        ("scratch", "i8"),  # address of 128 bytes: a header, a time, a number
        ("current", "i8"),  # address of the EXPECTED whose frame is arriving, 0: none; and how much of it has come
        ("have", "i8"),
        ("expected", "i8"),  # address of the addresses of those that may come
        ("n_expected", "i8"),
        ("received", "i8"),  # bytes so far
        ("sent", "i8"),
    ]
)
SERVED = np.dtype(
    [
        *EXPECTED,
        ("work", "i8"),
        ("q", "i8"),  # addresses in the frame
        ("k", "i8"),
        ("v", "i8"),
        ("stores", "i8"),
        ("attends", "i8"),
        ("reply", "i8"),  # the answer's frame, its bytes, and how many of them have left
        ("reply_size", "i8"),
        ("sent", "i8"),
        ("by", "i8"),  # address of the channel over which the last answer was sent, or of scratch
        ("out", "i8"),  # addresses in the answer
        ("lse", "i8"),
        ("nanoseconds", "i8"),  # spent so far
    ]
)
SERVER = np.dtype(
    [("polls", "i8"), ("n", "i8"), ("channels", "i8"), ("functions", "i8"), ("timeout_ms", "i8"), ("result", "i8")]
)
GATHERED = [(f"{x}_{what}", "i8") for x in "qkv" for what in ("index", "count", "bytes", "to")]
REMOTE = np.dtype(
    [
        *EXPECTED,
        ("channel", "i8"),  # 0: its frames are carried by Python
        ("sent_frame", "i8"),
        ("sent_size", "i8"),
        ("sent", "i8"),
        *GATHERED,
        ("timeout", "i8"),  # nanoseconds
        ("taken", "i8"),  # address of int64 [layers]: nanoseconds from asking to the answer
    ]
)
HERE = np.dtype([("work", "i8"), *GATHERED, ("out", "i8"), ("lse", "i8")])
EXCHANGE = np.dtype(
    [
        ("functions", "i8"),
        ("scratch", "i8"),
        ("layer", "i8"),
        ("begun", "i8"),  # ASKED, then ATTENDED
        ("waits", "i8"),
        ("carried", "i8"),  # how many of the remotes have no channel
        ("q", "i8"),  # addresses of the layer's q, k and v
        ("k", "i8"),
        ("v", "i8"),
        ("n_remotes", "i8"),
        ("remotes", "i8"),
        ("n_here", "i8"),
        ("here", "i8"),
        ("polls", "i8"),
        ("n_merges", "i8"),
        ("merges", "i8"),
        ("merge_kernel", "i8"),
        ("whole", "i8"),  # vectors that answers are merged into
        ("whole_lse", "i8"),
        ("whole_out", "i8"),
        ("whole_bytes", "i8"),
        ("asked", "i8"),  # times in nanoseconds
        ("waits_since", "i8"),
        ("at", "i8"),  # which remote a result is about
        ("result", "i8"),
        ("local", "i8"),  # sums in nanoseconds
        ("remote", "i8"),
        ("answered", "i8"),
        ("waited", "i8"),
    ]
)
Channel, Served, Server, Remote, Here, Exchange = map(block_type, (CHANNEL, SERVED, SERVER, REMOTE, HERE, EXCHANGE))
_EXPECTED = np.dtype(EXPECTED)


@njit  # type: ignore[untyped-decorator]
def _now(functions: int, scratch: int) -> Any:
    """Nanoseconds."""
    call(function(functions, CLOCK), _MONOTONIC, scratch, 0, 0, 0, 0)
    time = carray(pointer(scratch), (2,), np.int64)
    return time[0] * 1_000_000_000 + time[1]


@njit  # type: ignore[untyped-decorator]
def _errno(functions: int) -> Any:
    return carray(pointer(call(function(functions, ERRNO), 0, 0, 0, 0, 0, 0)), (1,), np.int32)[0]


@njit  # type: ignore[untyped-decorator]
def _number(address: int) -> Any:
    """The u32 at an address, as an array of it."""
    return carray(pointer(address), (1,), np.uint32)


@njit  # type: ignore[untyped-decorator]
def _address(addresses: int, number: int) -> Any:
    return carray(pointer(addresses), (number + 1,), np.int64)[number]


@njit  # type: ignore[untyped-decorator]
def _poll(functions: int, polls: int, n: int, timeout_ms: int) -> Any:
    return np.int32(call(function(functions, POLL), polls, n, timeout_ms, 0, 0, 0) & 0xFFFFFFFF)


@njit  # type: ignore[untyped-decorator]
def _expected(c: Any, header: int) -> Any:
    """The address of the block that expects the frame of this header, 0 where none does."""
    words = carray(pointer(header), (8,), np.int64)
    layer = _number(header + SAME)[0]
    for i in range(c.n_expected):
        address = _address(c.expected, i)
        e = carray(pointer(address), (1,), _EXPECTED)[0]
        if e.live and e.arrived == 0 and np.int64(layer) == e.layer:
            head = carray(pointer(e.head), (8,), np.int64)
            same = True
            for word in range(SAME // 8):
                same = same and words[word] == head[word]
            if same:
                return address
    return 0


@njit  # type: ignore[untyped-decorator]
def _receive(c: Any) -> Any:
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
    e = carray(pointer(c.current), (1,), _EXPECTED)[0]
    while c.have < e.size:
        n = call(function(c.functions, RECEIVE), c.descriptor, e.frame + c.have, e.size - c.have, _DONT_WAIT, 0, 0)
        if n == 0:
            return ENDED
        if n < 0:
            error = _errno(c.functions)
            return AGAIN if error in (_EAGAIN, _EINTR) else OTHER
        c.have += n
    found = c.current
    c.received += e.size
    c.current = 0
    c.have = 0
    e.arrived = _now(c.functions, c.scratch + HEAD)
    return found


@njit  # type: ignore[untyped-decorator]
def _send(c: Any, frame: int, size: int, done: int) -> Any:
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


# The holder's half.


@njit  # type: ignore[untyped-decorator]
def _compute(s: Any, functions: int, scratch: int, late: bool) -> None:
    """Attend the layer that has come and write the answer's numbers; store first, or later where `late`."""
    w = carray(pointer(s.work), (1,), WORK)[0]
    if s.stores and not late:
        store(w, s.layer, s.k, s.v)
    if s.attends:
        attend(w, s.layer, s.q, s.out, s.lse)
        _number(s.reply + SAME)[0] = np.uint32(s.layer)
        taken = _now(functions, scratch) - s.arrived
        carray(pointer(s.reply + SAME + 4), (1,), np.float32)[0] = np.float32(taken * 1e-9)


@njit  # type: ignore[untyped-decorator]
def _advance(s: Any, functions: int, scratch: int) -> None:
    """The layer is done; the next one is due."""
    s.nanoseconds += _now(functions, scratch) - s.arrived
    s.arrived = 0
    s.layer += 1
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
        s.sent, s.by = _send(c, s.reply, s.reply_size, 0), channel
        c.sent += s.reply_size
    if late:
        store(w, s.layer, s.k, s.v)
    _advance(s, c.functions, c.scratch + HEAD)
    return s.live == 0 or s.sent < s.reply_size


@njit  # type: ignore[untyped-decorator]
def _serve(a: Any) -> Any:
    """Answer layers until something else has happened: then 0, and `revents` of what is left for Python are set."""
    while True:
        n = _poll(a.functions, a.polls, a.n, a.timeout_ms)
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
            address = _address(a.channels, i)
            if address == 0 or events != _IN:
                python = True
                continue
            c = carray(pointer(address), (1,), CHANNEL)[0]
            found = _receive(c)
            if found == AGAIN:
                polls[i, 3] = 0
            elif found < 0:
                python = True
            else:
                polls[i, 3] = 0
                if _answer(address, found):
                    python = True
        if python:
            return 0


# The model's half.


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
    a.asked = _now(a.functions, a.scratch)
    for i in range(a.n_remotes):
        r = remotes[i]
        _gather(a.functions, a.q, r.q_index, r.q_count, r.q_bytes, r.q_to)
        _gather(a.functions, a.k, r.k_index, r.k_count, r.k_bytes, r.k_to)
        _gather(a.functions, a.v, r.v_index, r.v_count, r.v_bytes, r.v_to)
        _number(r.sent_frame + SAME)[0] = np.uint32(a.layer)
        r.layer = a.layer
        r.arrived = 0 if r.size else 1
        r.live = 1 if r.size else 0
        if r.channel:
            c = carray(pointer(r.channel), (1,), CHANNEL)[0]
            r.sent = _send(c, r.sent_frame, r.sent_size, 0)
            c.sent += r.sent_size
    a.begun = ASKED


@njit  # type: ignore[untyped-decorator]
def _attend_here(a: Any, here: Any) -> None:
    for i in range(a.n_here):
        h = here[i]
        w = carray(pointer(h.work), (1,), WORK)[0]
        begun = _now(a.functions, a.scratch)
        if w.stores:
            k = _gather(a.functions, a.k, h.k_index, h.k_count, h.k_bytes, h.k_to)
            v = _gather(a.functions, a.v, h.v_index, h.v_count, h.v_bytes, h.v_to)
            store(w, a.layer, k, v)
        if w.attends:
            q = _gather(a.functions, a.q, h.q_index, h.q_count, h.q_bytes, h.q_to)
            attend(w, a.layer, q, h.out, h.lse)
        a.local += _now(a.functions, a.scratch) - begun
    a.waits_since = _now(a.functions, a.scratch)
    a.begun = ATTENDED


@njit  # type: ignore[untyped-decorator]
def _wait(a: Any, remotes: Any) -> Any:
    """Until all holders elsewhere have answered: 0, or a result, and `at` says whose."""
    polls = carray(pointer(a.polls), (max(a.n_remotes, 1), 4), np.int16)
    descriptors = carray(pointer(a.polls), (max(a.n_remotes, 1), 2), np.int32)
    while True:
        pending, carried, left, now = 0, -1, np.int64(1) << 62, _now(a.functions, a.scratch)
        for i in range(a.n_remotes):
            r = remotes[i]
            descriptors[i, 0] = -1
            if r.channel == 0:
                carried = i if r.arrived == 0 else carried
                continue
            c = carray(pointer(r.channel), (1,), CHANNEL)[0]
            r.sent = _send(c, r.sent_frame, r.sent_size, r.sent)
            unsent = r.sent < r.sent_size
            if unsent or r.arrived == 0:
                pending += 1
                descriptors[i, 0] = np.int32(c.descriptor)
                polls[i, 2] = _IN | (_OUT if unsent else 0)
                if a.asked + r.timeout - now < left:
                    left, a.at = a.asked + r.timeout - now, i
        if pending == 0:
            a.at = max(carried, 0)
            return 0 if carried < 0 else CARRY
        rest = left // 1_000_000 + 1 if left > 0 else 1
        n = _poll(a.functions, a.polls, a.n_remotes, rest if a.waits else 0)
        if n < 0:
            return INTERRUPTED
        if n == 0 and not a.waits:
            return WAITING
        if n == 0 and left <= 0:
            return TIMEOUT
        for i in range(a.n_remotes if n > 0 else 0):
            if descriptors[i, 0] >= 0 and polls[i, 3] & ~_OUT:
                found = _receive(carray(pointer(remotes[i].channel), (1,), CHANNEL)[0])
                if found < 0 and found != AGAIN:
                    a.at = i
                    return found


@njit  # type: ignore[untyped-decorator]
def _finish(a: Any, remotes: Any) -> None:
    """Merge what has come, and count the time."""
    if a.n_remotes:
        slowest, last, now = np.float32(0.0), a.asked, _now(a.functions, a.scratch)
        for i in range(a.n_remotes):
            r = remotes[i]
            if r.size:
                slowest = max(slowest, carray(pointer(r.frame + SAME + 4), (1,), np.float32)[0])
                carray(pointer(r.taken), (r.layers,), np.int64)[a.layer] = r.arrived - a.asked
                last = max(last, r.arrived)
        a.remote += np.int64(slowest * 1e9)
        a.answered += last - a.asked
        a.waited += now - a.waits_since
    if a.n_merges:
        # What merging begins with counts nothing, but it must be finite.
        carray(pointer(a.whole_out), (a.whole_bytes,), np.uint8)[:] = 0
        carray(pointer(a.whole_lse), (a.whole,), np.float32)[:] = -np.inf
        for i in range(a.n_merges):
            address = _address(a.merges, i)
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
            s.arrived = _now(functions, s.by)
            _compute(s, functions, s.by, False)
            _advance(s, functions, s.by)

    return int(kernel.address)


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


def _fingerprint() -> Any:
    logger.info("loading the compiled exchange of layers (the first time ever: compiling it)")
    return source_fingerprint(calls, layer_work, merging, intrinsics, emitter, launching)
