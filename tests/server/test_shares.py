"""What one API key can take from the others, as properties."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.server.shares import KeyShares

KEYS = "abcdefgh"
ASKED = st.lists(st.tuples(st.sampled_from(KEYS), st.integers(1, 300), st.booleans()), max_size=60)


def held_after(shares: KeyShares, asked: list[tuple[str, int, bool]]) -> Counter[str]:
    """What keys have after they took what fitted and gave some of it back."""
    held: Counter[str] = Counter()
    for key, units, gives in asked:
        if gives:
            units = min(units, held[key])
            if units:
                shares.give(key, units)
            held[key] -= units
        elif shares.fits(key, units):
            shares.take(key, units)
            held[key] += units
    return held


@given(st.integers(1, 2000), st.integers(2, len(KEYS)), ASKED)
def test_whatever_others_hold_a_key_gets_its_own_part(
    capacity: int, keys: int, asked: list[tuple[str, int, bool]]
) -> None:
    """Four requests of 256 samples took all room, and every other key was refused for ten minutes."""
    shares = KeyShares(capacity, keys)
    known = KEYS[:keys]
    held = held_after(shares, [(known[KEYS.index(key) % keys], units, gives) for key, units, gives in asked])
    assert sum(held.values()) <= capacity
    for key in known:
        assert held[key] == shares.held(key) <= shares.most
        left = shares.own - held[key]
        assert left <= 0 or shares.fits(key, left)
    assert shares.own * keys * 2 <= capacity < (shares.own + 1) * keys * 2


@given(st.integers(1, 2000), ASKED)
def test_a_lone_key_has_everything(capacity: int, asked: list[tuple[str, int, bool]]) -> None:
    shares = KeyShares(capacity, 1)
    held = held_after(shares, [("", units, gives) for _, units, gives in asked])
    assert shares.fits("", capacity - held[""])
    assert not shares.fits("", capacity - held[""] + 1)


def test_what_does_not_fit_cannot_be_taken() -> None:
    shares = KeyShares(8, 2)
    shares.take("a", 6)
    with pytest.raises(ValueError, match="1 more units do not fit beside 6, of 6 at most"):
        shares.take("a")


@given(st.dictionaries(st.sampled_from(KEYS), st.lists(st.integers(1, 256), min_size=1, max_size=40), min_size=2))
def test_keys_that_always_wait_get_the_same(asked: dict[str, list[int]]) -> None:
    """Requests were served as they came, so those of whoever sent the most."""
    shares = KeyShares(1 << 20, len(asked))
    queue: list[tuple[int, int, str, int]] = []
    for key, requests in asked.items():  # all requests of one key come before those of the next
        for units in requests:
            shares.take(key, units)
            heapq.heappush(queue, (shares.turn(key, units), len(queue), key, units))
    got: Counter[str] = Counter()
    left = Counter({key: len(requests) for key, requests in asked.items()})
    while queue and all(left.values()):
        turn, _, key, units = heapq.heappop(queue)
        shares.served(turn)
        got[key] += units
        left[key] -= 1
    waiting = [got[key] for key in asked]
    assert max(waiting) - min(waiting) <= 2 * 256


@given(st.lists(st.integers(1, 256), min_size=1, max_size=100), st.integers(0, 99))
def test_a_key_that_comes_late_waits_for_nobody_s_backlog_and_has_no_credit(backlog: list[int], done: int) -> None:
    """A key that had asked for nothing waited behind all that another key had asked for."""
    shares = KeyShares(1 << 20, 2)
    shares.take("a", sum(backlog))
    turns = [shares.turn("a", units) for units in backlog]
    for turn in turns[:done]:
        shares.served(turn)
    assert shares.turn("b") <= turns[min(done, len(turns) - 1)]
    assert shares.turn("b") >= (turns[min(done, len(turns)) - 1] if done else 0)


def test_turns_begin_anew_once_nobody_has_anything() -> None:
    shares = KeyShares(8, 2)
    shares.take("a", 4)
    shares.served(shares.turn("a", 4))
    assert shares.turn("a") == 4
    shares.give("a", 4)
    assert shares.turn("a") == 0
