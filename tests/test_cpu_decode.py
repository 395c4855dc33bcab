"""Paged attention, compiled and in plain torch, against float64 over the inputs before rounding."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_attention import Row, World, build, relative_error

from lamina_kernels import cpu_decode, launch, reference
from lamina_kernels.pages import PageLayout, Pages
from lamina_kernels.partial import merge
from lamina_kernels.select import Kernels

BOTH: list[Kernels] = [cpu_decode, reference]
NAMES = ["cpu", "reference"]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LIMITS = {F32: 1e-5, BF16: 5e-3, F16: 1e-3}  # relative norm of the error
LAYOUTS = [
    PageLayout(16, 64, 64, F32),
    PageLayout(48, 80, 112, F32),
    PageLayout(32, 64, 64, BF16),
    PageLayout(16, 96, 48, BF16),
    PageLayout(96, 256, 16, BF16),
    PageLayout(32, 16, 80, F16),
]
RAGGED = [Row(600, 1, 0, 600), Row(40, 3, 5, 40), Row(0, 130, 0, 130), Row(10, 1, 0, 0), Row(500, 50, 70, 550, 64)]


def attend(kernels: Kernels, world: World, window: int | None = None, threads: int = 2, cap: float | None = None):
    scale = world.pages.layout.d_k**-0.5
    plan = kernels.plan(world.pages, world.rows, window, threads)
    return kernels.attend(world.pages, plan, 1, world.q, scale, cap)


def check(kernels: Kernels, world: World, window: int | None, threads: int, cap: float | None) -> None:
    layout = world.pages.layout
    out, lse = attend(kernels, world, window, threads, cap)
    wanted = world.expected(layout.d_k**-0.5, window, cap)
    assert relative_error(out, wanted.out) <= LIMITS[layout.dtype]
    finite = torch.isfinite(wanted.lse)
    assert torch.equal(lse[~finite].double(), wanted.lse[~finite])
    tolerance = {F32: 1e-5, BF16: 5e-2, F16: 1e-2}[layout.dtype]
    torch.testing.assert_close(lse[finite].double(), wanted.lse[finite], atol=tolerance, rtol=1e-5)


@st.composite
def any_row(draw: st.DrawFn) -> Row:
    start, count = draw(st.integers(0, 300)), draw(st.sampled_from([1, 1, 2, 7, 16, 45]))
    base = draw(st.integers(0, start))
    lo = draw(st.integers(base, start))
    hi = draw(st.sampled_from([start, start + count, lo, (lo + start) // 2]))
    return Row(start, count, lo, hi, base)


@pytest.mark.parametrize("kernels", BOTH, ids=NAMES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.lists(any_row(), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 8, 11]),
    window=st.sampled_from([None, None, 1, 33, 200]),
    cap=st.sampled_from([None, 3.0]),
    threads=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_batch_is_right(kernels, layout, rows, heads, group, window, cap, threads, seed) -> None:
    check(kernels, build(kernels, layout, rows, heads, group, seed), window, threads, cap)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_prompt_in_many_query_blocks_beside_decode_rows(layout: PageLayout) -> None:
    check(cpu_decode, build(cpu_decode, layout, [*RAGGED, Row(0, 401, 0, 401)], 1, 5), None, 3, None)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_out_has_the_dtype_of_q_and_may_be_given(dtype: torch.dtype) -> None:
    world = build(cpu_decode, LAYOUTS[2], RAGGED)
    plan = cpu_decode.plan(world.pages, world.rows, None, 2)
    out = torch.full((world.rows.n, 64), torch.nan, dtype=dtype)
    result = cpu_decode.attend(world.pages, plan, 1, world.q.to(dtype), 0.125, out=out)
    assert result.out is out
    assert relative_error(out, world.expected(0.125).out) <= 7e-3


@pytest.mark.parametrize("kernels", BOTH, ids=NAMES)
def test_a_query_that_sees_nothing_is_empty_whatever_stood_in_the_buffer(kernels: Kernels) -> None:
    world = build(kernels, LAYOUTS[2], [Row(5, 2, 9, 9), Row(9, 3, 0, 4)])
    plan = kernels.plan(world.pages, world.rows, 2, 2)
    out = torch.full((world.rows.n, 64), torch.nan)
    _, lse = kernels.attend(world.pages, plan, 1, world.q, 0.125, out=out)
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("kernels", BOTH, ids=NAMES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_huge_logits(kernels: Kernels, layout: PageLayout) -> None:
    world = build(kernels, layout, [Row(200, 2, 0, 202)], spread=3e3)
    out, lse = attend(kernels, world)
    assert torch.isfinite(out).all()
    assert lse.abs().max() > 1e3
    assert torch.isfinite(lse).all()


def test_a_single_key_gives_its_value() -> None:
    world = build(cpu_decode, LAYOUTS[0], [Row(0, 1, 0, 1)], kv_heads=1)
    assert torch.equal(attend(cpu_decode, world).out, world.keys[0][1][0].expand(3, -1))


def test_nan_in_q_is_not_hidden() -> None:
    world = build(cpu_decode, LAYOUTS[0], [Row(50, 1, 0, 50)], kv_heads=1, group=2)
    world.q[1, 3] = torch.nan
    out, lse = attend(cpu_decode, world)
    assert torch.isnan(out[1]).all()
    assert torch.isnan(lse[1])
    assert torch.isfinite(out[0]).all()


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_reruns_are_equal_to_the_bit_and_threads_to_rounding(layout: PageLayout) -> None:
    world = build(cpu_decode, layout, RAGGED)
    first, again = attend(cpu_decode, world, threads=3), attend(cpu_decode, world, threads=3)
    assert torch.equal(first.out, again.out)
    assert torch.equal(first.lse, again.lse)
    alone = attend(cpu_decode, world, threads=1)
    assert relative_error(first.out, alone.out) < (1e-6 if layout.dtype is F32 else 3e-3)


def test_without_torchs_openmp_python_threads_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    world = build(cpu_decode, LAYOUTS[0], RAGGED)
    wanted = attend(cpu_decode, world, threads=3)
    monkeypatch.setattr(launch, "_launcher", lambda: launch._on_python_threads)
    assert torch.equal(attend(cpu_decode, world, threads=3).out, wanted.out)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    world = build(cpu_decode, LAYOUTS[0], RAGGED)
    together = attend(cpu_decode, world, threads=1)
    for i, row in enumerate(RAGGED):
        first, n = int(world.rows.first[i]), row.count * 6
        names = ("count", "start", "kv_heads", "group", "lo", "hi", "base")
        columns = {name: getattr(world.rows, name)[i : i + 1] for name in names}
        rows = dataclasses.replace(world.rows, first=np.zeros(1, np.int64), tables=[world.rows.tables[i]], **columns)
        alone = attend(cpu_decode, dataclasses.replace(world, rows=rows, q=world.q[first : first + n]), threads=1)
        assert torch.equal(alone.out, together.out[first : first + n])


def test_ranges_merge_to_the_whole() -> None:
    world = build(cpu_decode, LAYOUTS[0], [Row(333, 2, 0, 333)])
    parts = []
    for lo, hi in ((0, 1), (1, 150), (150, 150), (150, 333)):
        rows = dataclasses.replace(world.rows, lo=np.array([lo]), hi=np.array([hi]))
        parts.append(attend(cpu_decode, dataclasses.replace(world, rows=rows)))
    whole, merged = attend(cpu_decode, world), merge(parts)
    assert relative_error(merged.out, whole.out) < 1e-6
    torch.testing.assert_close(merged.lse, whole.lse)


def test_a_page_freed_by_a_window_is_missed_only_where_it_is_read() -> None:
    world = build(cpu_decode, LAYOUTS[0], [Row(100, 1, 0, 100)])
    world.rows.tables[0][1, :, :4] = -1  # positions below 64 in layer 1
    plan = cpu_decode.plan(world.pages, world.rows, 30, 1)
    out = cpu_decode.attend(world.pages, plan, 1, world.q, 0.125).out
    assert relative_error(out, world.expected(0.125, 30).out) <= 1e-5
    plan = cpu_decode.plan(world.pages, world.rows, None, 1)
    with pytest.raises(ValueError, match="layer 1 lacks a page"):
        cpu_decode.attend(world.pages, plan, 1, world.q, 0.125)


def test_an_empty_batch() -> None:
    world = build(cpu_decode, LAYOUTS[0], [])
    assert attend(cpu_decode, dataclasses.replace(world, q=torch.empty(0, 64))).out.shape == (0, 64)


@pytest.mark.parametrize("kernels", BOTH, ids=NAMES)
class TestRefuses:
    def test_rows(self, kernels: Kernels) -> None:
        world = build(kernels, LAYOUTS[0], [Row(40, 1, 0, 40), Row(10, 1, 0, 10)])

        def plan(**changed: object) -> None:
            kernels.plan(world.pages, dataclasses.replace(world.rows, **changed), None, 1)

        with pytest.raises(ValueError, match="without gap or overlap"):
            plan(first=np.array([0, 5]))
        with pytest.raises(ValueError, match=r"reads \[0, 4000\), but its table holds \[0, 48\)"):
            plan(hi=np.array([4000, 10]))
        with pytest.raises(ValueError, match="lo has -1"):
            plan(lo=np.array([-1, 0]))
        with pytest.raises(ValueError, match="count has 0"):
            plan(count=np.array([0, 1]))
        with pytest.raises(ValueError, match=r"start has 2147483648, allowed: below 2\*\*31"):
            plan(start=np.array([2**31, 0]))
        with pytest.raises(ValueError, match="hi must be int64"):
            plan(hi=np.array([1.0, 2.0]))
        with pytest.raises(ValueError, match="window must be at least 1 or None, got 0"):
            kernels.plan(world.pages, world.rows, 0, 1)
        for page in (len(world.pages.arena), -2, 2**30):
            world.rows.tables[0][0, 1, 2] = page
            with pytest.raises(ValueError, match=f"names page {page}"):
                kernels.plan(world.pages, world.rows, None, 1)

    def test_arguments_of_attend(self, kernels: Kernels) -> None:
        world = build(kernels, LAYOUTS[0], [Row(40, 1, 0, 40)])
        plan, n = kernels.plan(world.pages, world.rows, None, 1), world.rows.n

        def call(layer: int = 0, q: torch.Tensor = world.q, scale: float = 0.1, **more: object) -> None:
            kernels.attend(world.pages, plan, layer, q, scale, **more)

        for wrong in (world.q.double(), world.q[1:], world.q[:, 1:]):
            with pytest.raises(ValueError, match=rf"q must be \[{n}, 64\]"):
                call(q=wrong)
        for layer in (-1, 2):
            with pytest.raises(ValueError, match=f"layer must be from 0 to 1, got {layer}"):
                call(layer)
        with pytest.raises(ValueError, match="scale must be finite, got nan"):
            call(scale=float("nan"))
        with pytest.raises(ValueError, match="soft_cap must be positive"):
            call(soft_cap=0.0)
        with pytest.raises(ValueError, match="out must be"):
            call(out=torch.empty(n, 65))


def test_threads_must_be_positive() -> None:
    world = build(cpu_decode, LAYOUTS[0], [Row(40, 1, 0, 40)])
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        cpu_decode.plan(world.pages, world.rows, None, 0)


def test_another_arena_than_the_plans_is_refused() -> None:
    world = build(cpu_decode, LAYOUTS[0], [Row(40, 1, 0, 40)])
    plan = cpu_decode.plan(world.pages, world.rows, None, 1)
    with pytest.raises(ValueError, match="other pages"):
        cpu_decode.attend(Pages.allocate(LAYOUTS[0], 1), plan, 1, world.q, 0.1)


ONE_BATCH = """
import sys
sys.path.insert(0, {tests!r})
from test_cpu_decode import *
check(cpu_decode, build(cpu_decode, LAYOUTS[2], RAGGED), 100, 2, None)
"""
AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse2,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi2,+cx16"}


@pytest.mark.slow
@pytest.mark.parametrize("cpu", [{}, AVX2], ids=["this", "avx2"])
def test_a_second_process_compiles_nothing(cpu: dict[str, str], tmp_path) -> None:
    if cpu and os.uname().machine != "x86_64":
        pytest.skip("an x86 CPU is named")
    environment = os.environ | cpu | {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_DEBUG_CACHE": "1"}
    program = [sys.executable, "-c", ONE_BATCH.format(tests=os.path.dirname(__file__))]
    first, second = (
        subprocess.run(program, env=environment, check=True, capture_output=True, text=True).stdout for _ in range(2)
    )
    assert "data saved to" in first
    assert "data saved to" not in second
    assert "data loaded from" in second
