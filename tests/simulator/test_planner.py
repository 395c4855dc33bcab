"""The planner: who is a candidate, the ranking by formula, the search by the event loop, and the reasons."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from drawn_traces import poisson
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import BIG, EPYC, H20, H100, SLO, SMALL, STEADY, dop, there_are, together
from simulate.regret import Case, regret

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import KvPolicy
from lamina.simulator.costs.hardware import Device, Link
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System, changed, price
from lamina.simulator.event_loop.results import ATTAINMENT
from lamina.simulator.event_loop.simulate import Slo, simulate
from lamina.simulator.planning import event_runs, planner
from lamina.simulator.planning.candidates import Candidate, candidates
from lamina.simulator.planning.event_runs import EventRuns, settled
from lamina.simulator.planning.planner import Ranked, cheaper, described, limited, mixes, rank, surer
from lamina.simulator.planning.reasons import answer
from lamina.simulator.traces.arrivals import Arrival, Trace, head
from lamina.simulator.traces.catalogue import at_rate
from lamina.simulator.traces.catalogue import trace as trace_of
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


@pytest.fixture(scope="module")
def thousand() -> tuple[list[Ranked], list[tuple[int, int]]]:
    """All candidates of an inventory, ranked, and the progress that was told."""
    every = candidates(BIG, there_are((H100, 4), (H20, 4)), budget=45.0)
    told: list[tuple[int, int]] = []
    found = rank(every, STEADY, SLO, progress=lambda what, done, total: told.append((done, total)))
    assert len(found) == len(every)
    return found, told


def test_a_thousand_candidates_are_ranked_with_progress(thousand: tuple[list[Ranked], list[tuple[int, int]]]) -> None:
    found, told = thousand
    assert len(found) == len({each.name for each in found})
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


def test_mixes_are_of_different_devices_and_the_best_of_each(
    thousand: tuple[list[Ranked], list[tuple[int, int]]],
) -> None:
    found = mixes(thousand[0])
    assert found[0] == thousand[0][0]
    assert {type(each.candidate.system) for each in found} == {Colocated, Disaggregated, Offloaded}
    assert len({(type(each.candidate.system), each.candidate.system.devices) for each in found}) == len(found)


def test_the_answer_has_both_sides_of_the_limit() -> None:
    slo, few = Slo(1.0, 0.05), demand(head(trace_of("azure-conv"), 4000))
    asked = few.at_rate(12.0)
    found = rank([Candidate(system, 1) for system in (together(4), together(8))], asked, slo)
    below = cheaper(found, asked, slo)
    assert [each.candidate.system for each in below] == [together(4)]
    assert below[0].share == pytest.approx(found[1].estimate.almost)
    said = answer(found, asked, slo, below=below)
    assert said[0].startswith("Take 8x h100 co-located, 2048 tokens a batch: $88.48 an hour, ")
    assert (
        f"With {below[0].share:.0%} in time: 4x h100 co-located, 2048 tokens a batch, $44.24 an hour, 50% less." in said
    )
    asked = few.at_rate(10.0)
    found = rank([each.candidate for each in found], asked, slo)
    assert not cheaper(found, asked, slo)
    above = surer(found, asked, slo)
    assert above is not None
    assert above.share > 0.99 > found[0].share
    said = answer(found, asked, slo, above=above)
    assert "With 100% in time: 8x h100 co-located, 2048 tokens a batch, $88.48 an hour, 100% more." in said


# Checked by the event loop

BUSY = poisson(4.0, 300, 500, 60, seed=1)
TIE = 0.03
"""What times of arrival within a step may make of equal plans."""


def ranked_at(*systems: System, rate: float = 4.0, most: int = 4) -> list[Ranked]:
    return rank([Candidate(system, most) for system in systems], demand(BUSY).at_rate(rate), SLO)


def runs(trace: Trace = BUSY, rate: float = 4.0) -> EventRuns:
    return EventRuns(trace, demand(trace).at_rate(rate), SLO, True, 0)


def shares(monkeypatch: pytest.MonkeyPatch, by_replicas: dict[int, float]) -> list[int]:
    """A run has so much in time, by replicas. Returns the replicas of the runs."""
    ran: list[int] = []

    def simulated(system: System, trace: Trace, *, replicas: int, **more: object) -> Any:
        ran.append(replicas)
        return SimpleNamespace(slo_share=by_replicas[replicas], finished=100, seconds=25.0, mostly_full=False)

    monkeypatch.setattr(event_runs, "simulate", simulated)
    return ran


def test_the_best_by_a_coarse_look_are_looked_at_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "CLOSER", 2)
    found = ranked_at(*(replace(together(4), batch_tokens=512 + 64 * n) for n in range(5)), together(8))
    assert [each.closely for each in found] == [True] * 2 + [False] * 4


def test_a_run_confirms_what_is_first() -> None:
    every = ranked_at(together(4), together(8))
    found = settled(every, runs())
    assert [each.result is not None for each in found] == [True, False]
    assert found[0].serves
    assert found[0].rate == 4.0
    assert found[0].result == simulate(limited(every[0]), at_rate(BUSY, 4.0), slo=SLO)
    assert abs(found[0].share - found[0].estimate.share) <= planner.MARGIN


def test_only_what_is_near_its_limit_is_run() -> None:
    (one,) = ranked_at(together(4))
    loop = runs()
    for share, almost, sure in ((0.99, 0.5, True), (0.91, 0.5, False), (0.99, 0.89, False)):
        near = replace(one, estimate=replace(one.estimate, replicas=2, share=share, almost=almost))
        assert loop.sure(near) is sure
        assert (loop.checked([near])[0].result is None) is sure
    assert not loop.sure(replace(one, closely=False))


def test_a_replica_fewer_is_tried_where_it_may_do(monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = ranked_at(together(4))
    near = replace(one, estimate=replace(one.estimate, replicas=2, price=2 * one.estimate.price, almost=0.89))
    assert near.hoped.serves
    assert near.hoped.estimate.price == one.estimate.price
    for enough, expected in ((0.905, [1]), (0.895, [1, 2])):
        ran = shares(monkeypatch, {1: enough, 2: 0.99})
        found = runs().run(near)
        assert ran == expected
        assert found.serves
        assert found.estimate.replicas == expected[-1]
        assert found.estimate.price == pytest.approx(expected[-1] * one.estimate.price)


def test_a_replica_more_is_run_where_the_replay_has_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = ranked_at(together(4))
    for enough, expected in ((0.95, [1, 2]), (0.6, [1, 2])):
        ran = shares(monkeypatch, {1: 0.89, 2: enough, 3: 0.95})
        assert runs().run(one).serves is (enough > ATTAINMENT)
        assert ran == expected


def test_as_much_as_can_be_is_a_rate_that_keeps_the_slo() -> None:
    (found,) = ranked_at(together(4), rate=math.inf)
    for wrong in (0.6, 1.0, 1.05):
        start = replace(found, estimate=replace(found.estimate, taken=found.estimate.taken * wrong))
        checked = runs(rate=math.inf).run(start)
        assert checked.share >= ATTAINMENT
        assert checked.rate > 0.59 * found.estimate.taken


def test_shared_prefixes_are_left_to_the_real_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replay computes every prompt, and asks for replicas that are not needed."""
    prefix = tuple(range(8))
    named = tuple(replace(arrival, prompt=4200, blocks=prefix) for arrival in BUSY.arrivals)
    trace = replace(BUSY, arrivals=named)
    asked = demand(trace).at_rate(12.0)
    every = rank([Candidate(together(4), 4), Candidate(together(8), 2)], asked, SLO)
    loop = EventRuns(trace, asked, SLO, True, 0)
    assert not any(loop.sure(each) for each in every)
    monkeypatch.setattr(event_runs, "CHOSEN", 1)
    found = loop.searched(every)
    assert [each.result is not None for each in found] == [True, False]
    assert found[0].serves
    assert found[0].estimate.replicas < every[0].estimate.replicas


