"""What the KV heads of a layer chose at their last full scan, and how long they keep to it: arrays, and loops compiled
by numba, because every head of every layer passes through in every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import float32, from_dtype, int32, int64, void
from numba.extending import register_jitable

from lamina_kernels.cpu.intrinsics import pointer
from lamina_kernels.paged.rows import Ints
from lamina_kernels.sketches import sketches
from lamina_workers.policies.chooser import Float32, Int32

LIMITS = np.dtype(
    [
        ("missed", "f8"),  # what a choice may leave out of a query's mass
        ("budget", "f8"),  # the share of its pages above which a head reads all
        ("every", "i8"),  # the most steps from one full scan to the next
    ]
)
HEAD = np.dtype(
    [
        ("scanned", "i8"),  # entries that there were at its last full scan; 0: there was none
        ("chosen", "i8"),  # entries of its list, all below `scanned`; whatever came since is read too
        ("pause", "i8"),  # steps between full scans
        ("left", "i8"),  # steps until the next
        ("held", "i8"),  # entries that there are in this step
        ("sealed", "i8"),  # entries of full pages among them
        ("due", "i8"),  # whether a full scan is due in this step
        ("found", "i8"),  # entries that it has chosen
    ]
)
Records = npt.NDArray[Any]


def limits(missed: float, budget: float, every: int) -> Records:
    """One record, as the compiled loop takes it."""
    return np.array([(missed, budget, every)], LIMITS)


class LayerMemory:
    """One entry a KV head of a part, in the order of `keys`. A step calls `begin`, `full_scan` if it is due, `read`.

    keys: None where the part is closed. heads: HEAD `[n]`. lists: int32 `[n, capacity]`, the entries chosen, ascending.
    missed: float32 `[n, group]`, the share of a query's mass that is expected to be left out.
    """

    def __init__(self, keys: Sequence[tuple[int, int]], capacity: int, group: int) -> None:
        """Nothing is known yet: a full scan is due for all."""
        self.keys: list[tuple[int, int] | None] = list(keys)
        self.heads: Records = np.zeros(len(keys), HEAD)
        self.lists: Int32 = np.zeros((len(keys), capacity), np.int32)
        self.missed: Float32 = np.zeros((len(keys), group), np.float32)

    def take_over(self, other: LayerMemory) -> bool:
        """Know of the keys in common what the other does. Whether there are any."""
        place = {key: i for i, key in enumerate(other.keys)}
        pairs = [(to, place[key]) for to, key in enumerate(self.keys) if key in place]
        if not pairs:
            return False
        to, source = map(list, zip(*pairs, strict=True))
        width = min(self.lists.shape[1], other.lists.shape[1])
        self.lists[to, :width] = other.lists[source, :width]
        self.heads[to], self.missed[to] = other.heads[source], other.missed[source]
        return True

    def forget(self, handle: int) -> bool:
        """A part is closed. Whether nothing is left."""
        self.keys = [key if key is not None and key[0] != handle else None for key in self.keys]
        return not any(self.keys)

    def begin(self, held: Ints, sealed: Ints) -> npt.NDArray[np.bool_]:
        """A step in which heads hold that many entries, int64 `[n]`. Returns for which a full scan is due, `[n]`: their
        pause is over, or they know nothing, or they know of more than there is."""
        heads, scanned = self.heads, self.heads["scanned"]
        due: npt.NDArray[np.bool_] = (heads["left"] <= 0) | (scanned == 0) | (scanned > held)
        heads["held"], heads["sealed"], heads["due"] = held, sealed, due
        return due

    def full_scan(self, limits: Records, found: sketches.Choice) -> None:
        """Take over what a full scan has found for the heads that are due, and judge by it what they had."""
        self.heads["found"] = found.counts
        arrays = found.log_mass, found.entries, found.missed, found.tail.lse
        full_scan_kernel()(self.heads, self.lists, self.missed, *(x.numpy() for x in arrays), limits)

    def read(self, tables: Ints) -> tuple[Int32, Ints]:
        """The pages that each reads now, int32 `[n, most]`, and how many; `tables` are addresses of int32 entries."""
        heads = self.heads
        counts: Ints = heads["chosen"] + heads["held"] - heads["scanned"]
        pages = np.empty((len(counts), int(counts.max())), np.int32)
        read_kernel()(heads, self.lists, tables, pages)
        heads["left"] -= 1
        return pages, counts


class Memories:
    """The memories of one layer: one for each set of heads that decode together, of which lanes make several."""

    def __init__(self) -> None:
        self._all: list[LayerMemory] = []

    def of(self, keys: list[tuple[int, int]], capacity: int, group: int) -> LayerMemory:
        """The memory for these keys, in this order, with room for lists of `capacity` entries. What other memories know
        of these keys is taken over, and these memories are given up."""
        for memory in self._all:
            if memory.keys == keys and memory.lists.shape[1] >= capacity:
                return memory
        new = LayerMemory(keys, 2 * capacity, group)
        self._all = [memory for memory in self._all if not new.take_over(memory)]
        self._all.append(new)
        return new

    def forget(self, handle: int) -> None:
        """A part is closed."""
        self._all = [memory for memory in self._all if not memory.forget(handle)]


@cache
def full_scan_kernel() -> Any:
    """The compiled loop of `LayerMemory.full_scan`."""
    heads, limits = from_dtype(HEAD)[::1], from_dtype(LIMITS)[::1]
    entries, masses, vectors = int32[:, ::1], float32[:, ::1], float32[::1]
    signature = void(heads, entries, masses, float32[:, :, ::1], entries, vectors, vectors, limits)
    return numba.njit(signature, cache=True)(_full_scan)


def _full_scan(
    heads: Any, lists: Any, expected: Any, log_mass: Any, entries: Any, missed: Any, tail_lse: Any, limits: Any
) -> None:
    limit, group = limits[0], expected.shape[1]
    for item in range(len(heads)):
        head = heads[item]
        if not head.due:
            continue
        knew, worst = 0 < head.scanned <= head.held, 0.0
        for query in range(group):
            vector, stale = item * group + query, np.float32(0.0)
            if knew and head.sealed > 0:  # of pages that are not full nothing is known: they are read
                stale = _left_out(head, lists[item], log_mass[item, query], missed[vector], tail_lse[vector])
            worst = max(worst, float(stale))
            expected[item, query] = stale
        if not knew:
            head.pause = 0
        elif worst <= limit.missed:
            head.pause = min(max(1, 2 * head.pause), limit.every - 1)
        else:
            head.pause //= 4
        for query in range(group):  # until the next full scan the first step reads this choice, the others an older one
            now = missed[item * group + query]
            expected[item, query] = max(expected[item, query], now) if head.pause > 0 else now
        head.left = head.pause + 1
        head.scanned = head.held
        if head.found > limit.budget * head.held:
            head.chosen = head.held
            for entry in range(head.held):
                lists[item, entry] = entry
            expected[item, :] = 0
            continue
        head.chosen = head.found
        for place in range(head.found):
            lists[item, place] = entries[item, place]


@register_jitable  # type: ignore[untyped-decorator]
def _left_out(head: Any, chosen: Any, logs: Any, missed: Any, tail_lse: Any) -> Any:
    """The share of a query's mass that its head's list leaves out, of sealed pages of which `logs` are the masses."""
    if missed > 0:  # of the mass of all sealed pages
        total = tail_lse - math.log(missed)
    else:
        peak = logs[: head.sealed].max()
        total = peak + math.log(np.exp(logs[: head.sealed] - peak).sum())
    kept = 0.0
    for place in range(head.chosen):
        if chosen[place] < head.sealed:
            kept += math.exp(logs[chosen[place]] - total)
    for entry in range(head.scanned, head.sealed):
        kept += math.exp(logs[entry] - total)
    return np.float32(min(max(1.0 - kept, 0.0), 1.0))


@cache
def read_kernel() -> Any:
    """The compiled loop of `LayerMemory.read`."""
    entries = int32[:, ::1]
    return numba.njit(void(from_dtype(HEAD)[::1], entries, int64[::1], entries), cache=True)(_read)


def _read(heads: Any, lists: Any, tables: Any, pages: Any) -> None:
    for item in range(len(heads)):
        head = heads[item]
        table = numba.carray(pointer(tables[item]), (head.held,), np.int32)
        for place in range(head.chosen):
            pages[item, place] = table[lists[item, place]]
        for later in range(head.held - head.scanned):
            pages[item, head.chosen + later] = table[head.scanned + later]
