"""Paged attention on a GPU, in Triton, or on a CPU in Triton's interpreter, which is slow and there to test it.

`plan` checks a batch, cuts its work and copies what the kernels need to the device, once for all layers; `attend`
then only launches. Pieces of few query vectors, which decoding asks, and pieces of many, of prompts, get tiles of
their own. Each kind is attended split-KV where its pieces are about equally long, and stream-K where they are
not (`split_kv` has both).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from lamina_kernels.gpu.kv_append import append as append
from lamina_kernels.gpu.kv_append import describe
from lamina_kernels.gpu.kv_append import plan_append as plan_append
from lamina_kernels.gpu.merge_partials import OUTPUT, merge_outputs
from lamina_kernels.gpu.merge_partials import merge_into as merge_into
from lamina_kernels.gpu.split_kv import attend_kernel, records, split
from lamina_kernels.gpu.tuning import FEW_ROWS, dot_type, launch, padded, programs, tuning_for
from lamina_kernels.paged.page_lists import ListPlan, through_rows
from lamina_kernels.paged.pages import Order, PageLayout, Pages, check_order
from lamina_kernels.paged.rows import Rows, Table, check_attend, check_rows
from lamina_kernels.paged.schedule import Pieces, cut, deal
from lamina_kernels.partial import Partial

EVEN = 0.75  # pieces whose mean length is below this share of the longest are ragged: an estimate, unmeasured


@dataclass(frozen=True, slots=True)
class Launch:
    """A grid of `attend_kernel`, and its arguments besides `Plan.arguments`."""

    grid: tuple[int, ...]
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of a batch, the same for all layers. For one stream at a time: it owns scratch."""

    pages: Pages
    n: int  # query vectors
    layers: int
    missing: frozenset[int]  # layers that lack an entry which the rows read
    launches: tuple[Launch, ...]
    arguments: dict[str, Any]  # of every launch
    outputs: torch.Tensor  # the ones that are cut, int64 [n, len(OUTPUT)]
    most_rows: int  # query vectors of the largest of them
    partials: Partial  # of their parts: scratch, float32


def layout(page_size: int, d_k: int, d_v: int, dtype: torch.dtype, latent: bool = False) -> PageLayout:
    return PageLayout(page_size, d_k, d_v, dtype, Order.TOKENS, latent)


def prepare(layout: PageLayout) -> Iterator[tuple[int, int]]:
    """There is nothing to load: Triton compiles a kernel where it is first launched, and keeps it on disk."""
    return iter(())


