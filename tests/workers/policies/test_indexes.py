"""Indexes over keys: what they find, that all can be found, and that they hold while others are built."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from bench.index_baselines import ScanSegment, plain_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_workers.errors import KernelsUnavailable, KVError
from lamina_workers.indexes import faiss_host
from lamina_workers.indexes.graph_index import build_graph, connect, link, reachable
from lamina_workers.indexes.key_index import Found, KeyIndex, Segment, ascending, merge
from lamina_workers.indexes.query_sample import QuerySample

GROUP, D, TOP = 3, 32, 50


@pytest.fixture
def faiss() -> None:
    pytest.importorskip("faiss")
    faiss_host.set_threads(1)


def world(n: int, seed: int = 0) -> tuple[np.ndarray, Callable[[int, int], np.ndarray]]:
    """Keys [n, D], and a source of queries [m, GROUP, D] that are far from all of them (out of distribution).

    Keys are of 64 kinds, their norms uneven. A query asks for a mix of a few kinds in a space that is turned by its
    head, and has a large constant part, as attention's queries do.
    """
    rng = np.random.default_rng(seed)
    kinds = rng.standard_normal((64, D))
    keys = kinds[rng.integers(0, 64, n)] + 0.9 * rng.standard_normal((n, D))
    keys *= rng.lognormal(0, 0.25, (n, 1))
    turns = np.eye(D) + 0.35 * rng.standard_normal((GROUP, D, D))
    shift = 4 * rng.standard_normal((GROUP, D))

    def ask(m: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng((seed, 1))
        wanted = rng.dirichlet(np.full(64, 0.05), (m, GROUP)) @ kinds
        q = np.einsum("mgd,gde->mge", wanted, turns) + 0.2 * rng.standard_normal((m, GROUP, D)) + shift
        return np.ascontiguousarray(q, np.float32)

    return np.ascontiguousarray(keys, np.float32), ask


def exact(keys: np.ndarray, q: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest inner products of each query, ascending, int64 [group, k]."""
    return np.sort(np.argsort(-(q @ keys.T), axis=1, kind="stable")[:, :k], axis=1)


def recall(found: list[Found], truth: list[np.ndarray], lo: int = 0) -> float:
    rows = [(a, b) for f, t in zip(found, truth, strict=True) for a, b in zip(f.positions - lo, t, strict=True)]
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in rows]))


def check(found: Found, group: int, k: int, lo: int, hi: int) -> None:
    """What every search promises."""
    assert found.positions.shape == found.scores.shape == (group, k)
    assert found.positions.dtype == np.int64
    assert found.scores.dtype == np.float32
    assert np.isfinite(found.scores).all()
    assert (np.diff(found.positions, axis=1) > 0).all()
    assert k == 0 or (found.positions.min() >= lo and found.positions.max() < hi)


def segment(kind: str, keys: np.ndarray, lo: int) -> Segment:
    queries = np.random.default_rng(9).standard_normal((64, keys.shape[1])).astype(np.float32)
    return build_graph(keys, queries, lo, listed=32, slots=16)


KINDS = ("graph",)


