"""The cost model: what papers say of single operators, and that nothing better is ever slower."""

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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"read": 0.0}, "read of policy"),
        ({"held": 1.5}, "held of policy"),
        ({"window": 0}, "window of policy"),
        ({"read": "a"}, "read of policy 'odd' is 'a'"),
    ],
)
def test_policies_say_what_is_allowed(changes: dict[str, float], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        KvPolicy("odd", **changes)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("batch", [(-1, 10), (1, float("nan")), (1, float("inf")), (1, 10, 0, 5.0)])
def test_batches_say_what_is_allowed(batch: tuple[float, ...]) -> None:
    with pytest.raises(InvalidRequest, match="a batch is Load"):
        Load(*batch)


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
        assert system.query_first(load) == kept
        assert together.step(load).seconds - system.step(load).seconds == pytest.approx(kept * 0.5 * gain)
        assert system.step(load).seconds == pytest.approx(system.lane(load, kept).alone)
        assert not together.query_first(load)


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
@given(load=loads, factor=st.floats(1.0, 16.0), field=st.sampled_from(["bandwidth", "flops", "interconnect"]))
@example(load=Load(575, 2308), factor=13.4, field="bandwidth")  # FLOPs bound the dense layers, bytes k and v of them
def test_a_better_device_is_never_slower(load: Load, factor: float, field: str) -> None:
    better = replace(H100, **{field: getattr(H100, field) * factor})
    assert colocated(device=better).step(load).seconds <= colocated().step(load).seconds * (1 + 1e-12)
    assert offloaded(model_device=better).step(load).seconds <= offloaded().step(load).seconds * (1 + 1e-12)
    better = replace(H20, **{field: getattr(H20, field) * factor})
    assert offloaded(attention_device=better).step(load).seconds <= offloaded().step(load).seconds * (1 + 1e-12)


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


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: colocated(tensor_parallel=0), "tensor_parallel is 0"),
        (lambda: colocated(tensor_parallel=1.5), "tensor_parallel is 1.5"),
        (lambda: colocated(tensor_parallel=True), "tensor_parallel is True"),
        (lambda: colocated(kv_element=float("inf")), "kv_element is inf"),
        (lambda: colocated(memory_share=1.5), "memory_share is 1.5"),
        (lambda: offloaded(kv_element=0.0), "kv_element is 0.0"),
        (lambda: offloaded(workers=-5), "workers is -5"),
        (lambda: offloaded(lanes=0), "lanes is 0"),
        (lambda: offloaded(shard="rows"), "shard is 'rows'"),
        (
            lambda: Disaggregated(prefill=colocated(model=model("llama-3-8b")), decode=colocated(), link=FHBN),
            "prefill has model 'llama-3-8b'",
        ),
    ],
)
def test_systems_say_what_is_allowed(make: object, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        make()  # type: ignore[operator]


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


def test_weights_of_eight_bits_have_activations_of_sixteen() -> None:
    latent = model("deepseek-v3")
    assert (latent.element, latent.activation, LLAMA.activation) == (1.0, 2.0, 2.0)
    assert exchange_time(latent, FHBN, 1e10, Load(64, 4096)).nbytes == 64 * latent.exchange_bytes() == 1_091_870_720
