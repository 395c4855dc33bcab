"""Eviction by attention: which pages of a part it frees, and what stands for them.

A policy that evicts says by positions alone how many of a part's slots below `freed` remain; the store frees the rest
in every cell (a layer and KV head) of the policy at once. So all its cells hold equally many pages, if not the same.

`HeavyPages` counts how much attention each page has got. The sample of a prompt's queries, which is the denser the
later, is counted with the first decode query, once all keys are stored. Shares are exact: they are computed from the
keys themselves.

`MeanSlots` has the mean key and the mean value of the tokens that compensated policies have freed, which are attended
as one slot more. Sums are kept in float32 for each part, layer and KV head; a fork begins with its parent's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.pages import Pages, gather, gather_keys
from lamina_kernels.paged.rows import Ints
from lamina_kernels.partial import Partial
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.errors import KVError
from lamina_workers.kv_pages.head_policies import Group
from lamina_workers.kv_pages.parts import NO_PAGE, Absorbed, Int32, KvPart
from lamina_workers.policies.policy import Bools, Policy
from lamina_workers.policies.query_samples import QuerySamples

AT_ONCE = 256  # pages that are read at a time, so that little memory is taken


class _Sums(NamedTuple):
    """The sums of one part, which begins at position `lo`. tokens: int64 `[layers, heads]`; k, v: float32
    `[layers, heads, d]`. Forks share them, so they are never written."""

    lo: int
    tokens: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True)
class MeanReading:
    """Means, and the vectors of a batch that read them. vectors: int64 `[n]` of the flat q; cells: int64 `[n]`, the
    mean that each of them reads; log_tokens: float32 `[layers, cells]`; k, v: the means, float32 `[layers, cells, d]`.
    """

    vectors: torch.Tensor
    cells: torch.Tensor
    log_tokens: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def attend(self, spec: LayerSpec, q: torch.Tensor) -> Partial:
        """The partial of the means for `vectors`, of the flat q `[m, d_k]` of a layer; out in q's dtype."""
        layer = spec.kv_layer
        logits = (q[self.vectors].float() * self.k[layer, self.cells]).sum(-1) * spec.scale
        if spec.soft_cap is not None:
            logits = spec.soft_cap * torch.tanh(logits / spec.soft_cap)
        out = self.v[layer, self.cells].to(q.dtype)
        return Partial(out, logits + self.log_tokens[layer, self.cells])