# The answer


def test_offloading_pays_where_memory_is_short_and_prompts_are_elsewhere() -> None:
    """Lamina's setting, decode alone and full: more for a dollar, and no more than a roofline can give."""
    slo = Slo(tpot=0.1)
    found = ranked(
        together(4), dop(2, 3, lanes=2), dop(2, 4, lanes=2), asked=STEADY.at_rate(math.inf), slo=slo, prefill=False
    )
    assert found[0].candidate.offloaded
    said = answer(found, STEADY.at_rate(math.inf), slo, prefill=False)
    gain = found[0].goodput_per_dollar / next(x for x in found if not x.candidate.offloaded).goodput_per_dollar
    assert 1.0 < gain < 1.5
    assert any(
        f"{gain:.2f}x the requests for a dollar of the best without offloading, 4 of 4x h100" in each for each in said
    )


def test_it_is_said_where_offloading_does_not_pay() -> None:
    slow = Link("slow", 1e9, 1e-3)
    found = ranked(together(4), dop(2, 4, slow))
    assert not found[0].candidate.offloaded
    said = " ".join(answer(found, STEADY, SLO))
    assert "Offloading attention does not pay here" in said
    without = " ".join(answer(ranked(together(4), together(8)), STEADY, SLO))
    assert "no system with it fits" in without
    assert len(answer(ranked(together(4)), STEADY, SLO)) == 1  # there is nothing to compare with
    hopeless = ranked(together(4), dop(2, 4, Link("modem", 7000.0, 0.1)))
    assert "link 'modem' is too slow" in " ".join(answer(hopeless, STEADY, SLO))


