"""The planner: what a trace asks for, the closed form, who is a candidate, who wins and why."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from drawn_traces import poisson
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import BIG, EPYC, H20, H100, SLO, SMALL, STEADY, dop, there_are, together

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import KvPolicy
from lamina.simulator.costs.hardware import Device, Link
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System, price
from lamina.simulator.event_loop.simulate import Slo, simulate
from lamina.simulator.planning.candidates import Candidate, candidates
from lamina.simulator.planning.plan import PlanRequest, make_plan
from lamina.simulator.planning.planner import TOP, Ranked, best, described, limited, mixes, rank, rivals, top, verify
from lamina.simulator.planning.quantities import changed
from lamina.simulator.planning.reasons import limits, why
from lamina.simulator.steady_state.closed_form import ATTAINMENT
from lamina.simulator.traces import catalogue as traces
from lamina.simulator.traces.arrivals import Arrival, Trace
from lamina.simulator.traces.demand import Demand, demand

# Candidates


def test_inventory_and_budget_are_kept() -> None:
    inventory = there_are((H100, 4), (H20, 3), (EPYC, 2))
    found = candidates(BIG, inventory, budget=40.0)
    kinds = {type(each.system) for each in found}
    assert kinds == {Colocated, Disaggregated, Offloaded}
    counts = {"h100": 4, "h20": 3, "epyc-genoa": 2}
    for each in found:
        used: dict[str, int] = {}
        for device, count in each.system.devices:
            used[device.name] = used.get(device.name, 0) + count * each.replicas
        assert all(used[name] <= counts[name] for name in used)
        assert price(each.system) * each.replicas <= 40.0
        assert each.system.kv_tokens > 0
    offloaded = [each.system for each in found if isinstance(each.system, Offloaded)]
    assert {(each.model_count, each.attention_count) for each in offloaded if each.attention_device == H20} >= {
        (2, 1), (2, 2), (2, 3),
    }  # fmt: skip
    assert {each.lanes for each in offloaded} == {1, 2, 3}
    assert {each.shard for each in offloaded if each.attention_count == 3} == {"heads", "sequence"}  # of 8 heads
    assert {each.shard for each in offloaded if each.attention_count == 2} == {"heads"}
    assert len(set(found)) == len(found)


def test_only_the_systems_that_are_allowed() -> None:
    everything = ((H100, 4), (H20, 4), (EPYC, 2))
    for name, kind in (("chunked", Colocated), ("disaggregated", Disaggregated), ("lamina-cpu", Offloaded)):
        found = candidates(BIG, there_are(*everything, systems=(name,)))
        assert {type(each.system) for each in found} == {kind}
    assert {each.system.devices[-1][0] for each in found} == {EPYC}
    assert not [
        each
        for each in candidates(BIG, there_are(*everything), prefill=False)
        if isinstance(each.system, Disaggregated)
    ]
    plenty = candidates(BIG, there_are((H20, 16), systems=("lamina",)))
    by_shard = {each.system.attention_count: each.system.shard for each in plenty if isinstance(each.system, Offloaded)}
    assert by_shard[9] == "sequence"  # more workers than KV heads
    assert by_shard[8] == "heads"


def test_policies_multiply() -> None:
    policies = (KvPolicy(), KvPolicy("auto", 0.3))
    one, two = (
        candidates(BIG, there_are((H100, 4), policies=chosen, systems=("chunked",)))
        for chosen in (policies[:1], policies)
    )
    assert len(two) == 2 * len(one)


@pytest.mark.parametrize(
    ("have", "budget", "said"),
    [
        (((H100, 1),), None, "'llama-3-70b' fits nowhere: its weights have 137.5 GB"),
        (((H100, 1),), None, "1x h100 with 80.0 GB each"),
        (((H100, 4), (H20, 4)), 5.0, "budget is 5 dollars an hour; the cheapest"),
        (((H100, 4),), -1.0, "budget is -1.0"),
        (((H100, 4),), math.nan, "budget is nan"),
    ],
)
def test_no_candidates_is_an_error_that_says_why(
    have: tuple[tuple[Device, int], ...], budget: float | None, said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said.replace("(", r"\(")):
        candidates(BIG, there_are(*have), budget)


def test_too_many_candidates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.simulator.planning.candidates.MAX_CANDIDATES", 300)
    with pytest.raises(InvalidRequest, match="more than 300 candidates; allowed are fewer devices"):
        candidates(SMALL, there_are((H100, 8), (H20, 8)))


# Ranking


def ranked(*systems: System, asked: Demand = STEADY, slo: Slo = SLO, prefill: bool = True) -> list[Ranked]:
    return rank([Candidate(system, 4) for system in systems], asked, slo, prefill=prefill)


@settings(max_examples=8)
@given(st.sampled_from(["h100", "h20"]), st.floats(0.05, 1.0), st.sampled_from([1.0, 6.0, math.inf]))
def test_a_cheaper_device_never_ranks_its_systems_lower(name: str, factor: float, rate: float) -> None:
    systems = (together(4), together(8), together(8, H20), dop(2, 4), dop(4, 2), together(4, H20))
    asked = STEADY.at_rate(rate)

    def place(cheaper: bool, at: int) -> int:
        scale = factor if cheaper else 1.0
        mine = [
            changed(each, lambda device: replace(device, price=device.price * scale), only=name) for each in systems
        ]
        # only the one that is looked at is cheaper: prices of others stay
        order = [
            each.candidate.system
            for each in ranked(*(mine[n] if n == at else systems[n] for n in range(6)), asked=asked)
        ]
        return order.index(mine[at])

    for at in range(len(systems)):
        assert place(True, at) <= place(False, at)


def test_who_serves_everything_comes_before_who_is_cheaper() -> None:
    found = ranked(together(4), together(8, H20), asked=STEADY.at_rate(25.0))
    serving = [each.serves for each in found]
    assert serving == sorted(serving, reverse=True)
    for first, second in pairwise(found):
        assert not (first.serves == second.serves and first.goodput_per_dollar < second.goodput_per_dollar)


def test_a_thousand_candidates_are_ranked_with_progress() -> None:
    every = candidates(BIG, there_are((H100, 4), (H20, 4)), budget=45.0)
    told: list[tuple[int, int]] = []
    found = rank(every, STEADY, SLO, progress=lambda what, done, total: told.append((done, total)))
    assert len(found) == len(every) == len({each.name for each in found})
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]


def test_nothing_in_time_names_the_fastest() -> None:
    with pytest.raises(InvalidRequest, match=r"no system meets the SLO \(tpot 1 ms\): the fastest, 4x h100"):
        ranked(together(4), slo=Slo(tpot=0.001))


def test_a_link_too_slow_is_named_with_what_it_has_and_needs() -> None:
    slow = Link("modem", 7000.0, 0.1)
    with pytest.raises(InvalidRequest) as caught:
        ranked(dop(2, 4, slow))
    said = str(caught.value)
    assert "link 'modem' is too slow for DOP(2, 4) h100 + h20: it has 1.4e-05 GB/s" in said  # over two cards
    assert "80 of which take 8e+03 ms a token" in said
    assert "it needs" in said


def test_the_best_are_of_different_mixes_and_of_every_kind() -> None:
    inventory = there_are((H100, 4), (H20, 4))
    found = rank(candidates(BIG, inventory, budget=45.0), STEADY, SLO)
    chosen = top(found)
    assert len(chosen) == TOP >= 20
    assert {type(each.candidate.system) for each in chosen} == {Colocated, Disaggregated, Offloaded}
    few = top(found, 5)
    assert len({(type(each.candidate.system), each.candidate.system.devices) for each in few}) == 5
    alone = rank(candidates(BIG, there_are((H100, 4))), STEADY, SLO)
    assert len(top(alone)) == min(TOP, len([each for each in alone if each.estimate.goodput]))
    assert mixes(found)[0] == found[0]
    first = found[0].candidate.system
    for rival in rivals(found):
        assert (type(rival.candidate.system), rival.candidate.system.devices) != (type(first), first.devices)


# Checked by the event loop


def test_the_event_loop_ranks_again() -> None:
    trace = poisson(4.0, 300, 500, 60, seed=1)
    asked = demand(trace)
    found = rank([Candidate(together(4), 1), Candidate(dop(2, 2), 1)], asked, SLO)
    checked = verify(found, trace, SLO, requests=200)
    assert [each.result is not None for each in checked] == [True, True]
    for each in checked:
        assert each.rate == pytest.approx(asked.rate)
        assert each.serves
        assert each.goodput == pytest.approx(each.rate * each.result.slo_share)  # type: ignore[union-attr]
    assert checked[0].goodput_per_dollar >= checked[1].goodput_per_dollar
    again = verify(found, trace, SLO, requests=200)
    assert again == checked


def test_who_does_not_keep_the_slo_is_tried_slower() -> None:
    trace = poisson(4.0, 300, 500, 60, seed=1)
    (found,) = rank([Candidate(together(4), 1)], demand(trace).at_rate(math.inf), SLO)
    (checked,) = verify([replace(found, estimate=replace(found.estimate, taken=found.estimate.taken * 2))], trace, SLO)
    assert checked.rate < 2 * found.estimate.taken
    assert limited(found).max_sequences == found.estimate.most


# Why, and what would change it


def test_offloading_pays_where_memory_is_short_and_prompts_are_elsewhere() -> None:
    """Lamina's setting, decode alone and full: more for a dollar, and no more than a roofline can give."""
    slo = Slo(tpot=0.1)
    found = ranked(
        together(4), dop(2, 3, lanes=2), dop(2, 4, lanes=2), asked=STEADY.at_rate(math.inf), slo=slo, prefill=False
    )
    assert found[0].candidate.offloaded
    said = why(found, STEADY.at_rate(math.inf), slo, prefill=False)
    gain = found[0].goodput_per_dollar / next(x for x in found if not x.candidate.offloaded).goodput_per_dollar
    assert 1.0 < gain < 1.5
    assert any(
        f"{gain:.2f}x the requests for a dollar of the best without offloading, 4 of 4x h100" in each for each in said
    )


