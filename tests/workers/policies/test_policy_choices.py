"""Each policy beside its own definition: what it chooses, what stands for the rest, and what is counted of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from kv_pools import pool_of
from policy_bench import (
    GROUP,
    HEADS,
    KV_HEADS,
    LAYERS,
    PAGE,
    STATIC,
    TIGHT,
    TOKEN_BYTES,
    Bench,
    D,
    close,
    kept_of_razor,
    pages_held,
    peaked,
    razor_dense,
    towards,
)

from lamina_protocols.messages.messages import Announced, Announcement, Row
from lamina_workers.policies.catalogue import parse

LONG = 1120  # tokens, with which every policy has something to choose


@pytest.fixture(autouse=True)
def _choosing_is_always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for cost in ("CALL", "BYTE"):  # choosing is always worth it
        monkeypatch.setattr(f"lamina_workers.policies.retrieval.{cost}", 0)


def test_page_top_k_reads_the_pages_of_the_highest_bounds() -> None:
    bench = Bench(TIGHT["page_top_k"])
    handle = bench.open()
    bench.prefill(handle, 480)
    out = bench.step(handle)
    k = bench.k[handle][:, :480].unflatten(1, (-1, PAGE))
    q = bench.q[:, 0].unflatten(1, (KV_HEADS, GROUP))[:, None]
    low = k.amin(2).bfloat16().float()  # as sketches have them
    high = low + 15 * ((k.amax(2) - low) / 15).bfloat16().float()
    low, high = low[:, :, :, None], high[:, :, :, None]
    bound = torch.maximum(q * low, q * high).sum(-1).amax(-1)  # [layers, pages, kv_heads]
    held = 31
    chosen = torch.zeros(LAYERS, held, KV_HEADS, dtype=torch.bool)
    chosen[:, 0] = chosen[:, 29:] = True  # sinks, and what the last 16 tokens touch
    best = bound[:, 1:29].topk(math.ceil(0.1 * held), 1).indices + 1
    chosen.scatter_(1, best, True)
    seen = chosen.repeat_interleave(PAGE, 1)[:, :481].transpose(1, 2).repeat_interleave(GROUP, 1)
    close(out, bench.dense(handle, seen))
    usage = bench.usage(handle)
    pages = (1 + 4) * PAGE + PAGE + 1
    bounds = 28 * 2 * 2 * 32  # lows and steps of 28 pages, bfloat16, channels up to a multiple of 32
    assert usage.read == LAYERS * KV_HEADS * (pages * TOKEN_BYTES + bounds)
    assert usage.whole == LAYERS * KV_HEADS * 481 * TOKEN_BYTES


def test_recycled_is_exact_in_full_steps_and_reads_what_mattered_in_between() -> None:
    """A step is full when it is time, or the query has turned. `missed`, of the step before, is known there alone."""
    bench = Bench(TIGHT["recycled"])
    handle = bench.open()
    bench.prefill(handle, LONG, **peaked(bench, handle, LONG, near=(17, 30)))
    full, told, missed = [], [], []
    for step in range(48):
        direction = towards(0) if step < 27 else towards(1)  # a quarter turn
        q = direction.expand(LAYERS, 1, HEADS, D) + bench.random(1, HEADS) / 4
        out = bench.step(handle, q=q)
        if torch.allclose(out, bench.dense(handle)[:, 0], rtol=1e-4, atol=1e-4):
            full.append(step)
        usage = bench._usages[handle]  # told with the next row
        if told and usage.queries > told[-1]:
            assert step - 1 == full[-1 - (full[-1] == step)]
            missed.append((usage.missed, usage.worst))
        told.append(usage.queries)
    assert full == [0, 20, 30]
    assert told[-1] == 2 * LAYERS * HEADS
    (before, _), (after, _) = missed  # the query turned in between
    assert 0 < before < after


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_razor_has_a_mean_stand_for_what_it_let_go(dtype: str) -> None:
    """In decode, in a prompt that goes on after it, in a fork, and after a cut."""
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    bench = Bench(TIGHT["razor"], dtype=dtype)
    handle = bench.open()
    bench.prefill(handle, 300)
    for p in range(300, 330):
        close(bench.step(handle)[:, None], razor_dense(bench, handle, kept_of_razor(p)), tolerance)
    gap = kept_of_razor(329)
    out = bench.feed(handle, 330, 45)
    close(out, razor_dense(bench, handle, gap), tolerance)  # nothing more is let go
    child = bench.fork(handle, 375)
    close(bench.step(child)[:, None], razor_dense(bench, child, kept_of_razor(375)), tolerance)
    floor = bench.floors[0]
    close(bench.feed(handle, floor, 1, True), razor_dense(bench, handle, kept_of_razor(floor)), tolerance)
    reply = bench.worker.handle(Announcement(1, 1000, 2, (), (Row(child, floor - PAGE, 1, None, True),)))
    assert isinstance(reply, Announced)
    assert (reply.accepted, reply.starts) == (False, (0,))


def test_razor_lets_go_of_a_long_prompt_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina_workers.kv_pages.kv_store.ABSORBED_AT_ONCE", 5)
    bench = Bench(TIGHT["razor"])
    handle = bench.open()
    bench.prefill(handle, 300)
    for p, slots in zip(range(300, 305), (5, 10, 15, 15, 15), strict=True):
        close(bench.step(handle)[:, None], razor_dense(bench, handle, (PAGE, (1 + slots) * PAGE)))
        assert kept_of_razor(p)[1] >= 16 * PAGE


def test_a_refused_batch_has_let_go_of_nothing() -> None:
    bench = Bench(TIGHT["razor"])
    handle, other = bench.open(), bench.open()
    bench.prefill(handle, 300)
    bench.prefill(other, 20)
    free = bench.worker.store.free_pages
    rows = (Row(handle, 300, 1, (0, 301), True, True), Row(other, 20, 100_000, None, True))
    reply = bench.worker.handle(Announcement(1, 1000, 2, (), rows))
    assert isinstance(reply, Announced)
    assert (reply.accepted, reply.free_pages) == (False, (free,))
    bench.worker.store.check_integrity()
    bench._batch = 1000
    close(bench.step(handle)[:, None], razor_dense(bench, handle, kept_of_razor(300)))
    assert bench.worker.store.free_pages > free


def test_of_a_sequence_in_ranges_each_part_stands_for_its_own() -> None:
    """The part that begins at 160 has no sinks: one mean stands for all that its queries have moved past."""
    bench = Bench(TIGHT["razor"])
    handle = bench.open(lo=160)
    bench.prefill(handle, 90)
    out = [bench.step(handle) for _ in range(20)][-1]
    gap = (160, kept_of_razor(269)[1])
    assert gap == (160, 224)
    close(out[:, None], razor_dense(bench, handle, gap, lo=160))
    assert (pages_held(bench, handle) == 270 // PAGE + 1 - 14).all()


@pytest.mark.parametrize("name", [*STATIC, "razor"])
def test_what_was_read_is_counted(name: str) -> None:
    bench = Bench(TIGHT[name])
    handle = bench.open()
    bench.prefill(handle, 200)  # prompts do not count
    for _ in range(3):
        bench.step(handle)
    read = 0
    for p in (200, 201, 202):
        first, end = kept_of_razor(p)
        keys = torch.arange(p + 1)
        # A mean is a key and a value in float32, as every token here is.
        if name == "razor":
            read += KV_HEADS * (p + 1 - (end - first) + 1)
        else:
            read += sum(int(STATIC[name](head, torch.tensor(p), keys).sum()) for head in range(KV_HEADS))
    usage = bench.usage(handle)
    bytes_of = LAYERS * TOKEN_BYTES
    assert (usage.read, usage.whole) == (bytes_of * read, bytes_of * KV_HEADS * (201 + 202 + 203))
    assert usage.queries == 0


class _Listener:
    """A chooser whose choices are kept."""

    def __init__(self, chooser: Any) -> None:
        self._chooser = chooser
        self.choices: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chooser, name)

    def choose(self, *of_layer: Any) -> Any:
        choice = self._chooser.choose(*of_layer)
        self.choices.append(tuple(x.copy() for x in (choice.pages, choice.counts, choice.missed, choice.coarse)))
        return choice


@pytest.mark.parametrize("shape", ["random", "peaked"])
def test_the_missed_mass_is_as_estimated(shape: str) -> None:
    """`retrieval` reports the attention mass that it has not read exactly, by sketches of 4 bits: within a fifth of the
    true one or 0.004, in each query."""
    bench = Bench(TIGHT["retrieval"])
    handle = bench.open()
    given = {"k": bench.random(LONG) * (1.5 if shape == "random" else 1.0)}
    if shape == "peaked":
        given = peaked(bench, handle, LONG, near=(17, 30, 52))
    bench.prefill(handle, LONG, **given)
    choosers = pool_of(bench.worker).reader._choosers._choosers
    listener = _Listener(choosers[parse(TIGHT["retrieval"])])
    choosers[parse(TIGHT["retrieval"])] = listener
    bench.step(handle, q=bench.random(1, HEADS) * (1.0 if shape == "random" else 0.2) + towards(0, 1.0))
    table = bench.worker.store.part(handle).table
    mass = bench.logits(handle)[:, :, 0].softmax(-1)  # [layers, heads, keys]
    pages = torch.nn.functional.pad(mass, (0, -mass.shape[-1] % PAGE)).unflatten(-1, (-1, PAGE)).sum(-1).numpy()
    for layer, (chosen, counts, missed, coarse) in enumerate(listener.choices):
        for head in range(KV_HEADS):
            left = ~np.isin(table[layer, head, : pages.shape[-1]], chosen[head, : counts[head]])
            for number in range(head * GROUP, (head + 1) * GROUP):
                true = pages[layer, number][left].sum()
                assert abs(missed[number] + coarse[number] - true) <= max(0.2 * true, 0.004)
                assert missed[number] <= 0.02 + 1e-6


def test_a_place_that_is_needed_in_one_step_alone_is_read_in_it() -> None:
    """What each step needs lies elsewhere: near the beginning, in the middle, near the end, nowhere."""
    bench = Bench("retrieval(sink=16, recent=16)")
    handle = bench.open()
    k = bench.random(LONG) * 0.3
    for number in range(4):
        page = 5 + 20 * number
        k[:, page * PAGE : (page + 1) * PAGE] += towards(number, 6.0)
    bench.prefill(handle, LONG, k=k)
    for step in range(12):
        wanted = (5 * step) % 7
        q = towards(wanted, 6.0).expand(LAYERS, 1, HEADS, D) if wanted < 4 else None
        out = bench.step(handle, **({} if q is None else {"q": q}))
        exact = bench.dense(handle)[:, 0]
        assert ((out - exact).norm(dim=-1) < 0.1 * exact.norm(dim=-1)).all(), step
    usage = bench.usage(handle)
    assert usage.worst <= 0.0051
    assert 0 < usage.coarse / usage.queries < 0.9
    assert usage.read < usage.whole
