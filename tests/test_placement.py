"""Placement: for every head the reads partition the past, and each new token is stored once."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import EngineError
from lamina.placement import Placement, Share
from lamina.request import CloseSequence, ForkSequence, OpenSequence, Plan, PlannedRow, Request, Sequence
from lamina_protocols.messages import Close, Fork, Open, Row

OPERATIONS = (OpenSequence(1), ForkSequence(2, 1, 30), CloseSequence(1))


def plan(*rows: tuple[int, int]) -> Plan:
    """Rows of (start, count), of handles 10, 11, ..."""
    sequence = Sequence(Request("0", (1,), 1), 0, 0, [1])
    planned = (PlannedRow(sequence, 10 + at, start, count, False) for at, (start, count) in enumerate(rows))
    return Plan(5, OPERATIONS, tuple(planned))


def test_a_holder_that_fuses_attends_the_rows_own_tokens() -> None:
    placement = Placement((Share((0, 1, 2), 0, 100, fused=True),))
    [(operations, routes)] = placement.place(plan((0, 7), (9, 1)))
    assert operations == (Open(1, (0, 1, 2), 0, 100), Fork(2, 1, 30), Close(1))
    assert [route.row for route in routes] == [Row(10, 0, 7, (0, 7), True), Row(11, 9, 1, (0, 10), True)]
    assert all(route.row.fused for route in routes)


def test_a_holder_that_does_not_fuse_reads_the_past() -> None:
    [(_, routes)] = Placement((Share((0,), 0, 100),)).place(plan((0, 7), (9, 1)))
    assert [route.row for route in routes] == [Row(10, 0, 7, None, True), Row(11, 9, 1, (0, 9), True)]
    assert not any(route.row.fused for route in routes)


@given(
    cuts=st.sets(st.integers(1, 49)).map(lambda cuts: [0, *sorted(cuts), 50]),
    split=st.integers(1, 3),
    start=st.integers(0, 49),
    count=st.integers(1, 50),
)
def test_reads_partition_the_past_and_every_token_is_stored_once(
    cuts: list[int], split: int, start: int, count: int
) -> None:
    count = min(count, 50 - start)
    ranges = list(pairwise(cuts))
    by_range = [Share(tuple(range(split)), lo, hi) for lo, hi in ranges]
    shares = (*by_range, Share(tuple(range(split, 4)), 0, 50))
    placed = Placement(shares).place(plan((start, count)))
    for head in range(4):
        read: list[int] = []
        stored: list[int] = []
        for share, (operations, routes) in zip(shares, placed, strict=True):
            assert operations[0] == Open(1, share.heads, share.lo, share.hi)
            for route in routes if head in share.heads else ():
                assert (route.source, route.heads, route.row.handle) == (0, share.heads, 10)
                read += range(*route.row.read) if route.row.read else []
                stored += range(*route.stored) if route.row.store else []
        assert sorted(read) == list(range(start))
        assert sorted(stored) == list(range(start, start + count))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((), "no holder"),
        ((Share((), 0, 9),), "no heads"),
        ((Share((0,), 1, 9),), "head 0 is placed at"),
        ((Share((0,), 0, 5), Share((0,), 4, 9)), "must begin at 5"),
        ((Share((0,), 0, 9), Share((1,), 0, 8)), "different positions"),
        ((Share((0,), 0, 5, fused=True), Share((0,), 5, 9)), "all positions"),
        ((Share((0,), 0, 9, fused=True), Share((1,), 0, 9)), "1 of 2 holders are fused"),
    ],
)
def test_a_placement_that_covers_no_head_exactly_once_is_refused(shares: tuple[Share, ...], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Placement(shares)
