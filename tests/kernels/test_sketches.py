"""Sketches of pages, compiled against plain torch; and what a choice of pages promises."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kernels.attention import decode as cpu_decode
from lamina_kernels.paged.pages import FLOATS, Order, PageLayout, Pages, gather
from lamina_kernels.partial import Partial, merge
from lamina_kernels.sketches import reference as sketch_reference
from lamina_kernels.sketches import sketches
from lamina_kernels.sketches.items import MISSED, Choice, Items
from lamina_kernels.sketches.layout import Sketches

PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]  # of a child process

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
DTYPES = [F32, BF16, F16, I8]
SHAPES = [(16, 16, 16), (16, 80, 48), (32, 64, 64), (48, 112, 32), (64, 48, 80), (128, 256, 128)]  # page size, d_k, d_v
NOISE = 0.15  # of a log-mass: what rounding queries times steps to 8 bits costs at most, for numbers as they are here
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass(frozen=True)
class World:
    """Pages of random keys, each with a direction of its own, and their sketches."""

    pages: Pages
    sketches: Sketches

    @property
    def scale(self) -> float:
        return float(self.pages.layout.d_k**-0.5)


def make_world(page_size: int, d_k: int, d_v: int, dtype: torch.dtype, n: int = 40, spread: float = 1.0) -> World:
    generator = torch.Generator().manual_seed(n)
    layout, tokens = PageLayout(page_size, d_k, d_v, dtype), n * page_size
    pages = Pages.allocate(layout, n)
    own = torch.randn(n, 1, d_k, generator=generator) * spread + torch.randn(d_k, generator=generator)
    k = own + torch.randn(n, page_size, d_k, generator=generator)
    v = torch.randn(n, 1, d_v, generator=generator) + torch.randn(n, page_size, d_v, generator=generator)
    append = cpu_decode.plan_append(pages, torch.arange(tokens).unsqueeze(0))
    cpu_decode.append(pages, append, 0, k.view(tokens, d_k), v.view(tokens, d_v))
    made = Sketches.allocate(layout, n)
    sketches.seal(pages, made, torch.randperm(n, generator=generator))
    return World(pages, made)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def some_items(n: int, sealed: tuple[int, ...], layers: int = 2, seed: int = 0) -> Items:
    """Items over random pages of n, the last entry not sealed; layer 0 has no pages."""
    rng = np.random.default_rng(seed)
    tables = [np.stack([np.full(m + 1, -1), *rng.integers(0, n, (layers - 1, m + 1))]).astype(np.int32) for m in sealed]
    each = ints(*sealed)
    return Items(tables, each, each * 0 + 1, np.maximum(each - 1, 0), each + 1)


def masses_of(choice: Choice, items: Items, i: int) -> torch.Tensor:
    return choice.log_mass[i, :, : int(items.sealed[i])]


def amount(
    masses: torch.Tensor, kept: torch.Tensor, sinks: int, recent: int, held: int, missed: float, coarse: float
) -> tuple[int, int]:
    """How many entries are read, at least and at most, where so much may be left. Pages of alike scores are not told
    apart, and those whose score is next to nothing may be read or not."""
    entry = torch.arange(held)
    mobile = (entry >= sinks) & (entry < recent) & (entry < masses.shape[1])
    padded = torch.nn.functional.pad(masses, (0, held - masses.shape[1]), value=-torch.inf)
    wanted = entry[~sketch_reference.leaving(padded[None], mobile[None], missed, coarse)[0]]
    every, score = torch.arange(masses.shape[1]), torch.softmax(masses, -1).amax(0)
    free = every[~torch.isin(every, kept)]
    lowest = min(score[wanted[torch.isin(wanted, free)]].tolist(), default=1.0)
    alike = int((score[free] >= 0.94 * lowest).sum())
    nothing, light = (int((score[free] < least).sum()) for least in (1e-30, 1e-12))
    return len(wanted) - 1 - light, max(len(wanted), len(kept) + alike) + nothing


def check_choice(
    world: World, choice: Choice, items: Items, layer: int, q: torch.Tensor, missed: float, coarse: float = 0.0
) -> None:
    """Everything a choice promises, by the masses that it says itself. Of logits without a soft cap."""
    group = len(q) // max(len(items), 1)
    for i in range(len(items)):
        sealed, held = int(items.sealed[i]), int(items.held[i])
        count = int(choice.counts[i])
        entries = choice.entries[i, :count].long()
        assert (entries.diff() > 0).all()
        assert choice.pages[i, :count].tolist() == items.tables[i][layer][entries.numpy()].tolist()
        every = torch.arange(held)
        kept = every[(every < items.sinks[i]) | (every >= items.recent[i]) | (every >= sealed)]
        assert torch.isin(kept, entries).all()
        masses = masses_of(choice, items, i)
        others = torch.ones(sealed, dtype=torch.bool)
        others[entries[entries < sealed]] = False
        own = slice(i * group, (i + 1) * group)
        left = torch.softmax(masses.double(), -1)[:, others].sum(-1)
        torch.testing.assert_close((choice.missed + choice.coarse)[own].double(), left, rtol=1e-3, atol=1e-7)
        assert (choice.missed[own] <= missed * 1.001 + 1e-6).all()
        rss = torch.softmax(masses.double(), -1)[:, others].square().sum(-1).sqrt()
        assert ((left <= missed * 1.001 + 1e-6).all()) or (rss <= coarse * 1.001 + 1e-6).all()
        score = torch.softmax(masses, -1).amax(0)
        ends = int(items.sinks[i]), int(items.recent[i]), held
        least, most = amount(masses, kept, *ends, missed, coarse)
        assert least <= count <= most
        least, most = amount(masses, kept, *ends, missed, 0.0)
        assert least <= count + int(choice.coarse_counts[i]) <= most
        if not others.any():
            assert (choice.tail.lse[own] == -torch.inf).all()
            assert (choice.tail.out[own] == 0).all()
        elif left.min() > 1e-25:
            table = torch.from_numpy(items.tables[i][layer, :sealed].copy()).long()
            logits = torch.einsum("gd,ntd->gnt", q[own].float(), sketch_reference.keys(world.sketches, table))
            order = torch.argsort(score[others])  # means stand for the lightest
            means, codes = others.clone(), torch.zeros_like(others)
            coarse_ones = others.nonzero().flatten()[order[len(order) - int(choice.coarse_counts[i]) :]]
            means[coarse_ones], codes[coarse_ones] = False, True
            of_items = (x[None] for x in (table, logits * world.scale, means, codes))
            tail = sketch_reference.blended(world.sketches, *of_items)
            lse = torch.logsumexp(masses[:, others].double(), -1)
            torch.testing.assert_close(choice.tail.lse[own].double(), lse, rtol=1e-4, atol=1e-3)
            spread = sketch_reference.values(world.sketches, table[others]).std() + tail.out.abs().mean()
            noise = 0.25 * max(1.0, float(logits.std() * world.scale))  # weights are those of rounded queries
            assert (choice.tail.out[own] - tail.out).abs().max() < noise * spread


@every_dtype
@pytest.mark.parametrize(("page_size", "d_k", "d_v"), SHAPES)
def test_sketches_are_those_of_the_reference(page_size: int, d_k: int, d_v: int, dtype: torch.dtype) -> None:
    world = make_world(page_size, d_k, d_v, dtype, 7)
    expected = Sketches.allocate(world.pages.layout, 7)
    sketch_reference.seal(world.pages, expected, torch.arange(7))
    assert torch.equal(sketch_reference.unpacked(world.sketches), sketch_reference.unpacked(expected))
    for name in ("steps", "lows", "value_steps", "value_lows"):
        assert torch.equal(getattr(world.sketches, name), getattr(expected, name)), name
    codes = slice(world.sketches.layout.value_steps_at)
    assert torch.equal(world.sketches.values[:, codes], expected.values[:, codes])
    torch.testing.assert_close(world.sketches.means, expected.means, rtol=2**-7, atol=1e-6)


@every_dtype
def test_the_order_of_pages_changes_no_sketch_and_no_choice(dtype: torch.dtype) -> None:
    """Pages in the order of a GPU have the reference's sketches; their scan promises what the compiled one does."""
    world = make_world(32, 48, 80, dtype)
    layout = PageLayout(32, 48, 80, dtype, Order.TOKENS)
    pages, made = Pages.allocate(layout, 40), Sketches.allocate(layout, 40)
    pages.k[:], pages.v[:] = world.pages.k.reshape(pages.k.shape), world.pages.v.reshape(pages.v.shape)
    if dtype is I8:
        pages.scales[:] = world.pages.scales
    sketches.seal(pages, made, torch.arange(40))
    assert torch.equal(made.scanned[:, : made.layout.mean_at], world.sketches.scanned[:, : made.layout.mean_at])
    assert torch.equal(made.values, world.sketches.values)
    items, q = some_items(40, (100, 1, 0, 33)), torch.randn(12, 48, generator=torch.Generator().manual_seed(1))
    for missed, coarse in ((0.01, 0.2), (0.3, 0.0), (0.0, 0.05), (1.0, 1.0)):
        plan = sketches.plan_scan(made, items, 3)
        choice = sketches.scan(made, plan, 1, q, world.scale, missed=missed, coarse=coarse)
        check_choice(World(pages, made), choice, items, 1, q, missed, coarse)
    nan = sketches.scan(made, plan, 1, q.index_fill(0, torch.tensor([4]), torch.nan), world.scale)
    assert nan.counts.tolist()[1] == items.held[1]  # an item whose queries are no numbers reads everything


