"""Rows: what a query sees, and rows that do not hold together are refused before memory is touched."""

from __future__ import annotations

import dataclasses
from typing import Any

import kernel_reference as reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_attention import Row, World, build, take

from lamina_kernels.attention import decode as cpu_decode
from lamina_kernels.paged.pages import PageLayout
from lamina_kernels.paged.rows import EVERYTHING, Rows, check_rows, visible
from lamina_kernels.select import Kernels

LAYOUT = PageLayout(16, 32, 48, torch.float32)
both = pytest.mark.parametrize("kernels", [cpu_decode, reference], ids=["cpu", "reference"])


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@settings(max_examples=300)
@given(
    first=st.integers(0, 40),
    more=st.integers(0, 20),
    lo=st.integers(0, 50),
    hi=st.integers(0, 70),
    window=st.just(EVERYTHING) | st.integers(1, 30),
    sinks=st.integers(0, 50),
)
def test_the_two_ranges_are_what_some_query_sees(first, more, lo, hi, window, sinks) -> None:
    last = first + more
    seen = visible(*(ints(x) for x in (first, last, lo, hi, window, sinks)))
    begin, end = (int(seen.lo[0]), int(seen.begin[0])), (int(seen.end[0]), int(seen.hi[0]))
    ranges = [set(range(a, b)) for a, b in zip(begin, end, strict=True)]
    assert not ranges[0] & ranges[1]
    for query in range(first, last + 1):
        keys = {k for k in range(lo, hi) if k <= query and (query - k < window or k < sinks)}
        # What a kernel does with the two ranges: the first whole, the second within the window; both causal.
        shown = {k for k in ranges[0] if k <= query} | {k for k in ranges[1] if 0 <= query - k < seen.window[0]}
        assert shown == keys
    union = {k for k in range(lo, hi) if k <= last and (first - k < window or k < sinks)}
    assert ranges[0] | ranges[1] == union


def test_what_is_left_out_is_the_plain_case() -> None:
    zero, table = np.zeros(2, np.int64), np.zeros((1, 2, 3), np.int32)
    rows = Rows(ints(0, 6), ints(1, 2), ints(9, 9), ints(2, 2), ints(3, 3), zero, ints(9, 9), zero, [table, table])
    assert (rows.n, rows.layers, len(rows)) == (18, 1, 2)
    assert rows.stride.tolist() == [6, 6]
    assert rows.window.tolist() == [EVERYTHING] * 2
    assert not rows.sinks.any()
    assert not rows.listed.any()


@settings(max_examples=100)
@given(st.data())
def test_rows_cover_every_vector_once_whatever_their_order(data: st.DataObject) -> None:
    """Any partition of the heads of some sequences into rows is taken; the same with one row elsewhere is not."""
    columns: list[tuple[int, int, int, int, int]] = []  # first, count, kv_heads, group, stride
    vectors = 0
    for _ in range(data.draw(st.integers(1, 3))):
        count, group = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
        widths = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        stride = sum(widths) * group
        for at, heads in enumerate(widths):
            columns.append((vectors + sum(widths[:at]) * group, count, heads, group, stride))
        vectors += count * stride
    columns = data.draw(st.permutations(columns))
    pages = build(reference, LAYOUT, [Row(3, 1, 0, 3)]).pages

    def rows(columns: list[tuple[int, int, int, int, int]]) -> Rows:
        first, count, heads, group, stride = np.array(columns, np.int64).T
        zero = np.zeros(len(columns), np.int64)
        tables = [np.zeros((1, n, 1), np.int32) for n in heads]
        return Rows(first, count, zero, heads, group, zero, zero, zero, tables, stride)

    assert rows(columns).n == vectors
    assert check_rows(pages, rows(columns)) == frozenset()
    at = data.draw(st.integers(0, len(columns) - 1))
    first, *others = columns[at]
    moved = data.draw(st.integers(0, vectors + 3).filter(lambda x: x != first))
    wrong = [*columns[:at], (moved, *others), *columns[at + 1 :]]
    with pytest.raises(ValueError, match="without gap or overlap"):
        check_rows(pages, rows(wrong))


