"""From lists of the keys that sampled queries rank best to a graph over the keys. Compiled, without the GIL."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from lamina_workers.indexes.key_index import Floats

Links = npt.NDArray[np.int32]
Lists = npt.NDArray[np.int32]
_CANDIDATES = 32  # times the degree: how many of a key's candidates pruning considers, the most asked for first. With 4
# a key is linked only to keys that are always asked for together, and recall stalls (docs/log.md).


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
    at = ends[:-1].copy()
    k = lists.shape[1]
    for i in range(lists.shape[0]):
        for jump in jumps:
            for rank in range(k - jump):
                a, b = lists[i, rank], lists[i, rank + jump]
                met[at[a]], met[at[b]] = b, a
                at[a] += 1
                at[b] += 1
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
    kept = np.empty(degree, np.int32)
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
                if _distance(keys[kept[i]], keys[other]) < far:
                    hidden[j] = 1
                    break
            if hidden[j] == 0:
                kept[count] = other
                count += 1
        for j in range(len(order)):  # slots that are left go to hidden keys, the most asked for first
            if count == degree:
                break
            if hidden[j] == 1:
                kept[count] = distinct[order[j]]
                count += 1
        links[key, :count] = kept[:count]
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
