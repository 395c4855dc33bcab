"""State layers on a CPU: the tokens of a batch go into the states, and what is read of them comes out.

`plan` checks a batch once for all layers; `advance` does one layer. A row of one token reads and writes each state
once, at the speed of memory; longer rows go in blocks, by matrices. Everything is computed in float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.compile.launch import block_type, launch, load_each
from lamina_kernels.states.blocks import BLOCK, TILE
from lamina_kernels.states.layout import StateLayout
from lamina_kernels.states.loops import ARGUMENTS, ITEM, SCRATCH, advance_kernel
from lamina_kernels.states.operands import (
    DTYPES,
    Pages,
    StateConstants,
    StateRows,
    check_inputs,
    check_tables,
    input_sizes,
)

SHARES = 8  # of a thread, of items of one token
Arguments = block_type(ARGUMENTS)


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of a batch. source and target: int32 `[layers, items]`. For one thread at a time: it owns scratch."""

    layout: StateLayout
    group: int  # heads that share a key head
    end: int  # one more than the highest number of a head
    source: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    kept: npt.NDArray[np.int32] | None
    sizes: tuple[int, int]  # numbers of x and of gates
    vectors: int  # that come out
    threads: int
    arguments: Any  # the kernel's block
    keep: tuple[Any, ...]  # the memory that addresses in it point to


def prepare() -> Iterator[tuple[int, int]]:
    """Load the kernel, and compile it where numba's cache on disk lacks it: how many of how many."""
    return load_each((advance_kernel,))


