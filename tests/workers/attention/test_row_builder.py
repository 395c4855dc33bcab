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
        for i in range(count):
            p = start + i
            keys = [k for k in range(lo, hi) if k <= p and (p - k < window or k < sinks)]
            for j in range(heads * group):
                vector = first + i * stride + j
                assert vector not in seen
                entries = table[layer, j // group]
                if rows.listed[row]:
                    seen[vector] = {divmod(int(entries[k]), SIZE) for k in keys}
                else:
                    seen[vector] = {(int(entries[(k - base) // SIZE]), (k - base) % SIZE) for k in keys}
                assert len(seen[vector]) == len(keys)
    return seen


def table_of(heads: int, entries: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(3).permutation(LAYERS * heads * entries).astype(np.int32).reshape(LAYERS, heads, -1)


@pytest.mark.parametrize(
    "policy", ["sharded(block=8, local=1, stride=3)", "dilated(block=4, sink=4, local=2, reach=6)"]
)
@pytest.mark.parametrize(("lo", "hi", "base"), [(0, 50, 0), (0, 40, 0), (9, 45, 8), (17, 30, 16), (7, 45, 7)])
def test_blocks_are_read_as_lists_of_their_tokens_alone(policy: str, lo: int, hi: int, base: int) -> None:
    table = table_of(1, 14)
    builder = RowBuilder(SIZE)
    builder.add(RowQueries(0, 40, 10, GROUP, lo, hi, base, table), [parse(policy)])
    seen = keys_of(builder.rows(), 1)
    for view in parse(policy).views(40, 10):
        for p in range(view.start, view.start + view.count):
            keys = {k for first, end in view.seen(p) for k in range(max(first, lo), min(end, hi))}
            places = {(int(table[1, 0, (k - base) // SIZE]), (k - base) % SIZE) for k in keys}
            assert [seen[(p - 40) * GROUP + j] for j in range(GROUP)] == [places] * GROUP


def test_a_list_says_where_another_layers_window_has_freed_a_page() -> None:
    table = np.array([[[5, 6, 7]], [[-1, -1, 8]]], np.int32)
    builder = RowBuilder(SIZE)
    builder.add(RowQueries(0, 11, 1, GROUP, 0, 12, 0, table), [parse("sharded(block=4, local=1, stride=2)")])
    (found,) = builder.rows().tables
    assert (found // SIZE).tolist() == [[[5] * 4 + [7] * 4], [[-1] * 4 + [8] * 4]]


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
