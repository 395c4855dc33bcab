"""Many tokens of one head into a state, by matrices: blocks of BLOCK tokens, in them tiles of TILE.

With decays a, F_t = product of a up to t, D_ij = product of a behind j up to i, and B_t = product of a behind t:

    U_i = beta_i (v_i - F_i S^T k_i - sum over j < i of D_ij (k_i . k_j) U_j)      (delta rule; else U = v, or dt v)
    o_i = F_i S^T q_i + sum over j <= i of D_ij (q_i . k_j) U_j
    S  <- F S + sum over j of B_j k_j U_j^T

(the WY form of arXiv 2412.06464 and 2510.26692, the blocks of arXiv 2405.21060). Decays by channel stand inside the
products. No decay is ever divided by another, or taken from a difference of sums: all are products of numbers that are
not above 1, so none overflows, and none loses what is small beside what is large.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit

from lamina_kernels.compile.intrinsics import pointer
from lamina_kernels.states import micro
from lamina_kernels.states.inputs import floats, give, move, take_tokens
from lamina_kernels.states.micro import Multiply

BLOCK, TILE = 64, 16
_STEPS = 64  # rows of a matrix whose columns stay in the first-level cache
_LOOSE = {"reassoc", "contract"}  # sums in any order


@njit  # type: ignore[untyped-decorator]
def _table(address: int, rows: int, columns: int) -> Any:
    return carray(pointer(address), (rows, columns), np.float32)


class Matrix(NamedTuple):
    """Where a matrix stands, and how many numbers its rows are apart."""

    at: Any
    row: int


@njit  # type: ignore[untyped-decorator]
def multiply(m: int, n: int, steps: int, a: Matrix, b: Matrix, c: Matrix) -> None:
    """C `[m, n]` += A `[m, steps]` B. m is 1 or a multiple of 4, n of 16."""
    for first in range(0, steps, _STEPS):
        count, column = min(_STEPS, steps - first), 0
        while column < n:
            width = n - column
            for row in range(0, m, 4):
                x, y = a.at + (row * a.row + first) * 4, b.at + (first * b.row + column) * 4
                z = c.at + (row * c.row + column) * 4
                o = Multiply(count, x, a.row * 4, y, b.row * 4, z, c.row * 4)
                if m == 1:
                    if width >= 64:
                        micro.multiply_tile(1, 4, o)
                    else:
                        micro.multiply_tile(1, 1, o)
                elif width >= 64:
                    micro.multiply_tile(4, 4, o)
                elif width >= 48:
                    micro.multiply_tile(4, 3, o)
                elif width >= 32:
                    micro.multiply_tile(4, 2, o)
                else:
                    micro.multiply_tile(4, 1, o)
            column += min(64, width) if m > 1 or width >= 64 else 16


@njit  # type: ignore[untyped-decorator]
def _transpose(source: int, rows: int, columns: int, target: int) -> None:
    """`[rows, columns]` to `[columns, BLOCK]`."""
    x, y = _table(source, rows, columns), _table(target, columns, BLOCK)
    for tile in range(0, rows, TILE):
        for c in range(columns):
            for r in range(tile, tile + TILE):
                y[c, r] = x[r, c]


@njit  # type: ignore[untyped-decorator]
def _clear(address: int, n: int) -> None:
    x = floats(address, n)
    for i in range(n):
        x[i] = 0.0


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _scores(a: Any, item: Any, first: int, n: int, padded: int, shift: int) -> None:
    """D_ij (q_i . k_j) into `scores`, D_ij (k_i . k_j) into `overlaps`, F into `forward` and B into `backward`, for
    decays by token."""
    q, k, keys, every, pairs = a.q + shift, a.k + shift, a.keys + shift, a.scores + shift, a.overlaps + shift
    decays = floats(a.decays + shift, padded)
    for t in range(padded):
        if t >= n:
            decays[t] = 1.0
        elif a.log_decays:
            decays[t] = np.exp(floats(a.log_decays, a.heads)[item.head])
        else:
            decays[t] = np.exp(floats(a.gates + (item.gates + (first + t) * item.gates_width) * 4, 1)[0])
    _transpose(k, padded, a.d_k, keys)
    row, forward = floats(a.backward + shift, padded), floats(a.forward + shift, padded)
    _clear(a.backward + shift, padded)
    for tile in range(0, padded, TILE):
        place, offset = tile * BLOCK * 4, tile * a.d_k * 4
        multiply(TILE, tile + TILE, a.d_k, Matrix(q + offset, a.d_k), Matrix(keys, BLOCK), Matrix(every + place, BLOCK))
        if a.delta:
            multiply(
                TILE, tile + TILE, a.d_k, Matrix(k + offset, a.d_k), Matrix(keys, BLOCK), Matrix(pairs + place, BLOCK)
            )
        for i in range(tile, tile + TILE):
            forward[i] = decays[i] * (forward[i - 1] if i else np.float32(1.0))
            for j in range(i):
                row[j] *= decays[i]
            row[i] = 1.0
            scores, overlaps = floats(every + i * BLOCK * 4, BLOCK), floats(pairs + i * BLOCK * 4, BLOCK)
            for j in range(tile + TILE):
                scores[j] *= row[j]
                overlaps[j] *= row[j]


@njit(fastmath=_LOOSE)  # type: ignore[untyped-decorator]
def _decayed_dots(x: Any, y: Any, decays: Any, k: Any, i: int, begin: int, scores: Any, overlaps: Any) -> None:
    """Row i of both scores within its tile: x and y, q_i and k_i, are decayed on the way back."""
    for j in range(i, begin - 1, -1):
        by_q, by_k = np.float32(0.0), np.float32(0.0)
        for c in range(len(x)):
            by_q += x[c] * k[j, c]
            by_k += y[c] * k[j, c]
            x[c] *= decays[j, c]
            y[c] *= decays[j, c]
        scores[i, j], overlaps[i, j] = by_q, by_k


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _channel_scores(a: Any, item: Any, first: int, n: int, padded: int, shift: int) -> None:
    """What `_scores` gives, for decays by channel: F is inside `scaled_q` and `scaled_k`, and at last in `forward`, B
    inside `keys` `[d_k, BLOCK]`."""
    d_k = a.d_k
    q, k = _table(a.q + shift, padded, d_k), _table(a.k + shift, padded, d_k)
    decays = _table(a.decays + shift, padded, d_k)
    far_q, far_k = _table(a.scaled_q + shift, padded, d_k), _table(a.scaled_k + shift, padded, d_k)
    keys, scores = _table(a.keys + shift, d_k, BLOCK), _table(a.scores + shift, padded, BLOCK)
    overlaps, forward = _table(a.overlaps + shift, padded, BLOCK), floats(a.forward + shift, d_k)
    lines = _table(a.lines + shift, 2 * TILE + 3, d_k)
    since, x, y = lines[2 * TILE], lines[2 * TILE + 1], lines[2 * TILE + 2]
    near, columns = a.lines + shift, Matrix(a.keys + shift, BLOCK)
    for t in range(n):
        gates = a.gates + (item.gates + (first + t) * item.gates_width) * 4
        micro.exponentials(gates, a.decays + shift + t * d_k * 4, d_k >> 4)
    decays[n:] = 1.0
    forward[:] = 1.0
    for tile in range(0, padded, TILE):
        since[:] = 1.0
        for t in range(TILE):
            i = tile + t
            for c in range(d_k):
                since[c] *= decays[i, c]
                lines[t, c] = q[i, c] * since[c]
                lines[TILE + t, c] = k[i, c] * since[c]
                far_q[i, c] = lines[t, c] * forward[c]
                far_k[i, c] = lines[TILE + t, c] * forward[c]
        if tile:
            place, near_k = tile * BLOCK * 4, near + TILE * d_k * 4
            multiply(TILE, tile, d_k, Matrix(near, d_k), columns, Matrix(a.scores + shift + place, BLOCK))
            multiply(TILE, tile, d_k, Matrix(near_k, d_k), columns, Matrix(a.overlaps + shift + place, BLOCK))
        for i in range(tile, tile + TILE):
            x[:] = q[i]
            y[:] = k[i]
            _decayed_dots(x, y, decays, k, i, tile, scores, overlaps)
        for c in range(d_k):
            for j in range(tile):
                keys[c, j] *= since[c]
            behind = np.float32(1.0)
            for j in range(tile + TILE - 1, tile - 1, -1):
                keys[c, j] = k[j, c] * behind
                behind *= decays[j, c]
            forward[c] *= since[c]


@njit  # type: ignore[untyped-decorator]
def _changes(a: Any, item: Any, first: int, n: int, padded: int, target: int, shift: int) -> None:
    """U into `change` `[padded, d_v]`."""
    d_k, d_v, change = a.d_k, a.d_v, a.change + shift
    if not a.delta:
        for t in range(n):
            dt = np.float32(1.0)
            if a.gates_size:
                dt = floats(a.gates + (item.gates + (first + t) * item.gates_width + 1) * 4, 1)[0]
            values, u = floats(a.v + shift + t * d_v * 4, d_v), floats(change + t * d_v * 4, d_v)
            for c in range(d_v):
                u[c] = dt * values[c]
        _clear(change + n * d_v * 4, (padded - n) * d_v)
        return
    keys = (a.scaled_k if a.by_channel else a.k) + shift
    _clear(change, padded * d_v)
    multiply(padded, d_v, d_k, Matrix(keys, d_k), Matrix(target, d_v), Matrix(change, d_v))
    forward = floats(a.forward + shift, padded)
    for i in range(padded):
        beta = np.float32(0.0)
        if i < n:
            beta = floats(a.gates + (item.gates + (first + i) * item.gates_width + a.gates_size - 1) * 4, 1)[0]
        factor = np.float32(1.0) if a.by_channel else forward[i]
        values, u = floats(a.v + shift + i * d_v * 4, d_v), floats(change + i * d_v * 4, d_v)
        for c in range(d_v):
            u[c] = beta * (values[c] - factor * u[c])
        overlaps = floats(a.overlaps + shift + i * BLOCK * 4, BLOCK)
        for j in range(i):
            overlaps[j] *= -beta
    for tile in range(0, padded, TILE):
        rows, u = a.overlaps + shift + tile * BLOCK * 4, change + tile * d_v * 4
        multiply(TILE, d_v, tile, Matrix(rows, BLOCK), Matrix(change, d_v), Matrix(u, d_v))
        for i in range(1, TILE):
            row = Matrix(rows + (i * BLOCK + tile) * 4, BLOCK)
            multiply(1, d_v, i, row, Matrix(u, d_v), Matrix(u + i * d_v * 4, d_v))


@njit  # type: ignore[untyped-decorator]
def _outputs(a: Any, item: Any, first: int, n: int, padded: int, target: int, shift: int) -> None:
    d_k, d_v, read = a.d_k, a.d_v, a.read + shift
    queries = (a.scaled_q if a.by_channel else a.q) + shift
    _clear(read, padded * d_v)
    multiply(padded, d_v, d_k, Matrix(queries, d_k), Matrix(target, d_v), Matrix(read, d_v))
    if not a.by_channel:
        forward, outs = floats(a.forward + shift, padded), _table(read, padded, d_v)
        for i in range(padded):
            for c in range(d_v):
                outs[i, c] *= forward[i]
    for tile in range(0, padded, TILE):
        scores, lines = Matrix(a.scores + shift + tile * BLOCK * 4, BLOCK), Matrix(read + tile * d_v * 4, d_v)
        multiply(TILE, d_v, tile + TILE, scores, Matrix(a.change + shift, d_v), lines)
    for i in range(n):
        give(a, item, first + i, read + i * d_v * 4, a.v + shift + i * d_v * 4)


@njit  # type: ignore[untyped-decorator]
def _next_state(a: Any, padded: int, target: int, shift: int) -> None:
    d_k, d_v, change = a.d_k, a.d_v, a.change + shift
    state = _table(target, d_k, d_v)
    forward = floats(a.forward + shift, max(padded, d_k))
    for r in range(d_k):
        decay = forward[r] if a.by_channel else forward[padded - 1]
        for c in range(d_v):
            state[r, c] *= decay
    if not a.by_channel:
        u, backward = _table(change, padded, d_v), floats(a.backward + shift, padded)
        for i in range(padded):
            for c in range(d_v):
                u[i, c] *= backward[i]
    multiply(d_k, d_v, padded, Matrix(a.keys + shift, BLOCK), Matrix(change, d_v), Matrix(target, d_v))


@njit  # type: ignore[untyped-decorator]
def advance_blocks(a: Any, item: Any, source: int, target: int, shift: int) -> None:
    """All tokens of an item, whose convolution's last inputs stand in `inputs` before and after."""
    if source != target:
        move(source, target, a.d_k * a.d_v)
    for first in range(0, item.count, BLOCK):
        n = min(BLOCK, item.count - first)
        padded = (n + TILE - 1) // TILE * TILE
        take_tokens(a, item, first, n, shift)
        for place, d in ((a.q, a.d_k), (a.k, a.d_k), (a.v, a.d_v)):
            _clear(place + shift + n * d * 4, (padded - n) * d)
        _clear(a.scores + shift, padded * BLOCK)
        _clear(a.overlaps + shift, padded * BLOCK)
        if a.by_channel:
            _channel_scores(a, item, first, n, padded, shift)
        else:
            _scores(a, item, first, n, padded, shift)
        _changes(a, item, first, n, padded, target, shift)
        _outputs(a, item, first, n, padded, target, shift)
        _next_state(a, padded, target, shift)
