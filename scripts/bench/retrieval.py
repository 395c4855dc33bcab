#!/usr/bin/env python3
"""What indexes over real keys find, and at what cost: recall@100 over the share of the keys that is computed.

    scripts/evaluate/dump_attention.py --tokens 32768 --out dump/
    scripts/bench/retrieval.py --dump dump/ [--layers 4 12] [--heads 0 1] [--segments 8192 16384] [--json F] [--plot F]

Queries are those of the last 256 positions, which no index has seen; keys are all but the first 128 and the last 512,
as those are attended anyway. A search is for one query head; what counts is the share of the segment's keys whose inner
product it computes. Every index is searched with several efforts, and costs are read off its curve where it reaches a
recall. Seconds are CPU seconds of all threads, so that a busy machine changes them little; the prefill's stand in
dump.json, and are shared out evenly over layers and KV heads. A decode step's attention (searches, then the pages of
the window and of the found keys exactly) is called in turns with the exact kernel over all keys, bfloat16; these by the
clock and in CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from index_baselines import ScanSegment, build_ivf, plain_graph

from lamina_kernels.paged.pages import Pages
from lamina_kernels.paged.rows import Rows
from lamina_kernels.select import Kernels, kernels
from lamina_workers.indexes import faiss_host
from lamina_workers.indexes.graph_index import EFFORT, LISTED, SLOTS, build_graph
from lamina_workers.indexes.key_index import Found, KeyIndex, ascending
from lamina_workers.indexes.query_sample import QuerySample
from lamina_workers.policies.retrieval import Retrieval

SINKS, RECENT, ASKED, TOP = 128, 512, 256, 100
EFFORTS = (100, 130, 170, 220, 300, 400, 550, 800, 1200)
LISTS = (4, 8, 16, 32, 64, 96, 128, 192, 256, 384)
GOAL = 0.95
HNSW_LINKS = 32  # twice as many on the lowest level: more than the graph has, which does not need them
PAGE = 32
COLOURS = {"graph": "#0072B2", "hnsw": "#D55E00", "ivf": "#009E73", "scan": "#000000"}  # of Okabe and Ito
Search = Callable[[np.ndarray, int], Found]


@dataclass(frozen=True)
class Head:
    """One layer and KV head: keys [n, d] float32 of positions from SINKS on, queries [m, group, d] asked of them."""

    layer: int
    head: int
    keys: np.ndarray
    asked: np.ndarray
    sample: np.ndarray
    best: np.ndarray  # positions of the exact best TOP, ascending, int64 [m, group, TOP]

    def __str__(self) -> str:
        return f"layer {self.layer} head {self.head}"


@dataclass(frozen=True)
class Point:
    """An effort, and what it gave each query head: share of keys computed, recall; CPU microseconds a query."""

    effort: int
    share: list[float]
    recall: list[float]
    us: float


@dataclass(frozen=True)
class Curve:
    """An index of one KV head."""

    kind: str
    layer: int
    head: int
    build_seconds: float
    bytes_per_key: float
    points: list[Point]


def heads(dump: Path, layers: Sequence[int], chosen: Sequence[int] | None, every: int) -> Iterator[Head]:
    policy = Retrieval(index="graph", least=1)
    for layer in layers:
        q, k = (np.load(dump / f"{name}{layer}.npy", mmap_mode="r") for name in "qk")
        tokens, kv_heads, d = k.shape
        group = q.shape[1] // kv_heads
        for head in range(kv_heads) if chosen is None else chosen:
            keys = np.ascontiguousarray(k[SINKS : tokens - RECENT, head], np.float32)
            mine = q[:, head * group : (head + 1) * group]
            sample = QuerySample(1, group, d)
            for first in range(0, tokens - ASKED, 512):  # as a worker samples a prompt that comes in chunks
                stride = policy.sampled(first, tokens - ASKED)
                at = np.arange(first, min(first + 512, tokens - ASKED), stride)
                sample.offer(at, torch.from_numpy(mine[at].astype(np.float32))[:, None])
            asked = np.ascontiguousarray(mine[tokens - ASKED :: every], np.float32)
            best, _ = faiss_host.nearest(asked.reshape(-1, d), keys, TOP)
            yield Head(layer, head, keys, asked, sample.of(0), np.sort(best.reshape(-1, group, TOP) + SINKS))


def measure(head: Head, search: Search, effort: int, grouped: bool = False) -> Point:
    """Ask all of the head's queries one by one; the time is that of whole groups where `grouped`."""
    begun = time.thread_time()
    found = [[search(q[g : g + 1], effort) for g in range(len(q))] for q in head.asked]
    seconds = time.thread_time() - begun
    if grouped:
        begun = time.thread_time()
        for q in head.asked:
            search(q, effort)
        seconds = time.thread_time() - begun
    n = len(head.keys)
    share = [statistics.mean(f[g].distances for f in found) / n for g in range(head.asked.shape[1])]
    recall = [
        statistics.mean(
            len(np.intersect1d(f[g].positions, best[g])) / TOP for f, best in zip(found, head.best, strict=True)
        )
        for g in range(head.asked.shape[1])
    ]
    return Point(effort, share, recall, seconds * 1e6 / (len(found) * len(share)))


