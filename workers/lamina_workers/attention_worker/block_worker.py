"""An attention worker for engines that own their blocks, as vLLM does: forks, prefixes and preemption are the engine's.

The worker keeps an arena of blocks, and computes by the engine's block tables. Each step is announced as a whole; a row
that goes on from the last step, with more tokens of the same blocks, keeps its part, so what is planned for it goes on
too. Sketches belong to pages, whoever reads them, so policies that choose pages work behind any engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lamina_kernels.paged.pages import PageLayout, Pages
from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.layers import BlockConfig
from lamina_protocols.messages.messages import (
    Announced,
    Announcement,
    BlockTables,
    Exchange,
    Fresh,
    Open,
    Query,
    Reply,
    Request,
    Row,
)
from lamina_protocols.messages.pools import Pool, pool_shape
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.batch import Counters
from lamina_workers.attention_worker.kv_pool import KVPool
from lamina_workers.attention_worker.page_layout import CPU, block_bytes, pages_of_block
from lamina_workers.attention_worker.pool import LayerPool
from lamina_workers.errors import KVError, PoolExhausted, UnsupportedModelError
from lamina_workers.kv_pages.block_store import BlockStore
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.kv_pages.parts import Int32
from lamina_workers.policies.catalogue import parse

Arenas = dict[Hashable, Pages]  # by shape of layers
_MOST_PAGES = 1 << 31


class BlockPool(KVPool):
    """The layers of one block table that have the same shape. `pages`: of that shape's arena, which `arenas` has where
    another pool has made it."""

    config: BlockConfig
    store: BlockStore

    def __init__(
        self,
        number: int,
        pool: Pool,
        threads: int,
        device: torch.device,
        counters: Counters,
        pages: int,
        arenas: Arenas,
    ) -> None:
        self._arenas, self._n_pages = arenas, pages
        super().__init__(number, pool, threads, device, counters)
        self.table = self.config.tables[0]

    def _policies(self) -> HeadPolicies:
        policies = HeadPolicies.of(self.config)
        full = (parse("full"),) * self.config.layers[0].kv_heads
        return dataclasses.replace(policies, keepers=(full,) * len(policies.keepers))

    def _page_count(self) -> int:
        return self._n_pages

    def _new_store(self, policies: HeadPolicies) -> BlockStore:
        return BlockStore(self.config, policies, self.n_pages)

    def _arena(self, layout: PageLayout) -> Pages:
        shape = pool_shape(self.config.layers[0])
        if shape not in self._arenas:
            self._arenas[shape] = super()._arena(layout)
        return self._arenas[shape]

    def open(self, handle: int, blocks: int) -> None:
        """A row is new. Raises PoolExhausted."""
        self.store.open(handle, blocks)
        self.reader.opened(Open(handle, self._number, (), 0, 1))

    def close(self, handle: int) -> None:
        """A row is over."""
        self.store.close(handle)
        self.reader.forget(handle)


@dataclass(slots=True)
class _Sequence:
    """A row of the last step: the number from which its handles follow, and its blocks."""

    number: int
    blocks: Int32


@dataclass(frozen=True, slots=True)
class _Step:
    """One step's rows, checked: the positions [start, end) of the queries of each, and its blocks. The last block of a
    row is written in this step, so it is no other row's."""

    starts: list[int]
    ends: list[int]
    blocks: list[Int32]


