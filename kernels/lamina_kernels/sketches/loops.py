"""The compiled loops over page sketches: making them, judging pages by them, and choosing pages.

A scan is cut into tasks, ranges of entries of one item, which threads take one after the other; the thread that
finishes the last task of an item chooses its pages. Nothing here is checked: addresses and sizes come from `sketches`.
"""

from __future__ import annotations

import logging
import math
import time
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, literally, njit, types

from lamina_kernels.cpu import emitter, intrinsics, microkernels, trees
from lamina_kernels.cpu import launch as launching
from lamina_kernels.cpu import moves as cpu_moves
from lamina_kernels.cpu.emitter import LANES, Kind
from lamina_kernels.cpu.intrinsics import LOG2E, pointer, take
from lamina_kernels.cpu.launch import FINISHED, HEADER, TAKEN, source_fingerprint
from lamina_kernels.cpu.moves import PAGES
from lamina_kernels.cpu.trees import LINE
from lamina_kernels.sketches import choice_micro, micro, seal_micro
from lamina_kernels.sketches.choice_micro import AHEAD, FEW, BlendMeans
from lamina_kernels.sketches.micro import HEADS, Bound, Judge
from lamina_kernels.sketches.seal_micro import SealKeys

logger = logging.getLogger("lamina")

SEAL_SCRATCH = 34 * LINE  # bytes that a share needs
ROUNDS = 14  # of halving the range in which a threshold is
RANGE = 64.0  # octaves of that range
LEAST = np.float32(1e-30)  # the smallest share of a head's mass that is not nothing: one over it is still a number

# The fields of the sketches in a block of arguments, in bytes.
_SKETCHES = [(name, "i8") for name in ("sketches", "sketch_bytes", "steps_at", "lows_at", "mean_at")]
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
    ]
)
TASK = np.dtype([("item", "i8"), ("lo", "i8"), ("hi", "i8")])  # lo: a multiple of LANES
SCRATCH = (
    *("floats", "halves", "bounds", "nothing", "tops", "dots", "inverses", "factors", "bases"),
    *("panel", "logits", "places", "ahead", "limits", "parts", "scores", "others"),
)
SCAN = np.dtype(
    [
        *HEADER,
        *_SKETCHES,
        *((name, "i8") for name in ("page_size", "d_k", "d_v", "padded", "group", "capacity", "width")),
        *((name, "i8") for name in ("items", "tasks", "n_tasks", "done", "layer", "q", "most")),
        *((name, "i8") for name in ("log_mass", "pages", "entries", "counts", "missing", "tail", "tail_lse")),
        *((name, "i8") for name in ("scratch_bytes", *SCRATCH)),
        ("scale", "f8"),
        ("soft_cap", "f8"),  # 0: none
        ("missed", "f8"),
    ]
)


@njit  # type: ignore[untyped-decorator]
def _floats(address: int, n: int) -> Any:
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
            page, sketch = a.arena + ids[i] * a.page_bytes, a.sketches + ids[i] * a.sketch_bytes
            scales = page + a.kv_bytes
            steps, lows = sketch + a.steps_at, sketch + a.lows_at
            keys = SealKeys(page, scales, a.page_size, a.d_k, sketch, steps, lows, scratch)
            seal_micro.seal_keys(kind, unit, keys)
            scales += a.page_size * 4
            seal_micro.seal_values(kind, page + a.k_bytes, scales, a.page_size, a.d_v, sketch + a.mean_at)
        share = take(block, TAKEN)


@njit  # type: ignore[untyped-decorator]
def _begin(a: Any, item: Any, first: int, end: int) -> None:
    """Have the first sketches of a task fetched, all at once: later ones are while others are computed."""
    table = carray(pointer(item.table + a.layer * item.layer_stride * 4), (end,), np.int32)
    for entry in range(first, end):
        intrinsics.prefetch(a.sketches + np.int64(table[entry]) * a.sketch_bytes, a.sketch_bytes)


@njit  # type: ignore[untyped-decorator]
def _spread(a: Any, number: int, shift: int) -> None:
    """Lay out the queries of an item."""
    nothing = _floats(a.nothing + shift, a.group)
    for row in range(a.group):
        query, at = a.q + (number * a.group + row) * a.d_k * 4, shift + row * a.padded * 2
        floats = a.floats + shift + row * a.d_k * 4
        nothing[row] = micro.spread(query, a.d_k, a.padded, floats, a.halves + at, a.bounds + at)


