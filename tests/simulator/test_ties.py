"""Near ties: what is as good, and which is taken."""

from __future__ import annotations

import math
from dataclasses import replace

from planning import H20, dop, together
from ranked_candidates import LOSSY, SPLIT, WHOLE, ranked

from lamina.simulator.costs.model_configs import model
from lamina.simulator.planning.planner import advantage, lossless, near_ties, tied


def test_what_differs_by_less_than_the_error_is_a_tie() -> None:
    """$44.24 against $48.87 is a tie, 1.105 times, and against $53.50 none, 1.209 times; the same for 0.99 of the
    requests is one (AFD-Ledger's re-provisioned 0.990), 1.404 times is not (its FastAFD). With experts ratios are less
    sure."""
    assert tied(ranked(WHOLE), ranked(SPLIT))
    assert not tied(ranked(WHOLE), ranked(dop(4, 2)))
    experts = replace(WHOLE, model=model("qwen3-235b-a22b")), replace(dop(4, 2), model=model("qwen3-235b-a22b"))
    assert tied(*map(ranked, experts))
    assert tied(ranked(WHOLE, taken=4 * 0.99, rate=math.inf), ranked(WHOLE, rate=math.inf))
    assert not tied(ranked(WHOLE, taken=4 * 1.404, rate=math.inf), ranked(WHOLE, rate=math.inf))
    assert not tied(ranked(WHOLE), ranked(WHOLE, taken=3.9))  # one serves all, the other does not


def test_free_systems_are_compared_by_what_they_could_take() -> None:
    free = replace(WHOLE, device=replace(WHOLE.device, price=0.0))
    assert advantage(ranked(free, taken=2.0), ranked(free, taken=4.0)) == 0.5
    assert advantage(ranked(free), ranked(WHOLE)) == math.inf
    assert advantage(ranked(WHOLE), ranked(free)) == 0
    assert not tied(ranked(free), ranked(WHOLE))


def test_ties_name_what_loses_nothing_first() -> None:
    first = ranked(together(8, H20))
    lossy = ranked(replace(together(8, H20), policy=LOSSY.policy), taken=4 * 0.99, rate=4 * 0.99)
    other = ranked(dop(2, 3))
    found = near_ties([first, lossy, other, ranked(SPLIT)])
    assert [lossless(each) for each in found] == [True, False]
