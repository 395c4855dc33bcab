"""A batch that an attention worker has accepted, and what the worker counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lamina_protocols.messages import Row
from lamina_workers.attention_worker.decode_rows import DecodeRows
from lamina_workers.attention_worker.head_policies import LayerPolicies
from lamina_workers.attention_worker.reading import Reading


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
    readings: dict[LayerPolicies, Reading]  # what is read, by the policies of a layer's heads; empty where no row reads
    delay: float  # seconds to add to each layer's attention
    series: DecodeRows | None = None  # the batches that lead to this one, where each was planned from the one before
