"""Whether operations on parts are possible, and whether a part holds what its policies keep, and nothing else."""

from __future__ import annotations

import numpy as np

from lamina_protocols.messages.messages import Bound, Open
from lamina_workers.attention_worker.eviction import check_evicted, freed_slots, staying
from lamina_workers.attention_worker.kv_parts import Part
from lamina_workers.attention_worker.page_pool import NO_PAGE
from lamina_workers.errors import KVError


def check_open(open_: Open, kv_heads: int) -> None:
    """Raise KVError unless a part of a pool with so many KV heads can be opened."""
    if len(set(open_.heads)) != len(open_.heads) or not all(0 <= head < kv_heads for head in open_.heads):
        raise KVError(f"part {open_.handle} names heads {open_.heads}, allowed: different ones below {kv_heads}")
    if not open_.heads or not 0 <= open_.lo < open_.hi:
        raise KVError(f"part {open_.handle} of heads {open_.heads} and range [{open_.lo}, {open_.hi}) is empty")


def check_bound(bound: Bound, part: Part, size: int) -> None:
    """Raise KVError unless a part, of pages of `size` tokens, can end where it is told to."""
    lowest = max(part.lo + 1, part.floor(size) if part.held > bound.hi else 0)
    if not lowest <= bound.hi <= part.hi or (bound.hi - part.lo) % size:
        raise KVError(
            f"part {bound.handle} is to end at {bound.hi}, allowed: {lowest} to {part.hi}, where a page of {size} "
            f"tokens begins"
        )


def check_part(handle: int, part: Part, n_pages: int, size: int) -> None:
    """Raise KVError unless a part holds what it should. Its pool has `n_pages` pages of `size` tokens."""
    held = part.table[part.table != NO_PAGE]
    if held.size and (held.min() < 0 or held.max() >= n_pages):
        raise KVError(f"part {handle} names page {held.max()} of {n_pages}")
    if not part.lo <= part.stored <= part.held <= part.hi:
        raise KVError(f"part {handle} holds up to {part.stored}, {part.held}, outside [{part.lo}, {part.hi}]")
    for group in part.groups:
        if group.policy.evicts and (freed := freed_slots(part, group)):
            sinks = min(freed, group.sinks(part.lo, size))
            check_evicted(handle, part, group, sinks, group.policy.remaining(sinks, freed))
    slots = np.arange(part.table.shape[2])
    gone = (slots < part.freed[..., None]) & ~staying(part, size)
    inside = ~gone & (slots < -(-(part.held - part.lo) // size))
    for layer, table in enumerate(part.table):
        if (table[inside[layer]] == NO_PAGE).any():
            raise KVError(f"part {handle} lacks a page in layer {layer} that it should hold")
        if (table[~inside[layer]] != NO_PAGE).any():
            raise KVError(f"part {handle} keeps a freed page in layer {layer}")
