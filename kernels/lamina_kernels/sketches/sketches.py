"""Sketches of pages, and what they say for decode attention: which pages matter, and what the others add up to.

A sketch is made once of a full page of one layer and KV head: its keys and values in 4 bits, asymmetric per channel
(KIVI, arXiv 2402.02750), and the mean of its values. `scan` reads the keys of all sketches of a sequence, which give
each token's logit, and each page's share of the attention. Pages of large mass are chosen, to be read exactly. Of the
others it adds up what their sketches say: values in 4 bits, or, where next to nothing is at stake, their means.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.compile.emitter import LANES, kind_of
from lamina_kernels.compile.launch import block_type, launch, load_each
from lamina_kernels.paged.pages import Order, PageLayout, Pages
from lamina_kernels.partial import Partial
from lamina_kernels.sketches import reference
from lamina_kernels.sketches.blend_loops import blend_kernel
from lamina_kernels.sketches.choice_micro import AHEAD
from lamina_kernels.sketches.items import MISSED, Choice, Items, check_items, check_scan
from lamina_kernels.sketches.layout import Sketches, SketchLayout, check_sealed
from lamina_kernels.sketches.loops import (
    BETWEEN,
    ITEM,
    PART,
    SCAN,
    SCRATCH,
    SEAL,
    SEAL_SCRATCH,
    TASK,
    scan_kernel,
    seal_kernel,
)
from lamina_kernels.sketches.micro import HEADS

SEAL_SHARE = 4  # pages that are worth a thread
TASKS = 12  # of a thread, so that all end at about the same time
TASK_ENTRIES = (128, 1024)  # least and most: at the beginning of a task nothing is fetched yet
PART_ENTRIES = 256  # of an item that are added up by one thread

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
    tasks: npt.NDArray[Any]  # of the scan
    parts: npt.NDArray[Any]  # of what is added up then
    mean_counts: torch.Tensor  # int64 `[items]`
    result: Choice
    keep: tuple[Any, ...]  # the memory that addresses in it point to


def prepare(page_layout: PageLayout) -> Iterator[tuple[int, int]]:
    """Load the kernels for such pages, and compile what numba's cache on disk lacks: how many of how many."""
    layout = SketchLayout(page_layout)
    if page_layout.order is Order.TOKENS:
        return iter(())
    return load_each((lambda: _seal_kernel(layout), lambda: scan_kernel(layout.unit), blend_kernel))


def _seal_kernel(layout: SketchLayout) -> int:
    return seal_kernel(kind_of(layout.pages.dtype), layout.unit)


