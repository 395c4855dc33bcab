"""Placement: for every head the reads partition the past, and each new token is stored once."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import EngineError
from lamina.scheduling.holder import Holder
from lamina.scheduling.kv_layouts import SHARDS
from lamina.scheduling.kv_shares import Pages, Share
from lamina.scheduling.placement import Placement
from lamina.scheduling.request import (
    CloseSequence,
    ForkSequence,
    OpenSequence,
    Plan,
    PlannedRow,
    Rebuild,
    ReplaceShares,
    Request,
    ScheduledSequence,
    SequenceOperation,
)
from lamina_protocols.messages import Close, Fork, Open, Row

LOCAL = 0
END = 96


def placement(
    weights: tuple[int, ...], *, prefill_pool: int = 0, fused: bool = False, shard: str = "heads"
) -> Placement:
    """Holders 1, 2, ... of these weights, and a local one of so many pages, for a model of 4 heads and one layer."""
    holders = {number: Holder(100, weight, fused) for number, weight in enumerate(weights, 1)}
    if prefill_pool:
        holders[LOCAL] = Holder(prefill_pool, fused=True)
    return Placement(
        holders,
        heads=(4,),
        page_size=8,
        max_model_len=END,
        layers=1,
        shard=shard,
        prefill_pools=(LOCAL,) if prefill_pool else (),
    )


def sequence(handle: int, tokens: int, computed: int) -> ScheduledSequence:
    made = ScheduledSequence(Request(str(handle), (1,) * tokens, 1), 0, 0, [1] * tokens)
    made.handle, made.computed = handle, computed
    return made


def plan(first: int, operations: tuple[SequenceOperation, ...], *rows: PlannedRow) -> Plan:
    return Plan(first, operations, rows)


def row(handle: int, start: int, count: int, sample: bool = False) -> PlannedRow:
    return PlannedRow(sequence(handle, start + count, start), handle, start, count, sample)


def test_fusing_holder_attends_the_tokens_of_its_row() -> None:
    placed = placement((1,), fused=True)
    share = Share(1, (0, 1, 2, 3), 0, END)
    opened = (OpenSequence(10, (share,)), OpenSequence(11, (share,)))
    batch = placed.place(plan(0, opened, row(10, 0, 7), row(11, 9, 1)))[1]
    assert batch.operations == (Open(1, share.heads, 0, END), Open(2, share.heads, 0, END))
    assert batch.rows == (Row(1, 0, 7, (0, 7), True), Row(2, 9, 1, (0, 10), True))
    assert all(row.fused for row in batch.rows)


def test_holder_without_fusing_reads_only_the_past() -> None:
    placed = placement((1,))
    share = Share(1, (0, 1, 2, 3), 0, END)
    batch = placed.place(plan(0, (OpenSequence(10, (share,)),), row(10, 0, 7)))[1]
    assert batch.rows == (Row(1, 0, 7, None, True),)
    placed.holders[1].accepted(batch)
    batch = placed.place(plan(1, (), row(10, 9, 1)))[1]
    assert batch == (batch.__class__(1, (), batch.routes))
    assert batch.rows == (Row(1, 9, 1, (0, 9), True),)


@given(
    shard=st.sampled_from(SHARDS),
    weights=st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple),
    length=st.integers(1, END),
    prefill_pool=st.sampled_from([0, 20, 500]),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    prompt=st.integers(1, 60),
)
def test_reads_partition_the_past_and_every_token_is_stored_once(
    shard: str, weights: tuple[int, ...], length: int, prefill_pool: int, cuts: list[int], prompt: int
) -> None:
    placed = placement(weights, prefill_pool=prefill_pool, shard=shard)
    operations = (OpenSequence(10, placed.layout(length)),)
    one = sequence(10, prompt, 0)
    for count in cuts:
        count = min(count, len(one.tokens) - one.computed)
        planned = PlannedRow(one, 10, one.computed, count, one.computed + count == len(one.tokens))
        batches = placed.place(plan(0, operations, planned))
        start, end = planned.start, planned.start + count
        for head in range(4):
            read: list[int] = []
            fused: list[int] = []
            stored: list[int] = []
            for number, batch in batches.items():
                for route in batch.routes:
                    if head not in route.heads:
                        continue
                    if route.row.read:
                        (fused if route.row.fused else read).extend(range(*route.row.read))
                    if number != LOCAL:
                        stored += range(*route.stored) if route.row.store else []
            assert sorted(stored) == list(range(start, end))
            assert sorted(read + fused) == list(range(end if fused else start))
        for number, batch in batches.items():
            placed.holders[number].accepted(batch)
        one.computed = one.planned = end
        placed.recorded(plan(0, operations, planned))
        if planned.sample:
            one.tokens.append(1)
            assert not any(isinstance(o, Open) for o in placed.holders.get(LOCAL, Holder(0)).outbox)


def test_prompts_are_read_locally_while_they_fit() -> None:
    placed = placement((1, 1), prefill_pool=4 * 3)
    share = (Share(1, (0, 1), 0, END), Share(2, (2, 3), 0, END))
    batches = placed.place(plan(0, (OpenSequence(10, share),), row(10, 0, 9, sample=True)))
    assert batches[LOCAL].operations == (Open(3, (0, 1, 2, 3), 0, END),)
    assert batches[LOCAL].rows == (Row(3, 0, 9, (0, 9), True),)
    assert batches[1].rows == (Row(1, 0, 9, None, True),)
    second = placed.place(plan(1, (OpenSequence(11, share),), row(11, 0, 9, sample=True)))
    assert LOCAL not in second or not second[LOCAL].routes  # no room for another
    placed.recorded(plan(0, (), row(10, 0, 9, sample=True)))
    assert placed.holders[LOCAL].outbox[-1] == Close(3)


def test_operations_wait_for_the_holder_that_has_not_accepted_them() -> None:
    placed = placement((1, 1))
    layout = (Share(1, (0, 1), 0, END), Share(2, (2, 3), 0, END))
    first = plan(0, (OpenSequence(10, layout),), row(10, 0, 1))
    batches = placed.place(first)
    placed.holders[1].accepted(batches[1])  # the other holder refuses
    batches = placed.place(plan(0, (*first.operations, ForkSequence(11, 10, 1)), row(10, 0, 1)))
    assert (batches[1].first, batches[1].operations) == (1, (Fork(3, 1, 1),))
    assert (batches[2].first, batches[2].operations) == (0, (Open(2, (2, 3), 0, END), Fork(4, 2, 1)))
    assert placed.pending
    for number in (1, 2):
        placed.holders[number].accepted(batches[number])
    assert not placed.pending
    assert placed.place(plan(2, (CloseSequence(10), CloseSequence(11))))[2].operations == (Close(2), Close(4))


def test_share_of_a_lost_holder_is_stored_by_its_substitute_only() -> None:
    placed = placement((1, 1, 1))
    layout = (Share(1, (0, 1), 0, END), Share(2, (2,), 0, END), Share(3, (3,), 0, END))
    for number, batch in placed.place(plan(0, (OpenSequence(10, layout),), row(10, 0, 1))).items():
        placed.holders[number].accepted(batch)
    placed.lost(2)
    new = placed.substitute(layout[1], Pages({1: 3, 3: 5}))
    assert new == Share(3, (2,), 0, END)
    one = sequence(10, 30, 20)
    one.rebuild = Rebuild((new,), 4, 20, 20)
    batches = placed.place(plan(1, (ReplaceShares(10, 2, (new,)),), PlannedRow(one, 10, 4, 16, False, rebuild=True)))
    assert batches[1].rows == (Row(1, 4, 16, (0, 4), False),)
    assert batches[3].operations == (Open(4, (2,), 0, END),)
    assert batches[3].rows == (Row(3, 4, 16, (0, 4), False), Row(4, 4, 16, (0, 4), True))


def test_holder_is_refused_when_it_joins_twice() -> None:
    placed = placement((1,))
    with pytest.raises(EngineError, match="holder 1 joined twice"):
        placed.joined(1, Holder(5))


@given(
    shard=st.sampled_from(SHARDS), length=st.integers(1, END), start=st.integers(0, END - 1), prefill_pool=st.booleans()
)
def test_holders_of_each_rank_number_its_heads_from_0(shard: str, length: int, start: int, prefill_pool: bool) -> None:
    # Ranks of 2 and 1 heads, two places with a pool for each rank, and a prefill pool each.
    holders = {10: Holder(100), 11: Holder(100, rank=1), 20: Holder(100), 21: Holder(100, rank=1)}
    local = {0: Holder(50, fused=True), 1: Holder(50, fused=True, rank=1)} if prefill_pool else {}
    placed = Placement(
        local | holders, heads=(2, 1), page_size=8, max_model_len=END, layers=1, shard=shard, prefill_pools=tuple(local)
    )
    layout = placed.layout(length)
    for head in range(3):
        ranges = sorted((share.lo, share.hi) for share in layout if head in share.heads)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == END
        assert all(hi == lo for (_, hi), (lo, _) in pairwise(ranges))
    assert all(holders[share.holder].rank == (share.heads[0] == 2) for share in layout)
    batches = placed.place(plan(0, (OpenSequence(7, layout),), row(7, start, 4)))
    for number, share in batches.items():
        heads = {0, 1} if (local | holders)[number].rank == 0 else {0}
        assert all(set(operation.heads) <= heads for operation in share.operations if isinstance(operation, Open))
        assert all(set(route.heads) <= heads for route in share.routes)
    opened = {number for number, share in batches.items() for operation in share.operations}
    assert opened == {share.holder for share in layout} | set(local)


def test_substitute_of_a_share_has_its_rank() -> None:
    holders = {10: Holder(100), 11: Holder(100, rank=1), 20: Holder(100), 21: Holder(100, rank=1)}
    placed = Placement(holders, heads=(2, 1), page_size=8, max_model_len=END, layers=1)
    assert placed.substitute(Share(20, (1,), 0, END), Pages({11: 90, 10: 1})) == Share(10, (1,), 0, END)
    assert placed.substitute(Share(20, (2,), 0, END), Pages({11: 9, 10: 90})) == Share(11, (2,), 0, END)
