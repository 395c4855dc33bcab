"""Near ties and best against best: what is as good, and which is taken."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from planning import FHBN, H20, dop, together
from ranked_candidates import LOSSY, SLOW, SPLIT, WHOLE, ranked

from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Disaggregated
from lamina.simulator.planning.plan import BOTH, PREFILL, TOGETHER, best_of_kinds, kind, split_pays
from lamina.simulator.planning.plan import SPLIT as OFFLOADED
from lamina.simulator.planning.planner import Ranked, advantage, lossless, near_ties, ratio_error, tied


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


def test_every_system_is_of_one_kind() -> None:
    whole = together(2)
    assert kind(whole) == TOGETHER
    assert kind(Disaggregated(prefill=whole, decode=together(2, H20), link=FHBN)) == PREFILL
    assert kind(SPLIT) == OFFLOADED


def test_the_best_of_each_kind_is_optimised_alone() -> None:
    apart = Disaggregated(prefill=together(2), decode=together(2, H20), link=FHBN)
    every = [ranked(SLOW), ranked(WHOLE), ranked(SPLIT), ranked(dop(2, 2)), ranked(apart)]

    found = best_of_kinds(every)
    assert list(found) == [TOGETHER, PREFILL, OFFLOADED]
    assert found[TOGETHER].candidate.system == SLOW
    assert found[OFFLOADED].candidate.system == dop(2, 2)
    assert BOTH not in found


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        (ranked(SPLIT, taken=8.0, rate=math.inf), ranked(WHOLE, rate=math.inf), "The split pays: the best split"),
        (ranked(SPLIT, taken=4.4, rate=math.inf), ranked(WHOLE, rate=math.inf), "1.00 times"),
        (ranked(SPLIT), ranked(WHOLE), "gives 0.91 times the requests for a dollar of the best without"),
        (ranked(SPLIT), ranked(WHOLE, taken=3.0), "The split pays: the best split serves all that is asked for"),
        (ranked(SPLIT, taken=3.0), ranked(WHOLE), "The split does not pay: nothing that offloads"),
        (None, ranked(WHOLE), "The split does not pay: nothing that offloads attention gets a request through"),
        (ranked(SPLIT), None, "The split pays: only what offloads"),
    ],
)
def test_it_is_said_first_whether_the_split_pays(mine: Ranked | None, theirs: Ranked | None, said: str) -> None:
    best = {name: each for name, each in ((TOGETHER, theirs), (OFFLOADED, mine)) if each is not None}
    assert said in split_pays(best)


def test_a_near_tie_does_not_pay() -> None:
    """At equal requests a second the split may cost up to the error more or less."""
    best = {TOGETHER: ranked(WHOLE, rate=math.inf), OFFLOADED: ranked(SPLIT, taken=4.5, rate=math.inf)}
    said = split_pays(best)
    assert said.startswith("The split does not pay: ")
    assert f"a tie within the error of such a comparison ({ratio_error(best[TOGETHER]):.0%})" in said
