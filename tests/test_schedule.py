"""The schedule: nothing is lost or doubled by cutting, and shares are equal."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_kernels.pages import Rows
from lamina_kernels.schedule import FIXED, MAX_ROWS, MIN_KEYS, READ, cut, deal

ROWS = st.lists(
    st.tuples(st.integers(0, 3000), st.sampled_from([1, 1, 4, 300]), st.integers(1, 3), st.sampled_from([1, 3, 8])),
    max_size=6,
)


def rows_of(given: list[tuple[int, int, int, int]]) -> Rows:
    start, count, heads, group = np.array(given, np.int64).reshape(-1, 4).T
    vectors, zero = count * heads * group, np.zeros(len(given), np.int64)
    tables = [np.zeros((1, h, -(-(s + c) // 16)), np.int32) for s, c, h, _ in given]
    return Rows(np.cumsum(vectors) - vectors, count, start, heads, group, zero, start + count, zero, tables)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.integers(1, 9), st.sampled_from([None, 70]))
def test_shares_are_equal_and_hold_every_key_once(given: list[tuple[int, int, int, int]], shares: int, window) -> None:
    rows = rows_of(given)
    whole = cut(rows, window)
    pieces, starts = deal(whole, shares)
    assert whole["rows"].sum() == rows.n
    assert whole["rows"].max(initial=0) <= MAX_ROWS
    assert starts[0] == 0
    assert starts[-1] == len(pieces)
    assert len(starts) == shares + 1
    assert (np.diff(starts) >= 0).all()

    heads = np.flatnonzero(np.append(True, (pieces["q"][1:] != pieces["q"][:-1])) if len(pieces) else [])
    assert (pieces["q"][heads] == whole["q"]).all()
    for output, first, end in zip(whole, heads, np.append(heads, len(pieces))[1:], strict=True):
        own = pieces[first:end]
        assert own["lo"][0] == output["lo"]
        assert own["hi"][-1] == output["hi"]
        assert (own["lo"][1:] == own["hi"][:-1]).all()
        assert own["parts"].tolist() == [len(own)] + [1] * (len(own) - 1)
        assert ((own["partial"] >= 0) == (len(own) > 1)).all()

    split = pieces[pieces["partial"] >= 0]
    assert (split["partial"] == np.cumsum(split["rows"]) - split["rows"]).all()
    work = (pieces["hi"] - pieces["lo"] + FIXED) * (pieces["rows"] + READ)
    slack = (2 * MIN_KEYS + 3 * FIXED + 32) * (MAX_ROWS + READ)
    for first, end in pairwise(starts):
        assert work[first:end].sum() <= work.sum() / shares + slack


def test_one_long_context_is_cut_over_all_threads() -> None:
    pieces, starts = deal(cut(rows_of([(65536, 1, 1, 4)] + [(512, 1, 1, 4)] * 31), None), 8)
    keys = [int((pieces["hi"] - pieces["lo"])[a:b].sum()) for a, b in pairwise(starts)]
    assert max(keys) <= 1.1 * min(keys)


def test_a_window_leaves_only_the_keys_that_it_shows() -> None:
    (piece,) = cut(rows_of([(1000, 5, 1, 2)]), 100)
    assert (piece["lo"], piece["hi"]) == (901, 1005)
