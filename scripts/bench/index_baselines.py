"""What indexes are compared with: a scan of all keys, FAISS's own HNSW, and its inverted lists.

The scan reads all keys in 8 bits, once for the whole query group, and then the best again exactly. It has numba and
numpy only, and nothing is built but the codes.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from lamina_workers.indexes import faiss_host
from lamina_workers.indexes.key_index import Floats, Found, ascending, check_keys, check_queries

_BLOCK = 128  # keys that are scored together: enough that the compiler makes vectors, few enough for the cache
_WORST = np.float32(-3e38)  # a score below all; finite, as fastmath excludes infinities
_PART = 32  # keys of which the best score is kept, to find the others that are as good
Codes = npt.NDArray[np.int8]


@njit(cache=True, nogil=True, fastmath=True)  # type: ignore[untyped-decorator, unused-ignore]
def _scan(codes: Codes, q: Floats, scores: Floats, best: Floats, n: int) -> None:
    """scores: float32 `[group, padded]`, of all keys. best: float32 `[group, padded / 32]`, each part's largest."""
    blocks, d, _ = codes.shape
    group = q.shape[0]
    for block in range(blocks):
        for g in range(group):
            total = scores[g, block * _BLOCK : (block + 1) * _BLOCK]
            total[:] = 0
            for c in range(d):
                weight = q[g, c]
                for j in range(_BLOCK):
                    total[j] += weight * np.float32(codes[block, c, j])
            total[max(0, n - block * _BLOCK) :] = _WORST
            for part in range(_BLOCK // _PART):
                largest = total[part * _PART]
                for j in range(1, _PART):
                    largest = max(largest, total[part * _PART + j])
                best[g, block * (_BLOCK // _PART) + part] = largest


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def _above(scores: Floats, best: Floats, limit: float, n: int) -> npt.NDArray[np.int64]:
    """The keys whose score is `limit` or more, int64, ascending."""
    found = np.empty(n, np.int64)
    count = 0
    for part in range(best.shape[0]):
        if best[part] >= limit:
            for key in range(part * _PART, min((part + 1) * _PART, n)):
                if scores[key] >= limit:
                    found[count] = key
                    count += 1
    return found[:count].copy()


class ScanSegment:
    """The keys at [lo, hi) in int8, one scale a channel, and a reference to the exact ones, for the last choice.

    See `key_index.Segment`; `effort` is how many keys at least are scored exactly.
    """

    def __init__(self, keys: Floats, lo: int = 0) -> None:
        """keys: float32 `[n, d]`, of positions lo, lo + 1, ...; they are not copied and must not change."""
        begun = time.perf_counter()
        check_keys(keys, lo)
        n, d = keys.shape
        self._keys = keys
        self._scale = np.maximum(np.abs(keys).max(axis=0) / np.float32(127), np.float32(1e-30))
        padded = np.zeros((-(-n // _BLOCK) * _BLOCK, d), np.int8)
        padded[:n] = np.rint(keys / self._scale)
        self._codes = np.ascontiguousarray(padded.reshape(-1, _BLOCK, d).transpose(0, 2, 1))
        self.lo, self.hi = lo, lo + n
        self.nbytes = self._codes.nbytes + keys.nbytes
        self.build_seconds = time.perf_counter() - begun

    def search(self, q: Floats, k: int, effort: int | None = None) -> Found:
        n, d = self._keys.shape
        q = check_queries(q, d, k)
        k = min(k, n)
        padded = len(self._codes) * _BLOCK
        parts = padded // _PART
        scores, best = np.empty((len(q), padded), np.float32), np.empty((len(q), parts), np.float32)
        _scan(self._codes, q * self._scale, scores, best, n)
        positions, exact = np.empty((len(q), k), np.int64), np.empty((len(q), k), np.float32)
        computed = n * len(q)
        wanted = min(n, max(k + k // 2, effort or 0))
        for g in range(len(q)):
            # As many parts as wanted keys have a key this good, so at least that many keys are above the limit.
            limit = -np.inf if wanted >= parts else np.partition(best[g], parts - wanted)[parts - wanted]
            chosen = _above(scores[g], best[g], limit, n)
            products = self._keys[chosen] @ q[g]
            order = np.argpartition(-products, k - 1)[:k]
            positions[g], exact[g] = chosen[order] + self.lo, products[order]
            computed += len(chosen)
        return ascending(positions, exact, computed)


def plain_graph(keys: Floats, links: int) -> Any:
    """FAISS's own HNSW over the keys in bfloat16, built without queries."""
    faiss = faiss_host.module()
    index = faiss.IndexHNSWSQ(keys.shape[1], faiss.ScalarQuantizer.QT_bf16, links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 4 * links
    index.add(keys)
    return index


@cache
def _lists_effort(effort: int) -> Any:
    """The search parameters with which `effort` inverted lists are read."""
    return faiss_host.module().SearchParametersIVF(nprobe=effort)


class IvfSegment:
    """Inverted lists (FAISS IVF) over the keys at [lo, hi). `effort` is how many of them are read."""

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
        statistics = faiss_host.module().cvar.indexIVF_stats
        before = int(statistics.ndis)
        indices, scores = faiss_host.search(self._index, q, k, _lists_effort(lists))
        if (indices < 0).any():  # the lists that were read hold fewer than k keys
            indices, scores = faiss_host.search(self._index, q, k, _lists_effort(self._lists))
        centroids = len(q) * self._lists
        return ascending(indices + self.lo, scores, int(statistics.ndis) - before + centroids)


def build_ivf(keys: Floats, lo: int = 0, effort: int = 32) -> IvfSegment:
    """Inverted lists over the keys at positions lo, lo + 1, ...: float32 `[n, d]`.

    There are 4 sqrt(n) lists, FAISS's advice for so many keys. Raises as `build_graph` does.
    """
    start_time = time.perf_counter()
    check_keys(keys, lo)
    if effort < 1:
        raise ValueError(f"effort is {effort}; allowed is 1 or more")
    lists = min(len(keys), max(1, round(4 * len(keys) ** 0.5)))
    faiss, d = faiss_host.module(), keys.shape[1]
    index = faiss.index_factory(d, f"IVF{lists},SQbf16", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # short segments are allowed; the warning would go to stderr
    index.train(np.ascontiguousarray(keys))
    index.add(np.ascontiguousarray(keys))
    return IvfSegment(index, lo, lists, effort, time.perf_counter() - start_time)
