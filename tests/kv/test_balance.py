"""KV moves where that pays, and no move is taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.kv.kv_shares import Share
from lamina.kv.placement import Holder, Placement
from lamina.kv.relocation import MIN_TOKENS, KeptShare, next_move
from lamina.kv.request import Request, ScheduledSequence

END = 4096


def layouts(*weights: int) -> Placement:
    """Holders 1, 2, ... of these weights."""
    holders = {number: Holder((1000,), weight) for number, weight in enumerate(weights, 1)}
    return Placement(holders, heads=((2,),), page_size=16, max_model_len=END)


def kept(holder: int, pages: int, left: int = 1000) -> KeptShare:
    sequence = ScheduledSequence(Request("r", (1,) * 101, left), 0, 0, [1] * 101)
    sequence.handle, sequence.computed, sequence.planned = 1, 100, 100
    return KeptShare(sequence, Share(holder, (0, 1), 0, END), pages)


def weights(place: Placement) -> dict[int, int]:
    return {number: holder.weight for number, holder in place.holders.items()}


def test_half_of_the_sequences_move_to_a_holder_that_reads_nothing() -> None:
    place = layouts(1, 1)
    every = [kept(1, 100) for _ in range(8)]
    moves = 0
    while (move := next_move(every, weights(place), place)) is not None:
        assert (move.share.holder, move.to) == (1, 2)
        at = next(n for n, each in enumerate(every) if each.sequence is move.sequence)
        every[at] = kept(2, 100)
        moves += 1
    assert moves == 4


@pytest.mark.parametrize(
    ("pages", "left"),
    [((100,), 1000), ((100, 100), MIN_TOKENS - 10), ((100, 90), 1000)],
    ids=["alone", "soon over", "even"],
)
def test_nothing_moves_that_does_not_pay(pages: tuple[int, ...], left: int) -> None:
    place = layouts(1, 1)
    every = [kept(at, some, left) for at, some in zip((1, 1) if left < MIN_TOKENS else (1, 2), pages, strict=False)]
    assert next_move(every, weights(place), place) is None


def test_nothing_moves_to_a_holder_that_is_let_go() -> None:
    place = layouts(1, 1)
    place.holders[2].draining = True
    assert next_move([kept(1, 10), kept(1, 10)], weights(place), place) is None


@given(
    of_weights=st.lists(st.integers(1, 3), min_size=2, max_size=4).map(tuple),
    pages=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 300)), min_size=1, max_size=8),
)
def test_moves_come_to_an_end_and_none_is_taken_back(of_weights: tuple[int, ...], pages: list[tuple[int, int]]) -> None:
    place = layouts(*of_weights)
    every = [kept(1 + holder % len(of_weights), some) for holder, some in pages]
    been = [{each.share.holder} for each in every]
    slowest = []
    for _ in range(200):
        slowest.append(max(sum(k.pages for k in every if k.share.holder == n) / w for n, w in weights(place).items()))
        move = next_move(every, weights(place), place)
        if move is None:
            break
        at = next(n for n, each in enumerate(every) if each.sequence is move.sequence)
        assert move.to not in been[at] or len(of_weights) > 2
        been[at].add(move.to)
        every[at] = kept(move.to, every[at].pages)
    assert move is None
    assert slowest == sorted(slowest, reverse=True)
