"""Which pages of a part are evicted by the attention that they have got, and how the others are read.

A policy that evicts says by positions alone how many of a part's slots below `freed` remain; the store frees the rest
in every cell (a layer and KV head) of the policy at once. So all its cells hold equally many pages, if not the same.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from lamina_workers.attention_worker.head_policies import Group
from lamina_workers.attention_worker.kv_parts import Part
from lamina_workers.attention_worker.page_pool import NO_PAGE, Int32
from lamina_workers.errors import KVError
from lamina_workers.policies.policy import Bools

Float32 = npt.NDArray[np.float32]


class PageAttention(Protocol):
    """How much attention the pages of parts have got so far."""

    def of(self, handle: int, cells: Bools, slots: int) -> Float32 | None:
        """Of a part's first `slots` slots in these cells, bool `[layers, heads]`: float32 `[cells, slots]`, in their
        order. None while too few queries are counted in one of them."""


def freed_slots(part: Part, group: Group) -> int:
    """Below which slot a group has freed pages, the same in all of its cells where it evicts."""
    return int(part.freed[group.cells].max())


def evicted(part: Part, group: Group, got: Float32, sinks: int, remaining: int) -> Bools:
    """The slots to free, bool `[layers, heads, slots]`, so that `remaining` are left of those that `got`, float32
    `[cells, slots]`, is about: those with most attention, and the first `sinks`. What is gone stays so."""
    held = part.table[group.cells, : got.shape[1]] != NO_PAGE
    got = np.where(held, got, -1)
    got[:, :sinks] = np.inf
    gone = held.copy()
    np.put_along_axis(gone, np.argsort(-got, axis=1, kind="stable")[:, :remaining], False, axis=1)
    where = np.zeros((*group.cells.shape, got.shape[1]), np.bool_)
    where[group.cells] = gone
    return where


def moved_up(part: Part, groups: tuple[Group, ...]) -> Int32:
    """The part's table; where groups have evicted, the pages that remain stand first."""
    table = part.table
    for group in groups:
        freed = freed_slots(part, group) if group.policy.evicts else 0
        if freed:
            table = table.copy() if table is part.table else table
            pages = table[group.cells, :freed]
            left = pages[pages != NO_PAGE].reshape(len(pages), -1)
            table[group.cells, : left.shape[1]] = left
    return table


def check_evicted(handle: int, part: Part, group: Group, sinks: int, remaining: int) -> None:
    """Raise KVError unless so many pages of a group that evicts remain, and its sinks."""
    held = part.table[group.cells, : freed_slots(part, group)] != NO_PAGE
    if (held.sum(1) != remaining).any() or not held[:, :sinks].all():
        raise KVError(
            f"part {handle} holds {held.sum(1)} pages that were not evicted; {group.policy} keeps {remaining}"
        )