def curve(kind: str, head: Head, segment: int | None = None) -> Curve:
    """Build an index of that kind, in segments of so many keys where that is given, and try its efforts."""
    begun = time.process_time()
    n, search, efforts = len(head.keys), None, EFFORTS
    if kind == "hnsw":
        index = plain_graph(head.keys, HNSW_LINKS)
        bytes_per_key = head.keys.shape[1] * 2 + HNSW_LINKS * 8 * 1.03  # few keys have links on a second level

        def search(q: np.ndarray, effort: int) -> Found:
            before = faiss_host.graph_distances()
            indices, scores = faiss_host.search(index, q, TOP, faiss_host.graph_effort(effort))
            return ascending(indices + SINKS, scores, faiss_host.graph_distances() - before)
    else:
        whole = KeyIndex(SINKS)
        for first in range(0, n, segment or n):
            keys = head.keys[first : first + (segment or n)]
            if kind == "graph":
                whole.add(build_graph(keys, head.sample, SINKS + first))
            elif kind == "ivf":
                whole.add(build_ivf(keys, SINKS + first))
            else:
                whole.add(ScanSegment(keys, SINKS + first))
        efforts = {"graph": EFFORTS, "ivf": LISTS, "scan": (150,)}[kind]
        bytes_per_key = sum(part.nbytes for part in whole.segments) / n

        def search(q: np.ndarray, effort: int) -> Found:
            return whole.search(q, TOP, effort)

    build = time.process_time() - begun
    search(head.asked[0, :1], efforts[0])  # what is compiled or allocated once
    points: list[Point] = []
    for effort in efforts:
        points.append(measure(head, search, effort, kind == "scan"))
        if min(points[-1].recall) > 0.985:
            break
    return Curve(kind, head.layer, head.head, build, bytes_per_key, points)


def at(curve: Curve, g: int, goal: float = GOAL) -> float:
    """The share of keys at which query head `g` reaches `goal`, between two efforts; infinity where none does."""
    before: tuple[float, float] | None = None
    for point in curve.points:
        share, recall = point.share[g], point.recall[g]
        if recall >= goal:
            if before is None:
                return share
            part = (goal - before[1]) / (recall - before[1])
            return before[0] + part * (share - before[0])
        before = share, recall
    return float("inf")