@every_dtype
def test_a_key_is_within_half_a_step_of_its_code(dtype: torch.dtype) -> None:
    world = make_world(32, 48, 16, dtype, 9)
    k = torch.stack([gather(world.pages, torch.tensor([page]), 32)[0].float() for page in range(9)])
    steps = world.sketches.steps.float().unsqueeze(1)
    near = sketch_reference.keys(world.sketches, torch.arange(9))
    rounding = k.abs().amax() * 2**-8  # of low and step
    assert ((near - k).abs() <= steps / 2 + rounding).all()
    assert sketch_reference.unpacked(world.sketches).unique().tolist() == list(range(16))


def test_only_named_pages_are_sealed_and_a_constant_channel_is_exact() -> None:
    layout = PageLayout(16, 16, 16, BF16)
    pages, made = Pages.allocate(layout, 5), Sketches.allocate(layout, 5)
    append = cpu_decode.plan_append(pages, torch.arange(80).unsqueeze(0))
    cpu_decode.append(pages, append, 0, torch.full((80, 16), 3.0), torch.full((80, 16), -2.0))
    made.scanned.fill_(7)
    made.values.fill_(7)
    sketches.seal(pages, made, torch.tensor([3, 1]))
    assert (made.scanned[[0, 2, 4]] == 7).all()
    assert (made.values[[0, 2, 4]] == 7).all()
    assert (sketch_reference.keys(made, torch.tensor([1, 3])) == 3).all()
    assert (made.means[[1, 3]] == -2).all()
    sketches.seal(pages, made, torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [F32, F16, I8], ids=str)