class TestEveryKind:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 5), (2, 1), (37, 100), (64, 64), (500, 7), (501, 500)])
    def test_returns_ascending_positions_of_the_segment(self, faiss: None, kind: str, n: int, k: int) -> None:
        rng = np.random.default_rng(n)
        keys = rng.standard_normal((n, 24)).astype(np.float32)
        built = segment(kind, keys, 1000)
        assert (built.lo, built.hi) == (1000, 1000 + n)
        assert built.nbytes > 0
        found = built.search(rng.standard_normal((GROUP, 24)).astype(np.float32), k)
        check(found, GROUP, min(k, n), 1000, 1000 + n)
        assert found.distances > 0

    @pytest.mark.parametrize("kind", KINDS)
    def test_scores_are_inner_products(self, faiss: None, kind: str) -> None:
        rng = np.random.default_rng(1)
        keys, q = (rng.standard_normal((m, 40)).astype(np.float32) for m in (300, GROUP))
        found = segment(kind, keys, 7).search(q, 20)
        expected = np.einsum("gd,gkd->gk", q, keys[found.positions - 7])
        np.testing.assert_allclose(found.scores, expected, atol=0.1)  # keys in bfloat16

    @pytest.mark.parametrize("kind", KINDS)
    def test_equal_keys_are_each_found_once(self, faiss: None, kind: str) -> None:
        keys = np.repeat(np.random.default_rng(2).standard_normal((3, 16)).astype(np.float32), 50, axis=0)
        check(segment(kind, keys, 0).search(np.ones((GROUP, 16), np.float32), 150), GROUP, 150, 0, 150)
        zeros = segment(kind, np.zeros((70, 16), np.float32), 0)
        check(zeros.search(np.ones((1, 16), np.float32), 70), 1, 70, 0, 70)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e20])
    def test_refuses_what_would_not_stay_finite(self, faiss: None, kind: str, wrong: float) -> None:
        keys = np.ones((40, 16), np.float32)
        built = segment(kind, keys, 0)
        q = np.ones((GROUP, 16), np.float32)
        q[1, 3] = wrong
        with pytest.raises(ValueError, match="beyond 1e\\+15 or NaN"):
            built.search(q, 5)
        keys = keys.copy()
        keys[11, 2] = wrong
        with pytest.raises(ValueError, match="position 116"):
            segment(kind, keys, 105)

    @pytest.mark.parametrize("kind", KINDS)
    def test_refuses_wrong_shapes(self, faiss: None, kind: str) -> None:
        built = segment(kind, np.ones((40, 16), np.float32), 0)
        for q in (np.ones((3, 15), np.float32), np.ones(16, np.float32), np.ones((3, 16))):
            with pytest.raises(ValueError, match=r"allowed is float32 \[group, 16\]"):
                built.search(q, 5)
        with pytest.raises(ValueError, match="k is 0"):
            built.search(np.ones((3, 16), np.float32), 0)
        for keys in (np.ones((4, 16)), np.ones((0, 16), np.float32), np.ones((16, 4), np.float32).T):
            with pytest.raises(ValueError, match="keys are"):
                segment(kind, keys, 0)
        with pytest.raises(ValueError, match="lo is -1"):
            segment(kind, np.ones((40, 16), np.float32), -1)


