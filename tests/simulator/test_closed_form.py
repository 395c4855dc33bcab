"""The closed form: what a trace asks for, how long is waited, and what a system yields for it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import FHBN, H100, SLO, STEADY, dop, together

from lamina.simulator.costs.cost_model import KvPolicy, Load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Disaggregated, System, changed
from lamina.simulator.event_loop.results import ATTAINMENT
from lamina.simulator.event_loop.simulate import Slo, simulate
from lamina.simulator.planning.candidates import Candidate
from lamina.simulator.planning.planner import Ranked, limited
from lamina.simulator.steady_state.closed_form import estimate, sequences
from lamina.simulator.steady_state.service import FOREVER, Service, held, largest
from lamina.simulator.traces import catalogue as traces
from lamina.simulator.traces.arrivals import Arrival, Trace
from lamina.simulator.traces.catalogue import at_rate, windows
from lamina.simulator.traces.demand import demand, left_of_outputs, streams


@cache
def conversation() -> Trace:
    return traces.trace("azure-conv", 1200, seed=3)


# What is asked for


def test_a_sequence_is_met_for_as_long_as_it_decodes() -> None:
    trace = Trace("two", (Arrival(0.0, 100, 10), Arrival(1.0, 1000, 90), Arrival(4.0, 100, 20)))
    found = demand(trace)
    assert found.context == pytest.approx((10 * 105 + 90 * 1045 + 20 * 110) / 120)
    assert (found.prompt, found.output, found.longest) == (400, 40, 1090)
    assert found.rate == pytest.approx(2 / 4)
    assert found.sample.at.tolist() == pytest.approx([0, 0.5, 2])  # in mean gaps
    assert demand(Trace("alike", (Arrival(0.0, 64, 8),) * 3)).context == 64 + 8 / 2
    assert demand(Trace("at once", (Arrival(0.0, 64, 8),) * 3)).rate == math.inf


def test_what_an_instance_gets_of_a_sample() -> None:
    sample = demand(conversation()).sample
    (whole,) = streams(sample, 1, 2000)
    assert whole.at.tolist() == pytest.approx(sample.at.tolist())
    (every_third,) = streams(sample, 3, 400)
    assert every_third.prompts.tolist() == sample.prompts[::3].tolist()
    assert [len(each) for each in streams(sample, 12, 300)] == [100] * 3
    (part,) = streams(sample, 1, 256)
    assert len(part) == 256
    assert part.at[-1] == pytest.approx(255)  # at the same rate
    assert (np.diff(part.at) >= 0).all()


def test_what_is_left_of_outputs_is_met_half_way() -> None:
    left = left_of_outputs(demand(Trace("alike", tuple(Arrival(float(n), 10, 101) for n in range(50)))).sample)
    assert np.sort(left).tolist() == pytest.approx([1 + int(100 * (n + 0.5) / 64) for n in range(64)], abs=1)
    lone = demand(Trace("one token", (Arrival(0.0, 10, 1),) * 3))
    assert not len(left_of_outputs(lone.sample))


@given(st.floats(0.1, 10))
def test_longer_prompts_lengthen_the_context_alone(factor: float) -> None:
    found = demand(Trace("two", (Arrival(0.0, 100, 10), Arrival(1.0, 900, 70), Arrival(4.0, 200, 20))))
    longer = found.with_prompts(factor)
    exact = sum(o * (factor * p + o / 2) for p, o in ((100, 10), (900, 70), (200, 20))) / 100
    assert longer.context == pytest.approx(exact)
    assert longer.output == found.output


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_largest_that_passes_is_found(limit: int, most: int) -> None:
    assert largest(most, lambda batch: batch <= limit) == min(limit, most)


# The closed form


def test_the_papers_batch_of_800() -> None:
    """Lamina's figure 11: Llama-3-70B reaches batch 800 at DOP(2, 4); 90 % of the memory, 1260 tokens in the mean."""
    asked = replace(STEADY, context=1260.0 - 16)  # half a page is lost beside them
    assert sequences(dop(2, 4), asked) == pytest.approx(837, abs=1)


def test_what_a_policy_spares_makes_room() -> None:
    half = dop(2, 4, policy=KvPolicy("half", 1.0, 0.5))
    assert sequences(half, STEADY) == pytest.approx(2 * sequences(dop(2, 4), STEADY), abs=1)
    window = dop(2, 4, policy=KvPolicy("window", 1.0, 1.0, 100))
    assert sequences(window, STEADY) == 2048  # tokens a batch


def test_littles_law_holds() -> None:
    found = estimate(together(4), 1, STEADY, SLO)
    assert found.taken == 4.0
    assert found.serves
    assert found.batch == pytest.approx(found.taken * STEADY.output * found.tpot, rel=0.1)  # long ones are slower
    assert found.tokens_per_second == pytest.approx(found.taken * STEADY.output)


def test_a_lone_sequence_takes_the_systems_own_step() -> None:
    found = estimate(together(4), 1, STEADY.at_rate(1e-6), SLO, prefill=False)
    assert found.tpot == pytest.approx(together(4).step(Load(1, STEADY.context)).seconds, rel=1e-3)


