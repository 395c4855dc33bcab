"""The event loop: what goes in comes out, Little's law, sameness by seed, and what each way to serve does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from drawn_traces import poisson
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.simulator.costs.cost_model import KvPolicy
from lamina.simulator.costs.hardware import Efficiency, load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded
from lamina.simulator.event_loop.instance import holders_of
from lamina.simulator.event_loop.results import MOST_SAMPLES, Samples, distribution, weighted_distribution
from lamina.simulator.event_loop.simulate import Slo, simulate
from lamina.simulator.steady_state.closed_form import estimate
from lamina.simulator.traces.arrivals import Arrival, Trace, all_at_once, scaled
from lamina.simulator.traces.catalogue import trace as trace_of
from lamina.simulator.traces.demand import demand

HARDWARE = load()
H100, H20 = HARDWARE.device("h100"), HARDWARE.device("h20")
LLAMA, SMALL = model("llama-3-70b"), model("llama-3-8b")
COLOCATED = Colocated(model=SMALL, device=H100)
OFFLOADED = Offloaded(
    model=LLAMA, model_device=H100, model_count=2, attention_device=H20, attention_count=4,
    link=HARDWARE.link("fhbn-400g"), lanes=2,
)  # fmt: skip
DISAGGREGATED = Disaggregated(prefill=COLOCATED, decode=COLOCATED, link=HARDWARE.link("ethernet-100g"))
SYSTEMS = [COLOCATED, replace(COLOCATED, chunked_prefill=False), OFFLOADED, DISAGGREGATED]
NARROW = replace(H100, memory=19.5e9)
"""Room for the small model and 11,000 tokens: sequences are preempted."""

traces = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 3000), st.integers(1, 60)), min_size=1, max_size=25).map(
    lambda rows: Trace("drawn", tuple(Arrival(*row) for row in sorted(rows)))
)


@settings(max_examples=60)
@given(trace=traces, system=st.sampled_from(SYSTEMS), replicas=st.integers(1, 3))
def test_every_request_and_every_token_comes_out(trace: Trace, system: Colocated, replicas: int) -> None:
    result = simulate(system, trace, replicas=min(replicas, len(trace.arrivals)))
    assert result.requests == result.finished + result.rejected == len(trace.arrivals)
    assert result.rejected == 0
    assert result.output_tokens == sum(arrival.output for arrival in trace.arrivals)
    assert result.prompt_tokens == sum(arrival.prompt for arrival in trace.arrivals)
    assert 0 <= result.ttft.p50 <= result.ttft.p90 <= result.ttft.p99
    for share in (result.model_utilisation, result.attention_utilisation, result.network_utilisation, result.slo_share):
        assert 0 <= share <= 1


def test_littles_law() -> None:
    """Sequences in decode in the mean = requests a second x seconds that each decodes."""
    trace = poisson(rate=8.0, count=50, prompt=500, output=50, seed=1)
    result = simulate(COLOCATED, trace)
    assert len(result.samples) == result.steps <= MOST_SAMPLES
    in_decode = sum(sample.seconds * sample.decode for sample in result.samples) / result.seconds
    assert in_decode == pytest.approx(result.finished / result.seconds * result.tpot.mean * 49, rel=1e-6)


def test_preempted_sequences_lose_time_and_no_token() -> None:
    full = all_at_once(poisson(rate=1.0, count=40, prompt=900, output=300, seed=2))
    result = simulate(replace(COLOCATED, device=NARROW), full)
    assert result.preemptions > 0
    assert result.output_tokens == 40 * 300
    assert result.tbt.p99 <= result.ttft.p99
    assert result.saturated_batch > 5


def test_one_request_takes_the_steps_that_it_must() -> None:
    result = simulate(COLOCATED, Trace("one", (Arrival(5.0, 3000, 10),)))
    assert result.steps == 2 + 9  # two chunks of at most 2048, the second samples; then one token a step
    assert result.seconds == pytest.approx(result.ttft.mean + 9 * result.tpot.mean)
    assert result.mean_batch == 1
    whole = simulate(replace(COLOCATED, chunked_prefill=False), Trace("one", (Arrival(5.0, 3000, 10),)))
    assert whole.steps == 1 + 9


def test_without_prefill_only_decode_takes_time() -> None:
    trace = Trace("one", (Arrival(0.0, 3000, 10),))
    result = simulate(COLOCATED, trace, prefill=False)
    assert result.ttft.mean == 0
    assert result.seconds == pytest.approx(9 * result.tpot.mean)


def test_the_same_arguments_give_the_same_result() -> None:
    def run(seed: int) -> object:
        return simulate(OFFLOADED, trace_of("azure-conv", 150), seed=seed)

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_a_faster_link_and_a_cheaper_policy_serve_no_later() -> None:
    trace = all_at_once(trace_of("azure-conv", 120))
    slow = replace(OFFLOADED, link=HARDWARE.link("ethernet-10g"), lanes=1)
    fast = replace(OFFLOADED, lanes=1)
    seconds = [simulate(system, trace, prefill=False).seconds for system in (slow, fast)]
    assert seconds[1] < seconds[0]
    spared = replace(fast, policy=KvPolicy("half", read=0.5, held=0.5))
    assert simulate(spared, trace, prefill=False).seconds < seconds[1]


def test_replicas_share_the_load() -> None:
    trace = scaled(trace_of("azure-conv", 200), 40.0)
    one, four = simulate(COLOCATED, trace), simulate(COLOCATED, trace, replicas=4)
    assert four.price == 4 * one.price
    assert four.system == f"4 of {one.system}"
    assert four.mean_batch < one.mean_batch
    assert four.ttft.p90 <= one.ttft.p90


def test_shared_prefixes_go_through_the_prefix_tree() -> None:
    blocks = tuple(range(4))
    rows = (Arrival(0.0, 2048, 5, blocks), Arrival(20.0, 2048, 5, blocks), Arrival(40.0, 2600, 5, (*blocks, 9, 10)))
    trace = Trace("turns", rows)
    result = simulate(COLOCATED, trace)
    assert result.reused_tokens == 2047 + 2048  # the last token of a prompt is always computed
    assert simulate(COLOCATED, trace, prefix_cache=False).reused_tokens == 0


def test_what_never_fits_is_rejected_and_counted() -> None:
    trace = Trace("long", (Arrival(0.0, 100, 5), Arrival(0.0, 50_000, 5)))
    result = simulate(replace(COLOCATED, device=NARROW), trace)
    assert (result.finished, result.rejected) == (1, 1)
    assert result.slo_share == 0.5


def test_equal_memory_holds_as_much_however_heads_divide() -> None:
    trace = Trace("even", tuple(Arrival(0.0, 160, 160) for _ in range(120)))
    batches = {}
    for count in (3, 4, 7):
        cut = replace(OFFLOADED, attention_count=count, attention_device=replace(H20, memory=1.6e9 / count), lanes=1)
        batches[count] = simulate(cut, trace, prefill=False).saturated_batch
    assert holders_of(replace(OFFLOADED, attention_count=3)) == 3
    for count, batch in batches.items():
        assert batch == pytest.approx(batches[4], rel=0.1), count


def test_windows_let_go_and_make_room() -> None:
    trace = Trace("long", tuple(Arrival(0.0, 1600, 160) for _ in range(60)))
    small = replace(COLOCATED, device=NARROW, policy=KvPolicy("all"))
    full, windowed = (
        simulate(replace(small, policy=policy), trace, prefill=False).saturated_batch
        for policy in (KvPolicy("all"), KvPolicy("window", window=128))
    )
    assert windowed > 4 * full
    mistral = Colocated(model=model("mistral-7b"), device=replace(H100, memory=18e9))
    gemma = simulate(mistral, Trace("longer", tuple(Arrival(0.0, 12_000, 20) for _ in range(12))))
    assert gemma.finished == 12
    assert gemma.peak_batch * 12_000 > mistral.kv_tokens


@pytest.mark.parametrize(
    "system", [replace(COLOCATED, device=NARROW), replace(DISAGGREGATED, prefill=replace(COLOCATED, device=NARROW))]
)
@pytest.mark.parametrize("prompts", [(100, 500_000), (500_000,), (500_000, 100)])
def test_rejected_requests_end_a_trace_like_others(system: Colocated, prompts: tuple[int, ...]) -> None:
    trace = Trace("x", tuple(Arrival(100.0 * at, prompt, 5) for at, prompt in enumerate(prompts)))
    result = simulate(system, trace)
    assert result.finished + result.rejected == len(prompts)
    assert result.finished == prompts.count(100)


def test_a_chunk_of_one_token_is_no_decode() -> None:
    tight = replace(COLOCATED, batch_tokens=2)
    trace = all_at_once(poisson(rate=1.0, count=6, prompt=20, output=10, seed=0))
    result = simulate(tight, trace)
    assert result.saturated_tokens <= result.output_tokens
    assert (
        max(
            sample.waiting
            for sample in simulate(
                tight, all_at_once(poisson(rate=1.0, count=200, prompt=20, output=2, seed=0))
            ).samples
        )
        > 190
    )


def test_disaggregation_moves_each_prompts_kv_once() -> None:
    trace = poisson(rate=2.0, count=50, prompt=1000, output=20, seed=1)
    result = simulate(DISAGGREGATED, trace)
    assert result.link_bytes == 50 * 1000 * SMALL.kv_bytes_per_token()
    together = simulate(COLOCATED, trace)
    assert result.price == 2 * together.price
    assert result.tbt.p50 <= together.tbt.p50  # no prompt stands in the way of decode
    alone = simulate(DISAGGREGATED, trace, prefill=False)
    assert alone.link_bytes == alone.model_utilisation == 0  # the prefill tier has nothing to do
    assert alone.attention_utilisation > 0


def test_the_second_token_takes_a_step_wherever_it_is_made() -> None:
    trace = Trace("two", (Arrival(0.0, 1000, 2),))
    together, apart = simulate(COLOCATED, trace), simulate(DISAGGREGATED, trace)
    sent = DISAGGREGATED.transfer_bytes(1000) / DISAGGREGATED.wire + DISAGGREGATED.link.round_trip
    assert apart.seconds == pytest.approx(together.seconds + sent)
    assert apart.ttft == together.ttft
    assert apart.tbt.p50 == pytest.approx(together.tbt.p50 + sent)


def test_slo_counts_those_who_met_it() -> None:
    trace = poisson(rate=30.0, count=100, prompt=800, output=30, seed=1)
    free, strict = simulate(COLOCATED, trace), simulate(COLOCATED, trace, slo=Slo(ttft=1e-9))
    assert free.slo_share == 1
    assert free.goodput == pytest.approx(100 / free.seconds)
    assert strict.slo_share == strict.goodput == 0


def test_progress_goes_up_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    trace = trace_of("azure-code", 120)
    simulate(COLOCATED, trace, progress=lambda what, done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (120, 120)


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert distribution([]) == distribution([0.0])
    values = distribution(float(number) for number in range(1, 101))
    assert (values.mean, values.p50, values.p90, values.p99) == (50.5, 50, 90, 99)
    weighted = weighted_distribution(Counter({1.0: 98, 5.0: 2}))
    assert (weighted.p90, weighted.p99) == (1.0, 5.0)


def test_samples_stay_few_and_even() -> None:
    samples = Samples()
    first = simulate(COLOCATED, Trace("one", (Arrival(0.0, 10, 10),))).samples[0]
    for step in range(50_000):
        if samples.due():
            samples.add(replace(first, at=float(step)))
    kept = [sample.at for sample in samples.kept()]
    assert MOST_SAMPLES / 2 <= len(kept) <= MOST_SAMPLES
    assert len({later - earlier for earlier, later in pairwise(kept)}) == 1


ALIKE = Trace("alike", tuple(Arrival(float(second), 500, 20) for second in range(40)))


def test_a_wait_beside_the_steps_changes_time_to_first_token_alone() -> None:
    """0.2 s a request and 1 ms for each of 500 tokens are 0.7 s."""
    waits = Efficiency(first_token_overhead=0.2, prompt_token_overhead=1e-3)
    quick, slow = (
        Colocated(model=model("llama-3.1-8b"), device=replace(H100, efficiency=each)) for each in (Efficiency(), waits)
    )
    runs = [simulate(each, ALIKE, slo=Slo(ttft=0.5)) for each in (quick, slow)]
    assert runs[1].ttft.mean - runs[0].ttft.mean == pytest.approx(0.7)
    assert runs[1].tpot.mean == runs[0].tpot.mean
    assert [run.slo_share for run in runs] == [1.0, 0.0]
    found = [estimate(each, 1, demand(ALIKE), Slo(ttft=5.0)) for each in (quick, slow)]
    assert found[1].ttft - found[0].ttft == pytest.approx(0.7)
    assert found[1].ttft == pytest.approx(runs[1].ttft.mean, rel=0.02)
