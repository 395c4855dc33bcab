"""Prompts' queries at one worker: what is kept, when choosers are shown it, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from kv_pools import pool_of
from policy_bench import GROUP, HEADS, KV_HEADS, LAYERS, Bench, D

from lamina_protocols.errors import ProtocolError
from lamina_protocols.messages.messages import Exchange, FetchedSample, FetchSample, Fresh, Query, Row, Sample
from lamina_workers.policies.chooser import Shown
from lamina_workers.policies.query_samples import QuerySamples

pytest.importorskip("faiss")

POLICY = "retrieval(index=graph, sink=16, recent=16, top=8, least=100)"
N = 200


class Watched(Bench):
    """A worker whose chooser only notes what it is shown, and the key of each part's last token then."""

    def __init__(self, *policies: str, dtype: str = "float32") -> None:
        super().__init__(*policies, dtype=dtype)
        self.shown: list[Shown] = []
        self.last: list[torch.Tensor] = []
        reader = pool_of(self.worker).reader

        def observe(shown: Shown) -> None:
            self.shown.append(shown)
            keys = reader._keys(shown.handle, shown.layer, shown.head, 0, shown.tokens)
            self.last.append(torch.from_numpy(keys[-1]))

        for observer in reader._choosers._choosers.values():
            observer.observe = observe  # type: ignore[method-assign]
        self.samples_kept = reader._samples


