"""Pages: exact size, and what is stored comes back, through either implementation."""

from __future__ import annotations

import kernel_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kernels.attention import decode as cpu_decode
from lamina_kernels.paged.pages import (
    DTYPES,
    FLOATS,
    PEAKS,
    Order,
    PageLayout,
    Pages,
    copy,
    gather,
    gather_heads,
    quantise,
    store_whole,
    whole,
)
from lamina_kernels.select import Kernels

both = pytest.mark.parametrize("kernels", [cpu_decode, reference], ids=["cpu", "reference"])
every_dtype = pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
STEPS = st.integers(1, 16).map(lambda n: 16 * n)


@st.composite
def layouts(draw: st.DrawFn, order: Order | None = None) -> PageLayout:
    order = order or draw(st.sampled_from(Order))
    channels = order is Order.CHANNELS
    page_size = draw(STEPS if channels else st.integers(1, 256))
    dtype = draw(st.sampled_from([dtype for dtype in DTYPES if dtype is not torch.float8_e4m3fn or not channels]))
    return PageLayout(page_size, draw(STEPS), draw(STEPS), dtype, order)


@settings(max_examples=100)
@given(layouts())
def test_a_page_costs_its_k_and_v_and_scales_and_nothing_else(layout: PageLayout) -> None:
    numbers = layout.page_size * (layout.d_k + layout.d_v)
    scales = 2 * layout.page_size if layout.dtype in PEAKS else 0
    assert layout.page_bytes == numbers * layout.dtype.itemsize + scales * 4
    assert layout.scaled == (scales > 0)
    pages = Pages.allocate(layout, 3)
    assert pages.arena.shape == (3, layout.page_bytes)
    assert pages.arena.data_ptr() % 64 == 0
    assert not pages.arena.any()
    assert pages.k.numel() + pages.v.numel() == 3 * numbers
    assert (pages.n_pages, pages.slots) == (3, 3 * layout.page_size)
    if layout.scaled:
        assert pages.scales.shape == (3, 2, layout.page_size)


@settings(max_examples=60)
@given(layouts(), st.integers(0, 2))
def test_the_views_of_a_page_cover_each_of_its_bytes_once(layout: PageLayout, page: int) -> None:
    pages, written = Pages.allocate(layout, 3), 0
    for view in (pages.k, pages.v, *([pages.scales] if layout.scaled else [])):
        view[page] = torch.full((view.element_size(),), 0x55, dtype=torch.uint8).view(view.dtype)
        written += view[page].numel() * view.element_size()
        assert int((pages.arena == 0x55).sum()) == written
    assert (pages.arena[page] == 0x55).all()
    assert written == layout.page_bytes


def test_smollm2s_page_is_8_kib() -> None:
    assert PageLayout(32, 64, 64, torch.bfloat16).page_bytes == 8192
    assert PageLayout(32, 64, 64, torch.int8).page_bytes == 4096 + 256


