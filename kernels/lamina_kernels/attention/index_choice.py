"""The choice of keys by a layer's own index: which blocks of keys each token reads, as the model was trained.

The rule is that of `lamina_protocols.messages.layers.Index`. MiniMax-M3 has it with blocks of 128 keys and one index
query for each KV head; DeepSeek V3.2 (arXiv 2512.02556) with single keys and 64 weighted index queries.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lamina_kernels.attention.index_loops import PIECE, SCORES, SCRATCH, score_kernel
from lamina_kernels.attention.microkernels import TILE
from lamina_kernels.compile.emitter import Kind, kind_of
from lamina_kernels.compile.launch import block_type, launch
from lamina_kernels.paged.pages import Order, Pages
from lamina_kernels.paged.rows import Ints, Table

AT_ONCE = 1 << 22  # scores that are worth the memory, together
_PIECES = 4  # a thread
_Arguments = block_type(SCORES)


class Queries(NamedTuple):
    """The index queries of some tokens, float32 `[t, kv_heads, heads, d_index]`, at `positions`, int64 `[t]`. `tables`
    has the pages of each token's keys, int32 `[pages]`, or one table for all. weights: float32 `[t, kv_heads, heads]`,
    or None: then the highest inner product counts."""

    tables: Sequence[Table]
    positions: Ints
    queries: torch.Tensor
    weights: torch.Tensor | None


def chosen_blocks(pages: Pages, asked: Queries, block: int, top: int, local: int, threads: int = 1) -> torch.Tensor:
    """The `top` blocks of `block` keys that each token reads, and no others: int64 `[t, kv_heads, top]`, ascending.

    Each token must see more than `top` blocks. `local`: so many last blocks come first, that of the token among them.
    """
    scores = (_compiled if pages.layout.order is Order.CHANNELS else _plain)(pages, asked, threads)
    positions = torch.from_numpy(asked.positions)[:, None, None]
    n = int(asked.positions.max()) + 1
    scores = scores[..., :n]
    if not local or block == 1:  # else what lies behind a token is in blocks that come first, or not at all
        scores = scores.masked_fill(torch.arange(n) > positions, -torch.inf)
    if block > 1:
        scores = F.pad(scores, (0, -n % block), value=-torch.inf).unflatten(-1, (-1, block)).amax(-1)
        own_block, number = positions // block, torch.arange(scores.shape[-1])
        scores.masked_fill_(number > own_block, -torch.inf)
        scores.masked_fill_((number <= own_block) & (number > own_block - local), torch.inf)
    elif local:
        scores.masked_fill_((torch.arange(n) <= positions) & (torch.arange(n) > positions - local), torch.inf)
    return scores.topk(top, -1, sorted=False).indices.sort(-1).values


def _plain(pages: Pages, asked: Queries, threads: int) -> torch.Tensor:
    """What each key scores, float32 `[t, kv_heads, keys]`; behind a token's position it means nothing."""
    layout, n = pages.layout, int(asked.positions.max()) + 1
    scores = asked.queries.new_full((*asked.queries.shape[:2], n), -torch.inf)
    one = len(asked.tables) == 1
    for number, table in enumerate(asked.tables):
        queries = slice(None) if one else slice(number, number + 1)
        keys = int(asked.positions[queries].max()) + 1
        index = torch.from_numpy(table[: -(-keys // layout.page_size)].astype(np.int64))
        k = pages.k[index][:, :, layout.d_k // layout.k_pack :].reshape(-1, layout.d_index).float()
        if layout.scaled:
            k = k * pages.scales[index, 0].reshape(-1, 1)
        products = torch.matmul(asked.queries[queries], k[:keys].T)
        if asked.weights is None:
            scores[queries, :, :keys] = products.amax(2)
        else:
            scores[queries, :, :keys] = torch.matmul(asked.weights[queries].unsqueeze(2), products.relu_()).squeeze(2)
    return scores


def _compiled(pages: Pages, asked: Queries, threads: int) -> torch.Tensor:
    """The same, by the compiled loop."""
    layout, kind = pages.layout, kind_of(pages.layout.dtype)
    t, kv_heads, heads, d = asked.queries.shape
    unit = 2 if layout.page_size % 32 == 0 else 1
    width, items = 16 * unit, len(asked.tables)
    rows = t // items * kv_heads * heads  # of an item
    strips = np.array([asked.positions[n::items].max() for n in range(items)] if items > 1 else [asked.positions.max()])
    strips = strips // width + 1
    stride = int(strips.max()) * width
    scores = torch.full((t, kv_heads, stride), -torch.inf) if items > 1 else torch.empty(t, kv_heads, stride)
    panel, of_q = _panel(kind, asked.queries.reshape(items, rows, d))
    tables = [np.ascontiguousarray(table) for table in asked.tables]
    weights = None if asked.weights is None else asked.weights.contiguous()
    piece_strips = max(1, -(-int(strips.sum()) // (_PIECES * threads)))  # strips of a piece
    counts = -(-strips // piece_strips)
    item = np.repeat(np.arange(items), counts)
    pieces = np.zeros(len(item), PIECE)
    pieces["begin"] = (np.arange(len(item)) - (np.cumsum(counts) - counts)[item]) * piece_strips
    pieces["end"] = np.minimum(pieces["begin"] + piece_strips, strips[item])
    pieces["rows"] = rows
    pieces["table"] = np.array([table.ctypes.data for table in tables])[item]
    pieces["panel"] = panel.data_ptr() + item * panel[0].numel() * 4
    pieces["of_q"] = 0 if of_q is None else of_q.data_ptr() + item * rows * 4
    pieces["weights"] = 0 if weights is None else weights.data_ptr() + item * rows * 4
    pieces["scores"] = scores.data_ptr() + item * (rows // heads * stride * 4)
    scratch = np.empty(len(pieces) * SCRATCH + 64, np.uint8)
    a = _Arguments(
        shares=len(pieces),
        pieces=pieces.ctypes.data,
        scratch=scratch.ctypes.data + -scratch.ctypes.data % 64,
        heads=heads,
        stride=stride,
        steps=d // layout.k_pack,
        words=panel.shape[2] * panel.shape[4],
        arena=pages.arena.data_ptr(),
        page_size=layout.page_size,
        page_bytes=layout.page_bytes,
        kv_bytes=layout.kv_bytes,
        itemsize=layout.dtype.itemsize,
        k_pack=layout.k_pack,
        d_k=layout.d_k,
    )
    launch(score_kernel(kind, unit), ctypes.addressof(a), threads)
    return scores


def _panel(kind: Kind, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries, float32 `[items, rows, d]`, as the loop reads them: int32 `[items, tiles, steps, TILE, words a step]`.
    And for INT8, float32 `[items, rows]`, what a unit of each is worth."""
    of_q = None
    if kind == Kind.INT8:
        of_q = queries.abs().amax(-1) / 32767
        queries = (queries / of_q.clamp_min(1e-37).unsqueeze(-1)).round().to(torch.int16)
    else:
        queries = queries.to(kind.query)
    items, rows, _ = queries.shape
    words = F.pad(queries.contiguous().view(torch.int32), (0, 0, 0, -rows % TILE))
    return words.view(items, -1, TILE, words.shape[-1] // kind.words[1], kind.words[1]).transpose(
        2, 3
    ).contiguous(), of_q
