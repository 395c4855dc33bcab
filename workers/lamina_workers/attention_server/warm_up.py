"""The first token that an attention worker attends, before any engine waits for it.

Kernels, threads and allocators of a process are made with their first use, which takes up to some ten milliseconds: a
worker that joins would cost the sequences that go on there a pause.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache

import torch

from lamina_protocols.frames.fields import DTYPES
from lamina_protocols.messages.layers import ATTENTION, HolderConfig
from lamina_protocols.messages.messages import Announcement, Exchange, Fault, Open, Row
from lamina_protocols.messages.pools import pools
from lamina_workers.attention_worker.device_worker import attention_worker
from lamina_workers.ports.port import LocalAttention

logger = logging.getLogger("lamina")

_MEMORY = 64 << 20  # bytes of KV of the worker that is used for it, at most


@lru_cache(maxsize=8)  # engines ask for any configs
def warm_up(config: HolderConfig, compute_dtype: str, threads: int, device: torch.device) -> None:
    """Have a worker of a few pages attend two tokens in all pools of plain attention, once for each kind of worker.
    Raises as `AttentionWorker` does."""
    config = replace(config, kv_memory=min(config.kv_memory, _MEMORY), cold=None)
    kept = pools(config)
    plain = [n for n, pool in enumerate(kept) if all(s.kind == ATTENTION and not s.index for s in pool.config.layers)]
    heads = [tuple(range(pool.config.layers[0].kv_heads)) for pool in kept]
    port = LocalAttention(attention_worker(config, threads, device))
    for batch in (1, 2):
        opens = tuple(Open(n, n, heads[n], 0, config.page_size) for n in plain) if batch == 1 else ()
        rows = tuple(Row(n, batch - 1, 1, (0, batch), True, True) for n in plain)
        port.send(Announcement(1, batch, 0 if batch == 1 else len(plain), opens, rows))
        failed = isinstance(port.receive(), Fault)
        for layer in sorted(layer for n in plain for layer in kept[n].layers):
            spec, dtype = config.layers[layer], DTYPES[compute_dtype]
            sizes = (spec.heads, spec.query_width), (spec.kv_heads, spec.key_width), (spec.kv_heads, spec.own_v)
            q, k, v = (torch.zeros(size, dtype=dtype, device=device) for size in sizes)
            port.send(Exchange(1, batch, layer, q, k, v))
            failed |= isinstance(port.receive(), Fault)
        for n in plain:
            port.layer_work(batch, n)
        if failed:
            logger.debug("a worker of %d layers could not be warmed up", len(config.layers))
            return