class TestGraph:
    def test_beats_plain_hnsw_at_equal_work(self, faiss: None) -> None:
        keys, ask = world(3000)
        sample = QuerySample(1, GROUP, D, capacity=1024)
        sample.offer(np.arange(1024), torch.from_numpy(ask(1024, 3))[:, None])
        built = build_graph(keys, sample.of(0), 0, listed=64)
        plain = plain_graph(keys, 16)
        q = ask(40, 4)
        truth = [exact(keys, x, TOP) for x in q]
        found = [built.search(x, TOP, 80) for x in q]
        work = sum(f.distances for f in found)
        assert work < 0.25 * len(keys) * q.shape[0] * GROUP
        spent, effort, others = 0, TOP, []
        while spent < work:  # let HNSW compute at least as many inner products
            before = faiss_host.graph_distances()
            others = [faiss_host.search(plain, x, TOP, faiss_host.graph_effort(effort)) for x in q]
            spent, effort = faiss_host.graph_distances() - before, effort + max(4, effort // 8)
        peer = recall([ascending(i, s, 0) for i, s in others], truth)
        assert recall(found, truth) > 0.97
        assert recall(found, truth) > peer + 0.1

    def test_counts_what_it_computed(self, faiss: None) -> None:
        keys, ask = world(2000)
        built = build_graph(keys, ask(200, 1).reshape(-1, D), 0, listed=50)
        little, much = (built.search(ask(1, 2)[0], 10, effort).distances for effort in (10, 200))
        assert 0 < little < much <= GROUP * len(keys) + GROUP

    def test_every_key_can_be_found_when_no_query_asks_for_most(self, faiss: None) -> None:
        keys, ask = world(1500)
        built = build_graph(keys, ask(1, 1).reshape(-1, D), 0, listed=8, slots=4)
        found = built.search(ask(1, 2)[0], len(keys))
        np.testing.assert_array_equal(found.positions, np.tile(np.arange(len(keys)), (GROUP, 1)))

    def test_leaves_out_queries_that_are_not_finite(self, faiss: None) -> None:
        keys, ask = world(300)
        queries = ask(30, 1).reshape(-1, D)
        broken = np.concatenate([queries, np.full((2, D), np.nan, np.float32)])
        q = ask(1, 2)[0]
        ours, theirs = (build_graph(keys, x).search(q, 20) for x in (queries, broken))
        np.testing.assert_array_equal(ours.positions, theirs.positions)
        with pytest.raises(ValueError, match="no query is finite"):
            build_graph(keys, broken[-2:])
        with pytest.raises(ValueError, match=r"allowed is float32 \[m, 32\]"):
            build_graph(keys, queries[:, :16])

    def test_holds_at_the_largest_numbers(self, faiss: None) -> None:
        keys, ask = world(300)
        largest = keys * np.float32(9e14 / np.abs(keys).max())
        queries = ask(20, 1).reshape(-1, D)
        q = queries[:GROUP] * np.float32(9e14 / np.abs(queries).max())
        check(build_graph(largest, queries * np.float32(1e12)).search(q, 300), GROUP, 300, 0, 300)


class TestLinks:
    @settings(max_examples=40)
    @given(st.integers(2, 60), st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from([4, 8, 16]))
    def test_all_keys_become_reachable(self, n: int, m: int, seed: int, slots: int) -> None:
        rng = np.random.default_rng(seed)
        keys = rng.standard_normal((n, 8)).astype(np.float32)
        k = int(rng.integers(2, min(n, 12) + 1))
        lists = np.stack([rng.permutation(n)[:k] for _ in range(m)]).astype(np.int32)
        links = link(keys, lists, slots, slots - 2)
        assert links.shape == (n, slots)
        entry = int(lists[0, 0])
        before = reachable(links, entry)
        lonely = np.flatnonzero(~before).astype(np.int32)
        connect(links, entry, lonely, lists[rng.integers(0, m, len(lonely))])
        assert reachable(links, entry).all()
        for key, row in enumerate(links):
            used = row[row >= 0]
            assert (row[: len(used)] >= 0).all()  # FAISS stops at the first -1
            assert len(np.unique(used)) == len(used)
            assert key not in used

    def test_refuses_links_without_room(self) -> None:
        links = np.tile(np.arange(4, dtype=np.int32), (5, 1))
        with pytest.raises(ValueError, match="allowed are at most 2"):
            connect(links, 0, np.array([4], np.int32), np.array([[0]], np.int32))


class TestKeyIndex:
    def test_merges_segments(self) -> None:
        keys, ask = world(700)
        index = KeyIndex(5)
        assert index.search(ask(1, 1)[0], 10).positions.shape == (GROUP, 0)
        for first, last in ((0, 64), (64, 333), (333, 700)):
            index.add(ScanSegment(keys[first:last], 5 + first))
            assert (index.lo, index.hi) == (5, 5 + last)
            for k in (1, 40, 1000):
                q = ask(1, k)[0]
                found = index.search(q, k)
                check(found, GROUP, min(k, last), 5, 5 + last)
                np.testing.assert_array_equal(found.positions - 5, exact(keys[:last], q, k))

    def test_refuses_gaps_and_overlaps(self) -> None:
        index = KeyIndex(10)
        one = ScanSegment(np.ones((8, 16), np.float32), 10)
        for lo in (0, 9, 11):
            with pytest.raises(KVError, match="must begin at 10"):
                index.add(ScanSegment(np.ones((8, 16), np.float32), lo))
        index.add(one)
        with pytest.raises(KVError, match="must begin at 18"):
            index.add(one)
        assert index.segments == (one,)
        with pytest.raises(ValueError, match="lo is -1"):
            KeyIndex(-1)

    def test_merge_keeps_the_best(self) -> None:
        one = Found(np.array([[1, 5]]), np.array([[2.0, 9.0]], np.float32), 3)
        two = Found(np.array([[7, 8]]), np.array([[1.0, 4.0]], np.float32), 4)
        best = merge([one, two], 3)
        assert best.positions.tolist() == [[1, 5, 8]]
        assert best.scores.tolist() == [[2.0, 9.0, 4.0]]
        assert best.distances == 7

    def test_is_searched_by_several_threads_while_a_segment_is_built(self, faiss: None) -> None:
        keys, ask = world(3000)
        queries, asked = ask(300, 1).reshape(-1, D), ask(8, 2)
        index = KeyIndex()
        index.add(build_graph(keys[:1500], queries, 0, listed=64))
        alone = [index.search(x, 20).positions for x in asked]
        searching, built = threading.Event(), threading.Event()
        wrong: list[str] = []

        def search() -> None:
            until, ends = 3, set()
            while until:  # a few rounds more once the segment is there
                until -= built.is_set()
                for x, expected in zip(asked, alone, strict=True):
                    segments = index.segments
                    found = index.search(x, 20)
                    ends.add(int(found.positions.max()) >= 1500)
                    if len(segments) == 1 and len(index.segments) == 1 and (found.positions != expected).any():
                        wrong.append(f"{found.positions} where {expected} was found alone")
                searching.set()
            if True not in ends:
                wrong.append("nothing of the new segment was found")

        threads = [threading.Thread(target=search) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            assert searching.wait(60)
            index.add(build_graph(keys[1500:], queries, 1500, listed=64))
        finally:
            built.set()
            for thread in threads:
                thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert not wrong
        assert index.hi == 3000


class TestQuerySample:
    @settings(max_examples=50)
    @given(st.lists(st.integers(1, 90), min_size=1, max_size=20), st.integers(8, 64), st.integers(1, 5))
    def test_keeps_true_queries_later_ones_denser(self, sizes: list[int], capacity: int, stride: int) -> None:
        sample = QuerySample(2, 2, 3, capacity)
        q = torch.arange(sum(sizes) * 12).remainder(256).float().view(-1, 2, 2, 3)
        first = 0
        for size in sizes:
            positions = np.arange(-(-first // stride) * stride, first + size, stride)
            assert sample.offer(positions, q[positions]) == 0
            first += size
        kept = sample.positions
        assert len(kept) == len(sample) <= capacity
        assert len(kept) >= min(capacity // 2, -(-first // stride))
        assert (np.diff(kept) > 0).all()
        assert kept[-1] == sample.last == (first - 1) // stride * stride
        assert torch.equal(sample.queries.float(), q[kept])
        np.testing.assert_array_equal(sample.of(1), q[kept, 1].flatten(0, 1))
        if len(kept) > 8:
            gaps = np.diff(kept)
            assert gaps[: len(gaps) // 2].mean() >= gaps[len(gaps) // 2 :].mean()
        apart = sample.copy()
        apart.cut(first // 2)
        assert apart.positions.tolist() == [position for position in kept if position < first // 2]
        assert sample.positions.tolist() == kept.tolist()

    def test_passes_over_what_it_has_seen(self) -> None:
        sample = QuerySample(1, 1, 1, 8)
        assert sample.offer(np.arange(4), torch.zeros(4, 1, 1, 1)) == 0
        assert sample.offer(np.arange(2, 6), torch.ones(4, 1, 1, 1)) == 2
        assert sample.positions.tolist() == [0, 1, 2, 3, 4, 5]
        assert sample.queries.ravel().tolist() == [0, 0, 0, 0, 1, 1]

    def test_names_what_is_allowed(self) -> None:
        with pytest.raises(ValueError, match="allowed are 1, 1, 1, 8 or more"):
            QuerySample(1, 1, 1, 7)
        with pytest.raises(ValueError, match=r"allowed is \[4, 2, 2, 3\]"):
            QuerySample(2, 2, 3).offer(np.arange(4), torch.zeros(4, 2, 3, 2))


def without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where FAISS is not installed."""
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(faiss_host, "module", faiss_host.module.__wrapped__)


def test_without_faiss_an_index_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without_faiss(monkeypatch)
    keys = np.ones((8, 16), np.float32)
    with pytest.raises(KernelsUnavailable, match="pip install faiss-cpu"):
        build_graph(keys, keys)
