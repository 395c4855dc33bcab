"""Pages: exact size, and what is stored comes back, through either implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kernels import cpu_decode, reference
from lamina_kernels.pages import DTYPES, PageLayout, Pages, copy, gather
from lamina_kernels.select import Kernels

BOTH: list[Kernels] = [cpu_decode, reference]
SIZES = st.integers(1, 16).map(lambda n: 16 * n)


@settings(deadline=None, max_examples=60)
@given(SIZES, SIZES, SIZES, st.sampled_from(DTYPES))
def test_a_page_costs_its_k_and_v_and_nothing_else(page_size: int, d_k: int, d_v: int, dtype: torch.dtype) -> None:
    layout = PageLayout(page_size, d_k, d_v, dtype)
    assert layout.page_bytes == page_size * (d_k + d_v) * dtype.itemsize
    pages = Pages.allocate(layout, 3)
    assert pages.arena.shape == (3, layout.page_bytes)
    assert pages.arena.data_ptr() % 64 == 0
    assert not pages.arena.any()
    assert pages.k.numel() + pages.v.numel() == 3 * page_size * (d_k + d_v)


def test_smollm2s_page_is_8_kib() -> None:
    assert PageLayout(32, 64, 64, torch.bfloat16).page_bytes == 8192


@pytest.mark.parametrize("kernels", BOTH, ids=["cpu", "reference"])
@settings(deadline=None, max_examples=60)
@given(
    layout=st.builds(
        PageLayout, st.sampled_from([16, 32, 80]), st.sampled_from([16, 48]), SIZES, st.sampled_from(DTYPES)
    ),
    given_dtype=st.sampled_from(DTYPES),
    slots=st.lists(st.integers(0, 47), unique=True, max_size=48),
)
def test_what_is_appended_is_gathered_and_nothing_else_changes(
    kernels: Kernels, layout: PageLayout, given_dtype: torch.dtype, slots: list[int]
) -> None:
    pages = Pages.allocate(layout, 3)
    k = torch.randn(len(slots), layout.d_k).to(given_dtype)
    v = torch.randn(len(slots), layout.d_v).to(given_dtype)
    kernels.append(pages, kernels.plan_append(pages, torch.tensor([slots], dtype=torch.int64)), 0, k, v)
    table = torch.arange(3)
    for stored, given_, d in zip(gather(pages, table, 48), (k, v), (layout.d_k, layout.d_v), strict=True):
        wanted = torch.zeros(48, d, dtype=layout.dtype)
        wanted[slots] = given_.to(layout.dtype)
        assert torch.equal(stored, wanted)


def test_both_store_the_same_bytes_also_on_several_threads() -> None:
    layout = PageLayout(32, 64, 80, torch.bfloat16)
    slots = torch.randperm(32 * 50)[:1500]
    k, v = torch.randn(1500, 64), torch.randn(1500, 80)
    arenas = []
    for kernels in BOTH:
        pages = Pages.allocate(layout, 50)
        kernels.append(pages, kernels.plan_append(pages, slots[None]), 0, k, v)
        arenas.append(pages.arena)
    assert torch.equal(*arenas)


def test_copy_takes_whole_pages() -> None:
    pages = Pages.allocate(PageLayout(16, 16, 16, torch.float32), 4)
    pages.arena.random_(0, 255)
    before = pages.arena.clone()
    copy(pages, torch.tensor([0, 2]), torch.tensor([3, 1]))
    assert torch.equal(pages.arena, before[[0, 2, 2, 0]])


@pytest.mark.parametrize("name", ["page_size", "d_k", "d_v"])
@pytest.mark.parametrize("value", [0, 8, 40, 272, 2.5, -16])
def test_layout_refuses(name: str, value: object) -> None:
    sizes = {"page_size": 32, "d_k": 64, "d_v": 64} | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be a multiple of 16 from 16 to 256, got {value}"):
        PageLayout(**sizes, dtype=torch.float32)  # type: ignore[arg-type]


def test_pages_refuse() -> None:
    layout = PageLayout(16, 16, 16, torch.float32)
    with pytest.raises(ValueError, match=r"KV dtype must be one of .* got torch\.int8"):
        PageLayout(16, 16, 16, torch.int8)
    with pytest.raises(ValueError, match="n_pages must be at least 1, got 0"):
        Pages.allocate(layout, 0)
    with pytest.raises(ValueError, match=r"arena must be uint8 \[n_pages, 2048\]"):
        Pages(layout, torch.zeros(3, 100, dtype=torch.uint8))
    pages = Pages.allocate(layout, 2)
    with pytest.raises(ValueError, match="dst must be from 0 to 1, got 2"):
        copy(pages, torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(ValueError, match="dst must be int64"):
        copy(pages, torch.tensor([0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="tokens must be from 0 to 32, got 33"):
        gather(pages, torch.tensor([0, 1]), 33)


@pytest.mark.parametrize("kernels", BOTH, ids=["cpu", "reference"])
def test_append_refuses_before_it_writes(kernels: Kernels) -> None:
    pages = Pages.allocate(PageLayout(16, 16, 32, torch.float32), 2)
    k, v, slots = torch.ones(2, 16), torch.ones(2, 32), torch.tensor([[0, 1]])
    for wrong in (32, -1):
        with pytest.raises(ValueError, match=f"slots must be from 0 to 31, got {wrong}"):
            kernels.plan_append(pages, torch.tensor([[0, wrong]]))
    with pytest.raises(ValueError, match="slots must be int64"):
        kernels.plan_append(pages, slots.int())
    plan = kernels.plan_append(pages, slots)
    with pytest.raises(ValueError, match="layer must be from 0 to 0, got 1"):
        kernels.append(pages, plan, 1, k, v)
    with pytest.raises(ValueError, match=r"k must be \[2, 16\]"):
        kernels.append(pages, plan, 0, v, v)
    with pytest.raises(ValueError, match=r"v must be \[2, 32\]"):
        kernels.append(pages, plan, 0, k, v.int())
    assert not pages.arena.any()
