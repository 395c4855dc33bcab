"""Speculation in the cost model: tokens a step, rows that read KV once, a draft model's share, and when it pays."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning import BIG, EPYC, H20, H100, SMALL, STEADY, dop, together

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import (
    Load,
    Speculation,
    StepCost,
    attention_time,
    best_drafts,
    dense_time,
    exchange_time,
    token_cost,
)
from lamina.simulator.costs.hardware import Link
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Disaggregated
from lamina.simulator.event_loop.simulate import Slo, simulate
from lamina.simulator.steady_state.closed_form import estimate
from lamina.simulator.traces.arrivals import Arrival, Trace

HALF = Speculation(0.5)
DRAFTED = Speculation(0.75, 3, name="llama-3-8b", draft=model("llama-3-8b"))


def test_tokens_of_a_step() -> None:
    """a = 0.5, k = 4: 1 + 1/2 + 1/4 + 1/8 + 1/16 = 1.9375; in half of the steps: 1.46875. a = 1: k + 1; a = 0: 1."""
    assert HALF.tokens_a_step(4) == pytest.approx(1.9375)
    assert replace(HALF, proposed=0.5).tokens_a_step(4) == pytest.approx(1.46875)
    assert replace(HALF, acceptance=1.0).tokens_a_step(4) == 5
    assert replace(HALF, acceptance=0.0).tokens_a_step(4) == 1
    assert HALF.tokens_a_step(0) == 1


def test_drafts_read_kv_once_and_cross_each() -> None:
    """20 sequences of 8192 tokens, 4 drafts each: 20 x 8192 x 327,680 bytes over 3.35 TB/s, as without; FLOPs and bytes
    on the wire five times."""
    plain, drafted = Load(20, 8192), Load(20, 8192, drafts=4)
    assert drafted.tokens == drafted.decode_tokens == 100
    assert attention_time(BIG, H100, drafted) == pytest.approx(20 * 8192 * 327_680 / 3.35e12)
    far = Link("far", 1e9, 0.001)
    assert exchange_time(BIG, far, 1e9, drafted).nbytes == 5 * exchange_time(BIG, far, 1e9, plain).nbytes
    assert exchange_time(BIG, far, 1e9, drafted).waiting == exchange_time(BIG, far, 1e9, plain).waiting


def test_where_compute_bounds_attention_drafts_take_longer() -> None:
    latent = model("deepseek-v3")  # 242 FLOPs a byte, H20 has 37
    plain, drafted = (attention_time(latent, H20, Load(8, 8192, drafts=k)) for k in (0, 3))
    assert drafted == pytest.approx(4 * plain)


def test_a_token_costs_its_share_of_a_step_and_prompts_all_of_theirs() -> None:
    """By hand: a step of 10 s, 11 with two drafts, 3 more with a prompt. a = 0.5: 1.75 tokens for 11 s are 6.29 s a
    token; with the prompt 11 / 1.75 + 3 = 9.29. One draft: 10.5 / 1.5 = 7."""

    def step(load: Load) -> StepCost:
        seconds = 10 + load.drafts / 2 + 3 * (load.prefill_tokens > 0)
        return StepCost(seconds, seconds / 2, link_bytes=100 * (1 + load.drafts))

    two = replace(HALF, tokens=2)
    assert best_drafts(two, Load(1, 64), step)[0] == 2
    alone, beside = token_cost(two, Load(1, 64), step), token_cost(two, Load(1, 64, 512), step)
    assert (alone.seconds, beside.seconds) == (pytest.approx(11 / 1.75), pytest.approx(11 / 1.75 + 3))
    assert alone.model == pytest.approx(alone.seconds / 2)
    assert alone.link_bytes == pytest.approx(300 / 1.75)
    assert token_cost(two, Load(0, 0, 512), step) == StepCost(13, 6.5, link_bytes=100)
    assert token_cost(None, Load(1, 64), step) == step(Load(1, 64))


def test_there_are_no_drafts_where_they_do_not_pay() -> None:
    """A step twice as long for one draft that is accepted half of the time: 1.5 tokens for the time of 2."""
    drafts, cost = best_drafts(HALF, Load(1, 64), lambda load: StepCost(1 + load.drafts))
    assert (drafts, cost) == (0, StepCost(1.0))


def test_a_lone_sequence_gains_what_is_accepted_and_a_full_batch_little() -> None:
    """Four H100, one sequence: weights bound the step, 5 tokens instead of 1 change nothing: 1.9375 times as fast. With
    1024 FLOPs bound it, and drafts would only add to them."""
    plain, drafted = together(4), replace(together(4), speculation=HALF)
    assert plain.step(Load(1, 512)).seconds / drafted.step(Load(1, 512)).seconds == pytest.approx(1.9375, rel=0.01)
    assert drafted.step(Load(1024, 16)).seconds == plain.step(Load(1024, 16)).seconds


def test_a_draft_model_costs_a_step_of_its_own_for_each_draft() -> None:
    """k = 3: three steps of llama-3-8b on one H100, 15 GB of weights and 512 x 131,072 bytes of KV over 3.35 TB/s: 4.5
    ms each. Prompts are read by both models."""
    load = Load(1, 512, drafts=3)
    draft = DRAFTED.draft
    assert draft is not None
    each = (draft.weights_read(1) + 512 * 131_072) / 3.35e12
    assert each == pytest.approx(0.0045, rel=0.02)
    assert DRAFTED.draft_time(H100, load) == pytest.approx(3 * each, rel=1e-3)
    more = DRAFTED.draft_time(H100, replace(load, prefill_tokens=512)) - DRAFTED.draft_time(H100, load)
    assert more == pytest.approx(dense_time(draft, H100, 1, Load(0, 0, 512)))
    assert HALF.draft_time(H100, load) == DRAFTED.draft_time(H100, Load(1, 512)) == 0
    paid = replace(together(4), speculation=DRAFTED).step(Load(1, 512)).seconds
    free = replace(together(4), speculation=Speculation(0.75, 3)).step(Load(1, 512)).seconds
    assert free < paid < together(4).step(Load(1, 512)).seconds


def test_a_draft_model_and_its_kv_take_memory() -> None:
    """Of 4 x 72 GB, 137.5 are the model's and 16.06 the draft's; a token has 327,680 + 131,072 bytes. Where attention
    is elsewhere, the draft's KV has the room beside both models' weights: (144 - 153.56) GB are none."""
    plain, drafted = together(4).capacity.tokens, replace(together(4), speculation=DRAFTED).capacity.tokens
    assert plain == pytest.approx((288e9 - 137.5e9) / 327_680, abs=1)
    assert drafted == pytest.approx((288e9 - 137.5e9 - 16.06e9) / 458_752, rel=1e-4)
    with pytest.raises(InvalidRequest, match=r"137\.5 GB of weights, its draft model 16\.1 GB"):
        _ = replace(dop(2, 4), speculation=DRAFTED).capacity
    away = replace(dop(4, 4), speculation=DRAFTED)
    assert away.capacity.tokens == pytest.approx((288e9 - 137.5e9 - 16.06e9) / 131_072, rel=1e-4)
    assert away.capacity.tokens < dop(4, 4).capacity.tokens == int(0.9 * 4 * 96e9 / 327_680)


def test_what_cannot_be_verified_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"vocabulary of 49152, 'llama-3-70b' of 128256"):
        replace(together(4), speculation=Speculation(0.5, name="smollm2-135m", draft=SMALL))
    for name, why in (("qwen3-next-80b-a3b", "states"), ("glm-5", "chooses")):
        with pytest.raises(InvalidRequest, match=why):
            Colocated(model=model(name), device=H100, speculation=HALF)
    with pytest.raises(InvalidRequest, match="states"):
        Speculation(0.5, name="nemotron", draft=model("nemotron-h-8b"))
    with pytest.raises(InvalidRequest, match="proposed"):
        replace(DRAFTED, proposed=0.5)


@given(st.floats(0, 1), st.integers(1, 16), st.floats(0, 1), st.integers(1, 600), st.floats(1, 30_000))
def test_it_is_never_slower_and_never_faster_than_all_accepted(
    acceptance: float, tokens: int, proposed: float, batch: int, context: float
) -> None:
    load, speculation = Load(batch, context), Speculation(acceptance, tokens, proposed)
    for system in (together(4), dop(2, 4, lanes=2), dop(2, 2, attention=EPYC)):
        plain, drafted = system.step(load), replace(system, speculation=speculation).step(load)
        assert drafted.seconds <= plain.seconds * (1 + 1e-9)
        assert drafted.seconds >= plain.seconds / (tokens + 1) * (1 - 1e-9)


@pytest.mark.parametrize("drafts", [None, HALF, DRAFTED])
def test_event_loop_and_closed_form_give_what_a_token_costs(drafts: Speculation | None) -> None:
    """One request at a time, 64 tokens of 1,024 before them: TPOT is a token's cost at 1,056, by both."""
    system = replace(together(4), speculation=drafts)
    trace = Trace("alone", tuple(Arrival(100.0 * n, 1024, 64) for n in range(4)))
    expected = system.step(Load(1, 1056)).seconds
    assert simulate(system, trace).tpot.mean == pytest.approx(expected, rel=0.01)
    rarely = replace(STEADY, prompt=1024.0, output=64.0, context=1056.0).at_rate(1e-3)
    assert estimate(system, 1, rarely, Slo()).tpot == pytest.approx(expected, rel=0.01)


def test_kv_bytes_on_the_wire_fall_by_the_acceptance() -> None:
    """Of far workers, round trips bound a lone sequence's step: 1.9375 tokens for one step's round trips."""
    far = Link("far", 1e11, 0.002)
    plain, drafted = dop(2, 4, far), dop(2, 4, far, speculation=HALF)
    ratio = plain.step(Load(1, 4096)).seconds / drafted.step(Load(1, 4096)).seconds
    assert ratio == pytest.approx(1.9375, rel=0.01)


def test_a_decode_instance_speculates_and_one_for_prompts_does_not() -> None:
    apart = Disaggregated(
        prefill=together(4), decode=replace(together(4), speculation=HALF), link=Link("l", 1e10, 1e-5)
    )
    assert apart.speculation == HALF
    assert apart.step(Load(1, 512)) == apart.decode.step(Load(1, 512)) != apart.prefill.step(Load(1, 512))
