"""Attention in layers whose own index chooses what each token reads.

All keys of a sequence must be in one place for that, a batch's own tokens too: so every row stores first, and reads all
keys up to its end. Tokens that see no more blocks than they may read are attended as everywhere; for the others the
index chooses, layer by layer, and kernels attend lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from lamina_kernels.attention.index_choice import AT_ONCE, Queries, chosen_blocks
from lamina_kernels.paged.pages import Pages
from lamina_kernels.paged.rows import Ints, Rows, Table
from lamina_kernels.partial import Partial, empty
from lamina_kernels.select import Kernels
from lamina_protocols.messages.layers import Index, LayerSpec
from lamina_protocols.messages.messages import Row
from lamina_workers.attention_worker.adaptive import Tallies
from lamina_workers.attention_worker.row_builder import RowBuilder, RowQueries
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.kv_pages.parts import KvPart
from lamina_workers.policies.full import Full


class _Choosing(NamedTuple):
    """Tokens of a part at positions start, ..., start + tokens - 1, for which the index chooses. Their vectors of the
    flat q begin with `first`. `decode`: what they read is counted."""

    handle: int
    part: KvPart
    start: int
    tokens: int
    first: int
    decode: bool


@dataclass(slots=True)
class IndexReading:
    """What the rows of a batch read in every layer with an index. `plan` is the kernels', of the vectors `all_seen` of
    the flat q, int64, which see all; `choosing` are the others, whose vectors are `chosen`. `room`: the kernels' for
    their lists of pages, None for lists of tokens. `whole`: of rows of decode that see all, the part's handle and how
    many keys its heads read together. `vectors`: of the flat q."""

    plan: Any
    all_seen: torch.Tensor
    choosing: tuple[_Choosing, ...]
    chosen: torch.Tensor
    room: Any
    whole: tuple[tuple[int, int], ...]
    vectors: int


class IndexAttention:
    """For one worker and its thread. `tallies` count what decode reads, by part."""

    def __init__(self, pages: Pages, kernels: Kernels, store: KVStore, index: Index, group: int, threads: int) -> None:
        layout = pages.layout
        self.tallies = Tallies((layout.d_k + layout.own_v) * layout.dtype.itemsize)
        self._pages, self._kernels, self._store = pages, kernels, store
        self._index, self._group, self._threads = index, group, threads
        self._unchosen_end = index.top * index.block  # tokens below this position see no more than they may read
        self._paged = index.block % layout.page_size == 0

    def reading(self, rows: Sequence[Row]) -> IndexReading:
        """How rows that read are attended. Raises ValueError for rows that do not read all keys up to their end."""
        builder, planned, first = RowBuilder(self._pages.layout.page_size), 0, 0
        visible_vectors, chosen, choosing, unchosen = [_NONE], [_NONE], [], []
        for row in rows:
            part = self._store.part(row.handle)
            end = row.start + row.count
            if part.lo or row.read != (0, end):
                raise ValueError(f"a layer with an index reads [0, {end}) of part {row.handle}, not {row.read}")
            vectors = len(part.heads) * self._group
            count = max(0, min(row.count, self._unchosen_end - row.start))
            if count:
                row_queries = RowQueries(planned, row.start, count, self._group, 0, row.start + count, 0, part.table)
                builder.add(row_queries, [Full()] * len(part.heads))
                planned += count * vectors
                visible_vectors.append(np.arange(first, first + count * vectors))
            if count < row.count:
                first_chosen = first + count * vectors
                choosing.append(
                    _Choosing(row.handle, part, row.start + count, row.count - count, first_chosen, row.chooses)
                )
                chosen.append(np.arange(first_chosen, first + row.count * vectors))
            elif row.chooses:
                unchosen.append((row.handle, end * len(part.heads)))
            first += row.count * vectors
        items = sum(block.tokens * len(block.part.heads) for block in choosing)
        room = None
        if items and self._paged:
            room = self._kernels.plan_lists(self._pages, items, self._group, self._threads)
        plan = self._kernels.plan(self._pages, builder.rows(), self._threads) if planned else None
        all_seen, of_chosen = (torch.from_numpy(np.concatenate(x)) for x in (visible_vectors, chosen))
        return IndexReading(plan, all_seen, tuple(choosing), of_chosen, room, tuple(unchosen), first)

    def attend(self, reading: IndexReading, spec: LayerSpec, q: torch.Tensor) -> Partial:
        """q `[n, query_width]` of a layer, flat in row order. Raises ValueError for another shape."""
        if q.shape != (expected := (reading.vectors, spec.query_width)):
            raise ValueError(f"q must be {list(expected)}, got {list(q.shape)}")
        for handle, keys in reading.whole:
            self.tallies.add(handle, keys * self.tallies.token_bytes, keys)
        queries = q[:, : spec.d_k].contiguous()
        if not reading.choosing:
            return self._kernels.attend(self._pages, reading.plan, spec.kv_layer, queries, spec.scale, spec.soft_cap)
        lists, lengths = self._choose(reading.choosing, spec, q)
        vectors = queries[reading.chosen]
        if reading.room is not None:
            partial = self._kernels.attend_lists(
                self._pages, reading.room, lists, lengths, vectors, spec.scale, spec.soft_cap
            )
        else:
            plan = self._kernels.plan(self._pages, self._token_rows(lists, lengths), self._threads)
            partial = self._kernels.attend(self._pages, plan, 0, vectors, spec.scale, spec.soft_cap)
        if reading.plan is None:
            return partial
        merged = empty(len(q), spec.d_v, q.dtype)
        merged.out[reading.chosen], merged.lse[reading.chosen] = partial
        partial = self._kernels.attend(
            self._pages, reading.plan, spec.kv_layer, queries[reading.all_seen], spec.scale, spec.soft_cap
        )
        merged.out[reading.all_seen], merged.lse[reading.all_seen] = partial
        return merged

    def _choose(self, choosing: Sequence[_Choosing], spec: LayerSpec, q: torch.Tensor) -> tuple[Table, Ints]:
        """For each token, then KV head: the pages to read, or where the block is no multiple of a page the slots, int32
        `[items, most]`; and how many tokens, int64 `[items]`."""
        lists: list[Table] = [_NO_LIST] * len(choosing)
        lengths = [_NONE] * len(choosing)
        alone: dict[int, list[int]] = {}  # single tokens, by the KV heads of their parts: they choose together
        for number, block in enumerate(choosing):
            if block.tokens == 1:
                alone.setdefault(len(block.part.heads), []).append(number)
            else:
                tables = [self._lists([part], spec, q) for part in self._pieces(block)]
                lists[number] = np.concatenate([x for x, _ in tables])
                lengths[number] = np.concatenate([n for _, n in tables])
        for heads, numbers in alone.items():
            entries, counts = self._lists([choosing[number] for number in numbers], spec, q)
            for index, number in enumerate(numbers):
                rows = slice(index * heads, (index + 1) * heads)
                lists[number], lengths[number] = entries[rows], counts[rows]
        for block, count in zip(choosing, lengths, strict=True):
            if block.decode:
                self._count(block, int(count.sum()))
        return np.concatenate(lists), np.concatenate(lengths)

    def _pieces(self, each: _Choosing) -> Iterator[_Choosing]:
        """So few tokens each that their scores need little memory."""
        step = max(1, AT_ONCE // ((each.start + each.tokens) * len(each.part.heads)))
        size = len(each.part.heads) * self._group
        for first in range(0, each.tokens, step):
            tokens = min(step, each.tokens - first)
            yield each._replace(start=each.start + first, tokens=tokens, first=each.first + first * size)

    def _lists(self, choosing: Sequence[_Choosing], spec: LayerSpec, q: torch.Tensor) -> tuple[Table, Ints]:
        """As `_choose`, of several single tokens, or of tokens of one part; all with as many KV heads."""
        index, size = self._index, self._pages.layout.page_size
        heads = len(choosing[0].part.heads)
        rows_of_token = heads * self._group
        mine = [q[c.first : c.first + c.tokens * rows_of_token, spec.d_k :] for c in choosing]
        numbers = torch.cat(mine).float().reshape(-1, heads, (spec.query_width - spec.d_k) * self._group)
        numbers = numbers[..., : index.numbers]
        queries = numbers[..., : index.heads * index.width].unflatten(-1, (index.heads, index.width))
        weights = numbers[..., index.heads * index.width :] if index.weighted else None
        position = np.concatenate([np.arange(c.start, c.start + c.tokens) for c in choosing])
        tables = [c.part.table[spec.kv_layer] for c in choosing]
        # The index key of a token is the same at every head.
        searched = Queries([table[0] for table in tables], position, queries, weights)
        blocks = chosen_blocks(self._pages, searched, index.block, index.top, index.local, self._threads).numpy()
        # Only the block of the token itself can be read in part; it stands last.
        inside = position[:, None] % index.block
        own_block = blocks[..., -1] == position[:, None] // index.block
        lengths = (self._unchosen_end - own_block * (index.block - 1 - inside)).reshape(-1)
        width = index.block // size if self._paged else index.block  # entries of a block
        entries = (blocks[..., None] * width + np.arange(width)).reshape(len(position), heads, -1)
        slots = entries if self._paged else np.minimum(entries, position[:, None, None]) // size
        if len(tables) == 1:
            pages = _taken(tables[0], slots)
        else:
            pages = np.stack([_taken(table, of_token) for table, of_token in zip(tables, slots, strict=True)])
        if not self._paged:
            pages = pages * size + entries % size
        return np.ascontiguousarray(pages.reshape(len(lengths), -1), np.int32), lengths

    def _token_rows(self, lists: Table, lengths: Ints) -> Rows:
        """A row for each list of slots."""
        n = len(lists)
        ones, nothing = np.ones(n, np.int64), np.zeros(n, np.int64)
        return Rows(
            first=np.arange(n) * self._group,
            count=ones,
            start=lengths,
            kv_heads=ones,
            group=ones * self._group,
            lo=nothing,
            hi=lengths,
            base=nothing,
            tables=[slots[None, None, :length] for slots, length in zip(lists, lengths, strict=True)],
            listed=ones,
        )

    def _count(self, each: _Choosing, read: int) -> None:
        """A query of decode has read so many of its heads' keys together, and chosen them by index keys."""
        layout, keys = self._pages.layout, each.start + each.tokens
        to_choose = keys * layout.d_index * layout.dtype.itemsize
        self.tallies.add(each.handle, read * self.tallies.token_bytes + to_choose, keys * len(each.part.heads))


def _taken(table: Table, slots: Ints) -> Table:
    """The pages in these slots, `[..., heads, n]`, of a table `[heads, slots]`; of slots behind it, which are not read,
    the last one."""
    taken_pages: Table = table[np.arange(len(table))[:, None], np.minimum(slots, table.shape[1] - 1)]
    return taken_pages


_NONE, _NO_LIST = np.empty(0, np.int64), np.empty((0, 0), np.int32)