def test_a_constant_that_is_rounded_up_spoils_nothing(dtype: torch.dtype) -> None:
    layout = PageLayout(32, 32, 16, dtype)
    pages, made = Pages.allocate(layout, 2), Sketches.allocate(layout, 2)
    k = torch.randn(64, 32)
    k[:, 3] = 1.006  # in bfloat16 1.0078
    append = cpu_decode.plan_append(pages, torch.arange(64).unsqueeze(0))
    cpu_decode.append(pages, append, 0, k, torch.zeros(64, 16))
    sketches.seal(pages, made, torch.arange(2))
    assert (made.steps >= 0).all()
    items = Items([np.arange(2, dtype=np.int32)[None]], ints(2), ints(0), ints(2), ints(2))
    q = torch.randn(3, 32)
    masses = sketches.scan(made, sketches.plan_scan(made, items, 3), 0, q, 0.2).log_mass[0, :, :2]
    exact = torch.logsumexp((q @ k.T * 0.2).view(3, 2, 32), -1)
    assert (masses - exact).abs().max() < NOISE


def test_a_tail_that_weighs_next_to_nothing_is_nothing(small: World) -> None:
    items = Items([np.arange(64, dtype=np.int32)[None]], ints(64), ints(0), ints(64), ints(64))
    q = torch.randn(2, 16, generator=torch.Generator().manual_seed(3)) * 60
    choice = sketches.scan(small.sketches, sketches.plan_scan(small.sketches, items, 2), 0, q, small.scale)
    spread = masses_of(choice, items, 0)
    assert (spread.amax(-1) - spread.amin(-1) > 100).all()
    assert choice.tail.out.isfinite().all()
    assert not choice.tail.lse.isnan().any()
    plan = sketches.plan_scan(small.sketches, items, 2)
    in_codes = sketches.scan(small.sketches, plan, 0, q, small.scale, None, 0.0, coarse=0.99)
    assert in_codes.tail.out.isfinite().all()
    assert not in_codes.tail.lse.isnan().any()