class Refused:
    """Plans of changed rows, each of which must be refused while pages stay as they are."""

    def __init__(self, kernels: Kernels, world: World) -> None:
        self.kernels, self.world = kernels, world

    def __call__(self, match: str, **changed: Any) -> None:
        before = self.world.pages.arena.clone()
        with pytest.raises(ValueError, match=match):
            self.kernels.plan(self.world.pages, dataclasses.replace(self.world.rows, **changed), 2)
        assert torch.equal(self.world.pages.arena, before)


@both
class TestRefuses:
    def test_columns(self, kernels: Kernels) -> None:
        refused = Refused(kernels, build(kernels, LAYOUT, [Row(40, 1, 0, 40), Row(10, 1, 0, 10)]))
        for name in ("first", "start", "lo", "hi", "base", "sinks", "listed"):
            refused(f"{name} has -1, allowed: 0 or more", **{name: ints(0, -1)})
        for name in ("count", "kv_heads", "group", "stride", "window"):
            for value in (0, -5):
                refused(f"{name} has {value}, allowed: 1 or more", **{name: ints(1, value)})
        names = ("first", "count", "start", "kv_heads", "group", "lo", "hi", "base", "stride", "sinks", "listed")
        for name in names:
            refused(rf"{name} has 2147483648, allowed: below 2\*\*31", **{name: ints(2**31, 1)})
        for name in (*names, "window"):
            refused(rf"{name} must be int64 \[2\], got float64 \[2\]", **{name: np.array([1.0, 2.0])})
            refused(rf"{name} must be int64 \[2\], got int32 \[2\]", **{name: np.array([1, 2], np.int32)})
            refused(rf"{name} must be int64 \[2\], got int64 \[1\]", **{name: ints(1)})
        refused("listed has 2, allowed: 0 or 1", listed=ints(0, 2))

    def test_gaps_and_overlaps(self, kernels: Kernels) -> None:
        refused = Refused(kernels, build(kernels, LAYOUT, [Row(40, 2, 0, 40), Row(10, 1, 0, 10)]))
        refused("without gap or overlap, but row 1 begins at 11", first=ints(0, 11))
        refused("without gap or overlap, but row 1 begins at 13", first=ints(0, 13))
        refused("without gap or overlap, but row 1 begins at 0", first=ints(0, 0), count=ints(2, 2))
        refused("row 1 has 6 heads, more than its stride 5", stride=ints(6, 5))
        refused("without gap or overlap, but row 0 ends at 19 of 18", stride=ints(13, 6))
        refused("without gap or overlap, but 0 have vector 6", stride=ints(7, 6))
        refused(r"without gap or overlap, but row 0 ends at 2\d+ of 18", stride=ints(2**31 - 1, 6))

    def test_strides_that_leave_gaps(self, kernels: Kernels) -> None:
        sequence = [Row(40, 3, 0, 40, heads=1), Row(40, 3, 0, 40, heads=2), Row(40, 3, 9, 40, heads=1)]
        world = build(kernels, LAYOUT, [sequence, Row(7, 2, 0, 9)], group=2)
        assert (world.rows.first.tolist(), world.rows.stride.tolist()) == ([0, 2, 6, 24], [8, 8, 8, 4])
        kernels.plan(world.pages, world.rows, 2)
        refused = Refused(kernels, world)
        refused("but 2 have vector 5", first=ints(0, 2, 5, 24))
        refused("but 2 have vector 0", first=ints(0, 0, 6, 24))
        refused("but row 0 ends at 33 of 32", first=ints(15, 2, 6, 24))
        refused("but 2 have vector 0", stride=ints(8, 8, 8, 5), first=ints(0, 2, 6, 0))
        with pytest.raises(ValueError, match="without gap or overlap"):
            kernels.plan(world.pages, take(world.rows, [0, 1, 3]), 2)

    def test_tables(self, kernels: Kernels) -> None:
        world = build(kernels, LAYOUT, [Row(40, 1, 0, 40), Row(10, 1, 0, 10, 3)])
        refused, (one, two) = Refused(kernels, world), world.rows.tables
        for wrong in (
            one.astype(np.int64),
            one.astype(np.uint32),
            one[:1],
            one[:, :1],
            one[0],
            np.ascontiguousarray(one.transpose(2, 0, 1)).transpose(1, 2, 0),
            np.repeat(one, 2, 2)[:, :, ::2],
            one[:, :, ::-1],
        ):
            refused(r"the table of row 1 must be int32 \[2, 2, entries\], contiguous", tables=[one, wrong])
        refused(r"row 0 reads \[0, 40\), but its table holds \[0, 16\)", tables=[one[:, :, :1], two])
        refused(r"row 0 reads \[0, 40\), but its table holds \[5, 53\)", base=ints(5, 3))
        refused(r"row 1 reads \[0, 10\), but its table holds \[3, 19\)")
        refused(r"row 0 reads \[0, 4000\), but its table holds \[0, 48\)", hi=ints(4000, 0), start=ints(4000, 10))

    def test_pages_that_do_not_exist(self, kernels: Kernels) -> None:
        world = build(kernels, LAYOUT, [Row(40, 1, 0, 40), Row(10, 1, 0, 10)])
        last = world.pages.n_pages - 1
        for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
            for page in (last + 1, -2, 2**30, -(2**31)):
                tables = [world.rows.tables[0].copy(), world.rows.tables[1]]
                tables[0][layer, head, 2] = page
                Refused(kernels, world)(rf"row 0 names page {page}; there are pages 0 to {last}", tables=tables)

    def test_slots_that_do_not_exist(self, kernels: Kernels) -> None:
        world = build(kernels, LAYOUT, [Row(40, 1, 0, 40), Row(30, 1, 0, 17, listed=1)])
        refused, last = Refused(kernels, world), world.pages.slots - 1
        for layer, head, at in ((0, 0, 0), (0, 1, 16), (1, 0, 7), (1, 1, 16)):
            for slot in (last + 1, -2, 2**30, -(2**31)):
                tables = [world.rows.tables[0], world.rows.tables[1].copy()]
                tables[1][layer, head, at] = slot
                refused(rf"row 1 names slot {slot}; there are slots 0 to {last}", tables=tables)
        held = world.rows.tables[1].shape[2]
        refused(rf"row 1 reads \[0, 30\), but its table holds \[0, {held}\)", hi=ints(40, 30))

    def test_only_what_is_read_must_exist(self, kernels: Kernels) -> None:
        given_ = [Row(90, 2, 4, 60, window=40, sinks=20), Row(90, 2, 4, 60, window=40, sinks=20, listed=1)]
        world = build(kernels, LAYOUT, given_)
        paged, listed = (table.copy() for table in world.rows.tables)
        paged[:, :, 2] = listed[:, :, :4] = listed[:, :, 20:51] = listed[:, :, 60:] = 2**31 - 1
        assert paged.shape[2] == 4
        lenient = dataclasses.replace(world.rows, tables=[paged, listed])
        kernels.plan(world.pages, lenient, 2)
        for at in (4, 19, 51, 59):
            tables = [paged, listed.copy()]
            tables[1][1, 1, at] = 2**31 - 1
            Refused(kernels, world)("row 1 names slot 2147483647", tables=tables)

    @pytest.mark.parametrize("listed", [0, 1])
    def test_an_entry_that_is_none_is_missed_in_its_layer(self, kernels: Kernels, listed: int) -> None:
        world = build(kernels, LAYOUT, [Row(40, 1, 0, 40, listed=listed), Row(3, 1, 0, 3)])
        world.rows.tables[0][1, 1, 2] = -1
        plan = kernels.plan(world.pages, world.rows, 2)
        assert plan.missing == {1}
        kernels.attend(world.pages, plan, 0, world.q, 0.1)
        out = torch.full((world.rows.n, 48), torch.nan)
        with pytest.raises(ValueError, match="layer 1 lacks"):
            kernels.attend(world.pages, plan, 1, world.q, 0.1, out=out)
        assert out.isnan().all()


@both
def test_tables_between_whole_numbers_are_refused(kernels: Kernels) -> None:
    pages = build(kernels, LAYOUT, [Row(5, 1, 0, 5)]).pages
    table = np.zeros((2, 1, 1), [("a", "i4"), ("b", "i2")])["a"]
    rows = Rows(ints(0), ints(1), ints(5), ints(1), ints(1), ints(0), ints(5), ints(0), [table])
    with pytest.raises(ValueError, match="the table of row 0 must be int32"):
        kernels.plan(pages, rows, 1)


def test_queries_end_below_two_to_the_31() -> None:
    with pytest.raises(ValueError, match=r"a row's queries end at 2147483648, allowed: below 2\*\*31"):
        Rows(
            ints(0), ints(2), ints(2**31 - 2), ints(1), ints(1), ints(0), ints(0), ints(0), [np.zeros((1, 1, 1), "i4")]
        )
