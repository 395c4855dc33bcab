"""Placement: for every head the reads partition the past, and each new token is stored once."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import EngineError
from lamina.kv.kv_shares import NO_PAGES, SHARDS, Pages, Share
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import Plan, PlannedRow, Rebuild, Request, ScheduledSequence
from lamina_protocols.messages.messages import Close, Fork, Open, Row
from lamina_protocols.messages.routes import HolderBatch

LOCAL = 0
END = 96


def placement(
    weights: tuple[int, ...],
    *,
    local_pool: int = 0,
    fused: bool = False,
    shard: str = "heads",
    indexed: tuple[int, ...] = (),
) -> Placement:
    """Holders 1, 2, ... of these weights, and a local one of so many pages, for a model of 4 heads and one layer."""
    holders = {number: Holder((100,), weight, fused) for number, weight in enumerate(weights, 1)}
    if local_pool:
        holders[LOCAL] = Holder((local_pool,), fused=True)
    return Placement(
        holders,
        heads=((4,),),
        page_size=8,
        max_model_len=END,
        shard=shard,
        local_pools=(LOCAL,) if local_pool else (),
        indexed=indexed,
    )


def sequence(handle: int, tokens: int, computed: int) -> ScheduledSequence:
    made = ScheduledSequence(Request(str(handle), (1,) * tokens, 1), 0, 0, [1] * tokens)
    made.handle, made.computed = handle, computed
    return made


def plan(*rows: PlannedRow) -> Plan:
    return Plan(rows)


def row(handle: int, start: int, count: int, sample: bool = False) -> PlannedRow:
    return PlannedRow(sequence(handle, start + count, start), handle, start, count, sample)


def test_fusing_holder_attends_the_tokens_of_its_row() -> None:
    placed = placement((1,), fused=True)
    share = Share(1, (0, 1, 2, 3), 0, END)
    one, two = placed.open((share,)), placed.open((share,))
    batch = placed.place(plan(row(one, 0, 7), row(two, 9, 1)))[1]
    assert batch.operations == (Open(1, 0, share.heads, 0, END), Open(2, 0, share.heads, 0, END))
    assert batch.rows == (Row(1, 0, 7, (0, 7), True), Row(2, 9, 1, (0, 10), True))
    assert all(row.fused for row in batch.rows)


def test_holder_without_fusing_reads_only_the_past() -> None:
    placed = placement((1,))
    share = Share(1, (0, 1, 2, 3), 0, END)
    one = placed.open((share,))
    batch = placed.place(plan(row(one, 0, 7)))[1]
    assert batch.rows == (Row(1, 0, 7, None, True),)
    placed.holders[1].accepted(batch)
    batch = placed.place(plan(row(one, 9, 1)))[1]
    assert batch == (batch.__class__(1, (), batch.routes))
    assert batch.rows == (Row(1, 9, 1, (0, 9), True),)


@given(
    shard=st.sampled_from(SHARDS),
    weights=st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple),
    length=st.integers(1, END),
    copied=st.none() | st.integers(0, 3),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    prompt=st.integers(1, 60),
)
def test_reads_partition_the_past_and_every_token_is_stored_once(
    shard: str, weights: tuple[int, ...], length: int, copied: int | None, cuts: list[int], prompt: int
) -> None:
    """With a local copy that is opened before the row of number `copied`, and closed at the prompt's end."""
    placed = placement(weights, local_pool=500, shard=shard)
    layout = placed.layout(length)
    handle = placed.open(layout)
    one = sequence(handle, prompt, 0)
    for at, count in enumerate(cuts):
        if at == copied and len(one.tokens) - one.computed > 1:
            one.local_copy = placed.open_beside(placed.local_copy(layout, one.computed))
        count = min(count, len(one.tokens) - one.computed)
        planned = PlannedRow(one, handle, one.computed, count, one.computed + count == len(one.tokens))
        batches = placed.place(plan(planned))
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
        if planned.sample:
            one.tokens.append(1)
            if one.local_copy:
                placed.close_parts(one.local_copy, NO_PAGES)
                one.local_copy = ()


