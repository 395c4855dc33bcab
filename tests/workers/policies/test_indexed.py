"""`retrieval(index=...)` at one attention worker: what indexes find, while they are built, and when parts change."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from bench.index_baselines import ScanSegment
from kv_pools import pool_of
from policy_bench import GROUP, HEADS, KV_HEADS, LAYERS, PAGE, Bench, D

from lamina_protocols.messages.messages import Attended, Fresh, Query, Row
from lamina_workers.errors import KernelsUnavailable
from lamina_workers.indexes import faiss_host
from lamina_workers.indexes.key_index import Floats, Segment
from lamina_workers.policies import index_builds, indexed, retrieval
from lamina_workers.policies.indexed import Indexed

pytest.importorskip("faiss")

PROMPT = 1203
CELLS = LAYERS * KV_HEADS
POLICY = "retrieval(index={}, sink=16, recent=16, top=8, least=256, segment=160, missed=0.05)"
WINDOW = 3 * PAGE  # tokens that are read anyway, at most
TARGETS = 12  # keys that are asked for


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> object:
    """Builds end with the test, and threads that search with their worker."""
    before = set(threading.enumerate())
    yield
    gc.collect()
    deadline = time.monotonic() + 10
    while left := [t for t in threading.enumerate() if t not in before and t.name.startswith("lamina-")]:
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.01)


def chooser(bench: Bench) -> Indexed:
    (found,) = pool_of(bench.worker).reader._choosers._choosers.values()
    assert isinstance(found, Indexed)
    return found


def report(bench: Bench) -> dict[str, float]:
    return chooser(bench).report()


def asking(targets: list[int]) -> torch.Tensor:
    """Queries that ask for a target each: `[layers, n, heads, d]`, for the next target in each head after the first."""
    q = torch.zeros(LAYERS, len(targets), HEADS, D)
    for i, target in enumerate(targets):
        for head in range(HEADS):
            q[:, i, head, (target + head) % TARGETS] = 6.0
    return q


def place(target: int, n: int) -> int:
    """Where a target stands in a prompt: far from both ends."""
    return 40 + target * (n - 120) // TARGETS


def keys(bench: Bench, n: int) -> torch.Tensor:
    """A prompt's: small but for the targets, each of which points a way of its own. `[layers, n, heads, d]`."""
    k = bench.random(n) * 0.3
    for target in range(TARGETS):
        k[:, place(target, n)] = 0
        k[:, place(target, n), :, target] = 9.0
    return k


def world(bench: Bench, handle: int, n: int = PROMPT) -> None:
    """A prompt whose targets are asked for in turn."""
    q = asking([i * 7 % TARGETS for i in range(n)]) + 0.3 * bench.random(n, HEADS)
    bench.prefill(handle, n, q=q, k=keys(bench, n))


def step(bench: Bench, handle: int, target: int = 0) -> torch.Tensor:
    """A decode step that asks for a target; its key is small."""
    return bench.step(handle, q=asking([target]), k=0.3 * bench.random(1))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 0.02) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def wait(bench: Bench) -> None:
    """Until the build under way, if there is one, has ended; so few tokens come meanwhile."""
    for job in chooser(bench)._builds.building.values():
        if not job.done:
            job._thread.join(30)


def until(
    bench: Bench, handle: int, what: Callable[[dict[str, float]], bool], steps: int = 400, targets: int = TARGETS
) -> int:
    """Decode, asking for the first `targets`, and compare each step with full attention, until the report says so.
    Returns how many steps it took."""
    for i in range(steps):
        if what(report(bench)):
            return i
        out = step(bench, handle, i % targets)
        close(out, bench.dense(handle)[:, 0])
        wait(bench)
    raise AssertionError(f"after {steps} steps: {report(bench)}")


def ready(bench: Bench, handle: int, cells: int = CELLS, targets: int = TARGETS) -> int:
    return until(bench, handle, lambda r: r["indexed"] >= cells, targets=targets)