def plan(
    layout: StateLayout,
    arena: torch.Tensor,
    rows: StateRows,
    source: Pages,
    target: Pages,
    threads: int = 1,
    kept: Pages | None = None,
) -> Plan:
    """Check a batch and deal it to threads, once for all layers.

    arena: float32 `[pages, layout.record]`, 64-byte aligned. source: int `[layers, items]`, the page that is read for
    each item, -1 where it starts with zeros; target: the page that is written, which may be the same one. kept: the
    page of each item's inputs, where rows replay or keep any, else -1; a row that keeps and replays none writes no
    target.

    Raises ValueError on pages that do not exist, are written twice, or are written for one item and read for another,
    and where inputs do not fit into their page.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    check_tables(layout, rows.items, arena, source, target, kept)
    items = _items(layout, rows)
    _check_kept(layout, items, target, kept)
    order = np.argsort(-items["count"], kind="stable")
    items, long = items[order], int((items["count"] > 1).sum())
    short = np.linspace(long, len(items), min(len(items) - long, threads * SHARES) + 1).astype(np.int64)
    starts = np.concatenate([np.arange(long, dtype=np.int64), short])
    scratch, addresses = _scratch(layout, threads, long > 0, kept is not None)
    zeros = torch.zeros(layout.record)
    a = Arguments(
        shares=len(starts) - 1,
        threads=threads,
        arena=arena.data_ptr(),
        record=layout.record,
        delta=layout.delta,
        by_channel=layout.kind == "kda",
        d_k=layout.d_k,
        d_v=layout.d_v,
        conv=layout.conv,
        gates_size=layout.gates,
        items=items.ctypes.data,
        starts=starts.ctypes.data,
        slots=layout.slots,
        zeros=zeros.data_ptr(),
        **addresses,
    )
    tables = (np.ascontiguousarray(source, np.int32), np.ascontiguousarray(target, np.int32))
    inputs = None if kept is None else np.ascontiguousarray(kept, np.int32)
    keep = (arena, items, starts, scratch, zeros)
    sizes, threads = input_sizes(layout, rows), max(1, min(threads, len(starts) - 1))
    return Plan(layout, rows.group, rows.end, *tables, inputs, sizes, rows.vectors, threads, a, keep)


def with_pages(plan: Plan, source: Pages, target: Pages) -> Plan:
    """The plan of the same rows with other pages: of the next batch, where the same sequences go on by as many tokens,
    and nothing is replayed or kept.

    Both plans share scratch. Raises ValueError as `plan` does.
    """
    arena = plan.keep[0]
    check_tables(plan.layout, plan.target.shape[1], arena, source, target)
    tables = (np.ascontiguousarray(source, np.int32), np.ascontiguousarray(target, np.int32))
    return replace(plan, source=tables[0], target=tables[1])


def _items(layout: StateLayout, rows: StateRows) -> npt.NDArray[Any]:
    items, first = np.zeros(rows.items, ITEM), 0
    items["number"] = np.arange(rows.items)
    x = gates = out = 0
    for row, (count, heads) in enumerate(zip(rows.count.tolist(), rows.heads, strict=True)):
        part, keys, width = items[first : first + len(heads)], rows.key_heads(row), rows.width(layout, row)
        ranks, places = np.searchsorted(keys, heads // rows.group), np.arange(len(heads))
        part["count"], part["x"], part["width"] = count, x, width
        part["q"], part["k"] = ranks * layout.d_k, (len(keys) + ranks) * layout.d_k
        part["v"] = 2 * len(keys) * layout.d_k + places * layout.d_v
        part["gates"], part["gates_width"] = gates + places * layout.gates, len(heads) * layout.gates
        part["out"], part["out_width"] = out + places * layout.d_v, len(heads) * layout.d_v
        part["head"], part["key"] = heads, heads // rows.group
        if rows.start is not None:
            replay = 0 if rows.replay is None else int(rows.replay[row])
            part["replay"], part["slot"] = replay, (rows.start[row] - replay) % max(1, layout.slots)
            part["keeps"] = rows.keeps is not None and rows.keeps[row]
        first, x = first + len(heads), x + count * width
        gates, out = gates + count * len(heads) * layout.gates, out + count * len(heads) * layout.d_v
    return items


def _check_kept(layout: StateLayout, items: npt.NDArray[Any], target: Pages, kept: Pages | None) -> None:
    """Raise ValueError unless what is kept of each item's inputs has a page and fits there, and each item that changes
    a state has a target."""
    tokens = items["replay"] + items["keeps"] * items["count"]
    if tokens.max(initial=0) > layout.slots or items["replay"].min(initial=0) < 0:
        raise ValueError(f"inputs of {tokens.max()} tokens, a page keeps those of {layout.slots}")
    if kept is not None and ((kept < 0) & (tokens > 0)).any():
        raise ValueError("an item has inputs to keep, and no page for them")
    if kept is None and tokens.any():
        raise ValueError("rows replay or keep inputs, and there are no pages of them")
    if ((target < 0) & ((items["replay"] > 0) | (items["keeps"] == 0))).any():
        raise ValueError("target names no page for an item that changes its state")


def _scratch(layout: StateLayout, threads: int, blocks: bool, keeps: bool) -> tuple[torch.Tensor, dict[str, int]]:
    """Memory for each thread, and the fields of the kernel's arguments that say where what lies in it."""
    tokens, by_channel = BLOCK if blocks else 1, layout.kind == "kda"
    keys, values, square = tokens * layout.d_k, tokens * layout.d_v, BLOCK * BLOCK * blocks
    sizes = dict.fromkeys(SCRATCH, 0) | {
        "inputs": (tokens + layout.conv) * layout.channels,
        **dict.fromkeys(("q", "k", "keys"), keys),
        **dict.fromkeys(("v", "change", "read"), values),
        **dict.fromkeys(("scores", "overlaps"), square),
        **dict.fromkeys(("forward", "backward"), BLOCK + layout.d_k),
        "decays": keys if by_channel else BLOCK + layout.d_k,
        **dict.fromkeys(("scaled_q", "scaled_k"), keys * by_channel),
        "lines": (2 * TILE + 3) * layout.d_k * by_channel,
        "state": layout.d_k * layout.d_v * keeps,
    }
    ends = list(accumulate(-(-size // 16) * 64 for size in sizes.values()))
    scratch = torch.empty(threads * ends[-1] + 64, dtype=torch.uint8)
    base = scratch.data_ptr() + -scratch.data_ptr() % 64
    places = dict(zip(sizes, (base + end for end in (0, *ends[:-1])), strict=True))
    return scratch, {"scratch_bytes": ends[-1], **places}


def advance(plan: Plan, layer: int, x: torch.Tensor, gates: torch.Tensor, constants: StateConstants) -> torch.Tensor:
    """Take the tokens of a batch into the states of one layer, the plan's `layer`-th.

    x: 1-D, row by row, each `[count, width]`: q of the row's key heads, k of them, v of its heads, before the
    convolution. gates: float32, 1-D, row by row, each `[count, heads, layout.gates]`. Gives `[sum of count * heads,
    d_v]` in x's dtype, row by row, in a row by token, then by head. Sources that are no targets stay as they are, so a
    batch can run again. Tokens that are replayed give nothing.
    """
    layout = plan.layout
    check_inputs(plan.sizes, x, gates)
    constants.check(layout, plan.group, plan.end)
    numbers, gate_numbers = x.contiguous(), gates.contiguous()
    out = torch.empty(plan.vectors, layout.d_v, dtype=x.dtype)
    a = plan.arguments
    _fill(a, plan, layer, constants, x.dtype)
    a.x, a.gates, a.out = numbers.data_ptr(), gate_numbers.data_ptr(), out.data_ptr()
    launch(advance_kernel(), ctypes.addressof(a), plan.threads)
    return out


@dataclass(frozen=True, slots=True)
class StateWork:
    """A batch in flight at a holder in this process, for a model whose rows are the batch's, with all heads.

    places: of the model's layers that have such states, their numbers in the plan; constants: by these. `stored` is
    told the numbers of layers that are done.
    """

    plan: Plan
    places: Mapping[int, int]
    constants: Mapping[int, StateConstants]
    stored: Callable[[Sequence[int]], None]

    def advance(self, layer: int, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """`advance` of one of the model's layers, for x `[T, width]` and gates `[T, heads, g]`: `[T, heads * d_v]`."""
        place = self.places[layer]
        out = advance(self.plan, place, x.reshape(-1), gates.reshape(-1), self.constants[place])
        self.stored((place,))
        return out.view(len(x), -1)

    def takes(self, x: torch.Tensor, gates: torch.Tensor, threads: int) -> bool:
        """Whether the kernel can be a step of a program that gives such inputs in each layer."""
        return (x.numel(), gates.numel()) == self.plan.sizes and threads <= self.plan.arguments.threads

    def fill(self, block: Any, layer: int, dtype: torch.dtype) -> None:
        """What a step of one of the model's layers is given, in that dtype, but for where x, gates and what comes out
        are."""
        place = self.places[layer]
        ctypes.memmove(ctypes.addressof(block), ctypes.addressof(self.plan.arguments), ctypes.sizeof(block))
        _fill(block, self.plan, place, self.constants[place], dtype)


def _fill(a: Any, plan: Plan, layer: int, constants: StateConstants, dtype: torch.dtype) -> None:
    """All of a block but where x, gates and what comes out are."""
    a.taken = a.finished = 0
    row = 4 * layer * plan.source.shape[1]
    a.source, a.target = plan.source.ctypes.data + row, plan.target.ctypes.data + row
    a.kept = 0 if plan.kept is None else plan.kept.ctypes.data + row
    a.dtype, a.itemsize = DTYPES.index(dtype), dtype.itemsize
    a.heads, a.key_heads, a.scale = constants.heads, constants.key_heads, constants.scale
    a.skip, a.log_decays = _address(constants.skip), _address(constants.decays)
    a.weights, a.bias = _address(constants.taps), _address(constants.shift)
    a.channels = 0 if constants.taps is None else constants.taps.shape[1]


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
