"""What the KV heads of a layer chose when they last looked, and how long they keep to it: arrays, and loops compiled by
numba, because every head of every layer passes through in every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import boolean, float32, float64, int32, int64

from lamina_kernels.cpu.intrinsics import pointer
from lamina_workers.policies.chooser import Float32, Int32

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Limits:
    """`missed`: what a choice may leave out of a query's mass; `budget`: the share of its pages above which a head
    reads all; `every`: the most steps from one look to the next."""

    missed: float
    budget: float
    every: int


@dataclass(slots=True)
class LayerMemory:
    """One entry a KV head of a part, in the order of `keys`.

    lists: int32 `[n, capacity]`, the entries chosen, ascending, counts[i] of them, all below held[i]; whatever came
    since is read too. missed: float32 `[n, group]`, what is expected to be left out. pause: steps between looks; left:
    steps until the next.
    """

    keys: list[tuple[int, int] | None]  # None: that part is closed
    lists: Int32
    counts: Ints
    held: Ints
    missed: Float32
    pause: Ints
    left: Ints

    @classmethod
    def empty(cls, keys: Sequence[tuple[int, int]], capacity: int, group: int) -> LayerMemory:
        """Nothing is known yet: all must look."""
        n = len(keys)
        lists, missed = np.zeros((n, capacity), np.int32), np.zeros((n, group), np.float32)
        counts, held, pause, left = np.zeros((4, n), np.int64)
        return cls(list(keys), lists, counts, held, missed, pause, left)

    def take_over(self, other: LayerMemory) -> bool:
        """Know of the keys in common what the other does. Whether there are any."""
        place = {key: i for i, key in enumerate(other.keys)}
        pairs = [(to, place[key]) for to, key in enumerate(self.keys) if key in place]
        if not pairs:
            return False
        to, source = map(list, zip(*pairs, strict=True))
        width = min(self.lists.shape[1], other.lists.shape[1])
        self.lists[to, :width] = other.lists[source, :width]
        for name in ("counts", "held", "missed", "pause", "left"):
            getattr(self, name)[to] = getattr(other, name)[source]
        return True

    def forget(self, handle: int) -> bool:
        """A part is closed. Whether nothing is left."""
        self.keys = [key if key is not None and key[0] != handle else None for key in self.keys]
        return not any(self.keys)

    def due(self, held: Ints) -> npt.NDArray[np.bool_]:
        """Who has to look: those whose time has come, and those that know nothing, or of more than there is."""
        who: npt.NDArray[np.bool_] = (self.left <= 0) | (self.held == 0) | (self.held > held)
        return who

    def look(
        self,
        limits: Limits,
        due: npt.NDArray[np.bool_],
        held: Ints,
        sealed: Ints,
        log_mass: Float32,
        entries: Int32,
        counts: Ints,
        missed: Float32,
        tail_lse: Float32,
    ) -> None:
        """Take over what those that are due have chosen, as `sketches.Choice` says it, and judge what they had."""
        looked()(
            due, held, sealed, log_mass, entries, counts, missed, tail_lse, self.lists, self.counts, self.held,
            self.missed, self.pause, self.left, limits.missed, limits.budget, limits.every,
        )  # fmt: skip

    def read(self, held: Ints, tables: Ints) -> tuple[Int32, Ints]:
        """The pages that each reads now, int32 `[n, most]` and how many; `tables` are addresses of int32 entries."""
        counts = self.counts + held - self.held
        pages = np.empty((len(counts), int(counts.max())), np.int32)
        listed()(pages, self.lists, self.counts, self.held, held, tables)
        self.left -= 1
        return pages, counts


class Memories:
    """Those of one layer: one for each set of heads that decode together, of which lanes make several."""

    def __init__(self) -> None:
        self._all: list[LayerMemory] = []

    def of(self, keys: list[tuple[int, int]], capacity: int, group: int) -> LayerMemory:
        """The memory for these keys, in this order, with room for lists of `capacity` entries. What others know of them
        is taken over, and those are given up."""
        for memory in self._all:
            if memory.keys == keys and memory.lists.shape[1] >= capacity:
                return memory
        new = LayerMemory.empty(keys, 2 * capacity, group)
        self._all = [memory for memory in self._all if not new.take_over(memory)]
        self._all.append(new)
        return new

    def forget(self, handle: int) -> None:
        """A part is closed."""
        self._all = [memory for memory in self._all if not memory.forget(handle)]


@cache
def looked() -> Any:
    """The compiled loop of `LayerMemory.look`."""
    ints, floats = int64[::1], float32[:, ::1]
    return numba.njit(
        numba.void(
            boolean[::1], ints, ints, float32[:, :, ::1], int32[:, ::1], ints, float32[::1], float32[::1],
            int32[:, ::1], ints, ints, floats, ints, ints, float64, float64, int64,
        ),
        cache=True,
    )(_look)  # fmt: skip


def _look(
    due: Any, held: Any, sealed: Any, log_mass: Any, entries: Any, counts: Any, missed: Any, tail_lse: Any, lists: Any,
    list_counts: Any, list_held: Any, expected: Any, pause: Any, left: Any, limit: float, budget: float, every: int,
) -> None:  # fmt: skip
    group = expected.shape[1]
    for i in range(len(due)):
        if not due[i]:
            continue
        knew, worst, known = 0 < list_held[i] <= held[i], 0.0, sealed[i]  # of pages that are not full nothing is known
        for h in range(group):
            stale, left_out = np.float32(0.0), missed[i * group + h]
            if knew and known > 0:  # where no page is full everything is read
                logs = log_mass[i, h]
                if left_out > 0:  # of the mass of all sealed pages
                    total = tail_lse[i * group + h] - math.log(left_out)
                else:
                    peak = logs[:known].max()
                    total = peak + math.log(np.exp(logs[:known] - peak).sum())
                kept = 0.0
                for at in range(list_counts[i]):
                    if lists[i, at] < known:
                        kept += math.exp(logs[lists[i, at]] - total)
                for entry in range(list_held[i], known):
                    kept += math.exp(logs[entry] - total)
                stale = np.float32(min(max(1.0 - kept, 0.0), 1.0))
            worst = max(worst, float(stale))
            expected[i, h] = stale
        if not knew:
            pause[i] = 0
        elif worst <= limit:
            pause[i] = min(max(1, 2 * pause[i]), every - 1)
        else:
            pause[i] //= 4
        for h in range(group):  # of the steps until the next look the first sees this choice, the others an older one
            now = missed[i * group + h]
            expected[i, h] = max(expected[i, h], now) if pause[i] > 0 else now
        left[i] = pause[i] + 1
        list_held[i] = held[i]
        if counts[i] > budget * held[i]:
            list_counts[i] = held[i]
            for at in range(held[i]):
                lists[i, at] = at
            expected[i, :] = 0
            continue
        list_counts[i] = counts[i]
        for at in range(counts[i]):
            lists[i, at] = entries[i, at]


@cache
def listed() -> Any:
    """The compiled loop of `LayerMemory.read`."""
    ints = int64[::1]
    return numba.njit(numba.void(int32[:, ::1], int32[:, ::1], ints, ints, ints, ints), cache=True)(_list)


def _list(pages: Any, lists: Any, list_counts: Any, list_held: Any, held: Any, tables: Any) -> None:
    for i in range(len(held)):
        table = numba.carray(pointer(tables[i]), (held[i],), np.int32)
        for at in range(list_counts[i]):
            pages[i, at] = table[lists[i, at]]
        for at in range(held[i] - list_held[i]):
            pages[i, list_counts[i] + at] = table[list_held[i] + at]
