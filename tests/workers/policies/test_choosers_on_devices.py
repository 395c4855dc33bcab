"""Choosers beside kernels whose pages have the order of a GPU: sketches, choices and what stands for the rest are then
computed by torch, where the pages lie. A fake device stands for the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fake_device import FakeDevice
from policy_bench import HEADS, LAYERS, TIGHT, Bench, D, close, peaked, towards

from lamina_kernels.paged.pages import Order
from lamina_kernels.select import kernels
from lamina_workers.attention_worker.device_worker import DeviceWorker
from lamina_workers.attention_worker.kv_pool import KVPool

ADAPTIVE = ("retrieval", "page_top_k", "recycled")
LONG = 800


@pytest.fixture(autouse=True)
def _tokens_in_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for cost in ("CALL", "BYTE"):  # choosing is always worth it
        monkeypatch.setattr(f"lamina_workers.policies.retrieval.{cost}", 0)
    monkeypatch.setenv("LAMINA_KERNELS", "reference")
    kernels.cache_clear()
    yield
    kernels.cache_clear()


def bench_of(policy: str, dtype: str, device: bool = False) -> tuple[Bench, int]:
    bench = Bench(TIGHT[policy], dtype=dtype, pages=400)
    if device:
        bench.worker = DeviceWorker(bench.worker.config, 1, FakeDevice())
    handle = bench.open()
    bench.prefill(handle, LONG, **peaked(bench, handle, LONG, near=(17, 30)))
    return bench, handle


def decoded(bench: Bench, handle: int, steps: int = 6) -> torch.Tensor:
    q = towards(0).expand(LAYERS, 1, HEADS, D)
    return torch.stack([bench.step(handle, q=q) for _ in range(steps)])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("policy", ADAPTIVE)
def test_a_chooser_reads_little_and_finds_what_matters(policy: str, dtype: str) -> None:
    bench, handle = bench_of(policy, dtype)
    (pool,) = bench.worker.pools
    assert isinstance(pool, KVPool)
    assert pool.pages.layout.order is Order.TOKENS
    out = decoded(bench, handle)
    close(out[-1], bench.dense(handle)[:, 0], 0.02 if policy == "retrieval" else 0.15)
    usage = bench.usage(handle)
    assert 0 < usage.read < (1.2 if policy == "retrieval" else 0.8) * usage.whole


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_a_device_worker_answers_the_same(policy: str) -> None:
    here, there = (decoded(*bench_of(policy, "float32", device)) for device in (False, True))
    assert torch.equal(here, there)
