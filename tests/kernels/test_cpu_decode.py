"""Paged attention, compiled and in plain torch, against float64 over the inputs before rounding."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernel_reference as reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_attention import (
    LIMITS,
    LSE_LIMITS,
    SIZES,
    Row,
    World,
    any_sequence,
    attend,
    build,
    errors,
    lse_error,
    relative_error,
    take,
)

from lamina_kernels.attention import decode as cpu_decode
from lamina_kernels.compile import launch
from lamina_kernels.paged.pages import FLOATS, Order, PageLayout, Pages, gather
from lamina_kernels.paged.rows import EVERYTHING
from lamina_kernels.partial import merge
from lamina_kernels.select import CHOICES, Kernels

PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]  # of a child process

F32, BF16, F16, I8, F8 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
CPU_DTYPES = [F32, BF16, F16, I8]
CLOSE = LIMITS | {F32: 2e-6}  # of two ways to the same attention over the same stored numbers
# Either implementation, with every dtype and order that it reads.
IMPLEMENTATIONS: dict[str, Any] = {"cpu": cpu_decode, "reference": reference}  # those of GPUs: test_triton.py
CASES = [
    pytest.param(kernels, dtype, order, id=f"{name}-{dtype}-{order.value}".replace("torch.", ""))
    for name, kernels in IMPLEMENTATIONS.items()
    for order in Order
    for dtype in (*CPU_DTYPES, F8)
    if (dtype is not F8 or order is Order.TOKENS) and (kernels is reference or order is Order.CHANNELS)
]
every_case = pytest.mark.parametrize(("kernels", "dtype", "order"), CASES)
both = pytest.mark.parametrize("kernels", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
every_dtype = pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)

LAYOUTS = [
    PageLayout(16, 64, 64, F32),
    PageLayout(48, 80, 112, F32),
    PageLayout(32, 64, 64, BF16),
    PageLayout(16, 96, 48, BF16),
    PageLayout(96, 512, 16, BF16),
    PageLayout(32, 16, 80, F16),
    PageLayout(32, 64, 64, I8),
    PageLayout(80, 48, 512, I8),
]
RAGGED = [
    Row(600, 1, 0, 600),
    Row(40, 3, 5, 40),
    Row(0, 130, 0, 130),
    Row(10, 1, 0, 0),
    Row(500, 50, 70, 550, 64),
    Row(411, 2, 0, 413, window=70, sinks=5),
    Row(333, 2, 0, 320, listed=1),
    Row(90, 17, 3, 300, window=40, sinks=20),
]
ONCE = [Row(2000, 1, 0, 1777)]  # a decode query that sees every key, so that their order is of no account


def test_every_implementation_for_a_cpu_is_tested() -> None:
    assert {*CHOICES["cpu"]} - {"triton"} == {*IMPLEMENTATIONS} - {"reference"}


@st.composite
def worlds(draw: st.DrawFn, kernels: Kernels, dtype: torch.dtype, order: Order, free: bool = False) -> World:
    """Some sequences with every combination of what a row may ask for, told in any order. Pages are those of
    `LAYOUTS`, or of any size where `free`: a kernel is compiled for each."""
    by_channels = order is Order.CHANNELS
    if free:
        page_size = draw(st.sampled_from([16, 32, 48, 80, 256] if by_channels else [1, 5, 16, 37, 256]))
        d_k, d_v = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    else:
        shape = draw(st.sampled_from([layout for layout in LAYOUTS if layout.dtype is dtype] or LAYOUTS))
        page_size, d_k, d_v = shape.page_size if by_channels else shape.page_size // 3, shape.d_k, shape.d_v
    layout = PageLayout(page_size, d_k, d_v, dtype, order)
    heads = draw(st.integers(1, 3))
    sequences = draw(st.lists(any_sequence(heads), min_size=1, max_size=3))
    world = build(kernels, layout, sequences, heads, draw(st.integers(1, 16)), draw(st.integers(0, 99)))
    return world.reordered(draw(st.permutations(range(len(world.keys)))))


@every_case
@settings(max_examples=40)
@given(data=st.data(), cap=st.sampled_from([None, 3.0]), threads=st.integers(1, 4))
def test_any_batch_is_right(kernels: Kernels, dtype: torch.dtype, order: Order, data, cap, threads: int) -> None:
    world = data.draw(worlds(kernels, dtype, order))
    assert max(errors(kernels, world, threads, cap)) <= 1


@pytest.mark.soak
@every_case
@settings(max_examples=40)
@given(data=st.data(), cap=st.sampled_from([None, 3.0]), threads=st.integers(1, 4))
def test_any_batch_of_any_size_is_right(kernels: Kernels, dtype: torch.dtype, order: Order, data, cap, threads) -> None:
    world = data.draw(worlds(kernels, dtype, order, free=True))
    assert max(errors(kernels, world, threads, cap)) <= 1


@every_case
def test_one_token_beside_thousands(kernels: Kernels, dtype: torch.dtype, order: Order) -> None:
    layout = PageLayout(32, 48, 80, dtype, order)
    rows = [Row(0, 1, 0, 1), Row(7000, 1, 0, 7001), Row(31, 1, 0, 32), Row(5000, 3, 0, 4444, listed=1), Row(1, 1, 0, 2)]
    assert max(errors(kernels, build(kernels, layout, rows, 2, 5), 3)) <= 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_prompt_in_many_query_blocks_beside_decode_rows(layout: PageLayout) -> None:
    prompts = [Row(0, 401, 0, 401), Row(900, 301, 0, 1201, window=100, sinks=30)]
    assert max(errors(cpu_decode, build(cpu_decode, layout, [*RAGGED, *prompts], 1, 5), 3)) <= 1


@pytest.mark.soak
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(Row(1_000_002, 1, 0, 1_000_003), id="paged"),
        pytest.param(Row(1_000_010, 2, 0, 1_000_001, window=600_000, sinks=4, listed=1), id="listed"),
    ],
)
@pytest.mark.parametrize(("d_k", "dtype"), [(16, F32), (64, BF16), (32, F16), (64, I8)])
@both
def test_a_million_tokens(kernels: Kernels, d_k: int, dtype: torch.dtype, row: Row) -> None:
    world = build(kernels, PageLayout(256, d_k, 48, dtype), [Row(0, 1, 0, 1), row, Row(70, 3, 0, 73)], 1, 4)
    assert max(errors(kernels, world)) <= 1


@both
@every_dtype
@pytest.mark.parametrize("given_dtype", FLOATS, ids=str)
def test_out_has_the_dtype_of_q_and_may_be_given(kernels: Kernels, dtype, given_dtype: torch.dtype) -> None:
    world = build(kernels, PageLayout(32, 64, 64, dtype), RAGGED)
    plan = kernels.plan(world.pages, world.rows, 2)
    q = world.q.to(given_dtype)
    out = torch.full((world.rows.n, 64), torch.nan, dtype=given_dtype)
    result = kernels.attend(world.pages, plan, 1, q, 0.125, out=out)
    assert result.out is out
    assert result.lse.dtype == F32
    wanted = dataclasses.replace(world, q=q).expected(0.125)
    assert relative_error(out, wanted.out) <= LIMITS[dtype] + LIMITS[given_dtype]
    fresh = kernels.attend(world.pages, plan, 1, q, 0.125)
    assert torch.equal(fresh.out, out)
    assert torch.equal(fresh.lse, result.lse)


@both
@every_dtype
def test_a_query_that_sees_nothing_is_empty_whatever_stood_in_the_buffer(kernels: Kernels, dtype) -> None:
    unseen = [
        Row(5, 2, 9, 9),
        Row(9, 3, 0, 4, window=2),
        Row(0, 1, 0, 0, listed=1),
        Row(50, 1, 30, 40, window=3, sinks=20, listed=1),
        Row(7, 2, 7, 3),
        [Row(4, 3, 9, 20, heads=1), Row(4, 3, 0, 0, 2, heads=1)],
    ]
    world = build(kernels, PageLayout(32, 64, 48, dtype), unseen)
    plan = kernels.plan(world.pages, world.rows, 2)
    out = torch.full((world.rows.n, 48), torch.nan)
    _, lse = kernels.attend(world.pages, plan, 1, world.q, 0.125, out=out)
    assert not out.any()
    assert (lse == -torch.inf).all()


@every_case
def test_huge_logits(kernels: Kernels, dtype: torch.dtype, order: Order) -> None:
    layout = PageLayout(32, 64, 80, dtype, order)
    world = build(kernels, layout, [Row(200, 2, 0, 202), Row(99, 1, 0, 90, listed=1)], spread=1e4)
    out, lse = attend(kernels, world)
    assert torch.isfinite(out).all()
    assert lse.abs().max() > 1e4
    assert lse_error(lse, world.expected().lse) <= LSE_LIMITS[dtype]


@every_case
def test_a_single_key_gives_its_value(kernels: Kernels, dtype: torch.dtype, order: Order) -> None:
    world = build(kernels, PageLayout(16, 64, 80, dtype, order), [Row(0, 1, 0, 1)], kv_heads=1)
    page = torch.from_numpy(world.rows.tables[0][1, 0])
    _, stored = gather(world.pages, page, 1)
    out = attend(kernels, world).out
    if dtype in FLOATS:
        assert torch.equal(out, stored.float().expand(3, -1))
    assert relative_error(out, stored.expand(3, -1)) <= LIMITS[dtype] / 4  # scales may be rounded with the weights
    assert relative_error(stored, world.keys[0][1][0]) <= LIMITS[dtype]


@both
@every_dtype
@pytest.mark.parametrize("keys", [50, 700])
def test_nan_in_q_is_not_hidden(kernels: Kernels, dtype: torch.dtype, keys: int) -> None:
    world = build(kernels, PageLayout(16, 64, 64, dtype), [Row(keys, 1, 0, keys)], kv_heads=1, group=2)
    world.q[1, 3] = torch.nan
    out, lse = attend(kernels, world)
    assert torch.isnan(out[1]).all()
    assert torch.isnan(lse[1])
    assert torch.isfinite(out[0]).all()


@pytest.mark.fault("F25")
@both
@every_dtype
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("keys", [50, 700])  # the latter are cut into parts
def test_what_is_not_finite_in_a_key_or_a_value_is_not_hidden(kernels: Kernels, dtype, wrong: float, keys) -> None:
    for at in (0, 1):  # in K, in V
        world = build(kernels, PageLayout(16, 32, 48, dtype), [Row(keys, 1, 0, keys)], kv_heads=1, group=1)
        k, v = torch.randn(1, 32), torch.randn(1, 48)
        (k, v)[at][0, 7] = wrong
        world.q[:] = world.q.abs()  # so that an infinite key has an infinite logit, whatever multiplies it
        slot = int(world.rows.tables[0][1, 0, 20 // 16]) * 16 + 20 % 16
        kernels.append(world.pages, kernels.plan_append(world.pages, torch.tensor([[slot]])), 0, k, v)
        out, lse = attend(kernels, world)
        if dtype is I8:
            assert not torch.isfinite(world.pages.scales[slot // 16, at, slot % 16])
            assert torch.isfinite(world.pages.scales[slot // 16, 1 - at, slot % 16])
            assert torch.isnan(out).all()
        elif at == 1:
            assert not torch.isfinite(out[:, 7]).any()
        elif wrong == -torch.inf:  # a key that is not seen: that is right, and all there is to see
            assert torch.isfinite(out).all()
        else:
            assert torch.isnan(out).all()
            assert not torch.isfinite(lse).any()


def restored(kernels: Kernels, world: World) -> World:
    """The same world after its only row's keys were changed, and they are stored anew."""
    (table,), size = world.rows.tables, world.pages.layout.page_size
    for head, (k, v) in enumerate(zip(*world.keys[0], strict=True)):
        slot = np.arange(len(k))
        slots = torch.from_numpy(table[1, head, slot // size].astype(np.int64) * size + slot % size)
        kernels.append(world.pages, kernels.plan_append(world.pages, slots[None]), 0, k, v)
    return world


@both
@every_dtype
@pytest.mark.parametrize("times", [30.0, 1e3])
@pytest.mark.parametrize("how", ["causality", "logit"])
def test_a_large_value_without_weight_disturbs_nothing(kernels: Kernels, dtype, times: float, how: str) -> None:
    world = build(kernels, PageLayout(32, 64, 64, dtype), [Row(98, 2, 0, 100)], 2, 2)
    k, v = world.keys[0]
    v[:, 99] *= times
    if how == "logit":
        world.q[:] = world.q.abs()
        k[:, 99] = -20
    restored(kernels, world)
    seen = slice(0, 4 if how == "causality" else 8)  # of both queries, or of the one before the large value
    assert relative_error(attend(kernels, world).out[seen], world.expected().out[seen]) <= LIMITS[dtype]


@both
@every_dtype
@pytest.mark.parametrize("gap", [2.0, 4.0, 6.0, 6.5, 8.0])
def test_small_weights_beside_that_of_a_sink_are_kept(kernels: Kernels, dtype: torch.dtype, gap: float) -> None:
    world = build(kernels, PageLayout(32, 64, 64, dtype), [Row(400, 1, 0, 200)], 1, 2)
    k, v = world.keys[0]
    world.q[:] = world.q[:1]
    k *= 0.3
    k[0, 0] = world.q[0] / world.q[0].square().sum() * gap / world.scale
    v += 1
    assert max(errors(kernels, restored(kernels, world))) <= 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_reruns_are_equal_to_the_bit_and_threads_to_rounding(layout: PageLayout) -> None:
    world = build(cpu_decode, layout, RAGGED)
    first, again = attend(cpu_decode, world, threads=3), attend(cpu_decode, world, threads=3)
    assert torch.equal(first.out, again.out)
    assert torch.equal(first.lse, again.lse)
    for threads in (1, 2):
        other = attend(cpu_decode, world, threads)
        assert relative_error(first.out, other.out) <= CLOSE[layout.dtype]
        assert lse_error(first.lse, other.lse) <= CLOSE[layout.dtype]


def test_without_torchs_openmp_python_threads_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    world = build(cpu_decode, LAYOUTS[0], RAGGED)
    wanted = attend(cpu_decode, world, threads=3)
    monkeypatch.setattr(launch, "_launcher", lambda: launch._on_python_threads)
    assert torch.equal(attend(cpu_decode, world, threads=3).out, wanted.out)


@every_dtype
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    world = build(cpu_decode, PageLayout(32, 64, 80, dtype), RAGGED)
    together = attend(cpu_decode, world, threads=1)
    for i, row in enumerate(RAGGED):
        first, n = int(world.rows.first[i]), row.count * 6
        rows = dataclasses.replace(take(world.rows, [i]), first=np.zeros(1, np.int64))
        alone = attend(cpu_decode, dataclasses.replace(world, rows=rows, q=world.q[first : first + n]), threads=1)
        assert torch.equal(alone.out, together.out[first : first + n])


@every_dtype
@pytest.mark.parametrize("group", [1, 3, 8])
def test_tokens_of_a_row_are_attended_bit_for_bit_as_if_each_were_alone(dtype: torch.dtype, group: int) -> None:
    """So drafts that are verified together change no text."""
    given_ = [Row(700, 17, 0, 717), Row(130, 5, 0, 135), Row(300, 6, 128, 306, 128)]
    world = build(cpu_decode, PageLayout(32, 64, 80, dtype), given_, group=group)
    together = attend(cpu_decode, world, threads=1)
    heads = 2 * group
    for i, row in enumerate(given_):
        for token in range(row.count):
            first = int(world.rows.first[i]) + token * heads
            one = np.ones(1, np.int64)
            rows = dataclasses.replace(
                take(world.rows, [i]), first=0 * one, count=one, start=(row.start + token) * one,
                hi=(row.start + token + 1) * one,
            )  # fmt: skip
            alone = attend(
                cpu_decode, dataclasses.replace(world, rows=rows, q=world.q[first : first + heads]), threads=1
            )
            assert torch.equal(alone.out, together.out[first : first + heads])
            assert torch.equal(alone.lse, together.lse[first : first + heads])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_that_grow_are_attended_as_if_planned_anew(layout: PageLayout, threads: int) -> None:
    steps = 2 * cpu_decode.DEAL_EVERY + 3
    last = [Row(hi - 1, 1, lo, hi, lo) for lo, hi in ((0, steps + 1), (0, 300), (64, 700), (0, 129))]
    world = build(cpu_decode, layout, [*last, Row(500, 1, 0, 90)])  # the last one's range is full
    growing = np.array([True] * len(last) + [False])
    start, hi = world.rows.start, world.rows.hi
    rows = dataclasses.replace(world.rows, start=start - steps, hi=hi - steps * growing)
    grown = cpu_decode.grown(cpu_decode.plan(world.pages, rows, threads))
    assert grown is not None
    for left in reversed(range(steps)):
        moved = {1: rows.tables[1].copy()} if left % 7 == 0 else {}
        anew = changed(world, start=start - left, hi=hi - left * growing)
        plan = grown.next(*(x.tolist() for x in (anew.rows.start, anew.rows.count, anew.rows.hi)), moved)
        one = cpu_decode.attend(world.pages, plan, 1, world.q, world.scale)
        other = attend(cpu_decode, anew, threads=threads)
        assert relative_error(one.out, other.out) <= CLOSE[layout.dtype]
        assert lse_error(one.lse, other.lse) <= CLOSE[layout.dtype]
    expected = world.expected()
    assert relative_error(one.out, expected.out) <= LIMITS[layout.dtype]


@pytest.mark.parametrize("threads", [1, 3])
def test_windows_that_move_are_attended_as_if_planned_anew(threads: int) -> None:
    """From where they hide nothing to where they do; the second row does not attend its own token."""
    steps = 60
    last = [(400, 0, 401), (90, 0, 90), (300, 64, 301), (95, 0, 96), (200, 0, 201)]
    whole = build(cpu_decode, LAYOUTS[0], [Row(start, 1, lo, hi, lo) for start, lo, hi in last])
    windows = {"window": np.array([50, 64, 90, 40, EVERYTHING]), "sinks": np.array([16, 0, 100, 40, 0])}
    world = changed(whole, **windows)
    rows = dataclasses.replace(world.rows, start=world.rows.start - steps, hi=world.rows.hi - steps)
    grown = cpu_decode.grown(cpu_decode.plan(world.pages, rows, threads))
    assert grown is not None
    for left in reversed(range(steps)):
        anew = changed(world, start=world.rows.start - left, hi=world.rows.hi - left)
        plan = grown.next(*(x.tolist() for x in (anew.rows.start, anew.rows.count, anew.rows.hi)))
        one = cpu_decode.attend(world.pages, plan, 1, world.q, world.scale)
        other = attend(cpu_decode, anew, threads=threads)
        assert relative_error(one.out, other.out) <= CLOSE[LAYOUTS[0].dtype]
        assert lse_error(one.lse, other.lse) <= CLOSE[LAYOUTS[0].dtype]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_of_several_tokens_go_on_as_if_planned_anew(layout: PageLayout, threads: int, seed: int) -> None:
    """Each row starts again up to as many tokens further as it had, with the same number of tokens or another."""
    rng = np.random.default_rng(seed)
    most = [Row(900, 17, 0, 917), Row(760, 17, 64, 777, 64), Row(600, 17, 0, 600), Row(900, 17, 0, 90)]
    world = build(cpu_decode, layout, most)  # the last but one does not attend its own tokens, the last is full
    start, count = np.array([200, 300, 100, 200]), np.ones(4, np.int64)

    def turn() -> World:
        hi = np.array([*(start + count)[:2], start[2], 90])
        vectors = count * world.rows.kv_heads * world.rows.group
        rows = dataclasses.replace(world.rows, start=start, count=count, hi=hi, first=np.cumsum(vectors) - vectors)
        return dataclasses.replace(world, rows=rows, q=world.q[: int(vectors.sum())])

    grown = cpu_decode.grown(cpu_decode.plan(world.pages, turn().rows, threads))
    assert grown is not None
    for step in range(40):
        start = start + rng.integers(1, count + 1)
        if step % 3 == 0:
            count = rng.integers(1, 18, 4) if step % 2 else np.full(4, 5)
        anew = turn()
        moved = {1: anew.rows.tables[1].copy()} if step % 7 == 0 else {}
        plan = grown.next(*(x.tolist() for x in (anew.rows.start, anew.rows.count, anew.rows.hi)), moved)
        one = cpu_decode.attend(world.pages, plan, 1, anew.q, world.scale)
        other = attend(cpu_decode, anew, threads=threads)
        assert relative_error(one.out, other.out) <= CLOSE[layout.dtype]
        assert lse_error(one.lse, other.lse) <= CLOSE[layout.dtype]


@pytest.mark.parametrize(
    "row",
    [
        Row(300, 1, 0, 290, window=40), Row(300, 1, 0, 301, listed=1), Row(300, 1, 0, 0),
    ],
    ids=["window", "list", "nothing"],
)  # fmt: skip
def test_plans_that_do_not_follow_are_not_grown(row: Row) -> None:
    world = build(cpu_decode, LAYOUTS[0], [Row(200, 1, 0, 201), row])
    assert cpu_decode.grown(cpu_decode.plan(world.pages, world.rows)) is None


def changed(world: World, **columns: object) -> World:
    return dataclasses.replace(world, rows=dataclasses.replace(world.rows, **columns))


def close(kernels: Kernels, one: World, other: World) -> None:
    """The two worlds ask for the same attention."""
    a, b = attend(kernels, one), attend(kernels, other)
    limit = CLOSE[one.pages.layout.dtype]
    assert relative_error(a.out, b.out) <= limit
    assert lse_error(a.lse, b.lse) <= limit


@both
@every_dtype
def test_ranges_merge_to_the_whole(kernels: Kernels, dtype: torch.dtype) -> None:
    world = build(kernels, PageLayout(16, 64, 64, dtype), [Row(333, 2, 0, 333)])
    ranges = ((0, 1), (1, 150), (150, 150), (150, 333))
    parts = [attend(kernels, changed(world, lo=np.array([lo]), hi=np.array([hi]))) for lo, hi in ranges]
    whole, merged = attend(kernels, world), merge(parts)
    assert relative_error(merged.out, whole.out) <= CLOSE[dtype]
    assert lse_error(merged.lse, whole.lse) <= CLOSE[dtype]


@both
@every_dtype
def test_ranges_that_meet_among_the_queries_merge_to_the_whole(kernels: Kernels, dtype: torch.dtype) -> None:
    world = build(kernels, PageLayout(16, 64, 64, dtype), [Row(330, 7, 0, 337)])
    parts = [attend(kernels, changed(world, lo=np.array([lo]), hi=np.array([hi]))) for lo, hi in ((0, 333), (333, 337))]
    whole, merged = attend(kernels, world), merge(parts)
    assert relative_error(merged.out, whole.out) <= CLOSE[dtype]
    assert lse_error(merged.lse, whole.lse) <= CLOSE[dtype]
    assert torch.equal(parts[1].lse == -torch.inf, (torch.arange(len(whole.lse)) < 3 * 6))


@both
@every_dtype
@pytest.mark.parametrize("listed", [0, 1])
def test_sinks_and_a_window_are_two_ranges_merged(kernels: Kernels, dtype: torch.dtype, listed: int) -> None:
    given_ = [Row(200, 45, 0, 245, window=33, sinks=9, listed=listed), Row(20, 3, 2, 23, window=15, sinks=9)]
    world = build(kernels, PageLayout(16, 48, 64, dtype), given_)
    sinks = changed(world, hi=np.full(2, 9), window=np.full(2, EVERYTHING), sinks=np.zeros(2, np.int64))
    window = changed(world, lo=np.full(2, 9), sinks=np.zeros(2, np.int64))
    whole, merged = attend(kernels, world), merge([attend(kernels, sinks), attend(kernels, window)])
    assert relative_error(merged.out, whole.out) <= CLOSE[dtype]
    assert lse_error(merged.lse, whole.lse) <= CLOSE[dtype]


@both
@every_dtype
def test_a_list_of_all_tokens_is_the_table(kernels: Kernels, dtype: torch.dtype) -> None:
    rows = [Row(600, 1, 0, 601), Row(70, 16, 33, 80, 20), Row(300, 20, 0, 320, window=50, sinks=7)]
    world = build(kernels, PageLayout(48, 64, 32, dtype), rows)
    lists = []
    for table in world.rows.tables:
        slot = np.arange(table.shape[2] * 48)
        page = np.take(table, slot // 48, 2)
        lists.append(np.where(page < 0, -1, page * 48 + (slot % 48).astype(np.int32)))
    close(kernels, world, changed(world, tables=lists, listed=np.ones(len(rows), np.int64)))


@both
@every_dtype
def test_the_order_of_a_list_is_of_no_account(kernels: Kernels, dtype: torch.dtype) -> None:
    world = build(kernels, PageLayout(16, 64, 80, dtype), [dataclasses.replace(ONCE[0], listed=1)])
    (table,) = world.rows.tables
    order = np.random.default_rng(3).permutation(1777)
    close(kernels, world, changed(world, tables=[np.take(table, order, 2)]))


@both
@every_dtype
def test_a_page_list_in_any_order_is_the_same_set_of_keys(kernels: Kernels, dtype: torch.dtype) -> None:
    world = build(kernels, PageLayout(16, 64, 80, dtype), [Row(2000, 1, 0, 1776)])
    shuffled = world.rows.tables[0].copy()
    for head in range(2):
        shuffled[:, head] = shuffled[:, head, np.random.default_rng(head).permutation(111)]
    close(kernels, world, changed(world, tables=[shuffled]))


@both
@every_dtype
def test_rows_of_single_heads_are_the_row_of_all(kernels: Kernels, dtype: torch.dtype) -> None:
    world = build(kernels, PageLayout(32, 64, 48, dtype), RAGGED, kv_heads=3, group=2)
    rows = take(world.rows, [i for i in range(len(RAGGED)) for _ in range(3)])
    head = np.tile(np.arange(3), len(RAGGED))
    split = dataclasses.replace(
        rows,
        first=rows.first + head * 2,
        kv_heads=np.ones_like(head),
        tables=[table[:, h : h + 1] for table, h in zip(rows.tables, head, strict=True)],
    )
    close(kernels, world, dataclasses.replace(world, rows=split))


@both
def test_a_page_freed_by_a_window_is_missed_only_where_it_is_read(kernels: Kernels) -> None:
    world = build(kernels, LAYOUTS[0], [Row(100, 1, 0, 100)])
    world.rows.tables[0][1, :, :4] = -1  # positions below 64 in layer 1
    assert max(errors(kernels, world.within(30))) <= 1
    plan = kernels.plan(world.pages, world.rows, 1)
    with pytest.raises(ValueError, match="layer 1 lacks a page"):
        kernels.attend(world.pages, plan, 1, world.q, 0.125)
    plan = kernels.plan(world.pages, changed(world.within(30), sinks=np.ones(1, np.int64)).rows, 1)
    with pytest.raises(ValueError, match="layer 1 lacks a page"):
        kernels.attend(world.pages, plan, 1, world.q, 0.125)


@both
def test_an_empty_batch(kernels: Kernels) -> None:
    world = build(kernels, LAYOUTS[0], [])
    assert attend(kernels, dataclasses.replace(world, q=torch.empty(0, 64))).out.shape == (0, 64)


@both
class TestRefuses:
    def test_arguments_of_attend(self, kernels: Kernels) -> None:
        world = build(kernels, LAYOUTS[0], [Row(40, 1, 0, 40)])
        plan, n = kernels.plan(world.pages, world.rows, 1), world.rows.n
        out = torch.full((n, 64), torch.nan)

        def call(layer: int = 0, q: torch.Tensor = world.q, scale: float = 0.1, **more: object) -> None:
            kernels.attend(world.pages, plan, layer, q, scale, **({"out": out} | more))

        for wrong in (world.q.double(), world.q.to(I8), world.q[1:], world.q[:, 1:], world.q.view(1, n, 64)):
            with pytest.raises(ValueError, match=rf"q must be \[{n}, 64\]"):
                call(q=wrong)
        for layer in (-1, 2):
            with pytest.raises(ValueError, match=f"layer must be from 0 to 1, got {layer}"):
                call(layer)
        for scale in (math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError, match=f"scale must be finite, got {scale}"):
                call(scale=scale)
        for cap in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="soft_cap must be positive and finite"):
                call(soft_cap=cap)
        for wrong in (torch.empty(n, 65), torch.empty(n, 64, dtype=BF16), torch.empty(64, n).T, torch.empty(n + 1, 64)):
            with pytest.raises(ValueError, match="out must be"):
                call(out=wrong)
        assert out.isnan().all()


def test_threads_must_be_positive() -> None:
    world = build(cpu_decode, LAYOUTS[0], [Row(40, 1, 0, 40)])
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        cpu_decode.plan(world.pages, world.rows, 0)


@both
def test_other_pages_than_the_plans_are_refused_even_over_the_same_memory(kernels: Kernels) -> None:
    world = build(kernels, LAYOUTS[0], [Row(40, 1, 0, 40)])
    plan, slots = kernels.plan(world.pages, world.rows, 1), kernels.plan_append(world.pages, torch.zeros(1, 1).long())
    k = torch.zeros(1, 64)
    for other in (Pages.allocate(LAYOUTS[0], 1), Pages(LAYOUTS[0], world.pages.arena)):
        with pytest.raises(ValueError, match="other pages"):
            kernels.attend(other, plan, 1, world.q, 0.1)
        with pytest.raises(ValueError, match="other pages"):
            kernels.append(other, slots, 0, k, k)


def test_pages_in_the_order_of_other_kernels_are_refused() -> None:
    world = build(reference, dataclasses.replace(LAYOUTS[0], order=Order.TOKENS), [Row(40, 1, 0, 40)])
    with pytest.raises(ValueError, match=r"these kernels read pages of Order.CHANNELS, got Order.TOKENS"):
        cpu_decode.plan(world.pages, world.rows, 1)
    with pytest.raises(ValueError, match=r"these kernels read pages of Order.CHANNELS, got Order.TOKENS"):
        cpu_decode.plan_append(world.pages, torch.zeros(1, 1).long())


@pytest.mark.parametrize("cap", [1e3, 1e6])
def test_a_large_soft_cap_hides_nothing(cap: float) -> None:
    world = build(cpu_decode, LAYOUTS[0], RAGGED[:2])
    plan = cpu_decode.plan(world.pages, world.rows, 2)
    out = cpu_decode.attend(world.pages, plan, 1, world.q, 0.125, cap).out
    assert relative_error(out, world.expected(0.125, cap).out) <= 1e-5


ONE_BATCH = """
import sys
sys.path[:0] = {paths!r}
from test_cpu_decode import *
worlds = [build(cpu_decode, PageLayout(page_size, 64, 80, {dtype}), RAGGED) for page_size in (32, 48)]
found = [errors(cpu_decode, world, 2, cap) for world in worlds for cap in (None, 3.0)]
if not max(map(max, found)) <= 1:
    sys.exit(f"errors over what is allowed: {{found}}")
"""
AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse2,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi2,+cx16"}


@pytest.mark.soak
@every_dtype
@pytest.mark.parametrize("cpu", [{}, AVX2], ids=["this", "avx2"])
def test_a_second_process_compiles_nothing(cpu: dict[str, str], dtype: torch.dtype, tmp_path) -> None:
    if cpu and os.uname().machine != "x86_64":
        pytest.skip("an x86 CPU is named")
    environment = os.environ | cpu | {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_DEBUG_CACHE": "1"}
    program = [sys.executable, "-c", ONE_BATCH.format(paths=PATHS, dtype=dtype)]
    first, second = (subprocess.run(program, env=environment, capture_output=True, text=True) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "data saved to" in first.stdout
    assert "data saved to" not in second.stdout
    assert "data loaded from" in second.stdout
