"""An attention-aware graph over keys: linked by which keys the prefill's queries ask for together.

Queries are out of distribution for keys, so a graph of keys that are near each other leads a search astray; one that is
projected from queries' exact neighbours does not (RetrievalAttention, arXiv:2409.10516; RoarGraph, arXiv:2408.08933).
One graph serves all query heads of a KV head: its lists are the union of theirs. FAISS walks it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from lamina_workers.indexes import faiss_host
from lamina_workers.indexes.graph_links import Links, connect, link, reachable
from lamina_workers.indexes.key_index import LARGEST, Floats, Found, ascending, check_keys, check_queries

LISTED = 200  # exact best keys of each sampled query; 2048 is the most that FAISS finds on a GPU
SLOTS = 32  # links a key has room for, an even number; two of them are kept for what makes every key reachable
EFFORT = 160  # candidates that a search keeps; never less than it is asked for
_WANTED_BY = 4096  # queries among which the best one is searched for a key that no list holds


class GraphSegment:
    """A graph over the keys at [lo, hi). See `key_index.Segment`; `effort` is FAISS's efSearch."""

    def __init__(self, index: Any, links: Links, linked: int, lo: int, d: int, build_seconds: float) -> None:
        self._index, self._d = index, d
        self._n = len(links)
        self.linked = linked
        """Keys that some sampled query asks for; the others can be reached, but nothing else leads to them."""
        self.lo, self.hi = lo, lo + self._n
        self.build_seconds = build_seconds
        self.nbytes = self._n * (faiss_host.code_bytes(d) + 12) + links.nbytes  # FAISS keeps an offset and a level

    def search(self, q: Floats, k: int, effort: int | None = None) -> Found:
        q = check_queries(q, self._d, k)
        k = min(k, self._n)
        # FAISS ends a walk by efSearch alone, and would find less than k with a smaller one.
        params = faiss_host.graph_effort(max(k, effort or EFFORT))
        before = faiss_host.graph_distances()
        indices, scores = faiss_host.search(self._index, q, k, params)
        entries = len(q)  # FAISS does not count the first key of a walk
        return ascending(indices + self.lo, scores, faiss_host.graph_distances() - before + entries)


def build_graph(
    keys: Floats, queries: Floats, lo: int = 0, *, listed: int = LISTED, slots: int = SLOTS
) -> GraphSegment:
    """The graph over the keys at positions lo, lo + 1, ...

    keys: float32 `[n, d]`, rotated. queries: float32 `[m, d]`, those of all query heads that share the KV head, sampled
    from the prefill (`QuerySample`), rotated; each ranks all keys, later ones too, as every decode query will: with
    causal lists the last keys, which are asked for most, are hardly linked. Queries that are not finite are left out.
    Uses as many threads as `faiss_host.set_threads` has set. Raises ValueError for keys or queries of a wrong shape,
    dtype or size, KernelsUnavailable without FAISS.
    """
    begun = time.perf_counter()
    check_keys(keys, lo)
    if queries.dtype != np.float32 or queries.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries are {queries.dtype} {list(queries.shape)}; allowed is float32 [m, {keys.shape[1]}]")
    queries = queries[(np.abs(queries) <= LARGEST).all(axis=1)]
    if not len(queries):
        raise ValueError("no query is finite; allowed is one or more that a graph can be built from")
    indices, scores = faiss_host.nearest(queries, keys, min(listed, len(keys)))
    lists = indices.astype(np.int32)
    links = link(keys, lists, slots, slots - 2)
    linked = int((links[:, 0] >= 0).sum())
    entry = int(np.bincount(lists[:, 0]).argmax())
    lonely = np.flatnonzero(~reachable(links, entry)).astype(np.int32)
    if len(lonely):
        connect(links, entry, lonely, lists[_wanted_by(keys[lonely], queries, scores)])
    index = faiss_host.graph(keys, links, entry)
    return GraphSegment(index, links, linked, lo, keys.shape[1], time.perf_counter() - begun)


def _wanted_by(keys: Floats, queries: Floats, scores: Floats) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Of each key the query in whose list it would come first, int64 `[keys]`.

    That is the largest (q.k - last) / (first - last) over the queries, where first and last are the inner products that
    the query's list begins and ends with: an inner product of k with a 1 added, and q and -last divided by the spread.
    """
    some = np.linspace(0, len(queries) - 1, min(len(queries), _WANTED_BY)).astype(np.int64)
    first, last = scores[some, 0], scores[some, -1]
    spread = np.maximum(first - last, 1e-6 * np.abs(first) + 1e-30)
    wanting = np.concatenate([queries[some], -last[:, None]], axis=1) / spread[:, None]
    wanted = np.concatenate([keys, np.ones((len(keys), 1), np.float32)], axis=1)
    best, _ = faiss_host.nearest(wanted, np.ascontiguousarray(wanting, np.float32), 1)
    return some[best[:, 0]]