@both
@settings(max_examples=80)
@given(
    data=st.data(),
    given_dtype=st.sampled_from(FLOATS),
    spread=st.sampled_from([1.0, 1e-6, 1e4]),
    slots=st.lists(st.integers(0, 47), unique=True, max_size=48),
)
def test_what_is_appended_is_gathered_and_nothing_else_changes(
    kernels: Kernels, data: st.DataObject, given_dtype: torch.dtype, spread: float, slots: list[int]
) -> None:
    layout = data.draw(layouts(Order.CHANNELS if kernels is cpu_decode else None))
    n_pages = -(-48 // layout.page_size)
    pages = Pages.allocate(layout, n_pages)
    k = (torch.randn(len(slots), layout.d_k) * spread).to(given_dtype)
    v = (torch.randn(len(slots), layout.d_v) * spread).to(given_dtype)
    plan = kernels.plan_append(pages, torch.tensor([[0] * len(slots), slots], dtype=torch.int64))
    kernels.append(pages, plan, 1, k, v)
    table = torch.arange(n_pages)
    for stored, given_, d in zip(gather(pages, table, 48), (k, v), (layout.d_k, layout.d_v), strict=True):
        wanted = torch.zeros(48, d, dtype=layout.loaded)
        if layout.scaled:
            codes, scale = quantise(given_, layout.dtype)
            wanted[slots] = codes.float() * scale.unsqueeze(-1)
        else:
            wanted[slots] = given_.to(layout.dtype)
        assert stored.dtype == layout.loaded
        assert torch.equal(stored, wanted)


@pytest.mark.parametrize("dtype", PEAKS, ids=str)
@settings(max_examples=60)
@given(d=STEPS, spread=st.sampled_from([1.0, 1e-30, 1e30]), seed=st.integers(0, 99))
def test_quantising_errs_by_half_a_step_of_the_largest(dtype: torch.dtype, d: int, spread: float, seed: int) -> None:
    x = torch.randn(9, d, generator=torch.Generator().manual_seed(seed)) * spread
    x[4] = 0
    codes, scale = quantise(x, dtype)
    assert (codes.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, (9,))
    assert not codes[4].float().any()
    assert (codes.float().abs().amax(-1)[[0, 8]] == PEAKS[dtype]).all()
    step = {torch.int8: 1.0, torch.float8_e4m3fn: 32.0}[dtype]  # between the two largest codes
    largest = x.abs().amax(-1, keepdim=True)
    assert ((codes.float() * scale.unsqueeze(-1) - x).abs() <= largest / PEAKS[dtype] * step * 0.5001).all()


@every_dtype
@pytest.mark.parametrize("given_dtype", FLOATS, ids=str)
def test_both_store_the_same_bytes_also_on_several_threads(dtype: torch.dtype, given_dtype: torch.dtype) -> None:
    layout = PageLayout(48, 64, 80, dtype)
    slots = torch.randperm(48 * 50)[:1500]
    sizes = torch.tensor([1.0, 1e-3, 0.0, 300.0, 1e-6]).repeat(300).unsqueeze(-1)
    k, v = (torch.randn(1500, 64) * sizes).to(given_dtype), (torch.randn(1500, 80) * sizes).to(given_dtype)
    arenas = []
    for kernels in (cpu_decode, reference):
        pages = Pages.allocate(layout, 50)
        kernels.append(pages, kernels.plan_append(pages, slots[None]), 0, k, v)
        arenas.append(pages.arena)
    assert arenas[0].any()
    assert torch.equal(*arenas)


@both
@every_dtype
def test_rows_of_a_larger_tensor_are_stored_as_they_are(kernels: Kernels, dtype: torch.dtype) -> None:
    wide, slots = torch.randn(7, 200), torch.tensor([[3, 40, 31, 32, 0, 9, 63]])
    stored = []
    for k, v in ((wide[:, 10:58], wide[:, 100:180]), (wide[:, 10:58].contiguous(), wide[:, 100:180].contiguous())):
        pages = Pages.allocate(PageLayout(32, 48, 80, dtype), 2)
        kernels.append(pages, kernels.plan_append(pages, slots), 0, k, v)
        stored.append(pages.arena)
    assert torch.equal(*stored)


@both
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_vector_that_is_not_finite_has_a_scale_that_is_not(kernels: Kernels, wrong: float) -> None:
    layout = PageLayout(32, 64, 80, torch.int8)
    pages = Pages.allocate(layout, 1)
    k, v = torch.randn(2, 64), torch.randn(2, 80)
    k[0, 63] = v[1, 5] = wrong
    kernels.append(pages, kernels.plan_append(pages, torch.tensor([[4, 7]])), 0, k, v)
    assert torch.isfinite(pages.scales[0, :, [4, 7]]).tolist() == [[False, True], [True, False]]
    stored_k, stored_v = gather(pages, torch.tensor([0]), 8)
    assert torch.isnan(stored_k[4]).all()
    assert torch.isnan(stored_v[7]).all()
    assert torch.isfinite(stored_k[7]).all()
    assert torch.isfinite(stored_v[4]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_takes_whole_pages(dtype: torch.dtype) -> None:
    pages = Pages.allocate(PageLayout(16, 16, 16, dtype, Order.TOKENS), 4)
    pages.arena.random_(0, 255)
    before = pages.arena.clone()
    copy(pages, torch.tensor([0, 2]), torch.tensor([3, 1]))
    assert torch.equal(pages.arena, before[[0, 2, 2, 0]])


@pytest.mark.parametrize("name", ["page_size", "d_k", "d_v"])
@pytest.mark.parametrize("value", [0, 8, 40, 528, 2.5, -16, "32", None])
def test_layout_refuses(name: str, value: object) -> None:
    sizes, most = {"page_size": 32, "d_k": 64, "d_v": 64} | {name: value}, 256 if name == "page_size" else 512
    with pytest.raises(ValueError, match=f"{name} must be a multiple of 16 from 16 to {most}, got {value!r}"):
        PageLayout(**sizes, dtype=torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 257, 2.5, -1])
def test_layout_of_tokens_takes_any_whole_number_of_them(value: object) -> None:
    with pytest.raises(ValueError, match=f"page_size must be a whole number from 1 to 256, got {value}"):
        PageLayout(value, 64, 64, torch.float32, Order.TOKENS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="d_k must be a multiple of 16"):
        PageLayout(1, 40, 64, torch.float32, Order.TOKENS)


def test_pages_refuse() -> None:
    layout = PageLayout(16, 16, 16, torch.float32)
    for dtype in (torch.float64, torch.uint8, torch.int32, torch.float8_e5m2, "int8"):
        for order in Order:
            with pytest.raises(ValueError, match=r"KV dtype must be one of .* got "):
                PageLayout(16, 16, 16, dtype, order)  # type: ignore[arg-type]
    for make in (PageLayout, cpu_decode.layout):
        with pytest.raises(ValueError, match=r"KV dtype must be one of [^8]*int8, got torch\.float8_e4m3fn"):
            make(16, 16, 16, torch.float8_e4m3fn)
    assert reference.layout(16, 16, 16, torch.float8_e4m3fn).order is Order.TOKENS
    with pytest.raises(ValueError, match="n_pages must be at least 1, got 0"):
        Pages.allocate(layout, 0)
    with pytest.raises(ValueError, match=r"arena must be uint8 \[n_pages, 2048\]"):
        Pages(layout, torch.zeros(3, 100, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"arena must be uint8 \[n_pages, 640\]"):
        Pages(PageLayout(16, 16, 16, torch.int8), torch.zeros(3, 512, dtype=torch.uint8))
    pages = Pages.allocate(layout, 2)
    with pytest.raises(ValueError, match="dst must be from 0 to 1, got 2"):
        copy(pages, torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(ValueError, match="dst must be int64"):
        copy(pages, torch.tensor([0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="tokens must be from 0 to 32, got 33"):
        gather(pages, torch.tensor([0, 1]), 33)


@both
@every_dtype
def test_append_refuses_before_it_writes(kernels: Kernels, dtype: torch.dtype) -> None:
    pages = Pages.allocate(PageLayout(16, 16, 32, dtype), 2)
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
    with pytest.raises(ValueError, match=r"v must be \[2, 32\]"):
        kernels.append(pages, plan, 0, k, v.to(torch.int8))
    assert not pages.arena.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("order", list(Order))
def test_heads_are_gathered_as_one_by_one(order: Order, dtype: torch.dtype) -> None:
    layout = PageLayout(16, 32, 64, dtype, order)
    pages = Pages.allocate(layout, 40)
    generator = torch.Generator().manual_seed(1)
    pages.arena.copy_(torch.randint(0, 100, pages.arena.shape, generator=generator).to(torch.uint8))
    if layout.scaled:
        pages.scales.copy_(torch.rand(pages.scales.shape, generator=generator))
    tables = torch.randperm(40, generator=generator)[:12].view(3, 4)
    assert [len(x) for x in gather_heads(pages, tables[:, :0])] == [0, 0]
    k, v = gather_heads(pages, tables)
    for head, table in enumerate(tables):
        of_k, of_v = gather(pages, table, 64)
        assert torch.equal(k[:, head].nan_to_num(), of_k.nan_to_num())
        assert torch.equal(v[:, head].nan_to_num(), of_v.nan_to_num())


def test_whole_pages_come_back_and_those_below_0_are_zeros() -> None:
    layout = PageLayout(16, 16, 32, torch.bfloat16)
    one, other = Pages.allocate(layout, 5), Pages.allocate(layout, 5)
    one.arena.copy_(torch.randint(1, 256, one.arena.shape, dtype=torch.uint8))
    content = whole(one, torch.tensor([4, -1, 2]))
    assert torch.equal(content[[0, 2]], one.arena[[4, 2]])
    assert not content[1].any()
    store_whole(other, torch.tensor([0, 3, 1]), content)
    assert torch.equal(other.arena[[0, 3, 1]], content)
    assert not other.arena[[2, 4]].any()
    for index in ([0, 5, 1], [-1, 0, 1]):
        with pytest.raises(ValueError, match="index must be from 0 to 4"):
            store_whole(other, torch.tensor(index), content)
    with pytest.raises(ValueError, match=r"pages must be uint8 \[2, 1536\]"):
        store_whole(other, torch.tensor([0, 1]), content)
