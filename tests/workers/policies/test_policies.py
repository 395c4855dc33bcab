"""Every policy of the catalogue against attention by its definition, at one worker: what it reads, keeps and counts.

A new policy is tested by a line in `TIGHT` and one in `LOOSE` of `policy_bench`.
"""

from __future__ import annotations

import math

import pytest
import torch
from policy_bench import (
    GROUP,
    HEADS,
    KV_HEADS,
    LAYERS,
    LOOSE,
    PAGE,
    STATIC,
    TIGHT,
    Bench,
    D,
    close,
    kept_of_razor,
    pages_held,
    peaked,
    razor_dense,
    towards,
)

from lamina_protocols.messages.messages import Fetch, Fetched
from lamina_workers.errors import KVError, PolicyError
from lamina_workers.policies.catalogue import POLICIES, parse

ADAPTIVE = [name for name, policy in POLICIES.items() if policy.adaptive]
LETS_GO = ["streaming", "span", "sharded", "dilated", "razor", "heavy_hitter"]
LONG = 1120  # tokens, with which every policy has something to choose


@pytest.fixture(autouse=True)
def _choosing_is_always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for cost in ("CALL", "BYTE"):  # choosing is always worth it
        monkeypatch.setattr(f"lamina_workers.policies.retrieval.{cost}", 0)


def test_every_policy_is_in_the_matrix() -> None:
    assert set(TIGHT) == set(LOOSE) == set(POLICIES)
    by_position = {n for n, p in POLICIES.items() if not (p.adaptive or p.compensated or p.evicts)}
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
    """Whatever the chunks, and in decode as in prefill."""
    bench = Bench(TIGHT[name])
    q, k, v = bench.random(160, HEADS), bench.random(160), bench.random(160)
    handle = bench.open()
    out = bench.prefill(handle, 150, chunk, q=q, k=k, v=v)
    steps = [bench.step(handle, q=q[:, p:], k=k[:, p:], v=v[:, p:]) for p in range(150, 160)]
    bench.q = q
    p, key = torch.arange(160)[:, None], torch.arange(160)
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
        "sharded": 8 + 2,  # of 24 blocks each third, and the local ones
        "dilated": 1 + 6,
        "razor": 1 + math.ceil(length / PAGE) - (402 - 39) // PAGE,
        "heavy_hitter": 1 + math.ceil(0.1 * 24) + math.ceil(length / PAGE) - 24,  # (402 - 15) // PAGE
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
    ],
)
def test_what_a_policy_cannot_be(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse(text)


def test_a_part_that_moves_takes_with_it_what_stands_for_what_it_has_let_go() -> None:
    bench, target = Bench(TIGHT["razor"]), Bench(TIGHT["razor"])
    handle, moved = bench.open(), target.open()
    bench.prefill(handle, 600)
    for _ in range(30):
        bench.step(handle)
    assert pages_held(bench, handle).max() < 20
    length = bench.k[handle].shape[1]
    fetched = [bench.worker.handle(Fetch(1, 10_000, layer, handle, 0, length)) for layer in range(LAYERS)]
    assert all(isinstance(piece, Fetched) for piece in fetched)
    kv = {name: torch.stack([getattr(piece, name) for piece in fetched]) for name in ("k", "v")}  # type: ignore[union-attr]
    target.prefill(moved, length, **{name: x.view(LAYERS, length, KV_HEADS, D) for name, x in kv.items()})
    asked = {"q": bench.random(1, HEADS), "k": bench.random(1), "v": bench.random(1)}
    for _ in range(3):
        torch.testing.assert_close(target.step(moved, **asked), bench.step(handle, **asked), atol=1e-4, rtol=1e-4)
