"""The pools of a worker in the test's process."""

from __future__ import annotations

from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.attention_worker.kv_pool import KVPool


def pool_of(worker: AttentionWorker, number: int = 0) -> KVPool:
    """A pool of attention layers."""
    pool = worker.pools[number]
    assert isinstance(pool, KVPool)
    return pool
