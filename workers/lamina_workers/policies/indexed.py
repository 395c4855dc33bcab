"""`retrieval(index=graph)`: an index over keys finds what a query asks for, in the place of a
scan of all pages' sketches (RetrievalAttention, arXiv 2409.10516).

A sample of a prompt's queries is kept wherever the prompt is attended (`query_samples`). While its last quarter comes,
background threads begin to build an index for each layer and KV head, from copies of the keys; they never see pages
(`index_builds`). Decode reads the pages of the best keys of every query head, exactly, and beside them the sinks, the
most recent tokens and all that is not indexed yet. What that misses is estimated in every step from the sketches of
some pages. A head that misses too much asks for twice as many keys in the next step. Where that is not enough, the full
scans of `retrieval` choose for it for some steps, as for every head that has no index: yet, for want of queries, or
because its build failed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.rows import Ints
from lamina_kernels.partial import Partial
from lamina_kernels.sketches import sketches
from lamina_kernels.sketches.items import Items as SketchItems
from lamina_protocols.messages.layers import LayerSpec
from lamina_workers.indexes import faiss_host
from lamina_workers.indexes.key_index import Found, KeyIndex
from lamina_workers.policies.chooser import Choice, Chooser, Float32, Holding, Int32, Items, Shown, everything, lists
from lamina_workers.policies.index_builds import (
    ASKED,
    LONGEST_PAUSE,
    PAUSE,
    STRIDE,
    BuildParameters,
    Cell,
    HeadIndex,
    IndexBuilds,
    Stretch,
)
from lamina_workers.policies.page_bounds import Bounds, bounds

SAMPLED = 64  # pages from which the mass of what is not read is estimated
WIDEST = 8  # times the policy's `top`: more keys than that are not asked for
COUNTS = ("searches", "queries", "distances", "pauses")


class IndexParameters(BuildParameters, Protocol):
    """The parameters of `retrieval` that this chooser reads. Units and meaning: see `retrieval.Retrieval`."""

    @property
    def missed(self) -> float: ...
    @property
    def budget(self) -> float: ...


@dataclass(slots=True)
class _IndexPlan:
    items: Items
    bounds: Bounds
    sampled: list[Ints]  # entries of each item that stand for all between its sinks and its last ones
    scan: Any = None  # the kernels' plan of sinks, sampled and last entries; None until an item has an index
    scanning: dict[tuple[int, ...], tuple[Items, Any]] = field(default_factory=dict)  # plans for some items, by these


class Indexed(Chooser):
    """The chooser. `scanning` chooses for heads that have no index."""

    def __init__(self, policy: IndexParameters, at: Holding, scanning: Chooser) -> None:
        faiss_host.module()  # imported, or found missing, now rather than in a step
        self._policy = policy
        self._holding = at
        self._scanning = scanning
        self._builds = IndexBuilds(policy, at)
        self._counts = dict.fromkeys(COUNTS, 0)
        self._search_seconds = 0.0
        others = at.threads - 1
        self._pool = ThreadPoolExecutor(others, "lamina-search", faiss_host.set_threads, (1,)) if others else None

    def report(self) -> dict[str, float]:
        """Counts and seconds since the start (of builds: of their thread; of searches: by the clock), and the bytes
        that indexes and all samples of queries take now, shared ones once."""
        heads = [head for part in self._builds.parts.values() for head in part.heads.values()]
        segments = {id(s): s.nbytes for head in heads if head.index for s in head.index.segments}
        return {
            **self._counts,
            **self._builds.counts,
            "build_seconds": self._builds.seconds,
            "search_seconds": self._search_seconds,
            "indexed": sum(head.index is not None for head in heads),
            "index_bytes": sum(segments.values()),
            "sample_bytes": self._holding.samples.nbytes + sum(head.later.nbytes for head in heads if head.later),
        }

    # What happens to parts.

    def observe(self, shown: Shown) -> None:
        self._builds.observe(shown)

    def fork(self, handle: int, parent: int, tokens: int) -> None:
        self._builds.fork(handle, parent, tokens)

    def written(self, handle: int, start: int) -> None:
        self._builds.written(handle, start)

    def forget(self, handle: int) -> None:
        self._builds.forget(handle)
        self._scanning.forget(handle)

    def _prepare(self, plan: _IndexPlan, i: int, cell: Cell, head: HeadIndex, q: Float32) -> None:
        """Keep a decode query q `[group, d_k]` where that helps, and want the index that an item lacks."""
        builds, tokens, size = self._builds, int(plan.items.tokens[i]), self._holding.page_size
        if head.failed or tokens < self._policy.least:
            return
        if tokens % STRIDE == 0 and (head.index is not None or builds.sampled(cell) < ASKED):
            head.offer(tokens, q)
        builds.want(cell, Stretch(int(plan.bounds.sinks[i]) * size, int(plan.bounds.recent[i]) * size))

    # Decode.

    def worth(self, tokens: Sequence[int]) -> bool:
        return max(tokens) >= self._policy.least or self._scanning.worth(tokens)

    def plan(self, items: Items) -> _IndexPlan:
        policy = self._policy
        for handle in dict.fromkeys(items.parts):
            self._builds.decodes(handle)
        of_items = bounds(policy.sink, policy.recent, items, self._holding.page_size)
        sampled = [_spread(lo, hi) for lo, hi in zip(of_items.sinks.tolist(), of_items.recent.tolist(), strict=True)]
        return _IndexPlan(items, of_items, sampled)

    def choose(self, plan: _IndexPlan, layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        items, size = plan.items, self._holding.page_size
        queries: Float32 = q.float().view(len(items), items.group, -1).numpy()
        finite = [bool(np.isfinite(query).all()) for query in queries]
        asking: dict[int, tuple[HeadIndex, KeyIndex]] = {}
        for i in range(len(items)):
            if not finite[i]:
                continue
            cell = Cell(items.parts[i], layer, items.heads[i])
            head = self._builds.head(cell)
            self._prepare(plan, i, cell, head, queries[i])
            self._builds.go_on()
            if head.pause:
                head.pause -= 1
            elif head.index is not None and head.index.hi <= plan.bounds.recent[i] * size:
                asking[i] = head, head.index
        others = tuple(i for i in range(len(items)) if i not in asking)
        if not asking:
            return self._by_scan(plan, others, layer, spec, q)
        results = self._search([(index, queries[i], head.top) for i, (head, index) in asking.items()])
        log_mass, read = self._scan(plan, spec, q, list(asking))
        pages: list[Int32] = [np.empty(0, np.int32)] * len(items)
        missed_mass = np.zeros((len(items), items.group), np.float32)
        for (i, (head, index)), hits in zip(asking.items(), results, strict=True):
            chosen = _chosen(plan.bounds, i, index.hi // size, hits.positions // size)
            logits = _capped(hits.scores * np.float32(spec.scale), spec.soft_cap)
            missed_mass[i] = _missed(plan, i, index.hi // size, chosen, log_mass[i], logits)
            self._adapt(head, float(missed_mass[i].max()), np.count_nonzero(chosen) / len(chosen))
            pages[i] = items.tables[i][spec.kv_layer][np.flatnonzero(chosen)]
            read += hits.distances * faiss_host.code_bytes(queries.shape[2])
        if not others:
            return Choice(*lists(pages), missed_mass.reshape(-1), read)
        of_group = (np.array(others)[:, None] * items.group + np.arange(items.group)).reshape(-1)
        vectors = torch.from_numpy(of_group)
        scanned = self._by_scan(plan, others, layer, spec, q[vectors])
        for i, row, count in zip(others, scanned.pages, scanned.counts.tolist(), strict=True):
            pages[i] = row[:count]
        missed_mass.reshape(-1)[of_group] = scanned.missed
        rest_partial = None
        if scanned.rest is not None:
            rest_partial = Partial(torch.zeros(len(q), scanned.rest.out.shape[1]), torch.full((len(q),), -torch.inf))
            rest_partial.out[vectors], rest_partial.lse[vectors] = scanned.rest
        coarse = np.zeros(len(q), np.float32)
        coarse[of_group] = 0 if scanned.coarse is None else scanned.coarse
        return Choice(*lists(pages), missed_mass.reshape(-1), read + scanned.read, rest_partial, coarse)

    def _by_scan(
        self, plan: _IndexPlan, those: tuple[int, ...], layer: int, spec: LayerSpec, q: torch.Tensor
    ) -> Choice:
        """What full scans choose for some of the items, whose queries q are."""
        if those not in plan.scanning:
            a, index = plan.items, list(those)
            parts, heads, tables = (
                [a.parts[i] for i in index],
                [a.heads[i] for i in index],
                [a.tables[i] for i in index],
            )
            scanned_items = Items(parts, heads, tables, a.tokens[index], a.lo[index], a.positions[index], a.group)
            worth = self._scanning.worth(scanned_items.tokens.tolist())
            plan.scanning[those] = scanned_items, self._scanning.plan(scanned_items) if worth else None
        scanned_items, scan = plan.scanning[those]
        return everything(scanned_items, spec.kv_layer) if scan is None else self._scanning.choose(scan, layer, spec, q)

    def _search(self, asked: Sequence[tuple[KeyIndex, Float32, int]]) -> list[Found]:
        """Of each index the best `top` keys of each query, `[group, d_k]`. Dealt out over the threads, this one among
        them: a search releases the GIL."""
        start_time = time.perf_counter()

        def of(share: Sequence[tuple[KeyIndex, Float32, int]]) -> list[Found]:
            return [index.search(q, top) for index, q, top in share]

        results: list[Found]
        if self._pool is None or len(asked) == 1:
            results = of(asked)
        else:
            threads = min(self._holding.threads, len(asked))
            others = [self._pool.submit(of, asked[t::threads]) for t in range(1, threads)]
            shares = [of(asked[::threads]), *(other.result() for other in others)]
            results = [shares[i % threads][i // threads] for i in range(len(asked))]
        self._search_seconds += time.perf_counter() - start_time
        for (_, q, _), hits in zip(asked, results, strict=True):
            self._counts["searches"] += 1
            self._counts["queries"] += len(q)
            self._counts["distances"] += hits.distances
        return results

    def _scan(self, plan: _IndexPlan, spec: LayerSpec, q: torch.Tensor, those: list[int]) -> tuple[Float32, int]:
        """The log-mass of the pages from which some items' missed mass is estimated, float32 `[items, group, pages]`:
        sinks, sampled, last ones. And how many bytes were read."""
        items, item_bounds = plan.items, plan.bounds
        if plan.scan is None:
            ends = zip(
                item_bounds.sinks.tolist(),
                plan.sampled,
                item_bounds.recent.tolist(),
                item_bounds.sealed.tolist(),
                strict=True,
            )
            columns = [np.concatenate([np.arange(a), s, np.arange(b, c)]) for a, s, b, c in ends]
            tables = [np.ascontiguousarray(t[:, c]) for t, c in zip(items.tables, columns, strict=True)]
            n = np.array([len(c) for c in columns], np.int64)
            scan_items = SketchItems(tables, n, np.zeros_like(n), n, n)
            plan.scan = sketches.plan_scan(self._holding.sketches, scan_items, items.group, self._holding.threads)
        active = np.zeros(len(items), np.bool_)
        active[those] = True
        kernel = self._holding.sketches
        scan_result = sketches.scan(kernel, plan.scan, spec.kv_layer, q, spec.scale, spec.soft_cap, 1.0, active)
        return scan_result.log_mass.numpy(), int(plan.scan.items.held[active].sum()) * kernel.layout.scanned_bytes

    def _adapt(self, head: HeadIndex, missed: float, share: float) -> None:
        """Set how many keys a head asks for in the next step, by what it missed and the share of its pages that it
        reads. NaN changes nothing."""
        policy = self._policy
        if missed > policy.missed:
            if head.top >= WIDEST * policy.top or share > policy.budget:
                head.pause, head.next_pause = head.next_pause, min(2 * head.next_pause, LONGEST_PAUSE)
                self._counts["pauses"] += 1
            else:
                head.top *= 2
        elif missed <= policy.missed:
            head.next_pause = max(PAUSE, head.next_pause // 2)
            if missed < policy.missed / WIDEST:
                head.top = max(policy.top, head.top // 2)


_DRAWN = np.random.default_rng(0).random(SAMPLED)


def _spread(lo: int, hi: int) -> Ints:
    """Of the entries [lo, hi) one drawn at random from each of SAMPLED equal stretches; all where there are fewer. The
    same at every call."""
    n = hi - lo
    if n <= SAMPLED:
        return np.arange(lo, hi)
    drawn: Ints = lo + ((np.arange(SAMPLED) + _DRAWN) * n / SAMPLED).astype(np.int64)
    return drawn


def _capped(logits: Float32, soft_cap: float | None) -> Float32:
    return logits if soft_cap is None else np.float32(soft_cap) * np.tanh(logits / np.float32(soft_cap))


def _chosen(at: Bounds, i: int, indexed: int, found: Ints) -> npt.NDArray[np.bool_]:
    """Which entries item i reads, bool `[held]`: the found ones, its sinks, and all from `indexed` on."""
    chosen = np.zeros(int(at.held[i]), np.bool_)
    chosen[found.reshape(-1)] = True
    chosen[: int(at.sinks[i])] = True
    chosen[indexed:] = True
    return chosen


def _missed(
    plan: _IndexPlan, i: int, indexed: int, chosen: npt.NDArray[np.bool_], log_mass: Float32, logits: Float32
) -> Float32:
    """The share of item i's mass, float32 `[group]`, that the chosen entries leave out, by estimate.

    The mass that is left out is the number of such pages times the mean mass of the sampled ones among them. The mass
    that is read is at least that of the keys that were found (logits `[group, k]`), of the sinks, of the last pages,
    and, estimated by the sampled pages among them, of what is not indexed yet: so the share is rather too large. NaN
    where no page that is left out is sampled. log_mass: of sinks, sampled and last pages, `[group, pages or more]`.
    """
    item_bounds, entries = plan.bounds, plan.sampled[i]
    left_out = len(chosen) - np.count_nonzero(chosen)
    if not left_out:
        return np.zeros(len(logits), np.float32)
    unread = ~chosen[entries]
    if not unread.any():
        return np.full(len(logits), np.nan, np.float32)
    sinks, recent = int(item_bounds.sinks[i]), int(item_bounds.recent[i])
    logs = log_mass[:, : sinks + len(entries) + int(item_bounds.sealed[i]) - recent].astype(np.float64)
    peak = np.maximum(logs.max(1), logits.max(1))[:, None]
    masses = np.exp(logs - peak)
    sampled = masses[:, sinks : sinks + len(entries)]
    unread_mass = left_out * sampled[:, unread].mean(1)
    read = np.exp(logits - peak).sum(1) + masses[:, :sinks].sum(1) + masses[:, sinks + len(entries) :].sum(1)
    later = entries >= indexed
    if later.any():
        read += (recent - indexed) * sampled[:, later].mean(1)
    share: Float32 = (unread_mass / (unread_mass + read)).astype(np.float32)
    return share
