"""Sketches of pages, and what decode attention learns from them: which pages matter, and what the others add up to.

A sketch is made once of a full page of one layer and KV head: its keys in 4 bits, asymmetric per channel (KIVI, arXiv
2402.02750), and the mean of its values. `scan` reads the sketches of all pages of a sequence, estimates how much of the
attention each page gets, and chooses pages so that little is missed. Knows pages and items; knows no policy and no
sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels import memory
from lamina_kernels.emitter import LANES, kind_of
from lamina_kernels.launch import block_type, launch, load_each
from lamina_kernels.pages import FLOATS, Order, PageLayout, Pages, check_order, check_vectors
from lamina_kernels.partial import Partial
from lamina_kernels.rows import Ints, Table
from lamina_kernels.sketch_loops import (
    ITEM,
    SCAN,
    SCRATCH,
    SEAL,
    SEAL_SCRATCH,
    TASK,
    scan_kernel,
    seal_kernel,
)
from lamina_kernels.sketch_micro import AHEAD, HEADS

LEVELS = 15  # the largest code
SEAL_SHARE = 4  # pages that are worth a thread
TASK_ENTRIES = 256  # that a thread scans at once
MISSED = 0.01  # of the estimated mass, which may be left out

_SealArguments, _ScanArguments = block_type(SEAL), block_type(SCAN)


@dataclass(frozen=True, slots=True)
class SketchLayout:
    """The shape of the sketches of such pages: codes, steps, lows, mean; then zeros up to a multiple of 64 bytes.

    codes: strips of 16 * unit tokens, each of lines of 64 bytes, in them for 16 tokens four bytes each. A byte has two
    codes. With unit 2, line i is of channels 4i to 4i + 3, the low halves of tokens 0 to 15 of the strip, the high
    halves of the others; with unit 1 the low halves are of channels 8i to 8i + 3, the high ones of the next four.
    steps, lows: bfloat16 `[padded]`, zeros behind d_k; mean: bfloat16 `[d_v]`.
    """

    pages: PageLayout

    def __post_init__(self) -> None:
        if self.pages.order is not Order.CHANNELS:
            raise ValueError(f"sketches are made of pages of {Order.CHANNELS}, got {self.pages.order}")

    @property
    def unit(self) -> int:
        """How many times 16 tokens a strip has."""
        return 2 if self.pages.page_size % 32 == 0 else 1

    @property
    def padded(self) -> int:
        """Channels of K, up to a multiple of 32."""
        return -(-self.pages.d_k // 32) * 32

    @property
    def steps_at(self) -> int:
        """Bytes of the codes, behind which the steps stand."""
        return self.pages.page_size * self.pages.d_k // 2

    @property
    def lows_at(self) -> int:
        return self.steps_at + 2 * self.padded

    @property
    def mean_at(self) -> int:
        return self.lows_at + 2 * self.padded

    @property
    def sketch_bytes(self) -> int:
        """Bytes of one sketch."""
        return -(-(self.mean_at + 2 * self.pages.d_v) // 64) * 64


@dataclass(frozen=True, slots=True)
class Sketches:
    """An arena of sketches, that of a page under the page's number. arena: uint8 `[n_pages, sketch_bytes]`."""

    layout: SketchLayout
    arena: torch.Tensor

    def __post_init__(self) -> None:
        arena, wanted = self.arena, self.layout.sketch_bytes
        if arena.dtype != torch.uint8 or arena.ndim != 2 or arena.shape[1] != wanted:
            raise ValueError(f"arena must be uint8 [n_pages, {wanted}], got {arena.dtype} {list(arena.shape)}")
        if not arena.is_contiguous() or arena.data_ptr() % 64:
            raise ValueError("arena must be contiguous and 64-byte aligned")

    @classmethod
    def allocate(cls, page_layout: PageLayout, n_pages: int) -> Sketches:
        """An arena of zeros for as many pages. Its memory is taken only when touched."""
        if n_pages < 1:
            raise ValueError(f"n_pages must be at least 1, got {n_pages}")
        layout = SketchLayout(page_layout)
        return cls(layout, memory.allocate(n_pages * layout.sketch_bytes).view(n_pages, layout.sketch_bytes))

    @property
    def n_pages(self) -> int:
        return self.arena.shape[0]

    @property
    def codes(self) -> torch.Tensor:
        """The codes, uint8 `[n_pages, page_size, d_k]`: a copy, unpacked."""
        at = self.layout
        d, unit = at.pages.d_k, at.unit
        packed = self.arena[:, : at.steps_at]
        if unit == 2:  # [page, strip, line, token, channel] twice, for the tokens' halves
            packed = packed.view(self.n_pages, -1, d // 4, LANES, 4)
            both = torch.stack([packed & 15, packed >> 4], 2).permute(0, 1, 2, 4, 3, 5)
        else:  # twice for the channels' halves
            packed = packed.view(self.n_pages, -1, d // 8, LANES, 4)
            both = torch.stack([packed & 15, packed >> 4], 3).permute(0, 1, 4, 2, 3, 5)
        return both.reshape(self.n_pages, at.pages.page_size, d)

    @property
    def steps(self) -> torch.Tensor:
        """A view of the steps, bfloat16 `[n_pages, d_k]`."""
        at = self.layout
        return self.arena[:, at.steps_at : at.steps_at + 2 * at.pages.d_k].view(torch.bfloat16)

    @property
    def lows(self) -> torch.Tensor:
        """A view of the lows, bfloat16 `[n_pages, d_k]`: what code 0 stands for."""
        at = self.layout
        return self.arena[:, at.lows_at : at.lows_at + 2 * at.pages.d_k].view(torch.bfloat16)

    @property
    def means(self) -> torch.Tensor:
        """A view of the means of V, bfloat16 `[n_pages, d_v]`."""
        at = self.layout
        return self.arena[:, at.mean_at : at.mean_at + 2 * at.pages.d_v].view(torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Items:
    """What a decode step asks of sketches: an item is one KV head of one sequence, with its query heads.

    tables: of each item, int32 `[layers, entries]`, contiguous along the entries: entry e is the page of the tokens
    from e * page_size on. The others are int64 `[items]`: entries [0, sealed) have sketches; entries [0, sinks) and
    [recent, held) are always chosen, as are those from `sealed` on; `held` is how many there are.
    """

    tables: Sequence[Table]
    sealed: Ints
    sinks: Ints
    recent: Ints
    held: Ints

    def __post_init__(self) -> None:
        n = len(self.tables)
        for name in ("sealed", "sinks", "recent", "held"):
            value = getattr(self, name)
            if value.dtype != np.int64 or value.shape != (n,):
                raise ValueError(f"{name} must be int64 [{n}], got {value.dtype} {list(value.shape)}")
            if value.size and value.min() < 0:
                raise ValueError(f"{name} has {value.min()}, allowed: 0 or more")
        late = np.flatnonzero(self.sealed > self.held)
        if late.size:
            i = int(late[0])
            raise ValueError(f"item {i} holds {self.held[i]} entries, but {self.sealed[i]} of them are sealed")

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def layers(self) -> int:
        return self.tables[0].shape[0] if self.tables else 0


class Choice(NamedTuple):
    """What `scan` found. It belongs to the plan, and is overwritten by the plan's next scan.

    log_mass: float32 `[items, group, capacity]`, the natural log of the sum of exp(logit) over a page's keys as the
    sketch has them, -inf from `sealed` on up to a multiple of 16, and anything behind; pages, entries: int32
    `[items, capacity]`, the first counts[i] of them chosen, in ascending order of the entries; counts: int64
    `[items]`; missed: float32 `[items * group]`, which share of the estimated mass of the sealed pages is not chosen;
    tail: of the pages not chosen, by their means, float32 `[items * group, d_v]`; its lse is -inf where there are none.
    """

    log_mass: torch.Tensor
    pages: torch.Tensor
    entries: torch.Tensor
    counts: torch.Tensor
    missed: torch.Tensor
    tail: Partial


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
    keep: tuple[Any, ...]  # what addresses in it point to


def prepare(page_layout: PageLayout) -> Iterator[tuple[int, int]]:
    """Load the kernels for such pages, compiling those that numba's cache on disk lacks: how many of how many."""
    layout = SketchLayout(page_layout)
    return load_each((lambda: _seal_kernel(layout), lambda: scan_kernel(layout.unit)))


def _seal_kernel(layout: SketchLayout) -> int:
    return seal_kernel(kind_of(layout.pages.dtype), layout.unit)


def check_sealed(pages: Pages, sketches: Sketches, page_ids: torch.Tensor) -> None:
    """Raise ValueError unless page_ids is int64 `[n]`, and all are pages of both."""
    if pages.layout != sketches.layout.pages or pages.n_pages != sketches.n_pages:
        raise ValueError(
            f"sketches of {sketches.n_pages} pages of {sketches.layout.pages} are not those of "
            f"{pages.n_pages} pages of {pages.layout}"
        )
    check_ids("page_ids", page_ids, sketches.n_pages)


def check_ids(name: str, ids: torch.Tensor, end: int) -> None:
    """Raise ValueError unless ids is int64 `[n]`, from 0 to end - 1."""
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(f"{name} must be int64 [n], got {ids.dtype} {list(ids.shape)}")
    if ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= end:
            raise ValueError(f"{name} must be from 0 to {end - 1}, got {low if low < 0 else high}")


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
    """What every block of arguments says of the sketches."""
    at = sketches.layout
    return {
        "sketches": sketches.arena.data_ptr(),
        "sketch_bytes": at.sketch_bytes,
        "steps_at": at.steps_at,
        "lows_at": at.lows_at,
        "mean_at": at.mean_at,
    }


def copy(sketches: Sketches, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy sketches, as `pages.copy` copies pages: that of page `src[i]` to page `dst[i]`, both int64 `[n]`."""
    for name, index in (("src", src), ("dst", dst)):
        check_ids(name, index, sketches.n_pages)
        if len(index) != len(src):
            raise ValueError(f"dst must have {len(src)} pages, got {len(index)}")
    sketches.arena[dst] = sketches.arena[src]


def check_items(sketches: Sketches, items: Items, group: int, most: int | None) -> frozenset[int]:
    """Raise ValueError unless the entries of `items` are in their tables, and name pages.

    Returns the layers in which entry -1, none, stands among them.
    """
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    if most is not None and most < 0:
        raise ValueError(f"most must be at least 0 or None, got {most}")
    missing: set[int] = set()
    for number, (table, held) in enumerate(zip(items.tables, items.held.tolist(), strict=True)):
        layers = items.layers
        if table.dtype != np.int32 or table.ndim != 2 or table.shape[0] != layers or table.shape[1] < held:
            raise ValueError(
                f"the table of item {number} must be int32 [{layers}, {held} or more], "
                f"got {table.dtype} {list(table.shape)}"
            )
        if table.shape[1] > 1 and table.strides[1] != 4:
            raise ValueError(f"the table of item {number} must be contiguous along its entries, got {table.strides}")
        if not held or not layers:
            continue
        used = table[:, :held]
        low, high = int(used.min()), int(used.max())
        if low < -1 or high >= sketches.n_pages:
            raise ValueError(
                f"the table of item {number} names page {low if low < -1 else high}; "
                f"there are pages 0 to {sketches.n_pages - 1}"
            )
        if low == -1:
            missing.update(np.flatnonzero((used == -1).any(axis=1)).tolist())
    return frozenset(missing)


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
    described, tasks = _cut(items)
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
    sizes |= {
        "places": LANES * 8,
        "ahead": LANES * 8,
        "limits": 3 * 4,
        "parts": group * width * 4,
        "scores": width * 4,
        "others": (width + AHEAD) * 4,
    }
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


def _cut(items: Items) -> tuple[Any, Any]:
    """The items as the kernel takes them, and their tasks: ranges of TASK_ENTRIES entries; one at least for each."""
    described = np.zeros(len(items), ITEM)
    described["table"] = [table.ctypes.data for table in items.tables]
    described["layer_stride"] = [table.strides[0] // 4 for table in items.tables]
    for name in ("sealed", "sinks", "recent", "held"):
        described[name] = getattr(items, name)
    described["tasks"] = np.maximum(-(-items.sealed // TASK_ENTRIES), 1)
    tasks = np.zeros(int(described["tasks"].sum()), TASK)
    tasks["item"] = np.repeat(np.arange(len(items)), described["tasks"])
    first = np.cumsum(described["tasks"]) - described["tasks"]
    tasks["lo"] = (np.arange(len(tasks)) - first[tasks["item"]]) * TASK_ENTRIES
    tasks["hi"] = np.minimum(tasks["lo"] + TASK_ENTRIES, items.sealed[tasks["item"]])
    return described, tasks


def check_scan(
    plan: Any, sketches: Sketches, layer: int, q: torch.Tensor, scale: float, soft_cap: float | None, missed: float
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
    """Estimate the mass of every sealed page of a layer, and choose pages of each item: as `sketch_reference.scan`.
    With `active`, bool `[items]`, of those items only: what the plan's choice says of the others is not to be read.

    q: `[items * group, d_k]`, a float dtype, item by item. Chosen are so many pages that of the estimated mass of the
    sealed ones no query head misses more than `missed`, and few more; or the plan's `most` that matter most.
    """
    check_scan(plan, sketches, layer, q, scale, soft_cap, missed)
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


__all__ = [
    "FLOATS",
    "LEVELS",
    "MISSED",
    "Choice",
    "Items",
    "ScanPlan",
    "SketchLayout",
    "Sketches",
    "copy",
    "plan_scan",
    "prepare",
    "scan",
    "seal",
]
