"""The compiled loops over page sketches: making them, judging pages by them, and choosing pages.

A scan is cut into tasks, ranges of entries of one item, which threads take one after the other; the thread that
finishes the last task of an item chooses its pages. What stands for the others is added up in `blend_loops`. Nothing
here is checked: addresses and sizes come from `sketches`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, literally, njit, types

from lamina_kernels.attention import microkernels
from lamina_kernels.attention import moves as cpu_moves
from lamina_kernels.attention.moves import PAGES
from lamina_kernels.compile import emitter, intrinsics, trees
from lamina_kernels.compile import launch as launching
from lamina_kernels.compile.emitter import LANES, Kind
from lamina_kernels.compile.intrinsics import LOG2E, pointer, take
from lamina_kernels.compile.launch import FINISHED, HEADER, TAKEN, source_fingerprint
from lamina_kernels.compile.trees import LINE
from lamina_kernels.sketches import choice_micro, micro, seal_micro
from lamina_kernels.sketches.choice_micro import AHEAD, FEW
from lamina_kernels.sketches.micro import HEADS, Bound, Judge, Masses
from lamina_kernels.sketches.seal_micro import SealKeys, SealValues

SEAL_SCRATCH = 34 * LINE  # bytes that a share needs
ROUNDS = 8  # of halving the range in which a threshold is
SLIGHTLY = np.float32(0.1)  # octaves by which the range is wider than it must be

# The fields of the sketches in a block of arguments, in bytes.
_PLACES = ("steps_at", "lows_at", "mean_at", "value_steps_at", "value_lows_at")
_SKETCHES = [(name, "i8") for name in ("scanned", "scanned_bytes", "values", "value_bytes", *_PLACES)]
SEAL = np.dtype([*HEADER, *PAGES, *_SKETCHES, *((name, "i8") for name in ("n", "ids", "scratch"))])
ITEM = np.dtype(
    [
        ("table", "i8"),  # address of the entries in layer 0
        ("layer_stride", "i8"),  # entries from one layer to the next
        ("sealed", "i8"),
        ("sinks", "i8"),  # entries below are always chosen
        ("recent", "i8"),  # and those from here on
        ("held", "i8"),  # entries in all
        ("tasks", "i8"),
        ("first_part", "i8"),
        ("parts", "i8"),
    ]
)
TASK = np.dtype([("item", "i8"), ("lo", "i8"), ("hi", "i8")])  # lo: a multiple of LANES
PART = np.dtype([("item", "i8"), ("number", "i8")])
SCRATCH = (
    *("floats", "halves", "bounds", "nothing", "tops", "dots", "inverses", "factors", "bases"),
    *("panel", "logits", "places", "ahead", "scores", "sums", "totals"),
)
# What a scan leaves to be added up, of all items: each token's weight in its page, uint8 `[items, capacity, group,
# page_size]`; each page's share of a head's mass, float32 `[items, group, capacity]`; the log of that mass, float32
# `[items, group]`; the entries whose values are read in 4 bits, or stood for by their means, int32 `[items, capacity +
# AHEAD]`, and how many, int64 `[items]`; what parts add up to, float32 `[parts, group, d_v + 2]`.
BETWEEN = ("tokens", "page_shares", "lse", "coarse_entries", "coarse_counts", "mean_entries", "mean_counts", "partials")
SCAN = np.dtype(
    [
        *HEADER,
        *_SKETCHES,
        *((name, "i8") for name in ("page_size", "d_k", "d_v", "padded", "group", "capacity")),
        *((name, "i8") for name in ("items", "tasks", "n_tasks", "done", "parts", "n_parts", "layer", "q")),
        *((name, "i8") for name in ("log_mass", "pages", "entries", "counts", "missing", "coarse", "tail", "tail_lse")),
        *((name, "i8") for name in ("scratch_bytes", *SCRATCH, *BETWEEN)),
        ("scale", "f8"),
        ("soft_cap", "f8"),  # 0: none
        ("missed", "f8"),  # the mass for which means alone may stand
        ("at_stake", "f8"),  # the root of the sum of squares of shares that may be read in 4 bits
    ]
)


@njit  # type: ignore[untyped-decorator]
def floats(address: int, n: int) -> Any:
    """float32 `[n]` at an address."""
    return carray(pointer(address), (n,), np.float32)


@njit  # type: ignore[untyped-decorator]
def _seal_shares(kind: int, unit: int, block: Any) -> None:
    kind, unit = literally(kind), literally(unit)
    a = carray(block, (1,), SEAL)[0]
    ids = carray(pointer(a.ids), (a.n,), np.int64)
    share = take(block, TAKEN)
    while share < a.shares:
        scratch = a.scratch + share * SEAL_SCRATCH
        for i in range(a.n * share // a.shares, a.n * (share + 1) // a.shares):
            page, sketch = a.arena + ids[i] * a.page_bytes, a.scanned + ids[i] * a.scanned_bytes
            scales = page + a.kv_bytes
            steps, lows = sketch + a.steps_at, sketch + a.lows_at
            keys = SealKeys(page, scales, a.page_size, a.d_k, sketch, steps, lows, scratch)
            seal_micro.seal_keys(kind, unit, keys)
            codes = a.values + ids[i] * a.value_bytes
            steps, lows = codes + a.value_steps_at, codes + a.value_lows_at
            mean, scales = sketch + a.mean_at, scales + a.page_size * 4
            values = SealValues(page + a.k_bytes, scales, a.page_size, a.d_v, mean, codes, steps, lows)
            seal_micro.seal_values(kind, values)
        share = take(block, TAKEN)


@njit  # type: ignore[untyped-decorator]
def _begin(a: Any, item: Any, first: int, end: int) -> None:
    """Have the first sketches of a task fetched, all at once: later ones are while others are computed."""
    table = carray(pointer(item.table + a.layer * item.layer_stride * 4), (end,), np.int32)
    for entry in range(first, end):
        intrinsics.prefetch(a.scanned + np.int64(table[entry]) * a.scanned_bytes, a.scanned_bytes)


@njit  # type: ignore[untyped-decorator]
def _spread(a: Any, number: int, shift: int) -> None:
    """Lay out the queries of an item."""
    nothing = floats(a.nothing + shift, a.group)
    for row in range(a.group):
        query, offset = a.q + (number * a.group + row) * a.d_k * 4, shift + row * a.padded * 2
        place = a.floats + shift + row * a.d_k * 4
        nothing[row] = micro.spread(query, a.d_k, a.padded, place, a.halves + offset, a.bounds + offset)


@njit  # type: ignore[untyped-decorator]
def _scan_block(unit: int, a: Any, item: Any, number: int, first: int, pages: int, end: int, shift: int) -> None:
    """The log-mass of up to LANES pages from entry `first` on; sketches before entry `end` are fetched meanwhile."""
    table = carray(pointer(item.table + a.layer * item.layer_stride * 4), (end,), np.int32)
    places, ahead = a.places + shift, a.ahead + shift
    near, far = carray(pointer(places), (LANES,), np.int64), carray(pointer(ahead), (LANES,), np.int64)
    for page in range(pages):
        entry = first + page
        near[page] = a.scanned + np.int64(table[entry]) * a.scanned_bytes
        far[page] = a.scanned + np.int64(table[min(entry + LANES, end - 1)]) * a.scanned_bytes
    for row in range(0, a.group, HEADS):
        rows, offset, place = min(HEADS, a.group - row), shift + row * a.padded * 2, shift + row * LANES * LINE
        bounds, halves, tops, dots = a.bounds + offset, a.halves + offset, a.tops + place, a.dots + place
        micro.bound(Bound(rows, pages, places, a.steps_at, a.padded // 32, bounds, halves, tops, dots))
    nothing = floats(a.nothing + shift, a.group)
    scale = np.float32(a.scale if a.soft_cap else a.scale * LOG2E)
    strips, size = a.page_size // (LANES * unit), a.page_size * 4
    for row in range(a.group):
        place, offset = shift + row * LANES * LINE, shift + row * LANES * 4
        inverses, factors, bases = a.inverses + offset, a.factors + offset, a.bases + offset
        micro.settle_bounds(a.tops + place, a.dots + place, inverses, factors, bases, nothing[row], scale)
    for row in range(0, a.group, HEADS):
        rows, offset, place = min(HEADS, a.group - row), shift + row * LANES * 4, shift + row * LANES * LINE
        judged = Judge(
            rows=rows,
            pages=pages,
            places=places,
            ahead=ahead if row == 0 else places,
            scanned=a.scanned_bytes,
            steps_at=a.steps_at,
            strips=strips,
            d=a.d_k,
            floats=a.floats + shift + row * a.d_k * 4,
            panel=a.panel + shift,
            inverses=a.inverses + offset,
            factors=a.factors + offset,
            bases=a.bases + offset,
            logits=a.logits + shift + row * LANES * size,
            tops=a.tops + place,
        )
        micro.judge(unit, judged)
    for row in range(a.group):
        tops, logits = a.tops + shift + row * LANES * LINE, a.logits + shift + row * LANES * size
        offset = row * LANES * 4
        if a.soft_cap:
            microkernels.cap(logits, pages * size // LINE, np.float32(a.soft_cap))
            for page in range(pages):
                micro.crest(logits + page * size, size // LINE, tops + page * LINE)
        out = a.log_mass + ((number * a.group + row) * a.capacity + first) * 4
        tokens = a.tokens + ((number * a.capacity + first) * a.group + row) * a.page_size
        stride = a.group * a.page_size
        micro.masses(unit, Masses(tops, logits, pages, strips, a.bases + shift + offset, out, tokens, stride))
        floats(out, LANES)[pages:] = -np.inf


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _threshold(squared: int, scores: int, shares: int, group: int, stride: int, vectors: int, most: Any) -> Any:
    """About the largest limit below which no row of shares, or of their squares, sums to more than `most`; or 0. It is
    not below what all of them could be, nor above what one alone could be."""
    squared = literally(squared)
    if not most > 0:
        return np.float32(0.0)
    power = np.float32(0.5 if squared else 1.0)
    high = np.float32(math.log2(most)) * power + SLIGHTLY
    low = high - np.float32(math.log2(vectors * LANES)) * power - np.float32(2.0) * SLIGHTLY
    best = np.float32(0.0)
    for number in range(ROUNDS + 1):
        middle = (low + high) / np.float32(2.0) if number else low
        limit, fits = np.float32(2.0**middle), True
        for row in range(0, group, FEW):
            rows, address = min(FEW, group - row), shares + row * stride
            fits = fits and choice_micro.all_fit(squared, rows, scores, limit, address, stride, vectors, most) == 1
        if fits:
            low, best = middle, limit
        else:
            high = middle
    return best


@njit  # type: ignore[untyped-decorator]
def _entries(address: int, number: int, width: int) -> Any:
    """Row `number` of entries, int32 `[width]`."""
    return carray(pointer(address + number * width * 4), (width,), np.int32)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _pick(a: Any, item: Any, number: int, begin: int, end: int, scores: Any, light: Any, limit: Any) -> None:
    """Write the chosen entries of an item: all but those of [begin, end) whose score is below `limit`. These are
    listed, as stood for by their means if below `light` too, else as read in 4 bits."""
    table = carray(pointer(item.table + a.layer * item.layer_stride * 4), (item.held,), np.int32)
    pages, entries = _entries(a.pages, number, a.capacity), _entries(a.entries, number, a.capacity)
    coarse = _entries(a.coarse_entries, number, a.capacity + AHEAD)
    means = _entries(a.mean_entries, number, a.capacity + AHEAD)
    count: Any = begin
    in_codes: Any = 0
    in_means: Any = 0
    for entry in range(begin):
        pages[entry], entries[entry] = table[entry], entry
    for entry in range(begin, end):
        score = scores[entry]
        pages[count], entries[count], coarse[in_codes], means[in_means] = table[entry], entry, entry, entry
        count += np.int64(not score < limit)
        in_codes += np.int64(score < limit and not score < light)
        in_means += np.int64(score < light)
    for entry in range(end, item.held):
        pages[count], entries[count] = table[entry], entry
        count += 1
    carray(pointer(a.counts), (number + 1,), np.int64)[number] = count
    carray(pointer(a.coarse_counts), (number + 1,), np.int64)[number] = in_codes
    carray(pointer(a.mean_counts), (number + 1,), np.int64)[number] = in_means
    coarse[in_codes : in_codes + AHEAD] = coarse[in_codes - 1] if in_codes else 0
    means[in_means : in_means + AHEAD] = means[in_means - 1] if in_means else 0


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _choose(a: Any, item: Any, number: int, shift: int) -> None:
    """The pages of one item. Where others are left, what they amount to is added up later."""
    vectors, stride = (item.sealed + LANES - 1) // LANES, a.capacity * 4
    shares, scores = a.page_shares + number * a.group * stride, a.scores + shift
    begin = min(item.sinks, item.sealed)
    end = max(begin, min(item.recent, item.sealed))
    lse = floats(a.lse + number * a.group * 4, a.group)
    score = floats(scores, vectors * LANES)
    score[:] = 0
    light = limit = np.float32(0.0)
    if vectors:
        for row in range(a.group):
            logs, row_shares = a.log_mass + (number * a.group + row) * stride, shares + row * stride
            peak = choice_micro.peak_of(logs, vectors)
            total = choice_micro.powers(logs, vectors, peak, row_shares)
            lse[row] = peak + math.log(total)
            choice_micro.normalise(row_shares, vectors, np.float32(1.0) / total, scores)
        score[:begin] = np.inf
        score[end:] = np.inf
        light = limit = _threshold(0, scores, shares, a.group, stride, vectors, np.float32(a.missed))
        if a.at_stake > 0:
            squares = np.float32(a.at_stake * a.at_stake)
            limit = max(light, _threshold(1, scores, shares, a.group, stride, vectors, squares))
    _pick(a, item, number, begin, end, score, light, limit)
    offset = number * a.group * 4
    floats(a.missing + offset, a.group)[:] = 0
    floats(a.coarse + offset, a.group)[:] = 0
    floats(a.tail_lse + offset, a.group)[:] = -np.inf
    floats(a.tail + offset * a.d_v, a.group * a.d_v)[:] = 0


@njit  # type: ignore[untyped-decorator]
def _scan_tasks(unit: int, block: Any) -> None:
    unit = literally(unit)
    a = carray(block, (1,), SCAN)[0]
    shift = take(block, FINISHED) * a.scratch_bytes  # every thread has scratch of its own
    tasks = carray(pointer(a.tasks), (a.n_tasks,), TASK)
    done = carray(pointer(a.done), (a.n_tasks,), np.int64)
    number = take(block, TAKEN)
    while number < a.n_tasks:
        task = tasks[number]
        item = carray(pointer(a.items), (task.item + 1,), ITEM)[task.item]
        if task.lo < task.hi:
            _begin(a, item, task.lo, min(task.hi, task.lo + LANES))
            _spread(a, task.item, shift)
        for first in range(task.lo, task.hi, LANES):
            _scan_block(unit, a, item, task.item, first, min(LANES, task.hi - first), task.hi, shift)
        if take(pointer(a.done), task.item) == item.tasks - 1:  # this thread saw the item's last task
            done[task.item] = 0
            _choose(a, item, task.item, shift)
        number = take(block, TAKEN)


def _fingerprint() -> int:
    return source_fingerprint(
        micro, seal_micro, choice_micro, trees, microkernels, intrinsics, emitter, launching, cpu_moves
    )


@cache
def seal_kernel(kind: Kind, unit: int) -> int:
    """The address of the kernel that makes sketches, compiled where numba's cache on disk does not have it yet."""
    code, fingerprint = int(kind), _fingerprint()

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _seal_shares(code, unit, block)

    return int(kernel.address)


@cache
def scan_kernel(unit: int) -> int:
    """The address of the kernel that judges and chooses pages, compiled where numba's cache does not have it yet."""
    fingerprint = _fingerprint()

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _scan_tasks(unit, block)

    return int(kernel.address)