def test_a_winner_that_serves_nothing_in_time_is_compared_all_the_same() -> None:
    """Where the event loop says so of all that it checked."""
    found = ranked(together(4), dop(2, 4))
    whole, split = (next(each for each in found if each.candidate.offloaded is kind) for kind in (False, True))
    late = simulate(together(4), Trace("few", (Arrival(0.0, 10, 3),)), slo=Slo(tpot=1e-9))
    said = " ".join(answer([replace(whole, result=late, rate=4.0), split], STEADY, SLO))
    assert "serves some requests within the SLO, where this one serves none" in said


def test_names_tell_candidates_apart() -> None:
    assert described(dop(2, 3, lanes=2, shard="sequence"), 2) == (
        "2 of DOP(2, 3) h100 + h20, 2 lanes, by sequence, fhbn-400g, 2048 tokens a batch"
    )


# Candidates


def test_hybrids_are_candidates() -> None:
    found = [each.system for each in candidates(BIG, there_are((H100, 4), (H20, 2)))]
    offloaded = [each for each in found if isinstance(each, Offloaded)]
    assert any(each.local_share for each in offloaded)
    assert {(each.lanes, each.model_replicas) for each in offloaded} == {(1, 1), (2, 1), (3, 1), (3, 2)}
    both = [each for each in found if isinstance(each, Disaggregated) and isinstance(each.decode, Offloaded)]
    assert both
    assert all(sum(count for device, count in each.devices if device == H100) <= 4 for each in both)


# Better devices


@settings(max_examples=3)
@given(
    better=st.sampled_from(["price", "bandwidth", "memory", "flops"]),
    which=st.sampled_from(["h100", "h20"]),
    factor=st.floats(1.1, 3.0),
    rate=st.sampled_from([2.0, 5.0]),
)
def test_a_better_device_never_makes_the_best_plan_worse(better: str, which: str, factor: float, rate: float) -> None:
    """Within a tie: requests in time for a dollar, of the best plan."""
    trace = head(trace_of("azure-conv"), 150)
    asked = demand(trace).at_rate(rate)

    def best(h100: Device, h20: Device) -> tuple[bool, float]:
        split = replace(dop(4, 1), model_device=h100, attention_device=h20)
        systems = (together(4, h100), together(8, h20), split, replace(split, local_share=0.8))
        ranked = rank([Candidate(each, 1) for each in systems], asked, SLO)
        found = settled(ranked, EventRuns(trace, asked, SLO, True, 0))[0]
        return found.serves, found.goodput_per_dollar

    def improved(device: Device) -> Device:
        if device.name != which:
            return device
        return replace(device, **{better: getattr(device, better) * (1 / factor if better == "price" else factor)})

    before, after = best(H100, H20), best(improved(H100), improved(H20))
    assert after[0] >= before[0]
    assert after[1] >= before[1] * (1 - TIE)


SMALL_CASE = Case("llama-3-8b", (("l4", 2),), "azure-code", 0.2, 0.1, 4.0, ("ethernet-25g",), count=120)


def test_little_is_lost_by_looking_at_few() -> None:
    found = regret(SMALL_CASE, 120)
    assert found.lost <= 0.03
    assert found.simulated >= 1
    assert found.chosen.name in str(found)