def test_only_active_items_are_scanned(small: World) -> None:
    items = some_items(64, (300, 20, 100))
    plan, q = sketches.plan_scan(small.sketches, items, 2), torch.randn(6, 16)
    whole = [x.clone() for x in sketches.scan(small.sketches, plan, 1, q, small.scale)[:4]]
    plan.result.counts.fill_(-1)
    some = sketches.scan(small.sketches, plan, 1, q, small.scale, active=np.array([True, False, True]))
    assert some.counts.tolist() == [int(whole[3][0]), -1, int(whole[3][2])]
    sketches.scan(small.sketches, plan, 1, q, small.scale)
    assert torch.equal(plan.result.counts, whole[3])
    with pytest.raises(ValueError, match=r"active must be bool \[3\], got int64 \[3\]"):
        sketches.scan(small.sketches, plan, 1, q, small.scale, active=np.ones(3, np.int64))  # type: ignore[arg-type]


@every_dtype
@pytest.mark.parametrize("soft_cap", [None, 2.5])
@pytest.mark.parametrize(("page_size", "d_k", "d_v"), SHAPES)
def test_masses_are_those_of_the_reference(
    page_size: int, d_k: int, d_v: int, dtype: torch.dtype, soft_cap: float | None
) -> None:
    world = make_world(page_size, d_k, d_v, dtype)
    items = some_items(40, (100, 1, 17, 0, 33))
    for group in (1, 2, 3, 4, 5, 8, 9, 16) if dtype is BF16 else (3, 16):
        q = torch.randn(5 * group, d_k, generator=torch.Generator().manual_seed(group))
        choice = sketches.scan(
            world.sketches, sketches.plan_scan(world.sketches, items, group, 2), 1, q, world.scale, soft_cap, coarse=0.2
        )
        exact = sketch_reference.scan(
            world.sketches, sketch_reference.plan_scan(world.sketches, items, group), 1, q, world.scale, soft_cap
        )
        for i in range(5):
            error = (masses_of(choice, items, i) - masses_of(exact, items, i)).abs()
            assert error.max().item() < NOISE if error.numel() else items.sealed[i] == 0
        if soft_cap is None:
            check_choice(world, choice, items, 1, q, MISSED, 0.2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_queries_of_any_float_dtype_and_a_thousand_entries(dtype: torch.dtype) -> None:
    world = make_world(32, 32, 16, BF16, spread=3.0)
    items = some_items(40, (1000, 999))
    q = torch.randn(6, 32).to(dtype)
    one, two = (sketches.plan_scan(world.sketches, items, 3, threads) for threads in (1, 2))
    choice = sketches.scan(world.sketches, one, 1, q, world.scale, coarse=0.1)
    again = sketches.scan(world.sketches, two, 1, q, world.scale, coarse=0.1)
    for i in range(2):
        assert torch.equal(masses_of(choice, items, i), masses_of(again, items, i))
    assert torch.equal(choice.counts, again.counts)
    assert torch.equal(choice.tail.out, again.tail.out)
    check_choice(world, choice, items, 1, q, MISSED, 0.1)
    assert (choice.coarse_counts > 0).all()
    assert (choice.counts < items.sealed.max()).all()


@pytest.fixture(scope="module")
def small() -> World:
    return make_world(16, 16, 16, F32, 64, spread=2.0)


@settings(max_examples=100)
@given(data=st.data())
def test_a_choice_keeps_its_promises(small: World, data: st.DataObject) -> None:
    draw = data.draw
    n, group = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    sealed = ints(*(draw(st.sampled_from([0, 1, 5, 16, 47, 300])) for _ in range(n)))
    held = sealed + ints(*(draw(st.integers(0, 2)) for _ in range(n)))
    sinks, recent = (ints(*(draw(st.integers(0, 320)) for _ in range(n))) for _ in range(2))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    tables = [rng.integers(0, 64, (1, m + 1)).astype(np.int32) for m in held]
    items = Items(tables, sealed, sinks, recent, held)
    missed = draw(st.sampled_from([0.0, 1e-4, 0.01, 0.2, 0.9]))  # whether all is more than 1.0, rounding says
    coarse = draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0]))
    q = torch.from_numpy(rng.standard_normal((n * group, 16))).float() * draw(st.sampled_from([0.0, 0.5, 3.0, 10.0]))
    plan = sketches.plan_scan(small.sketches, items, group, draw(st.integers(1, 3)))
    choice = sketches.scan(small.sketches, plan, 0, q, small.scale, None, missed, coarse=coarse)
    check_choice(small, choice, items, 0, q, missed, coarse)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_and_stays_with_its_item(small: World, bad: float) -> None:
    items = some_items(64, (100, 100))
    q = torch.randn(6, 16)
    plan = sketches.plan_scan(small.sketches, items, 3)
    healthy = [x.clone() for x in sketches.scan(small.sketches, plan, 1, q, small.scale)[:5]]
    q[1, 5] = bad
    choice = sketches.scan(small.sketches, plan, 1, q, small.scale)
    assert choice.log_mass[0, 1, :100].isnan().all()
    assert int(choice.counts[0]) == 101
    assert torch.equal(choice.log_mass[1, :, :100], healthy[0][1, :, :100])
    assert choice.counts[1] == healthy[3][1]


