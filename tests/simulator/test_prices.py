"""Prices at which another candidate wins: exact, over all candidates, and never believed unchecked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import EPYC, H20, H100, dop, together
from ranked_candidates import LOSSY, SLOW, SPLIT, WHOLE, checked, ranked

from lamina.simulator.costs.systems import System, price
from lamina.simulator.planning.planner import RATIO_ERROR, Ranked
from lamina.simulator.planning.quantities import changed_devices
from lamina.simulator.planning.sensitivity import Prices, at_price, without_prices

SYSTEMS = (WHOLE, SPLIT, SLOW, LOSSY, together(2), together(8, H20), dop(2, 2), dop(2, 1, attention=EPYC))


def cost(system: System, name: str, factor: float) -> float:
    return price(changed_devices(system, lambda device: at_price(device, name, factor)))


def test_the_price_at_which_another_wins_is_where_both_cost_the_same() -> None:
    """4 H100 for $44.24 against 4 H100 and an H20 for $48.87, both serve all: never by the price of an H100, and never
    by an H20's. Against 8 H20 for $37.04 / 0.7 of the requests an H100 costs 44.24 f = 52.91 f' at 1.196 times."""
    slow = ranked(together(8, H20), taken=4 * 0.7, share=0.95)
    first = ranked(WHOLE, taken=4 * 0.6, share=0.95)
    rival_score, own_score = slow.goodput_per_dollar, first.goodput_per_dollar
    assert rival_score > own_score
    prices = Prices([slow, first], None, None)
    found = prices.change("h20", 10)
    assert found is not None
    assert found.factor == pytest.approx(rival_score / own_score, rel=1e-6)
    assert found.winner == first.name
    assert not found.checked
    assert prices.change("h20", 0.1) is None
    assert prices.change("h100", 10) is None


def test_what_serves_all_wins_at_any_price() -> None:
    prices = Prices([ranked(WHOLE), ranked(SLOW, taken=3.9, share=0.99)], None, None)
    assert prices.change("h100", 10) is None
    assert prices.change("h20", 0.1) is None


def test_the_winner_leaves_the_budget() -> None:
    """$44.24 of a budget of 50: at 1.13 times the price of an H100 it cannot be bought."""
    prices = Prices([ranked(WHOLE), ranked(SLOW, taken=2.0)], 50.0, None)
    found = prices.change("h100", 10)
    assert found is not None
    assert found.factor == pytest.approx(50 / 44.24, rel=1e-6)


def test_a_lossy_policy_has_to_be_better_than_the_error() -> None:
    lossy = ranked(replace(SLOW, policy=LOSSY.policy))
    prices = Prices([ranked(WHOLE), lossy], None, None)
    factor = price(WHOLE) / price(SLOW)
    rival = Prices([ranked(SLOW), ranked(WHOLE)], None, None).change("h20", 10)
    assert rival is not None
    assert rival.factor == pytest.approx(factor, rel=1e-6)
    dear = ranked(replace(together(8, H20), policy=LOSSY.policy))  # $37.04, 16 % cheaper than 44.24
    found = Prices([dear, ranked(WHOLE)], None, None).change("h20", 10)
    assert found is not None
    assert found.factor == pytest.approx(price(WHOLE) / price(dear.candidate.system) / (1 + RATIO_ERROR), rel=1e-6)
    assert prices.winner("h20", 1.0) == lossy  # by far the cheaper


class Loop:
    """Stands for the event loop: systems in `failing` serve half of the requests in time."""

    def __init__(self, *failing: System) -> None:
        self.failing, self.asked = failing, list[System]()

    def full(self, each: Ranked) -> bool:
        return each.result is not None

    def checked(self, some: Sequence[Ranked]) -> list[Ranked]:
        self.asked += [each.candidate.system for each in some]
        return [checked(each, share=0.5 if each.candidate.system in self.failing else 1.0) for each in some]

    def whole(self, each: Ranked) -> Ranked:
        return each


def test_a_rival_is_checked_before_it_is_believed() -> None:
    first, rival = checked(ranked(dop(2, 1, attention=EPYC))), together(8, H20)  # $29.47 and $37.04 an hour
    loop = Loop()
    prices = Prices([first, ranked(rival), ranked(WHOLE), ranked(SPLIT)], None, loop)
    found = prices.change("epyc-genoa", 10)
    assert found is not None
    assert found.checked
    assert found.winner == ranked(rival).name
    assert loop.asked == [rival]
    loop = Loop(rival, WHOLE)
    prices = Prices([first, ranked(rival), ranked(WHOLE)], None, loop)
    assert prices.change("epyc-genoa", 10) is None  # whatever is cheaper fails in the event loop
    assert loop.asked == [rival, WHOLE]
    assert all(each.result is not None for each in prices.ranked)


def test_the_loop_is_asked_for_all_that_it_may_find() -> None:
    """Where nothing serves all, formulas count those that miss the SLO for little, and the loop for what is in time: by
    the formula 8 H20 win at 4.3 times the price of an H100."""
    first, rival = checked(ranked(WHOLE), share=0.7), ranked(together(8, H20), taken=2.0, share=0.8)
    found = Prices([first, rival], None, Loop()).change("h100", 2.0)
    assert found is not None
    assert found.winner == rival.name
    assert found.factor == pytest.approx(2.8 / price(WHOLE) / (2.0 / price(together(8, H20))), rel=1e-3)


def test_of_ties_the_cheapest_that_loses_nothing_is_taken_once_it_is_checked() -> None:
    """As where a policy that reads 0.3 of the KV gives the same for a dollar as none."""
    lossy, whole = checked(ranked(LOSSY)), ranked(WHOLE)
    prices = Prices([lossy, whole], None, Loop())
    prices.settle()
    assert [each.candidate.system for each in prices.ranked] == [WHOLE, LOSSY]
    assert prices.ranked[0].result is not None
    prices = Prices([lossy, whole], None, Loop(WHOLE))
    prices.settle()
    assert [each.candidate.system for each in prices.ranked] == [LOSSY, WHOLE]
    cheap = ranked(replace(SLOW, policy=LOSSY.policy))  # less than half the price: no tie
    prices = Prices([whole, cheap], None, None)
    prices.settle()
    assert prices.ranked[0] == cheap


def test_what_would_be_first_by_formula_is_tried_first_of_all() -> None:
    loop = Loop(SLOW)
    prices = Prices([checked(ranked(WHOLE)), ranked(SLOW), ranked(SPLIT)], None, loop)
    prices.settle()
    assert prices.ranked[0].candidate.system == WHOLE
    assert loop.asked == [SLOW]
    prices = Prices([checked(ranked(WHOLE)), ranked(SLOW)], None, Loop())
    prices.settle()
    assert prices.ranked[0].candidate.system == SLOW


def test_what_the_budget_left_out_comes_in_when_prices_fall() -> None:
    """$48.87 of a budget of 45: within it once an H20 costs 0.76 $/h, but never cheaper than 4 H100; 8 H20 for $37.04
    are, at any price below 1.19 times theirs."""
    asked: list[tuple[str, float, float]] = []

    def unseen(name: str, factor: float, most: float) -> list[Ranked]:
        asked.append((name, factor, most))
        return [ranked(SPLIT), ranked(together(8, H20))]

    found = Prices([ranked(WHOLE)], 36.0 + 9, None, unseen).change("h20", 0.1)
    assert found is not None
    assert asked == [("h20", 0.1, pytest.approx(price(WHOLE)))]
    assert found.winner == ranked(together(8, H20)).name


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(SYSTEMS), st.floats(1.0, 4.0), st.floats(0.5, 1.0), st.integers(1, 3)),
        min_size=2, max_size=6, unique_by=lambda each: each[0],
    ),
    st.sampled_from(["h100", "h20", "epyc-genoa"]),
    st.sampled_from([None, 60.0, 150.0]),
)  # fmt: skip
def test_just_before_a_change_the_winner_still_wins_and_just_beyond_it_another(
    drawn: list[tuple[System, float, float, int]], name: str, budget: float | None
) -> None:
    every = [ranked(system, taken=taken, share=share, replicas=count) for system, taken, share, count in drawn]
    every = [each for each in every if budget is None or each.estimate.price <= budget]
    if not every:
        return
    winner = Prices(every, budget, None).winner(name, 1.0)
    every = [winner, *(each for each in every if each is not winner)]
    prices = Prices(every, budget, None)
    for farthest in (10.0, 0.1):
        found = prices.change(name, farthest)
        for factor in (1.001, 1.5, 3.0, 9.0):
            at = factor if farthest > 1 else 1 / factor
            if found is None or (at < found.factor if farthest > 1 else at > found.factor):
                assert prices.winner(name, at) == winner
        if found is not None:
            assert prices.winner(name, found.factor).name == found.winner != winner.name


def test_systems_are_the_same_at_all_prices() -> None:
    dear = changed_devices(SPLIT, lambda device: at_price(device, "h20", 3.0))
    assert dear != SPLIT
    assert without_prices(dear) == without_prices(SPLIT) != without_prices(WHOLE)
    assert cost(SPLIT, "h20", 3.0) == pytest.approx(price(SPLIT) + 2 * H20.price)
    assert at_price(H100, "h20", 3.0) == H100
