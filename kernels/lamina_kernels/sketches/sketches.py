"""Sketches of pages, and what they say for decode attention: which pages matter, and what the others add up to.

A sketch is made once of a full page of one layer and KV head: its keys in 4 bits, asymmetric per channel (KIVI, arXiv
2402.02750), and the mean of its values. `scan` reads the sketches of all pages of a sequence, estimates how much of the
attention each page gets, and chooses pages so that little is missed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.cpu.emitter import LANES, kind_of
from lamina_kernels.cpu.launch import block_type, launch, load_each
from lamina_kernels.paged.pages import Order, PageLayout, Pages, check_order, check_vectors
from lamina_kernels.partial import Partial
from lamina_kernels.sketches.choice_micro import AHEAD
from lamina_kernels.sketches.items import Choice, Items, check_items
from lamina_kernels.sketches.layout import LEVELS, Sketches, SketchLayout, check_sealed
from lamina_kernels.sketches.loops import ITEM, SCAN, SCRATCH, SEAL, SEAL_SCRATCH, TASK, scan_kernel, seal_kernel
from lamina_kernels.sketches.micro import HEADS

__all__ = [
    "LEVELS",
    "MISSED",
    "Choice",
    "Items",
    "ScanPlan",
    "SketchLayout",
    "Sketches",
    "plan_scan",
    "prepare",
    "scan",
    "seal",
]

SEAL_SHARE = 4  # pages that are worth a thread
TASKS = 12  # of a thread, so that all end at about the same time
TASK_ENTRIES = (128, 1024)  # least and most: at the beginning of a task nothing is fetched yet
MISSED = 0.01  # of the estimated mass, which may be left out

_SealArguments, _ScanArguments = block_type(SEAL), block_type(SCAN)


@dataclass(frozen=True, slots=True)
class ScanPlan:
    """The scan of a batch: the same for all layers. For one thread at a time: it owns scratch and the results."""

    sketches: Sketches
    items: Items
    group: int
    threads: int
    missing: frozenset[int]  # layers that lack a page which the items read
    arguments: Any  # the kernel's block
    result: Choice
    keep: tuple[Any, ...]  # the memory that addresses in it point to


def prepare(page_layout: PageLayout) -> Iterator[tuple[int, int]]:
    """Load the kernels for such pages, and compile what numba's cache on disk lacks: how many of how many."""
    layout = SketchLayout(page_layout)
    return load_each((lambda: _seal_kernel(layout), lambda: scan_kernel(layout.unit)))


def _seal_kernel(layout: SketchLayout) -> int:
    return seal_kernel(kind_of(layout.pages.dtype), layout.unit)