class MeanSlots:
    """The sums of one worker's parts."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._sums: dict[int, _Sums] = {}

    def fork(self, handle: int, parent: int, length: int) -> None:
        """A part begins as the first `length` tokens of another, and with its sums, if it has any."""
        sums = self._sums.get(parent)
        if sums is not None and sums.lo < length:
            self._sums[handle] = sums

    def forget(self, handle: int) -> None:
        """A part is closed."""
        self._sums.pop(handle, None)

    def absorb(self, absorbed: Absorbed) -> None:
        """Add up pages that were freed. Nothing may have been written to them yet."""
        layout = self._pages.layout
        cells = torch.from_numpy(absorbed.cells)
        old = self._sums.get(absorbed.handle)
        if old is None:
            shape = absorbed.cells.shape
            zeros = torch.zeros(shape, dtype=torch.int64)
            old = _Sums(absorbed.lo, zeros, torch.zeros(*shape, layout.d_k), torch.zeros(*shape, layout.d_v))
        tokens, k, v = old.tokens.clone(), old.k.clone(), old.v.clone()
        tokens[cells] += absorbed.pages.shape[1] * layout.page_size
        flat = torch.from_numpy(absorbed.pages.astype(np.int64).reshape(-1))
        of_k, of_v = torch.empty(len(flat), layout.d_k), torch.empty(len(flat), layout.d_v)
        for first in range(0, len(flat), AT_ONCE):
            numbers = flat[first : first + AT_ONCE]
            page_k, page_v = gather(self._pages, numbers, len(numbers) * layout.page_size)
            of_k[first : first + AT_ONCE] = page_k.float().view(len(numbers), layout.page_size, -1).sum(1)
            of_v[first : first + AT_ONCE] = page_v.float().view(len(numbers), layout.page_size, -1).sum(1)
        k[cells] += of_k.view(*absorbed.pages.shape, -1).sum(1)
        v[cells] += of_v.view(*absorbed.pages.shape, -1).sum(1)
        self._sums[absorbed.handle] = _Sums(absorbed.lo, tokens, k, v)

    def mean(self, handle: int, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean k `[d_k]` and v `[d_v]`, float32, of what a part's head has freed; zeros where that is nothing. As
        many tokens that are all equal to the mean are attended as the mean is."""
        sums = self._sums.get(handle)
        if sums is None:
            return torch.zeros(self._pages.layout.d_k), torch.zeros(self._pages.layout.d_v)
        tokens = sums.tokens[layer, head].clamp(min=1)
        return sums.k[layer, head] / tokens, sums.v[layer, head] / tokens

    def reading(self, cells: list[tuple[int, int, torch.Tensor]]) -> MeanReading | None:
        """Of parts' heads, by handle and number in the part, with the vectors that read the mean of each, int64; None
        where there are none."""
        if not cells:
            return None
        sums = [(self._sums[handle], head) for handle, head, _ in cells]
        tokens = torch.stack([head_sums.tokens[:, head] for head_sums, head in sums], 1)
        k = torch.stack([head_sums.k[:, head] for head_sums, head in sums], 1)
        v = torch.stack([head_sums.v[:, head] for head_sums, head in sums], 1)
        counts = tokens.float().clamp(min=1).unsqueeze(-1)
        vectors = [of_cell for *_, of_cell in cells]
        numbers = torch.repeat_interleave(torch.arange(len(cells)), torch.tensor([len(x) for x in vectors]))
        reading = torch.cat(vectors), numbers, tokens.float().log(), k / counts, v / counts
        return MeanReading(*(x.to(self._pages.arena.device) for x in reading))


Float32 = npt.NDArray[np.float32]


class PageAttention(Protocol):
    """How much attention the pages of parts have got so far."""

    def of(self, handle: int, cells: Bools, slots: int) -> Float32 | None:
        """Of a part's first `slots` slots in these cells, bool `[layers, heads]`: float32 `[cells, slots]`, in their
        order. None while too few queries are counted in one of them."""


def freed_slots(part: KvPart, group: Group) -> int:
    """Below which slot a group has freed pages, the same in all of its cells where it evicts."""
    return int(part.freed[group.cells].max())


def evicted(part: KvPart, group: Group, got: Float32, sinks: int, remaining: int) -> Bools:
    """The slots to free, bool `[layers, heads, slots]`, so that `remaining` are left of those that `got`, float32
    `[cells, slots]`, is about: those with most attention, and the first `sinks`. What was evicted does not come
    back."""
    occupied = part.table[group.cells, : got.shape[1]] != NO_PAGE
    got = np.where(occupied, got, -1)
    got[:, :sinks] = np.inf
    leaving = occupied.copy()
    np.put_along_axis(leaving, np.argsort(-got, axis=1, kind="stable")[:, :remaining], False, axis=1)
    where = np.zeros((*group.cells.shape, got.shape[1]), np.bool_)
    where[group.cells] = leaving
    return where


def remaining_slots(part: KvPart, group: Group, freed: int, size: int) -> int:
    """How many of a group's slots below `freed` are held, where it evicts."""
    return group.policy.remaining(min(freed, group.sinks(part.lo, size)), freed)


def gap(part: KvPart, policy: Policy, size: int) -> tuple[int, int]:
    """The slots [first, end) of a part's heads of a policy for which a mean stands, or which are empty in `readable`.
    Pages have `size` tokens."""
    for group in part.groups:
        if group.policy == policy:
            freed = freed_slots(part, group)
            first = remaining_slots(part, group, freed, size) if policy.evicts else group.sinks(part.lo, size)
            return first, max(first, freed)
    return 0, 0


