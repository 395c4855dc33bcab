"""The compiled loops of state layers: one token of a head at the speed of memory, many in blocks of matrices.

Threads take shares of items one after the other. Nothing here is checked: addresses come from `states.advance`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import carray, literally, njit, types

from lamina_kernels.compile import emitter, intrinsics
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.intrinsics import pointer, take
from lamina_kernels.compile.launch import FINISHED, HEADER, TAKEN, source_fingerprint
from lamina_kernels.states import blocks, inputs, micro
from lamina_kernels.states.inputs import floats, give, keep_token, move, take_kept, take_tokens
from lamina_kernels.states.micro import Read, Write

ITEM = np.dtype(
    [
        ("number", "i8"),  # its place in the tables of pages
        ("count", "i8"),  # tokens
        ("x", "i8"),  # where its row's x begins, in numbers
        ("width", "i8"),  # numbers from one token of x to the next
        ("q", "i8"),  # where q, k and v stand among them
        ("k", "i8"),
        ("v", "i8"),
        ("gates", "i8"),  # where its first gates stand, in numbers
        ("gates_width", "i8"),  # from one token's to the next one's
        ("out", "i8"),
        ("out_width", "i8"),
        ("head", "i8"),  # among all heads of the layer
        ("key", "i8"),  # its key head among all of them
        ("replay", "i8"),  # tokens before its own that are taken from what is kept
        ("slot", "i8"),  # where the first of them is kept
        ("keeps", "i8"),  # whether the inputs of its own tokens are kept, and the state before them
    ]
)
SCRATCH = (
    *("inputs", "q", "k", "v", "change", "read", "scores", "overlaps", "keys", "decays", "forward", "backward"),
    *("scaled_q", "scaled_k", "lines", "state"),
)
ARGUMENTS = np.dtype(
    [
        *HEADER,
        ("arrived", "i8"),  # threads so far: by it, each has scratch of its own
        ("threads", "i8"),  # that there is scratch for
        *((name, "i8") for name in ("arena", "record", "delta", "by_channel", "d_k", "d_v", "conv", "gates_size")),
        *((name, "i8") for name in ("items", "starts", "source", "target", "kept", "slots", "zeros")),
        *((name, "i8") for name in ("dtype", "itemsize", "x", "gates", "out")),  # dtype: its place in `operands.DTYPES`
        *((name, "i8") for name in ("heads", "key_heads", "channels", "weights", "bias", "skip", "log_decays")),
        *((name, "i8") for name in ("scratch_bytes", *SCRATCH)),
        ("scale", "f8"),
    ]
)
_ARRIVED = len(HEADER)  # which int64 of the block it is


class Written(NamedTuple):
    """Addresses of what a state is written with, as in `Write`."""

    target: Any
    decays: Any
    keys: Any
    queries: Any
    change: Any
    out: Any


@njit  # type: ignore[untyped-decorator]
def _record(a: Any, pages: int, number: int) -> Any:
    """The address of the record that an item reads or writes."""
    page = np.int64(carray(pointer(pages), (number + 1,), np.int32)[number])
    return a.arena + page * a.record * 4 if page >= 0 else a.zeros


@njit  # type: ignore[untyped-decorator]
def _read(state: Any, ahead: Any, d_k: int, d_v: int, weights: Any, out: Any) -> None:
    """out = S^T weights; meanwhile the first half of the state at `ahead` is fetched."""
    column = 0
    while column < d_v:
        width, far = d_v - column, ahead + column * d_k * 2
        operands = Read(state + column * 4, d_v * 4, d_k, far, weights, out + column * 4)
        if width >= 128:
            micro.read_state(8, operands)
            column += 128
        elif width >= 64:
            micro.read_state(4, operands)
            column += 64
        else:
            micro.read_state(1, operands)
            column += 16


@njit  # type: ignore[untyped-decorator]
def _write(share: int, state: Any, ahead: Any, d_k: int, d_v: int, written: Written, near: bool) -> None:
    """S <- decays S + k change^T; out = S^T q; meanwhile the state at `ahead` is fetched: of each row 1 / share.
    near: what is written is read again at once."""
    share, w, column = literally(share), written, 0
    near = near or state == w.target
    while column < d_v:
        width, offset, far = d_v - column, column * 4, ahead + column * d_k * 4 // share
        o = Write(
            state + offset,
            w.target + offset,
            d_v * 4,
            d_k,
            far,
            w.decays,
            w.keys,
            w.queries,
            w.change + offset,
            w.out + offset,
        )
        if width >= 128:
            if near:
                micro.write_state(8, share, 0, o)
            else:
                micro.write_state(8, share, 1, o)
            column += 128
        elif width >= 64:
            if near:
                micro.write_state(4, share, 0, o)
            else:
                micro.write_state(4, share, 1, o)
            column += 64
        else:
            micro.write_state(1, share, 0, o)
            column += 16


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _step(a: Any, item: Any, at: int, source: int, target: int, ahead: int, near: bool, shift: int) -> None:
    """One token of one head, whose q, k and v are in scratch and whose gates are `at`: what is read is in `read`.
    `ahead`: the record that is read next. near: the target is read again at once."""
    q, k, v, change = a.q + shift, a.k + shift, a.v + shift, a.change + shift
    gates = floats(at, a.gates_size)
    decays, changes, values = floats(a.decays + shift, a.d_k), floats(change, a.d_v), floats(v, a.d_v)
    if a.by_channel:
        micro.exponentials(at, a.decays + shift, a.d_k >> 4)
    else:
        log_decay = floats(a.log_decays, a.heads)[item.head] if a.log_decays else gates[0]
        decay = np.float32(math.exp(log_decay))
        for c in range(a.d_k):
            decays[c] = decay
    if a.delta:
        keys, weights, beta = floats(k, a.d_k), floats(a.keys + shift, a.d_k), gates[a.gates_size - 1]
        for c in range(a.d_k):
            weights[c] = decays[c] * keys[c]
        _read(source, ahead, a.d_k, a.d_v, a.keys + shift, change)
        for c in range(a.d_v):
            changes[c] = beta * (values[c] - changes[c])
    else:
        dt = gates[1] if a.gates_size else np.float32(1.0)
        for c in range(a.d_v):
            changes[c] = dt * values[c]
    written = Written(target, a.decays + shift, k, q, change, a.read + shift)
    if a.delta:
        _write(2, source, ahead + a.d_k * a.d_v * 2, a.d_k, a.d_v, written, near)
    else:
        _write(1, source, ahead, a.d_k, a.d_v, written, near)


@njit  # type: ignore[untyped-decorator]
def _replayed(a: Any, item: Any, kept: int, source: int, target: int, shift: int) -> int:
    """Take an item's kept tokens into the target, one after the other. Gives where the state is then."""
    state, numbers = source, 2 * a.d_k + a.d_v + a.gates_size
    for t in range(item.replay):
        slot = kept + (item.slot + t) % a.slots * numbers * 4
        take_kept(a, item, slot, shift)
        _step(a, item, slot + (2 * a.d_k + a.d_v) * 4, state, target, state, True, shift)
        state = target
    return state


