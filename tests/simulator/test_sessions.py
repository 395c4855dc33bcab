"""Agentic sessions: steps come after others, contexts grow, and what is shared is found by the real prefix cache."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_traces import reused_share
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import InvalidRequest
from lamina.simulator.costs.hardware import load
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Disaggregated
from lamina.simulator.event_loop.simulate import simulate
from lamina.simulator.traces.arrivals import Arrival, Trace, closed_loop
from lamina.simulator.traces.catalogue import trace, windows
from lamina.simulator.traces.sessions import coding_agents, open_loop

SYSTEM = Colocated(model=model("llama-3-8b"), device=load().device("h100"))


def test_steps_are_drawn_from_what_was_published() -> None:
    found = coding_agents(20_000, seed=1)
    arrivals = found.arrivals
    outputs = np.array([arrival.output for arrival in arrivals])
    assert np.median(outputs) == pytest.approx(214, rel=0.05)
    assert outputs.mean() == pytest.approx(523, rel=0.05)
    later = [arrival for arrival in arrivals if arrival.after is not None]
    fresh = np.array([arrival.prompt - arrival.shared for arrival in later if arrival.shared > 20_000])
    assert np.median(fresh) == pytest.approx(251, rel=0.05)
    assert np.median([arrival.gap for arrival in later]) < 1 < np.mean([arrival.gap for arrival in later])
    assert max(arrival.prompt + arrival.output for arrival in arrivals) <= 200_000
    assert 0.95 < reused_share(open_loop(found, 1.0, 0.02)) < 0.99  # published: 0.957, with caches that forget
    assert all(a.at == arrivals[a.after].at for a in later if a.after is not None)
    assert "median prompt" in found.remarks[0]


def test_the_same_seed_and_the_name_in_the_catalogue() -> None:
    assert trace("coding-agents", 300, seed=4) == coding_agents(300, seed=4) != coding_agents(300, seed=5)
    assert len(trace("coding-agents").arrivals) == 2000
    for wrong in ({"count": 0}, {"seed": -1}, {"rate": 0.0}):
        with pytest.raises(InvalidRequest, match=f"{next(iter(wrong))} is"):
            coding_agents(**{"count": 5, **wrong})  # type: ignore[arg-type]


def test_one_that_comes_after_waits_for_it_and_computes_only_what_is_fresh() -> None:
    """Two steps of a session: the second comes 5 s after the first one's end, and shares all but 100 tokens."""
    first = Arrival(1.0, 3200, 50)
    session = Trace("t", (first, Arrival(1.0, 3350, 20, (), 0, 5.0, 3250)))
    alone = simulate(SYSTEM, Trace("t", (first,)))
    result = simulate(SYSTEM, session)
    assert result.seconds > alone.seconds + 5.0
    assert result.ttft.p50 < result.ttft.p99  # the second's, from when it came
    assert 3250 - 32 <= result.reused_tokens <= 3250
    assert not simulate(SYSTEM, session, prefix_cache=False).reused_tokens


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 800), st.integers(1, 30), st.floats(0, 3), st.booleans()), min_size=1, max_size=15
    ),
    replicas=st.integers(1, 2),
)
def test_every_step_of_every_session_is_served_in_its_order(
    rows: list[tuple[int, int, float, bool]], replicas: int
) -> None:
    arrivals: list[Arrival] = []
    for number, (prompt, output, gap, follows) in enumerate(rows):
        if follows and arrivals:
            before = arrivals[-1]
            shared = before.prompt + before.output
            arrivals.append(Arrival(before.at, shared + prompt, output, (), number - 1, gap, shared))
        else:
            arrivals.append(Arrival(float(number), prompt, output))
    found = Trace("t", tuple(arrivals))
    begun = sum(arrival.after is None for arrival in arrivals)
    result = simulate(SYSTEM, found, replicas=min(replicas, begun))
    assert result.finished == len(rows)
    assert result.output_tokens == sum(arrival.output for arrival in arrivals)
    assert result.seconds <= sum(arrival.gap for arrival in arrivals) + len(rows) + 60


def test_users_in_a_closed_loop_never_have_more_under_way_than_they_are() -> None:
    found = Trace("t", tuple(Arrival(float(n), 500, 20) for n in range(40)))
    result = simulate(SYSTEM, closed_loop(found, 4, think=0.1))
    assert result.finished == 40
    assert result.peak_batch <= 4
    alone = simulate(SYSTEM, closed_loop(found, 1))
    assert alone.peak_batch == 1
    assert alone.seconds > result.seconds


def test_users_take_whole_sessions_in_turn() -> None:
    rows = ((0, None), (0, 0), (3, None), (3, 2), (3, 3), (9, None))
    found = Trace("t", tuple(Arrival(float(at), 50 + n, 5, (), after) for n, (at, after) in enumerate(rows)))
    taken = closed_loop(found, 1, 2.0)
    assert [(a.after, a.gap) for a in taken.arrivals] == [(None, 0.0), (0, 0), (1, 2.0), (2, 0), (3, 0), (4, 2.0)]
    assert [a.after for a in closed_loop(found, 2).arrivals] == [None, 0, None, 2, 3, 1]
    with pytest.raises(InvalidRequest, match="users is 4; allowed is 1 to 3"):
        closed_loop(found, 4)
    plain = Trace("t", tuple(Arrival(float(n), 50, 5) for n in range(9)))
    with pytest.raises(InvalidRequest, match="t by 2 users has sessions that are mixed"):
        closed_loop(closed_loop(plain, 2), 1)


def test_what_comes_after_a_request_that_fits_nowhere_does_not_come() -> None:
    most = SYSTEM.capacity.tokens
    found = Trace("t", (Arrival(0.0, most + 64, 5), Arrival(0.0, 10, 5, (), 0, 1.0), Arrival(2.0, 10, 5)))
    result = simulate(SYSTEM, found)
    assert (result.finished, result.rejected) == (1, 2)


def test_an_excerpt_of_sessions_has_whole_ones() -> None:
    found = coding_agents(3000, seed=2)
    part = windows(found, 900)
    assert 600 <= len(part.arrivals) <= 900
    whole = len(found.arrivals) / found.seconds
    assert len(part.arrivals) / part.seconds == pytest.approx(whole, rel=0.35)
    opened = open_loop(part, 1.0, 0.02)
    assert all(arrival.after is None for arrival in opened.arrivals)
    assert "each request takes 1 s" in opened.remarks[-1]
    assert open_loop(opened, 1.0, 0.02) is opened


def test_prompts_on_devices_of_their_own_serve_sessions_in_their_order() -> None:
    """The third request has one token: it never gets to the decode instance, and the fourth still comes after it."""
    system = Disaggregated(prefill=SYSTEM, decode=SYSTEM, link=load().link("ethernet-100g"))
    rows = ((0, None, 800, 20), (0, 0, 900, 30), (0, 1, 1200, 1), (0, 2, 1300, 10), (0, None, 50, 40))
    found = Trace(
        "t",
        tuple(
            Arrival(at, prompt, output, (), after, *((2.0, 600) if after is not None else ()))
            for at, after, prompt, output in rows
        ),
    )
    result = simulate(system, found)
    assert (result.finished, result.rejected) == (5, 0)
    assert result.output_tokens == 101
    assert result.seconds > 6.0
    assert result.reused_tokens > 3 * 590
    assert result.ttft.p99 < 1.0  # from when each comes