def test_it_is_said_where_offloading_does_not_pay() -> None:
    slow = Link("slow", 1e9, 1e-3)
    found = ranked(together(4), dop(2, 4, slow))
    assert not found[0].candidate.offloaded
    said = " ".join(why(found, STEADY, SLO))
    assert "Offloading attention does not pay here" in said
    without = " ".join(why(ranked(together(4)), STEADY, SLO))
    assert "no system with it fits" in without
    hopeless = ranked(together(4), dop(2, 4, Link("modem", 7000.0, 0.1)))
    assert "link 'modem' is too slow" in " ".join(why(hopeless, STEADY, SLO))


def test_a_winner_that_serves_nothing_in_time_is_compared_all_the_same() -> None:
    """Where the event loop says so of all that it checked."""
    found = ranked(together(4), dop(2, 4))
    whole, split = (next(each for each in found if each.candidate.offloaded is kind) for kind in (False, True))
    late = simulate(together(4), Trace("few", (Arrival(0.0, 10, 3),)), slo=Slo(tpot=1e-9))
    said = " ".join(why([replace(whole, result=late, rate=4.0), split], STEADY, SLO))
    assert "serves some requests within the SLO, where this one serves none" in said


def test_what_limits_is_what_helps() -> None:
    tight = replace(H100, memory=4.2e10)  # room for a few sequences beside the weights
    (found,) = ranked(together(4, tight), asked=STEADY.at_rate(math.inf), prefill=False)
    assert limits(found, STEADY, SLO, prefill=False)[0].what == "memory of h100"
    (other,) = ranked(dop(2, 4, Link("far", 4e10, 9e-4)), asked=STEADY.at_rate(math.inf), prefill=False)
    assert limits(other, STEADY, SLO, prefill=False)[0].what == "messages a second of far"


