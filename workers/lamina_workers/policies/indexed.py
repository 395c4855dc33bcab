"""`retrieval(index=graph)`, `retrieval(index=ivf)`: an index over keys finds what a query asks for, in the place of a
scan of all pages' sketches (RetrievalAttention, arXiv 2409.10516).

Prefill's queries are sampled as they pass. When a part decodes and is long enough, one background thread builds an
index for each layer and KV head, one after the other, from a copy of the keys; it never sees pages. Decode reads the
pages of the best keys of every query head, exactly, and beside them the sinks, the most recent tokens and all that is
not indexed yet. What that misses is estimated in every step from the sketches of some pages. A head that misses too
much asks for twice as many keys in the next step. Where that is not enough, the full scans of `retrieval` choose for it
for some steps, as for every head that has no index: yet, for want of queries, or because its build failed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lamina_kernels.paged.pages import gather
from lamina_kernels.paged.rows import Ints
from lamina_kernels.partial import Partial
from lamina_kernels.sketches import sketches
from lamina_protocols.layers import LayerSpec
from lamina_workers.indexes import faiss_host
from lamina_workers.indexes.key_index import Found, KeyIndex
from lamina_workers.policies.chooser import Choice, Chooser, Float32, Holding, Int32, Items, everything
from lamina_workers.policies.index_builds import (
    ASKED,
    BUILDS,
    LONGEST_PAUSE,
    PAUSE,
    STRIDE,
    HeadIndex,
    Job,
    PartIndexes,
    made,
)
from lamina_workers.policies.page_budget import Bounds, bounds, lists

log = logging.getLogger(__name__)

SAMPLED = 64  # pages from which the mass of what is not read is estimated
WIDEST = 8  # times the policy's `top`: more keys than that are not asked for
COUNTS = ("builds", "failed", "cancelled", "searches", "queries", "distances", "pauses")


class IndexParameters(Protocol):
    """The parameters of `retrieval` that this chooser reads. Units and meaning: see `retrieval.Retrieval`."""

    @property
    def sink(self) -> int: ...
    @property
    def recent(self) -> int: ...
    @property
    def missed(self) -> float: ...
    @property
    def budget(self) -> float: ...
    @property
    def index(self) -> str: ...
    @property
    def top(self) -> int: ...
    @property
    def least(self) -> int: ...
    @property
    def segment(self) -> int: ...


@dataclass(slots=True)
class _Plan:
    items: Items
    at: Bounds
    sampled: list[Ints]  # entries of each item that stand for all between its sinks and its last ones
    scan: Any = None  # the kernels' plan of sinks, sampled and last entries; None until an item has an index
    scanning: dict[tuple[int, ...], tuple[Items, Any]] = field(default_factory=dict)  # plans for some items, by these


class Indexed:
    """The chooser. `scanning` chooses for heads that have no index."""

    def __init__(self, policy: IndexParameters, at: Holding, scanning: Chooser) -> None:
        faiss_host.module()  # imported, or found missing, now rather than in a step
        self._policy = policy
        self._at = at
        self._scanning = scanning
        self._build = BUILDS[policy.index]
        self._asked = ASKED[policy.index]
        self._parts: dict[int, PartIndexes] = {}
        self._building: tuple[int, tuple[int, int], Job] | None = None  # a part's handle, its layer and head, the job
        self._reasons: set[str] = set()
        self._counts = dict.fromkeys(COUNTS, 0)
        self._seconds = dict.fromkeys(("build_seconds", "search_seconds"), 0.0)
        others = at.threads - 1
        self._pool = ThreadPoolExecutor(others, "lamina-search", faiss_host.set_threads, (1,)) if others else None

    def report(self) -> dict[str, float]:
        """Counts and seconds since the start (of builds: of their thread; of searches: by the clock), and the bytes
        that indexes and sampled queries take now, shared ones once."""
        heads = [head for part in self._parts.values() for head in part.heads.values()]
        segments = {id(s): s.nbytes for head in heads if head.index for s in head.index.segments}
        samples = {id(head.sample): head.sample.queries.nbytes for head in heads if head.sample}
        return {
            **self._counts,
            **self._seconds,
            "indexed": sum(head.index is not None for head in heads),
            "index_bytes": sum(segments.values()),
            "sample_bytes": sum(samples.values()),
        }

    # What happens to parts.

    def observe(self, handle: int, layer: int, head: int, first: int, q: Float32) -> None:
        """Prefill's queries, float32 `[t, group, d_k]`, of a part's head, at positions first, first + 1, ... of it."""
        # Most parts never get long enough: nothing is kept for them. Early queries say little about decode's.
        if not self._asked or first + len(q) <= self._policy.least // 2:
            return
        known = self._head(handle, layer, head)
        if not known.failed:
            known.offer(first, q)
            part = self._parts[handle]
            part.reach = max(part.reach, first + len(q))

    def fork(self, handle: int, parent: int, tokens: int) -> None:
        """A part is new, and has the first `tokens` of another. It shares the segments that end within them, and the
        sampled queries where none is of a later token."""
        source = self._parts.get(parent)
        if source is None:
            return
        part = self._parts[handle] = PartIndexes(reach=min(source.reach, tokens))
        for key, known in source.heads.items():
            head = part.heads[key] = HeadIndex(index=known.index, top=known.top)
            head.cut(tokens)
            if source.reach <= tokens and known.sample is not None:
                head.sample, head.shared, known.shared = known.sample, True, True

    def written(self, handle: int, start: int) -> None:
        """A part's tokens from `start` on are new, or differ from before."""
        part = self._parts.get(handle)
        if part is None or start >= part.reach:
            return
        if self._building is not None and self._building[0] == handle and self._building[2].hi > start:
            self._building[2].cancelled = True
        for head in part.heads.values():
            head.cut(start)
            if start < part.reach // 2:  # most sampled queries were of tokens that are replaced now
                head.sample, head.shared = None, False
        part.reach = start

    def forget(self, handle: int) -> None:
        if self._building is not None and self._building[0] == handle:
            self._building[2].cancelled = True
        self._parts.pop(handle, None)
        self._scanning.forget(handle)

    def _head(self, handle: int, layer: int, head: int) -> HeadIndex:
        heads = self._parts.setdefault(handle, PartIndexes()).heads
        return heads.setdefault((layer, head), HeadIndex())

    # Building.

    def _collect(self) -> None:
        """Take over the segment of the last build."""
        if self._building is None or not self._building[2].done:
            return
        (handle, key, job), self._building = self._building, None
        if job.cancelled:
            self._counts["cancelled"] += 1
            return
        head = self._parts[handle].heads[key]
        if job.segment is None:
            self._counts["failed"] += 1
            head.failed, head.index, head.sample = True, None, None
            reason = f"{type(job.error).__name__}: {job.error}"
            if reason not in self._reasons:
                self._reasons.add(reason)
                log.warning(
                    "no index for layer %d, KV head %d of part %d, which goes on without: %s", *key, handle, reason
                )
            return
        self._counts["builds"] += 1
        self._seconds["build_seconds"] += job.segment.build_seconds
        kept = [] if head.index is None else [s for s in head.index.segments if s.hi <= job.lo]
        if head.index is None:
            head.top, head.sample, head.shared = self._policy.top, None, False
        head.index = made([*kept, job.segment])

    def _build_next(self, plan: _Plan, i: int, layer: int, spec: LayerSpec, head: HeadIndex, q: Float32) -> None:
        """Keep a decode query q `[group, d_k]` where that helps, and start the build that an item lacks, unless another
        one runs. Keys are copied here, so that the build's thread never reads pages."""
        items, policy, size = plan.items, self._policy, self._at.page_size
        tokens, handle = int(items.tokens[i]), items.parts[i]
        if head.failed or tokens < policy.least:
            return
        if (head.index is not None or head.sampled < self._asked) and self._asked and tokens % STRIDE == 0:
            head.offer(tokens, q[None])
        if self._building is not None or head.sampled < self._asked:
            return
        segments = [] if head.index is None else list(head.index.segments)
        lo = segments[-1].hi if segments else int(plan.at.sinks[i]) * size
        hi = int(plan.at.recent[i]) * size
        if hi - lo < (policy.segment if segments else size):
            return
        while segments and segments[-1].hi - segments[-1].lo <= hi - lo:  # so that there are few, of uneven sizes
            lo = segments.pop().lo
        table = items.tables[i][spec.kv_layer][lo // size : hi // size]
        keys, _ = gather(self._at.pages, torch.from_numpy(table), hi - lo)
        queries = np.empty((0, q.shape[1]), np.float32) if head.sample is None else head.sample.queries
        job = Job(self._build, keys.float().contiguous().numpy(), queries, lo)
        self._building = handle, (layer, items.heads[i]), job
        self._parts[handle].reach = max(self._parts[handle].reach, hi)

    # Decode.

    def worth(self, tokens: Sequence[int]) -> bool:
        return max(tokens) >= self._policy.least or self._scanning.worth(tokens)

    def plan(self, items: Items) -> _Plan:
        policy = self._policy
        at = bounds(policy.sink, policy.recent, policy.budget, items, self._at.page_size)
        return _Plan(items, at, [_spread(lo, hi) for lo, hi in zip(at.sinks.tolist(), at.recent.tolist(), strict=True)])

    def choose(self, plan: _Plan, layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        self._collect()
        items, size = plan.items, self._at.page_size
        queries: Float32 = q.float().view(len(items), items.group, -1).numpy()
        finite = [bool(np.isfinite(query).all()) for query in queries]
        asking: dict[int, tuple[HeadIndex, KeyIndex]] = {}
        for i in range(len(items)):
            if not finite[i]:
                continue
            head = self._head(items.parts[i], layer, items.heads[i])
            self._build_next(plan, i, layer, spec, head, queries[i])
            if head.pause:
                head.pause -= 1
            elif head.index is not None and head.index.hi <= plan.at.recent[i] * size:
                asking[i] = head, head.index
        others = tuple(i for i in range(len(items)) if i not in asking)
        if not asking:
            return self._by_scan(plan, others, layer, spec, q)
        found = self._search([(index, queries[i], head.top) for i, (head, index) in asking.items()])
        log_mass, read = self._scan(plan, spec, q, list(asking))
        pages: list[Int32] = [np.empty(0, np.int32)] * len(items)
        missed = np.zeros((len(items), items.group), np.float32)
        for (i, (head, index)), hits in zip(asking.items(), found, strict=True):
            chosen = _chosen(plan.at, i, index.hi // size, hits.positions // size)
            logits = _capped(hits.scores * np.float32(spec.scale), spec.soft_cap)
            missed[i] = _missed(plan, i, index.hi // size, chosen, log_mass[i], logits)
            self._adapt(head, float(missed[i].max()), np.count_nonzero(chosen) / len(chosen))
            pages[i] = items.tables[i][spec.kv_layer][np.flatnonzero(chosen)]
            read += hits.distances * faiss_host.code_bytes(queries.shape[2])
        if not others:
            return Choice(*lists(pages), missed.reshape(-1), read)
        of_group = (np.array(others)[:, None] * items.group + np.arange(items.group)).reshape(-1)
        vectors = torch.from_numpy(of_group)
        scanned = self._by_scan(plan, others, layer, spec, q[vectors])
        for i, row, count in zip(others, scanned.pages, scanned.counts.tolist(), strict=True):
            pages[i] = row[:count]
        missed.reshape(-1)[of_group] = scanned.missed
        rest = None
        if scanned.rest is not None:
            rest = Partial(torch.zeros(len(q), scanned.rest.out.shape[1]), torch.full((len(q),), -torch.inf))
            rest.out[vectors], rest.lse[vectors] = scanned.rest
        return Choice(*lists(pages), missed.reshape(-1), read + scanned.read, rest)

    def _by_scan(self, plan: _Plan, those: tuple[int, ...], layer: int, spec: LayerSpec, q: torch.Tensor) -> Choice:
        """What full scans choose for some of the items, whose queries q are."""
        if those not in plan.scanning:
            a, index = plan.items, list(those)
            some = Items(
                [a.parts[i] for i in index],
                [a.heads[i] for i in index],
                [a.tables[i] for i in index],
                a.tokens[index],
                a.begins[index],
                a.group,
            )
            worth = self._scanning.worth(some.tokens.tolist())
            plan.scanning[those] = some, self._scanning.plan(some) if worth else None
        some, scan = plan.scanning[those]
        return everything(some, spec.kv_layer) if scan is None else self._scanning.choose(scan, layer, spec, q)

    def _search(self, asked: Sequence[tuple[KeyIndex, Float32, int]]) -> list[Found]:
        """Of each index the best `top` keys of each query, `[group, d_k]`. Dealt out over the threads, this one among
        them: a search releases the GIL."""
        begun = time.perf_counter()

        def of(share: Sequence[tuple[KeyIndex, Float32, int]]) -> list[Found]:
            return [index.search(q, top) for index, q, top in share]

        found: list[Found]
        if self._pool is None or len(asked) == 1:
            found = of(asked)
        else:
            threads = min(self._at.threads, len(asked))
            others = [self._pool.submit(of, asked[t::threads]) for t in range(1, threads)]
            shares = [of(asked[::threads]), *(other.result() for other in others)]
            found = [shares[i % threads][i // threads] for i in range(len(asked))]
        self._seconds["search_seconds"] += time.perf_counter() - begun
        for (_, q, _), hits in zip(asked, found, strict=True):
            self._counts["searches"] += 1
            self._counts["queries"] += len(q)
            self._counts["distances"] += hits.distances
        return found

    def _scan(self, plan: _Plan, spec: LayerSpec, q: torch.Tensor, those: list[int]) -> tuple[Float32, int]:
        """The log-mass of the pages from which some items' missed mass is estimated, float32 `[items, group, pages]`:
        sinks, sampled, last ones. And how many bytes were read."""
        items, at = plan.items, plan.at
        if plan.scan is None:
            ends = zip(at.sinks.tolist(), plan.sampled, at.recent.tolist(), at.sealed.tolist(), strict=True)
            columns = [np.concatenate([np.arange(a), s, np.arange(b, c)]) for a, s, b, c in ends]
            tables = [np.ascontiguousarray(t[:, c]) for t, c in zip(items.tables, columns, strict=True)]
            n = np.array([len(c) for c in columns], np.int64)
            asked = sketches.Items(tables, n, np.zeros_like(n), n, n)
            plan.scan = sketches.plan_scan(self._at.sketches, asked, items.group, self._at.threads)
        active = np.zeros(len(items), np.bool_)
        active[those] = True
        kernel = self._at.sketches
        found = sketches.scan(kernel, plan.scan, spec.kv_layer, q, spec.scale, spec.soft_cap, 1.0, active)
        return found.log_mass.numpy(), int(plan.scan.items.held[active].sum()) * kernel.layout.sketch_bytes

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
    plan: _Plan, i: int, indexed: int, chosen: npt.NDArray[np.bool_], log_mass: Float32, logits: Float32
) -> Float32:
    """The share of item i's mass, float32 `[group]`, that the chosen entries leave out, by estimate.

    The mass that is left out is the number of such pages times the mean mass of the sampled ones among them. The mass
    that is read is at least that of the keys that were found (logits `[group, k]`), of the sinks, of the last pages,
    and, estimated by the sampled pages among them, of what is not indexed yet: so the share is rather too large. NaN
    where no page that is left out is sampled. log_mass: of sinks, sampled and last pages, `[group, pages or more]`.
    """
    at, entries = plan.at, plan.sampled[i]
    left_out = len(chosen) - np.count_nonzero(chosen)
    if not left_out:
        return np.zeros(len(logits), np.float32)
    unread = ~chosen[entries]
    if not unread.any():
        return np.full(len(logits), np.nan, np.float32)
    sinks, recent = int(at.sinks[i]), int(at.recent[i])
    logs = log_mass[:, : sinks + len(entries) + int(at.sealed[i]) - recent].astype(np.float64)
    peak = np.maximum(logs.max(1), logits.max(1))[:, None]
    masses = np.exp(logs - peak)
    sampled = masses[:, sinks : sinks + len(entries)]
    rest = left_out * sampled[:, unread].mean(1)
    read = np.exp(logits - peak).sum(1) + masses[:, :sinks].sum(1) + masses[:, sinks + len(entries) :].sum(1)
    later = entries >= indexed
    if later.any():
        read += (recent - indexed) * sampled[:, later].mean(1)
    share: Float32 = (rest / (rest + read)).astype(np.float32)
    return share