def test_keys_that_are_not_finite_are_seen() -> None:
    world = make_world(32, 32, 16, F32, 4)
    world.pages.k[2, 5, 7] = torch.nan
    sketches.seal(world.pages, world.sketches, torch.arange(4))
    items = Items([np.arange(4, dtype=np.int32)[None]], ints(4), ints(0), ints(4), ints(4))
    q = torch.randn(3, 32)
    choice = sketches.scan(world.sketches, sketches.plan_scan(world.sketches, items, 3), 0, q, world.scale)
    assert choice.log_mass[0, :, 2].isnan().all()
    assert choice.log_mass[0, :, [0, 1, 3]].isfinite().all()
    assert choice.counts.tolist() == [4]


def test_chosen_pages_and_the_tail_are_nearly_all_of_attention() -> None:
    world = make_world(32, 64, 64, BF16, 128, spread=4.0)
    table = np.random.default_rng(1).permutation(128).astype(np.int32)
    items = Items([table[None]], ints(128), ints(1), ints(124), ints(128))
    q = torch.randn(4, 64).bfloat16()
    choice = sketches.scan(world.sketches, sketches.plan_scan(world.sketches, items, 4), 0, q, world.scale)

    def attention(numbers: torch.Tensor) -> Partial:
        k, v = gather(world.pages, numbers, len(numbers) * 32)
        logits = q.float() @ k.float().T * world.scale
        return Partial(torch.softmax(logits, -1) @ v.float(), torch.logsumexp(logits, -1))

    exact = attention(torch.from_numpy(table))
    count = int(choice.counts[0])
    assert count < 100
    chosen = attention(choice.pages[0, :count])
    near = merge((chosen, choice.tail))
    assert (near.lse - exact.lse).abs().max() < 0.01

    def error(of: torch.Tensor) -> float:
        return float(((of - exact.out).norm(dim=-1) / exact.out.norm(dim=-1)).max())

    assert error(near.out) < min(0.02, error(chosen.out))
    plan = sketches.plan_scan(world.sketches, items, 4)
    in_codes = sketches.scan(world.sketches, plan, 0, q, world.scale, None, 0.0, coarse=1.0)
    assert in_codes.counts.tolist() == [5]  # but for the sinks and the last pages all is in 4 bits
    near = merge((attention(in_codes.pages[0, :5]), in_codes.tail))
    assert error(near.out) < 0.1
    by_means = sketches.scan(world.sketches, plan, 0, q, world.scale, None, 1.0)
    assert by_means.counts.tolist() == [5]
    assert 3 * error(near.out) < error(merge((attention(by_means.pages[0, :5]), by_means.tail)).out)


