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
from lamina_workers.policies.policy import Bools, Policy

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


def remaining_slots(part: Part, group: Group, freed: int, size: int) -> int:
    """How many of a group's slots below `freed` are held, where it evicts."""
    return group.policy.remaining(min(freed, group.sinks(part.lo, size)), freed)


def gap(part: Part, policy: Policy, size: int) -> tuple[int, int]:
    """The slots [first, end) of a part's heads of a policy for which a mean stands, or which are empty in `readable`.
    Pages have `size` tokens."""
    for group in part.groups:
        if group.policy == policy:
            freed = freed_slots(part, group)
            first = remaining_slots(part, group, freed, size) if policy.evicts else group.sinks(part.lo, size)
            return first, max(first, freed)
    return 0, 0


def counts(part: Part, policy: Policy, start: int, size: int) -> bool:
    """Whether the attention of a decode step at `start` is counted: in every `every`-th, and until pages that are too
    many have been evicted."""
    for group in part.groups:
        if group.policy == policy:
            freed = max(0, (min(policy.kept_from(start), part.held) - part.lo) // size)
            behind = remaining_slots(part, group, freed, size) < freed and not freed_slots(part, group)
            return behind or policy.counts(start)
    return False


def staying(part: Part, size: int) -> Bools:
    """The slots of every layer and head, `[layers, heads, capacity]`, that are held behind what was freed; where pages
    are evicted, those that are left."""
    slots = np.arange(part.table.shape[2])
    stay = np.zeros(part.table.shape, np.bool_)
    for group in part.groups:
        held = part.table[group.cells] != NO_PAGE
        stay[group.cells] = held if group.policy.evicts else group.policy.stays(part.lo + slots * size, size)
    return stay


def readable(part: Part) -> Int32:
    """The part's table; where groups have evicted, the pages that remain stand first."""
    table = part.table
    for group in part.groups:
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