def test_more_than_can_be_taken_goes_elsewhere() -> None:
    flooded = estimate(together(4), 1, STEADY.at_rate(1e4), SLO)
    assert not flooded.serves
    assert flooded.taken == pytest.approx(flooded.capacity)
    assert flooded.share >= ATTAINMENT
    assert estimate(together(4), 3, STEADY.at_rate(1e4), SLO).taken == pytest.approx(3 * flooded.taken)
    enough = estimate(together(4), 100, STEADY.at_rate(2.5 * flooded.taken), SLO)
    assert (enough.replicas, enough.serves) == (3, True)
    unbounded = estimate(together(4), 5, STEADY.at_rate(math.inf), SLO)
    assert (unbounded.replicas, unbounded.serves) == (5, True)


def test_a_load_that_is_exactly_what_passes_is_taken() -> None:
    """Where there is nothing to spare no rate is left to be tried, which ended the plan."""
    whole = estimate(together(4), 1, STEADY.at_rate(math.inf), Slo(tpot=0.1), prefill=False)
    one = estimate(together(4), 2, STEADY.at_rate(whole.capacity), Slo(tpot=0.1), prefill=False)
    assert one.serves
    assert one.taken == whole.capacity
    assert one.capacity >= whole.capacity


def test_what_does_not_fit_takes_nothing() -> None:
    for system in (together(1), dop(1, 4)):  # 137 GB of weights on 80 GB
        assert estimate(system, 1, STEADY, SLO).goodput == 0
    long = replace(STEADY, longest=10**7)
    assert estimate(together(4), 1, long, SLO).goodput == 0
    hasty = estimate(together(4), 1, STEADY, Slo(tpot=0.001))
    assert hasty.goodput == 0
    assert hasty.tpot > 0.001


def test_a_quick_look_is_like_a_thorough_one() -> None:
    asked = demand(conversation())
    for system in (together(4), dop(2, 4)):
        for rate in (1.0, math.inf):
            quick, whole = (estimate(system, 2, asked.at_rate(rate), SLO, fine=fine) for fine in (False, True))
            assert quick.goodput == pytest.approx(whole.goodput, rel=0.25)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 20_000), st.integers(1, 3000)), min_size=1, max_size=8),
    bandwidth=st.floats(1e6, 1e15),
    flops=st.floats(1e9, 1e17),
    memory=st.floats(4e10, 1e13),
    tokens=st.integers(1, 10_000),
    slo=st.builds(Slo, ttft=st.none() | st.floats(1e-3, 1e3), tpot=st.none() | st.floats(1e-4, 10.0)),
    rate=st.floats(1e-6, 1e6) | st.just(math.inf),
    prefill=st.booleans(),
    kind=st.sampled_from(["together", "apart", "offloaded"]),
)
def test_whatever_is_asked_there_is_an_estimate(
    lengths: list[tuple[float, int, int]], bandwidth: float, flops: float, memory: float, tokens: int, slo: Slo,
    rate: float, prefill: bool, kind: str,
) -> None:  # fmt: skip
    at, arrivals = 0.0, []
    for gap, prompt, output in lengths * 40:  # enough of them to be cut into parts
        at += gap
        arrivals.append(Arrival(at, prompt, output))
    device = replace(H100, bandwidth=bandwidth, flops=flops, memory=memory)
    whole = replace(together(4, device), batch_tokens=tokens)
    systems: dict[str, System] = {
        "together": whole,
        "apart": Disaggregated(prefill=whole, decode=whole, link=FHBN),
        "offloaded": replace(dop(4, 3, lanes=2), model_device=device, batch_tokens=tokens),
    }
    asked = demand(Trace("any", tuple(arrivals))).at_rate(rate)
    found = estimate(systems[kind], 3, asked, slo, prefill)
    assert 0 <= found.taken <= min(asked.rate, found.capacity) * (1 + 1e-9)
    assert 0 <= found.share <= 1
    assert found.goodput == 0 or (0 < found.tpot < math.inf and 0 <= found.ttft < math.inf)
    assert 0 <= found.batch <= found.fits * (1 + 1e-6)


# Beside what is exact


def bursts(requests: int = 600) -> Trace:
    """Many at once, then none for long: gaps of which one in twelve is long."""
    at, arrivals = 0.0, []
    for number in range(requests):
        at += 30.0 if number % 12 == 0 else 0.05
        arrivals.append(Arrival(at, 200 + 613 * (number * 7 % 16), 2 + 37 * (number * 5 % 11)))
    return Trace("bursts", tuple(arrivals))