def plan(pages: Pages, rows: Rows, threads: int = 1) -> Plan:
    """As `select.Kernels.plan`. In the interpreter `threads` is how many programs there are; a GPU has its own number.
    All tables of the rows are copied to the device."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    check_order(pages, Order.TOKENS)
    pages_layout, device = pages.layout, pages.arena.device
    if pages_layout.d_index:
        raise ValueError(
            f"pages have index keys of {pages_layout.d_index} numbers, which these kernels do not know; allowed: 0"
        )
    missing = check_rows(pages, rows)
    table, tables = _joined(rows.tables)
    all_pieces = cut(dataclasses.replace(rows, tables=tables))
    few = all_pieces["rows"] <= FEW_ROWS
    launches, outputs, partials = [], [], 0
    for pieces in (all_pieces[few], all_pieces[~few]):
        if len(pieces):
            step, pieces, used = _launch(pages, pieces, programs(device, threads), partials)
            step.arguments["pieces"] = records(pieces, table.ctypes.data, device)
            launches.append(step)
            outputs.append(pieces[pieces["parts"] > 1])
            partials += used
    cut_ones = np.concatenate([*outputs, all_pieces[:0]])
    arguments = {
        "partial_out": torch.empty(partials, pages_layout.d_v, device=device),
        "partial_lse": torch.empty(partials, device=device),
        "table": torch.from_numpy(table).to(device),
        "DOT": dot_type(pages_layout.dtype),
        "LISTED": bool(rows.listed.any()),
        "WIDTH_K": padded(pages_layout.d_k - pages_layout.d_v if pages_layout.latent else pages_layout.d_k),
        "WIDTH_V": padded(pages_layout.d_v),
        **describe(pages),
    }
    return Plan(
        n=rows.n,
        layers=rows.layers,
        missing=missing,
        pages=pages,
        launches=tuple(launches),
        arguments=arguments,
        outputs=torch.from_numpy(np.stack([cut_ones[name] for name in OUTPUT], 1)).to(device),
        most_rows=int(cut_ones["rows"].max(initial=0)),
        partials=Partial(arguments["partial_out"], arguments["partial_lse"]),
    )


def grown(plan: Plan) -> None:
    """None: batches are planned anew, since what they read is copied to the device."""


def _launch(pages: Pages, pieces: Pieces, at_once: int, partials: int) -> tuple[Launch, Pieces, int]:
    """The launch for pieces that share a tile, without its records; the pieces as it cuts them, their partials from
    number `partials` on, and how many of those there are."""
    device = pages.arena.device
    tile = tuning_for(device).tile(pages.layout, int(pieces["rows"].max()))
    pieces = narrowed(pieces, tile.rows)
    rows_of_tile = max(tile.rows, int(triton.next_power_of_2(int(pieces["rows"].max()))))
    arguments: dict[str, Any] = {"ROWS": rows_of_tile, "KEYS": tile.keys}
    arguments |= {"num_warps": tile.warps, "num_stages": tile.stages}
    pieces, starts = deal(pieces, at_once) if is_ragged(pieces) else split(pieces, at_once, tile.keys)
    arguments["starts"] = torch.from_numpy(starts).to(device)
    inner = pieces["partial"] >= 0
    pieces["partial"][inner] += partials
    return Launch((len(starts) - 1,), arguments), pieces, int(pieces["rows"][inner].sum())


def narrowed(pieces: Pieces, most_rows: int) -> Pieces:
    """The pieces in blocks of at most `most_rows` query vectors, of one token at least, each an output of its own."""
    tokens, block = pieces["rows"] // pieces["group"], np.maximum(most_rows // pieces["group"], 1)
    blocks = -(-tokens // block)
    source = np.repeat(np.arange(len(pieces)), blocks)
    first = (np.arange(len(source)) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * block[source]
    count = np.minimum(tokens[source] - first, block[source])
    narrow = pieces[source]
    narrow["q"] += first * narrow["stride"]
    narrow["position"] += first
    narrow["rows"] = count * narrow["group"]
    narrow["hi"] = np.clip(narrow["position"] + count, narrow["lo"], narrow["hi"])
    order = np.lexsort((first, narrow["output"]))  # stable: the pieces of one output keep their order
    begins = (np.diff(narrow["output"][order], prepend=-1) != 0) | (np.diff(first[order], prepend=-1) != 0)
    narrow = narrow[order]
    narrow["output"] = np.cumsum(begins) - 1
    return narrow


def is_ragged(pieces: Pieces) -> bool:
    """Whether split-KV, which cuts every piece into as many chunks, would leave much of its programs without work."""
    length = pieces["hi"] - pieces["lo"]
    return bool(length.mean() < EVEN * length.max())


def _joined(tables: Sequence[Table]) -> tuple[Table, list[Table]]:
    """All tables laid end to end in one, and each as a view of its part of it."""
    flat = np.concatenate([np.empty(0, np.int32), *(table.reshape(-1) for table in tables)])
    ends = np.cumsum([table.size for table in tables], dtype=np.int64).tolist()
    views = [flat[end - table.size : end].reshape(table.shape) for table, end in zip(tables, ends, strict=True)]
    return flat, views


def attend(
    pages: Pages,
    plan: Plan,
    layer: int,
    q: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
    out: torch.Tensor | None = None,
) -> Partial:
    """As `select.Kernels.attend`. On a GPU q and the weights are rounded to the dtype of K and V, to bfloat16 where
    those are quantised; sums are float32."""
    check_attend(pages, plan, layer, q, scale, soft_cap, out)
    result = Partial(
        q.new_empty(plan.n, pages.layout.d_v) if out is None else out, torch.empty(plan.n, device=q.device)
    )
    arguments = plan.arguments | {
        "q": q.contiguous(),
        "out": result.out,
        "lse": result.lse,
        "layer": layer,
        "scale": float(scale),
        "soft_cap": float(soft_cap or 0.0),
        "CAPPED": soft_cap is not None,
    }
    for step in plan.launches:
        launch(attend_kernel, step.grid, arguments | step.arguments)
    if len(plan.outputs):
        merge_outputs(plan.outputs, plan.most_rows, plan.partials, result)
    return result


def plan_lists(pages: Pages, items: int, group: int, threads: int = 1) -> ListPlan:
    return ListPlan(pages, items, group, threads)


attend_lists = through_rows(plan, attend)
