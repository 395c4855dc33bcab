"""A batch that an attention worker has accepted, and what the worker counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lamina_protocols.messages.messages import Row
from lamina_workers.attention_worker.decode_rows import DecodeRows
from lamina_workers.attention_worker.paged_reader import Readings
from lamina_workers.attention_worker.prompt_queries import BatchSamples
from lamina_workers.kv_pages.parts import Int32


@dataclass(slots=True)
class Counters:
    """What a worker has done since it was made: batches accepted, query vectors attended, K vectors stored."""

    batches: int = 0
    queries: int = 0
    vectors_stored: int = 0


@dataclass(slots=True)
class Batch:
    """An accepted batch. `numbers`: of each pool, which of the rows are its own, and `pools` what it keeps of them."""

    rows: tuple[Row, ...]
    handles: frozenset[int]
    numbers: tuple[tuple[int, ...], ...]
    pools: tuple[Any, ...]
    heads: int  # tokens of its rows times the heads of their parts

    def dealt(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Of each pool its own, of rows in the place of the batch's."""
        return [[rows[number] for number in of_pool] for of_pool in self.numbers]

    def by_row(self, of_pools: Iterable[Sequence[int]]) -> tuple[int, ...]:
        """What each pool says of its rows, in the order of all rows."""
        values = {
            n: x
            for numbers, of_pool in zip(self.numbers, of_pools, strict=True)
            for n, x in zip(numbers, of_pool, strict=True)
        }
        return tuple(values[number] for number in range(len(values)))


@dataclass(slots=True)
class KVBatch:
    """Of a batch, the rows of one pool of attention layers: where their tokens go and what their queries read, the same
    for every layer."""

    rows: Sequence[Row]
    fused: bool  # whether a row attends its own tokens
    stores: tuple[Row, ...]  # the rows that store something
    missing: set[int]  # layers whose KV has not come yet
    places: Any  # the kernels' plan of where K and V go, None until there are some
    sealed: torch.Tensor | None  # int64 [layers, pages] that are full once stored, where sketches are made of them
    readings: Readings  # what is read; none where no row reads
    delay: float  # seconds to add to each layer's attention
    samples: BatchSamples | None = None  # of prompts' queries, where some are kept
    written: Int32 | None = None  # pages that it may write, where some can leave memory
    counts: tuple[tuple[int, float, float], ...] = ()  # of a series: what rows read, as `PagedReader.end` takes it
    series: DecodeRows | None = None  # the batches that lead to this one, where each was planned from the one before