def counts(part: KvPart, policy: Policy, start: int, size: int) -> bool:
    """Whether the attention of a decode step at `start` is counted: in every `every`-th, and until pages that are too
    many have been evicted."""
    for group in part.groups:
        if group.policy == policy:
            freed = max(0, (min(policy.kept_from(start), part.held) - part.lo) // size)
            behind = remaining_slots(part, group, freed, size) < freed and not freed_slots(part, group)
            return behind or policy.counts(start)
    return False


def staying(part: KvPart, size: int) -> Bools:
    """The slots of every layer and head, `[layers, heads, capacity]`, that are held behind what was freed; where pages
    are evicted, those that are left."""
    slots = np.arange(part.table.shape[2])
    stay = np.zeros(part.table.shape, np.bool_)
    for group in part.groups:
        occupied = part.table[group.cells] != NO_PAGE
        stay[group.cells] = occupied if group.policy.evicts else group.policy.stays(part.lo + slots * size, size)
    return stay


def readable(part: KvPart) -> Int32:
    """The part's table; where groups have evicted, the pages that remain stand first."""
    table = part.table
    for group in part.groups:
        freed = freed_slots(part, group) if group.policy.evicts else 0
        if freed:
            table = table.copy() if table is part.table else table
            pages = table[group.cells, :freed]
            entries = pages[pages != NO_PAGE].reshape(len(pages), -1)
            table[group.cells, : entries.shape[1]] = entries
    return table


def check_evicted(handle: int, part: KvPart, group: Group, sinks: int, remaining: int) -> None:
    """Raise KVError unless so many pages of a group that evicts remain, and its sinks."""
    occupied = part.table[group.cells, : freed_slots(part, group)] != NO_PAGE
    if (occupied.sum(1) != remaining).any() or not occupied[:, :sinks].all():
        raise KVError(
            f"part {handle} holds {occupied.sum(1)} pages that were not evicted; {group.policy} keeps {remaining}"
        )


LEAST = 16  # queries that must be counted before anything is evicted
_AT_ONCE = 32  # queries whose logits are computed at a time


class CountedQuery(NamedTuple):
    """A decode query whose attention is counted, to some KV heads of a part, `heads` by their numbers in it. `first` is
    its first vector in the flat q, with `group` for every head of the part; `position` counts from the part's first."""

    handle: int
    part: KvPart
    heads: tuple[int, ...]
    first: int
    group: int
    position: int


@dataclass(frozen=True, slots=True)
class _Count:
    """What the pages of one head got up to position `position`. got: float32 `[group, slots]`, sums of shares; visible:
    float32 `[slots]`, how many queries could see a page; queries: how many there were. Never written."""

    position: int
    queries: int
    got: Float32
    visible: Float32


class HeavyPages:
    """The counts of one pool's parts. Positions count from a part's first token."""

    def __init__(self, pages: Pages, samples: QuerySamples) -> None:
        self._pages = pages
        self._samples = samples
        self._counts: dict[int, dict[tuple[int, int], _Count]] = {}  # by handle, then layer of KV and head in the part

    @property
    def counting(self) -> bool:
        """Whether anything is counted of any part."""
        return bool(self._counts)

    def count(self, query: CountedQuery, layer: int, spec: LayerSpec, q: torch.Tensor) -> None:
        """Count a query of a layer, and before it what is sampled of the prompt; q: `[n, d_k]`, flat."""
        counts, heads = self._counts.setdefault(query.handle, {}), list(query.heads)
        tables, size = query.part.table[spec.kv_layer, heads], self._pages.layout.page_size
        occupied = tables[:, : query.position // size] != NO_PAGE  # equally many of each head
        pages = tables[:, : occupied.shape[1]][occupied].reshape(len(heads), -1)
        keys = gather_keys(self._pages, torch.from_numpy(pages.astype(np.int64)).to(self._pages.arena.device))
        vectors = q[query.first : query.first + len(query.part.heads) * query.group]
        by_head = vectors.unflatten(0, (-1, query.group))
        for index, number in enumerate(heads):
            before, slots = counts.get((spec.kv_layer, number)), np.flatnonzero(occupied[index])
            positions, queries_of_head = self._asked(
                query, layer, number, by_head[number], 0 if before is None else before.position
            )
            got = np.zeros((query.group, tables.shape[1]), np.float32)
            viewers, queries = np.zeros(tables.shape[1], np.float32), len(positions)
            if before is not None:
                previous = min(len(before.visible), len(viewers))
                got[:, :previous], viewers[:previous] = before.got[:, :previous], before.visible[:previous]
                queries += before.queries
            for lo in range(0, len(positions) if len(slots) else 0, _AT_ONCE):
                rows = slice(lo, lo + _AT_ONCE)
                could = (slots + 1) * size <= positions[rows, None]
                got[:, slots] += _shares(queries_of_head[rows], keys[:, index], could, spec)
                viewers[slots] += could.sum(0)
            counts[spec.kv_layer, number] = _Count(query.position, queries, got, viewers)

    def _asked(
        self, query: CountedQuery, layer: int, number: int, q: torch.Tensor, since: int
    ) -> tuple[Ints, torch.Tensor]:
        """The positions, int64 `[n]`, and queries `[n, group, d_k]` to a head that are to be counted: those sampled of
        the prompt from position `since` on, and q, `[group, d_k]`."""
        heads, positions, sampled = self._samples.between(query.handle, layer, since, query.position)
        if (head := query.part.heads[number]) not in heads:
            return np.array([query.position]), q[None]
        vectors = torch.cat([sampled[:, heads.index(head)].to(q), q[None]])
        return np.append(positions, query.position), vectors

    def of(self, handle: int, cells: Bools, slots: int) -> Float32 | None:
        """As `PageAttention.of`: a page's mean share of the queries that could see it, in the query head where it is
        largest."""
        of_part = self._counts.get(handle, {})
        counts = [of_part.get((layer, head)) for layer, head in np.argwhere(cells).tolist()]
        rows = np.zeros((len(counts), slots), np.float32)
        for row, count in zip(rows, counts, strict=True):
            if count is None or count.queries < LEAST:
                return None
            length = min(slots, len(count.visible))
            row[:length] = count.got[:, :length].max(0) / np.maximum(count.visible[:length], 1)
        return rows

    def written(self, handle: int, start: int) -> None:
        """A part's tokens from `start` on are new, or differ from before."""
        counts, full_pages = self._counts.get(handle, {}), start // self._pages.layout.page_size
        for key, count in counts.items():
            if count.position > start:
                counts[key] = replace(
                    count, position=start, got=count.got[:, :full_pages], visible=count.visible[:full_pages]
                )

    def fork(self, handle: int, parent: int, tokens: int) -> None:
        """A part is new, and has the first `tokens` of another."""
        if (counts := self._counts.get(parent)) is not None:
            self._counts[handle] = dict(counts)
            self.written(handle, tokens)

    def forget(self, handle: int) -> None:
        """A part is closed."""
        self._counts.pop(handle, None)


def _shares(q: torch.Tensor, keys: torch.Tensor, could: Bools, spec: LayerSpec) -> Float32:
    """The attention, float32 `[group, slots]`, that queries `[n, group, d_k]` give to pages together, whose keys are
    `[slots * size, d_k]`. Each query could see those in `could`, bool `[n, slots]`. What is no number counts 0."""
    if keys.dtype not in (torch.bfloat16, torch.float16):
        q = q.float()
    logits = (q.to(keys) @ keys.T).float().mul_(spec.scale)
    if spec.soft_cap is not None:
        logits = spec.soft_cap * torch.tanh(logits / spec.soft_cap)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    by_page = weights.unflatten(2, (could.shape[1], -1)).sum(-1)
    by_page *= torch.from_numpy(could).to(keys.device)[:, None]
    shares = (by_page / by_page.sum(-1, keepdim=True)).nan_to_num_(0, 0)
    mass: Float32 = shares.sum(0).cpu().numpy()
    return mass