def test_a_plan_serves_every_layer_that_has_its_pages(small: World) -> None:
    items = some_items(64, (30,), layers=3)
    plan = sketches.plan_scan(small.sketches, items, 2)
    q = torch.randn(2, 16)
    for layer in (2, 1, 2):
        choice = sketches.scan(small.sketches, plan, layer, q, small.scale)
        check_choice(small, choice, items, layer, q, MISSED)
    with pytest.raises(ValueError, match="layer 0 lacks a page"):
        sketches.scan(small.sketches, plan, 0, q, small.scale)


def test_no_items_are_no_work(small: World) -> None:
    plan = sketches.plan_scan(small.sketches, Items([], ints(), ints(), ints(), ints()), 2)
    assert plan.result.counts.tolist() == []
    assert plan.missing == frozenset()


def test_kernels_are_prepared_one_by_one() -> None:
    assert list(sketches.prepare(PageLayout(16, 16, 16, F32))) == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sealed": ints(9)}, "item 0 holds 8 entries, but 9 of them are sealed"),
        ({"sealed": ints(-1)}, "sealed has -1, allowed: 0 or more"),
        ({"sinks": np.zeros(1, np.int32)}, r"sinks must be int64 \[1\], got int32 \[1\]"),
        ({"recent": ints(1, 2)}, r"recent must be int64 \[1\], got int64 \[2\]"),
        ({"held": ints(99), "sealed": ints(1)}, r"the table of item 0 must be int32 \[1, 99 or more\]"),
        ({"tables": [np.full((1, 8), 64, np.int32)]}, "names page 64; there are pages 0 to 63"),
        ({"tables": [np.full((1, 8), -2, np.int32)]}, "names page -2; there are pages 0 to 63"),
        ({"tables": [np.zeros((1, 8))]}, "must be int32"),
        ({"tables": [np.zeros((1, 16), np.int32)[:, ::2]]}, "contiguous along its entries"),
    ],
)
def test_wrong_items_are_refused(small: World, change: dict[str, object], message: str) -> None:
    given_items = {"tables": [np.zeros((1, 8), np.int32)], "sealed": ints(8), "sinks": ints(0)}
    given_items |= {"recent": ints(8), "held": ints(8)}
    with pytest.raises(ValueError, match=message):
        sketches.plan_scan(small.sketches, Items(**given_items | change), 2)  # type: ignore[arg-type]