def line(curve: Curve, prefill: float) -> str:
    shares = [at(curve, g) for g in range(len(curve.points[0].share))]
    needed = " ".join("  never" if s == float("inf") else f"{s:6.2%}" for s in shares)
    reached = next((p for p in curve.points if statistics.median(p.recall) >= GOAL), curve.points[-1])
    best = " ".join(f"{max(p.recall[g] for p in curve.points):.3f}" for g in range(len(shares)))
    return (
        f"{curve.kind:14} layer {curve.layer:2} head {curve.head} | {needed} | {best} | {reached.us:7.0f} | "
        f"{curve.build_seconds:6.2f} {curve.build_seconds / prefill:6.2f} | {curve.bytes_per_key:5.0f}"
    )


def summary(curves: list[Curve]) -> None:
    kinds: dict[str, list[float]] = defaultdict(list)
    for c in curves:
        kinds[c.kind] += [at(c, g) for g in range(len(c.points[0].share))]
    for kind, shares in kinds.items():
        median, worst = (
            f"at {x:.2%}" if x < float("inf") else "never" for x in (statistics.median(shares), max(shares))
        )
        print(f"{kind:14} recall {GOAL} {median} (median head), {worst} (worst)")


class Step:
    """A decode step's attention in one layer, exact and retrieved, over the dump's own keys and values."""

    def __init__(self, dump: Path, layer: int, threads: int, pool: ThreadPoolExecutor) -> None:
        self._kernels: Kernels = kernels(torch.device("cpu"))
        self._threads, self._pool = threads, pool
        q, k, v = (np.load(dump / f"{name}{layer}.npy", mmap_mode="r") for name in "qkv")
        self.tokens, self.kv_heads, d = k.shape
        self.group, self._scale = q.shape[1] // self.kv_heads, d**-0.5
        self.asked = np.ascontiguousarray(q[self.tokens - ASKED :], np.float32)
        if self.tokens % PAGE:
            raise SystemExit(f"the dump has {self.tokens} tokens; steps need whole pages of {PAGE}")
        self._entries = self.tokens // PAGE
        layout = self._kernels.layout(PAGE, d, v.shape[2], torch.bfloat16)
        self._pages = Pages.allocate(layout, self.kv_heads * self._entries)
        table = np.arange(self.kv_heads * self._entries, dtype=np.int32).reshape(1, self.kv_heads, -1)
        slots = np.arange(self.kv_heads)[:, None] * self._entries * PAGE + np.arange(self.tokens)
        places = self._kernels.plan_append(self._pages, torch.from_numpy(slots.reshape(1, -1)))
        flat = [torch.from_numpy(np.ascontiguousarray(x.transpose(1, 0, 2))).to(torch.bfloat16) for x in (k, v)]
        self._kernels.append(self._pages, places, 0, *(x.view(-1, x.shape[2]) for x in flat))
        one = np.ones(1, np.int64)
        rows = Rows(
            one * 0,
            one,
            one * (self.tokens - 1),
            one * self.kv_heads,
            one * self.group,
            one * 0,
            one * self.tokens,
            one * 0,
            [table],
        )
        self._plan = self._kernels.plan(self._pages, rows, threads)
        self.indexes: list[KeyIndex] = []
        self._list_plan = self._kernels.plan_lists(self._pages, self.kv_heads, self.group, threads)
        self._lists = np.zeros((self.kv_heads, self._entries), np.int32)
        self._lengths = np.zeros(self.kv_heads, np.int64)
        # Query heads in equal shares, so that KV heads need not come out even.
        every = [(head, g) for head in range(self.kv_heads) for g in range(self.group)]
        share = -(-len(every) // threads)
        self._jobs = [every[first : first + share] for first in range(0, len(every), share)]
        self._static = np.zeros(self._entries, np.bool_)
        self._static[: SINKS // PAGE] = self._static[-RECENT // PAGE :] = True

    def exact(self, i: int) -> torch.Tensor:
        q = torch.from_numpy(self.asked[i]).to(torch.bfloat16)
        return self._kernels.attend(self._pages, self._plan, 0, q, self._scale, None).out

    def retrieved(self, i: int, effort: int) -> torch.Tensor:
        """Search for all query heads, then attend the pages that hold what a group found, and the static ones."""
        q = self.asked[i].reshape(self.kv_heads, self.group, -1)
        chosen = np.tile(self._static, (self.kv_heads, 1))

        def work(jobs: list[tuple[int, int]]) -> None:
            """Query heads [g, ...) of some KV heads: each KV head's in one call. FAISS lets go of the GIL."""
            for head in sorted({head for head, _ in jobs}):
                mine = [g for at, g in jobs if at == head]
                found = self.indexes[head].search(q[head, mine[0] : mine[-1] + 1], TOP, effort)
                chosen[head, found.positions.ravel() // PAGE] = True

        others = [self._pool.submit(work, jobs) for jobs in self._jobs[1:]]
        work(self._jobs[0])
        for other in others:
            other.result()
        for head, row in enumerate(chosen):
            entries = np.flatnonzero(row)
            self._lists[head, : len(entries)] = entries + head * self._entries
            self._lengths[head] = len(entries) * PAGE
        queries = torch.from_numpy(self.asked[i]).to(torch.bfloat16)
        plan, lists = self._list_plan, self._lists
        return self._kernels.attend_lists(self._pages, plan, lists, self._lengths, queries, self._scale).out


def steps(dump: Path, layers: Sequence[int], effort: int, threads: int, seconds: float) -> dict[str, float]:
    """Milliseconds a layer's step takes, exact and retrieved, called in turns; and how far the results are apart."""
    with ThreadPoolExecutor(max(1, threads - 1), initializer=faiss_host.set_threads, initargs=(1,)) as pool:
        made = []
        for layer in layers:
            step = Step(dump, layer, threads, pool)
            for head in heads(dump, [layer], None, ASKED):
                index = KeyIndex(SINKS)
                index.add(build_graph(head.keys, head.sample, SINKS))
                step.indexes.append(index)
            made.append(step)
        clocks: tuple[tuple[list[float], list[float]], ...] = ([], []), ([], [])
        errors, until, i = [], time.perf_counter() + seconds, 0
        while time.perf_counter() < until or i < 8:
            step, at = made[i % len(made)], i // len(made) % ASKED
            said = [(time.perf_counter(), time.process_time())]
            exact = step.exact(at)
            said.append((time.perf_counter(), time.process_time()))
            retrieved = step.retrieved(at, effort)
            said.append((time.perf_counter(), time.process_time()))
            for which in range(2):
                for times, end, begin in zip(clocks, said[which + 1], said[which], strict=True):
                    times[which].append(end - begin)
            errors.append(float((retrieved.float() - exact.float()).norm() / exact.float().norm()))
            i += 1
    result = {"effort": effort, "threads": threads, "steps": i, "relative_difference": statistics.median(errors)}
    for name, times in zip(("clock", "cpu"), clocks, strict=True):
        tenths = [statistics.quantiles(t, n=10)[0] for t in times]
        result |= {
            f"{name}_{what}_ms": statistics.median(t) * 1e3
            for what, t in zip(("exact", "retrieved"), times, strict=True)
        }
        result[f"{name}_ratio"] = statistics.median(b / a for a, b in zip(*times, strict=True))
        result[f"{name}_ratio_of_fastest_tenths"] = tenths[1] / tenths[0]
    return result


def draw(curves: list[Curve], title: str, where: Path) -> None:
    """Recall over the share of keys computed: every query head, and the median over them at each effort."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for kind, colour in COLOURS.items():
        mine = [c for c in curves if c.kind == kind]
        if not mine:
            continue
        by_effort: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for c in mine:
            for g in range(len(c.points[0].share)):
                axes[1].plot(
                    [p.share[g] for p in c.points],
                    [p.recall[g] for p in c.points],
                    color=colour,
                    alpha=0.5,
                    linewidth=0.8,
                )
            for p in c.points:
                by_effort[p.effort] += zip(p.share, p.recall, strict=True)
        all_heads = max(len(x) for x in by_effort.values())
        medians = [np.median(x, axis=0) for x in by_effort.values() if len(x) == all_heads]
        x, y = zip(*medians, strict=True)
        axes[0].plot(x, y, color=colour, marker="o", label=f"{kind} ({all_heads} query heads)")
    for axis, name in zip(axes, ("median of the query heads at each effort", "each query head"), strict=True):
        axis.axhline(GOAL, color="grey", linewidth=0.8)
        axis.axvline(0.03, color="grey", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        ticks = [0.005, 0.01, 0.03, 0.1, 0.3, 1]
        axis.set_xticks(ticks, [f"{t:.1%}" if t < 0.01 else f"{t:.0%}" for t in ticks])
        axis.set_xlabel(f"keys computed; {name}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"recall@{TOP}")
    axes[0].set_ylim(0.3, 1.01)
    axes[0].legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(where, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump", type=Path, required=True, help="what scripts/evaluate/dump_attention.py wrote")
    parser.add_argument("--layers", type=int, nargs="+", help="without it, all of the dump")
    parser.add_argument("--heads", type=int, nargs="+", help="KV heads; without it, all")
    parser.add_argument("--kinds", nargs="+", choices=list(COLOURS), default=list(COLOURS))
    parser.add_argument(
        "--segments", type=int, nargs="+", default=[], help="build the graph in segments of so many keys too"
    )
    parser.add_argument("--every", type=int, default=4, help="ask at every so manieth of the last positions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step", type=float, default=0, help="seconds to time decode steps for; 0: not at all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    said = json.loads((args.dump / "dump.json").read_text())
    layers = args.layers or said["layers"]
    torch.set_num_threads(args.threads)
    faiss_host.set_threads(args.threads)
    kv_heads = np.load(args.dump / f"k{layers[0]}.npy", mmap_mode="r").shape[1]
    # Of a dump that does not say them, a little too much: the clock's, of all cores.
    seconds = said.get("prefill_cpu_seconds", said["prefill_seconds"] * (os.cpu_count() or 1))
    prefill = seconds / said.get("layers_computed", 30) / kv_heads
    title = f"{said['model']}, {said['tokens']} tokens, layers {' '.join(map(str, layers))}, {platform.machine()}"
    print(f"{title}; prefill {prefill:.2f} CPU seconds a layer and KV head; {LISTED=}, {SLOTS=}, {EFFORT=}")
    print(
        f"index, of what | share of keys at recall {GOAL} | best recall | us a query | build s, of prefill | bytes/key"
    )
    curves: list[Curve] = []
    for head in heads(args.dump, layers, args.heads, args.every):
        for kind in args.kinds:
            curves.append(curve(kind, head))
            print(line(curves[-1], prefill), flush=True)
        for size in args.segments:
            made = curve("graph", head, size)
            curves.append(Curve(f"graph {size}", *(getattr(made, f) for f in list(asdict(made))[1:])))
            print(line(curves[-1], prefill), flush=True)
    print()
    summary(curves)
    results: dict[str, Any] = {"dump": said, "curves": [asdict(c) for c in curves]}
    if args.step:
        graphs = [c for c in curves if c.kind == "graph"]
        efforts = [e for e in EFFORTS if all(any(p.effort == e for p in c.points) for c in graphs)]
        reach = {e: [r for c in graphs for p in c.points if p.effort == e for r in p.recall] for e in efforts}
        effort = next((e for e in efforts if statistics.median(reach[e]) >= GOAL), EFFORTS[-1])
        results["steps"] = [steps(args.dump, layers, effort, n, args.step) for n in sorted({1, args.threads})]
        print(json.dumps(results["steps"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        draw([c for c in curves if c.kind in COLOURS], title, args.plot)


if __name__ == "__main__":
    main()