def seal(pages: Pages, sketches: Sketches, page_ids: torch.Tensor) -> None:
    """Make the sketches of full pages, from what they hold; page_ids int64 `[n]`, each once."""
    if pages.layout.order is Order.TOKENS:
        reference.seal(pages, sketches, page_ids)
        return
    check_sealed(pages, sketches, page_ids)
    if not len(page_ids):
        return
    layout, ids = pages.layout, page_ids.contiguous()
    threads = min(1 + len(ids) // SEAL_SHARE, torch.get_num_threads())
    scratch = torch.empty(threads * SEAL_SCRATCH + 64, dtype=torch.uint8)
    a = _SealArguments(
        shares=threads,
        arena=pages.arena.data_ptr(),
        page_size=layout.page_size,
        page_bytes=layout.page_bytes,
        k_bytes=layout.k_bytes,
        kv_bytes=layout.kv_bytes,
        d_k=layout.d_k,
        d_v=layout.d_v,
        n=len(ids),
        ids=ids.data_ptr(),
        scratch=scratch.data_ptr() + -scratch.data_ptr() % 64,
        **_describe(sketches),
    )
    launch(_seal_kernel(sketches.layout), ctypes.addressof(a), threads)


def _describe(sketches: Sketches) -> dict[str, int]:
    """The fields of the sketches in every block of arguments."""
    layout = sketches.layout
    return {
        "scanned": sketches.scanned.data_ptr(),
        "scanned_bytes": layout.scanned_bytes,
        "values": sketches.values.data_ptr(),
        "value_bytes": layout.value_bytes,
        "steps_at": layout.steps_at,
        "lows_at": layout.lows_at,
        "mean_at": layout.mean_at,
        "value_steps_at": layout.value_steps_at,
        "value_lows_at": layout.value_lows_at,
    }


def plan_scan(sketches: Sketches, items: Items, group: int, threads: int = 1) -> ScanPlan | reference.ScanPlan:
    """Check `items`, each with `group` query heads, and cut their scan into tasks, once for all layers.

    The tables are kept, not copied: they must not change while the plan is used.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if sketches.layout.pages.order is Order.TOKENS:
        return reference.plan_scan(sketches, items, group)
    missing = check_items(sketches, items, group)
    layout, n = sketches.layout, len(items)
    capacity = max(-(-int(items.held.max(initial=1)) // LANES) * LANES, LANES)
    described, tasks, parts = _cut(items, threads)
    scratch, addresses, thread_bytes = _together(_scratch_bytes(layout, group, capacity), SCRATCH, threads)
    intermediates, of_items, _ = _together(_between_bytes(layout, n, group, capacity, len(parts)), BETWEEN, 1)
    done = np.zeros(max(len(tasks), 1), np.int64)
    coarse_counts, mean_counts = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    result = Choice(
        torch.empty(n, group, capacity),
        torch.empty(n, capacity, dtype=torch.int32),
        torch.empty(n, capacity, dtype=torch.int32),
        torch.empty(n, dtype=torch.int64),
        torch.empty(n * group),
        Partial(torch.empty(n * group, layout.pages.d_v), torch.empty(n * group)),
        torch.empty(n * group),
        coarse_counts,
    )
    of_items |= {"coarse_counts": coarse_counts.data_ptr(), "mean_counts": mean_counts.data_ptr()}
    a = _ScanArguments(
        shares=threads,
        page_size=layout.pages.page_size,
        d_k=layout.pages.d_k,
        d_v=layout.pages.d_v,
        padded=layout.padded,
        group=group,
        capacity=capacity,
        items=described.ctypes.data,
        done=done.ctypes.data,
        log_mass=result.log_mass.data_ptr(),
        pages=result.pages.data_ptr(),
        entries=result.entries.data_ptr(),
        counts=result.counts.data_ptr(),
        missing=result.missed.data_ptr(),
        coarse=result.coarse.data_ptr(),
        tail=result.tail.out.data_ptr(),
        tail_lse=result.tail.lse.data_ptr(),
        scratch_bytes=thread_bytes,
        **addresses,
        **of_items,
        **_describe(sketches),
    )
    memory = (described, done, scratch, intermediates)
    return ScanPlan(sketches, items, group, threads, missing, a, tasks, parts, mean_counts, result, memory)


def _together(sizes: Mapping[str, int], names: Sequence[str], copies: int) -> tuple[torch.Tensor, dict[str, int], int]:
    """Memory of these sizes, each on lines of its own: the address of each in the first copy, and a copy's bytes."""
    ends = list(accumulate(-(-sizes[name] // 64) * 64 for name in names))
    memory = torch.empty(copies * ends[-1] + 64, dtype=torch.uint8)
    base = memory.data_ptr() + -memory.data_ptr() % 64
    return memory, {name: base + start for name, start in zip(names, [0, *ends[:-1]], strict=True)}, ends[-1]


def _scratch_bytes(at: SketchLayout, group: int, capacity: int) -> dict[str, int]:
    """Bytes of each part of a thread's scratch."""
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
        "sums": group * at.pages.d_v * 4,
        "totals": 2 * group * 4,
    }
    # Few query heads are computed as up to 8: what is read and written of the others lies behind the group's own.
    sizes = {name: size + size // group * HEADS for name, size in sizes.items()}
    return sizes | {"places": LANES * 8, "ahead": LANES * 8, "scores": capacity * 4}


def _between_bytes(at: SketchLayout, items: int, group: int, capacity: int, parts: int) -> dict[str, int]:
    """Bytes of each of `BETWEEN`; of the counts none, which stand elsewhere."""
    heads = items * group + HEADS  # those behind the last group's own are computed too
    return {
        "tokens": heads * capacity * at.pages.page_size,
        "page_shares": heads * capacity * 4,
        "lse": items * group * 4,
        "coarse_entries": items * (capacity + AHEAD) * 4,
        "mean_entries": items * (capacity + AHEAD) * 4,
        "coarse_counts": 0,
        "mean_counts": 0,
        "partials": parts * group * (at.pages.d_v + 2) * 4,
    }


def _cut(items: Items, threads: int) -> tuple[Any, Any, Any]:
    """The items as the kernel takes them; their tasks, equal ranges of an item's entries, at least one for each; and
    the parts of what is added up afterwards, as many whatever the threads, so that sums are the same."""
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
    item_of_task = tasks["item"]
    tasks["lo"] = (np.arange(len(tasks)) - first[item_of_task]) * length[item_of_task]
    tasks["hi"] = np.minimum(tasks["lo"] + length[item_of_task], items.sealed[item_of_task])
    described["parts"] = np.maximum(-(-items.sealed // PART_ENTRIES), 1)
    described["first_part"] = np.cumsum(described["parts"]) - described["parts"]
    parts = np.zeros(int(described["parts"].sum()), PART)
    parts["item"] = np.repeat(np.arange(len(items)), described["parts"])
    parts["number"] = np.arange(len(parts)) - described["first_part"][parts["item"]]
    return described, tasks, parts


def scan(
    sketches: Sketches,
    plan: ScanPlan | reference.ScanPlan,
    layer: int,
    q: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
    missed: float = MISSED,
    active: npt.NDArray[np.bool_] | None = None,
    coarse: float = 0.0,
) -> Choice:
    """Estimate the mass of every sealed page of a layer, choose pages of each item, and add up what stands for others.

    With `active`, bool `[items]`, of those items only: the plan's choice has no meaning for the others.
    q: `[items * group, d_k]`, a float dtype, item by item. Of the estimated mass of the sealed pages means alone stand
    for at most `missed` of any query head's. The values of other pages are read in 4 bits as long as the root of the
    sum of squares of all shares not read exactly is at most `coarse`, for every query head: errors are independent
    from page to page, so this is how they add up. The rest are chosen, and few more than that needs.
    """
    if isinstance(plan, reference.ScanPlan):
        return reference.scan(sketches, plan, layer, q, scale, soft_cap, missed, coarse)
    check_scan(plan, sketches, layer, q, scale, soft_cap, missed, coarse)
    if active is not None and (active.dtype != np.bool_ or active.shape != (len(plan.items),)):
        raise ValueError(f"active must be bool [{len(plan.items)}], got {active.dtype} {list(active.shape)}")
    if not len(plan.items):
        return plan.result
    q = q.to(torch.float32).contiguous()
    a, tasks, parts = plan.arguments, plan.tasks, plan.parts
    if active is not None:
        tasks, parts = (x[active[x["item"]]] for x in (tasks, parts))
    a.taken = a.finished = 0
    a.tasks, a.n_tasks, a.parts, a.n_parts = tasks.ctypes.data, len(tasks), parts.ctypes.data, len(parts)
    a.layer, a.q, a.scale, a.soft_cap = layer, q.data_ptr(), scale, soft_cap or 0.0
    a.missed, a.at_stake = missed, coarse
    launch(scan_kernel(sketches.layout.unit), ctypes.addressof(a), plan.threads)
    a.taken = a.finished = 0
    launch(blend_kernel(), ctypes.addressof(a), plan.threads)
    return plan.result
