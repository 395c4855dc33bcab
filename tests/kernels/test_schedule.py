"""The schedule: every visible pair of a query and a key is computed once, and shares are equal."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kernels.paged.rows import EVERYTHING, Rows
from lamina_kernels.paged.schedule import FIXED, MAX_ROWS, MIN_KEYS, READ, Pieces, cut, deal

ROWS = st.lists(
    st.tuples(st.integers(0, 3000), st.sampled_from([1, 1, 4, 300]), st.integers(1, 3), st.sampled_from([1, 3, 8])),
    max_size=6,
)


def rows_of(given: list[tuple[int, int, int, int]], **columns: int) -> Rows:
    start, count, heads, group = np.array(given, np.int64).reshape(-1, 4).T
    vectors, zero = count * heads * group, np.zeros(len(given), np.int64)
    tables = [np.zeros((1, h, -(-(s + c) // 16)), np.int32) for s, c, h, _ in given]
    more = {name: np.full(len(given), value) for name, value in columns.items()}
    first = np.cumsum(vectors) - vectors
    return Rows(first, count, start, heads, group, zero, start + count, zero, tables, **more)


@st.composite
def small_rows(draw: st.DrawFn) -> Rows:
    """Sequences of up to 200 tokens, some with their heads in rows of their own, some listed."""
    columns: dict[str, list[int]] = {}
    tables, vectors = [], 0
    for _ in range(draw(st.integers(0, 4))):
        group, start, count = draw(st.integers(1, 16)), draw(st.integers(0, 150)), draw(st.sampled_from([1, 2, 9, 45]))
        widths = draw(st.sampled_from([[1], [3], [1, 1], [2, 1]]))
        stride = sum(widths) * group
        for at, heads in enumerate(widths):
            lo = draw(st.integers(0, start))
            base = draw(st.integers(0, lo))
            row = {
                "first": vectors + sum(widths[:at]) * group,
                "count": count,
                "start": start,
                "kv_heads": heads,
                "group": group,
                "lo": lo,
                "hi": draw(st.sampled_from([lo, start, start + count, start + count + 9])),
                "base": base,
                "stride": stride,
                "window": draw(st.sampled_from([EVERYTHING, 1, 2, 30, 100])),
                "sinks": draw(st.sampled_from([0, 1, 7, 60, 300])),
                "listed": draw(st.integers(0, 1)),
            }
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
            tables.append(np.zeros((2, heads, 200 + at), np.int32)[:, :, : 200 - at])
        vectors += count * stride
    names = ["first", "count", "start", "kv_heads", "group", "lo", "hi", "base", "stride", "window", "sinks", "listed"]
    arrays = {name: np.array(columns.get(name, []), np.int64) for name in names}
    return Rows(**arrays, tables=tables)


def pairs_of_rows(rows: Rows) -> Counter:
    """As `Rows` says it: (vector, address of its entries, slot), once each."""
    pairs: Counter = Counter()
    for row, table in enumerate(rows.tables):
        group, base = int(rows.group[row]), int(rows.base[row])
        for i in range(int(rows.count[row])):
            p = int(rows.start[row]) + i
            key = np.arange(int(rows.lo[row]), int(rows.hi[row]))
            seen = (key <= p) & ((p - key < int(rows.window[row])) | (key < int(rows.sinks[row])))
            slots = (key[seen] - base).tolist()
            for j in range(int(rows.kv_heads[row]) * group):
                vector = int(rows.first[row]) + i * int(rows.stride[row]) + j
                head = j // group
                pairs.update((vector, table[0, head].ctypes.data, slot) for slot in slots)
    return pairs


def pairs_of_pieces(pieces: Pieces) -> Counter:
    """As the kernels read it."""
    pairs: Counter = Counter()
    for piece in pieces:
        key = np.arange(piece["lo"], piece["hi"])
        for i in range(int(piece["rows"])):
            token, j = divmod(i, int(piece["group"]))
            vector, p = int(piece["q"]) + token * int(piece["stride"]) + j, int(piece["position"]) + token
            slots = key[(key <= p) & (p - key < piece["window"])].tolist()
            pairs.update((vector, int(piece["table"]), slot) for slot in slots)
    return pairs


def check_outputs(rows: Rows, pieces: Pieces) -> None:
    """Every vector is in one output, an output's pieces stand together, and its partials are numbered in order."""
    outputs = pieces["output"]
    assert (np.diff(outputs) >= 0).all()
    vectors: list[int] = []
    partial = 0
    for output in np.unique(outputs):
        own = pieces[outputs == output]
        assert own["parts"].tolist() == [len(own)] + [1] * (len(own) - 1)
        for name in ("q", "stride", "group", "rows", "position", "listed", "layer_stride"):
            assert (own[name] == own[name][0]).all()
        for piece in own:
            assert piece["partial"] == (partial if len(own) > 1 else -1)
            partial += int(piece["rows"]) if len(own) > 1 else 0
        first = own[0]
        assert first["rows"] % first["group"] == 0
        assert first["rows"] <= max(MAX_ROWS, first["group"])
        for i in range(int(first["rows"])):
            token, j = divmod(i, int(first["group"]))
            vectors.append(int(first["q"]) + token * int(first["stride"]) + j)
    assert sorted(vectors) == list(range(rows.n))


