"""The Triton kernels against plain torch and float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from engine_rig import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_attention import LIMITS, SIZES, Row, World, any_sequence, attend, build, errors, relative_error

pytest.importorskip("triton")

import kernel_reference as reference

from lamina_kernels.gpu import decode as triton_decode
from lamina_kernels.gpu import merge_partials, tuning
from lamina_kernels.gpu.split_kv import split_count
from lamina_kernels.gpu.tuning import ADA, AMPERE, HOPPER, INTERPRETER, Tile, tuning_of
from lamina_kernels.paged.pages import FLOATS, PEAKS, Order, PageLayout, Pages, gather
from lamina_kernels.paged.rows import EVERYTHING
from lamina_kernels.paged.schedule import cut
from lamina_kernels.partial import Partial, empty, merge
from lamina_kernels.sketches import reference as sketches
from lamina_kernels.sketches.layout import Sketches
from lamina_kernels.sketches.triton_logits import sketch_logits

SUPPORT = Path(__file__).parents[1] / "support"  # for child processes, which import from there

F32, BF16, F16, INT8, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
ROUNDING = {F32: 2.0**-21, BF16: 2.0**-8, F16: 2.0**-11}  # relative; of float32 there is more than one
PAGE_SIZES = (1, 3, 16, 100, 256)
RAGGED = [
    Row(600, 1, 0, 600),
    Row(40, 3, 5, 40),
    Row(0, 130, 0, 130),
    Row(10, 1, 0, 0),
    Row(500, 50, 70, 550, 64),
    Row(300, 9, 0, 309, window=40, sinks=5),
]
EVEN = [Row(200, 1, 0, 200), Row(190, 1, 0, 190), Row(210, 1, 0, 211)]
LATENTS = [(BF16, 576, 512), (F32, 80, 48), (INT8, 80, 48), (F16, 32, 32), (FP8, 32, 32)]  # the others are soak
SMALL = dataclasses.replace(INTERPRETER, many=Tile(32, 16, 1, 1), many_wide=Tile(16, 32, 1, 1))


def layout(dtype: torch.dtype, page_size: int = 7, d_k: int = 48, d_v: int = 80) -> PageLayout:
    return triton_decode.layout(page_size, d_k, d_v, dtype)


def programs_of(world: World, threads: int) -> list[int]:
    plan = triton_decode.plan(world.pages, world.rows, threads)
    return [step.grid[0] for step in plan.launches]


class TestAttend:
    @pytest.mark.parametrize("dtype", LIMITS, ids=str)
    @settings(max_examples=8)
    @given(data=st.data())
    def test_any_batch_is_right(self, dtype: torch.dtype, device: str, data: st.DataObject) -> None:
        at = layout(dtype, *(data.draw(st.sampled_from(sizes)) for sizes in (PAGE_SIZES, SIZES, SIZES)))
        kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2, 3, 8, 11, 16]))
        given_rows = data.draw(st.lists(any_sequence(kv_heads), min_size=1, max_size=3))
        world = build(triton_decode, at, given_rows, kv_heads, group, data.draw(st.integers(0, 99)), device=device)
        world = world.within(data.draw(st.sampled_from([None, 1, 50])))
        ragged, sizes = data.draw(st.booleans()), data.draw(st.sampled_from([INTERPRETER, SMALL]))
        threads, cap = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([None, 3.0]))
        schedule = mock.patch.object(triton_decode, "is_ragged", return_value=ragged)
        with schedule, mock.patch.object(tuning, "INTERPRETER", sizes):
            of_out, of_lse = errors(triton_decode, world, threads, cap)
        assert of_out <= 1
        assert of_lse <= 1

    @pytest.mark.parametrize(
        ("dtype", "d_k", "d_v"),
        [
            pytest.param(dtype, *sizes, marks=() if (dtype, *sizes) in LATENTS else pytest.mark.soak)
            for dtype, sizes in product(LIMITS, [(576, 512), (80, 48), (32, 32)])
        ],
        ids=str,
    )
    def test_latents(self, dtype: torch.dtype, d_k: int, d_v: int, device: str) -> None:
        at = triton_decode.layout(16, d_k, d_v, dtype, True)
        rows = [*RAGGED[1:], Row(90, 2, 0, 92, listed=1)]
        if device == "cpu" and d_k > 500:  # the interpreter takes seconds for each of them
            rows = rows[-2:]
        for group, threads in ((20, 3), (3, 1)):
            assert max(errors(triton_decode, build(triton_decode, at, rows, 1, group, device=device), threads)) <= 1

    @pytest.mark.soak
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize(
        ("dtype", "d_k", "d_v"),
        [(F32, 64, 64), (BF16, 80, 80), (F16, 96, 96), (INT8, 128, 128), (FP8, 192, 128), (BF16, 512, 512)],
        ids=str,
    )
    def test_long_rows_beside_a_prompt(self, dtype: torch.dtype, d_k: int, d_v: int, device: str) -> None:
        rows = [*RAGGED, Row(0, 401, 0, 401), Row(2900, 2, 0, 2902), Row(3000, 1, 0, 3001, window=700, sinks=5)]
        world = build(triton_decode, layout(dtype, 16, d_k, d_v), rows, 2, 5, device=device)
        assert max(errors(triton_decode, world, 7)) <= 1

    def test_which_schedule_a_batch_gets(self, device: str) -> None:
        at = layout(F32, 16)
        even, ragged, prompts = (
            build(triton_decode, at, rows, 1, 2, device=device)
            for rows in (EVEN, [Row(600, 1, 0, 600), *EVEN], [*EVEN, Row(0, 300, 0, 300)])
        )
        assert programs_of(even, 7) == [6]  # two chunks of each
        assert programs_of(ragged, 7) == [7]  # as many shares
        assert programs_of(prompts, 7) == [6, 7]
        for world in (even, ragged, prompts):
            assert max(errors(triton_decode, world, 11)) <= 1

    @pytest.mark.parametrize("rows", [EVEN, RAGGED], ids=["split", "lean"])
    def test_what_stood_in_the_buffers_is_not_used(self, rows: list[Row], device: str) -> None:
        world = build(triton_decode, layout(F32), rows, device=device)
        plan = triton_decode.plan(world.pages, world.rows, 19)
        assert len(plan.outputs)  # some outputs are cut
        first = triton_decode.attend(world.pages, plan, 1, world.q, world.scale)
        for scratch in plan.partials:
            scratch.fill_(torch.nan)
        out = torch.full_like(first.out, torch.nan)
        again = triton_decode.attend(world.pages, plan, 1, world.q, world.scale, out=out)
        assert again.out is out
        assert torch.equal(first.out, out)
        assert torch.equal(first.lse, again.lse)
        assert relative_error(out, world.expected().out) <= LIMITS[F32]

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_out_has_the_dtype_of_q(self, dtype: torch.dtype, device: str) -> None:
        world = build(triton_decode, layout(BF16), RAGGED, device=device)
        world = dataclasses.replace(world, q=world.q.to(dtype))
        out, lse = attend(triton_decode, world)
        assert (out.dtype, lse.dtype) == (dtype, F32)
        assert relative_error(out, world.expected().out) <= 6e-3

    def test_a_query_that_sees_nothing_is_empty(self, device: str) -> None:
        rows = [Row(5, 2, 9, 9), Row(9, 3, 0, 4, window=2), Row(80, 1, 0, 81, window=3)]
        world = build(triton_decode, layout(F32), rows, device=device)
        out, lse = attend(triton_decode, world, threads=3)
        n = 5 * 6
        assert not out[:n].any()
        assert (lse[:n] == -torch.inf).all()
        assert torch.isfinite(lse[n:]).all()

    @pytest.mark.parametrize("dtype", LIMITS, ids=str)
    def test_a_single_key_gives_its_value(self, dtype: torch.dtype, device: str) -> None:
        world = build(triton_decode, layout(dtype), [Row(20, 1, 20, 21)], kv_heads=1, device=device)
        table = torch.from_numpy(world.rows.tables[0][1, 0].astype(np.int64))[-1:]
        _, v = gather(world.pages, table, 7)
        torch.testing.assert_close(attend(triton_decode, world).out, v[20 % 7].float().expand(3, -1))

    @pytest.mark.parametrize("dtype", LIMITS, ids=str)
    def test_huge_logits(self, dtype: torch.dtype, device: str) -> None:
        world = build(triton_decode, layout(dtype), [Row(200, 2, 0, 202)], spread=3e3, device=device)
        out, lse = attend(triton_decode, world, threads=3)
        assert torch.isfinite(out).all()
        assert torch.isfinite(lse).all()
        assert lse.abs().max() > 1e3

    @pytest.mark.parametrize("ragged", [False, True])
    def test_nan_in_q_is_not_hidden(self, ragged: bool, device: str) -> None:
        world = build(triton_decode, layout(F32), [Row(150, 1, 0, 150)], kv_heads=1, group=2, device=device)
        world.q[1, 3] = torch.nan
        with mock.patch.object(triton_decode, "is_ragged", return_value=ragged):
            out, lse = attend(triton_decode, world, threads=2)
        assert torch.isnan(out[1]).all()
        assert torch.isnan(lse[1])
        assert torch.isfinite(out[0]).all()
        assert torch.isfinite(lse[0])

    def test_a_page_that_is_missing_is_missed_only_where_it_is_read(self, device: str) -> None:
        world = build(triton_decode, layout(F32, 16), [Row(100, 1, 0, 100)], device=device)
        world.rows.tables[0][1, :, :4] = -1  # positions below 64 in layer 1
        near = world.within(30)
        assert relative_error(attend(triton_decode, near).out, near.expected().out) <= LIMITS[F32]
        with pytest.raises(ValueError, match="layer 1 lacks a page"):
            attend(triton_decode, world)

    def test_an_empty_batch(self, device: str) -> None:
        world = build(triton_decode, layout(F32), [], device=device)
        assert attend(triton_decode, world).out.shape == (0, 80)

    def test_q_need_not_be_contiguous(self, device: str) -> None:
        world = build(triton_decode, layout(F32), EVEN, device=device)
        wide = torch.cat([world.q, world.q], 1)[:, :48]
        assert torch.equal(
            attend(triton_decode, dataclasses.replace(world, q=wide)).out, attend(triton_decode, world).out
        )

    def test_refuses(self, device: str) -> None:
        world = build(triton_decode, layout(F32), EVEN, device=device)
        with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
            triton_decode.plan(world.pages, world.rows, 0)
        with pytest.raises(ValueError, match="without gap or overlap"):
            triton_decode.plan(world.pages, dataclasses.replace(world.rows, first=np.array([0, 1, 2])))
        channels = Pages.allocate(PageLayout(16, 48, 80, F32), 500, device)
        with pytest.raises(ValueError, match=r"pages of Order\.TOKENS, got Order\.CHANNELS"):
            triton_decode.plan(channels, world.rows)
        plan = triton_decode.plan(world.pages, world.rows)
        other = Pages(world.pages.layout, world.pages.arena.clone())
        with pytest.raises(ValueError, match="made for other pages"):
            triton_decode.attend(other, plan, 1, world.q, 1.0)
        with pytest.raises(ValueError, match="layer must be from 0 to 1, got 2"):
            triton_decode.attend(world.pages, plan, 2, world.q, 1.0)
        with pytest.raises(ValueError, match=r"q must be \[\d+, 48\]"):
            triton_decode.attend(world.pages, plan, 1, world.q[1:], 1.0)
        for d_k, d_v, name in ((40, 64, "d_k"), (64, 528, "d_v"), (0, 64, "d_k")):
            with pytest.raises(ValueError, match=f"{name} must be a multiple of 16 from 16 to 512"):
                triton_decode.layout(16, d_k, d_v, F32)


class TestAppend:
    @staticmethod
    def check(at: PageLayout, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_pages: int, device: str) -> None:
        """The same bytes as plain torch stores, NaN apart, of which there are several; no other byte is touched."""
        arenas = []
        for kernels, where in ((reference, "cpu"), (triton_decode, device)):
            pages = Pages.allocate(at, n_pages, where)
            pages.arena.fill_(255)
            plan = kernels.plan_append(pages, torch.stack([torch.zeros_like(slots), slots]).to(where))
            kernels.append(pages, plan, 1, k.to(where), v.to(where))
            arenas.append(Pages(at, pages.arena.cpu().clone()))
        for name in ("k", "v", *(["scales"] if at.scaled else [])):
            wanted, found = (getattr(arena, name).contiguous() for arena in arenas)
            if wanted.is_floating_point():
                hidden = [x.float().isnan() for x in (wanted, found)]
                assert torch.equal(*hidden)
                wanted, found = (x.float().masked_fill(hidden[0], 0.0) for x in (wanted, found))
                assert torch.equal(wanted.signbit(), found.signbit())
            assert torch.equal(wanted, found)

    @settings(max_examples=40)
    @given(
        dtype=st.sampled_from(list(LIMITS)),
        given_dtype=st.sampled_from(FLOATS),
        page_size=st.sampled_from(PAGE_SIZES),
        d_k=st.sampled_from(SIZES),
        d_v=st.sampled_from(SIZES),
        n=st.integers(0, 40),
        spread=st.sampled_from([1e-5, 1.0, 300.0]),
        seed=st.integers(0, 99),
    )
    def test_the_same_bytes_as_plain_torch(
        self, dtype, given_dtype, page_size, d_k, d_v, n, spread, seed, device
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        n_pages = -(-n // page_size) + 2
        slots = torch.randperm(n_pages * page_size, generator=generator)[:n]
        k, v = (torch.randn(n, d, generator=generator) * spread for d in (d_k, d_v))
        self.check(layout(dtype, page_size, d_k, d_v), slots, k.to(given_dtype), v.to(given_dtype), n_pages, device)

    @pytest.mark.parametrize("dtype", PEAKS, ids=str)
    def test_numbers_that_have_no_code(self, dtype: torch.dtype, device: str) -> None:
        k = torch.randn(8, 48)
        k[0], k[1, 5], k[2, 7], k[3, 9] = 0.0, torch.nan, torch.inf, -torch.inf
        k[4], k[5, 1], k[6] = 1e-45, 3e38, -0.0
        v = torch.randn(8, 80)
        v[1, :] = torch.nan
        self.check(layout(dtype, 3), torch.arange(8), k, v, 3, device)

    @pytest.mark.parametrize("dtype", PEAKS, ids=str)
    def test_every_half_up_to_the_peak_gets_torchs_code(self, dtype: torch.dtype, device: str) -> None:
        """The largest code first in each vector: its scale is 1."""
        peak = PEAKS[dtype]
        halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(F16).float()
        halves = halves[halves.abs() <= peak]
        fill = torch.zeros(-len(halves) % 255)
        x = torch.cat([halves, fill]).view(-1, 255)
        x = torch.cat([torch.full((len(x), 1), peak), x], 1)
        n = len(x)
        pages = Pages.allocate(layout(dtype, 16, 256, 16), -(-n // 16), device)
        plan = triton_decode.plan_append(pages, torch.arange(n, device=device)[None])
        triton_decode.append(pages, plan, 0, x.to(device), x[:, :16].to(device))
        stored = pages.k.reshape(-1, 256)[:n].cpu()
        assert (pages.scales[:, 0].reshape(-1)[:n] == 1.0).all()
        wanted = x.round() if dtype is INT8 else x
        assert torch.equal(stored.view(torch.uint8), wanted.to(dtype).view(torch.uint8))

    def test_refuses_before_it_writes(self, device: str) -> None:
        pages = Pages.allocate(triton_decode.layout(16, 16, 32, F32), 2, device)
        slots = torch.tensor([[0, 1]], device=device)
        k, v = torch.ones(2, 16, device=device), torch.ones(2, 32, device=device)
        for wrong in (32, -1):
            with pytest.raises(ValueError, match=f"slots must be from 0 to 31, got {wrong}"):
                triton_decode.plan_append(pages, torch.tensor([[0, wrong]]))
        plan = triton_decode.plan_append(pages, slots)
        for layer, keys, values, message in (
            (1, k, v, "layer must be from 0 to 0, got 1"),
            (0, v, v, r"k must be \[2, 16\]"),
            (0, k, v.int(), r"v must be \[2, 32\]"),
        ):
            with pytest.raises(ValueError, match=message):
                triton_decode.append(pages, plan, layer, keys, values)
        assert not pages.arena.any()


def random_partial(n: int, width: int, dtype: torch.dtype, seed: int, spread: float = 3.0) -> Partial:
    """Of the vectors, about one in four is of no keys."""
    generator = torch.Generator().manual_seed(seed)
    out, lse = torch.randn(n, width, generator=generator), torch.randn(n, generator=generator) * spread
    none = torch.rand(n, generator=generator) < 0.25
    return Partial(out.masked_fill(none[:, None], 0.0).to(dtype), lse.masked_fill(none, -torch.inf))


def on(partial: Partial, device: str) -> Partial:
    return Partial(partial.out.clone().to(device), partial.lse.clone().to(device))


class TestMerge:
    @pytest.mark.parametrize(("into_dtype", "past_dtype"), list(product(FLOATS, FLOATS)), ids=str)
    @settings(max_examples=8)
    @given(
        total=st.integers(1, 70),
        picked=st.sampled_from([None, 0.0, 0.5, 1.0]),
        width=st.sampled_from([1, 7, 16, 33, 64, 128, 256]),
        spread=st.sampled_from([0.1, 3.0, 1e4]),
        seed=st.integers(0, 99),
    )
    def test_into_some_vectors(self, into_dtype, past_dtype, total, picked, width, spread, seed, device) -> None:
        index = None
        if picked is not None:
            index = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: round(total * picked)]
        into = random_partial(total, width, into_dtype, seed, spread)
        past = random_partial(total if index is None else len(index), width, past_dtype, seed + 100, spread)
        found = on(into, device)
        triton_decode.merge_into(found, on(past, device), None if index is None else index.to(device))
        at = torch.arange(total) if index is None else index
        mine = Partial(into.out[at].double(), into.lse[at])
        wanted = merge((mine, Partial(past.out.double(), past.lse)))
        found = on(found, "cpu")
        rtol = ROUNDING[into_dtype]
        torch.testing.assert_close(found.out[at].double(), wanted.out, rtol=rtol, atol=2e-6)
        torch.testing.assert_close(found.lse[at], wanted.lse, rtol=2**-21, atol=1e-6)
        others = torch.ones(total, dtype=torch.bool)
        others[at] = False
        assert torch.equal(found.out[others], into.out[others])
        assert torch.equal(found.lse[others], into.lse[others])

    def test_every_pair_of_lse_is_merged_as_partial_merge_does(self, device: str) -> None:
        numbers = [-torch.inf, -3e38, -1e4, -87.5, -1.0, 0.0, 1e-30, 0.4, 20.0, 1e4, 3e38, torch.inf, torch.nan]
        mine, other = (torch.tensor(column) for column in zip(*product(numbers, numbers), strict=True))
        into, past = Partial(torch.full((len(mine), 17), 2.0), mine), Partial(torch.full((len(mine), 17), -3.0), other)
        found = on(into, device)
        triton_decode.merge_into(found, on(past, device), None)
        wanted = merge((into, past))
        torch.testing.assert_close(found.out.cpu(), wanted.out, equal_nan=True, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.lse.cpu(), wanted.lse, equal_nan=True, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_the_empty_one_is_neutral_to_the_bit(self, dtype: torch.dtype, device: str) -> None:
        some, none = random_partial(37, 80, dtype, 0), empty(37, 80, dtype)
        for into, past, wanted in ((some, none, some), (none, some, some), (none, none, none)):
            found = on(into, device)
            triton_decode.merge_into(found, on(past, device), None)
            assert torch.equal(found.out.cpu(), wanted.out)
            assert torch.equal(found.lse.cpu(), wanted.lse)

    def test_the_result_alone_is_rounded(self, device: str) -> None:
        """Were past rounded to bfloat16 first, 1.0 would be left of it, and 0.75 would come out."""
        into = on(Partial(torch.full((1, 17), 0.5 + 2**-8, dtype=BF16), torch.zeros(1)), device)
        past = on(Partial(torch.full((1, 17), 1 + 2**-8 - 2**-20), torch.zeros(1)), device)
        triton_decode.merge_into(into, past, None)
        assert (into.out == 0.75 + 2**-8).all()

    @pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the host does not look at an index")
    def test_an_index_outside_is_refused_and_changes_nothing(self) -> None:
        into, past = random_partial(6, 32, F32, 0), random_partial(3, 32, F32, 1)
        found = on(into, "cpu")
        for wrong in (-1, 6, 2**62):
            with pytest.raises(ValueError, match=f"index must be from 0 to 5, got {wrong}"):
                triton_decode.merge_into(found, past, torch.tensor([0, wrong, 1]))
        assert torch.equal(found.out, into.out)

    def test_of_an_index_that_is_not_looked_at_what_is_outside_is_skipped(self, device: str) -> None:
        into, past = random_partial(6, 32, F32, 0), random_partial(4, 32, F32, 1)
        index = torch.tensor([0, -1, 6, 3])
        found, inside = on(into, device), on(into, device)
        with mock.patch.object(merge_partials, "looked_at", return_value=False):
            triton_decode.merge_into(found, on(past, device), index.to(device))
        kept = Partial(past.out[[0, 3]], past.lse[[0, 3]])
        triton_decode.merge_into(inside, on(kept, device), index[[0, 3]].to(device))
        assert torch.equal(found.out, inside.out)
        assert torch.equal(found.lse, inside.lse)

    @settings(max_examples=15)
    @given(
        counts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=4),
        dtype=st.sampled_from(FLOATS),
        seed=st.integers(0, 99),
    )
    def test_parts_of_outputs(self, counts: list[tuple[int, int]], dtype: torch.dtype, seed: int, device: str) -> None:
        """Outputs of some rows and some parts each, whose vectors stand two by two among others."""
        partials = random_partial(sum(rows * parts for rows, parts in counts), 80, F32, seed)
        outputs, wanted, vectors, place, number = [], [], [], 1, 0
        for rows, parts in counts:
            outputs.append([place, 5, 2, rows, number, parts])
            vectors += [place + r // 2 * 5 + r % 2 for r in range(rows)]
            of = slice(number, number + rows * parts)
            own = zip(partials.out[of].split(rows), partials.lse[of].split(rows), strict=True)
            wanted.append(merge([Partial(*part) for part in own]))
            place += (rows + 1) // 2 * 5
            number += rows * parts
        into = on(Partial(torch.full((place, 80), 7.0, dtype=dtype), torch.full((place,), 7.0)), device)
        most = max(rows for rows, _ in counts)
        merge_partials.merge_outputs(torch.tensor(outputs, device=device), most, on(partials, device), into)
        found = on(into, "cpu")
        rtol = ROUNDING[dtype]
        torch.testing.assert_close(found.out[vectors].float(), torch.cat([w.out for w in wanted]), rtol=rtol, atol=2e-6)
        torch.testing.assert_close(found.lse[vectors], torch.cat([w.lse for w in wanted]), rtol=2**-21, atol=1e-6)
        others = torch.ones(place, dtype=torch.bool)
        others[vectors] = False
        assert (found.out[others] == 7.0).all()


class TestPlanning:
    @settings(max_examples=60)
    @given(
        rows=st.lists(st.integers(1, 260), min_size=1, max_size=4),
        group=st.sampled_from([1, 3, 8, 40, 128]),
        most=st.sampled_from([16, 32, 64, 128]),
        window=st.sampled_from([EVERYTHING, 30]),
    )
    def test_narrowed_pieces_ask_the_same(self, rows: list[int], group: int, most: int, window: int) -> None:
        """Each query vector once an output, with the keys that it sees, in blocks of at most `most` vectors."""
        world = build(
            reference, layout(F32, 16), [Row(50, n, 0, 50 + n, window=window, sinks=20) for n in rows], 1, group
        )
        whole = cut(world.rows)
        narrow = triton_decode.narrowed(whole, most)
        assert narrow["rows"].max() <= max(most, group)
        assert (np.diff(narrow["output"]) >= 0).all()
        assert set(narrow["output"]) == set(range(narrow["output"].max() + 1))
        seen = []
        for pieces in (whole, narrow):
            asked: dict[tuple[int, int], set[int]] = {}
            for piece in pieces:
                for token in range(piece["rows"] // group):
                    position = piece["position"] + token
                    keys = np.arange(piece["lo"], piece["hi"])
                    keys = keys[(keys <= position) & (position - keys < piece["window"])]
                    at = (int(piece["q"] + token * piece["stride"]), int(position))
                    before = asked.setdefault(at, set())
                    assert not before & set(keys.tolist())
                    before |= set(keys.tolist())
            seen.append(asked)
        assert seen[0] == seen[1]

    @pytest.mark.parametrize(
        ("pieces", "programs", "tiles", "splits"),
        [
            (1, 264, 1000, 109),
            (20, 264, 1000, 12),
            (300, 264, 1000, 1),
            (8, 264, 4, 4),
            (48, 108, 100, 2),
            (1, 1, 50, 1),
            (3, 4, 0, 1),
        ],
    )
    def test_how_often_pieces_are_cut(self, pieces: int, programs: int, tiles: int, splits: int) -> None:
        assert split_count(pieces, programs, tiles) == splits

    @pytest.mark.parametrize("device_tuning", [AMPERE, ADA, HOPPER], ids=["ampere", "ada", "hopper"])
    def test_tiles_fit_into_shared_memory(self, device_tuning: tuning.Tuning) -> None:
        for dtype, d_k, d_v, rows in product(LIMITS, SIZES, SIZES, (1, 16, 17, 128)):
            tile = device_tuning.tile(layout(dtype, 16, d_k, d_v), rows)
            widths = tuning.padded(d_k), tuning.padded(d_v)
            assert tile.bytes(*widths, max(2, dtype.itemsize)) <= device_tuning.shared
            assert tile.keys >= 16
            assert tile.rows >= 16

    def test_which_gpu_gets_which_numbers(self) -> None:
        capabilities = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)]
        assert [tuning_of(each) for each in capabilities] == [AMPERE, ADA, AMPERE, ADA, HOPPER, HOPPER, ADA]
        with pytest.raises(ValueError, match=r"need compute capability 8\.0 or newer, got \(7, 5\)"):
            tuning_of((7, 5))

    def test_layouts_are_of_tokens(self) -> None:
        assert triton_decode.layout(1, 16, 256, FP8).order is Order.TOKENS
        assert list(triton_decode.prepare(layout(F32))) == []


@pytest.mark.parametrize(("size", "d", "group"), [(16, 16, 1), (32, 64, 3), (48, 80, 7), (64, 112, 2)])
def test_the_logits_of_sketches_are_those_of_their_keys(size: int, d: int, group: int) -> None:
    at = PageLayout(size, d, 16, BF16, Order.TOKENS)
    pages, made = Pages.allocate(at, 9), Sketches.allocate(at, 9)
    generator = torch.Generator().manual_seed(size)
    pages.k[:] = torch.randn(pages.k.shape, generator=generator).to(BF16)
    sketches.seal(pages, made, torch.arange(9))
    tables, q = torch.randint(0, 9, (2, 5), generator=generator), torch.randn(2, group, d, generator=generator)
    near = sketches.keys(made, tables.flatten()).view(2, 5, size, d)
    found = sketch_logits(made.scanned, made.steps, made.lows, tables, q, 0.3, size, made.layout.unit)
    torch.testing.assert_close(found, torch.einsum("igd,ietd->iget", q, near) * 0.3, rtol=1e-4, atol=1e-4)


COMPILE = """
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

