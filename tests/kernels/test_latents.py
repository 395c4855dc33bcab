"""Pages of latents, whose V is the front of K: what they cost, and attention over them."""

from __future__ import annotations

import dataclasses

import kernel_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_attention import Row, any_sequence, attend, build, errors

from lamina_kernels.attention import decode as cpu_decode
from lamina_kernels.paged.pages import DTYPES, FLOATS, Order, PageLayout, Pages, gather, gather_heads
from lamina_kernels.select import Kernels
from lamina_kernels.sketches.layout import SketchLayout

DEEPSEEK_V3 = (512 + 64, 512)  # numbers of a latent, and of them V
WIDTHS = [DEEPSEEK_V3, (256 + 32, 256), (48, 16), (32, 32), (80, 48)]
CPU_DTYPES = (*FLOATS, torch.int8)
CASES = [
    pytest.param(kernels, dtype, id=f"{name}-{dtype}".replace("torch.", ""))
    for name, kernels in (("cpu", cpu_decode), ("reference", reference))
    for dtype in CPU_DTYPES
]
every_case = pytest.mark.parametrize(("kernels", "dtype"), CASES)
every_dtype = pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_costs_its_latent_and_at_most_one_scale(dtype: torch.dtype) -> None:
    d_k, d_v = DEEPSEEK_V3
    layout = PageLayout(32, d_k, d_v, dtype, Order.TOKENS, latent=True)
    scale = 4 if layout.scaled else 0
    assert layout.page_bytes == 32 * ((512 + 64) * dtype.itemsize + scale)
    assert Pages.allocate(layout, 3).k.numel() == 3 * 32 * d_k


@every_case
@settings(max_examples=30)
@given(data=st.data(), cap=st.sampled_from([None, 3.0]), threads=st.integers(1, 4))
def test_any_batch_is_right(kernels: Kernels, dtype: torch.dtype, data, cap, threads: int) -> None:
    """Windows, sinks, lists of tokens, biases: in any page size, with any group."""
    d_k, d_v = data.draw(st.sampled_from(WIDTHS))
    layout = kernels.layout(data.draw(st.sampled_from([16, 32, 48, 80, 256])), d_k, d_v, dtype, True)
    sequences = data.draw(st.lists(any_sequence(1), min_size=1, max_size=3))
    world = build(kernels, layout, sequences, 1, data.draw(st.integers(1, 16)), data.draw(st.integers(0, 99)))
    assert max(errors(kernels, world, threads, cap)) <= 1


@every_case
def test_deepseek_v3_decodes_and_prefills(kernels: Kernels, dtype: torch.dtype) -> None:
    """All 128 query heads are one group."""
    layout = kernels.layout(32, *DEEPSEEK_V3, dtype, True)
    rows = [Row(300, 1, 0, 301), Row(45, 1, 3, 45), Row(0, 20, 0, 20), Row(150, 1, 0, 150, listed=1)]
    assert max(errors(kernels, build(kernels, layout, rows, 1, 128), 2)) <= 1


@every_dtype
def test_the_kernels_agree_where_memory_behind_a_row_is_nan(dtype: torch.dtype) -> None:
    """`build` fills what no query sees with NaN; a strip that a row shares with it must not read it."""
    layout = cpu_decode.layout(32, 80, 48, dtype, True)
    for lo, hi in ((0, 1), (5, 31), (17, 40), (31, 33)):
        world = build(cpu_decode, layout, [Row(hi, 1, lo, hi)], 1, 9)
        assert torch.isfinite(attend(cpu_decode, world).out).all()


@every_case
def test_gathered_v_is_the_front_of_k(kernels: Kernels, dtype: torch.dtype) -> None:
    layout = kernels.layout(16, 80, 48, dtype, True)
    pages = Pages.allocate(layout, 4)
    slots = torch.randperm(64)[:40].view(1, 40)
    k = torch.randn(40, 80)
    kernels.append(pages, kernels.plan_append(pages, slots), 0, k, k[:, :0])
    table = torch.tensor([0, 1, 2, 3])
    all_k, all_v = gather(pages, table, 64)
    assert torch.equal(all_v, all_k[:, :48])
    assert torch.allclose(all_k[slots[0]].float(), k, atol=0.05)
    for one, other in zip(gather_heads(pages, table.view(1, 4)), (all_k, all_v), strict=True):
        assert torch.equal(one[:, 0], other)


def test_refused() -> None:
    layout = cpu_decode.layout(16, 80, 48, torch.float32, True)
    with pytest.raises(ValueError, match="d_v of a latent, which is a part of K, must be at most d_k 48, got 64"):
        dataclasses.replace(layout, d_k=48, d_v=64)
    with pytest.raises(ValueError, match="d_k must be a multiple of 16 from 16 to 576, got 592"):
        dataclasses.replace(layout, d_k=592)
    with pytest.raises(ValueError, match="pages of latents have no V block"):
        _ = Pages.allocate(layout, 1).v
    with pytest.raises(ValueError, match="sketches are not made of latents"):
        SketchLayout(layout)
    pages, k = Pages.allocate(layout, 1), torch.zeros(1, 80)
    plan = cpu_decode.plan_append(pages, torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"v must be \[1, 0\] .* got torch.float32 \[1, 48\]"):
        cpu_decode.append(pages, plan, 0, k, torch.zeros(1, 48))
