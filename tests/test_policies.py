"""Every policy of the catalogue against attention by its definition, at one worker: what it reads, keeps and counts.

A new policy is tested by a line in `TIGHT` and one in `LOOSE`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from policy_bench import (
    GROUP,
    HEADS,
    KV_HEADS,
    LAYERS,
    PAGE,
    SCALE,
    TOKEN_BYTES,
    Bench,
    D,
    pages_held,
    peaked,
    towards,
)

from lamina_workers.errors import KVError, PolicyError
from lamina_workers.policies.catalogue import POLICIES
from lamina_workers.policies.policy import parse

TIGHT = {
    "full": "full",
    "streaming": "streaming(sink=16, recent=40)",
    "span": "span(alpha=40, beta=0.1)",
    "sharded": "sharded(block=16, local=2, stride=3)",
    "retrieval": "retrieval(sink=16, recent=16, missed=0.02)",
    "page_top_k": "page_top_k(sink=16, recent=16, budget=0.1, least=1)",
    "recycled": "recycled(sink=16, recent=16, budget=0.1, every=20)",
    "heavy_hitter": "heavy_hitter(sink=16, recent=16, budget=0.1, every=3)",
    "razor": "razor(sink=16, recent=40, share=0.05)",
}
LOOSE = {
    "full": "full",
    "streaming": "streaming(sink=0, recent=10000)",
    "span": "span(alpha=10000)",
    "sharded": "sharded(block=64, local=1000, stride=1)",
    "retrieval": "retrieval(missed=0)",
    "page_top_k": "page_top_k(sink=0, recent=1, budget=1)",
    "recycled": "recycled(sink=0, recent=1, budget=1)",
    "heavy_hitter": "heavy_hitter(sink=0, recent=1, budget=1)",
    "razor": "razor(sink=0, recent=10000)",
}
STATIC = {  # whether the query at p sees key k <= p, told once more
    "full": lambda p, k: k >= 0,
    "streaming": lambda p, k: (k < 16) | (p - k < 40),
    "span": lambda p, k: (k < 64) | (p - k < 40 + (0.1 * (p // 64 * 64)).long()),
    "sharded": lambda p, k: (p // 16 - k // 16 < 2) | (k // 16 % 3 == 0),
}
ADAPTIVE = [name for name, policy in POLICIES.items() if policy.adaptive]
LETS_GO = ["streaming", "span", "razor"]
LONG = 1120  # tokens, with which every policy has something to choose


@pytest.fixture(autouse=True)
def _choosing_is_always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina_workers.policies.retrieval.WORTH", 0)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def kept_of_razor(length: int, sink: int = 16, recent: int = 40, share: float = 0.05) -> tuple[int, int]:
    """Of a decode step at position `length`: the tokens [first, end) for which the mean stands."""
    lowest = length - max(recent, int(share * length)) + 1
    first = -(-sink // PAGE) * PAGE
    return first, max(first, lowest // PAGE * PAGE)


def razor_dense(bench: Bench, handle: int, gap: tuple[int, int]) -> torch.Tensor:
    """Attention of the last queries with the mean of [first, end) and its ln n instead: `[layers, n, heads, d]`."""
    first, end = gap
    k, v = (x.repeat_interleave(GROUP, 2).double() for x in (bench.k[handle], bench.v[handle]))
    n, keys = bench.q.shape[1], k.shape[1]
    kept = [*range(first), *range(end, keys)]
    logits = bench.logits(handle).masked_fill(torch.arange(keys) > torch.arange(keys - n, keys)[:, None], -torch.inf)
    mean_k, mean_v = k[:, first:end].mean(1), v[:, first:end].mean(1)
    slot = torch.einsum("lnhd,lhd->lhn", bench.q.double(), mean_k) * SCALE + math.log(end - first)
    weights = torch.cat([logits[..., kept], slot[..., None]], -1).softmax(-1)
    return torch.einsum("lhnk,lkhd->lnhd", weights, torch.cat([v[:, kept], mean_v[:, None]], 1)).float()


def test_every_policy_is_in_the_matrix() -> None:
    assert set(TIGHT) == set(LOOSE) == set(POLICIES)
    assert {name for name, policy in POLICIES.items() if not policy.adaptive and not policy.compensated} == set(STATIC)
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
    assert usage.read >= usage.whole  # sketches are read too, where a policy looks before it reads everything
    assert usage.missed == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_short_contexts_are_read_whole(name: str) -> None:
    bench = Bench(TIGHT[name])
    handle = bench.open()
    close(bench.step(handle), bench.dense(handle)[:, 0])
    close(bench.prefill(handle, 14), bench.dense(handle))
    close(bench.step(handle), bench.dense(handle)[:, 0])


@pytest.mark.parametrize("chunk", [1, 7, 300])
@pytest.mark.parametrize("name", STATIC)
def test_what_a_static_policy_sees(name: str, chunk: int) -> None:
    """Whatever the chunks, and in decode as in prefill."""
    bench = Bench(TIGHT[name])
    q, k, v = bench.random(300, HEADS), bench.random(300), bench.random(300)
    handle = bench.open()
    out = bench.prefill(handle, 290, chunk, q=q, k=k, v=v)
    steps = [bench.step(handle, q=q[:, p:], k=k[:, p:], v=v[:, p:]) for p in range(290, 300)]
    bench.q = q
    p, key = torch.arange(300)[:, None], torch.arange(300)
    close(torch.cat([out, torch.stack(steps, 1)], 1), bench.dense(handle, (key <= p) & STATIC[name](p, key)))


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


@pytest.mark.parametrize("name", ADAPTIVE)
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
    length = 403
    held = {
        "streaming": 1 + math.ceil(length / PAGE) - (402 - 39) // PAGE,
        "span": 4 + math.ceil(length / PAGE) - (402 - 39 - 38) // PAGE,
        "razor": 1 + math.ceil(length / PAGE) - (402 - 39) // PAGE,
    }.get(name, math.ceil(length / PAGE))
    assert (pages_held(bench, handle) == held).all()
    usage = bench._usages[handle]
    assert (usage.held, usage.kept) == (held * LAYERS * KV_HEADS, math.ceil(length / PAGE) * LAYERS * KV_HEADS)
    assert (name in LETS_GO) == (usage.held < usage.kept)


def test_heads_with_policies_of_their_own() -> None:
    bench = Bench(TIGHT["razor"], "full", TIGHT["page_top_k"])
    handle = bench.open()
    bench.prefill(handle, 400)
    out = [bench.step(handle) for _ in range(3)][-1]
    razor = razor_dense(bench, handle, kept_of_razor(402))[:, 0]
    close(out[:, :GROUP], razor[:, :GROUP])
    close(out[:, GROUP : 2 * GROUP], bench.dense(handle)[:, 0, GROUP : 2 * GROUP])
    assert pages_held(bench, handle)[:, 0].max() < pages_held(bench, handle)[:, 1:].min() == 26


# Each policy by its own definition.


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


def test_recycled_looks_when_it_is_time_or_the_query_has_turned() -> None:
    """`missed` is known in looks alone, so its count tells them."""
    bench = Bench(TIGHT["recycled"])
    handle = bench.open()
    bench.prefill(handle, LONG, **peaked(bench, handle, LONG, near=(17, 30)))
    looked = []
    for step in range(48):
        direction = towards(0) if step < 27 else towards(1)  # a quarter turn
        bench.step(handle, q=direction.expand(LAYERS, 1, HEADS, D))
        queries = bench._usages[handle].queries
        looked.append(queries)
    steps = [i - 1 for i in range(1, 48) if looked[i] > looked[i - 1]]  # told with the next row
    assert steps == [0, 20, 30]
    assert looked[-1] == 3 * LAYERS * HEADS


def test_heavy_hitter_keeps_what_was_heavy_for_long() -> None:
    """A page that all early queries want stays chosen while a few late ones look elsewhere."""
    bench = Bench("heavy_hitter(sink=16, recent=16, budget=0.01, every=1)")
    handle = bench.open()
    near = peaked(bench, handle, LONG, near=(17,))
    near["k"][:, 30 * PAGE : 31 * PAGE] += towards(1)
    bench.prefill(handle, LONG, **near)
    chooser = next(iter(bench.worker._reader._choosers._choosers.values()))

    def chosen() -> list[int]:
        return chooser._counts[handle][1, 2].entries.tolist()

    for _ in range(6):
        bench.step(handle, q=towards(0).expand(LAYERS, 1, HEADS, D))
        assert chosen() == [0, 17]
    for _ in range(4):
        bench.step(handle, q=towards(1).expand(LAYERS, 1, HEADS, D))
        assert chosen() == [0, 17]
    for _ in range(8):
        bench.step(handle, q=towards(1).expand(LAYERS, 1, HEADS, D))
    assert chosen() == [0, 30]
    bench.close(handle)
    assert not chooser._counts


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
    with pytest.raises(KVError, match="below the floor"):
        bench.feed(child, floor - PAGE, 1)


def test_razor_lets_go_of_a_long_prompt_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina_workers.kv_store.ABSORBED_AT_ONCE", 5)
    bench = Bench(TIGHT["razor"])
    handle = bench.open()
    bench.prefill(handle, 300)
    for p, slots in zip(range(300, 305), (5, 10, 15, 15, 15), strict=True):
        close(bench.step(handle)[:, None], razor_dense(bench, handle, (PAGE, (1 + slots) * PAGE)))
        assert kept_of_razor(p)[1] >= 16 * PAGE


class _Listener:
    """A chooser whose choices are kept."""

    def __init__(self, chooser: Any) -> None:
        self._chooser = chooser
        self.choices: list[tuple[Any, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chooser, name)

    def choose(self, *of_layer: Any) -> Any:
        choice = self._chooser.choose(*of_layer)
        self.choices.append((choice.pages.copy(), choice.counts.copy(), choice.missed.copy()))
        return choice


@pytest.mark.parametrize("shape", ["random", "peaked"])
def test_the_missed_mass_is_as_estimated(shape: str) -> None:
    """`retrieval` reports the attention mass that it has not read, by sketches of 4 bits: within a fifth of the true
    one or 0.004, in each query."""
    bench = Bench(TIGHT["retrieval"])
    handle = bench.open()
    given = {"k": bench.random(LONG) * (1.5 if shape == "random" else 1.0)}
    if shape == "peaked":
        given = peaked(bench, handle, LONG, near=(17, 30, 52))
    bench.prefill(handle, LONG, **given)
    choosers = bench.worker._reader._choosers._choosers
    listener = _Listener(choosers[parse(TIGHT["retrieval"])])
    choosers[parse(TIGHT["retrieval"])] = listener
    bench.step(handle, q=bench.random(1, HEADS) * (1.0 if shape == "random" else 0.2) + towards(0, 1.0))
    table = bench.worker.store.part(handle).table
    mass = bench.logits(handle)[:, :, 0].softmax(-1)  # [layers, heads, keys]
    pages = torch.nn.functional.pad(mass, (0, -mass.shape[-1] % PAGE)).unflatten(-1, (-1, PAGE)).sum(-1).numpy()
    for layer, (chosen, counts, missed) in enumerate(listener.choices):
        for head in range(KV_HEADS):
            left = ~np.isin(table[layer, head, : pages.shape[-1]], chosen[head, : counts[head]])
            for number in range(head * GROUP, (head + 1) * GROUP):
                true = pages[layer, number][left].sum()
                assert abs(missed[number] - true) <= max(0.2 * true, 0.004)
                assert missed[number] <= 0.02 + 1e-6


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
        ("razor(share=-0.1)", "razor: share is -0.1; allowed is 0 to 1"),
        ("razor(recent=0)", "razor: recent is 0; allowed is 1 to"),
        ("razor(budget=1)", "razor has the parameter 'budget=1'; allowed is each once, of sink, recent, share"),
        ("razor(sink=1, sink=2)", "razor has the parameter 'sink=2'; allowed is each once"),
    ],
)
def test_what_a_policy_cannot_be(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse(text)
