"""Eviction: which pages go, what is read of the rest, and what a part can go back to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kv_pools import pool_of
from policy_bench import GROUP, HEADS, KV_HEADS, LAYERS, PAGE, SCALE, Bench, D, close, pages_held, peaked, towards

from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_protocols.messages.messages import Announced, Announcement, Open, Row
from lamina_workers.kv_pages.eviction import CountedQuery, Float32, HeavyPages
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.kv_pages.kv_store import KVStore
from lamina_workers.kv_pages.parts import NO_PAGE
from lamina_workers.policies.policy import Bools
from lamina_workers.policies.query_samples import QuerySamples

POLICY = "heavy_hitter(sink=16, recent=40, budget=0.2, every=5)"
LONG = 640


def remaining(length: int, sink: int = 16, recent: int = 40, budget: float = 0.2) -> int:
    """Pages that a head holds once a decode step at `length` has evicted, its new one included."""
    freed = (length - recent + 1) // PAGE
    return -(-sink // PAGE) + int(np.ceil(budget * freed)) + -(-(length + 1) // PAGE) - freed


def seen(bench: Bench, handle: int) -> torch.Tensor:
    """The keys that a part holds, bool `[layers, heads, keys]`."""
    keys = bench.k[handle].shape[1]
    held = torch.from_numpy(bench.worker.store.part(handle).table != NO_PAGE)
    return held.repeat_interleave(PAGE, 2)[:, :, :keys].repeat_interleave(GROUP, 1)


def asking(bench: Bench, n: int, number: int = 0) -> torch.Tensor:
    return towards(number).expand(LAYERS, n, HEADS, D) + bench.random(n, HEADS) / 4


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_got_attention_stays_and_is_all_that_is_read(dtype: str) -> None:
    """In decode, in a prompt that goes on after it, in a fork, and after a cut."""
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    bench = Bench(POLICY, dtype=dtype)
    handle = bench.open()
    bench.prefill(handle, LONG, q=asking(bench, LONG), **peaked(bench, handle, LONG, near=(9, 20)))
    assert (pages_held(bench, handle) == LONG // PAGE).all()
    bench.step(handle, q=asking(bench, 1))  # it is counted, and evicted is in the next
    for p in range(LONG + 1, LONG + 40):
        out = bench.step(handle, q=asking(bench, 1))
        assert (pages_held(bench, handle) == remaining(p)).all()
        close(out, bench.dense(handle, seen(bench, handle)), tolerance)
    assert (bench.worker.store.part(handle).table[:, :, [0, 9, 20]] != NO_PAGE).all()
    usage = bench.usage(handle)
    assert (usage.held, usage.kept) == (LAYERS * KV_HEADS * remaining(LONG + 39), LAYERS * KV_HEADS * 43)
    length = bench.k[handle].shape[1]
    out = bench.feed(handle, length, 20)[:, -1]
    bench.q = bench.q[:, -1:]
    close(out, bench.dense(handle, seen(bench, handle)), tolerance)
    child = bench.fork(handle, length + 20)
    for part in (child, child, handle):
        close(bench.step(part), bench.dense(part, seen(bench, part)), tolerance)
    floor = bench.floors[0]
    assert length - PAGE < floor <= length + 20
    close(bench.feed(handle, floor, 1, True)[:, 0], bench.dense(handle, seen(bench, handle)), tolerance)
    reply = bench.worker.handle(Announcement(1, 1000, 2, (), (Row(child, floor - PAGE, 1, None, True),)))
    assert isinstance(reply, Announced)
    assert (reply.accepted, reply.starts) == (False, (0,))
    bench._batch = 1000
    for part in (handle, child):
        bench.close(part)
    assert bench.worker.store.free_pages == bench.worker.store.n_pages


def test_heads_evict_each_by_its_own_policy() -> None:
    bench = Bench("full", "heavy_hitter(sink=0, recent=16, budget=0.1)", "heavy_hitter(sink=32, recent=64, budget=0.5)")
    handle = bench.open()
    bench.prefill(handle, LONG)
    for _ in range(20):
        out = bench.step(handle)
        close(out, bench.dense(handle, seen(bench, handle)))
    last = LONG + 19
    first, second = remaining(last, 0, 16, 0.1), remaining(last, 32, 64, 0.5)
    assert (pages_held(bench, handle) == [[42, first, second]] * LAYERS).all()


def test_nothing_is_evicted_before_enough_queries_are_counted() -> None:
    """Of a part whose beginning is elsewhere, and of whose prompt there is no sample."""
    bench = Bench(POLICY)
    handle = bench.open(lo=320)
    bench.feed(handle, 320, 320)
    held = []
    for _ in range(20):
        bench.step(handle)
        held.append(int(pages_held(bench, handle).max()))
    assert held[:16] == [21] * 16
    assert held[17] < 10


def test_a_prompt_that_was_attended_elsewhere_is_counted_by_the_sample_that_came() -> None:
    bench = Bench(POLICY)
    handle = bench.open()
    near = peaked(bench, handle, LONG, near=(9, 20))
    bench.store(handle, LONG, near["k"], asking(bench, LONG))
    for _ in range(3):
        out = bench.step(handle, q=asking(bench, 1))
        close(out, bench.dense(handle, seen(bench, handle)))
    assert (pages_held(bench, handle) == remaining(LONG + 2)).all()
    assert (bench.worker.store.part(handle).table[:, :, [0, 9, 20]] != NO_PAGE).all()


def test_a_part_whose_range_is_full_evicts_as_the_query_goes_on() -> None:
    """It stores nothing any more, and evicts with the rows that read it, down to its last pages."""
    spec = LayerSpec(0, HEADS, KV_HEADS, D, D, SCALE, policies=(POLICY,) * KV_HEADS)
    made_for = HolderConfig((spec,), PAGE, "float32", 0)
    store = KVStore(made_for, HeadPolicies.of(made_for), 200)
    store.update([Open(1, 0, (0, 1, 2), 0, 320)], [Row(1, 0, 320, None, True)])
    store.stored([Row(1, 0, 320, None, True)])

    class Rising:
        def of(self, handle: int, cells: Bools, slots: int) -> Float32:
            return np.arange(slots, dtype=np.float32)[None].repeat(np.count_nonzero(cells), 0)

    store.attention = Rising()
    for start, freed in ((330, 18), (400, 20), (500, 20)):
        kept = 1 + int(np.ceil(0.2 * freed))
        reservation = store.update([], [Row(1, start, 1, (0, 320), False, True)])
        store.check_integrity()
        expected = [0, *range(freed - kept + 1, 20)]
        assert [np.flatnonzero(table != NO_PAGE).tolist() for table in store.part(1).table[0]] == [expected] * KV_HEADS
        assert reservation.floors == (freed * PAGE + 40 - 1,)
    store.revert()
    store.check_integrity()


def test_a_refused_announcement_evicts_nothing() -> None:
    bench = Bench(POLICY, pages=LAYERS * KV_HEADS * (LONG // PAGE + 1))
    handle = bench.open()
    bench.prefill(handle, LONG)
    bench.step(handle)
    before = bench.worker.store.part(handle).table.copy()
    reply = bench.worker.handle(Announcement(1, 900, 1, (), (Row(handle, LONG + 1, 900, (0, LONG + 901), True, True),)))
    assert isinstance(reply, Announced)
    assert not reply.accepted
    assert (bench.worker.store.part(handle).table == before).all()
    bench.worker.store.check_integrity()


def test_shares_of_pages_are_those_of_exact_attention() -> None:
    """A page counts by the queries that could see it alone."""
    bench = Bench("full")
    handle = bench.open()
    bench.prefill(handle, 200)
    pool, part = pool_of(bench.worker), bench.worker.store.part(handle)
    sampled, q = np.arange(0, 200, 4), torch.randn(200, 1, GROUP, D).bfloat16()
    samples, spec = QuerySamples(1 << 20), LayerSpec(1, HEADS, KV_HEADS, D, D, SCALE)
    samples.add(handle, 1, (2,), sampled, q[sampled])
    heavy, decoded = HeavyPages(pool.pages, samples), torch.randn(KV_HEADS * GROUP, D)
    heavy.count(CountedQuery(handle, part, (2,), 0, GROUP, 200), 1, spec, decoded)
    got, queries = torch.zeros(GROUP, 12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    for p in [*sampled.tolist(), 200]:
        full = min(p, 199) // PAGE
        vector = decoded[2 * GROUP :] if p == 200 else q[p, 0]
        mass = (vector.double() @ bench.k[handle][1, : full * PAGE, 2].double().T * SCALE).exp()
        mass = mass.view(GROUP, full, PAGE).sum(-1)
        got[:, :full] += mass / mass.sum(-1, keepdim=True)
        queries[:full] += 1
    cells = np.zeros((LAYERS, KV_HEADS), np.bool_)
    cells[1, 2] = True
    found = heavy.of(handle, cells, 12)
    assert found is not None
    np.testing.assert_allclose(found[0], (got / queries).amax(0), rtol=1e-4)
    heavy.fork(5, handle, 150)
    assert heavy.of(5, ~cells, 9) is None
    cut = heavy.of(5, cells, 12)
    assert cut is not None
    np.testing.assert_array_equal(cut[0], [*found[0, :9], 0, 0, 0])
