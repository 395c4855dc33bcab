"""Inverted lists over keys (FAISS IVF): cheap to build, and independent of queries."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from lamina_workers.indexes import faiss_host
from lamina_workers.indexes.key_index import Floats, Found, ascending, check_keys, check_queries


class IvfSegment:
    """Inverted lists over the keys at [lo, hi). See `key_index.Segment`; `effort` is how many lists are read."""

    def __init__(self, index: Any, lo: int, lists: int, effort: int, build_seconds: float) -> None:
        self._index, self._lists, self._effort = index, lists, effort
        self._n, self._d = int(index.ntotal), int(index.d)
        self.lo, self.hi = lo, lo + self._n
        self.build_seconds = build_seconds
        of_key = faiss_host.code_bytes(self._d) + 8  # a list holds a key's number beside its code
        self.nbytes = self._n * of_key + lists * self._d * 4

    def search(self, q: Floats, k: int, effort: int | None = None) -> Found:
        q = check_queries(q, self._d, k)
        k = min(k, self._n)
        lists = min(self._lists, effort or self._effort)
        before = faiss_host.lists_distances()
        indices, scores = faiss_host.search(self._index, q, k, faiss_host.lists_effort(lists))
        if (indices < 0).any():  # the lists that were read hold fewer than k keys
            indices, scores = faiss_host.search(self._index, q, k, faiss_host.lists_effort(self._lists))
        centroids = len(q) * self._lists
        return ascending(indices + self.lo, scores, faiss_host.lists_distances() - before + centroids)


def build_ivf(keys: Floats, lo: int = 0, effort: int = 32) -> IvfSegment:
    """Inverted lists over the keys at positions lo, lo + 1, ...: float32 `[n, d]`.

    There are 4 sqrt(n) lists, FAISS's advice for so many keys. Raises as `build_graph` does.
    """
    start_time = time.perf_counter()
    check_keys(keys, lo)
    if effort < 1:
        raise ValueError(f"effort is {effort}; allowed is 1 or more")
    lists = min(len(keys), max(1, round(4 * len(keys) ** 0.5)))
    index = faiss_host.inverted_lists(np.ascontiguousarray(keys), lists)
    return IvfSegment(index, lo, lists, effort, time.perf_counter() - start_time)
