"""`heavy_hitter`: which pages are given up, what is read of the rest, and what a part goes back to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kv_pools import pool_of
from policy_bench import GROUP, HEADS, KV_HEADS, LAYERS, PAGE, SCALE, Bench, D, close, pages_held, peaked, towards

from lamina_workers.policies.catalogue import parse

POLICY = "heavy_hitter(sink=16, recent=40, budget=0.2, every=5)"
LONG = 640


def remaining(length: int, sink: int = 16, recent: int = 40, budget: float = 0.2) -> int:
    """Pages that a head reads in a decode step at `length`, its new one included."""
    behind = (length - recent + 1) // PAGE
    return -(-sink // PAGE) + int(np.ceil(budget * behind)) + -(-(length + 1) // PAGE) - behind


def chooser(bench: Bench, policy: str = POLICY) -> Any:
    return pool_of(bench.worker).reader._choosers._choosers[parse(policy)]


def pages(bench: Bench, handle: int, *policies: str) -> torch.Tensor:
    """The pages that are not given up, bool `[layers, heads, pages]`; `policies`: of each head."""
    kept = torch.ones(LAYERS, KV_HEADS, -(-bench.k[handle].shape[1] // PAGE), dtype=torch.bool)
    for head, policy in enumerate(policies or (POLICY,) * KV_HEADS):
        for layer in range(LAYERS if policy != "full" else 0):
            count = chooser(bench, policy).kept.get(handle, {}).get((layer, head))
            if count is not None:
                kept[layer, head, : len(count.lost)] = torch.from_numpy(~count.lost)
    return kept


def seen(bench: Bench, handle: int, *policies: str) -> torch.Tensor:
    """The keys on these pages, bool `[layers, heads, keys]`."""
    keys = bench.k[handle].shape[1]
    return pages(bench, handle, *policies).repeat_interleave(PAGE, 2)[:, :, :keys].repeat_interleave(GROUP, 1)


def asking(bench: Bench, n: int, number: int = 0) -> torch.Tensor:
    return towards(number).expand(LAYERS, n, HEADS, D) + bench.random(n, HEADS) / 4


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_got_attention_is_all_that_is_read(dtype: str) -> None:
    """In decode, in a fork, and after a cut; a prompt that goes on is read whole."""
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    bench = Bench(POLICY, dtype=dtype)
    handle = bench.open()
    bench.prefill(handle, LONG, q=asking(bench, LONG), **peaked(bench, handle, LONG, near=(9, 20)))
    bench.step(handle, q=asking(bench, 1))  # it is counted, and pages are given up in the next
    assert pages(bench, handle).all()
    for p in range(LONG + 1, LONG + 40):
        out = bench.step(handle, q=asking(bench, 1))
        assert (pages(bench, handle).sum(2) == remaining(p)).all()
        close(out, bench.dense(handle, seen(bench, handle)), tolerance)
    assert pages(bench, handle)[:, :, [0, 9, 20]].all()
    usage = bench.usage(handle)
    assert usage.held == usage.kept == LAYERS * KV_HEADS * 43
    assert usage.read < 0.5 * usage.whole
    length = bench.k[handle].shape[1]
    close(bench.feed(handle, length, 20), bench.dense(handle), tolerance)
    child = bench.fork(handle, length + 20)
    for part in (child, child, handle):
        close(bench.step(part), bench.dense(part, seen(bench, part)), tolerance)
    before = pages(bench, handle)
    out = bench.feed(handle, 300, 1, True)[:, 0]
    keys = seen(bench, handle)
    keys[:, :, (300 - 40 + 1) // PAGE * PAGE :] = True  # recent ones are read in any case
    close(out, bench.dense(handle, keys), tolerance)
    assert (pages(bench, handle)[:, :, :18] <= before[:, :, :18]).all()  # nothing comes back
    close(bench.step(child), bench.dense(child, seen(bench, child)), tolerance)
    for part in (handle, child):
        bench.close(part)
    assert not chooser(bench).kept
    assert bench.worker.store.free_pages == bench.worker.store.n_pages


def test_heads_give_up_each_by_its_own_policy() -> None:
    policies = "full", "heavy_hitter(sink=0, recent=16, budget=0.1)", "heavy_hitter(sink=32, recent=64, budget=0.5)"
    bench = Bench(*policies)
    handle = bench.open()
    bench.prefill(handle, LONG)
    for _ in range(20):
        out = bench.step(handle)
        close(out, bench.dense(handle, seen(bench, handle, *policies)))
    last = LONG + 19
    first, second = remaining(last, 0, 16, 0.1), remaining(last, 32, 64, 0.5)
    assert pages(bench, handle, *policies).sum(2).tolist() == [[42, first, second]] * LAYERS
    assert (pages_held(bench, handle) == 42).all()


def test_nothing_is_given_up_before_enough_queries_are_counted() -> None:
    """Of a part whose beginning is elsewhere, and of whose prompt there is no sample."""
    bench = Bench(POLICY)
    handle = bench.open(lo=320)
    bench.feed(handle, 320, 320)
    lost = []
    for _ in range(20):
        bench.step(handle)
        lost.append({int(count.lost.sum()) for count in chooser(bench).kept[handle].values()})
    assert lost[:16] == [{0}] * 16
    assert min(lost[17]) > 10


def test_a_prompt_that_was_attended_elsewhere_is_counted_by_the_sample_that_came() -> None:
    bench = Bench(POLICY)
    handle = bench.open()
    near = peaked(bench, handle, LONG, near=(9, 20))
    bench.store(handle, LONG, near["k"], asking(bench, LONG))
    for _ in range(3):
        out = bench.step(handle, q=asking(bench, 1))
        close(out, bench.dense(handle, seen(bench, handle)))
    assert (pages(bench, handle).sum(2) == remaining(LONG + 2)).all()
    assert pages(bench, handle)[:, :, [0, 9, 20]].all()


def test_shares_of_pages_are_those_of_exact_attention() -> None:
    """A page counts by the queries that could see it alone."""
    bench = Bench(POLICY)
    handle = bench.open()
    bench.prefill(handle, LONG)
    bench.step(handle)
    count = chooser(bench).kept[handle][1, 2]
    heads, sampled, q = chooser(bench).at.samples.between(handle, 1, 0, LONG)
    vectors = [*q[:, heads.index(2)].float(), bench.q[1, 0, 2 * GROUP :]]
    got, visible = torch.zeros(GROUP, LONG // PAGE, dtype=torch.float64), np.zeros(LONG // PAGE)
    for p, vector in zip([*sampled.tolist(), LONG], vectors, strict=True):
        mass = (vector.double() @ bench.k[handle][1, : p // PAGE * PAGE, 2].double().T * SCALE).exp()
        mass = mass.view(GROUP, p // PAGE, PAGE).sum(-1)
        if p >= PAGE:
            got[:, : p // PAGE] += mass / mass.sum(-1, keepdim=True)
        visible[: p // PAGE] += 1
    assert count.queries == len(vectors) > 32
    np.testing.assert_array_equal(count.visible, visible)
    np.testing.assert_allclose(count.got, got, rtol=1e-4)
