"""Sketches in plain torch, slow and obvious: what `sketches` is tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamina_kernels.paged.pages import Pages, gather
from lamina_kernels.partial import empty
from lamina_kernels.sketches.items import Choice, Items, check_items
from lamina_kernels.sketches.layout import LEVELS, Sketches, check_sealed
from lamina_kernels.sketches.sketches import MISSED, check_scan


@dataclass(frozen=True, slots=True)
class ScanPlan:
    """The part of a batch's work that is the same in all layers."""

    sketches: Sketches
    items: Items
    group: int
    most: int | None
    missing: frozenset[int]  # layers that lack a page which the items read


def seal(pages: Pages, sketches: Sketches, page_ids: torch.Tensor) -> None:
    """Make the sketches of full pages, from what they hold; page_ids int64 `[n]`, each once."""
    check_sealed(pages, sketches, page_ids)
    at, arena = sketches.layout, sketches.arena
    for page in page_ids.tolist():
        k, v = (x.float() for x in gather(pages, torch.tensor([page]), at.pages.page_size))
        k = torch.where(torch.isfinite(k).view(len(k), -1, 16).all(-1).all(0).repeat_interleave(16), k, torch.nan)
        low = k.amin(0).bfloat16()
        step = ((k.amax(0) - low.float()) * (1 / LEVELS)).bfloat16().clamp(min=0)  # low may be rounded up
        inverse = torch.where(step > 0, 1.0 / step.float(), 0.0)
        codes = ((k - low.float()) * inverse).nan_to_num(0.0).clamp(0, LEVELS).round().to(torch.uint8)
        arena[page] = 0
        arena[page, : at.steps_at] = pack(codes, at.unit)
        sketches.steps[page], sketches.lows[page], sketches.means[page] = step, low, v.mean(0).bfloat16()


def pack(codes: torch.Tensor, unit: int) -> torch.Tensor:
    """Codes uint8 `[page_size, d_k]` as they stand in a sketch of that unit: uint8 `[page_size * d_k / 2]`."""
    size, d = codes.shape
    if unit == 2:
        low, high = codes.view(-1, 2, 16, d // 4, 4).permute(1, 0, 3, 2, 4)
    else:
        low, high = codes.view(-1, 16, d // 8, 2, 4).permute(3, 0, 2, 1, 4)
    packed: torch.Tensor = low | high << 4
    return packed.reshape(size * d // 2)


def unpacked(sketches: Sketches) -> torch.Tensor:
    """The codes, uint8 `[n_pages, page_size, d_k]`."""
    at, n = sketches.layout, sketches.n_pages
    d = at.pages.d_k
    packed = sketches.arena[:, : at.steps_at]
    if at.unit == 2:  # [page, strip, line, token, channel] twice, for the tokens' halves
        packed = packed.view(n, -1, d // 4, 16, 4)
        both = torch.stack([packed & 15, packed >> 4], 2).permute(0, 1, 2, 4, 3, 5)
    else:  # twice for the channels' halves
        packed = packed.view(n, -1, d // 8, 16, 4)
        both = torch.stack([packed & 15, packed >> 4], 3).permute(0, 1, 4, 2, 3, 5)
    return both.reshape(n, at.pages.page_size, d)


def keys(sketches: Sketches, page_ids: torch.Tensor) -> torch.Tensor:
    """The keys as the sketches of pages `[n]` have them: float32 `[n, page_size, d_k]`."""
    chosen = Sketches(sketches.layout, sketches.arena[page_ids])
    near: torch.Tensor = unpacked(chosen) * chosen.steps.float().unsqueeze(1) + chosen.lows.float().unsqueeze(1)
    return near


def plan_scan(sketches: Sketches, items: Items, group: int, threads: int = 1, most: int | None = None) -> ScanPlan:
    """Check `items`, each with `group` query heads. `threads` is of no use here."""
    return ScanPlan(sketches, items, group, most, check_items(sketches, items, group, most))


def scan(
    sketches: Sketches,
    plan: ScanPlan,
    layer: int,
    q: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
    missed: float = MISSED,
) -> Choice:
    """Estimate the mass of every sealed page of a layer, and choose pages of each item, as `choose` does."""
    check_scan(plan, sketches, layer, q, scale, soft_cap, missed)
    items, group, n = plan.items, plan.group, len(plan.items)
    capacity = int(items.held.max(initial=1))
    queries = q.float().view(n, group, -1)
    log_mass = torch.full((n, group, capacity), -torch.inf)
    chosen_pages = torch.zeros(n, capacity, dtype=torch.int32)
    chosen_entries = torch.zeros(n, capacity, dtype=torch.int32)
    counts = torch.zeros(n, dtype=torch.int64)
    tail = empty(n * group, sketches.layout.pages.d_v)
    left = torch.zeros(n * group)
    for i in range(n):
        table = torch.from_numpy(items.tables[i][layer]).long()
        sealed, held = int(items.sealed[i]), int(items.held[i])
        if sealed:
            logits = torch.einsum("gd,ntd->gnt", queries[i], keys(sketches, table[:sealed])) * scale
            if soft_cap is not None:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            log_mass[i, :, :sealed] = torch.logsumexp(logits, -1)
        masses = log_mass[i, :, :sealed]
        chosen = choose(masses, int(items.sinks[i]), int(items.recent[i]), held, missed, plan.most)
        counts[i] = len(chosen)
        chosen_entries[i, : len(chosen)] = chosen
        chosen_pages[i, : len(chosen)] = table[chosen]
        others = torch.ones(sealed, dtype=torch.bool)
        others[chosen[chosen < sealed]] = False
        if others.any():
            own = slice(i * group, (i + 1) * group)
            left[own] = torch.softmax(masses, -1)[:, others].sum(-1)
            tail.lse[own] = torch.logsumexp(masses[:, others], -1)
            weights = torch.softmax(masses[:, others], -1)
            tail.out[own] = weights @ sketches.means[table[:sealed][others]].float()
    return Choice(log_mass, chosen_pages, chosen_entries, counts, left, tail)


def choose(
    log_mass: torch.Tensor, sinks: int, recent: int, held: int, missed: float, most: int | None = None
) -> torch.Tensor:
    """Which of `held` entries are chosen, int64, ascending: of the first ones log_mass `[group, sealed]` is known.

    Always [0, sinks), [recent, held), and those without a mass. The others leave in the order of their score, the
    largest share that a page has of any query head's mass, as long as no head misses more than `missed` of its own.
    With `most`, more leave until at most so many are chosen.
    """
    _, sealed = log_mass.shape
    entry = torch.arange(held)
    kept = (entry < sinks) | (entry >= recent) | (entry >= sealed)
    candidates = entry[~kept]
    if not len(candidates):
        return entry
    shares = torch.softmax(log_mass, -1)[:, candidates]
    order = torch.argsort(shares.amax(0), stable=True)
    fits = (shares[:, order].double().cumsum(-1) <= missed).all(0)
    leaving = int(fits.long().cumprod(0).sum())
    if most is not None:
        leaving = max(leaving, len(candidates) - max(most - int(kept.sum()), 0))
    kept[candidates[order[leaving:]]] = True
    return entry[kept]
