"""What would change a plan: links, load, limits and assumptions, one at a time, and never said without trying."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from planning import BIG, FHBN, H20, H100, KNOWN, SLO, STEADY, dop, together

from lamina.simulator.costs.cost_model import Load
from lamina.simulator.costs.hardware import Link
from lamina.simulator.costs.systems import Colocated, Disaggregated, System
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.candidates import Candidate
from lamina.simulator.planning.planner import Ranked, rank
from lamina.simulator.planning.quantities import Situation, assumed, changed, faster, links, market, scaled
from lamina.simulator.planning.sensitivity import Change, Changes, Flip, Prices, Sensitivity, flips, sensitivity
from lamina.simulator.steady_state.closed_form import estimate
from lamina.simulator.traces.demand import Demand

FULL_LOAD = STEADY.at_rate(math.inf)
PACE = Slo(tpot=0.1)


def decode(*systems: System, asked: Demand = FULL_LOAD) -> list[Ranked]:
    """Decode alone, at the most that each serves."""
    return rank([Candidate(system, 4) for system in systems], asked, PACE, prefill=False)


def by_formula(each: Ranked, given: Situation) -> Ranked:
    """Stands for the event loop."""
    found = estimate(given.system, 4, given.demand, given.slo, False, fine=False)
    return Ranked(Candidate(given.system, 4), found)


def test_the_winner_changes_where_it_is_said_to() -> None:
    winner, rival = decode(together(4), dop(2, 4, lanes=2))
    prices, changes = Prices([winner, rival], None, None), Changes([winner, rival], FULL_LOAD, PACE, False)
    systems = [each.candidate.system for each in (winner, rival)]
    found = {each.what: each for each in sensitivity(prices, changes, market(systems, FULL_LOAD, PACE))}
    assert set(found) == {
        "price of h100", "price of h20", "bandwidth of fhbn-400g", "round trip of fhbn-400g", "mean prompt",
        "tpot of the SLO",
    }  # fmt: skip
    dearer = found["price of h20"].rise
    assert dearer is not None
    assert dearer.winner == rival.name

    def leads(factor: float) -> bool:
        scores = []
        for each in (winner, rival):
            system = changed(each.candidate.system, lambda d: replace(d, price=d.price * factor), only="h20")
            scores.append(estimate(system, 4, FULL_LOAD, PACE, prefill=False).goodput_per_dollar)
        return scores[0] >= scores[1]

    assert leads(dearer.factor * 0.99)
    assert not leads(dearer.factor * 1.01)
    assert f"{dearer.factor:.2f}x" in str(found["price of h20"])
    assert "by formula" in str(found["price of h20"])


def test_a_slower_link_ends_the_lead_of_what_needs_it_and_is_tried_there() -> None:
    ranked = decode(dop(2, 4, lanes=2), together(4))
    assert ranked[0].candidate.offloaded
    tried: list[tuple[str, float]] = []

    def run(each: Ranked, given: Situation, allowance: float) -> Ranked:
        found = by_formula(each, given)
        tried.append((each.name, links([given.system])["fhbn-400g"].round_trip if each.candidate.offloaded else 0.0))
        return found

    (trip,) = [each for each in market([ranked[0].candidate.system], FULL_LOAD, PACE) if "round trip" in each.what]
    change = Changes(ranked, FULL_LOAD, PACE, False, run).change(trip, 100.0)
    assert change is not None
    assert change.checked
    assert change.factor > 1
    assert change.winner == ranked[1].name
    assert len(tried) == 2
    assert tried[0][1] > FHBN.round_trip * change.factor  # just beyond it


def test_what_does_not_hold_when_it_is_tried_is_not_said() -> None:
    ranked = decode(dop(2, 4, lanes=2), together(4))
    (trip,) = [each for each in market([ranked[0].candidate.system], FULL_LOAD, PACE) if "round trip" in each.what]
    tried: list[Ranked] = []

    def run(each: Ranked, given: Situation, allowance: float) -> Ranked:
        tried.append(each)
        return each  # as it is now: the winner wins

    assert Changes(ranked, FULL_LOAD, PACE, False, run).change(trip, 100.0) is None
    assert len(tried) == 4  # just beyond the closed form's change, and at the farthest


def test_a_change_that_comes_later_than_the_closed_form_says_is_found() -> None:
    """It was sought three times close to where the closed form has it, and then said to be nowhere."""
    ranked = decode(dop(2, 4, lanes=2), together(4))
    (trip,) = [each for each in market([ranked[0].candidate.system], FULL_LOAD, PACE) if "round trip" in each.what]
    by_closed_form = Changes(ranked, FULL_LOAD, PACE, False).change(trip, 100.0)
    assert by_closed_form is not None
    late = 2 * by_closed_form.factor

    def run(each: Ranked, given: Situation, allowance: float) -> Ranked:
        if not each.candidate.offloaded:
            return each
        slower = links([given.system])["fhbn-400g"].round_trip / FHBN.round_trip
        return each if slower < late else replace(each, estimate=replace(each.estimate, taken=0.01))

    change = Changes(ranked, FULL_LOAD, PACE, False, run).change(trip, 100.0)
    assert change is not None
    assert change.checked
    assert change.winner == ranked[1].name
    assert late <= change.factor < 2 * late


def test_what_a_candidate_does_not_depend_on_leaves_it_as_the_event_loop_found_it() -> None:
    """Two replicas by the event loop, one by the closed form: any change of the link halved the price."""
    asked = STEADY.at_rate(2.0)
    every = decode(dop(2, 4, lanes=2), together(4), asked=asked)
    offloaded, colocated = sorted(every, key=lambda each: not each.candidate.offloaded)
    assert colocated.estimate.replicas == 1
    dear = replace(colocated, estimate=replace(colocated.estimate, replicas=2, price=2 * colocated.estimate.price))
    assert offloaded.goodput_per_dollar > dear.goodput_per_dollar
    changes = Changes([offloaded, dear], asked, PACE, False)
    for quantity in market([offloaded.candidate.system], asked, PACE):
        if "fhbn" in quantity.what:
            assert changes.change(quantity, 1.2) is None
    (load,) = [each for each in market([colocated.candidate.system], asked, PACE) if each.what == "load"]
    assert changes.change(load, 1.05) is None  # as many replicas as now


def test_a_faster_device_is_faster_in_all() -> None:
    packed = Colocated(model=BIG.with_weights("int4"), device=KNOWN.device("epyc-milan"))  # which unpacks weights
    for system in (together(4), packed):
        slow, fast = (each.step(Load(64, 1000)).seconds for each in (system, faster(system, 2.0)))
        assert slow == pytest.approx(2 * fast)
    assert faster(dop(2, 1), 2.0, "h20").model_device == H100  # type: ignore[union-attr]
    assert scaled(dop(2, 1), 0.5, "fhbn-400g", "round_trip").link.round_trip == FHBN.round_trip / 2  # type: ignore[union-attr]


def test_memory_is_changed_on_all_devices_with_kv() -> None:
    split, apart = dop(2, 4), Disaggregated(prefill=together(2), decode=dop(2, 4), link=FHBN)
    (memory,) = [each for each in assumed([split, apart], lambda system: (0.9, 1.1)) if "memory" in each.what]
    more = memory.change(Situation(split, FULL_LOAD, PACE), 1.05).system
    assert more == replace(split, memory_share=0.9 * 1.05, attention_memory_share=0.9 * 1.05)
    whole = memory.change(Situation(apart, FULL_LOAD, PACE), 2.0).system
    assert whole == replace(
        apart,
        prefill=replace(together(2), memory_share=1.0),
        decode=replace(split, memory_share=1.0, attention_memory_share=1.0),
    )


def test_the_assumption_that_flips_the_answer_is_named_with_its_value() -> None:
    """A lead of a few percent, and devices that may be half as fast as assumed."""
    ranked = decode(dop(2, 4, lanes=2), together(4))
    gain = ranked[0].goodput_per_dollar / ranked[1].goodput_per_dollar
    assert 1 < gain < 2
    changes = Changes(ranked, FULL_LOAD, PACE, False)
    asked = assumed([each.candidate.system for each in ranked], lambda system: (0.5, 2.0))
    found = flips(changes, asked)
    assert found
    assert found[0].likely
    assert all(each.change.factor != 1 for each in found)
    said = [str(each) for each in found]
    assert any(each.startswith("speed of h") and "the answer may well be another" in each for each in said), said
    assert not flips(changes, assumed([each.candidate.system for each in ranked], lambda system: (1.0, 1.0)))[2:]


def test_words() -> None:
    same = Sensitivity("price of h20", 4.63, "$/h", None, None)
    assert str(same) == "price of h20, now 4.63 $/h: the winner does not change up to 10x either way"
    assert str(replace(same, rivals=0)) == "price of h20, now 4.63 $/h: there is no other candidate"
    rise = Change(1.5, "4x h100 co-located")
    assert str(replace(same, rise=rise)) == (
        "price of h20, now 4.63 $/h: at 1.50x and more (6.95 $/h) 4x h100 co-located wins"
    )
    flip = Flip("speed of h20", 1.0, "of what is assumed", Change(0.8, "4x h100 co-located"), 0.9, 1.1, "residuals")
    assert str(flip) == (
        "speed of h20: below 0.8 of what is assumed 4x h100 co-located wins; now 1, likely 0.9 to 1.1 (residuals): "
        "unlikely"
    )
    assert replace(flip, low=0.7).likely


def test_only_what_there_is_is_changed() -> None:
    named = [each.what for each in market([together(4)], STEADY, SLO)]
    assert named == ["mean prompt", "load", "tpot of the SLO", "ttft of the SLO"]
    assert links([together(4, H20)]) == {}
    slow = Link("no-latency", 1e9, 0.0)
    assert "round trip of no-latency" not in [each.what for each in market([dop(1, 1, slow)], STEADY, SLO)]