@settings(max_examples=80)
@given(small_rows(), st.integers(1, 5))
def test_every_visible_pair_is_in_exactly_one_piece(rows: Rows, shares: int) -> None:
    whole = cut(rows)
    wanted = pairs_of_rows(rows)
    assert pairs_of_pieces(whole) == wanted
    pieces, starts = deal(whole, shares)
    assert pairs_of_pieces(pieces) == wanted
    check_outputs(rows, pieces)
    assert (starts[0], starts[-1], len(starts)) == (0, len(pieces), shares + 1)
    assert (np.diff(starts) >= 0).all()


@settings(max_examples=60)
@given(small_rows())
def test_pieces_know_the_strides_of_their_tables(rows: Rows) -> None:
    strides = {}
    for row, table in enumerate(rows.tables):
        for head in range(table.shape[1]):
            at = int(rows.first[row]) + head * int(rows.group[row])
            strides[at] = (table.strides[0] // 4, int(rows.listed[row]))
    for piece in cut(rows):
        if int(piece["q"]) in strides:  # a row's first block; the others are copies of it
            described = piece["layer_stride"], piece["listed"]
            assert described == strides[int(piece["q"])]


@settings(max_examples=60)
@given(ROWS, st.integers(1, 9), st.sampled_from([EVERYTHING, 70]), st.sampled_from([0, 5, 900]))
def test_shares_are_equal_and_hold_every_key_once(
    given: list[tuple[int, int, int, int]], shares: int, window: int, sinks: int
) -> None:
    rows = rows_of(given, window=window, sinks=sinks)
    whole = cut(rows)
    pieces, starts = deal(whole, shares)
    check_outputs(rows, pieces)
    assert starts[0] == 0
    assert starts[-1] == len(pieces)
    assert len(starts) == shares + 1
    assert (np.diff(starts) >= 0).all()

    for output in np.unique(whole["output"]):  # ranges end to end, and cuts nowhere but inside one
        before, after = whole[whole["output"] == output], pieces[pieces["output"] == output]
        edges = {int(edge) for name in ("lo", "hi") for edge in before[name]}
        assert edges <= {int(edge) for name in ("lo", "hi") for edge in after[name]}
        assert (before["hi"] - before["lo"]).sum() == (after["hi"] - after["lo"]).sum()
        for one, next_ in pairwise(after):
            assert one["hi"] <= next_["lo"]
            assert one["hi"] == next_["lo"] or int(one["hi"]) in edges

    work = (pieces["hi"] - pieces["lo"] + FIXED) * (pieces["rows"] + READ)
    slack = (2 * MIN_KEYS + 3 * FIXED + 32) * (MAX_ROWS + READ)
    for first, end in pairwise(starts):
        assert work[first:end].sum() <= work.sum() / shares + slack


def test_one_long_context_is_cut_over_all_threads() -> None:
    pieces, starts = deal(cut(rows_of([(65536, 1, 1, 4)] + [(512, 1, 1, 4)] * 31)), 8)
    keys = [int((pieces["hi"] - pieces["lo"])[a:b].sum()) for a, b in pairwise(starts)]
    assert max(keys) <= 1.1 * min(keys)


@pytest.mark.parametrize(
    ("sinks", "ranges"), [(0, [(901, 1005)]), (4, [(0, 4), (901, 1005)]), (901, [(0, 901), (901, 1005)])]
)
def test_a_window_leaves_only_the_keys_that_it_shows(sinks: int, ranges: list[tuple[int, int]]) -> None:
    pieces = cut(rows_of([(1000, 5, 1, 2)], window=100, sinks=sinks))
    assert pieces[["lo", "hi"]].tolist() == ranges
    assert pieces["window"].tolist() == [EVERYTHING, 100][-len(ranges) :]


def test_sinks_that_reach_the_window_hide_nothing_and_are_one_range() -> None:
    (piece,) = cut(rows_of([(1000, 5, 1, 2)], window=100, sinks=905))
    assert (piece["lo"], piece["hi"], piece["window"]) == (0, 1005, EVERYTHING)


@pytest.mark.parametrize("sinks", [0, 4])
def test_an_output_without_keys_is_written_too(sinks: int) -> None:
    rows = rows_of([(9, 2, 1, 3)], sinks=sinks, window=1)
    (piece,) = cut(dataclasses.replace(rows, lo=np.array([5]), hi=np.array([8])))
    assert (piece["lo"], piece["hi"], piece["rows"]) == (0, 0, 6)
    pieces, starts = deal(cut(rows_of([])), 3)
    assert (len(pieces), starts.tolist()) == (0, [0, 0, 0, 0])
