"""The cost model: operators as papers have them, cells worked out by hand, and that nothing better is slower."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import (
    FULL,
    KvPolicy,
    Load,
    StepCost,
    all_reduce_time,
    attention_time,
    busiest_share,
    dense_time,
    exchange_time,
    kv_projection_time,
    minimum_bandwidth,
    prefill_attention_time,
)
from lamina.simulator.costs.hardware import Efficiency, load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, power, price
from lamina.simulator.event_loop.instance import holders_of

HARDWARE = load()
H100, H20, L4 = (HARDWARE.device(name) for name in ("h100", "h20", "l4"))
FHBN = HARDWARE.link("fhbn-400g")
LLAMA = model("llama-3-70b")

loads = st.one_of(
    st.builds(Load, st.integers(1, 2000), st.floats(1, 1e5)),
    st.builds(
        Load,
        decode=st.integers(0, 2000),
        context=st.floats(1, 1e5),
        prefill_tokens=st.integers(1, 8192),
        prefill_pairs=st.floats(0, 1e8),
        prefill_keys=st.floats(0, 1e6),
        prefix_tokens=st.just(1),
        prefix_pairs=st.floats(0, 1e5),
    ),
)


def offloaded(**changes: object) -> Offloaded:
    whole = Offloaded(
        model=LLAMA, model_device=H100, model_count=2, attention_device=H20, attention_count=4, link=FHBN, lanes=2
    )
    return replace(whole, **changes)


def colocated(**changes: object) -> Colocated:
    return replace(Colocated(model=LLAMA, device=H100, tensor_parallel=4), **changes)


def test_decode_of_few_is_bound_by_the_bandwidth_of_weights_and_of_many_by_flops() -> None:
    few, many = (dense_time(LLAMA, H100, 1, Load(batch, 0)) for batch in (1, 1024))
    assert few == pytest.approx(LLAMA.weights_read(1) / H100.bandwidth, rel=1e-3)
    assert many == pytest.approx(LLAMA.dense_flops(1024) / H100.flops, rel=1e-3)


def test_attention_reads_each_sequences_own_kv() -> None:
    load = Load(20, 8192)
    assert attention_time(LLAMA, H20, load) == pytest.approx(20 * 8192 * 327_680 / 4e12)
    assert attention_time(LLAMA, H20, load, busiest=0.25) == pytest.approx(20 * 8192 * 327_680 / 16e12)
    assert attention_time(LLAMA, H20, Load(0, 0)) == 0


def test_compute_bounds_attention_where_a_group_is_large() -> None:
    mla, load = model("deepseek-v3"), Load(8, 8192)
    seconds = attention_time(mla, H20, load)
    assert seconds == pytest.approx(8 * mla.attention_flops(8192) / H20.flops)
    assert seconds > 8 * mla.kv_bytes_read(8192) / H20.bandwidth


def test_query_heads_are_shared_where_kv_is_not() -> None:
    mla = model("deepseek-v3")
    times = [
        attention_time(mla, H20, Load(64, 8192), busiest=busiest_share(mla, count), queries=1 / count)
        for count in (1, 2, 4, 8)
    ]
    assert times[1] == pytest.approx(times[0] / 2)
    assert times[3] >= 64 * mla.kv_bytes_read(8192) / H20.bandwidth  # each still reads all of it


def test_a_prefix_elsewhere_is_read_once_and_computed_for_each_token() -> None:
    tail = Load(0, 0, 2048, 2048 * 1024, 2048, prefix_tokens=2048, prefix_pairs=2048 * 100_000)
    seconds = attention_time(LLAMA, H20, tail)
    assert seconds == pytest.approx(2048 * LLAMA.attention_flops(100_000) / H20.flops)
    assert exchange_time(LLAMA, FHBN, 1e9, tail).nbytes == 2048 * LLAMA.exchange_bytes()
    alone = offloaded().step(replace(tail, prefix_tokens=0, prefix_pairs=0)).seconds
    assert offloaded().step(tail).seconds > 2 * alone
    # Where everything lies together, its pairs are like the others.
    whole = replace(tail, prefill_pairs=tail.prefill_pairs + tail.prefix_pairs, prefix_tokens=0, prefix_pairs=0)
    assert colocated().step(tail) == colocated().step(whole)


def test_policies_read_and_hold_their_share() -> None:
    half = KvPolicy("half", read=0.5, held=0.25)
    whole, less = (attention_time(LLAMA, H20, Load(8, 4096), policy) for policy in (FULL, half))
    assert less == pytest.approx(whole / 2)
    assert colocated(policy=half).kv_tokens == pytest.approx(4 * colocated().kv_tokens, rel=1e-4)
    windowed = KvPolicy("window", window=100)
    assert (windowed.tokens_read(5000), windowed.tokens_read(50), windowed.tokens_held(5000)) == (100, 50, 100)


def test_more_devices_than_kv_heads_spare_nothing() -> None:
    assert [busiest_share(LLAMA, count) for count in (1, 2, 3, 8, 16)] == [1, 0.5, 3 / 8, 1 / 8, 1 / 8]


def test_all_reduce_is_a_ring() -> None:
    assert all_reduce_time(H100, 4, 1e9) == pytest.approx(1.5 * 1e9 / 4.5e11)
    with pytest.raises(InvalidRequest, match="'l4' has no interconnect"):
        all_reduce_time(replace(L4, interconnect=0.0), 2, 1.0)


def test_overheads_and_efficiencies_come_on_top() -> None:
    slow = replace(
        H100, efficiency=Efficiency(dense=((1.0, 0.5),), layer_overhead=1e-5, step_overhead=1e-3, row_overhead=1e-6)
    )
    best, real = (dense_time(LLAMA, device, 1, Load(4, 0)) for device in (H100, slow))
    assert real == pytest.approx(best / 0.5 + 80 * 1e-5 + 1e-3 + 4e-6)


def test_prefill_attention_computes_its_pairs_or_reads_its_keys() -> None:
    assert prefill_attention_time(LLAMA, H100, 1, Load(4, 100)) == 0
    pairs = 2048 * 2049 / 2
    seconds = prefill_attention_time(LLAMA, H100, 2, Load(0, 0, 2048, pairs, 2048))
    assert seconds == pytest.approx(4 * 8192 * 80 * pairs / 9.89e14 / 2)
    few = prefill_attention_time(LLAMA, H100, 4, Load(0, 0, 2, 200_003, 100_002))
    assert few == pytest.approx(100_002 * 327_680 / 3.35e12 / 4)


def test_prompts_see_no_more_than_a_window_and_are_not_absorbed() -> None:
    mistral, mla = model("mistral-7b"), model("deepseek-v3")
    pairs = 32768 * 32769 / 2
    seconds = prefill_attention_time(mistral, H100, 1, Load(0, 0, 32768, pairs, 32768))
    assert seconds == pytest.approx(32768 * mistral.attention_flops(4096) / H100.flops)
    assert mla.prefill_flops(1) == 61 * 2 * 128 * (128 + 64 + 128)
    assert LLAMA.prefill_flops(100) == LLAMA.attention_flops(100)


def test_what_crosses_is_two_and_two_over_g_times_the_width() -> None:
    exchange = exchange_time(LLAMA, FHBN, 2 * 45.7e9, Load(300, 4096))
    assert exchange.nbytes == (2 + 2 / 8) * 2 * 8192 * 300 * 80
    assert exchange.keys == pytest.approx(300 * 327_680 / (2 * 45.7e9))
    assert exchange.seconds == pytest.approx(80 * 33e-6 + exchange.nbytes / (2 * 45.7e9))
    stored = exchange_time(LLAMA, FHBN, 1e9, Load(0, 0, 512))  # a prompt's KV, for which nobody waits
    assert (stored.nbytes, stored.seconds) == (512 * 327_680, 0)


def test_ranges_are_asked_with_every_query() -> None:
    load = Load(100, 8000)
    by_heads, by_ranges = (offloaded(shard=shard, attention_count=8).step(load) for shard in ("heads", "sequence"))
    width = 2 * 2 * 8192 * 80  # q and the partial output
    assert by_ranges.link_bytes - by_heads.link_bytes == pytest.approx(7 * 100 * width)


def test_workers_on_one_machine_cost_more_a_layer() -> None:
    slow = replace(FHBN, worker_time=1e-3, row_time=1e-4)
    one, two = (exchange_time(LLAMA, slow, 1e9, Load(10, 100), workers=workers).waiting for workers in (1, 2))
    assert two - one == pytest.approx(80 * (1e-3 + 10 * 1e-4))


def test_no_connection_is_faster_than_either_ends_network_card() -> None:
    cards = replace(H20, network=1e9)
    assert offloaded(attention_device=cards).wire == 2e9
    assert offloaded(attention_device=replace(H20, network=0.0)).wire == 2 * 45.7e9


def test_overlap_hides_the_projection_of_k_and_v_and_their_way() -> None:
    load = Load(30, 4096)
    lane = offloaded(lanes=1).lane(load, query_first=True)
    exact = kv_projection_time(LLAMA, H100, 2, load) + 30 * 327_680 / (2 * 45.7e9)
    assert lane.hidden == pytest.approx(exact)
    assert offloaded(lanes=1).lane(load).hidden == 0


def test_q_goes_first_only_where_the_engine_would_keep_that() -> None:
    load, free = Load(30, 4096), offloaded(lanes=1)
    gain = free.lane(load).alone - free.lane(load, query_first=True).alone
    assert gain > 0
    for more, kept in ((0.5, True), (1.5, False)):
        system = replace(free, link=replace(FHBN, query_first_time=more * gain / 80))
        together = replace(system, overlap=False)
        assert together.step(load).seconds - system.step(load).seconds == pytest.approx(kept * 0.5 * gain)
        assert system.step(load).seconds == pytest.approx(system.lane(load, kept).alone)


@pytest.mark.parametrize("batch", [1, 287, 300, 2000])
def test_the_projections_of_k_and_v_are_a_part_of_the_dense_layers(batch: int) -> None:
    load, projections = Load(batch, 100), LLAMA.kv_projection_flops(1) / 2
    by_bytes = projections * LLAMA.weight_bytes / LLAMA.parameters / H100.bandwidth
    by_flops = 2 * batch * projections / H100.flops
    seconds = kv_projection_time(LLAMA, H100, 1, load)
    assert min(by_bytes, by_flops) * (1 - 1e-9) <= seconds <= max(by_bytes, by_flops) * (1 + 1e-9)
    assert kv_projection_time(LLAMA, H100, 1, Load(0, 0)) == 0


def test_lanes_count_no_sequence_that_is_not_there() -> None:
    for batch in (1, 3, 5, 100):
        assert offloaded(lanes=4).step(Load(batch, 1000)).link_bytes == batch * LLAMA.exchange_bytes()


def test_minimum_bandwidth_is_the_papers_formula() -> None:
    assert minimum_bandwidth(LLAMA, 300, 41e-3, 25.2e-3) == pytest.approx(884.736e6 / (0.2 * 66.2e-3))


def test_two_lanes_read_the_weights_twice_and_hide_attention() -> None:
    load = Load(200, 2000)
    one, two = offloaded(lanes=1).step(load), offloaded().step(load)
    assert two.model == pytest.approx(2 * dense_time(LLAMA, H100, 2, Load(100, 2000)))
    assert two.seconds == pytest.approx(two.model)  # the model is busy all the time
    assert two.attention == pytest.approx(one.attention)
    assert one.seconds > one.model + one.attention


def test_replicas_of_the_model_share_the_lanes() -> None:
    load = Load(300, 1000)
    few, more = (offloaded(lanes=3, model_replicas=replicas).step(load) for replicas in (1, 2))
    assert more.model == pytest.approx(few.model / 2)
    assert more.seconds == pytest.approx(few.seconds * 2 / 3, rel=0.5)
    assert price(offloaded(lanes=3, model_replicas=2)) == pytest.approx(4 * 11.06 + 4 * 4.63)


@settings(max_examples=200)
@given(
    load=loads, factor=st.floats(1.0, 16.0), field=st.sampled_from(["bandwidth", "flops", "interconnect"]),
    local_share=st.sampled_from([0.0, 0.5]), lanes=st.integers(1, 3),
)  # fmt: skip
@example(Load(575, 2308), 13.4, "bandwidth", 0.0, 2)  # FLOPs bound the dense layers, bytes k and v of them
def test_a_better_device_is_never_slower(load: Load, factor: float, field: str, local_share: float, lanes: int) -> None:
    better = replace(H100, **{field: getattr(H100, field) * factor})
    assert colocated(device=better).step(load).seconds <= colocated().step(load).seconds * (1 + 1e-12)
    split = offloaded(model_count=4, local_share=local_share, lanes=lanes)
    step = split.step(load).seconds * (1 + 1e-12)
    assert replace(split, model_device=better).step(load).seconds <= step
    better = replace(H20, **{field: getattr(H20, field) * factor})
    assert replace(split, attention_device=better).step(load).seconds <= step


@settings(max_examples=200)
@given(load=loads, factor=st.floats(1.0, 16.0), lanes=st.integers(1, 4))
def test_a_better_link_is_never_slower_and_overlap_never_hurts(load: Load, factor: float, lanes: int) -> None:
    system = offloaded(lanes=lanes)
    step = system.step(load).seconds
    faster = replace(FHBN, bandwidth=FHBN.bandwidth * factor, round_trip=FHBN.round_trip / factor)
    assert replace(system, link=faster).step(load).seconds <= step * (1 + 1e-12)
    assert step <= replace(system, overlap=False).step(load).seconds * (1 + 1e-12)


@settings(max_examples=200)
@given(load=loads, system=st.sampled_from([colocated(), offloaded(), offloaded(lanes=1), offloaded(shard="sequence")]))
def test_no_tier_is_busier_than_the_step_is_long_and_more_work_takes_longer(load: Load, system: Offloaded) -> None:
    cost = system.step(load)
    assert max(cost.model, cost.attention, cost.network) <= cost.seconds * (1 + 1e-12)
    longer = replace(load, context=load.context * 1.5)
    assert system.step(longer).seconds >= cost.seconds * (
        1 - 1e-12
    )  # the order of the sums differs, so may the last bit
    if load.decode > 1:  # two sequences keep two lanes busy, one cannot
        assert system.step(replace(load, decode=load.decode * 2)).seconds >= cost.seconds * (1 - 1e-12)


def test_capacity_is_what_memory_leaves() -> None:
    assert colocated().kv_tokens == int((4 * 80e9 * 0.9 - LLAMA.weight_bytes) / 327_680)
    assert offloaded().kv_tokens == int(4 * 96e9 * 0.9 / 327_680)
    # With more devices than KV heads, each head's KV is kept more than once.
    assert colocated(tensor_parallel=16).kv_tokens == int((16 * 80e9 * 0.9 - LLAMA.weight_bytes) / 2 / 327_680)


def test_a_model_that_does_not_fit_is_named_with_what_it_needs() -> None:
    with pytest.raises(InvalidRequest, match=r"'llama-3-70b' has 137.5 GB of weights; 1x h100 have 80.0 GB, of"):
        _ = colocated(tensor_parallel=1).kv_tokens
    with pytest.raises(InvalidRequest, match=r"2x l4 have 4[0-9.]+ GB"):
        _ = offloaded(model_device=L4).kv_tokens


def test_names_prices_and_power() -> None:
    assert offloaded().name == "DOP(2, 4) h100 + h20, 2 lanes"
    assert price(offloaded()) == pytest.approx(40.64)
    assert power(offloaded(), (1.0, 0.0)) == pytest.approx(2 * 700 + 4 * 400 * 0.3)
    unknown = replace(H20, power=0.0)
    assert power(offloaded(attention_device=unknown), (1.0, 0.0)) == 0  # not published: not guessed
    disaggregated = Disaggregated(prefill=colocated(), decode=colocated(), link=FHBN)
    assert price(disaggregated) == pytest.approx(8 * 11.06)
    assert disaggregated.transfer_bytes(1000) == 1000 * 327_680
    assert disaggregated.step(Load(10, 100)) == colocated().step(Load(10, 100)) != StepCost(0.0)


def test_uneven_heads_need_holders_of_their_own() -> None:
    assert holders_of(offloaded()) == 1
    assert holders_of(offloaded(attention_count=3)) == 3
    assert holders_of(offloaded(attention_count=3, shard="sequence")) == 1


# Cells worked out by hand, one a quantity: what each should be stands in the docstring, and is not computed here.
#
# Llama-3.1-8B: 32 layers; a layer's projections are 2 x 4096^2 + 2 x 4096 x 1024 = 41,943,040 parameters, its MLP
# 3 x 4096 x 14336 = 176,160,768; the head is 128256 x 4096 = 525,336,576; 65 norms of 4096 are 266,240.

LLAMA_8B = model("llama-3.1-8b")
ALONE = Colocated(model=LLAMA_8B, device=H100)


def test_bytes_of_weights_that_a_step_reads() -> None:
    """(32 x 218,103,808 + 525,336,576 + 266,240) x 2 bytes; the input table is not read."""
    assert LLAMA_8B.weights_read(16) == 15_009_849_344


def test_bytes_of_weights_of_eight_bits() -> None:
    """32 x 218,103,808 and the norms have 1 byte; the head keeps 2: 1,050,673,152. In memory the input table comes on
    top, with 2 as well."""
    fp8 = replace(LLAMA_8B, element=1.0)
    assert fp8.weights_read(16) == 8_030_261_248
    assert fp8.weight_bytes == 9_080_934_400


def test_tokens_that_fit_beside_the_weights() -> None:
    """0.9 x 80 GB less 16,060,522,496 bytes of weights leave 55,939,477,504; a token takes 2 x 32 x 8 x 128 x 2 =
    131,072: 426,784 tokens, or 104 sequences of 4096."""
    assert ALONE.kv_tokens == 426_784
    assert ALONE.kv_tokens // 4096 == 104


def test_time_per_token_at_the_bare_roofline() -> None:
    """16 sequences of 2048 tokens: 15,009,849,344 bytes of weights and 4 x 16 x 4096 of activations over 3.35 TB/s are
    4.48063 ms; 16 x 2048 x 131,072 bytes of KV are 1.28208 ms."""
    assert ALONE.step(Load(16, 2048)).seconds == pytest.approx(5.76271e-3, rel=1e-5)


def test_dollars_per_million_tokens() -> None:
    """16 tokens in 5.76271 ms are 2776.47 a second, or 9.99529 million an hour, for $11.06."""
    dollars = price(ALONE) / 3600 / (16 / ALONE.step(Load(16, 2048)).seconds) * 1e6
    assert dollars == pytest.approx(1.10652, rel=1e-5)


def test_time_per_token_by_an_engine_s_efficiency() -> None:
    """Two H100, 64 sequences of 4096 tokens. Weights: 15,010,897,920 bytes / (2 x 3.35 TB/s x 0.95) = 2.35835 ms (their
    FLOPs, 2 x 7,504,658,432 x 64 / (2 x 989 T x 0.58), take 0.837 ms). Beside: 0.5 ms + 32 layers x 68 us + 64
    sequences x 38 us = 5.108 ms. 64 all-reduces of 524,288 bytes: 64 x (2 us + 1.16508 us) = 0.20257 ms. KV:
    34,359,738,368 bytes / (2 x 3.35 TB/s x 0.74) = 6.93016 ms."""
    reached = Efficiency(
        dense=((1.0, 0.95),),
        attention=((1.0, 0.74),),
        compute=0.58,
        step_overhead=5e-4,
        layer_overhead=6.8e-5,
        row_overhead=3.8e-5,
        collective_latency=2e-6,
    )
    system = replace(ALONE, device=replace(H100, efficiency=reached), tensor_parallel=2)
    assert system.step(Load(64, 4096)).seconds == pytest.approx(14.59908e-3, rel=1e-5)


def test_a_prompt_is_bound_by_the_flops_that_kernels_reach() -> None:
    """8192 tokens: 2 x 6,979,321,856 x 8192 FLOPs and one token's logits, 1,050,673,152, at 989 T x 0.5: 231.2524 ms.
    Their 8192 x 8193 / 2 pairs x 2 x 2 x 4096 x 32 layers = 17.59433 TFLOP: 35.5800 ms."""
    device = replace(H100, efficiency=Efficiency(compute=0.5))
    seconds = replace(ALONE, device=device).step(Load(0, 0, 8192, 8192 * 8193 / 2, 8192)).seconds
    assert seconds == pytest.approx(266.832e-3, rel=1e-4)


def test_experts_read_and_computed() -> None:
    """Qwen3-30B-A3B, 16 tokens: 128 (1 - (1 - 8/128)^16) = 82.4225 of 128 experts of 3 x 2048 x 768 parameters in 48
    layers are 37.3361 GB; 16 x 8 of them in FLOPs. Experts that reach half of the bandwidth take 22.2902 ms."""
    shape = model("qwen3-30b-a3b")
    assert shape.experts_read(16) == pytest.approx(37.3361e9, rel=1e-5)
    assert shape.expert_flops(16) == 2 * 16 * 8 * 48 * 4_718_592
    whole, half = (
        Colocated(model=shape, device=replace(H100, efficiency=Efficiency(experts=share))).step(Load(16, 1)).seconds
        for share in (1.0, 0.5)
    )
    assert half - whole == pytest.approx(22.2902e-3 / 2, rel=1e-4)
