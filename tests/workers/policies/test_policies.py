"""Every policy of the catalogue against attention by its definition, at one worker: what it reads, keeps and counts.

A new policy is tested by a line in `TIGHT` and one in `LOOSE` of `policy_bench`, a static one by one in `STATIC` too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import kernel_reference
import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from kv_pools import pool_of
from policy_bench import (
    GROUP,
    HEADS,
    KV_HEADS,
    LAYERS,
    LOOSE,
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

from lamina_kernels.paged.pages import Order
from lamina_kernels.select import kernels
from lamina_workers.attention_worker.device_worker import DeviceWorker
from lamina_workers.attention_worker.kv_pool import KVPool
from lamina_workers.errors import KVError, PolicyError
from lamina_workers.policies.catalogue import POLICIES, parse

ADAPTIVE = [name for name, policy in POLICIES.items() if policy.adaptive]
LONG = 1120  # tokens, with which every policy has something to choose


@pytest.fixture(autouse=True)
def _choosing_is_always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for cost in ("CALL", "BYTE"):  # choosing is always worth it
        monkeypatch.setattr(f"lamina_workers.policies.retrieval.{cost}", 0)


def test_every_policy_is_in_the_matrix() -> None:
    assert set(TIGHT) == set(LOOSE) == set(POLICIES)
    by_position = {n for n, p in POLICIES.items() if not p.adaptive}
    assert by_position == set(STATIC)
    for name in POLICIES:
        assert parse(TIGHT[name]).name == parse(LOOSE[name]).name == name
        assert parse(str(parse(TIGHT[name]))) == parse(TIGHT[name])


@pytest.mark.parametrize("name", POLICIES)
def test_with_an_unlimited_budget_it_is_full_attention(name: str) -> None:
    bench = Bench(LOOSE[name])
    handle = bench.open()
    bench.prefill(handle, LONG)
    for _ in range(3):
        out = bench.step(handle)
        close(out, bench.dense(handle)[:, 0])
    usage = bench.usage(handle)
    assert usage.held == usage.kept
    assert usage.read >= usage.whole  # sketches are read too, where a policy scans before it reads everything
    assert usage.missed == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_short_contexts_are_read_whole(name: str) -> None:
    bench = Bench(TIGHT[name])
    handle = bench.open()
    close(bench.step(handle), bench.dense(handle)[:, 0])
    close(bench.prefill(handle, 14), bench.dense(handle))
    close(bench.step(handle), bench.dense(handle)[:, 0])


@pytest.mark.parametrize("chunk", [1, 7, 160])
@pytest.mark.parametrize("name", STATIC)
def test_what_a_static_policy_sees(name: str, chunk: int) -> None:
    """Whatever the chunks, and in decode as in prefill. The decode steps cross a border of blocks of 64."""
    bench = Bench(TIGHT[name])
    q, k, v = bench.random(200, HEADS), bench.random(200), bench.random(200)
    handle = bench.open()
    out = bench.prefill(handle, 150, chunk, q=q, k=k, v=v)
    steps = [bench.step(handle, q=q[:, p:], k=k[:, p:], v=v[:, p:]) for p in range(150, 200)]
    bench.q = q
    p, key = torch.arange(200)[:, None], torch.arange(200)
    seen = torch.stack([(key <= p) & STATIC[name](head // GROUP, p, key) for head in range(HEADS)])
    close(torch.cat([out, torch.stack(steps, 1)], 1), bench.dense(handle, seen[None]))


@pytest.mark.parametrize("name", POLICIES)
def test_prompts_are_read_whole_unless_positions_decide(name: str) -> None:
    bench = Bench(TIGHT[name])
    handle = bench.open()
    bench.prefill(handle, 200)
    out = bench.feed(handle, 200, 30)
    whole = bench.dense(handle)
    if name in STATIC and name != "full":
        assert (out - whole).abs().max() > 1e-2
    else:
        close(out, whole)


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name != "razor"])
def test_what_matters_is_read_and_little_else(name: str) -> None:
    """Three of 70 pages have nearly all of the attention: they are found, and a window does not have them."""
    bench, window = Bench(TIGHT[name]), Bench(TIGHT["streaming"])
    for of in (bench, window):
        handle = of.open()
        of.prefill(handle, LONG, **peaked(of, handle, LONG, near=(17, 30, 52)))
        for _ in range(7):
            q = torch.randn(LAYERS, 1, HEADS, D, generator=of.generator) * 0.2 + towards(0, 6.0)
            out = of.step(handle, q=q, k=of.random(1) * 0.3)
            off = (out - of.dense(handle)[:, 0]).norm() / out.norm()
            assert off < 0.05 if of is bench else off > 0.5
    usage = bench.usage(bench._last)
    assert usage.read < 0.5 * usage.whole
    assert usage.held == usage.kept  # nothing is let go


@pytest.mark.parametrize("name", POLICIES)
def test_int8_gives_nearly_the_same(name: str) -> None:
    outs = []
    for dtype in ("float32", "int8"):
        bench = Bench(TIGHT[name], dtype=dtype)
        handle = bench.open()
        bench.prefill(handle, LONG, **peaked(bench, handle, LONG, near=(17, 30)))
        q = bench.random(1, HEADS) * 0.2 + towards(0, 2.0)
        outs.append(bench.step(handle, q=q))
    assert (outs[1] - outs[0]).norm() / outs[0].norm() < 0.04


@pytest.mark.parametrize("name", POLICIES)
def test_forks_and_parts_that_were_cut_back(name: str) -> None:
    """A fork, a part that was cut back and one that never was agree as far as the policy lets them: exactly, where all
    three have chosen in the same steps or nothing."""
    bench = Bench(TIGHT[name])
    q, k, v = bench.random(320, HEADS), bench.random(320), bench.random(320)

    def at(p: int) -> dict[str, torch.Tensor]:
        return {"q": q[:, p:], "k": k[:, p:], "v": v[:, p:]}

    first = bench.open()
    bench.prefill(first, 300, **at(0))
    straight = bench.fork(first, 300)
    expected = [bench.step(straight, **at(p)) for p in range(300, 310)]
    again = bench.fork(first, 300)
    got = [bench.step(again, **at(p)) for p in range(300, 310)]
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-6)
    floor = bench.floors[0]
    assert floor <= 309
    child = bench.fork(again, 310)
    bench.feed(again, 309, 1, True, q=q[:, 5:], k=k[:, 5:], v=v[:, 5:])  # cut back by one
    bench.step(again)
    bench.step(child, **at(310))
    bench.step(straight, **at(310))
    if name not in ADAPTIVE:
        close(bench.step(child, **at(311)), bench.step(straight, **at(311)), 1e-6)
    if floor > 0:
        bench.fork(again, floor - 1)
        with pytest.raises(KVError, match=f"allowed: {floor} or more"):
            bench.step(again)
        bench.take_back()
    for handle in (first, straight, again, child):
        bench.close(handle)
    assert bench.worker.store.free_pages == bench.worker.store.n_pages


@pytest.mark.parametrize("name", POLICIES)
def test_pages_come_back(name: str) -> None:
    bench = Bench(TIGHT[name])
    handle = bench.open()
    bench.prefill(handle, 400)
    for _ in range(3):
        bench.step(handle)
    held = every = math.ceil(403 / PAGE)
    if not (POLICIES[name].adaptive or POLICIES[name].ranged):  # these keep all
        p, key = torch.arange(402, 1000)[:, None], torch.arange(every * PAGE)
        held = int((STATIC[name](0, p, key) & (key <= p)).any(0).view(every, PAGE).any(1).sum())
    assert (pages_held(bench, handle) == held).all()
    usage = bench._usages[handle]
    assert (usage.held, usage.kept) == (held * LAYERS * KV_HEADS, every * LAYERS * KV_HEADS)


def test_heads_with_policies_of_their_own() -> None:
    bench = Bench(TIGHT["razor"], "full", TIGHT["page_top_k"])
    handle = bench.open()
    bench.prefill(handle, 400)
    out = [bench.step(handle) for _ in range(3)][-1]
    razor = razor_dense(bench, handle, kept_of_razor(402))[:, 0]
    close(out[:, :GROUP], razor[:, :GROUP])
    close(out[:, GROUP : 2 * GROUP], bench.dense(handle)[:, 0, GROUP : 2 * GROUP])
    assert (pages_held(bench, handle) == 26).all()  # all are kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "there is no policy 'best'; allowed are full, streaming, .*razor"),
        ("page_top_k(budget=1.5)", "page_top_k: budget is 1.5; allowed is 0 to 1"),
        ("page_top_k(least=-1)", "page_top_k: least is -1; allowed is 0 to"),
        ("recycled(every=0)", "recycled: every is 0; allowed is 1 to"),
        ("recycled(turn=1.5)", "recycled: turn is 1.5; allowed is -1 to 1"),
        ("recycled(recent=0)", "recycled: recent is 0; allowed is 1 to"),
        ("heavy_hitter(sink=-1)", "heavy_hitter: sink is -1; allowed is 0 to"),
        ("heavy_hitter(budget=nan)", "heavy_hitter: budget is nan; allowed is 0 to 1"),
        ("heavy_hitter(every=2.5)", "heavy_hitter: every is '2.5'; allowed is a whole number"),
        ("dilated(sink=10)", "dilated: sink is 10; allowed are multiples of the block, 64"),
        ("dilated(local=5, reach=4)", "dilated: reach is 4; allowed is 5 to"),
        ("sharded(step=-1)", "sharded: step is -1; allowed is 0 to"),
        ("razor(share=-0.1)", "razor: share is -0.1; allowed is 0 to 1"),
        ("razor(recent=0)", "razor: recent is 0; allowed is 1 to"),
        ("razor(budget=1)", "razor has the parameter 'budget=1'; allowed is each once, of sink, recent, share"),
        ("razor(sink=1, sink=2)", "razor has the parameter 'sink=2'; allowed is each once"),
        ("retrieval(index=tree)", "index is 'tree'; allowed are scan, graph"),
        ("retrieval(index=graph, top=0)", "top is 0; allowed is 1 to"),
        ("retrieval(index=graph, least=0)", "least is 0; allowed is 1 to"),
        ("retrieval(index=graph, segment=0)", "segment is 0; allowed is 1 to"),
    ],
)
def test_what_a_policy_cannot_be(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse(text)


# Each policy beside its own definition: what it chooses, what stands for the rest, and what is counted of it.


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
    """In decode, in a fork, and after a cut; a prompt that goes on after it is read whole."""
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    bench = Bench(TIGHT["razor"], dtype=dtype)
    handle = bench.open()
    bench.prefill(handle, 300)
    for p in range(300, 330):
        close(bench.step(handle)[:, None], razor_dense(bench, handle, kept_of_razor(p)), tolerance)
    close(bench.feed(handle, 330, 45), bench.dense(handle), tolerance)
    child = bench.fork(handle, 375)
    close(bench.step(child)[:, None], razor_dense(bench, child, kept_of_razor(375)), tolerance)
    close(bench.feed(handle, 200, 1, True)[:, None][:, 0], razor_dense(bench, handle, kept_of_razor(200)), tolerance)


def test_of_a_sequence_in_ranges_each_part_stands_for_its_own() -> None:
    """The part that begins at 160 has no sinks: one mean stands for all that its queries have moved past."""
    bench = Bench(TIGHT["razor"])
    handle = bench.open(lo=160)
    bench.prefill(handle, 90)
    out = [bench.step(handle) for _ in range(20)][-1]
    gap = (160, kept_of_razor(269)[1])
    assert gap == (160, 224)
    close(out[:, None], razor_dense(bench, handle, gap, lo=160))


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


# Choosers beside kernels whose pages have the order of a GPU: sketches, choices and what stands for the rest are then
# computed by torch, where the pages lie. A fake device stands for the GPU.


@pytest.fixture
def _tokens_in_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("lamina_kernels.attention.decode", kernel_reference)  # what `kernels` imports for a CPU
    kernels.cache_clear()
    yield
    kernels.cache_clear()


def bench_of(policy: str, dtype: str, device: bool = False) -> tuple[Bench, int]:
    bench = Bench(TIGHT[policy], dtype=dtype, pages=400)
    if device:
        bench.worker = DeviceWorker(bench.worker.config, 1, FakeDevice())
    handle = bench.open()
    bench.prefill(handle, 800, **peaked(bench, handle, 800, near=(17, 30)))
    return bench, handle


def decoded(bench: Bench, handle: int, steps: int = 6) -> torch.Tensor:
    q = towards(0).expand(LAYERS, 1, HEADS, D)
    return torch.stack([bench.step(handle, q=q) for _ in range(steps)])


@pytest.mark.usefixtures("_tokens_in_order")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("policy", ["retrieval", "page_top_k", "recycled"])
def test_a_chooser_reads_little_and_finds_what_matters(policy: str, dtype: str) -> None:
    bench, handle = bench_of(policy, dtype)
    (pool,) = bench.worker.pools
    assert isinstance(pool, KVPool)
    assert pool.pages.layout.order is Order.TOKENS
    out = decoded(bench, handle)
    close(out[-1], bench.dense(handle)[:, 0], 0.02 if policy == "retrieval" else 0.15)
    usage = bench.usage(handle)
    assert 0 < usage.read < (1.2 if policy == "retrieval" else 0.8) * usage.whole


@pytest.mark.usefixtures("_tokens_in_order")
@pytest.mark.parametrize("policy", ["retrieval", "page_top_k", "recycled"])
def test_a_device_worker_answers_the_same(policy: str) -> None:
    here, there = (decoded(*bench_of(policy, "float32", device)) for device in (False, True))
    assert torch.equal(here, there)