def test_a_whole_plan_from_beginning_to_end() -> None:
    trace = traces.trace("azure-conv", 200, seed=1)
    inventory = there_are((H100, 4), (H20, 1), systems=("chunked", "lamina"))
    asked = PlanRequest("llama-3-70b", BIG, inventory, trace, SLO, budget=50.0)
    found = make_plan(asked, check=2, seed=1)
    assert found.winner.result is not None
    assert found.winner.serves
    assert found.winner.result.slo_share >= ATTAINMENT
    assert found.plan.system == limited(found.winner)
    assert found.plan.predicted.source == "event loop"
    assert found.plan.trace.rate == pytest.approx(demand(trace).rate)
    assert best(found.ranked, offloaded=True) is not None
    points = found.points()
    assert all(math.isfinite(x) and math.isfinite(y) for _, x, y, _ in points)
    assert found.winner.name in {name for name, *_ in points}
    assert found.intervals["tpot"].low < found.plan.predicted.tpot < found.intervals["tpot"].high
    assert {each.what for each in found.sensitivity} >= {"price of h100", "price of h20", "mean prompt", "load"}
    assert found.best_of == {}


def test_names_tell_candidates_apart() -> None:
    assert described(dop(2, 3, lanes=2, shard="sequence"), 2) == (
        "2 of DOP(2, 3) h100 + h20, 2 lanes, by sequence, fhbn-400g, 2048 tokens a batch"
    )
