"""Rows that a kernel reads, against the keys that each head's policy lets each query see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lamina_workers.attention_worker.row_builder import RowBuilder, RowQueries, runs
from lamina_workers.policies.catalogue import parse

SIZE, LAYERS, GROUP = 4, 2, 2


def keys_of(rows: Any, layer: int) -> dict[int, set[tuple[int, int]]]:
    """By vector of the flat q: the (page, offset) of each key that it sees, as `Rows` says it is read."""
    seen: dict[int, set[tuple[int, int]]] = {}
    for row, table in enumerate(rows.tables):
        numbers = (rows.first, rows.count, rows.start, rows.kv_heads, rows.group, rows.lo, rows.hi, rows.base)
        first, count, start, heads, group, lo, hi, base = (int(x[row]) for x in numbers)
        window, sinks, stride = (int(x[row]) for x in (rows.window, rows.sinks, rows.stride))
        bias = rows.bias[row] if rows.bias else None
        for i in range(count):
            p = start + i
            keys = [k for k in range(lo, hi) if k <= p and (p - k < window or k < sinks)]
            if bias is not None:
                keys = [k for k in keys if bias[0, 0, k - base] == 0]
            for j in range(heads * group):
                vector = first + i * stride + j
                assert vector not in seen
                entries = table[layer, j // group]
                seen[vector] = {(int(entries[(k - base) // SIZE]), (k - base) % SIZE) for k in keys}
                assert len(seen[vector]) == len(keys)
    return seen


def table_of(heads: int, entries: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(3).permutation(LAYERS * heads * entries).astype(np.int32).reshape(LAYERS, heads, -1)


@pytest.mark.parametrize("gap", [(0, 3), (1, 4), (2, 2), (5, 9)])
@pytest.mark.parametrize("hi", [23, 40, 45])
def test_what_was_let_go_is_left_out(gap: tuple[int, int], hi: int) -> None:
    table = table_of(2, 12)
    kept = table.copy()
    kept[:, 0, gap[0] : gap[1]] = -1
    razor, full = parse("razor"), parse("full")
    builder = RowBuilder(SIZE)
    builder.add(RowQueries(0, 40, 5, GROUP, 0, hi, 0, kept), [razor, full], {razor: gap})
    seen = keys_of(builder.rows(), 1)
    for i in range(5):
        keys = range(min(hi, 41 + i))
        whole = {(int(table[1, 1, k // SIZE]), k % SIZE) for k in keys}
        rest = {(int(table[1, 0, k // SIZE]), k % SIZE) for k in keys if not gap[0] <= k // SIZE < gap[1]}
        assert [seen[i * 4 + j] for j in range(4)] == [rest, rest, whole, whole]


@pytest.mark.fault("F10")
def test_queries_in_what_was_let_go_are_refused() -> None:
    razor = parse("razor")
    asked = RowQueries(0, 11, 2, GROUP, 0, 13, 0, table_of(1, 4))
    with pytest.raises(ValueError, match=r"queries from 11 on are not behind what was let go, \[4, 12\)"):
        RowBuilder(SIZE).add(asked, [razor], {razor: (1, 3)})


def test_a_table_says_where_another_layers_window_has_freed_a_page() -> None:
    table = np.array([[[5, 6, 7]], [[-1, -1, 8]]], np.int32)
    builder = RowBuilder(SIZE)
    builder.add(RowQueries(0, 11, 1, GROUP, 0, 12, 0, table), [parse("sharded(block=4, local=1, stride=2)")])
    (found,) = builder.rows().tables
    assert found.tolist() == [[[5, 7]], [[-1, 8]]]


def test_runs_are_of_equal_policies() -> None:
    a, b = parse("full"), parse("streaming")
    assert list(runs([a, a, None, b, b, a])) == [
        (a, slice(0, 2)),
        (None, slice(2, 3)),
        (b, slice(3, 5)),
        (a, slice(5, 6)),
    ]
    assert list(runs([])) == []


def test_no_rows_at_all() -> None:
    rows = RowBuilder(SIZE).rows()
    assert len(rows) == rows.n == 0