def test_local_copy_is_read_from_where_it_begins() -> None:
    placed = placement((1, 1), local_pool=500)
    share = (Share(1, (0, 1), 0, END), Share(2, (2, 3), 0, END))
    one = placed.open(share)
    copy = placed.local_copy(share, 4)
    assert copy == (Share(LOCAL, (0, 1, 2, 3), 4, END),)
    assert placed.local_copy(copy, 4) == ()
    planned = row(one, 4, 9, sample=True)
    planned.sequence.local_copy = placed.open_beside(copy)
    batches = placed.place(plan(planned))
    assert batches[LOCAL].operations == (Open(3, 0, (0, 1, 2, 3), 4, END),)
    assert batches[LOCAL].rows == (Row(3, 4, 9, (4, 13), True),)
    assert batches[1].rows == (Row(1, 4, 9, (0, 4), True),)
    placed.close_parts(planned.sequence.local_copy, Pages({(LOCAL, 0): 12}))
    assert placed.holders[LOCAL].outbox[-1] == Close(3)
    assert placed.closing == {(LOCAL, 0): 12}
    assert not placed.place(plan(row(one, 13, 1)))[LOCAL].rows


def test_operations_wait_for_the_holder_that_has_not_accepted_them() -> None:
    placed = placement((1, 1))
    layout = (Share(1, (0, 1), 0, END), Share(2, (2, 3), 0, END))
    one = placed.open(layout)
    late = batches = placed.place(plan(row(one, 0, 1)))
    placed.holders[1].accepted(batches[1])  # the other holder refuses
    two = placed.fork(one, 1)
    batches = placed.place(plan(row(one, 0, 1)))
    assert (batches[1].first, batches[1].operations) == (1, (Fork(3, 1, 1),))
    assert (batches[2].first, batches[2].operations) == (0, (Open(2, 0, (2, 3), 0, END), Fork(4, 2, 1)))
    assert placed.pending
    for number in (1, 2):
        placed.holders[number].accepted(batches[number])
    placed.holders[2].accepted(late[2])  # it was answered by what has come since
    assert not placed.pending
    for handle in (one, two):
        placed.close(handle, NO_PAGES)
    assert placed.outgoing()[2] == HolderBatch(2, (Close(2), Close(4)), ())


def test_pages_of_closes_count_as_free_until_their_holder_has_applied_them() -> None:
    """What a move had closed was not counted, and what a sequence had freed was counted twice where one holder had
    accepted and another refused."""
    placed = placement((1, 1))
    layout = (Share(1, (0, 1), 0, END), Share(2, (2, 3), 0, END))
    one = placed.open(layout)
    (beside,) = placed.open_beside((Share(2, (0, 1), 0, END),))
    old, kept = placed.parts(one)
    assert placed.closing == NO_PAGES
    placed.moved(one, (old,), (beside,), Pages({(1, 0): 4}))
    assert placed.closing == Pages({(1, 0): 4})
    placed.close(one, Pages({(2, 0): 7}))
    assert placed.closing == Pages({(1, 0): 4, (2, 0): 7})
    assert placed.holders[2].outbox[-2:] == [Close(kept.handle), Close(beside.handle)]
    assert placed.holders[1].accepted(placed.outgoing()[1]) == [4]
    assert placed.closing == Pages({(2, 0): 7})
    placed.lost(2)
    assert placed.closing == NO_PAGES


def test_handles_of_the_previous_engine_are_not_given_again() -> None:
    placed = placement((1,))
    placed.number_from(7, 20)  # the journal names these handles, though they were not adopted
    placed.number_from(5, 9)
    assert placed.open((Share(1, (0, 1, 2, 3), 0, END),)) == 8
    assert placed.holders[1].outbox == [Open(21, 0, (0, 1, 2, 3), 0, END)]
    placed.check_integrity([8])
    for handles in ([], [8, 8], [8, 9]):
        with pytest.raises(EngineError, match=r"will have handles \[8\]; in use are"):
            placed.check_integrity(handles)


def test_share_of_a_lost_holder_is_stored_by_its_substitute_only() -> None:
    placed = placement((1, 1, 1))
    layout = (Share(1, (0, 1), 0, END), Share(2, (2,), 0, END), Share(3, (3,), 0, END))
    handle = placed.open(layout)
    for number, batch in placed.place(plan(row(handle, 0, 1))).items():
        placed.holders[number].accepted(batch)
    placed.lost(2)
    new = placed.substitute(layout[1], Pages({(1, 0): 3, (3, 0): 5}))
    assert new == Share(3, (2,), 0, END)
    one = sequence(handle, 30, 20)
    one.rebuild = Rebuild((new,), 4, 20, 20)
    placed.replace(handle, 2, (new,))
    batches = placed.place(plan(PlannedRow(one, handle, 4, 16, False, rebuild=True)))
    assert batches[1].rows == (Row(1, 4, 16, (0, 4), False),)
    assert batches[3].operations == (Open(4, 0, (2,), 0, END),)
    assert batches[3].rows == (Row(3, 4, 16, (0, 4), False), Row(4, 4, 16, (0, 4), True))