def test_wrong_arguments_are_refused(small: World) -> None:
    items = Items([np.zeros((1, 8), np.int32)], ints(8), ints(0), ints(8), ints(8))
    plan, q = sketches.plan_scan(small.sketches, items, 2), torch.randn(2, 16)
    others = Sketches.allocate(small.pages.layout, 64)
    for arguments, message in [
        ((others, plan, 0, q, 1.0), "made for other sketches"),
        ((small.sketches, plan, 1, q, 1.0), "layer must be from 0 to 0, got 1"),
        ((small.sketches, plan, 0, q[:1], 1.0), r"q must be \[2, 16\]"),
        ((small.sketches, plan, 0, q, float("nan")), "scale must be finite, got nan"),
        ((small.sketches, plan, 0, q, 1.0, 0.0), "soft_cap must be above 0"),
        ((small.sketches, plan, 0, q, 1.0, None, 1.5), "missed must be from 0 to 1, got 1.5"),
        ((small.sketches, plan, 0, q, 1.0, None, 0.1, None, -0.5), "coarse must be from 0 to 1, got -0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            sketches.scan(*arguments)  # type: ignore[arg-type]
    for more, message in [
        ({"group": 0}, "group must be at least 1, got 0"),
        ({"group": 2, "threads": 0}, "threads must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            sketches.plan_scan(small.sketches, items, **more)
    with pytest.raises(ValueError, match="page_ids must be from 0 to 63, got 64"):
        sketches.seal(small.pages, small.sketches, torch.tensor([64]))
    with pytest.raises(ValueError, match=r"page_ids must be int64 \[n\], got torch.int32"):
        sketches.seal(small.pages, small.sketches, torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match="sketches of 65 pages"):
        sketches.seal(small.pages, Sketches.allocate(small.pages.layout, 65), torch.tensor([1]))
    with pytest.raises(ValueError, match="n_pages must be at least 1, got 0"):
        Sketches.allocate(small.pages.layout, 0)
    with pytest.raises(ValueError, match="sketches are made of pages of"):
        Sketches.allocate(PageLayout(7, 16, 16, F32, Order.TOKENS), 3)
    with pytest.raises(ValueError, match=r"arena must be uint8 \[n_pages, 320\]"):
        Sketches(small.sketches.layout, torch.zeros(3, 64, dtype=torch.uint8), small.sketches.values)
    with pytest.raises(ValueError, match="sketches of 64 pages have values of 3"):
        Sketches(small.sketches.layout, small.sketches.scanned, small.sketches.values[:3])


ONE_SCAN = """
import sys
sys.path[:0] = {paths!r}
from test_sketches import BF16, I8, MISSED, Sketches, check_choice, make_world, some_items, masses_of
import torch
from lamina_kernels.sketches import reference as sketch_reference
from lamina_kernels.sketches import sketches
for dtype, page_size in ((BF16, 32), (I8, 16)):
    world, items = make_world(page_size, 48, 32, dtype), some_items(40, (50, 7))
    again = Sketches.allocate(world.pages.layout, 40)
    sketch_reference.seal(world.pages, again, torch.arange(40))
    if not torch.equal(sketch_reference.unpacked(again), sketch_reference.unpacked(world.sketches)):
        sys.exit("codes differ")
    q = torch.randn(6, 48)
    plan = sketches.plan_scan(world.sketches, items, 3)
    choice = sketches.scan(world.sketches, plan, 1, q, world.scale, coarse=0.3)
    plan = sketch_reference.plan_scan(world.sketches, items, 3)
    exact = sketch_reference.scan(world.sketches, plan, 1, q, world.scale)
    for i in range(2):
        if not (masses_of(choice, items, i) - masses_of(exact, items, i)).abs().max() < 0.15:
            sys.exit("masses differ")
    check_choice(world, choice, items, 1, q, MISSED, 0.3)
"""


AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse2,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi2,+cx16"}


@pytest.mark.soak
@pytest.mark.timeout(600)  # it compiles five kernels
def test_a_cpu_with_fewer_instructions_finds_the_same(tmp_path: Path) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("an x86 CPU is named")
    environment = os.environ | AVX2 | {"NUMBA_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-c", ONE_SCAN.format(paths=PATHS)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