sys.path.insert(0, sys.argv[1])
from paged_attention import Row, build
from lamina_kernels.gpu import decode as triton_decode, kv_append, merge_partials, tuning
from lamina_kernels.sketches import triton_logits
from lamina_kernels.partial import Partial

dtype, d, capability = getattr(torch, sys.argv[2]), int(sys.argv[3]), tuple(map(int, sys.argv[4]))
device = tuning.tuning_of(capability)
calls = []
for module in (kv_append, merge_partials, triton_logits, triton_decode):
    module.launch = lambda kernel, grid, arguments: calls.append((kernel, arguments))
triton_decode.tuning_for, triton_decode.programs = lambda _: device, lambda *_: 264
rows = [Row(200, 1, 0, 200), Row(0, 60, 0, 60), Row(190, 1, 0, 190, listed=1), Row(0, 400, 0, 400)]
for ragged in (False, True):
    triton_decode.is_ragged = lambda pieces: ragged
    latent = d > 256
    world = build(triton_decode, triton_decode.layout(16, d, d - 64 * latent, dtype, latent), rows, 1, 3)
    q = world.q.to(torch.bfloat16)
    plan = triton_decode.plan(world.pages, world.rows)
    partial = triton_decode.attend(world.pages, plan, 1, q, 0.1, 3.0)
    triton_decode.merge_into(partial, Partial(partial.out.clone(), partial.lse), torch.arange(len(q)))
    scanned, halves = torch.empty(3, 8 * d + 4 * d, dtype=torch.uint8), torch.empty(3, d, dtype=torch.bfloat16)
    tables = torch.zeros(2, 3, dtype=torch.int64)
    triton_logits.sketch_logits(scanned, halves, halves, tables, torch.empty(2, 7, d), 0.1, 16, 1)
    for kernel, arguments in calls:
        signature, constants, aligned = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            value = arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = mangle_type(value)
                if hasattr(value, "data_ptr"):
                    aligned[(i,)] = [["tt.divisibility", 16]]
        options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, aligned),
            target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32),
            options={"enable_fp_fusion": True, **options},
        )
        if compiled.metadata.shared > device.shared:
            sys.exit(f"{kernel.__name__} takes {compiled.metadata.shared} bytes of shared memory of {device.shared}")
        print(kernel.__name__)
    calls.clear()
