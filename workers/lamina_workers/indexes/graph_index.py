"""An attention-aware graph over keys: linked by which keys the prefill's queries ask for together.

Queries are out of distribution for keys, so a graph of keys that are near each other leads a search astray; one that is
projected from queries' exact neighbours does not (RetrievalAttention, arXiv:2409.10516; RoarGraph, arXiv:2408.08933).
One graph serves all query heads of a KV head. It is made of lists of the keys that sampled queries rank best, of all
these heads, in compiled code without the GIL. FAISS walks it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from lamina_workers.indexes import faiss_host
from lamina_workers.indexes.key_index import LARGEST, Floats, Found, ascending, check_keys, check_queries

Links = npt.NDArray[np.int32]
Lists = npt.NDArray[np.int32]
_CANDIDATES = 32  # times the degree: how many of a key's candidates pruning considers, the most asked for first. With 4
# a key is linked only to keys that are always asked for together, and recall stalls (docs/internals/log.md).


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def _ends(lists: Lists, jumps: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """Where each key's candidates end in the one array of all candidates, int64 `[n + 1]`."""
    ends = np.zeros(n + 1, np.int64)
    k = lists.shape[1]
    for i in range(lists.shape[0]):
        for jump in jumps:
            for rank in range(k - jump):
                ends[lists[i, rank] + 1] += 1
                ends[lists[i, rank + jump] + 1] += 1
    for key in range(n):
        ends[key + 1] += ends[key]
    return ends


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def _candidates(lists: Lists, jumps: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Links:
    """The keys that each key meets in the lists, as often as it meets them: int32 `[ends[n]]`."""
    met = np.empty(ends[-1], np.int32)
    cursors = ends[:-1].copy()
    k = lists.shape[1]
    for i in range(lists.shape[0]):
        for jump in jumps:
            for rank in range(k - jump):
                a, b = lists[i, rank], lists[i, rank + jump]
                met[cursors[a]], met[cursors[b]] = b, a
                cursors[a] += 1
                cursors[b] += 1
    return met


@njit(cache=True, nogil=True, fastmath=True)  # type: ignore[untyped-decorator, unused-ignore]
def _distance(a: Floats, b: Floats) -> np.float32:
    total = np.float32(0)
    for c in range(a.shape[0]):
        total += (a[c] - b[c]) * (a[c] - b[c])
    return total


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def _prune(keys: Floats, met: Links, ends: npt.NDArray[np.int64], slots: int, degree: int, candidates: int) -> Links:
    n = keys.shape[0]
    links = np.full((n, slots), -1, np.int32)
    times = np.zeros(n, np.int32)
    neighbours = np.empty(degree, np.int32)
    for key in range(n):
        segment = met[ends[key] : ends[key + 1]]
        distinct = np.empty(min(len(segment), n), np.int32)
        m = 0
        for other in segment:
            if other != key:
                if times[other] == 0:
                    distinct[m] = other
                    m += 1
                times[other] += 1
        weights = np.empty(m, np.int32)
        for j in range(m):
            weights[j] = -times[distinct[j]]
            times[distinct[j]] = 0
        order = np.argsort(weights, kind="mergesort")[:candidates]
        count = 0
        hidden = np.zeros(len(order), np.uint8)
        for j in range(len(order)):
            if count == degree:
                break
            other = distinct[order[j]]
            far = _distance(keys[key], keys[other])
            for i in range(count):
                if _distance(keys[neighbours[i]], keys[other]) < far:
                    hidden[j] = 1
                    break
            if hidden[j] == 0:
                neighbours[count] = other
                count += 1
        for j in range(len(order)):  # slots that are left go to hidden keys, the most asked for first
            if count == degree:
                break
            if hidden[j] == 1:
                neighbours[count] = distinct[order[j]]
                count += 1
        links[key, :count] = neighbours[:count]
    return links


def link(keys: Floats, lists: Lists, slots: int, degree: int) -> Links:
    """Links between keys that the same queries ask for: int32 `[n, slots]`, -1 ends a list, at most `degree` used.

    keys: float32 `[n, d]`. lists: int32 `[m, k]`, of each query its best keys, best first.
    Each list becomes a small world: a key meets the keys 1, 2, 4, ... ranks above and below it. Of the keys that it
    meets, the most frequent come first. One that is nearer (L2) to a linked key than to this key waits until all others
    were considered: occlusion pruning as in RoarGraph (arXiv:2408.08933, section 4). RoarGraph keeps one query's list
    for each best key; attention's queries share their best keys, so here all lists are merged.
    """
    jumps = 2 ** np.arange(max(1, int(lists.shape[1] - 1).bit_length() - 1), dtype=np.int64)
    ends = _ends(lists, jumps, len(keys))
    links: Links = _prune(keys, _candidates(lists, jumps, ends), ends, slots, degree, _CANDIDATES * degree)
    return links


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def _spread(links: Links, reached: npt.NDArray[np.bool_], start: int, stack: Links) -> None:
    """Mark all keys that can be reached from `start`."""
    reached[start] = True
    stack[0] = start
    depth = 1
    while depth:
        depth -= 1
        key = stack[depth]
        for other in links[key]:
            if other < 0:
                break
            if not reached[other]:
                reached[other] = True
                stack[depth] = other
                depth += 1


def reachable(links: Links, entry: int) -> npt.NDArray[np.bool_]:
    """Which keys a walk from `entry` can reach, bool `[n]`."""
    reached = np.zeros(len(links), np.bool_)
    _spread(links, reached, entry, np.empty(len(links), np.int32))
    return reached


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def _free(links: Links, key: int) -> int:
    """The first unused slot of `key`; the number of slots where there is none."""
    for slot in range(links.shape[1]):
        if links[key, slot] < 0:
            return slot
    return int(links.shape[1])


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def _connect(links: Links, reached: npt.NDArray[np.bool_], entry: int, lonely: Links, hosts: Lists) -> None:
    slots = links.shape[1]
    stack = np.empty(len(links), np.int32)
    newest = entry
    for i in range(len(lonely)):
        key = lonely[i]
        if reached[key]:  # through one that was connected before it
            continue
        parent, slot = newest, _free(links, newest)
        for rank in range(hosts.shape[1] - 1, -1, -1):
            host = hosts[i, rank]
            if host != key and reached[host] and _free(links, host) < slots:
                parent, slot = host, _free(links, host)
                break
        links[parent, slot] = key
        newest = key
        _spread(links, reached, key, stack)
        back = _free(links, key)
        if back + 1 < slots and not (links[key] == parent).any():
            links[key, back] = parent


def connect(links: Links, entry: int, lonely: Links, hosts: Lists) -> None:
    """Link every key of `lonely`, so that all of them can be reached from `entry`. Changes `links`.

    Each key must have two unused slots or more. lonely: int32 `[u]`, all keys that cannot be reached. hosts: int32
    `[u, h]`, the list of a query that also wants the lonely key: the last key there that has room is linked to it, as a
    search comes from the best keys down. Where none has room it is the key that was connected last, which always has.
    """
    if (links[:, -2] >= 0).any():
        raise ValueError(f"links use {links.shape[1] - 1} slots or more; allowed are at most {links.shape[1] - 2}")
    _connect(links, reachable(links, entry), entry, lonely, hosts)


LISTED = 200  # exact best keys of each sampled query; 2048 is the most that FAISS finds on a GPU
SLOTS = 32  # links a key has room for, an even number; two of them are kept for what makes every key reachable
EFFORT = 160  # candidates that a search keeps; never less than it is asked for
_WANTED_BY = 4096  # queries among which the best one is searched for a key that no list holds


class GraphSegment:
    """A graph over the keys at [lo, hi). See `key_index.Segment`; `effort` is FAISS's efSearch."""

    def __init__(self, index: Any, links: Links, lo: int, d: int, build_seconds: float) -> None:
        self._index, self._d = index, d
        self._n = len(links)
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
    start_time = time.perf_counter()
    check_keys(keys, lo)
    if queries.dtype != np.float32 or queries.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries are {queries.dtype} {list(queries.shape)}; allowed is float32 [m, {keys.shape[1]}]")
    queries = queries[(np.abs(queries) <= LARGEST).all(axis=1)]
    if not len(queries):
        raise ValueError("no query is finite; allowed is one or more that a graph can be built from")
    indices, scores = faiss_host.nearest(queries, keys, min(listed, len(keys)))
    lists = indices.astype(np.int32)
    links = link(keys, lists, slots, slots - 2)
    entry = int(np.bincount(lists[:, 0]).argmax())
    lonely = np.flatnonzero(~reachable(links, entry)).astype(np.int32)
    if len(lonely):
        connect(links, entry, lonely, lists[_wanted_by(keys[lonely], queries, scores)])
    index = faiss_host.graph(keys, links, entry)
    return GraphSegment(index, links, lo, keys.shape[1], time.perf_counter() - start_time)


def _wanted_by(keys: Floats, queries: Floats, scores: Floats) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Of each key the query in whose list it would come first, int64 `[keys]`.

    That is the largest (q.k - last) / (first - last) over the queries, where first and last are the inner products that
    the query's list begins and ends with: an inner product of k with a 1 added, and q and -last divided by the spread.
    """
    sample = np.linspace(0, len(queries) - 1, min(len(queries), _WANTED_BY)).astype(np.int64)
    first, last = scores[sample, 0], scores[sample, -1]
    spread = np.maximum(first - last, 1e-6 * np.abs(first) + 1e-30)
    wanting = np.concatenate([queries[sample], -last[:, None]], axis=1) / spread[:, None]
    augmented = np.concatenate([keys, np.ones((len(keys), 1), np.float32)], axis=1)
    best, _ = faiss_host.nearest(augmented, np.ascontiguousarray(wanting, np.float32), 1)
    return sample[best[:, 0]]