def vectors(bench: Bench, n: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return bench.random(n, HEADS), bench.random(n), bench.random(n)


@pytest.mark.parametrize("way", ["query, fresh", "exchange", "fused", "elsewhere"])
def test_queries_are_shown_once_the_keys_are_stored(way: str) -> None:
    bench = Watched(POLICY)
    handle = bench.open()
    q, k, v = vectors(bench)
    if way == "elsewhere":
        bench.store(handle, N, k, q, chunk=80)
    for start in range(0, 0 if way == "elsewhere" else N, 80):
        at = slice(start, min(start + 80, N))
        read = (0, at.stop if way == "fused" else start)
        bench._announce((Row(handle, start, at.stop - start, read, True, prompt=N),))
        assert bench.samples == ()
        for layer in range(LAYERS):
            ids = 1, bench._batch, layer
            asked, *fresh = (x[layer, at].reshape(-1, D) for x in (q, k, v))
            if way == "query, fresh":
                bench.worker.handle(Query(*ids, asked))
                before = len(bench.shown)
                bench.worker.handle(Fresh(*ids, *fresh))
                assert len(bench.shown) == before + KV_HEADS
            else:
                bench.worker.handle(Exchange(*ids, asked, *fresh))
    bench.worker.settle()
    assert len(bench.shown) == 3 * LAYERS * KV_HEADS
    for shown, last in zip(bench.shown, bench.last, strict=True):
        end = shown.tokens
        assert (shown.stride, shown.left, shown.whole, shown.lo) == (2, N - end, N, 0)
        assert shown.positions.tolist() == list(range((end - 1) // 80 * 80, end, 2))
        own = q[shown.layer, shown.positions, shown.head * GROUP : (shown.head + 1) * GROUP]
        np.testing.assert_allclose(shown.q, own, rtol=1e-2)
        torch.testing.assert_close(last, k[shown.layer, end - 1, shown.head])


def test_each_query_is_shown_once() -> None:
    bench = Watched(POLICY)
    handle = bench.open()
    bench.prefill(handle, N, 80)
    assert (len(bench.shown), len(bench.shown[0].positions)) == (3 * LAYERS * KV_HEADS, 40)
    bench.shown.clear()
    bench._announce((Row(handle, 100, 20, (0, 100), False, prompt=N),))  # as a part that others are rebuilt beside
    bench.worker.handle(Query(1, bench._batch, 0, torch.zeros(20 * HEADS, D)))
    assert not bench.shown
    bench.feed(handle, 190, 10, prompt=N)  # these are new
    assert {shown.positions.tolist()[0] for shown in bench.shown} == {190}
    fork = bench.fork(handle, 150)
    bench.feed(fork, 150, 10, prompt=160)
    _, positions, _ = bench.samples_kept.between(fork, 0, 0, N)
    assert positions.tolist() == list(range(0, 160, 2))
    bytes_of_two = bench.samples_kept.nbytes
    bench.close(handle)
    assert 0 < bench.samples_kept.nbytes < bytes_of_two
    bench.close(fork)
    assert bench.samples_kept.nbytes == 0


def test_of_decode_of_short_prompts_and_of_copies_nothing_is_kept() -> None:
    bench = Watched("retrieval(index=graph, least=1000)")
    handle = bench.open()
    bench.prefill(handle, 450)
    bench.step(handle)
    bench.feed(handle, 451, 600)  # the row of a copy says nothing of a prompt
    assert not bench.shown
    bench._announce((Row(bench.open(), 0, 400, None, True, prompt=600),))
    assert bench.samples == (2,)


def test_a_head_with_another_policy_is_left_out() -> None:
    bench = Watched("full", POLICY, "streaming(sink=16, recent=64)")
    handle = bench.open()
    bench.prefill(handle, N)
    assert {shown.head for shown in bench.shown} == {1}
    reply = bench.worker.handle(FetchSample(1, 1, 1, handle, 50, 100))
    assert isinstance(reply, FetchedSample)
    assert (reply.heads, reply.positions) == ((1,), tuple(range(50, 100, 2)))
    assert tuple(reply.q.shape) == (25 * GROUP, D)


WRONG = {
    "another part": {"handle": 9},
    "other heads": {"heads": (0, 1)},
    "a position twice": {"positions": (4, 4)},
    "positions that fall": {"positions": (6, 4)},
    "a position behind the prompt": {"positions": (4, N)},
    "too few vectors": {"q": torch.zeros(11, D)},
    "too wide vectors": {"q": torch.zeros(12, D + 1)},
    "nothing": {"positions": (), "q": torch.zeros(0, D)},
    "integers": {"q": torch.zeros(12, D, dtype=torch.int8)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_samples_are_refused(wrong: str) -> None:
    bench = Watched(POLICY)
    bench._announce((Row(bench.open(), 0, N, None, True, prompt=N),))
    right = Sample(1, bench._batch, 0, 1, (0, 1, 2), (4, 6), torch.zeros(2 * HEADS, D))
    with pytest.raises(ProtocolError, match="sample"):
        bench.worker.handle(dataclasses.replace(right, **WRONG[wrong]))
    bench.worker.handle(right)


def test_who_learns_nothing_refuses_samples() -> None:
    for policy in ("full", "retrieval"):
        bench = Bench(policy)
        bench._announce((Row(bench.open(), 0, N, None, True, prompt=N),))
        assert bench.samples == ()
        with pytest.raises(ProtocolError, match="wants none"):
            bench.worker.handle(Sample(1, bench._batch, 0, 1, (), (), torch.zeros(0, 0)))
        fetched = bench.worker.handle(FetchSample(1, 1, 0, 1, 0, 9))
        assert isinstance(fetched, FetchedSample)
        assert fetched.positions == ()


def test_all_samples_together_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    samples = QuerySamples(5000)
    q, positions = torch.zeros(8, 1, 2, 16), np.arange(8)
    for handle in range(9):
        samples.add(handle, 0, (0,), positions, q)
        samples.fork(handle + 100, handle, 8)
    assert 5000 <= samples.nbytes < 10_000
    assert [samples.positions(handle, 0, 0) for handle in (0, 8)] == [8, 0]
    assert len(caplog.records) == 1
    other = QuerySamples(50_000)
    for heads in ((0,), (1,)):  # other ones than before: the sample begins anew
        assert other.add(1, 0, heads, positions, q) == 0
    assert (other.positions(1, 0, 0), other.positions(1, 0, 1)) == (0, 8)
    other.forget(1)
    assert other.nbytes == 0
    for handle in range(9):
        samples.forget(handle)
        samples.forget(handle + 100)
    assert samples.nbytes == 0
