"""KV in two tiers, replicas of the weights, and prompts before either: counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.scheduling.step_tuner import DecodeChoice, StepModel
from lamina.simulator.costs.cost_model import Load, attention_time, dense_time, exchange_time
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.offloaded import best_local_share
from lamina.simulator.costs.systems import Colocated, Disaggregated, power, price
from lamina.simulator.event_loop.instance import holders_of
from lamina.simulator.event_loop.simulate import simulate
from lamina.simulator.traces.arrivals import Arrival, Trace
from tests.support.planning import BIG, FHBN, H20, H100, dop, together

BOTH = dop(4, 1, local_share=0.5)


def test_kv_beside_the_weights_counts_too() -> None:
    """Llama-3-70B on DOP(4, 1): a token has 2 x 80 layers x 8 heads x 128 x 2 bytes = 327,680 of KV. The H20 has
    0.9 x 96 GB = 86.4 GB for it: 263,671 tokens. Four H100 have 0.9 x 320 - 137.5 = 150.5 GB: 459,289. Together
    722,960."""
    assert dop(4, 1).kv_tokens == 263_671
    assert BOTH.kv_tokens == 263_671 + 459_289 == 722_960
    assert BOTH.name == "DOP(4, 1) h100 + h20, 50% local"
    assert holders_of(replace(BOTH, attention_count=3)) == 1


def test_both_tiers_attend_at_once() -> None:
    """A hundred sequences of 2,000 tokens, half of them here: a step is the dense layers of all, then the longer of
    50 attended on four H100 (50 x 2,000 x 327,680 / (4 x 3.35 TB/s) = 2.445 ms) and of 50 on the H20, with q, k and v
    of 50 on the wire (50 x 2,000 x 327,680 / 4 TB/s = 8.192 ms, and the exchange)."""
    load, half = Load(100, 2000), Load(50, 2000)
    system = replace(BOTH, overlap=False)
    lane = system.lane(load)
    assert lane.local == pytest.approx(2.4454e-3, rel=1e-4)
    assert lane.attention == pytest.approx(8.192e-3)
    exchange = exchange_time(BIG, FHBN, system.wire, half)
    step = system.step(load)
    assert step.seconds == pytest.approx(dense_time(BIG, H100, 4, load) + exchange.seconds + 8.192e-3)
    assert step.link_bytes == pytest.approx(50 * BIG.exchange_bytes())
    assert step.model == pytest.approx(lane.dense + lane.local)
    whole = attention_time(BIG, H100, load, busiest=1 / 4)
    assert replace(system, local_share=1.0).step(load).seconds == pytest.approx(lane.dense + whole)
    assert replace(system, local_share=1.0).step(load).seconds == together(4).step(load).seconds


def test_what_has_no_room_in_one_tier_is_in_the_other() -> None:
    assert BOTH.local_part(Load(100, 1000)) == 0.5
    assert BOTH.local_part(Load(700, 1000)) == pytest.approx(1 - 263_671 / 700_000)
    assert replace(BOTH, local_share=1.0).local_part(Load(700, 1000)) == pytest.approx(459_289 / 700_000)
    assert replace(BOTH, local_share=0.1).local_part(Load(722, 1000)) == pytest.approx(1 - 263_671 / 722_000)
    assert BOTH.local_part(Load(9_000, 1000)) == pytest.approx(459_289 / 722_960)
    assert BOTH.local_part(Load(0, 0, 10, 50)) == 0.5
    assert dop(4, 1).local_part(Load(100, 1000)) == 0


def test_the_best_share_is_what_the_engine_would_find() -> None:
    """Four H100 read 13.4 TB/s, the H20 4 TB/s behind 80 round trips: at long contexts both attend equally long where
    the H20 has a little less than 4 / 17.4 = 0.23 of the KV."""
    long = Load(20, 30_000)
    share = best_local_share(BOTH, long)
    assert share == pytest.approx(1 - 0.23, abs=0.051)
    assert best_local_share(BOTH, Load(1, 100)) == 1.0  # the wire alone takes longer
    steps = [replace(BOTH, local_share=each / 10).step(long).seconds for each in range(11)]
    assert replace(BOTH, local_share=share).step(long).seconds <= min(steps)


@settings(max_examples=100)
@given(
    each=st.integers(1, 200), context=st.floats(16, 1e5), share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    lanes=st.integers(1, 4), round_trip=st.floats(0, 1e-3),
)  # fmt: skip
def test_a_step_is_what_the_engine_expects_of_the_same_tiers(
    each: int, context: float, share: float, lanes: int, round_trip: float
) -> None:
    """`StepModel` chooses lanes and the local share in the engine. Given what each tier takes for one lane, it expects
    the step that is simulated, unless the wire, which it does not know, is the limit."""
    link = replace(FHBN, round_trip=round_trip, bandwidth=1e15)
    # One worker and one model device, so that no head is left over, and room for all.
    devices = {"model_device": replace(H100, memory=1e15), "attention_device": replace(H20, memory=1e15, network=0.0)}
    system = replace(dop(1, 1), link=link, lanes=lanes, local_share=share, overlap=False, **devices)
    load, tokens = Load(each * lanes, context), each * lanes * context
    lane = system.lane(load.divided(lanes), share=share)
    whole = system.lane(load, share=share)
    expected = StepModel(
        local=whole.local / (share * tokens) if share else 0.0,
        remote=whole.attention / ((1 - share) * tokens) if share < 1 else 0.0,
        fixed=lane.exchange.seconds,
        dense={(lanes, True): lanes * lane.dense},
    )
    step = system.step(load)
    seconds = expected.seconds(DecodeChoice(lanes, share, fused=True), tokens)
    assert step.seconds == pytest.approx(max(seconds, step.network), rel=1e-6)


def test_weights_of_eight_bits_send_activations_of_sixteen() -> None:
    """DeepSeek-V3, 64 sequences: 128 heads x 576 numbers of queries, 128 x 512 of outputs and a latent of 576 are
    139,840 a layer and token; x 61 layers x 2 bytes x 64 = 1,091.9 MB a step, though its weights have 1 byte."""
    latent = model("deepseek-v3")
    assert (latent.element, latent.activation, BIG.activation) == (1.0, 2.0, 2.0)
    assert exchange_time(latent, FHBN, 45.7e9, Load(64, 8192)).nbytes == 64 * 61 * 139_840 * 2 == 1_091_870_720


def test_workers_without_weights_may_use_more_of_their_memory() -> None:
    """Seven cards of 48 GB at 0.98 hold 329 GB of KV: KernelFlume (arXiv 2606.29207) prints 330."""
    cards = replace(dop(2, 7), attention_device=replace(H20, memory=48e9), attention_memory_share=0.98)
    assert cards.kv_tokens * 327_680 == pytest.approx(329.3e9, rel=1e-3)


def test_a_batch_with_prompts_stays_on_one_replica_and_others_go_round() -> None:
    """Two replicas of one H100 each, three lanes. A batch of decode goes from replica to replica in each of 80 layers,
    with 8,192 numbers of the residual stream and as many of attention: half a round trip and 32,768 bytes a token."""
    system, load = dop(1, 4, lanes=3, model_replicas=2), Load(300, 1000)
    lane = system.lane(load.divided(3))
    assert lane.hop == pytest.approx(80 * (16.5e-6 + 100 * 32_768 / 45.7e9))
    assert lane.alone == pytest.approx(lane.dense + lane.hop + lane.exchange.seconds + lane.attention)
    assert dop(1, 4, lanes=2).lane(load.divided(2)).hop == 0
    prompts = Load(300, 1000, 4096, 4096 * 2048, 4096)
    assert system.step(prompts).seconds >= dense_time(BIG, H100, 1, Load(100, 1000, 4096, 4096 * 2048, 4096))
    assert price(system) == pytest.approx(2 * 11.06 + 4 * 4.63)
    assert system.name == "DOP(1, 4) h100 + h20, 3 lanes, 2 replicas of the weights"
    one, two = (exchange_time(BIG, FHBN, 45.7e9 * cards, load).busy for cards in (1, 2))
    assert system.step(load).network == pytest.approx(two)
    assert two == pytest.approx(one / 2)


def test_prompts_elsewhere_and_attention_elsewhere_go_together() -> None:
    """Prompts on four H100, decode on DOP(4, 2): KV goes straight to the two H20, over two cards."""
    system = Disaggregated(prefill=Colocated(model=BIG, device=H100, tensor_parallel=4), decode=dop(4, 2), link=FHBN)
    assert system.name == "4x h100 prefill + DOP(4, 2) h100 + h20 decode"
    assert system.wire == pytest.approx(2 * 45.7e9)
    assert price(system) == pytest.approx(8 * 11.06 + 2 * 4.63)
    assert power(system, (1.0, 1.0, 0.0)) == pytest.approx(8 * 700 + 2 * 400 * 0.3)
    assert system.kv_tokens == dop(4, 2).kv_tokens
    trace = Trace("short", tuple(Arrival(0.1 * number, 500, 20) for number in range(20)))
    result = simulate(system, trace)
    assert (result.finished, result.output_tokens) == (20, 400)
    assert 0 < result.power <= power(system, (1.0, 1.0, 1.0))
