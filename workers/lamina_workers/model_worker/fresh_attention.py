"""Attention of a batch's own tokens, computed where the model is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from lamina_kernels.paged.pages import Pages
from lamina_kernels.partial import Partial, empty
from lamina_protocols.messages.layers import HolderConfig
from lamina_protocols.messages.routes import Span
from lamina_workers.attention_worker.page_layout import attention_kernels, page_layout
from lamina_workers.attention_worker.row_builder import Asked, RowBuilder
from lamina_workers.devices.staging import DIRECT
from lamina_workers.kv_pages.head_policies import HeadPolicies, read_alike
from lamina_workers.model_worker.holder_traffic import index_of, vectors_of

_FEW_VECTORS = 4096  # query vectors of a batch's own tokens that one thread attends


class FreshAttention:
    """Attention of a batch's own tokens in the layers of one pool, of which `config` is; causal inside each span, over
    pages that live for one layer. Layers are numbered within the pool.

    The pages have the holders' layout, so k and v are rounded to the cache's dtype here as they are there. Spans that
    a fused holder attends are left out.
    """

    def __init__(self, config: HolderConfig, threads: int, device: torch.device) -> None:
        self._layers = config.layers
        self._threads = threads
        self._device = device
        self._kernels = attention_kernels(device)
        self._pages = Pages.allocate(page_layout(config, device), 1, device)
        self._slots: Any = None
        self._plans: list[Any] = []  # empty where no span was chosen
        self._plan_of: tuple[int, ...] = ()  # by layer, the number of its plan
        self._policies_of = lru_cache(maxsize=64)(partial(HeadPolicies.of, config))  # hashing a config takes long
        self._queries: torch.Tensor | None = None  # which vectors of the flat q they are, None: all
        self._fresh: torch.Tensor | None = None  # and of the flat k and v
        self._tokens = 0

    def begin(self, spans: Sequence[Span], chosen: Sequence[int]) -> None:
        """Lay out the pages of the chosen spans of a batch and plan their attention, once for all layers."""
        self._plans = []
        if not chosen:
            return
        spec, size = self._layers[0], self._pages.layout.page_size
        first = np.cumsum([0, *(span.count for span in spans)])
        self._tokens = int(first[-1])
        policies = [self._policies_of(spans[at].policy) for at in chosen]
        blocks = any(policy.unit > 1 for of_span in policies for policy in of_span.distinct)
        tables, slots, vectors, fresh, used = [], [], [], [], 0
        every_head, every_kv_head = np.arange(spec.heads), np.arange(spec.kv_heads)
        for at in chosen:
            count, source = spans[at].count, int(first[at])
            inside = spans[at].start % size if blocks else 0  # so that blocks are whole pages
            pages = -(-(inside + count) // size)
            table = np.arange(used, used + spec.kv_heads * pages, dtype=np.int32).reshape(1, spec.kv_heads, pages)
            page, offset = np.divmod(np.arange(inside, inside + count), size)
            slots.append((table[0, :, page].astype(np.int64) * size + offset[:, None]).reshape(-1))
            tables.append(table)
            vectors.append(vectors_of(source, source + count, every_head, spec.heads))
            fresh.append(vectors_of(source, source + count, every_kv_head, spec.kv_heads))
            used += table.size
        if used > self._pages.n_pages:
            self._pages = Pages.allocate(self._pages.layout, used, self._device)
        self._queries = self._placed(index_of(vectors, self._tokens * spec.heads))
        self._fresh = self._placed(index_of(fresh, self._tokens * spec.kv_heads))
        self._slots = self._kernels.plan_append(self._pages, torch.from_numpy(np.concatenate(slots)[None]))
        # The holders are attending the past meanwhile, perhaps on these cores: a few tokens are not worth a team.
        threads = self._threads if sum(spans[at].count for at in chosen) * spec.heads > _FEW_VECTORS else 1
        self._plan_of = read_alike(tuple(dict.fromkeys(policies)))
        for layer in (self._plan_of.index(number) for number in range(1 + max(self._plan_of))):
            rows, asked = RowBuilder(size), 0
            for at, table, of_span in zip(chosen, tables, policies, strict=True):
                start, count = spans[at].start, spans[at].count
                base = start - start % size if blocks else start
                rows.add(
                    Asked(asked, start, count, spec.group, start, start + count, base, table), of_span.reads[layer]
                )
                asked += count * spec.heads
            self._plans.append(self._kernels.plan(self._pages, rows.rows(), threads))

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Partial | None:
        """q `[T, heads, d_k]`, k `[T, kv_heads, d_k]`, v `[T, kv_heads, d_v]` of one layer, all spans. Vectors of
        spans that were not chosen come back empty; None where no span was chosen."""
        if not self._plans:
            return None
        k, v = DIRECT.down(k, self._fresh), DIRECT.down(v, self._fresh)
        self._kernels.append(self._pages, self._slots, 0, k, v)
        spec, plan = self._layers[layer], self._plans[self._plan_of[layer]]
        out, lse = self._kernels.attend(self._pages, plan, 0, DIRECT.down(q, self._queries), spec.scale, spec.soft_cap)
        if self._queries is None:
            return Partial(out, lse)
        whole = empty(self._tokens * spec.heads, spec.d_v, out.dtype, out.device)
        self._kernels.merge_into(whole, Partial(out, lse), self._queries)
        return whole

    def _placed(self, index: torch.Tensor | None) -> torch.Tensor | None:
        return None if index is None else index.to(self._device)