"""


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", ["80", "89", "90"])
@pytest.mark.parametrize(
    ("dtype", "d"),
    [
        *(("float32", 256), ("bfloat16", 64), ("bfloat16", 256), ("float16", 128), ("int8", 128)),
        *(("float8_e4m3fn", 128), ("bfloat16", 576), ("float8_e4m3fn", 576)),
    ],
)
def test_the_kernels_compile_for_gpus_that_are_not_here(dtype: str, d: int, capability: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = [sys.executable, "-c", COMPILE, str(SUPPORT), dtype, str(d), capability]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = {"append_kernel", "attend_kernel", "merge_kernel", "merge_into_kernel", "logits_kernel"}
    assert kernels <= set(done.stdout.split())


GENERATE = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from lamina import LLM

with LLM(sys.argv[1], dtype="float32", max_model_len=64, kv_memory="48MiB") as llm:
    print(llm.generate("The capital of France is", max_tokens=6, ignore_eos=True).token_ids)
"""


@pytest.mark.soak
@pytest.mark.data
@pytest.mark.timeout(900)
def test_smollm2_generates_the_same_tokens_as_on_the_cpus_kernels() -> None:
    from lamina.models.resolve import resolve

    answers = []
    for name in ("cpu", "triton"):
        environment = os.environ | {"LAMINA_KERNELS": name, "TRITON_INTERPRET": "1"}
        run = [sys.executable, "-c", GENERATE, resolve("smollm2-135m")]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"attention kernels for cpu: {name}" in done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1]
    assert answers[0].count(",") == 5