KINDS: dict[str, System] = {
    "together": together(4),
    "apart": Disaggregated(prefill=replace(together(4), chunked_prefill=False), decode=together(4), link=FHBN),
    "offloaded": dop(4, 1),
    "lanes": dop(2, 4, lanes=2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pick", ["conversation", "bursts"])
def test_it_is_close_to_the_event_loop(kind: str, pick: str) -> None:
    """At half of what passes, and at a tenth: share within 5 points, TPOT and TTFT within 15 %."""
    whole = {"conversation": conversation, "bursts": bursts}[pick]()
    trace, system, slo = windows(whole, 600), KINDS[kind], Slo(2.0, 0.1)
    service = Service(system, demand(trace), slo, prefill=True)
    places = largest(sequences(system, demand(trace)), lambda batch: service.pace(batch) <= 0.1)
    for part in (0.1, 0.5):
        rate = part * service.most(places)
        found = service.at(rate, places, 1, 2000)
        limit = Ranked(Candidate(system, 1), replace(estimate(system, 1, demand(trace), slo), most=places))
        exact = simulate(limited(limit), at_rate(trace, rate), slo=slo)
        assert found.share == pytest.approx(exact.slo_share, abs=0.05)
        assert found.tpot == pytest.approx(exact.tpot.mean, rel=0.15)
        assert found.ttft == pytest.approx(exact.ttft.mean, rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_at_low_rates_each_request_meets_an_empty_instance(kind: str) -> None:
    """TPOT is then the step of one sequence with the request's own context; where prompts are elsewhere, and a
    request's share of its way over the link."""
    for trace in (conversation(), bursts()):
        asked, system = demand(trace), KINDS[kind]
        decode = system.decode if isinstance(system, Disaggregated) else system
        expected = []
        for prompt, output in zip(asked.sample.prompts.tolist(), asked.sample.outputs.tolist(), strict=True):
            if output > 1:
                seconds = decode.step(Load(1, prompt + output / 2)).seconds
                if isinstance(system, Disaggregated):
                    way = system.link.round_trip + system.transfer_bytes(prompt) / system.wire
                    seconds += way / (output - 1)
                expected.append(seconds)
        found = estimate(system, 1, asked.at_rate(1e-9), Slo())
        assert found.tpot == pytest.approx(sum(expected) / len(expected), rel=0.01)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)), pick=st.booleans(), low=st.floats(1e-9, 1.0), factor=st.floats(1.1, 30.0),
    prefill=st.booleans(), places=st.integers(1, 60),
)  # fmt: skip
def test_a_token_never_takes_less_time_under_more_load(
    kind: str, pick: bool, low: float, factor: float, prefill: bool, places: int
) -> None:
    """But for what chance and whole batches make of 600 requests."""
    service = Service(KINDS[kind], demand(conversation() if pick else bursts()), Slo(), prefill)
    places = largest(places, lambda batch: service.pace(batch) < FOREVER)
    most = service.most(places)
    before, after = (service.at(most * low * more / 30, places, 1, 600) for more in (1.0, factor))
    assert after.tpot >= before.tpot * (1 - 1e-2)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)), pick=st.booleans(), ttft=st.floats(0.3, 8.0), tpot=st.floats(0.05, 0.2),
    rate=st.sampled_from([0.5, 4.0, math.inf]),
)  # fmt: skip
def test_what_counts_changes_smoothly_with_the_slo(
    kind: str, pick: bool, ttft: float, tpot: float, rate: float
) -> None:
    """A hundredth more time neither halves nor doubles what a system that comes close to the SLO is good for."""
    asked = demand(conversation() if pick else bursts()).at_rate(rate)
    slos = [Slo(ttft * factor, tpot * factor) for factor in (1.0, 1.01)]
    before, after = (estimate(KINDS[kind], 1, asked, slo) for slo in slos)
    if before.share > 0.9 and before.goodput > 0.1:
        assert 0.7 * before.goodput <= after.goodput <= 1.4 * before.goodput


def test_bursts_are_served_where_there_is_time_for_them() -> None:
    """A system whose mean load is low serves bursts of twelve in time, which a formula of means refused."""
    asked = demand(bursts())
    assert estimate(together(8), 1, asked, Slo(4.0, 0.1)).serves
    assert not estimate(together(8), 1, asked, Slo(0.3, 0.1)).serves
    tight = estimate(together(8), 1, asked, Slo(ttft=0.05, tpot=0.005))
    assert tight.goodput == 0
    assert 0.005 < tight.tpot < 0.05  # with one sequence at a time
    assert 0.05 < tight.ttft < 5


def test_prices_alone_are_not_computed_again() -> None:
    asked = demand(conversation())
    cheaper = changed(together(4), lambda device: replace(device, price=device.price / 2))
    first, second = (estimate(system, 3, asked, SLO) for system in (together(4), cheaper))
    assert second == replace(first, price=first.price / 2)


def test_sliding_windows_hold_no_more_than_they_read() -> None:
    gemma = replace(together(4), model=model("gemma-2-27b"))
    windows_of = {group.window for group in gemma.model.groups}
    assert windows_of == {None, 4096}
    assert held(gemma, 1000.0) == 1000
    assert held(gemma, 8192.0) == pytest.approx((8192 + 4096) / 2)  # every other layer
    assert held(replace(gemma, policy=KvPolicy("half", 1.0, 0.5)), 8192.0) == pytest.approx((8192 + 4096) / 4)