class Listener:
    """Keeps what a chooser said."""

    def __init__(self, bench: Bench) -> None:
        self.said: list[tuple[list[set[int]], np.ndarray]] = []
        chosen = chooser(bench).choose

        def choose(plan: indexed._IndexPlan, layer: int, *rest: object) -> object:
            choice = chosen(plan, layer, *rest)  # type: ignore[arg-type]
            tables = [table[layer].tolist() for table in plan.items.tables]
            rows = zip(tables, choice.pages.tolist(), choice.counts.tolist(), strict=True)
            read = [{table.index(page) for page in pages[:count]} for table, pages, count in rows]
            self.said.append((read, choice.missed.copy()))
            return choice

        chooser(bench).choose = choose  # type: ignore[method-assign]

    def missed(self, bench: Bench, handle: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the last step, by layer and query head: the share that was missed, in float64, and the estimate."""
        weights = bench.logits(handle)[:, :, 0].softmax(-1)
        true = np.ones((LAYERS, HEADS))
        for layer, (read, _) in enumerate(self.said[-LAYERS:]):
            for item, entries in enumerate(read):
                for head in range(item * GROUP, (item + 1) * GROUP):
                    pages = weights[layer, head].split(PAGE)
                    true[layer, head] -= sum(float(pages[entry].sum()) for entry in entries)
        return true, np.stack([missed for _, missed in self.said[-LAYERS:]])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_is_asked_for_is_found_far_away(dtype: str) -> None:
    bench = Bench(POLICY.format("graph"), dtype=dtype)
    handle = bench.open()
    world(bench, handle)
    ready(bench, handle)
    listener = Listener(bench)
    for target in range(TARGETS):
        out = step(bench, handle, target)
        close(out, bench.dense(handle)[:, 0], 0.05 if dtype == "int8" else 0.02)
        n = bench.k[handle].shape[1]
        window = torch.arange(n) >= n - WINDOW
        blind = bench.dense(handle, (window | (torch.arange(n) < PAGE)).expand(LAYERS, HEADS, n))
        assert ((out - blind).norm(dim=-1) > 0.3).all()  # without what was found the answer is another
    pages = [len(entries) for read, _ in listener.said for entries in read]
    assert len(pages) == TARGETS * CELLS
    assert max(pages) < 0.5 * bench.k[handle].shape[1] / PAGE
    usage = bench.usage(handle)
    assert 0 < usage.worst < 0.05
    counts = report(bench)
    assert counts["builds"] == CELLS
    assert counts["failed"] == counts["cancelled"] == 0
    assert counts["queries"] == GROUP * counts["searches"] > 0
    assert counts["distances"] > 0
    assert counts["build_seconds"] > 0
    assert counts["search_seconds"] > 0
    assert counts["index_bytes"] > CELLS * PROMPT * D


class Gate:
    """A build that waits until it is let through, and then makes a plain scan."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.begun = threading.Event(), threading.Event()
        monkeypatch.setattr(index_builds, "build_graph", self)

    def __call__(self, keys: Floats, queries: Floats, lo: int) -> Segment:
        self.begun.set()
        self.open.wait(30)
        return ScanSegment(keys, lo)


def test_while_an_index_is_built_everything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    bench = Bench(POLICY.format("graph"))
    handle = bench.open()
    world(bench, handle)
    for target in range(4):
        close(step(bench, handle, target), bench.dense(handle)[:, 0])
        usage = bench.usage(handle)
        assert (usage.read, usage.missed) == (usage.whole, 0)
    assert gate.begun.is_set()
    assert report(bench)["builds"] == report(bench)["indexed"] == 0
    gate.open.set()
    ready(bench, handle)
    assert report(bench)["builds"] == CELLS


@pytest.mark.parametrize("error", [ValueError("keys are odd"), MemoryError("none left"), SystemExit(3)])
def test_a_build_that_fails_is_told_once(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def build(keys: Floats, queries: Floats, lo: int) -> Segment:
        raise error

    monkeypatch.setattr(index_builds, "build_graph", build)
    bench = Bench(POLICY.format("graph"))
    handle = bench.open()
    world(bench, handle)
    with caplog.at_level(logging.WARNING):
        until(bench, handle, lambda r: r["failed"] == CELLS)
        for target in range(3):
            close(step(bench, handle, target), bench.dense(handle)[:, 0])
    told = [record.getMessage() for record in caplog.records if "no index" in record.getMessage()]
    assert len(told) == 1
    assert f"{type(error).__name__}: {error}" in told[0]
    assert report(bench)["failed"] == CELLS
    assert report(bench)["indexed"] == 0
    assert bench.usage(handle).missed == 0


def test_where_no_thread_can_start_there_is_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unstarted(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(index_builds.threading, "Thread", Unstarted)
    bench = Bench(POLICY.format("graph"))
    handle = bench.open()
    world(bench, handle, 400)
    until(bench, handle, lambda r: r["failed"] == CELLS)


def test_closing_a_part_cancels_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    bench = Bench(POLICY.format("graph"))
    first = bench.open()
    world(bench, first)
    step(bench, first)
    assert gate.begun.wait(10)
    bench.close(first)
    assert report(bench)["sample_bytes"] == 0
    second = bench.open()
    world(bench, second, 700)
    close(step(bench, second, 1), bench.dense(second)[:, 0])
    assert report(bench)["builds"] == 0  # the thread is still at work for the one that is gone
    gate.open.set()
    ready(bench, second)
    assert report(bench)["cancelled"] == 1
    assert report(bench)["builds"] == CELLS


def test_forks_share_what_lies_below_their_length() -> None:
    bench = Bench(POLICY.format("graph"))
    parent = bench.open()
    world(bench, parent)
    ready(bench, parent)
    before = report(bench)
    long, short = bench.fork(parent, bench.k[parent].shape[1]), bench.fork(parent, 200)  # short: below `least`
    for target in (1, 6):
        for handle in (long, short):
            close(step(bench, handle, target), bench.dense(handle)[:, 0])
    after = report(bench)
    assert after["indexed"] == 2 * CELLS  # of the parent and the long one
    assert after["index_bytes"] == before["index_bytes"]
    bench.close(parent)
    close(step(bench, long, 3), bench.dense(long)[:, 0])
    assert report(bench)["index_bytes"] == before["index_bytes"]


def test_forks_of_a_prompt_share_its_queries_until_one_has_more(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.open.set()
    bench = Bench(POLICY.format("graph"))
    parent = bench.open()
    world(bench, parent)
    bytes_before = report(bench)["sample_bytes"]
    child, late = bench.fork(parent, PROMPT), bench.fork(parent, PROMPT - 600)
    close(bench.prefill(child, 3), bench.dense(child))  # copies what is shared, and adds to it
    assert 2 * bytes_before <= report(bench)["sample_bytes"] <= 3.1 * bytes_before  # the later one has a part of them
    for number, (handle, targets) in enumerate(((child, TARGETS), (late, 1), (parent, TARGETS))):  # as many as it has
        until(bench, handle, lambda r, number=number: r["builds"] >= (1 + number) * CELLS, targets=targets)
    for handle in (parent, child, late):
        bench.close(handle)
    assert report(bench)["sample_bytes"] == 0


def test_a_part_that_is_cut_back_forgets_what_lies_beyond() -> None:
    bench = Bench(POLICY.format("graph"))
    handle = bench.open()
    world(bench, handle)
    ready(bench, handle)
    hi = max(head.index.hi for head in chooser(bench)._builds.parts[handle].heads.values() if head.index)
    bench.feed(handle, hi, 1)
    assert report(bench)["indexed"] == CELLS  # nothing of what is indexed is lost
    start = place(5, PROMPT) + 1
    k = bench.random(40) * 0.3
    k[:, 3, :, 2] = 12.0  # what is asked for stands elsewhere now
    bench.feed(handle, start, 40, k=k)
    assert report(bench)["indexed"] == report(bench)["index_bytes"] == 0
    for target in (2, 4, 11):
        close(step(bench, handle, target), bench.dense(handle)[:, 0])
    assert bench.k[handle].shape[1] == start + 43


def test_a_build_of_what_was_cut_back_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    bench = Bench(POLICY.format("graph"))
    handle = bench.open()
    world(bench, handle)
    step(bench, handle)
    assert gate.begun.wait(10)
    left = sum(place(target, PROMPT) < 950 for target in range(TARGETS)) - HEADS  # each head asks for another
    q = asking([i * 7 % left for i in range(300)]) + 0.3 * bench.random(300, HEADS)
    bench.feed(handle, 950, 300, q=q, k=bench.random(300) * 0.3)
    gate.open.set()
    ready(bench, handle, targets=left)
    assert report(bench)["cancelled"] == 1
    for target in range(left):
        close(step(bench, handle, target), bench.dense(handle)[:, 0])


def test_what_comes_later_is_indexed_in_further_segments() -> None:
    bench = Bench(POLICY.format("graph"))
    handle = bench.open()
    world(bench, handle)
    ready(bench, handle)

    def segments() -> list[list[tuple[int, int]]]:
        heads = chooser(bench)._builds.parts[handle].heads.values()
        return [[(s.lo, s.hi) for s in head.index.segments] for head in heads if head.index]

    first = segments()
    assert all(len(of_head) == 1 for of_head in first)
    for more in range(1, 4):  # the second and third are made into one
        k = bench.random(170) * 0.3
        k[:, 20, :, 12] = 9.0 + more
        q = torch.zeros(LAYERS, 170, HEADS, D)
        q[..., 12] = 6.0
        bench.prefill(handle, 170, k=k, q=q + 0.3 * bench.random(170, HEADS))
        built = report(bench)["builds"]
        until(bench, handle, lambda r, built=built: r["builds"] == built + CELLS)
        for _ in range(3):
            close(bench.step(handle, q=q[:, :1], k=0.3 * bench.random(1)), bench.dense(handle)[:, 0])
    for before, found in zip(first, segments(), strict=True):
        assert found[0] == before[0]
        assert [lo for lo, _ in found[1:]] == [hi for _, hi in found[:-1]]
        assert len(found) < 4
        assert found[-1][1] > PROMPT + 400


def together(bench: Bench, handles: list[int], target: int) -> list[torch.Tensor]:
    """One decode batch of some sequences; out `[layers, heads, d]` of each."""
    starts = [bench.k[handle].shape[1] for handle in handles]
    bench._announce(tuple(Row(h, n, 1, (0, n + 1), True, True) for h, n in zip(handles, starts, strict=True)))
    fresh = [(0.3 * bench.random(1), bench.random(1)) for _ in handles]
    q = asking([target])
    for handle, (k, v) in zip(handles, fresh, strict=True):
        bench.k[handle], bench.v[handle] = torch.cat([bench.k[handle], k], 1), torch.cat([bench.v[handle], v], 1)
    outs = []
    for layer in range(LAYERS):
        k, v = (torch.cat([pair[i][layer].reshape(-1, D) for pair in fresh]) for i in (0, 1))
        bench.worker.handle(Fresh(1, bench._batch, layer, k, v))
        reply = bench.worker.handle(Query(1, bench._batch, layer, q[layer].reshape(-1, D).repeat(len(handles), 1)))
        assert isinstance(reply, Attended)
        outs.append(reply.out.reshape(len(handles), HEADS, D))
    bench.q = q
    return list(torch.stack(outs, 1))


def test_sequences_with_and_without_an_index_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for cost in ("CALL", "BYTE"):  # so that heads without an index are scanned
        monkeypatch.setattr(retrieval, cost, 0)
    bench = Bench(POLICY.format("graph"))
    handles = [bench.open() for _ in range(3)]
    for handle, n in zip(handles, (PROMPT, 180, 997), strict=True):  # the second is too short
        world(bench, handle, n)
    for i in range(400):
        if report(bench)["indexed"] == 2 * CELLS:
            break
        outs = together(bench, handles, i % TARGETS)
        for handle, out in zip(handles, outs, strict=True):
            close(out, bench.dense(handle)[:, 0], 0.05)
        wait(bench)
    assert report(bench)["indexed"] == report(bench)["builds"] == 2 * CELLS
    for i in range(6):
        for handle, out in zip(handles, together(bench, handles, i), strict=True):
            close(out, bench.dense(handle)[:, 0], 0.05)


def test_a_worker_that_only_stores_gets_what_it_needs() -> None:
    """With the prompt's keys come the queries that a graph needs."""
    bench = Bench(POLICY.format("graph"))
    handle = bench.open()
    q = asking([i * 7 % TARGETS for i in range(PROMPT)])
    bench.store(handle, PROMPT, keys(bench, PROMPT), q)
    assert bench.samples == (2,)
    ready(bench, handle)
    for i in range(3):
        close(step(bench, handle, i), bench.dense(handle)[:, 0])


def test_graphs_are_there_at_the_first_decoded_token() -> None:
    """They are built while the last quarter of the prompt comes, of keys that are there by then."""
    bench = Bench(POLICY.format("graph"))
    handle = bench.open()
    chunks = 3 * CELLS  # each of which starts a build
    n = 1600 + chunks
    q = asking([i * 7 % TARGETS for i in range(n)])
    k = keys(bench, n)
    bench.prefill(handle, 1600, q=q, k=k)
    for token in range(1600, n):
        wait(bench)
        bench.feed(handle, token, 1, prompt=n, q=q[:, token:], k=k[:, token:])
    wait(bench)
    close(step(bench, handle, 2), bench.dense(handle)[:, 0])
    assert report(bench)["indexed"] == CELLS


def test_queries_that_are_not_finite_harm_no_other() -> None:
    bench = Bench(POLICY.format("graph"))
    handle = bench.open()
    world(bench, handle)
    ready(bench, handle)
    q = asking([3])
    q[:, :, 2] = torch.nan
    out = bench.step(handle, q=q, k=0.3 * bench.random(1))
    others = [head for head in range(HEADS) if head // GROUP != 2 // GROUP]
    close(out[:, others], bench.dense(handle)[:, 0, others])


@pytest.mark.parametrize("scale", [0.3, 2.0, 5.0])
def test_the_missed_mass_is_as_estimated(scale: float) -> None:
    """Of diffuse queries half is missed, of peaked ones next to nothing."""
    bench = Bench(POLICY.format("graph").replace("missed=0.05", "missed=1"))
    handle = bench.open()
    bench.prefill(handle, 2500, q=scale * bench.random(2500, HEADS), k=bench.random(2500))
    for _ in range(400):
        bench.step(handle, q=scale * bench.random(1, HEADS))
        if report(bench)["indexed"] == CELLS:
            break
        wait(bench)
    listener = Listener(bench)
    true, estimates = [], []
    for _ in range(12):
        bench.step(handle, q=scale * bench.random(1, HEADS))
        a, b = listener.missed(bench, handle)
        true.append(a)
        estimates.append(b.reshape(a.shape))
    assert np.mean(true) > (0.4 if scale < 1 else 0.005)
    ratio = np.mean(estimates) / np.mean(true)
    assert 0.85 < ratio < 1.3  # the last page has no sketch and counts as nothing, so rather too much
    spread = np.abs(np.array(estimates) - np.array(true)).mean() / np.mean(true)
    assert spread < 0.5


def test_a_head_that_misses_much_asks_for_more_and_then_reads_all() -> None:
    bench = Bench(POLICY.format("graph").replace("missed=0.05", "missed=0.01"))
    handle = bench.open()
    bench.prefill(handle, PROMPT, q=0.2 * bench.random(PROMPT, HEADS))
    for _ in range(400):
        bench.step(handle, q=0.2 * bench.random(1, HEADS))
        if report(bench)["pauses"] >= CELLS:
            break
        wait(bench)
    counts = report(bench)
    assert counts["pauses"] >= CELLS
    heads = chooser(bench)._builds.parts[handle].heads.values()
    assert all(8 < head.top <= 8 * indexed.WIDEST for head in heads if head.pause)
    listener = Listener(bench)
    out = bench.step(handle, q=0.2 * bench.random(1, HEADS))
    _, estimates = listener.missed(bench, handle)
    paused = [head.pause > 0 for head in chooser(bench)._builds.parts[handle].heads.values()]
    assert any(paused)
    dense = bench.dense(handle)[:, 0]
    for (layer, head), state in chooser(bench)._builds.parts[handle].heads.items():
        if state.pause:
            own = slice(head * GROUP, (head + 1) * GROUP)
            close(out[layer, own], dense[layer, own], 1e-4)
            assert (estimates[layer, own] == 0).all()


def test_sampled_pages_lie_everywhere() -> None:
    for lo, hi in ((2, 2), (2, 50), (1, 65), (3, 1000), (0, 4096)):
        found = indexed._spread(lo, hi)
        assert len(found) == min(hi - lo, indexed.SAMPLED)
        assert (np.diff(found) > 0).all()
        if len(found):
            assert lo <= found[0] <= found[-1] < hi
            assert np.diff(found).max(initial=0) <= 2 * max(1, (hi - lo) / indexed.SAMPLED)


def test_without_faiss_the_worker_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise KernelsUnavailable("an index over keys needs FAISS")

    monkeypatch.setattr(faiss_host, "module", missing)
    with pytest.raises(KernelsUnavailable, match="needs FAISS"):
        Bench(POLICY.format("graph"))
    Bench("retrieval")  # needs none