class BlockWorker(AttentionWorker):
    """Holds blocks, and attends them by block tables. It takes `BlockTables`, then the layers' `Exchange`s, or `Fresh`
    and `Query`.

    Raises as `AttentionWorker` does, KVError also where its memory has no room for all blocks.
    """

    config: BlockConfig

    def __init__(self, config: BlockConfig, threads: int = 1, device: torch.device = CPU) -> None:
        if config.cold is not None:
            raise UnsupportedModelError(
                "pages on a disk (--kv-cold), of an engine that owns its blocks; allowed: blocks in memory"
            )
        size = block_bytes(config, device)
        if config.blocks * size > config.kv_memory:
            raise KVError(
                f"{config.blocks} blocks of {size} bytes in {config.kv_memory} bytes of KV memory; allowed: up to "
                f"{config.kv_memory // size}"
            )
        self._arena_pages = {shape: pages * config.blocks for shape, pages in pages_of_block(config).items()}
        if max(self._arena_pages.values()) >= _MOST_PAGES:
            raise KVError(f"{max(self._arena_pages.values())} pages of one shape, allowed: below {_MOST_PAGES}")
        self._arenas: Arenas = {}
        super().__init__(config, threads, device)
        self._sequences: dict[int, dict[int, _Sequence]] = {}  # by table, then last block
        self._next_number = 0

    def _pool(self, number: int, pool: Pool, threads: int) -> LayerPool[Any]:
        pages = self._arena_pages[pool_shape(pool.config.layers[0])]
        return BlockPool(number, pool, threads, self.device, self.counters, pages, self._arenas)

    def handle(self, request: Request) -> Reply | None:
        if isinstance(request, BlockTables):
            self.settle()
            return self._announce_tables(request)
        if not isinstance(request, Query | Fresh | Exchange):
            raise ProtocolError(
                f"{type(request).__name__} from an engine that owns its blocks; allowed: BlockTables, Query, Fresh, "
                "Exchange"
            )
        return super().handle(request)

    def _announce_tables(self, message: BlockTables) -> Announced:
        if (message.epoch, message.batch) <= (self._epoch, self._last_batch):
            raise ProtocolError(
                f"announcement {(message.epoch, message.batch)} is not newer than {(self._epoch, self._last_batch)}"
            )
        table_pools = [pool for pool in self.pools if isinstance(pool, BlockPool) and pool.table == message.table]
        if not table_pools:
            raise ProtocolError(f"block table {message.table}, there are {1 + max(self.config.tables)}")
        step = self._checked(message)
        try:
            numbers = self._go_on(message.table, table_pools, step)
        except PoolExhausted as error:
            return Announced(message.epoch, message.batch, False, self.free_pages, (), str(error))
        rows = tuple(
            Row(self._part(number, pool), start, end - start, (0, end), True, end - start == 1)
            for pool in table_pools
            for number, start, end in zip(numbers, step.starts, step.ends, strict=True)
        )
        return self._announce(Announcement(message.epoch, message.batch, self._next_operation, (), rows))

    def _part(self, number: int, pool: BlockPool) -> int:
        return number * len(self.pools) + self.pools.index(pool)

    def _checked(self, message: BlockTables) -> _Step:
        """Raises ProtocolError, which names what is wrong and what is allowed."""
        starts = _int32("query_start_loc", message.query_start_loc, 1).astype(np.int64)
        lengths = _int32("seq_lens", message.seq_lens, 1).astype(np.int64)
        table = _int32("block_table", message.block_table, 2)
        rows, size, blocks = len(lengths), self.config.page_size, self.config.blocks
        if not rows or len(starts) != rows + 1 or len(table) != rows:
            raise ProtocolError(
                f"query_start_loc of {len(starts)}, seq_lens of {rows} and block_table of {len(table)}; allowed: of "
                "one row more, and of as many, at least one"
            )
        counts = np.diff(starts)
        if starts[0] != 0 or counts.min() < 1:
            raise ProtocolError(f"query_start_loc is {starts[:8]}...; allowed: from 0 on, each larger than the last")
        if (lengths < counts).any():
            row = int(np.flatnonzero(lengths < counts)[0])
            raise ProtocolError(f"row {row} has {counts[row]} queries, and a sequence of {lengths[row]} tokens")
        used = -(-lengths // size)
        room = min(table.shape[1], blocks)
        if used.max() > room:
            row = int(used.argmax())
            raise ProtocolError(
                f"row {row} of {lengths[row]} tokens needs {used[row]} blocks of {size}; its table has "
                f"{table.shape[1]}, the worker {blocks}"
            )
        first = (lengths - counts) // size  # entry that is written
        if (writes := int((used - first).sum())) > blocks:
            raise ProtocolError(f"{writes} blocks are to be written in one step; allowed: each of the {blocks} once")
        table = table[:, : used.max()]  # it may be as wide as the longest sequence could be
        columns = np.arange(table.shape[1], dtype=np.int32)
        in_use = columns < used[:, None]
        named = table[in_use]
        if named.min() < 0 or named.max() >= blocks:
            worst = named.min() if named.min() < 0 else named.max()
            raise ProtocolError(f"block_table names block {worst}, allowed: 0 to {blocks - 1}")
        written_blocks = table[in_use & (columns >= first[:, None])]
        if len(np.unique(written_blocks)) < len(written_blocks):
            values, times = np.unique(written_blocks, return_counts=True)
            raise ProtocolError(
                f"block {values[times > 1][0]} is to be written {times.max()} times in one step; allowed: once"
            )
        return _Step(
            (lengths - counts).tolist(),
            lengths.tolist(),
            [row[:count].copy() for row, count in zip(table, used.tolist(), strict=True)],
        )

    def _go_on(self, table: int, table_pools: Sequence[BlockPool], step: _Step) -> list[int]:
        """Let the rows of the last step go on, close the others, and open new ones: the number of each row's part.
        Raises PoolExhausted; then there are no parts."""
        past, present = self._sequences.pop(table, {}), dict[int, _Sequence]()
        rows = []
        for start, blocks in zip(step.starts, step.blocks, strict=True):
            sequence, common = _continued(past, blocks, max(0, start - 1) // self.config.page_size)
            if sequence is None:
                sequence = _Sequence(self._next_number, blocks)
                self._next_number += 1
            sequence.blocks = blocks
            present[int(blocks[-1])] = sequence
            rows.append((sequence.number, common))
        self._close(table_pools, past)
        try:
            for (number, common), blocks in zip(rows, step.blocks, strict=True):
                for pool in table_pools:
                    handle = self._part(number, pool)
                    if not pool.has(handle):
                        pool.open(handle, len(blocks))
                    pool.store.go_to(handle, common, blocks[common:])
        except PoolExhausted:
            self._close(table_pools, present)
            raise
        self._sequences[table] = present
        return [number for number, _ in rows]

    def _close(self, table_pools: Sequence[BlockPool], sequences: Mapping[int, _Sequence]) -> None:
        """End rows, and the batches in flight that have them."""
        handles = {self._part(sequence.number, pool): pool for sequence in sequences.values() for pool in table_pools}
        for number, batch in list(self._batches.items()):
            if not batch.handles.isdisjoint(handles):
                self._drop(number)
        for handle, pool in handles.items():
            if pool.has(handle):
                pool.close(handle)


def _continued(past: dict[int, _Sequence], blocks: Int32, first: int) -> tuple[_Sequence | None, int]:
    """A row of the last step that goes on with these blocks, which is taken out of `past`, and how many entries of it
    stay; None where there is none. Its last block is one from entry `first` on, which has the last token before this
    step, unless tokens were given up."""
    for block in blocks[first:].tolist():
        sequence = past.get(block)
        if sequence is not None:
            common = min(len(sequence.blocks), len(blocks))
            if np.array_equal(sequence.blocks[:common], blocks[:common]):
                return past.pop(block), common
    return None, 0


def _int32(name: str, x: torch.Tensor, dimensions: int) -> Int32:
    if x.dtype != torch.int32 or x.ndim != dimensions:
        raise ProtocolError(f"{name} is {x.dtype} {list(x.shape)}, allowed: int32 of {dimensions} dimensions")
    numbers: Int32 = x.numpy()
    return numbers
