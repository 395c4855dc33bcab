"""The small operations of layers with experts, compiled for the CPU: the choice of each row's experts, rows grouped by
expert, gating, and each row's weighted sum.

Numbers in memory are float32 or bfloat16; arithmetic is float32. As in `dense_loops`, a row is computed the same way
whatever rows stand beside it and however many threads share them: its experts are summed in their order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, njit, types

from lamina_kernels.compile import emitter, groups, intrinsics, programs
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.intrinsics import pointer, take
from lamina_kernels.compile.launch import FINISHED, HEADER, TAKEN, block_type, source_fingerprint
from lamina_kernels.compile.programs import add
from lamina_kernels.dense import dense_loops, gate_loops
from lamina_kernels.dense.dense_loops import exp, gate_numbers, load, store, vector
from lamina_kernels.dense.gate_loops import sigmoid

CHOOSE, GROUP, GATE, SUM = range(4)
"""What a kernel does: see `_choose_row`, `_group`, `_gate_row` and `_sum_row`."""

SILU, GELU, RELU2, CLAMPED = range(4)
"""How a row is gated."""

_CHOICE = ("experts", "top_k", "groups", "top_groups", "sigmoid", "normalize", "first", "own")
_SIZES = ("operation", "size", "rows", "width", "gating", *_CHOICE)
_ADDRESSES = ("x", "out", "plan", "order", "owners", "places", "chosen", "weight", "scores", "bias", "counts")
_SHARED = ("shared", "gate", "gate_weight")
_FACTORS = ("scale", "limit", "alpha")
_ARGUMENTS = np.dtype(
    [*HEADER, *((name, "i8") for name in (*_SIZES, *_ADDRESSES, *_SHARED)), *((name, "f8") for name in _FACTORS)]
)
Arguments = block_type(_ARGUMENTS)
"""A kernel's argument block. `size` is the bytes of a number of x; experts: of the router, of which `own` from `first`
on are this rank's. Addresses, for n rows of k experts each, and pairs of a row and an own expert in the order of
experts: chosen int64 `[n, k]`; weight float32 `[n, k]`; plan: see `groups`; order, owners int64 `[pairs]`: the row and
the expert of a pair; places int64 `[n, k]`: a pair's number, or -1; scores float32 `[n, 3, experts]`. counts: int64
`[3]`, added to: experts that had rows, pairs, and calls. shared: of `size`, `[n, width]`, what the shared expert gives,
gate float32 `[n]` its weights, made by CHOOSE of `gate_weight` and the rows at `shared`; 0: there is none."""


@njit(fastmath={"contract", "nsz", "reassoc"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _dot(x: Any, y: Any, n: int) -> Any:
    total = np.float32(0.0)
    for i in range(n):
        total += load(x[i]) * load(y[i])
    return total


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _best(scores: Any, chosen: Any) -> None:
    """The numbers of the largest scores, as many as fit in `chosen`, the largest first; of equal ones the first."""
    n, k = 0, len(chosen)
    for i in range(len(scores)):
        if n == k and not scores[i] > scores[chosen[k - 1]]:
            continue
        place = min(n, k - 1)
        while place > 0 and scores[i] > scores[chosen[place - 1]]:
            chosen[place] = chosen[place - 1]
            place -= 1
        chosen[place] = i
        n = min(n + 1, k)


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _choose_row(a: Any, row: int, tag: Any) -> None:
    """Of logits at x, `[rows, experts]`, the chosen experts in their order, and their weights."""
    logits = vector(a.x + row * a.experts * a.size, a.experts, tag)
    room = carray(pointer(a.scores + row * 12 * a.experts), (3, a.experts), np.float32)
    scores, ranked = room[0], room[1]
    chosen = carray(pointer(a.chosen + row * 8 * a.top_k), (a.top_k,), np.int64)
    weight = carray(pointer(a.weight + row * 4 * a.top_k), (a.top_k,), np.float32)
    if a.sigmoid:
        for i in range(a.experts):
            scores[i] = sigmoid(load(logits[i]))
    else:
        highest = load(logits[0])
        for i in range(a.experts):
            highest = max(highest, load(logits[i]))
        total = np.float32(0.0)
        for i in range(a.experts):
            x = load(logits[i]) - highest
            scores[i] = exp(np.float32(-87.0) if x < np.float32(-87.0) else x)
            total += scores[i]
        for i in range(a.experts):
            scores[i] = scores[i] / total
    for i in range(a.experts):
        ranked[i] = scores[i]
    if a.bias:
        bias = carray(pointer(a.bias), (a.experts,), np.float32)
        for i in range(a.experts):
            ranked[i] += bias[i]
    if a.groups > 1:
        _leave_groups(ranked, room[2, : a.groups], a.top_groups, a.sigmoid)
    _best(ranked, chosen)
    for i in range(1, a.top_k):  # in the order of experts
        number, place = chosen[i], i
        while place > 0 and chosen[place - 1] > number:
            chosen[place] = chosen[place - 1]
            place -= 1
        chosen[place] = number
    total = np.float32(0.0)
    for i in range(a.top_k):
        weight[i] = scores[chosen[i]]
        total += weight[i]
    factor = np.float32(a.scale) / (total if a.normalize else np.float32(1.0))
    for i in range(a.top_k):
        weight[i] *= factor
    if a.gate_weight:
        place, gate = a.shared + row * a.width * a.size, carray(pointer(a.gate + row * 4), (1,), np.float32)
        gate[0] = sigmoid(_dot(vector(place, a.width, tag), vector(a.gate_weight, a.width, tag), a.width))


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _leave_groups(ranked: Any, values: Any, top_groups: int, by_two: int) -> None:
    """Of ranked scores those outside of the best groups become -inf. A group is as good as its best, or two best.
    values: room for a number of each."""
    size, infinite = len(ranked) // len(values), np.float32(np.inf)
    for group in range(len(values)):
        first, second = -infinite, -infinite
        for i in range(group * size, (group + 1) * size):
            if ranked[i] > first:
                first, second = ranked[i], first
            elif ranked[i] > second:
                second = ranked[i]
        values[group] = first + second if by_two else first
    for _ in range(len(values) - top_groups):
        worst = 0
        for group in range(len(values)):
            if values[group] < values[worst]:
                worst = group
        values[worst] = infinite
        for i in range(worst * size, (worst + 1) * size):
            ranked[i] = -infinite


@njit  # type: ignore[untyped-decorator]
def _group(a: Any) -> None:
    """The plan, order, owners and places of what was chosen."""
    n, head, numbers = a.rows * a.top_k, groups.HEAD, groups.GROUP
    chosen, places = carray(pointer(a.chosen), (n,), np.int64), carray(pointer(a.places), (n,), np.int64)
    order, owners = carray(pointer(a.order), (n,), np.int64), carray(pointer(a.owners), (n,), np.int64)
    plan = carray(pointer(a.plan), (head + (numbers + 1) * a.own,), np.int64)
    cursor = plan[head + numbers * a.own :]
    for i in range(a.own):
        cursor[i] = 0
    for i in range(n):
        expert = chosen[i] - a.first
        if 0 <= expert < a.own:
            cursor[expert] += 1
    count, start = 0, 0
    for expert in range(a.own):
        pairs, place = cursor[expert], head + numbers * count
        if pairs:
            plan[place], plan[place + 1], plan[place + 2] = expert, start, start + pairs
            count += 1
        cursor[expert] = start
        start += pairs
    plan[0], plan[1] = count, start
    for i in range(n):
        expert = chosen[i] - a.first
        places[i] = -1
        if 0 <= expert < a.own:
            place = cursor[expert]
            cursor[expert] += 1
            places[i], order[place], owners[place] = place, i // a.top_k, expert
    add(pointer(a.counts), 0, count)
    add(pointer(a.counts), 1, start)
    add(pointer(a.counts), 2, 1)


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _gate_row(a: Any, pair: int, tag: Any) -> None:
    """out `[pairs, width]` = gating(gate, up), of x `[pairs, 2 * width]` and a bias as wide of the expert; RELU2 has no
    gate."""
    maps = 1 if a.gating == RELU2 else 2
    stride = a.width * a.size
    gate_at, out_at = a.x + maps * pair * stride, a.out + pair * stride
    owner = carray(pointer(a.owners), (pair + 1,), np.int64)[pair]
    up_at = gate_at + (maps - 1) * stride
    gates, ups, out = vector(gate_at, a.width, tag), vector(up_at, a.width, tag), vector(out_at, a.width, tag)
    if a.bias:  # in place: nobody else reads what is gated
        biases = vector(a.bias + owner * maps * stride, maps * a.width, tag)
        for i in range(a.width):
            gates[i] = store(load(gates[i]) + load(biases[i]), tag)
        for i in range(a.width * (maps - 1)):
            ups[i] = store(load(ups[i]) + load(biases[a.width + i]), tag)
    if a.gating == RELU2:
        for i in range(a.width):
            x = load(gates[i])
            positive = np.float32(0.0) if x < np.float32(0.0) else x  # in this form, NaN stays NaN
            out[i] = store(positive * positive, tag)
    elif a.gating == CLAMPED:
        limit, alpha = np.float32(a.limit), np.float32(a.alpha)
        for i in range(a.width):
            gate, up = load(gates[i]), load(ups[i])
            gate = limit if gate > limit else gate
            up = limit if up > limit else up
            up = -limit if up < -limit else up
            out[i] = store(gate * sigmoid(gate * alpha) * (up + np.float32(1.0)), tag)
    else:
        gate_numbers(gate_at, up_at, out_at, a.width, a.gating == GELU, tag)


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _sum_row(a: Any, row: int, tag: Any) -> None:
    """scores float32 `[n, width]` = the sum of weight * (x + bias) over the own experts of a row, x `[pairs, width]`
    and a bias as wide of the expert, and of the shared expert; out, if there is one, the same in numbers of `size`."""
    sums = carray(pointer(a.scores + row * a.width * 4), (a.width,), np.float32)
    places = carray(pointer(a.places + row * a.top_k * 8), (a.top_k,), np.int64)
    weight = carray(pointer(a.weight + row * a.top_k * 4), (a.top_k,), np.float32)
    chosen = carray(pointer(a.chosen + row * a.top_k * 8), (a.top_k,), np.int64)
    for i in range(a.width):
        sums[i] = np.float32(0.0)
    for k in range(a.top_k):
        if places[k] < 0:
            continue
        x, factor = vector(a.x + places[k] * a.width * a.size, a.width, tag), weight[k]
        if a.bias:
            bias = vector(a.bias + (chosen[k] - a.first) * a.width * a.size, a.width, tag)
            for i in range(a.width):
                sums[i] += (load(x[i]) + load(bias[i])) * factor
        else:
            for i in range(a.width):
                sums[i] += load(x[i]) * factor
    if a.shared:
        x = vector(a.shared + row * a.width * a.size, a.width, tag)
        factor = carray(pointer(a.gate + row * 4), (1,), np.float32)[0] if a.gate else np.float32(1.0)
        for i in range(a.width):
            sums[i] += load(x[i]) * factor
    if a.out:
        out = vector(a.out + row * a.width * a.size, a.width, tag)
        for i in range(a.width):
            out[i] = store(sums[i], tag)


@cache
def load_kernel(half: bool) -> int:
    """The kernel's address. From numba's cache on disk where it is there."""
    tag, arguments = np.uint16(0) if half else np.float32(0), _ARGUMENTS  # closed over, so parts of the cache's key
    fingerprint = source_fingerprint(dense_loops, gate_loops, programs, emitter, groups, intrinsics, launching)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        a = carray(block, (1,), arguments)[0]
        share = take(block, TAKEN)
        rows = carray(pointer(a.plan), (2,), np.int64)[1] if a.operation == GATE else a.rows
        while fingerprint and share < a.shares:
            if a.operation == GROUP:
                _group(a)
            else:
                for row in range(rows * share // a.shares, rows * (share + 1) // a.shares):
                    if a.operation == CHOOSE:
                        _choose_row(a, row, tag)
                    elif a.operation == GATE:
                        _gate_row(a, row, tag)
                    else:
                        _sum_row(a, row, tag)
            take(block, FINISHED)
            share = take(block, TAKEN)

    return int(kernel.address)