@njit  # type: ignore[untyped-decorator]
def _verify(a: Any, item: Any, kept: int, state: int, shift: int) -> None:
    """Keep the inputs of an item's tokens, and read what each gives; the state stays as it is."""
    numbers, scratch = 2 * a.d_k + a.d_v + a.gates_size, a.state + shift
    for t in range(item.count):
        slot = kept + (item.slot + item.replay + t) % a.slots * numbers * 4
        keep_token(a, item, t, slot)
        take_kept(a, item, slot, shift)
        _step(a, item, slot + (2 * a.d_k + a.d_v) * 4, state, scratch, state, True, shift)
        give(a, item, t, a.read + shift, a.v + shift)
        state = scratch


@njit  # type: ignore[untyped-decorator]
def _advance_shares(block: Any) -> None:
    a = carray(block, (1,), ARGUMENTS)[0]
    starts = carray(pointer(a.starts), (a.shares + 1,), np.int64)
    shift = take(block, _ARRIVED) % a.threads * a.scratch_bytes
    share = take(block, TAKEN)
    while share < a.shares:
        items = carray(pointer(a.items), (starts[share + 1],), ITEM)
        for number in range(starts[share], starts[share + 1]):
            item = items[number]
            source, target = _record(a, a.source, item.number), _record(a, a.target, item.number)
            slots = _record(a, a.kept, item.number) if a.kept else 0
            state_bytes = a.d_k * a.d_v * 4
            if a.conv:
                move(source + state_bytes, a.inputs + shift, (a.conv - 1) * (2 * a.d_k + a.d_v))
            if item.replay:
                source = _replayed(a, item, slots, source, target, shift)
            if item.keeps:
                if a.conv and item.replay:
                    move(a.inputs + shift, target + state_bytes, (a.conv - 1) * (2 * a.d_k + a.d_v))
                _verify(a, item, slots, source, shift)
            elif item.count == 1:
                ahead = source
                if number + 1 < starts[share + 1]:
                    ahead = _record(a, a.source, items[number + 1].number)
                take_tokens(a, item, 0, 1, shift)
                _step(a, item, a.gates + item.gates * 4, source, target, ahead, False, shift)
                give(a, item, 0, a.read + shift, a.v + shift)
            else:
                blocks.advance_blocks(a, item, source, target, shift)
            if a.conv and not item.keeps:
                move(a.inputs + shift, target + state_bytes, (a.conv - 1) * (2 * a.d_k + a.d_v))
        take(block, FINISHED)
        share = take(block, TAKEN)


@cache
def advance_kernel() -> int:
    """The address of the kernel, compiled where numba's cache on disk does not have it yet."""
    fingerprint = source_fingerprint(intrinsics, emitter, launching, micro, inputs, blocks)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _advance_shares(block)

    return int(kernel.address)
