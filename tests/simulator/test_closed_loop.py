"""A closed loop of users who ask again when answered, beside what follows by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulate.closed_loop import closed_loop

from lamina.simulator.costs.cost_model import Load
from lamina.simulator.costs.hardware import Efficiency, load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated

DEVICE = replace(load().device("h100"), efficiency=Efficiency(step_overhead=0.002, first_token_overhead=0.5))
SYSTEM = Colocated(model=model("llama-3.1-8b"), device=DEVICE, batch_tokens=1000)


def decode(rows: float, context: float) -> float:
    return SYSTEM.step(Load(rows, context)).seconds


def prompt(tokens: int, rows: float = 0, context: float = 0.0, done: int = 0) -> float:
    pairs = tokens * done + tokens * (tokens + 1) / 2
    return SYSTEM.step(Load(rows, context, tokens, pairs, done + tokens)).seconds


def test_one_user_waits_for_her_prompt_and_then_for_each_step() -> None:
    """1500 tokens in chunks of 1000: the second meets the first's 1000 keys too. Then 20 steps over 1501 to 1520 tokens
    of KV, which is 1510.5 in the mean, and a step is linear in it."""
    found = closed_loop(SYSTEM, 1, 1500, 21, variation=0)
    assert found.ttft == found.first_ttft == pytest.approx(0.5 + prompt(1000) + prompt(500, done=1000))
    assert found.tpot == pytest.approx(decode(1, 1510.5))


def test_users_who_begin_at_once_stay_in_step_where_all_outputs_are_alike() -> None:
    """Two prompts of 500 tokens are one batch of 1000 tokens, again and again: the pairs of both are 2 x 125,250."""
    both = SYSTEM.step(Load(0, 0.0, 1000, 2 * 125_250, 1000)).seconds
    found = closed_loop(SYSTEM, 2, 500, 11, variation=0)
    assert found.ttft == found.first_ttft == pytest.approx(0.5 + both)
    assert found.tpot == pytest.approx(decode(2, 505.5))


def test_prompts_go_before_decode_or_beside_it() -> None:
    """Two prompts of 1000 tokens, one batch each. The first user's second token waits for the second user's prompt
    either way; beside it, it comes out of the same batch, so that the first user is a step ahead."""
    beside, before = (
        closed_loop(SYSTEM, 2, 1000, 101, rounds=2, variation=0, prefill_first=first) for first in (False, True)
    )
    assert before.first_ttft < beside.first_ttft  # its second prompt's batch has no row beside it
    assert before.first_ttft == pytest.approx(0.5 + 1.5 * prompt(1000))
    assert beside.tpot > decode(1, 1050)


def test_outputs_of_several_lengths_set_users_apart() -> None:
    together, apart = (closed_loop(SYSTEM, 16, 1000, 200, rounds=6, variation=each) for each in (0.0, 0.2))
    assert apart.ttft < together.ttft < together.first_ttft == apart.first_ttft
    assert apart.mean_ttft(0.25) == pytest.approx(0.25 * apart.first_ttft + 0.75 * apart.ttft)


def test_users_beyond_the_room_for_kv_wait() -> None:
    few = replace(SYSTEM, max_sequences=4)
    crowded, roomy = closed_loop(few, 8, 100, 200), closed_loop(SYSTEM, 8, 100, 200)
    assert crowded.ttft > 100 * crowded.tpot  # for half an output at least
    assert crowded.tpot < roomy.tpot