def seal(pages: Pages, sketches: Sketches, page_ids: torch.Tensor) -> None:
    """Make the sketches of full pages, from what they hold; page_ids int64 `[n]`, each once."""
    check_order(pages, Order.CHANNELS)
    check_sealed(pages, sketches, page_ids)
    if not len(page_ids):
        return
    at, ids = pages.layout, page_ids.contiguous()
    threads = min(1 + len(ids) // SEAL_SHARE, torch.get_num_threads())
    scratch = torch.empty(threads * SEAL_SCRATCH + 64, dtype=torch.uint8)
    a = _SealArguments(
        shares=threads,
        arena=pages.arena.data_ptr(),
        page_size=at.page_size,
        page_bytes=at.page_bytes,
        k_bytes=at.k_bytes,
        kv_bytes=at.kv_bytes,
        d_k=at.d_k,
        d_v=at.d_v,
        n=len(ids),
        ids=ids.data_ptr(),
        scratch=scratch.data_ptr() + -scratch.data_ptr() % 64,
        **_describe(sketches),
    )
    launch(_seal_kernel(sketches.layout), ctypes.addressof(a), threads)


def _describe(sketches: Sketches) -> dict[str, int]:
    """The fields of the sketches in every block of arguments."""
    at = sketches.layout
    return {
        "sketches": sketches.arena.data_ptr(),
        "sketch_bytes": at.sketch_bytes,
        "steps_at": at.steps_at,
        "lows_at": at.lows_at,
        "mean_at": at.mean_at,
    }


def plan_scan(sketches: Sketches, items: Items, group: int, threads: int = 1, most: int | None = None) -> ScanPlan:
    """Check `items`, each with `group` query heads, and cut their scan into tasks, once for all layers.

    most: how many pages may be chosen for an item; those always chosen count, and are chosen even if they are more.
    The tables are kept, not copied: they must not change while the plan is used.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    missing = check_items(sketches, items, group, most)
    at, n = sketches.layout, len(items)
    capacity = max(-(-int(items.held.max(initial=1)) // LANES) * LANES, LANES)
    width = max(-(-int(items.sealed.max(initial=1)) // LANES) * LANES, LANES)
    described, tasks = _cut(items, threads)
    sizes = _scratch_bytes(at, group, width)
    ends = list(accumulate(-(-sizes[name] // 64) * 64 for name in SCRATCH))
    scratch = torch.zeros(threads * ends[-1] + 64, dtype=torch.uint8)
    base = scratch.data_ptr() + -scratch.data_ptr() % 64
    done = np.zeros(max(len(tasks), 1), np.int64)
    result = Choice(
        torch.empty(n, group, capacity),
        torch.empty(n, capacity, dtype=torch.int32),
        torch.empty(n, capacity, dtype=torch.int32),
        torch.empty(n, dtype=torch.int64),
        torch.empty(n * group),
        Partial(torch.empty(n * group, at.pages.d_v), torch.empty(n * group)),
    )
    a = _ScanArguments(
        shares=threads,
        page_size=at.pages.page_size,
        d_k=at.pages.d_k,
        d_v=at.pages.d_v,
        padded=at.padded,
        group=group,
        capacity=capacity,
        width=width,
        items=described.ctypes.data,
        tasks=tasks.ctypes.data,
        n_tasks=len(tasks),
        done=done.ctypes.data,
        most=1 << 40 if most is None else most,
        log_mass=result.log_mass.data_ptr(),
        pages=result.pages.data_ptr(),
        entries=result.entries.data_ptr(),
        counts=result.counts.data_ptr(),
        missing=result.missed.data_ptr(),
        tail=result.tail.out.data_ptr(),
        tail_lse=result.tail.lse.data_ptr(),
        scratch_bytes=ends[-1],
        **{name: base + start for name, start in zip(SCRATCH, [0, *ends[:-1]], strict=True)},
        **_describe(sketches),
    )
    return ScanPlan(sketches, items, group, threads, missing, a, result, (described, tasks, done, scratch))


def _scratch_bytes(at: SketchLayout, group: int, width: int) -> dict[str, int]:
    """Bytes of each part of a thread's scratch; width: entries of the longest item, a multiple of LANES."""
    rows = group * LANES
    sizes = {
        "floats": group * at.pages.d_k * 4,
        "halves": group * at.padded * 2,
        "bounds": group * at.padded * 2,
        "nothing": group * 4,
        "tops": rows * 64,
        "dots": rows * 64,
        "inverses": rows * 4,
        "factors": rows * 4,
        "bases": rows * 4,
        "panel": group * at.pages.d_k,
        "logits": rows * at.pages.page_size * 4,
    }
    # Few query heads are computed as up to 8: what is read and written of the others lies behind the group's own.
    sizes = {name: size + size // group * HEADS for name, size in sizes.items()}
    return sizes | {
        "places": LANES * 8,
        "ahead": LANES * 8,
        "limits": 3 * 4,
        "parts": group * width * 4,
        "scores": width * 4,
        "others": (width + AHEAD) * 4,
    }


def _cut(items: Items, threads: int) -> tuple[Any, Any]:
    """The items as the kernel takes them, and their tasks: equal ranges of an item's entries, at least one for each."""
    described = np.zeros(len(items), ITEM)
    described["table"] = [table.ctypes.data for table in items.tables]
    described["layer_stride"] = [table.strides[0] // 4 for table in items.tables]
    for name in ("sealed", "sinks", "recent", "held"):
        described[name] = getattr(items, name)
    size = int(np.clip(items.sealed.sum() // (threads * TASKS), *TASK_ENTRIES))
    described["tasks"] = np.maximum(-(-items.sealed // size), 1)
    length = -(-items.sealed // (described["tasks"] * LANES)) * LANES
    tasks = np.zeros(int(described["tasks"].sum()), TASK)
    tasks["item"] = np.repeat(np.arange(len(items)), described["tasks"])
    first = np.cumsum(described["tasks"]) - described["tasks"]
    own = tasks["item"]
    tasks["lo"] = (np.arange(len(tasks)) - first[own]) * length[own]
    tasks["hi"] = np.minimum(tasks["lo"] + length[own], items.sealed[own])
    return described, tasks


def scan(
    sketches: Sketches,
    plan: ScanPlan,
    layer: int,
    q: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
    missed: float = MISSED,
    active: npt.NDArray[np.bool_] | None = None,
) -> Choice:
    """Estimate the mass of every sealed page of a layer, and choose pages of each item.

    With `active`, bool `[items]`, of those items only: the plan's choice has no meaning for the others.
    q: `[items * group, d_k]`, a float dtype, item by item. Chosen are so many pages that of the estimated mass of the
    sealed ones no query head misses more than `missed`, and few more; or the plan's `most` that matter most.
    """
    check_scan(plan, sketches, layer, q, scale, soft_cap, missed)
    if active is not None and (active.dtype != np.bool_ or active.shape != (len(plan.items),)):
        raise ValueError(f"active must be bool [{len(plan.items)}], got {active.dtype} {list(active.shape)}")
    if not len(plan.items):
        return plan.result
    q = q.to(torch.float32).contiguous()
    a = plan.arguments
    tasks = plan.keep[1] if active is None else plan.keep[1][active[plan.keep[1]["item"]]]
    a.taken = a.finished = 0
    a.tasks, a.n_tasks = tasks.ctypes.data, len(tasks)
    a.layer, a.q, a.scale, a.soft_cap, a.missed = layer, q.data_ptr(), scale, soft_cap or 0.0, missed
    launch(scan_kernel(sketches.layout.unit), ctypes.addressof(a), plan.threads)
    return plan.result


def check_scan(
    plan: ScanPlan,
    sketches: Sketches,
    layer: int,
    q: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    missed: float,
) -> None:
    """Raise ValueError unless the plan was made for `sketches` and has that layer with all its pages, q is
    `[items * group, d_k]`, the scale is a number, soft_cap positive, and missed from 0 to 1."""
    if plan.sketches is not sketches:
        raise ValueError("the plan was made for other sketches")
    if not 0 <= layer < plan.items.layers:
        raise ValueError(f"layer must be from 0 to {plan.items.layers - 1}, got {layer}")
    if layer in plan.missing:
        raise ValueError(f"layer {layer} lacks a page that the items read")
    check_vectors("q", q, len(plan.items) * plan.group, sketches.layout.pages.d_k, sketches.arena.device)
    if not np.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if soft_cap is not None and not 0 < soft_cap < float("inf"):
        raise ValueError(f"soft_cap must be above 0 and finite, or None, got {soft_cap}")
    if not 0 <= missed <= 1:
        raise ValueError(f"missed must be from 0 to 1, got {missed}")
