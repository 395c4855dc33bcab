"""Sketches in plain torch: what the compiled kernels are tested against, and what reads the sketches of pages that lie
on a GPU, or in the order of one. All items of a layer are computed together. On a GPU Triton multiplies queries and
keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lamina_kernels.paged.pages import Pages
from lamina_kernels.paged.rows import Table
from lamina_kernels.partial import Partial
from lamina_kernels.sketches.items import MISSED, Choice, Items, check_items, check_scan
from lamina_kernels.sketches.layout import LEVELS, Sketches, check_sealed

_AT_ONCE = 1 << 24  # numbers of unpacked keys or values


@dataclass(frozen=True, slots=True)
class ScanPlan:
    """The part of a batch's work that is the same in all layers. Tensors lie where the sketches do."""

    sketches: Sketches
    items: Items
    group: int
    missing: frozenset[int]  # layers that lack a page which the items read
    host_tables: Table  # int32 [layers, items, capacity], the page of each entry; 0 where there is none
    tables: torch.Tensor  # the same, int64
    sealed: torch.Tensor  # bool [items, capacity]: entries with sketches,
    kept: torch.Tensor  # those that are always chosen,
    held: torch.Tensor  # and all that there are


def seal(pages: Pages, sketches: Sketches, page_ids: torch.Tensor) -> None:
    """As `sketches.seal`."""
    check_sealed(pages, sketches, page_ids)
    layout, (size, d_k, d_v) = sketches.layout, _shape(sketches)
    for batch in page_ids.to(pages.arena.device).split(max(1, _AT_ONCE // (size * (d_k + d_v)))):
        k, v = _read(pages, batch)
        finite = torch.isfinite(k).view(len(batch), size, -1, 16).all(-1).all(1).repeat_interleave(16, -1)
        k = torch.where(finite[:, None], k, torch.nan)
        v_seen = torch.where(torch.isfinite(v).all(1, keepdim=True), v, torch.nan)
        sketches.scanned[batch] = 0
        sketches.values[batch] = 0
        codes, sketches.steps[batch], sketches.lows[batch] = coded(k)
        sketches.scanned[batch, : layout.steps_at] = pack(codes, layout.unit)
        codes, sketches.value_steps[batch], sketches.value_lows[batch] = coded(v_seen)
        sketches.values[batch, : layout.value_steps_at] = pack_values(codes)
        sketches.means[batch] = v.mean(1).bfloat16()


def _shape(sketches: Sketches) -> tuple[int, int, int]:
    layout = sketches.layout.pages
    return layout.page_size, layout.d_k, layout.d_v


def _read(pages: Pages, page_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What pages hold, float32: k `[n, page_size, d_k]`, v `[n, page_size, d_v]`."""
    layout, selection = pages.layout, Pages(pages.layout, pages.arena[page_ids])
    k = selection.k.reshape(-1, layout.page_size, layout.key_width).float()
    v = selection.v.reshape(-1, layout.page_size, layout.d_v).float()
    if layout.scaled:
        k, v = k * selection.scales[:, 0, :, None], v * selection.scales[:, 1, :, None]
    return k[..., : layout.d_k], v


def coded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers `[n, page_size, d]` as codes, uint8, and of each channel step and low, bfloat16 `[n, d]`."""
    low = x.amin(1).bfloat16()
    step = ((x.amax(1) - low.float()) * (1 / LEVELS)).bfloat16().clamp(min=0)  # low may be rounded up
    inverse = torch.where(step > 0, 1.0 / step.float(), 0.0)
    exact = (x - low.float().unsqueeze(1)) * inverse.unsqueeze(1)
    return exact.nan_to_num(0.0).clamp(0, LEVELS).round().to(torch.uint8), step, low


def pack(codes: torch.Tensor, unit: int) -> torch.Tensor:
    """Codes uint8 `[n, page_size, d_k]` as they stand in sketches of that unit: uint8 `[n, page_size * d_k / 2]`."""
    n, size, d = codes.shape
    if unit == 2:
        low, high = codes.view(n, -1, 2, 16, d // 4, 4).permute(2, 0, 1, 4, 3, 5)
    else:
        low, high = codes.view(n, -1, 16, d // 8, 2, 4).permute(4, 0, 1, 3, 2, 5)
    packed: torch.Tensor = low | high << 4
    return packed.reshape(n, size * d // 2)


def pack_values(codes: torch.Tensor) -> torch.Tensor:
    """Codes of values, uint8 `[n, page_size, d_v]`, as they stand in sketches: uint8 `[n, page_size * d_v / 2]`."""
    n, size, d = codes.shape
    low, high = codes.view(n, -1, 2, 4, d // 16, 16).permute(2, 0, 4, 1, 5, 3)
    packed: torch.Tensor = low | high << 4
    return packed.reshape(n, size * d // 2)


def unpacked(sketches: Sketches, page_ids: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """The codes of the keys of pages `[n]`: uint8 `[n, page_size, d_k]`."""
    layout, d = sketches.layout, sketches.layout.pages.d_k
    packed = sketches.scanned[page_ids, : layout.steps_at]
    n = len(packed)
    if layout.unit == 2:  # [page, strip, line, token, channel] twice, for the tokens' halves
        packed = packed.view(n, layout.pages.page_size // 32, d // 4, 16, 4)
        halves = torch.stack([packed & 15, packed >> 4], 2).permute(0, 1, 2, 4, 3, 5)
    else:  # twice for the channels' halves
        packed = packed.view(n, layout.pages.page_size // 16, d // 8, 16, 4)
        halves = torch.stack([packed & 15, packed >> 4], 3).permute(0, 1, 4, 2, 3, 5)
    return halves.reshape(n, layout.pages.page_size, d)


def keys(sketches: Sketches, page_ids: torch.Tensor) -> torch.Tensor:
    """The keys as the sketches of pages `[n]` have them: float32 `[n, page_size, d_k]`."""
    steps, lows = (x[page_ids].float().unsqueeze(1) for x in (sketches.steps, sketches.lows))
    near: torch.Tensor = unpacked(sketches, page_ids) * steps + lows
    return near


def values(sketches: Sketches, page_ids: torch.Tensor) -> torch.Tensor:
    """The values as the sketches of pages `[n]` have them: float32 `[n, page_size, d_v]`."""
    layout, n = sketches.layout, len(page_ids)
    size, d = layout.pages.page_size, layout.pages.d_v
    packed = sketches.values[page_ids, : layout.value_steps_at].view(n, d // 16, size // 8, 16, 4)
    codes = torch.stack([packed & 15, packed >> 4], 3).permute(0, 2, 3, 5, 1, 4).reshape(n, size, d)
    steps, lows = (x[page_ids].float().unsqueeze(1) for x in (sketches.value_steps, sketches.value_lows))
    near: torch.Tensor = codes * steps + lows
    return near


def plan_scan(sketches: Sketches, items: Items, group: int, threads: int = 1) -> ScanPlan:
    """Check `items`, each with `group` query heads. `threads` is of no use here."""
    missing = check_items(sketches, items, group)
    capacity, device = max(1, int(items.held.max(initial=1))), sketches.scanned.device
    tables = np.zeros((items.layers, len(items), capacity), np.int32)
    for number, (table, length) in enumerate(zip(items.tables, items.held.tolist(), strict=True)):
        tables[:, number, :length] = np.maximum(table[:, :length], 0)
    entry = np.arange(capacity)
    sealed, sinks, recent, lengths = (x[:, None] for x in (items.sealed, items.sinks, items.recent, items.held))
    kept_mask = (entry < lengths) & ((entry < sinks) | (entry >= recent) | (entry >= sealed))
    masks = (torch.from_numpy(mask).to(device) for mask in (entry < sealed, kept_mask, entry < lengths))
    on_device = torch.from_numpy(tables).to(device).long()
    return ScanPlan(sketches, items, group, missing, tables, on_device, *masks)


def scan(
    sketches: Sketches,
    plan: ScanPlan,
    layer: int,
    q: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
    missed: float = MISSED,
    coarse: float = 0.0,
) -> Choice:
    """As the kernel, by `leaving` and `blended`. `log_mass` and `tail` lie where sketches do, the rest on the CPU."""
    check_scan(plan, sketches, layer, q, scale, soft_cap, missed, coarse)
    tables, n = plan.tables[layer], len(plan.items)
    logits = _logits(sketches, tables, q.float().view(n, plan.group, -1), scale)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    log_mass = torch.logsumexp(logits, -1).masked_fill(~plan.sealed[:, None], -torch.inf)
    free = plan.held & ~plan.kept
    tail_mask = leaving(log_mass, free, missed, coarse)
    means = leaving(log_mass, free, missed, 0.0) & tail_mask
    codes = tail_mask & ~means
    tail = blended(sketches, tables, logits, means, codes)
    shares = torch.softmax(log_mass, -1)
    sums = torch.stack([shares.masked_fill(~mask[:, None], 0).sum(-1).flatten() for mask in (means, codes)]).cpu()
    coarse_counts, chosen = codes.sum(-1).cpu(), (plan.held & ~tail_mask).cpu().numpy()
    entries = np.argsort(~chosen, axis=-1, kind="stable").astype(np.int32)
    pages = np.take_along_axis(plan.host_tables[layer], entries, -1)
    counts = torch.from_numpy(chosen.sum(-1))
    lists = torch.from_numpy(pages), torch.from_numpy(entries)
    return Choice(log_mass, *lists, counts, sums[0], tail, sums[1], coarse_counts)


def _logits(sketches: Sketches, tables: torch.Tensor, q: torch.Tensor, scale: float) -> torch.Tensor:
    """q float32 `[items, group, d_k]` times the keys of each item's pages: `[items, group, entries, page_size]`."""
    (size, d_k, _), n = _shape(sketches), len(tables)
    if sketches.scanned.is_cuda:
        from lamina_kernels.sketches.triton_logits import sketch_logits  # which needs Triton

        views = sketches.scanned, sketches.steps, sketches.lows
        return sketch_logits(*views, tables, q.contiguous(), scale, size, sketches.layout.unit)
    parts = []
    for batch in tables.split(max(1, _AT_ONCE // (max(1, n) * size * d_k)), 1):
        near = keys(sketches, batch.reshape(-1)).view(n, -1, size, d_k)
        parts.append(torch.einsum("igd,ietd->iget", q, near) * scale)
    return torch.cat(parts, 2)


def leaving(log_mass: torch.Tensor, free: torch.Tensor, missed: float, coarse: float) -> torch.Tensor:
    """Which of the `free` entries, bool `[items, entries]`, are not read exactly: bool `[items, entries]`, by
    log_mass `[items, group, entries]`.

    They leave in the order of their score, the largest share that a page has of any query head's mass, as long as no
    head misses more than `missed` of its own, or as the root of the sum of their squares is at most `coarse` for each
    head.
    """
    shares = torch.softmax(log_mass, -1).masked_fill(~free[:, None], 0)
    order = torch.argsort(shares.amax(1).masked_fill(~free, torch.inf), dim=-1, stable=True)
    leaves = shares.gather(-1, order[:, None].expand_as(shares)).double()
    fits = (leaves.cumsum(-1) <= missed).all(1) | (leaves.square().cumsum(-1) <= coarse**2).all(1)
    fits = fits.long().cumprod(-1).bool()
    return torch.zeros_like(free).scatter(1, order, fits) & free


def blended(
    sketches: Sketches, tables: torch.Tensor, logits: torch.Tensor, means: torch.Tensor, codes: torch.Tensor
) -> Partial:
    """What pages stand for, `[items * group]`: those of `means` by the means of their values, those of `codes`, bool
    `[items, n]`, by their values in 4 bits. tables: int64 `[items, n]`; logits: `[items, group, n, page_size]`."""
    n, group, _, size = logits.shape
    mask = (means | codes)[:, None, :, None]
    of_tokens = logits.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(of_tokens, (-2, -1))
    nothing = ~mask.any(2)[..., 0]
    weights = torch.exp(of_tokens - lse.masked_fill(nothing, 0)[..., None, None])
    near = torch.where(means[..., None], sketches.means[tables].float(), 0)
    out = torch.einsum("ige,ied->igd", weights.sum(-1).masked_fill(~means[:, None], 0), near)
    places = codes.nonzero()
    counts = codes.sum(-1).tolist()
    step = max(1, _AT_ONCE // (size * sketches.layout.pages.d_v))
    for item, entries in enumerate(places[:, 1].split(counts)):  # by item, so that sums have an order
        for of_item in entries.split(step):
            near = values(sketches, tables[item, of_item])
            out[item] += torch.einsum("get,etd->gd", weights[item, :, of_item], near)
    return Partial(out.reshape(n * group, -1), lse.reshape(-1))