@njit  # type: ignore[untyped-decorator]
def _scan_block(unit: int, a: Any, item: Any, number: int, first: int, pages: int, end: int, shift: int) -> None:
    """The log-mass of up to LANES pages from entry `first` on; sketches before entry `end` are fetched meanwhile."""
    table = carray(pointer(item.table + a.layer * item.layer_stride * 4), (end,), np.int32)
    places, ahead = a.places + shift, a.ahead + shift
    near, far = carray(pointer(places), (LANES,), np.int64), carray(pointer(ahead), (LANES,), np.int64)
    for page in range(pages):
        entry = first + page
        near[page] = a.sketches + np.int64(table[entry]) * a.sketch_bytes
        far[page] = a.sketches + np.int64(table[min(entry + LANES, end - 1)]) * a.sketch_bytes
    for row in range(0, a.group, HEADS):
        rows, at, place = min(HEADS, a.group - row), shift + row * a.padded * 2, shift + row * LANES * LINE
        bounds, halves, tops, dots = a.bounds + at, a.halves + at, a.tops + place, a.dots + place
        micro.bound(Bound(rows, pages, places, a.steps_at, a.padded // 32, bounds, halves, tops, dots))
    nothing = _floats(a.nothing + shift, a.group)
    scale = np.float32(a.scale if a.soft_cap else a.scale * LOG2E)
    strips, size = a.page_size // (LANES * unit), a.page_size * 4
    for row in range(a.group):
        place, at = shift + row * LANES * LINE, shift + row * LANES * 4
        inverses, factors, bases = a.inverses + at, a.factors + at, a.bases + at
        micro.settle_bounds(a.tops + place, a.dots + place, inverses, factors, bases, nothing[row], scale)
    for row in range(0, a.group, HEADS):
        rows, at, place = min(HEADS, a.group - row), shift + row * LANES * 4, shift + row * LANES * LINE
        judged = Judge(
            rows=rows,
            pages=pages,
            places=places,
            ahead=ahead if row == 0 else places,
            sketch_bytes=a.sketch_bytes,
            steps_at=a.steps_at,
            strips=strips,
            d=a.d_k,
            floats=a.floats + shift + row * a.d_k * 4,
            panel=a.panel + shift,
            inverses=a.inverses + at,
            factors=a.factors + at,
            bases=a.bases + at,
            logits=a.logits + shift + row * LANES * size,
            tops=a.tops + place,
        )
        micro.judge(unit, judged)
    for row in range(a.group):
        tops, logits, at = a.tops + shift + row * LANES * LINE, a.logits + shift + row * LANES * size, row * LANES * 4
        if a.soft_cap:
            microkernels.cap(logits, pages * size // LINE, np.float32(a.soft_cap))
            for page in range(pages):
                micro.crest(logits + page * size, size // LINE, tops + page * LINE)
        out = a.log_mass + ((number * a.group + row) * a.capacity + first) * 4
        micro.masses(unit, tops, logits, pages, strips, a.bases + shift + at, out)
        _floats(out, LANES)[pages:] = -np.inf


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _threshold(scores: int, shares: int, group: int, stride: int, vectors: int, missed: Any) -> Any:
    """About the largest limit, down to 2^-RANGE, below which no row of shares sums to more than `missed`; or 0."""
    low, high, best = np.float32(-RANGE), np.float32(0.0), np.float32(0.0)
    for _ in range(ROUNDS):
        middle = (low + high) / np.float32(2.0)
        limit, fits = np.float32(2.0**middle), True
        for row in range(0, group, FEW):
            rows, at = min(FEW, group - row), shares + row * stride
            fits = fits and choice_micro.all_fit(rows, scores, limit, at, stride, vectors, missed) == 1
        if fits:
            low, best = middle, limit
        else:
            high = middle
    return best


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _restrict(scores: int, vectors: int, candidates: int, room: int) -> Any:
    """A limit that leaves at most `room` of the candidates above it, one just below it, and the room that is left."""
    low, high = np.float32(-RANGE), np.float32(1.0)
    for _ in range(2 * ROUNDS):
        middle = (low + high) / np.float32(2.0)
        if candidates - choice_micro.count_below(scores, np.float32(2.0**middle), vectors) > room:
            low = middle
        else:
            high = middle
    limit = np.float32(2.0**high)
    return limit, np.float32(2.0**low), max(room - (candidates - choice_micro.count_below(scores, limit, vectors)), 0)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _pick(a: Any, item: Any, number: int, begin: int, end: int, room: int, shift: int) -> Any:
    """Write the chosen entries of an item and list the others; returns how many others. Scores say what is chosen:
    at least the limit, or, until the room that is left is filled, at least the floor."""
    limits = _floats(a.limits + shift, 3)
    limit, floor, spare = limits[0], limits[1], np.int64(limits[2])
    table = carray(pointer(item.table + a.layer * item.layer_stride * 4), (item.held,), np.int32)
    pages = carray(pointer(a.pages + number * a.capacity * 4), (a.capacity,), np.int32)
    entries = carray(pointer(a.entries + number * a.capacity * 4), (a.capacity,), np.int32)
    others = carray(pointer(a.others + shift), (a.width + AHEAD,), np.int32)
    scores = _floats(a.scores + shift, end)
    count: Any = begin
    left: Any = 0
    for entry in range(begin):
        pages[entry], entries[entry] = table[entry], entry
    for entry in range(begin, end):
        chosen = (not scores[entry] < limit) and count - begin < room
        if spare > 0 and not chosen and not scores[entry] < floor:
            chosen = True
            spare -= 1
        pages[count], entries[count], others[left] = table[entry], entry, entry
        count += np.int64(chosen)
        left += np.int64(not chosen)
    for entry in range(end, item.held):
        pages[count], entries[count] = table[entry], entry
        count += 1
    carray(pointer(a.counts), (number + 1,), np.int64)[number] = count
    others[left : left + AHEAD] = others[left - 1] if left else 0
    return left


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _choose(a: Any, item: Any, number: int, shift: int) -> None:
    """The pages of one item, and what is left out."""
    vectors, stride = (item.sealed + LANES - 1) // LANES, a.width * 4
    shares, scores = a.parts + shift, a.scores + shift
    begin = min(item.sinks, item.sealed)
    end = max(begin, min(item.recent, item.sealed))
    room = max(a.most - (item.held - (end - begin)), 0)  # for pages that may be chosen or not
    lse, limits = _floats(a.nothing + shift, a.group), _floats(a.limits + shift, 3)
    limits[:] = 0
    if vectors:
        score = _floats(scores, vectors * LANES)
        score[:] = 0
        for row in range(a.group):
            logs, own = a.log_mass + (number * a.group + row) * a.capacity * 4, shares + row * stride
            peak = choice_micro.peak_of(logs, vectors)
            total = choice_micro.powers(logs, vectors, peak, own)
            lse[row] = peak + math.log(total)
            choice_micro.normalise(own, vectors, np.float32(1.0) / total, scores)
        score[:begin] = np.inf
        score[end:] = np.inf
        limits[0] = limits[1] = _threshold(scores, shares, a.group, stride, vectors, np.float32(a.missed))
        if end - begin - choice_micro.count_below(scores, limits[0], vectors) > room:
            limits[0], limits[1], limits[2] = _restrict(scores, vectors, end - begin, room)
    left = _pick(a, item, number, begin, end, room, shift)
    missing = _floats(a.missing + number * a.group * 4, a.group)
    tail, tail_lse = a.tail + number * a.group * a.d_v * 4, _floats(a.tail_lse + number * a.group * 4, a.group)
    if left == 0:
        missing[:] = 0
        tail_lse[:] = -np.inf
        _floats(tail, a.group * a.d_v)[:] = 0
        return
    table, means = item.table + a.layer * item.layer_stride * 4, a.sketches + a.mean_at
    for row in range(0, a.group, FEW):
        rows, weights, totals = min(FEW, a.group - row), shares + row * stride, a.missing + (number * a.group + row) * 4
        sums, others = tail + row * a.d_v * 4, a.others + shift
        choice_micro.blend_means(
            BlendMeans(rows, left, others, table, means, a.sketch_bytes, a.d_v, weights, stride, sums, totals)
        )
    for row in range(a.group):
        nothing = missing[row] < LEAST  # not so where it is NaN: that must be seen
        tail_lse[row] = -np.inf if nothing else lse[row] + math.log(missing[row])
        factor = np.float32(0.0) if nothing else np.float32(1.0) / missing[row]
        choice_micro.multiply(tail + row * a.d_v * 4, a.d_v // LANES, factor)


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
    started, fingerprint = time.perf_counter(), _fingerprint()
    logger.info("loading the CPU kernel that scans sketches; compiling it, the first time, takes a while")

    @numba.cfunc(types.void(types.voidptr), cache=True)  # type: ignore[untyped-decorator]
    def kernel(block: Any) -> None:
        if fingerprint:
            _scan_tasks(unit, block)

    logger.info("sketch kernel ready after %.1f s", time.perf_counter() - started)
    return int(kernel.address)