@given(
    shard=st.sampled_from(SHARDS), length=st.integers(1, END), start=st.integers(0, END - 1), local_pool=st.booleans()
)
def test_holders_of_each_rank_number_its_heads_from_0(shard: str, length: int, start: int, local_pool: bool) -> None:
    # Ranks of 2 and 1 heads, two places with a pool for each rank, and a local pool each.
    holders = {10: Holder((100,)), 11: Holder((100,), rank=1), 20: Holder((100,)), 21: Holder((100,), rank=1)}
    local = {0: Holder((50,), fused=True), 1: Holder((50,), fused=True, rank=1)} if local_pool else {}
    placed = Placement(
        local | holders, heads=((2,), (1,)), page_size=8, max_model_len=END, shard=shard, local_pools=tuple(local)
    )
    layout = placed.layout(length)
    for head in range(3):
        ranges = sorted((share.lo, share.hi) for share in layout if head in share.heads)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == END
        assert all(hi == lo for (_, hi), (lo, _) in pairwise(ranges))
    assert all(holders[share.holder].rank == (share.heads[0] == 2) for share in layout)
    handle = placed.open(layout)
    planned = row(handle, start, 4)
    planned.sequence.local_copy = placed.open_beside(placed.local_copy(layout, start))
    batches = placed.place(plan(planned))
    for number, share in batches.items():
        heads = {0, 1} if (local | holders)[number].rank == 0 else {0}
        assert all(set(operation.heads) <= heads for operation in share.operations if isinstance(operation, Open))
        assert all(set(route.heads) <= heads for route in share.routes)
    opened = {number for number, share in batches.items() for operation in share.operations}
    assert opened == {share.holder for share in layout} | set(local)


def test_substitute_of_a_share_has_its_rank() -> None:
    holders = {10: Holder((100,)), 11: Holder((100,), rank=1), 20: Holder((100,)), 21: Holder((100,), rank=1)}
    placed = Placement(holders, heads=((2,), (1,)), page_size=8, max_model_len=END)
    assert placed.substitute(Share(20, (1,), 0, END), Pages({(11, 0): 90, (10, 0): 1})) == Share(10, (1,), 0, END)
    assert placed.substitute(Share(20, (2,), 0, END), Pages({(11, 0): 9, (10, 0): 90})) == Share(11, (2,), 0, END)


def test_an_index_chooses_among_all_keys_in_one_place() -> None:
    """Prompts and rebuilds too are attended where their keys are, by each part up to its end; by a copy where that has
    all keys, which it has only from position 0 on."""
    placed = placement((1, 1), indexed=(0,))
    shares = (Share(1, (0, 1), 0, END), Share(2, (2, 3), 0, END))
    handle = placed.open(shares)
    for start, count, sample in ((0, 7, False), (7, 9, True), (16, 1, True)):
        batches = placed.place(plan(row(handle, start, count, sample)))
        assert [r.read for batch in batches.values() for r in batch.rows] == [(0, start + count)] * 2
        assert all(r.store for batch in batches.values() for r in batch.rows)
    again = row(handle, 0, 16)
    again.sequence.rebuild = Rebuild((shares[1],), 0, 16, 0)
    again = PlannedRow(again.sequence, handle, 0, 16, False, True)
    batches = placed.place(plan(again))
    assert [(r.read, r.store) for batch in batches.values() for r in batch.rows] == [((0, 16), False), ((0, 16), True)]

    beside = placement((1,), local_pool=50, indexed=(0,))
    layout = (Share(1, (0, 1, 2, 3), 0, END),)
    assert beside.local_copy(layout, 8) == ()
    one = row(beside.open(layout), 0, 7)
    one.sequence.local_copy = beside.open_beside(beside.local_copy(layout, 0))
    batches = beside.place(plan(one))
    assert [batches[number].rows[0].read for number in (LOCAL, 1)] == [(0, 7), None]


def test_layers_without_an_index_are_attended_as_ever_beside_those_with_one() -> None:
    placed = Placement({1: Holder((100, 100))}, heads=((4, 4),), page_size=8, max_model_len=END, indexed=(1,))
    handle = placed.open(placed.layout(END))
    for start, count, sample in ((0, 7, False), (7, 9, True)):
        (batch,) = placed.place(plan(row(handle, start, count, sample))).values()
        assert {r.pool: r.row.read for r in batch.routes} == {0: (0, start) if start else None, 1: (0, start + count)}
