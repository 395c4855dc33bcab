"""The compiled loops that add up what stands for the pages that a scan has not chosen, by their sketches.

They are called once the scan of all items is over, with the same arguments. Every item is cut into parts, which threads
take one after the other; the thread that finishes the last part of an item adds them up. Nothing here is checked.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, njit, types

from lamina_kernels.compile import emitter, intrinsics, trees
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.intrinsics import pointer, take
from lamina_kernels.compile.launch import FINISHED, TAKEN, source_fingerprint
from lamina_kernels.sketches import choice_micro, loops
from lamina_kernels.sketches.choice_micro import AHEAD, FEW, HEADS, BlendCodes, BlendMeans
from lamina_kernels.sketches.loops import ITEM, PART, SCAN, floats

LEAST = np.float32(1e-30)  # the smallest share of a head's mass that is not nothing: one over it is still a number


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _blend(a: Any, item: Any, task: Any, shift: int) -> None:
    """What a part of an item's entries that were not chosen adds up to: sums of values and, of each query head, the
    shares of entries by their means and by their codes."""
    number, parts = task.item, item.parts
    table, stride = item.table + a.layer * item.layer_stride * 4, a.capacity * 4
    shares, width = a.page_shares + number * a.group * stride, (a.capacity + AHEAD) * 4
    listed = carray(pointer(a.mean_counts), (number + 1,), np.int64)[number]
    first, end = listed * task.number // parts, listed * (task.number + 1) // parts
    totals, sums = floats(a.totals + shift, 2 * (a.group + HEADS)), floats(a.sums + shift, a.group * a.d_v)
    totals[:] = 0
    sums[:] = 0
    if first < end:
        others, means = a.mean_entries + number * width + first * 4, a.scanned + a.mean_at
        for row in range(0, a.group, FEW):
            rows, weights, of_row = min(FEW, a.group - row), shares + row * stride, a.sums + shift + row * a.d_v * 4
            total = a.totals + shift + row * 4
            choice_micro.blend_means(
                BlendMeans(
                    rows, end - first, others, table, means, a.scanned_bytes, a.d_v, weights, stride, of_row, total
                )
            )
    listed = carray(pointer(a.coarse_counts), (number + 1,), np.int64)[number]
    first, end = listed * task.number // parts, listed * (task.number + 1) // parts
    if first < end:
        for row in range(0, a.group, HEADS):
            choice_micro.blend_codes(
                BlendCodes(
                    rows=min(HEADS, a.group - row),
                    n=end - first,
                    entries=a.coarse_entries + number * width + first * 4,
                    table=table,
                    values=a.values,
                    value_bytes=a.value_bytes,
                    size=a.page_size,
                    d=a.d_v,
                    steps_at=a.value_steps_at,
                    bytes=a.tokens + (number * a.capacity * a.group + row) * a.page_size,
                    bytes_stride=a.group * a.page_size,
                    weights=shares + row * stride,
                    stride=stride,
                    sums=a.sums + shift + row * a.d_v * 4,
                    totals=a.totals + shift + (a.group + HEADS + row) * 4,
                )
            )
    size = a.group * (a.d_v + 2)
    result = floats(a.partials + (item.first_part + task.number) * size * 4, size)
    result[: a.group * a.d_v] = sums
    result[a.group * a.d_v : a.group * (a.d_v + 1)] = totals[: a.group]
    result[a.group * (a.d_v + 1) :] = totals[a.group + HEADS : 2 * a.group + HEADS]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _settle(a: Any, item: Any, number: int) -> None:
    """The tail of an item, from its parts."""
    n, offset, size = a.group * a.d_v, number * a.group * 4, a.group * (a.d_v + 2)
    missing, coarse = floats(a.missing + offset, a.group), floats(a.coarse + offset, a.group)
    tail_lse, lse = floats(a.tail_lse + offset, a.group), floats(a.lse + offset, a.group)
    tail = floats(a.tail + offset * a.d_v, n)
    for part in range(item.parts):
        result = floats(a.partials + (item.first_part + part) * size * 4, size)
        tail += result[:n]
        missing += result[n : n + a.group]
        coarse += result[n + a.group :]
    for row in range(a.group):
        total = missing[row] + coarse[row]
        nothing = total < LEAST  # not so where it is NaN: that must be seen
        tail_lse[row] = -np.inf if nothing else lse[row] + math.log(total)
        factor = np.float32(0.0) if nothing else np.float32(1.0) / total
        tail[row * a.d_v : (row + 1) * a.d_v] *= factor


@njit  # type: ignore[untyped-decorator]
def _blend_parts(block: Any) -> None:
    a = carray(block, (1,), SCAN)[0]
    shift = take(block, FINISHED) * a.scratch_bytes
    parts = carray(pointer(a.parts), (a.n_parts,), PART)
    number = take(block, TAKEN)
    while number < a.n_parts:
        task = parts[number]
        item = carray(pointer(a.items), (task.item + 1,), ITEM)[task.item]
        _blend(a, item, task, shift)
        if take(pointer(a.done), task.item) == item.parts - 1:  # this thread saw the item's last part
            carray(pointer(a.done), (task.item + 1,), np.int64)[task.item] = 0
            _settle(a, item, task.item)
        number = take(block, TAKEN)


@cache
def blend_kernel() -> int:
    """The address of the kernel that adds up what was not chosen, compiled where numba's cache does not have it yet."""
    fingerprint = source_fingerprint(loops, choice_micro, trees, intrinsics, emitter, launching)

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _blend_parts(block)

    return int(kernel.address)
